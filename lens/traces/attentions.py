"""Attention matrices of Hugging Face and TransformerLens, as traces.

Whoever holds such matrices has paid for N×N already. `lens.capture` gives the same trace without it,
and the log-sum-exp and exact tiles on top.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from lens.common.choices import Count, check_counts, check_lists, is_whole
from lens.common.errors import LensError
from lens.common.version import __version__
from lens.traces.labels import PREFIX
from lens.traces.matrices import layer_variables
from lens.traces.trace import AttentionTrace, TraceWriter
from lens.traces.uniform import visible_queries

_TOLERANCE = {"float16": 2e-2, "bfloat16": 5e-2, "float32": 1e-4, "float64": 1e-4}
_PATTERN = re.compile(r"blocks\.(\d+)\.attn\.hook_pattern")


def from_attentions(
    attentions: Sequence[Any],
    *,
    token_ids: Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
    row: int | None = None,
    padding: Sequence[int] | None = None,
    windows: Sequence[int | None] | None = None,
    block_size: Count = 64,
    bos_id: int | None = None,
    model: str = "imported",
) -> AttentionTrace:
    """A trace from the `attentions` that a transformers model returns with `output_attentions=True`.

    Every statistic is computed from the given probabilities. `lse`, `max_logit`, q and k cannot be
    known from them and are absent, so are exact tiles.

    Args:
        attentions: one tensor or array [batch, heads, n, n] per layer, of one whole forward pass.
        token_ids: of the n positions; without them scores that compare tokens are NaN.
        tokens: their text; None: the ids, or the positions.
        row: of the batch; may be left out where there is one.
        padding: the attention mask of the row, 1 = a real token; padded positions are cut off.
        windows: sliding window of each layer; None: no layer has one.
        block_size: positions per block of the maps.
        bos_id: id of the token that begins a text, to note whether it was added.
        model: name, for tables and titles.

    Raises:
        LensError: not probabilities (NaN, negative, rows that do not sum to 1), shapes that do not
            fit, a batch without a row, or attention outside of the windows.

    Example:
        >>> layers = [torch.eye(3).expand(1, 2, 3, 3)] * 4  # in place of `outputs.attentions`
        >>> lens.traces.from_attentions(layers, tokens=["a", "b", "c"])
        <AttentionTrace of imported: 3 tokens, 4 layers × 2 heads...
    """
    if isinstance(attentions, (str, bytes)) or not isinstance(attentions, Sequence):
        raise LensError(
            "attentions must be a tuple with one tensor [batch, heads, n, n] per layer, got "
            f"{type(attentions).__name__}; pass outputs.attentions of a run with "
            "output_attentions=True and attn_implementation='eager'"
        )
    if not len(attentions):
        raise LensError("attentions is empty; run the model with output_attentions=True")
    layers, dtype = _chosen(attentions, row)
    real = _real(padding, layers[0].shape[-1])
    layers = [matrices[:, real][:, :, real] for matrices in layers]
    length = int(real.sum())
    ids = _cut("token_ids", token_ids, real)
    names = _cut("tokens", tokens, real) or [str(i) for i in ids or range(length)]
    for number, matrices in enumerate(layers):
        _check_rows(number, matrices, _TOLERANCE[dtype])
    causal = not any(np.triu(matrices, 1).any() for matrices in layers)
    if windows is None:
        windows = [None] * len(layers)
    _check_windows(layers, windows)
    writer = TraceWriter()
    for number, matrices in enumerate(layers):
        variables = layer_variables(matrices, ids, block_size, causal=causal)
        variables["visible"] = visible_queries(length, causal=causal, window=windows[number])
        writer.add_layer(number, variables)
    starts_with_bos = bool(ids) and bos_id is not None and ids[0] == bos_id
    return writer.finish(
        token_ids=[-1] * length if ids is None else ids,
        tokens=names,
        attributes={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": model,
            "origin": "imported: statistics computed from given attention probabilities",
            "dtype": dtype,
            "backend": "imported",
            "block_size": block_size,
            "causal": causal,
            "windows": list(windows),
            "softcap": None,
            "scale": [None] * len(layers),  # of logits that were not given
            "prefix": PREFIX,
            "bos": "added" if starts_with_bos else "absent",
            "tokens": length,
            "versions": {"attention-lens": __version__},
        },
    )


def from_transformer_lens(
    cache: Mapping[str, Any],
    *,
    token_ids: Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
    row: int | None = None,
    padding: Sequence[int] | None = None,
    windows: Sequence[int | None] | None = None,
    block_size: Count = 64,
    bos_id: int | None = None,
    model: str = "imported",
) -> AttentionTrace:
    """A trace from a TransformerLens `ActivationCache` (or any mapping of hook names to tensors).

    Takes `blocks.L.attn.hook_pattern` [batch, heads, n, n] (without `batch` where the cache removed
    it) of every layer.

    Args:
        cache: of `model.run_with_cache(...)`.
        token_ids, tokens, row, padding, windows, block_size, bos_id, model: as in `from_attentions`.

    Raises:
        LensError: no patterns, a layer that is missing, and as `from_attentions`.

    Example:
        >>> cache = {"blocks.0.attn.hook_pattern": torch.eye(3).expand(1, 2, 3, 3)}
        >>> lens.traces.from_transformer_lens(cache, tokens=["a", "b", "c"])
        <AttentionTrace of imported: 3 tokens, 1 layers × 2 heads...
    """
    if not isinstance(cache, Mapping) and not hasattr(cache, "keys"):
        raise LensError(
            f"cache must map hook names to tensors, got {type(cache).__name__}; pass the second "
            "thing that run_with_cache returns"
        )
    matches = {name: _PATTERN.fullmatch(name) for name in cache.keys()}  # noqa: SIM118
    found = {int(match[1]): cache[name] for name, match in matches.items() if match}
    if not found:
        raise LensError(
            "the cache holds no blocks.L.attn.hook_pattern; run_with_cache without a names_filter "
            "that leaves the patterns out"
        )
    if missing := sorted(set(range(max(found) + 1)) - set(found)):
        raise LensError(f"the cache lacks the patterns of layers {missing}; keep all layers")
    return from_attentions(
        [one if len(one.shape) != 3 else one[None] for _, one in sorted(found.items())],
        token_ids=token_ids,
        tokens=tokens,
        row=row,
        padding=padding,
        windows=windows,
        block_size=block_size,
        bos_id=bos_id,
        model=model,
    )


def _chosen(attentions: Sequence[Any], row: int | None) -> tuple[list[np.ndarray], str]:
    """Each layer's [heads, n, n] of one row, and the type in which they came."""
    shapes = [getattr(layer, "shape", None) for layer in attentions]
    for number, shape in enumerate(shapes):
        if shape is None or len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
            got = type(attentions[number]).__name__ if shape is None else f"shape {list(shape)}"
            raise LensError(
                f"layer {number} must be [batch, heads, n, n], got {got}; pass the attentions of one "
                "forward pass over the whole prompt (not of generate, and not eager=None)"
            )
    sizes = {(int(shape[0]), int(shape[1]), int(shape[2])) for shape in shapes if shape is not None}
    if len(sizes) > 1:
        raise LensError(
            f"all layers must have one shape, got batch, heads, n of {sorted(sizes)}; pass one tower"
        )
    batch = sizes.pop()[0]
    if row is None and batch > 1:
        raise LensError(f"the batch has {batch} rows; choose one: row=0")
    if row is not None and not (is_whole(row) and 0 <= row < batch):
        raise LensError(f"row must be 0 to {batch - 1}, got {row!r}")
    chosen = [layer[row or 0] for layer in attentions]
    dtype = str(chosen[0].dtype).removeprefix("torch.")
    if dtype not in _TOLERANCE:
        raise LensError(f"attention probabilities must be floats, got {dtype}")
    return [_array(matrices) for matrices in chosen], dtype


