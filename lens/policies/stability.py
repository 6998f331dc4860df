"""`lens.policies.stability`: does a pattern that was found once serve elsewhere, and which published claims hold?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.choices import check_counts, is_number
from lens.common.errors import LensError
from lens.common.head_ids import all_heads, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, with_ends
from lens.models.loaded import LoadedModel
from lens.passes.blocks import BlockView, check_block_size
from lens.passes.calls import LayerCall
from lens.passes.inputs import read_prompts
from lens.passes.logits import fills_masks
from lens.passes.sessions import base, listening
from lens.policies.transferring import (
    MEASURES,
    USABLE,
    best_blocks,
    best_of,
    measure_columns,
    ordered_pairs,
    paired_units,
    searched_efficiency,
    transfer_measures,
)
from lens.stats.intervals import known_mean
from lens.stats.verdicts import verdict

CLAIMS = (
    ("AdaSpa: the pattern varies from input to input", "prompt", "efficiency", False),
    ("AdaSpa: the LSE varies from input to input", "prompt", "usable_lse", False),
    (
        "a search with the LSE of another prompt finds the blocks",
        "prompt",
        "cached_efficiency",
        True,
    ),
    ("IndexCache: neighbouring layers pick nearly the same keys", "layer", "efficiency", True),
    ("LServe, HiP: a choice serves the next few decoding steps", "step 4", "efficiency", True),
    ("a choice serves 16 decoding steps", "step 16", "efficiency", True),
    ("a checkpoint's pattern serves the other one", "checkpoint", "efficiency", True),
)
"""What is said, the condition that it is about, the measure that decides, and whether a high one agrees."""
SERVES = 0.9
"""Share of what a head's own best blocks keep from which on others are said to serve; of heads whose LSE is usable."""


