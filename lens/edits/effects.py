"""`lens.effect`: what edits change, beside the same done to others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Count, Seed, check_choice, check_counts, check_lists, is_number
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.results import few
from lens.edits.base import NothingEditedError, check_edited
from lens.edits.clean_runs import CleanRuns, clean_runs, looks_ahead, of_layers
from lens.edits.controls import CONTROLS, DRAWN, Case, Control, Kind, Trial, kinds_of
from lens.edits.effect_refusals import check_predicts_next, refuse_scored, refuse_stages
from lens.edits.effect_results import Effect
from lens.edits.freezing import Freeze
from lens.edits.language import Edit
from lens.edits.losses import MEASURES, bos_policy, changes_of, predicted, predictions, two_tokens
from lens.edits.watching import Watch, migration, moved
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt
from lens.passes.keys import Keys
from lens.passes.logits import fills_masks, predicts_next
from lens.passes.sources import read_any
from lens.stats.controls import drawing
from lens.tasks.task import Task
from lens.traces.naming import patches_of

Edits: TypeAlias = Edit | Sequence[Edit] | Callable[[Prompt], Edit | Sequence[Edit]]


def effect(
    model: LoadedModel,
    prompts: Any,
    edit: Edits,
    *,
    controls: Sequence[Control] | Control | int | None = None,
    draws: Count = 1,
    amounts: Sequence[float] | None = None,
    among: Keys | None = None,
    scored: Keys | None = None,
    seed: Seed = 0,
    clean: CleanRuns | None = None,
    progress: bool = True,
) -> Effect:
    """Run prompts with an edit, with the same edit of others, and without; compare predictions.

    A small effect does not prove that what was edited is irrelevant: `migration` says whether another
    key took its place. Where the control of equal mass could not reach the keys' mass, its row says so in `mass`.
    Tokens that earlier ones see already, as in a prefix that looks both ways, are not measured.

    Args:
        model: a causal language model, as `lens.load` returns it, or any that its task takes; or `model.part("cross")` or another part of
            an encoder-decoder, whose prompts are sources with targets: the loss is that of the target.
        prompts: as for `lens.capture`, texts with images too (of an image no token is predicted); or a
            `lens.tasks.Task`, whose metric is measured beside the loss of its clean prompts (of a
            classifier, of texts or pictures, and of a model that fills in masked tokens beside the loss of its answers).
        edit: one of `lens.edits`, several that act together, or a function of the prompt (its `ids` and
            `inputs`) that returns these. `Ablate` takes its mean over these prompts if it names none.
        controls: some of "size", "mass", "position", "self", "layer", "norm", for which see
            `lens.edits.controls`; None: those of its kind; a number: those of its kind with so many
            draws. Where one makes no sense the result says why there is none.
        draws: of each random control; their mean counts, without those that have to leave every row of a prompt as it is.
            Where all have to the result says that there is no such control.
        amounts: of the edit, each once, instead of its own; the controls edit the same at each.
        among: keys that controls may take; None: all.
        scored: positions (of a target) whose next token is measured; None: all.
        seed: of controls and bootstrap.
        clean: runs without an edit that other tests share with this one.
        progress: show a bar.

    Raises:
        LensError: prompts of one token or without the keys, an edit that has to leave every row of a prompt as it is,
            a model that predicts no next token where no task is given, what is no edit, unknown controls, no amount or one twice or of an edit that has none, `clean` of
            another model, and as `lens.edit`.

    Example:
        >>> found = lens.effect(model, texts, lens.edits.Mask("first", heads=["L1H0"]))
        >>> found.table()[["condition", "amount", "mass", "delta_loss", "delta_loss_low"]]
        >>> lens.effect(small, copying, lens.edits.Ablate("L1H0", "mean"), controls=2).findings()
        >>> pairs = [([3, 4, 5, 6], [2, 30, 31, 32]), ([9, 8, 7], [2, 40, 41])]
        >>> lens.effect(translator.part("cross"), pairs, lens.edits.Ablate("L1H0", "pooled_mean")).findings()
    """
    named, draws = _named(controls, draws)
    doses = None if amounts is None else _doses(amounts)
    task = prompts if isinstance(prompts, Task) else None
    model.check_part()
    if task is None:
        check_predicts_next(model)
    else:
        task.check(model)
        refuse_stages(model, task)
        refuse_scored(model, scored)
        task.refuse_lengths("lens.effect")
    whole = prompts if task is None else task.as_prompts
    read = read_any(model, whole)[0]
    of_pictures = task is not None and task.targets is None and task.clean.is_floating_point()
    ids = [] if of_pictures else [two_tokens(prompt.predicted) for prompt in read]
    edits_of = _edits_of(model, edit, whole)
    first = edits_of(read[0])
    kinds = kinds_of(model, first)
    if named is None:
        named = list(dict.fromkeys(name for kind in kinds for name in kind.usual))
    missing = {}
    for name in named:
        reasons = [kind.missing(name) for kind in kinds]
        if all(reasons):
            missing[name] = "; ".join(dict.fromkeys(map(str, reasons)))
    conditions = ["edit", *(one for one in named if one not in missing)]
    most = 0
    if doses is not None:
        for one in first:
            one.at(doses[-1])  # refused before anything runs
        furthest = np.abs(np.array(doses) - first[0].idle)
        most = len(doses) - 1 - int(furthest[::-1].argmax())  # the higher of two
    run = _Run(model, clean_runs(model, clean), seed, task, scored, doses, most)
    done, scopes = [first], []
    with advancing("effect", len(read), progress) as advance:
        for number, prompt in enumerate(read):
            if number:
                done.append(edits_of(prompt))
                kinds = kinds_of(model, done[-1])
            scopes += [kind.scope for kind in kinds]
            run.prompt(number, prompt, kinds, conditions, draws, among)
            advance(1)
    words, dose = _said(done, doses is None)
    return Effect(
        values=run.values(conditions),
        migration=migration(run.moves),
        alphas=tuple(run.alphas),
        edit=words,
        amounts=tuple(doses or [dose]),
        scope=few(list(dict.fromkeys(scopes)), 8),
        tokens=tuple(run.lengths),
        bos=bos_policy(model, ids) if ids else "",
        seed=seed,
        missing=missing | run.missing,
        held=" or ".join(dict.fromkeys(kind.held for kind in kinds)),
        part=model.chosen,
        metric="" if task is None else task.metric,
        task="" if task is None else task.name,
        per="token" if predicts_next(model) else "answer" if fills_masks(model) else "prompt",
        patches=() if ids else patches_of(model, read, run.lengths),
        most=most,
    )


def _named(
    controls: Sequence[Control] | Control | int | None, draws: int
) -> tuple[list[str] | None, int]:
    """The controls that are named, or None, and how many draws of each random one."""
    if isinstance(controls, int | float):
        check_counts(controls=controls)
        if draws not in (1, controls):
            raise LensError(
                f"controls={controls} are draws of each control, and draws={draws} too; give one"
            )
        return None, int(controls)
    several = [controls] if isinstance(controls, str) else controls
    if several is None:
        return None, draws
    return [check_choice("controls", one, CONTROLS) for one in several], draws


def _doses(amounts: Sequence[float]) -> list[float]:
    """Amounts in rising order."""
    check_lists(amounts=amounts)
    if not all(map(is_number, amounts)):
        raise LensError(f"amounts must be numbers, got {list(amounts)}")
    found = sorted(map(float, amounts))
    if not found or len(set(found)) < len(found):
        raise LensError(f"amounts must be different, at least one; got {list(amounts)}")
    return found


class _Run:
    """The numbers of every condition, prompt by prompt."""

    def __init__(
        self,
        model: LoadedModel,
        runs: CleanRuns,
        seed: int,
        task: Task | None,
        scored: Keys | None,
        doses: list[float] | None,
        most: int,
    ) -> None:
        self._model, self._runs, self._seed, self._task = model, runs, seed, task
        self._scored, self._doses, self._most = scored, doses or [None], most
        self._found: dict[tuple[str, str], list[np.ndarray]] = {}
        self.moves: list[np.ndarray] = []
        self.alphas: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.missing: dict[str, str] = {}
        """Control -> why it is left out, of one whose draws all left a prompt as it was."""

    def prompt(
        self,
        number: int,
        prompt: Prompt,
        kinds: list[Kind],
        conditions: Sequence[str],
        draws: int,
        among: Keys | None,
    ) -> None:
        """All conditions of one prompt at all amounts."""
        before = self._runs.of(prompt)
        self.lengths.append(len(prompt.predicted or ()) or before.received.shape[-1])
        everywhere = torch.ones(
            self._model.info.layers, before.received.shape[-1], dtype=torch.bool
        )
        case = Case(prompt, before, self._runs, everywhere, np.random.default_rng(self._seed))
        if among is not None:
            case = replace(case, free=case.members("among", among))
        kept = self._kept(number, case)
        for condition in conditions:
            if condition in self.missing:
                continue
            reasons = [kind.missing(condition) for kind in kinds]
            if all(reasons):
                raise LensError(
                    f"the first prompt has a {condition} control and prompt {number} has none: {reasons[0]}; "
                    "leave it out of controls"
                )
            rows, digest, why = [], prompt.inputs_sha256, ""
            case = replace(case, random=drawing(self._seed, condition, digest))
            for _ in range(draws if condition in DRAWN else 1):
                trials = [
                    kind.trial("edit" if kind.missing(condition) else condition, case)
                    for kind in kinds
                ]
                try:
                    rows.append(self._measured(number, case, kept, condition, trials, kinds))
                except NothingEditedError as error:
                    why = str(error)
            if not rows and condition == "edit":
                raise LensError(f"{why}; edit other or fewer keys, or leave the prompt out")
            if not rows:
                self.missing[condition] = why
                continue
            for name in rows[0][0]:
                values = np.array([[dose[name] for dose in row] for row in rows]).mean(0)
                self._found.setdefault((condition, name), []).append(values)

    def _kept(self, number: int, case: Case) -> Tensor:
        """bool [tokens - 1], of which of them the next one is measured; [1] of predictions that are of no next token."""
        kept = torch.ones(1, dtype=torch.bool)
        if predicts_next(self._model):
            kept = predicted(self._model, case.prompt)
        if self._scored is not None:
            kept = kept & case.scored(self._scored)[:-1].to(kept.device)
            if not bool(kept.any()):
                raise LensError("scored holds no position of a prompt whose next token is text")
        if (hides := case.before.hides) is not None:
            kept = kept & hides.to(kept.device)
            if not bool(kept.any()):
                raise LensError(
                    f"every text token that is measured in prompt {number} is seen by earlier ones already, so it has no "
                    "next-token loss; give an answer behind what is seen both ways"
                )
        return kept

    def _measured(
        self,
        number: int,
        case: Case,
        kept: Tensor,
        condition: str,
        trials: Sequence[Trial],
        kinds: Sequence[Kind],
    ) -> list[dict[str, float]]:
        """Every measure at each amount."""
        given = [trial.mass for trial in trials if trial.mass == trial.mass]
        known = {
            "keys": float(sum(trial.count for trial in trials)),
            "mass": float(np.mean(given)) if given else float("nan"),
        }
        found = []
        edits = [one for trial in trials for one in trial.edits]
        for place, dose in enumerate(self._doses):
            at = edits if dose is None else [one.at(dose) for one in edits]
            record = condition == "edit" and place == self._most
            after = self._edited(number, case, at, kinds, record=record)
            found.append(known | self._compared(number, case, kept, after))
        return found

    def _edited(
        self,
        number: int,
        case: Case,
        edits: Sequence[Edit],
        kinds: Sequence[Kind],
        *,
        record: bool,
    ) -> Tensor:
        """Predictions [tokens, vocab] with the edits."""
        running = [one.start(self._model, "auto") for one in edits]
        attention = [one.attention for one in running if one.attention is not None]
        rows = kinds[0].rows(case) if len(kinds) == 1 and record else None
        watch = Watch(*attention, rows=rows, record=record, ahead=looks_ahead(self._model))
        with ExitStack() as stack:
            for one in running:
                stack.enter_context(one.hooks)
            after = predictions(self._model, case.prompt, watch.on_layer, parts=True)
        check_edited(attention, number)
        if record:
            alpha = case.before.alpha
            if rows is not None:
                alpha = self._runs.run(case.prompt, rows).alpha
            source = torch.stack([kind.sources(case) for kind in kinds]).any(0)
            later = of_layers(self._model, watch.alpha())
            self.alphas.append(torch.stack([alpha, later]).float().numpy())
            self.moves.append(moved(alpha, later, source[:, None]))
        return after

    def _compared(self, number: int, case: Case, kept: Tensor, after: Tensor) -> dict[str, float]:
        before = case.before.predictions
        if self._task is not None and not predicts_next(self._model):
            at = self._task.positions[number].to(after.device)
            changed = changes_of(before[at], after[at], self._task.correct[number].to(after.device))
        else:
            ids = torch.tensor(case.prompt.predicted, device=after.device)
            changed = changes_of(before[:-1][kept], after[:-1][kept], ids[1:][kept])
        found: dict[str, float] = dict(zip(MEASURES, changed, strict=True))
        if self._task is not None:
            row = torch.tensor([number])
            was, now = (float(self._task.measure(one[None], row)) for one in (before, after))
            found |= {"metric": now, "gain": self._task.sign * (now - was)}
        return found

    def values(self, conditions: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """condition -> measure -> [amounts, prompts]."""
        found: dict[str, dict[str, np.ndarray]] = {
            name: {} for name in conditions if name not in self.missing
        }
        for (condition, name), rows in self._found.items():
            if condition in found:
                found[condition][name] = np.stack(rows, 1)
        return found


def _edits_of(
    model: LoadedModel, edit: Edits, prompts: Any
) -> Callable[[Prompt], tuple[Edit, ...]]:
    """The edits of a prompt; what they need of all prompts is read once."""

    def of_all(given: Edit | Sequence[Edit]) -> tuple[Edit, ...]:
        several = (given,) if isinstance(given, Edit) else given
        if isinstance(several, str) or not isinstance(several, Sequence) or not several:
            raise LensError(
                f"edit must be one of lens.edits, such as Mask('first'), or several; got {given!r}"
            )
        return tuple(
            one
            if isinstance(one, Freeze) or not isinstance(one, Edit)
            else one.ready(model, prompts)
            for one in several
        )

    def of_one(given: tuple[Edit, ...], prompt: Prompt) -> tuple[Edit, ...]:
        return tuple(
            one.ready(model, prompt.inputs) if isinstance(one, Freeze) else one for one in given
        )

    if callable(edit) and not isinstance(edit, Edit):
        return lambda prompt: of_one(of_all(edit(prompt)), prompt)
    once = of_all(edit)
    return lambda prompt: of_one(once, prompt)


def _said(by_prompt: Sequence[Sequence[Edit]], own: bool) -> tuple[str, float]:
    """The edits of all prompts in a few words, and their amount: "Mask first", "2 × Activation to 0 and Ablate to mean".

    Where each has its `own` amount and these differ they are said one by one, and the amount is NaN.
    """
    doses = dict.fromkeys(f"{one.dose:g}" for edits in by_prompt for one in edits)
    apart = own and len(doses) > 1
    found = []
    for edits in by_prompt:
        said = (
            f"{one.words} (amount {one.dose:g})" if apart and one.dose == one.dose else one.words
            for one in edits
        )
        shown = (f"{n} × {words}" if n > 1 else words for words, n in Counter(said).items())
        found.append(" and ".join(shown))
    unlike = list(dict.fromkeys(found))
    words = few(unlike, 3, " or ") + " by prompt" * (len(unlike) > 1)
    return words, math.nan if apart else by_prompt[0][0].dose
