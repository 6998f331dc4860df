"""Whole heads switched off, or made to look at the first token only, beside as many other heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.head_ids import AnyHead, HeadId
from lens.common.results import Result, Sentence, described
from lens.edits._keyed import KeyedEdit
from lens.edits.attention import Drop, Move
from lens.edits.base import selected_heads
from lens.edits.clean_runs import CleanRuns, clean_runs
from lens.edits.effect_results import Effect
from lens.edits.losses import bos_policy, changes, log_probabilities, two_tokens
from lens.edits.recording import EffectRecorder
from lens.edits.watching import Watch
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.stats import over_units

DORMANT_ACTIVITY, DORMANT_LOSS = 0.2, 1e-3
"""A head is dormant on a domain where its activity and |change of loss| are below these."""
_EDITS = {"off": Drop(lambda at: at.positions >= 0), "first": Move(None, to="first")}


def head_effect(
    model: LoadedModel,
    prompts: Any,
    *,
    heads: Sequence[AnyHead],
    to: str = "off",
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> Effect:
    """Set the outputs of heads to 0, or put all their attention on the first token (E6).

    The two interventions of Guo et al. (arXiv 2410.13835). Controls: "size", as many random other
    heads; "mass", the other heads whose attention to the first token is nearest to theirs. `keys`
    counts heads; `mass` is their attention to the first token.

    Args:
        model: a causal language model, as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        heads: such as "L1H0".
        to: "off" or "first".
        seed: of control and bootstrap.
        clean: as for `lens.effect`.

    Raises:
        LensError: no head, more than half of the heads (no controls are left), another `to`, prompts
            of one token, and as `lens.effect`.

    Example:
        >>> lens.sinks.head_effect(model, texts, heads=["L1H0"], to="first").table()
    """
    if to not in _EDITS:
        raise LensError(f"to must be 'off' or 'first', got {to!r}")
    chosen = selected_heads(model, None, heads)
    count, total = int(chosen.sum()), chosen.numel()
    if not 0 < 2 * count <= total:
        raise LensError(
            f"head_effect needs 1 to {total // 2} heads of {total}, so that as many others are left to "
            f"compare with; got {count}"
        )
    runs, random = clean_runs(model, clean), np.random.default_rng(seed)
    recorder = EffectRecorder(("edit", "size", "mass"))
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        before = runs.of(ids)
        mass = before.received[..., 0] / len(ids)  # [layers, heads]
        source = torch.arange(len(ids)) == 0
        for condition in recorder.conditions:
            selected = _control(condition, chosen, mass, random)
            is_source = condition == "edit"
            after = _edit(to, selected, watch=is_source)
            edited = log_probabilities(model, ids, after.on_layer)
            recorder.add(
                condition, ids, before, edited, keys=count, mass=float(mass[selected].mean())
            )
            if is_source:
                recorder.add_migration(ids, before, after.alpha(), source)
    return recorder.result(model, chosen, edit=f"heads {to}", seed=seed)


@dataclass(frozen=True, eq=False)
class HeadActivity(Result):
    """How active each head is on each domain.

    Attributes:
        rows: one per domain, layer and head: `activity`, 1 minus the attention that the first token
            receives per query (mean over prompts); `off`, change of loss with the head off, nats per
            token, with `off_low` and `off_high`; `first` likewise with all its attention on the first
            token; `dormant`. NaN changes where the head was not edited.
        domains: name -> number of prompts.
        tokens: domain -> T of each prompt.
        bos: domain -> policy.
    """

    rows: pd.DataFrame = field(repr=False)
    domains: dict[str, int]
    tokens: dict[str, tuple[int, ...]]
    bos: dict[str, str]

    def table(self) -> pd.DataFrame:
        """The rows with BOS policy and number of prompts of each domain."""
        return self.rows.assign(
            bos=self.rows["domain"].map(self.bos), n=self.rows["domain"].map(self.domains)
        )

    def switching(self) -> list[HeadId]:
        """Edited heads that are dormant on some domain and not on another."""
        edited = self.rows[self.rows["off"].notna()]
        share = edited.groupby(["layer", "head"])["dormant"].mean()
        pairs = share[(share > 0) & (share < 1)].index.tolist()
        return [HeadId(int(layer), int(head)) for layer, head in pairs]

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """Which heads are dormant where (`dormant`, `switching`), and what that rests on (`limit`)."""
        edited = self.rows[self.rows["off"].notna()]
        found = []
        for domain, rows in edited.groupby("domain", sort=False):
            names = [
                str(HeadId(row["layer"], row["head"]))
                for row in rows[rows["dormant"]].to_dict("records")
            ]
            text = (
                f"On {domain} {len(names)} of {len(rows)} edited heads are dormant"
                + (f": {', '.join(names)}" if names else "")
                + f" ({self.domains[str(domain)]} prompts, BOS {self.bos[str(domain)]})."
            )
            found.append(Sentence(text, kind="dormant"))
        switching = ", ".join(map(str, self.switching())) or "No head"
        text = f"{switching}: dormant on one domain and not on another."
        found.append(Sentence(text, kind="switching"))
        text = (
            f"Dormant means activity below {DORMANT_ACTIVITY} and a loss that changes by less than "
            f"{DORMANT_LOSS} nats per token with the head off; heads were switched off one at a time, "
            "so heads that stand in for each other may all look dormant."
        )
        return (*found, Sentence(text, kind="limit"))


def activity(
    model: LoadedModel,
    domains: Mapping[str, Any],
    *,
    heads: Sequence[AnyHead] | None = None,
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> HeadActivity:
    """`activity_h(D) = 1 - mean alpha_first` and the losses of two interventions, by domain.

    Active-dormant heads (Guo et al., arXiv 2410.13835): two passes per head and prompt.

    Args:
        model: a causal language model, as `lens.load` returns it.
        domains: name -> prompts, as for `lens.capture`; token prompts.
        heads: those to edit; None: all.
        seed: of the bootstrap over prompts.
        clean: as for `lens.effect`.

    Raises:
        LensError: fewer than one domain, no heads, prompts of one token, and as `lens.effect`.

    Example:
        >>> lens.sinks.activity(model, {"prose": texts}, heads=["L1H0"]).table()
    """
    if not domains:
        raise LensError("activity needs at least one domain: {'prose': prompts}")
    edited = selected_heads(model, None, heads).nonzero().tolist()
    if not edited:
        raise LensError("activity edits at least one head; heads is empty")
    runs, rows, lengths, policies = clean_runs(model, clean), [], {}, {}
    for domain, prompts in domains.items():
        read = [two_tokens(prompt.ids) for prompt in read_prompts(model, prompts)[0]]
        alpha, deltas = [], {}
        for ids in read:
            before = runs.of(ids)
            alpha.append(before.alpha[..., 0].double().numpy())
            for layer, head in edited:
                one = torch.zeros(model.info.layers, model.info.heads, dtype=torch.bool)
                one[layer, head] = True
                for to in _EDITS:
                    edit = _edit(to, one, watch=False)
                    after = log_probabilities(model, ids, edit.on_layer)
                    deltas.setdefault((layer, head, to), []).append(
                        changes(before.log_probabilities, after, ids)[0]
                    )
        for (layer, head), received in np.ndenumerate(np.mean(alpha, 0)):
            row = {"domain": domain, "layer": layer, "head": head, "activity": 1 - received}
            for to in _EDITS:
                values = np.array(deltas.get((layer, head, to), [np.nan]))
                low, high = over_units(values, np.ones(len(values)), seed)
                row |= {to: values.mean(), f"{to}_low": float(low), f"{to}_high": float(high)}
            small = abs(row["off"]) < DORMANT_LOSS
            rows.append(row | {"dormant": bool(row["activity"] < DORMANT_ACTIVITY and small)})
        lengths[domain] = tuple(len(ids) for ids in read)
        policies[domain] = bos_policy(model, read)
    counts = {domain: len(found) for domain, found in lengths.items()}
    return HeadActivity(pd.DataFrame(rows), counts, lengths, policies)


def _edit(to: str, heads: torch.Tensor, *, watch: bool) -> Watch:
    plan = _EDITS[to].plan()
    return Watch(KeyedEdit(plan, heads, "auto"), record=watch)


def _control(
    condition: str, chosen: torch.Tensor, mass: torch.Tensor, random: np.random.Generator
) -> torch.Tensor:
    """bool [layers, heads]: the heads of a condition."""
    if condition == "edit":
        return chosen
    others = (~chosen).flatten().nonzero()[:, 0].numpy()
    free, picked = list(random.permutation(others)), []
    if condition == "size":
        picked = free[: int(chosen.sum())]
    else:
        flat = mass.flatten().numpy()
        for wanted in flat[chosen.flatten().numpy()]:
            free.sort(key=lambda head: abs(flat[head] - wanted))
            picked.append(free.pop(0))
    found = torch.zeros(chosen.numel(), dtype=torch.bool)
    found[[int(head) for head in picked]] = True
    return found.view_as(chosen)
