"""The statistics of one attention layer, from its query, key and value.

Two calls of `lens_kernels.attention`: one over all keys, one with the first key hidden, for entropy
and distance without the sink. The second restricts the row and renormalises it exactly; taking the
sink's part off the first one would lose most digits where the sink holds nearly all the mass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lens_kernels import attention

from lens.captures.masks import MaskStructure
from lens.errors import LensError
from lens.trace import MATCH_RULES

PREFIX = 4

_KERNEL = (
    "lse",
    "max_logit",
    "entropy",
    "concentration",
    "distance",
    "prefix_mass",
    "received",
    "diagonal",
    "block_mass",
    "block_max",
)
_SINK_EXCLUDED = {"entropy_sink_excluded": "entropy", "distance_sink_excluded": "distance"}
_MATCHED = ("match_mass", "first_mass")
_REST = ("rest_mass", *_SINK_EXCLUDED)
VARIABLES = (*_KERNEL, *_MATCHED, *_REST)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        variables: names out of `VARIABLES`.
        block_size: positions per block of the maps.
        keep_qk: also keep q and k.
        backend: of `lens_kernels`.
    """

    variables: frozenset[str]
    block_size: int
    keep_qk: bool
    backend: str


@dataclass(frozen=True)
class LayerCall:
    """One call of an attention layer: what the model handed to it.

    Attributes:
        query: [batch, heads, queries, head_dim], after rotary position embedding.
        key, value: [batch, kv_heads, keys, head_dim].
        mask: which keys each query sees.
        scale, softcap: of the logits.
        sink_logits: [heads], learned sinks, or None.
        position_bias: added to the logits, broadcastable to [batch, heads, queries, keys], or None.
        tokens: [batch, keys], token ids of the keys, or None where there are none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: MaskStructure
    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    position_bias: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did in one forward pass.

    Attributes:
        step: forward pass, from 0; generation has one for the prompt and one per token.
        layer: attention layer, from 0.
        query_start: position of the first query; above 0 when the keys before it were cached.
        queries, keys, heads, kv_heads, head_dim: sizes.
        causal, window, scale, softcap: of the layer; `window` counts the query itself.
        sink_logits: [heads], float32, or None.
        backend: the one that ran.
        variables: name -> [batch, ...] tensor on the CPU: what was asked for, float32, and always
            `visible` (int32 [batch, keys], the number of queries that see a key).
    """

    step: int
    layer: int
    query_start: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    sink_logits: torch.Tensor | None
    backend: str
    variables: dict[str, torch.Tensor]


def make_settings(
    *, statistics: str | Sequence[str], block_size: int, keep_qk: bool, backend: str
) -> Settings:
    """Checked settings.

    Raises:
        LensError: a statistic or backend that does not exist, or a block size that is none.
    """
    names = VARIABLES if statistics == "all" else statistics
    if isinstance(names, str):
        raise LensError(f"statistics must be 'all' or a list of names, got the string {names!r}")
    unknown = [str(name) for name in names if name not in VARIABLES]
    if unknown:
        raise LensError(f"unknown statistics {', '.join(unknown)}; known: {', '.join(VARIABLES)}")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise LensError(f"block_size must be a positive integer, got {block_size!r}; e.g. 64")
    return Settings(frozenset(names), block_size, keep_qk, backend)