@dataclass(frozen=True, repr=False, eq=False)
class PolicyStability(Result):
    """How well the best blocks of one condition serve another.

    Attributes:
        values: of each condition [measure, unit, layer, head], the measures of `lens.policies.transfer`,
            cached_efficiency in the second half of the rows; one unit for each prompt (ordered pair of prompts). For "layer" the heads of a layer are one, and the last layer has no next
            one (NaN); one row's blocks have one order whatever its LSE, so steps have no cached search.
        share: of the visible blocks that is chosen.
        layers: the model's numbers.
        seed: of the intervals.
        model: its name.
    """

    values: dict[str, np.ndarray]
    share: float
    layers: tuple[int, ...]
    seed: int
    model: str

    def table(self) -> pd.DataFrame:
        """One row per condition and head: `condition`, `layer`, `head`, `name`, `n`, every measure as its mean over
        units with the 95 % interval (`_low`, `_high`). "layer" is in `summary()` alone: it has no heads."""
        found = []
        for condition, values in self.values.items():
            if condition == "layer":
                continue
            heads = all_heads(self.layers, values.shape[3])
            units = _units(condition, np.moveaxis(values, 1, -1))
            rows = head_columns(heads) | {"n": units.shape[-1]}
            for name, one in zip(MEASURES, units, strict=True):
                rows |= measure_columns(name, one, self.seed)
            frame = pd.DataFrame(rows)
            frame.insert(0, "condition", condition)
            found.append(frame)
        return pd.concat(found, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row per condition: `condition`, `n`, every measure as its mean over heads and units, and `usable_lse`,
        the share of heads in which 99 % of the rows are within 5 %, with the 95 % interval over units (NaN for
        one unit)."""
        rows = []
        for condition, values in self.values.items():
            row: dict[str, Any] = {"condition": condition}
            off = values[MEASURES.index("lse_error")]
            usable = np.where(np.isnan(off), np.nan, off < USABLE)
            for name, one in zip((*MEASURES, "usable_lse"), (*values, usable), strict=True):
                units = _units(condition, known_mean(one.reshape(len(one), -1)))
                row["n"] = len(units)
                row |= {
                    key: value[0]
                    for key, value in measure_columns(name, units[None], self.seed).items()
                }
            rows.append(row)
        return pd.DataFrame(rows)

    def claims(self) -> pd.DataFrame:
        """One row per published claim about a condition that was measured: `claim`, `condition`, `measure`,
        `value`, `low`, `high`, and `verdict`: it "holds", "does not hold", or is "not told apart" where the interval
        holds 0.9 or there is none. An efficiency above 0.9 serves; a pattern varies where another prompt's blocks
        keep less than 0.9 of what its own keep; an LSE varies where it is usable in fewer than 0.9 of the heads."""
        rows = {row["condition"]: row for row in self.summary().to_dict("records")}
        found = []
        for claim, condition, measure, high_agrees in CLAIMS:
            if condition not in rows:
                continue
            row = rows[condition]
            low, high = (float(row[f"{measure}_{end}"]) for end in ("low", "high"))
            side = verdict(low, high, SERVES)
            agrees = side == ("above" if high_agrees else "below")
            found.append(
                {
                    "claim": claim, "condition": condition, "measure": measure, "value": float(row[measure]),
                    "low": low, "high": high,
                    "verdict": "holds" if agrees else side if side == "not told apart" else "does not hold",
                }
            )  # fmt: skip
        return pd.DataFrame(found)

    def findings(self) -> tuple[Sentence, ...]:
        """What each claim comes to ("claim"), and whether a repeat is exact ("control")."""
        said = []
        for row in self.claims().to_dict("records"):
            told = "cannot be told" if row["verdict"] == "not told apart" else row["verdict"]
            said.append(
                Sentence(
                    f"{row['claim']}: {told} here "
                    f"({row['measure'].replace('_', ' ')} {with_ends(row, 'value', '.3f', plain=True)}, "
                    f"beside {SERVES:g}).",
                    kind="claim",
                )
            )
        again = self.summary().set_index("condition").loc["repeat"]
        said.append(
            Sentence(
                f"The same prompt again: overlap {again['overlap']:.3f}, LSE usable in {again['usable_lse']:.0%} of the "
                f"heads. With the best {self.share:.0%} of the blocks of each row.",
                kind="control",
            )
        )
        return tuple(said)

    def __repr__(self) -> str:
        return f"PolicyStability({self.model}: {', '.join(self.values)})"


def stability(
    model: LoadedModel,
    prompts: Any,
    *,
    checkpoint: LoadedModel | None = None,
    steps: Sequence[int] = (1, 4, 16),
    share: float = 0.2,
    block_size: int | tuple[int, int] = 64,
    seed: int = 0,
    progress: bool = True,
) -> PolicyStability:
    """Best blocks of one condition used in another: a repeat, another prompt, a longer one, the next layer, later
    decoding steps, another checkpoint.

    In each row of blocks (for steps: in each row) the best `share` of the visible blocks of the source are
    taken by their exact mass, and the target's mass on them counted, beside its own best and random ones.
    "repeat" must be exact; "length", the first half of a prompt alone against inside the whole, is as well in
    a causal model, up to rounding. Steps of denoising: `transfer` on the traces of `lens.traces.denoising`.

    Args:
        model: as `lens.load` returns it; causal.
        prompts: at least two, of one length.
        checkpoint: another state of the model, with as many layers and heads.
        steps: how many decoding steps a choice is kept for, each on rows of the second half; blocks of keys
            that are new by then are taken too.
        share: of the blocks; at least one is taken.
        block_size: tokens, one number or (query_block, key_block).
        seed: of the intervals.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: fewer than two prompts, prompts of several lengths or shorter than the steps, a checkpoint of
            another shape, numbers that are none, a model that fills in masked tokens.

    Reference: Xia et al., AdaSpa, arXiv 2502.21079.

    Example:
        >>> found = lens.policies.stability(model, texts, block_size=4, steps=(1, 4), progress=False)
        >>> found.claims()[["claim", "value", "verdict"]]
    """
    if fills_masks(model):
        raise LensError(
            f"{model.info.class_name} predicts masked tokens and no next token: it has no decoding steps, and no "
            "prompt whose start does not see what follows"
        )
    size = check_block_size(block_size)
    if not is_number(share) or not 0 < share < 1:
        raise LensError(f"share must be between 0 and 1, got {share!r}")
    for step in steps:
        check_counts(steps=step)
    read, _ = read_prompts(model, prompts)
    lengths = {len(prompt.ids or ()) for prompt in read}
    if len(read) < 2 or len(lengths) > 1:
        raise LensError(
            f"stability takes at least two prompts of one length, got {len(read)} of {sorted(lengths)} tokens"
        )
    length = lengths.pop()
    if length < 2 * max((*steps, *size)) + 2:
        raise LensError(
            f"prompts of {length} tokens are too short for steps of {max(steps)}, or for two blocks"
        )
    if checkpoint is not None and (
        checkpoint.info.attending != model.info.attending
        or checkpoint.info.heads != model.info.heads
    ):
        raise LensError("checkpoint must have the layers and heads of the model")
    found: dict[str, list[Any]] = {}
    maps = []
    half = length // 2 // size[0] * size[0]
    with advancing(f"{model.name}: maps", len(read), progress) as advance:
        for prompt in read:
            ids = prompt.ids or []
            whole = _maps(model, ids, size)
            maps.append(whole)
            found.setdefault("repeat", []).append(_pair(whole, _maps(model, ids, size), share))
            short = _maps(model, ids[:half], size)
            found.setdefault("length", []).append(_pair(short, whole.first(half, size), share))
            found.setdefault("layer", []).append(_next_layers(whole, share))
            for step in steps:
                found.setdefault(f"step {step}", []).append(_later(whole, step, share))
            if checkpoint is not None:
                other = _maps(checkpoint, ids, size)
                found.setdefault("checkpoint", []).append(_pair(whole, other, share))
            advance(1)
    found["prompt"] = [_pair(maps[a], maps[b], share) for a, b in ordered_pairs(len(maps))]
    order = ["repeat", "prompt", "length", "layer", *(f"step {one}" for one in steps), "checkpoint"]
    return PolicyStability(
        values={name: np.moveaxis(np.array(found[name]), 0, 1) for name in order if name in found},
        share=float(share),
        layers=model.info.attending,
        seed=seed,
        model=model.name,
    )


def _units(condition: str, values: np.ndarray) -> np.ndarray:
    """Values [..., units] that are independent of each other, with the same mean."""
    return paired_units(values) if condition == "prompt" else values


@dataclass(frozen=True, eq=False)
class _Maps:
    """Of one prompt: block masses [layers, heads, I, J] and their visible blocks, single rows of the second half
    [layers, heads, rows, J] and what they see, LSE [layers, heads, queries], tokens of a query block."""

    blocks: np.ndarray
    visible: np.ndarray
    rows: np.ndarray
    seen: np.ndarray
    lse: np.ndarray
    size: int

    def first(self, tokens: int, size: tuple[int, int]) -> _Maps:
        """Of the first tokens, whole blocks of them; without single rows, which are of the second half."""
        part = np.s_[..., : tokens // size[0], : -(-tokens // size[1])]
        return _Maps(
            self.blocks[part],
            self.visible[part],
            self.rows[:, :, :0],
            self.seen[:, :, :0],
            self.lse[..., :tokens],
            self.size,
        )


def _maps(model: LoadedModel, ids: Sequence[int], size: tuple[int, int]) -> _Maps:
    parts: list[tuple[np.ndarray, ...]] = []

    def on_layer(call: LayerCall) -> torch.Tensor:
        view = BlockView(call, *size)
        result = view.attended(statistics=("lse",))
        half = view.queries // 2 // size[0] * size[0]  # whole blocks
        rows = BlockView(call, 1, size[1])
        wanted = (
            view.masses,
            view.visible,
            view.row_masses[:, :, half:],
            rows.visible[:, :, half:],
        )
        found = [one[0].cpu().numpy() for one in (*wanted, result.statistics.lse)]
        parts.append((np.nan_to_num(found[0]).astype(float), *found[1:]))
        return result.output

    with torch.no_grad(), listening(model, on_layer):
        base(model)(torch.tensor([list(ids)], device=model.device))
    blocks, visible, rows, seen, lse = (np.stack(one) for one in zip(*parts, strict=True))
    return _Maps(blocks, visible, rows, seen, lse, size[0])


def _pair(a: _Maps, b: _Maps, share: float) -> list[np.ndarray]:
    seen = a.visible & b.visible
    chosen, own = (best_blocks(one.blocks, seen, share) for one in (a, b))
    found = transfer_measures(chosen, own, b.blocks, seen, a.lse, b.lse)
    return [*found, _cached(a, b, share)]


def _cached(a: _Maps, b: _Maps, share: float) -> np.ndarray:
    """[layers, heads]: blocks of b by the sums of exp(s - LSE of a) against its own best ones.

    exp(s - L_a) is the probability times exp(L_b - L_a), so the exact masses of rows tell it.
    """
    rows = b.rows.shape[2]
    if not rows:  # b is the start of another
        return np.full(b.rows.shape[:2], np.nan)
    drift = (b.lse - a.lse)[..., -rows:]
    factor = np.exp(np.where(np.isfinite(drift), drift, 0))[..., None]
    size = b.size
    short = (-rows) % size

    def summed(values: np.ndarray) -> np.ndarray:
        padded = np.pad(values, ((0, 0), (0, 0), (0, short), (0, 0)))
        return padded.reshape(*values.shape[:2], -1, size, values.shape[-1]).sum(3)

    return searched_efficiency(summed(b.rows), summed(b.rows * factor), summed(b.seen) > 0, share)


def _next_layers(one: _Maps, share: float) -> list[np.ndarray]:
    """The mean map of the heads of each layer in the next one, [layers, 1]; NaN for the last."""
    mean = one.blocks.mean(1, keepdims=True)
    seen = one.visible[:, :1]
    chosen = best_blocks(mean, seen, share)
    nothing = np.zeros((len(mean) - 1, 1, 1))
    found = transfer_measures(chosen[:-1], chosen[1:], mean[1:], seen[1:], nothing, nothing)
    nothing = np.full_like(found[0], np.nan)  # an LSE belongs to a head
    found = [*found[:-1], nothing, nothing]
    return [np.concatenate([values, np.full((1, 1), np.nan)]) for values in found]


def _later(one: _Maps, step: int, share: float) -> list[np.ndarray]:
    """The choice of each row, and what is new, in the row that comes `step` later."""
    seen = one.seen[:, :, step:]
    chosen = best_blocks(one.rows, one.seen, share)
    half = one.lse.shape[-1] - one.rows.shape[2]
    before, after = one.lse[..., half : one.lse.shape[-1] - step], one.lse[..., half + step :]
    kept = chosen[:, :, :-step] | (seen & ~one.seen[:, :, :-step])
    later = one.rows[:, :, step:]
    own = best_of(later, seen, kept.sum(-1, keepdims=True))
    found = transfer_measures(kept, own, later, seen, before, after)
    return [*found, np.full_like(found[0], np.nan)]