def _array(matrices: Any) -> np.ndarray:
    """[heads, n, n] in numpy; torch is not imported for it."""
    if isinstance(matrices, np.ndarray):
        return matrices
    matrices = matrices.detach().cpu()
    return (matrices.float() if str(matrices.dtype) == "torch.bfloat16" else matrices).numpy()


def _real(padding: Sequence[int] | None, length: int) -> np.ndarray:
    """bool [positions] that are no padding."""
    real = np.ones(length, bool) if padding is None else np.asarray(padding).astype(bool)
    if real.shape != (length,) or not real.any():
        raise LensError(
            f"padding must be {length} numbers with a 1 for each real token, got the shape "
            f"{list(real.shape)} with {int(real.sum())} real ones"
        )
    return real


def _cut(name: str, given: Sequence[Any] | None, real: np.ndarray) -> list[Any] | None:
    """The entries of the real positions."""
    if given is None:
        return None
    check_lists(**{name: given})
    if len(given) != len(real):
        raise LensError(f"{name} must have {len(real)} entries, one a position, got {len(given)}")
    kept = [entry for entry, keep in zip(given, real, strict=True) if keep]
    if name == "tokens":
        return kept
    try:
        return [operator.index(entry) for entry in kept]
    except TypeError as error:
        raise LensError(f"{name} must be whole numbers, got {given!r}"[:200]) from error


def _check_rows(layer: int, matrices: np.ndarray, tolerance: float) -> None:
    if np.isnan(matrices).any():
        head = int(np.flatnonzero(np.isnan(matrices).any((1, 2)))[0])
        raise LensError(
            f"L{layer}H{head} has NaN in its attention; a fully masked row gives that: cut padding "
            "off with padding=attention_mask"
        )
    if (matrices < 0).any():
        head = int(np.flatnonzero((matrices < 0).any((1, 2)))[0])
        raise LensError(
            f"L{layer}H{head} has negative entries, so these are logits and no probabilities; pass "
            "what comes after the softmax"
        )
    sums = matrices.astype(np.float64).sum(-1)
    off = np.abs(sums - 1)
    if off.max() > tolerance:
        head, query = (int(i) for i in np.unravel_index(off.argmax(), off.shape))
        raise LensError(
            f"row {query} of L{layer}H{head} sums to {sums[head, query]:.4g} instead of 1; dropout, "
            "padding that was not cut off or learned sinks do that: import plain softmax attention, "
            "or use lens.capture"
        )


def _check_windows(layers: list[np.ndarray], windows: Sequence[int | None]) -> None:
    check_lists(windows=windows)
    check_counts(**{f"windows[{i}]": one for i, one in enumerate(windows) if one is not None})
    if len(windows) != len(layers):
        raise LensError(f"windows must have {len(layers)} entries, one a layer, got {len(windows)}")
    for number, (matrices, window) in enumerate(zip(layers, windows, strict=True)):
        if window is not None and np.tril(matrices, -window).any():
            raise LensError(
                f"layer {number} attends at a distance of {window} or more, outside of its window; "
                "correct windows"
            )
