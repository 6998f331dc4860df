"""Whether a sink matters: its keys are edited away, and so are control keys; the losses decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.bootstrap import over_units
from lens.captures.inputs import read_prompts
from lens.captures.recorder import recording
from lens.errors import LensError
from lens.head_ids import AnyHead
from lens.models.loaded import LoadedModel
from lens.redistribution.editing import selected_heads
from lens.redistribution.keys import Keys, KeysAt, check_keys, members
from lens.redistribution.rules import check_rule
from lens.sinks.controls import CONTROLS, control_keys
from lens.sinks.watching import WatchedEdit

_MEASURES = ("delta_loss", "kl", "flip_rate")


@dataclass(frozen=True, eq=False)
class SinkEffect:
    """What editing the sources did, beside what editing each control did.

    Attributes:
        values: condition ("sources" and the controls) -> measure -> [prompts]. Measures: delta_loss
            (nats per token), kl (of the edited from the unedited prediction, nats), flip_rate
            (share of positions whose most likely token changed), keys (number edited), mass (share
            of all attention of the edited heads that those keys held before).
        migration: one row per layer and head, means over prompts: `source_before` and
            `source_after`, largest alpha among the sources; `other_before` and `other_after`,
            largest alpha among other keys; `other_key`, the position most often strongest after.
        edit, amount: what was done.
        tokens: [prompts], T of each.
        bos: "added", "absent" or "mixed".
        seed: of controls and bootstrap.
    """

    values: dict[str, dict[str, np.ndarray]] = field(repr=False)
    migration: pd.DataFrame = field(repr=False)
    edit: str
    amount: float
    tokens: tuple[int, ...]
    bos: str
    seed: int

    def table(self) -> pd.DataFrame:
        """One row per condition: means over prompts with 95 % bootstrap intervals over prompts.

        `excess` is the sources' delta_loss minus the control's, prompt by prompt, NaN for the
        sources themselves. Intervals are NaN for one prompt.
        """
        rows = []
        sources = self.values["sources"]["delta_loss"]
        for condition, values in self.values.items():
            row: dict[str, Any] = {"condition": condition}
            row |= {name: values[name].mean() for name in ("keys", "mass")}
            shown = {name: values[name] for name in _MEASURES}
            unlike = np.full_like(sources, np.nan)
            shown["excess"] = unlike if condition == "sources" else sources - values["delta_loss"]
            for name, numbers in shown.items():
                low, high = over_units(numbers, np.ones(len(numbers)), self.seed)
                row |= {
                    name: numbers.mean(),
                    f"{name}_low": float(low),
                    f"{name}_high": float(high),
                }
            rows.append(row)
        table = pd.DataFrame(rows)
        return table.assign(edit=self.edit, amount=self.amount, bos=self.bos, n=len(self.tokens))


def effect(
    model: LoadedModel,
    prompts: Any,
    *,
    sources: Keys = "first",
    edit: str = "mask",
    amount: float = 1.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[AnyHead] | None = None,
    controls: Sequence[str] = CONTROLS,
    seed: int = 0,
) -> SinkEffect:
    """Edit the attention to `sources` away and measure what the predictions lose.

    A small effect does not prove that a sink is irrelevant: `migration` says whether another key
    took its place. Where the mass control could not reach the sources' mass, its row says so in
    `mass`.

    Args:
        model: a causal language model, as `lens.load` returns it.
        prompts: as for `lens.capture`, token prompts.
        sources: "first", positions or a bool mask; the same in every layer.
        edit: "mask" (hide and renormalise) or "drop" (leave out what the keys contribute).
        amount: 0..1, how much of it.
        layers, heads: what to edit, as in `lens.redistribute`.
        controls: some of "size", "mass", "position"; see `control_keys`.
        seed: of controls and bootstrap.

    Raises:
        LensError: prompts of one token or without the sources, a model that predicts no next token,
            unknown edits or controls, and as `lens.redistribute`.

    Example:
        >>> result = lens.sinks.effect(model, texts, sources="first", heads=["L1H0"])
        >>> result.table()[["condition", "mass", "delta_loss", "delta_loss_low", "delta_loss_high"]]
    """
    if edit not in ("mask", "drop"):
        raise LensError(f"edit must be 'mask' or 'drop', got {edit!r}; others: lens.redistribute")
    check_rule(edit, amount, True, False)
    check_keys("sources", sources)
    if callable(sources) and not isinstance(sources, torch.Tensor):
        raise LensError("sources of effect are the same in every layer; give positions")
    if unknown := [name for name in controls if name not in CONTROLS]:
        raise LensError(f"controls must be some of {', '.join(CONTROLS)}, got {unknown}")
    chosen = selected_heads(model, layers, heads)
    random = np.random.default_rng(seed)
    values = {
        name: {key: [] for key in (*_MEASURES, "keys", "mass")} for name in ("sources", *controls)
    }
    moves, lengths, starts = [], [], []
    for prompt in read_prompts(model, prompts)[0]:
        ids = _ids(prompt.ids)
        source = members("sources", sources, KeysAt(0, 0, torch.arange(len(ids))[None], None))[0]
        if not bool(source.any()):
            raise LensError(f"none of the sources is in a prompt of {len(ids)} tokens")
        places = source.nonzero()[:, 0].tolist()
        logits, before = _pass(model, ids, places, 0.0, edit, chosen, watch=True)
        mass = torch.stack(before.received)[chosen].mean(0).double().numpy() / len(ids)
        for condition, found in values.items():
            keys = places
            if condition != "sources":
                keys = control_keys(condition, source.numpy(), mass, random)
            is_source = condition == "sources"
            edited, after = _pass(model, ids, keys, amount, edit, chosen, watch=is_source)
            for name, value in zip(_MEASURES, _changes(logits, edited, ids), strict=True):
                found[name].append(value)
            found["keys"].append(len(keys))
            found["mass"].append(mass[keys].sum())
            if is_source:
                moves.append(_moved(before.alpha(), after.alpha(), source))
        lengths.append(len(ids))
        starts.append(ids[0] == model.bos_id)
    return SinkEffect(
        values={
            name: {key: np.array(numbers, dtype=float) for key, numbers in found.items()}
            for name, found in values.items()
        },
        migration=_migration(moves),
        edit=edit,
        amount=amount,
        tokens=tuple(lengths),
        bos="mixed" if len(set(starts)) > 1 else "added" if starts[0] else "absent",
        seed=seed,
    )


def _ids(ids: list[int] | None) -> list[int]:
    if ids is None or len(ids) < 2:
        raise LensError("effect needs prompts of at least two tokens: it measures their loss")
    return ids


def _pass(
    model: LoadedModel,
    ids: list[int],
    keys: list[int],
    amount: float,
    edit: str,
    heads: torch.Tensor,
    *,
    watch: bool,
) -> tuple[torch.Tensor, WatchedEdit]:
    """Log-probabilities [tokens - 1, vocab] of every next token, and the edit that was in place."""
    watched = WatchedEdit(keys, amount, edit, heads, watch=watch)
    with torch.no_grad(), recording(model, watched):
        output = model.model(torch.tensor([ids], device=model.device))
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != (1, len(ids)):
        raise LensError(
            f"{model.info.class_name} gives no logits [1, tokens, vocab]; effect needs a language model"
        )
    return logits[0, :-1].float().log_softmax(-1), watched


def _changes(
    base: torch.Tensor, edited: torch.Tensor, ids: list[int]
) -> tuple[float, float, float]:
    """Means over positions of the loss difference, KL(base || edited) and changed top tokens."""
    target = torch.tensor(ids[1:], device=base.device)[:, None]
    delta = (base - edited).gather(1, target).mean()
    kl = (base.exp() * (base - edited)).sum(-1).mean()
    flips = (base.argmax(-1) != edited.argmax(-1)).float().mean()
    return float(delta), float(kl), float(flips)


def _moved(before: torch.Tensor, after: torch.Tensor, source: torch.Tensor) -> np.ndarray:
    """[5, layers, heads]: the columns of `SinkEffect.migration` for one prompt."""

    def largest(alpha: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = alpha.nan_to_num(nan=-1).masked_fill(~keys, -1).max(-1)
        return found.values.masked_fill(found.values < 0, torch.nan), found.indices

    columns = [largest(alpha, keys) for keys in (source, ~source) for alpha in (before, after)]
    return torch.stack([*(value for value, _ in columns), columns[-1][1]]).double().numpy()


def _migration(moves: list[np.ndarray]) -> pd.DataFrame:
    stacked = np.stack(moves)
    _, _, layers, heads = stacked.shape
    names = ("source_before", "source_after", "other_before", "other_after")
    table = pd.DataFrame(
        {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}
    )
    for place, name in enumerate(names):
        table[name] = stacked[:, place].mean(0).ravel()
    places = stacked[:, 4].reshape(len(moves), -1).astype(int)
    table["other_key"] = [np.bincount(column).argmax() for column in places.T]
    return table
