"""Massive activations: the few huge numbers in the residual stream that go with sinks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.results import Result, described
from lens.edits.clean_runs import CleanRuns, clean_runs
from lens.edits.effect_results import Effect
from lens.edits.losses import bos_policy, log_probabilities, two_tokens
from lens.edits.recording import EffectRecorder
from lens.edits.watching import Watch
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.stream import changed, stream

RATIO, MAGNITUDE = 1000.0, 100.0
_CONDITIONS = ("edit", "size", "norm", "position")


@dataclass(frozen=True, eq=False)
class MassiveActivations(Result):
    """Massive activations of a model on some prompts.

    Attributes:
        rows: one per (dimension, position) that is massive somewhere: `emergence`, the first layer
            whose output has it in most of the prompts where it ever is (-1: the embedding),
            `vanishing`, the first layer after that whose output has it no longer (NaN: it stays to
            the end), `value`, its mean at emergence (signed), `ratio`, the largest `|h| / median`,
            `prompts`, the share of prompts with it, `token`, its most frequent token.
        top: [prompts, layers + 1, 3], the largest |h| of each layer; median: [prompts, layers + 1].
            The first is what enters layer 0.
        ratio, magnitude: thresholds.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
    """

    rows: pd.DataFrame = field(repr=False)
    top: np.ndarray = field(repr=False)
    median: np.ndarray = field(repr=False)
    ratio: float
    magnitude: float
    tokens: tuple[int, ...]
    bos: str

    @property
    def dimensions(self) -> list[int]:
        """The dimensions, ascending."""
        return sorted(set(self.rows["dimension"].tolist()))

    @property
    def positions(self) -> list[int]:
        """The positions, ascending."""
        return sorted(set(self.rows["position"].tolist()))

    @property
    def layer(self) -> int | None:
        """The first layer of emergence, or None."""
        return None if self.rows.empty else int(self.rows["emergence"].min())

    def table(self) -> pd.DataFrame:
        """The rows with thresholds, BOS policy and number of prompts."""
        return self.rows.assign(
            threshold_ratio=self.ratio,
            threshold_magnitude=self.magnitude,
            bos=self.bos,
            n=len(self.tokens),
        )

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> list[str]:
        """What was found, or how far the largest came."""
        limits = f"|h| > {self.magnitude:g} and |h| ≥ {self.ratio:g} × the layer's median"
        ending = f"{len(self.tokens)} prompts of {min(self.tokens)} to {max(self.tokens)} tokens, BOS {self.bos}"
        if self.rows.empty:
            ratio = self.top[..., 0] / self.median
            return [
                f"No activation is massive ({limits}): the largest is {self.top.max():.3g}, and the "
                f"largest ratio to a median {ratio.max():.3g} ({ending})."
            ]
        sentences = [f"{len(self.dimensions)} dimensions are massive ({limits}; {ending})."]
        for row in self.rows.to_dict("records"):
            gone = (
                "stays to the last layer"
                if np.isnan(row["vanishing"])
                else f"is gone after layer {row['vanishing']:.0f}"
            )
            sentences.append(
                f"Dimension {row['dimension']} at position {row['position']} ({row['token']!r}) appears "
                f"after layer {row['emergence']} with {row['value']:.0f}, reaches {row['ratio']:.0f} "
                f"medians, {gone}; in {row['prompts']:.0%} of the prompts."
            )
        return sentences


def massive(
    model: LoadedModel, prompts: Any, *, ratio: float = RATIO, magnitude: float = MAGNITUDE
) -> MassiveActivations:
    """Find the dimensions, tokens and layers with massive activations; nothing is known beforehand.

    `|h| > magnitude` and `|h| >= ratio * median |h|` over all tokens and dimensions of the layer's
    output (Sun et al., arXiv 2402.17762). Small models have smaller numbers: lower the thresholds,
    which every result states.

    Args:
        model: as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        ratio, magnitude: thresholds.

    Raises:
        LensError: thresholds that are not positive (0 is allowed for `magnitude`), prompts without
            tokens, a model whose layers are not found.

    Example:
        >>> found = lens.sinks.massive(model, texts)
        >>> found.dimensions, found.layer
    """
    if not ratio > 0 or not magnitude >= 0:
        raise LensError(f"ratio must be above 0 and magnitude at least 0, got {ratio}, {magnitude}")
    ids, hits, top, median = [], [], [], []
    for number, prompt in enumerate(read_prompts(model, prompts)[0]):
        if prompt.ids is None:
            raise LensError("massive needs prompts of tokens; for images: lens.sinks.high_norm")
        ids.append(prompt.ids)
        h = stream(model, prompt)  # [layers + 1, tokens, width]
        size = h.abs()
        middle = size.flatten(1).median(1).values
        top.append(size.flatten(1).topk(3).values)
        median.append(middle)
        floor = (middle * ratio)[:, None, None]
        for layer, position, dimension in ((size > magnitude) & (size >= floor)).nonzero().tolist():
            value = float(h[layer, position, dimension])
            hits.append(
                (number, layer - 1, position, dimension, value, abs(value) / float(middle[layer]))
            )
    columns = ["prompt", "layer", "position", "dimension", "value", "ratio"]
    rows = _rows(pd.DataFrame(hits, columns=columns), model, ids)
    return MassiveActivations(
        rows,
        torch.stack(top).numpy(),
        torch.stack(median).numpy(),
        ratio,
        magnitude,
        tuple(len(one) for one in ids),
        bos_policy(model, ids),
    )


def _rows(hits: pd.DataFrame, model: LoadedModel, ids: Sequence[Sequence[int]]) -> pd.DataFrame:
    columns = (
        "dimension", "position", "token", "emergence", "vanishing", "value", "ratio", "prompts",
    )  # fmt: skip
    rows = []
    for (dimension, position), group in hits.groupby(["dimension", "position"]):
        having = group["prompt"].unique()
        often = group.groupby("layer")["prompt"].nunique() > len(having) / 2
        layers = [int(layer) for layer in often.index[often]] or [int(group["layer"].min())]
        last = max(layers)
        tokens = [ids[number][position] for number in having]
        rows.append(
            {
                "dimension": dimension,
                "position": position,
                "token": model.token_strings([max(set(tokens), key=tokens.count)])[0],
                "emergence": layers[0],
                "vanishing": np.nan if last == model.info.layers - 1 else last + 1,
                "value": group.loc[group["layer"] == layers[0], "value"].mean(),
                "ratio": group["ratio"].max(),
                "prompts": len(having) / len(ids),
            }
        )
    table = pd.DataFrame(rows, columns=list(columns))
    return table.sort_values("ratio", ascending=False, ignore_index=True)


def massive_effect(
    model: LoadedModel,
    prompts: Any,
    found: MassiveActivations,
    *,
    to: str = "zero",
    seed: int = 0,
    clean: CleanRuns | None = None,
) -> Effect:
    """Set massive activations to 0 or to their mean where they emerge; all later layers run on.

    Edit E5 of METHODS-ATTENTION 1.9, experiment 3 of Sun et al. Each (dimension, position) of `found`
    is set at the output of the layer where it emerges. Controls: "size", as many random other
    dimensions at the same positions and layers, set to 0; "norm", such dimensions changed by as much as
    the massive ones are, so that the stream is pushed equally far; "position", the same dimensions one
    position later, set to 0. `mass` is the attention that the positions receive.

    Args:
        model, prompts: as for `massive`.
        found: what `massive` found, on these or other prompts.
        to: "zero", "mean" (over the prompts of `found`, at the layer of emergence) or "others" (over the
            other prompts given, each prompt's own left out).
        seed: of control and bootstrap.
        clean: as for `lens.effect`.

    Raises:
        LensError: nothing was found, another `to`, "others" with one prompt, or prompts shorter than
            the positions + 2.

    Example:
        >>> found = lens.sinks.massive(model, texts, ratio=20, magnitude=1)
        >>> lens.sinks.massive_effect(model, texts, found).table()
    """
    if to not in ("zero", "mean", "others"):
        raise LensError(f"to must be 'zero', 'mean' or 'others', got {to!r}")
    if found.rows.empty:
        raise LensError("no massive activation was found, so there is none to edit")
    chosen = torch.ones(model.info.layers, model.info.heads, dtype=torch.bool)
    runs, random = clean_runs(model, clean), np.random.default_rng(seed)
    places = found.rows[["emergence", "position", "dimension", "value"]].to_dict("records")
    recorder = EffectRecorder(_CONDITIONS)
    asked = read_prompts(model, prompts)[0]
    given = _values_to_set(model, asked, found, to)
    for prompt, numbers in zip(asked, given, strict=True):
        ids = two_tokens(prompt.ids)
        before = runs.of(ids)
        mass = before.received[chosen].mean(0).double().numpy() / len(ids)
        source = torch.zeros(len(ids), dtype=torch.bool)
        source[found.positions] = True
        for condition in recorder.conditions:
            shift = int(condition == "position")
            after = Watch(record=condition == "edit")
            edited = _with_changes(model, ids, after, places, numbers, condition, random)
            held = mass[[place + shift for place in found.positions]].sum()
            recorder.add(condition, ids, before, edited, keys=len(places), mass=held)
            if condition == "edit":
                recorder.add_migration(ids, before, after.alpha(), source)
    edit = f"massive activations := {to}"
    return recorder.result(model, chosen, edit=edit, seed=seed)


def _values_to_set(
    model: LoadedModel, prompts: Sequence[Prompt], found: MassiveActivations, to: str
) -> np.ndarray:
    """[prompts, places]: what each place is set to.

    Raises:
        LensError: as `massive_effect`.
    """
    longest = max(found.positions)
    for prompt in prompts:
        if len(ids := two_tokens(prompt.ids)) < longest + 2:
            raise LensError(
                f"massive activations reach position {longest}; a prompt has only {len(ids)} tokens, "
                f"give prompts of at least {longest + 2}"
            )
    zeros = np.zeros((len(prompts), len(found.rows)))
    if to == "zero":
        return zeros
    if to == "mean":
        return zeros + found.rows["value"].to_numpy()
    if len(prompts) < 2:
        raise LensError("to='others' needs at least two prompts: each takes the mean of the others")
    layer, position, dimension = (
        found.rows[name].to_numpy() for name in ("emergence", "position", "dimension")
    )
    own = np.stack(
        [stream(model, prompt).numpy()[layer + 1, position, dimension] for prompt in prompts]
    )
    return (own.sum(0) - own) / (len(own) - 1)


def _with_changes(
    model: LoadedModel,
    ids: list[int],
    watcher: Watch,
    places: list[dict[Any, Any]],
    numbers: np.ndarray,
    condition: str,
    random: np.random.Generator,
) -> torch.Tensor:
    """Log-probabilities with the places of a condition set to `numbers`, each at its layer."""
    massive_dimensions = {place["dimension"] for place in places}

    def setter(here: list[tuple[dict[Any, Any], float]]) -> Any:
        def change(hidden: torch.Tensor) -> torch.Tensor:
            before, hidden = hidden, hidden.clone()
            others = [d for d in range(hidden.shape[-1]) if d not in massive_dimensions]
            drawn = iter(random.permutation(others))
            for place, number in here:
                position, dimension, other = place["position"], place["dimension"], int(next(drawn))
                if condition == "edit":
                    hidden[:, position, dimension] = number
                elif condition == "norm":
                    hidden[:, position, other] += number - before[:, position, dimension]
                elif condition == "size":
                    hidden[:, position, other] = 0.0
                else:
                    hidden[:, position + 1, dimension] = 0.0
            return hidden

        return change

    with ExitStack() as stack:
        for layer in sorted({place["emergence"] for place in places}):
            here = [
                (place, float(number))
                for place, number in zip(places, numbers, strict=True)
                if place["emergence"] == layer
            ]
            stack.enter_context(changed(model, layer, setter(here)))
        return log_probabilities(model, ids, watcher.on_layer)