def measure(
    call: LayerCall, settings: Settings, step: int, layer: int
) -> tuple[torch.Tensor, LayerRecord]:
    """Attention output [batch, queries, heads, value_dim] and the record of the layer."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    names = settings.variables
    labels = _labels(call) if names.intersection(_MATCHED) else None
    asked = [name for name in _KERNEL if name in names]
    result = _attention(
        call,
        settings,
        statistics=["lse", *asked, *(["match_mass"] if labels else [])],
        match=labels,
        hide_first=False,
    )
    found = {name: result.statistics[name] for name in asked}
    if labels:
        found.update(_matched(result.statistics["match_mass"], call))
    if names.intersection(_REST):
        found.update(_without_first(call, settings, result.statistics["lse"]))
    found = {name: tensor for name, tensor in found.items() if name in names}
    variables = {name: _to_cpu(tensor, torch.float32) for name, tensor in found.items()}
    visible = call.mask.visible(len(call.query), queries, keys)
    variables["visible"] = _to_cpu(visible, torch.int32)
    if settings.keep_qk:
        variables["q"] = _to_cpu(call.query, _storable(call.query.dtype))
        variables["k"] = _to_cpu(call.key, _storable(call.key.dtype))
    sinks = call.sink_logits
    record = LayerRecord(
        step=step,
        layer=layer,
        query_start=keys - queries if call.mask.causal else 0,
        queries=queries,
        keys=keys,
        heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        head_dim=call.query.shape[3],
        causal=call.mask.causal,
        window=call.mask.window,
        scale=call.scale,
        softcap=call.softcap,
        sink_logits=None if sinks is None else _to_cpu(sinks, torch.float32),
        backend=result.backend,
        variables=variables,
    )
    return result.output.to(call.value.dtype).transpose(1, 2).contiguous(), record


def _attention(
    call: LayerCall,
    settings: Settings,
    *,
    statistics: list[str],
    match: list[tuple[torch.Tensor, torch.Tensor]] | None,
    hide_first: bool,
) -> Any:
    batch, _, queries, _ = call.query.shape
    mask = call.mask.for_kernel(batch, queries, hide_first=hide_first)
    if call.position_bias is not None:
        mask = replace(mask, bias=call.position_bias)
    try:
        return attention(
            call.query,
            call.key,
            call.value[..., :1] if hide_first else call.value,
            mask=mask,
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=None if hide_first else call.sink_logits,
            block_size=settings.block_size,
            statistics=statistics,
            match=match,
            prefix=PREFIX,
            backend=settings.backend,
        )
    except (TypeError, ValueError) as error:  # a backend that does not exist, or cannot do it
        raise LensError(str(error)) from error


def _labels(call: LayerCall) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Label pairs of `MATCH_RULES`, then one whose only matching key is the first."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    key_position = torch.arange(keys, device=call.key.device)
    position = key_position[keys - queries :]
    none = torch.full_like(position, -1)
    key_none = torch.full_like(key_position, -1)
    pairs = [(position, key_position), (position - 1, key_position)]
    if call.tokens is None:
        pairs += [(none, key_none)] * 2
    else:
        before = torch.nn.functional.pad(call.tokens[:, :-1], (1, 0), value=-1)
        own = call.tokens[:, keys - queries :]
        pairs += [(own, call.tokens), (own, before)]
    return [*pairs, (torch.zeros_like(position), key_position)]


def _matched(mass: torch.Tensor, call: LayerCall) -> dict[str, torch.Tensor]:
    rules = mass[..., : len(MATCH_RULES)].clone()
    if call.tokens is None:
        rules[..., 2:] = torch.nan
    elif not call.mask.causal:
        rules[..., 3] = torch.nan  # induction looks back only; here a row sees later keys too
    return {"match_mass": rules, "first_mass": mass[..., len(MATCH_RULES)]}


def _without_first(
    call: LayerCall, settings: Settings, lse: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Entropy and distance of the rows without their first key, and the mass of what is left.

    The mass is the ratio of the two sums, `exp(lse of the rest - lse)`, so that nothing cancels.
    Entropy and distance are NaN where nothing is left.
    """
    if call.key.shape[2] == 1:
        nothing = torch.full_like(lse, torch.nan)
        return {**dict.fromkeys(_SINK_EXCLUDED, nothing), "rest_mass": torch.zeros_like(lse)}
    wanted = [name for variable, name in _SINK_EXCLUDED.items() if variable in settings.variables]
    with torch.no_grad():
        rest = _attention(
            call, settings, statistics=["lse", *wanted], match=None, hide_first=True
        ).statistics
    empty = torch.isneginf(rest["lse"])
    found = {"rest_mass": (rest["lse"] - lse).exp().masked_fill(empty, 0)}
    for variable, name in _SINK_EXCLUDED.items():
        if name in wanted:
            found[variable] = rest[name].masked_fill(empty, torch.nan)
    return found


def _storable(dtype: torch.dtype) -> torch.dtype:
    """Type in which q and k are kept: numpy has no bfloat16."""
    return torch.float16 if dtype == torch.float16 else torch.float32


def _to_cpu(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype)
