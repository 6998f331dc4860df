"""The statistics of one attention layer, from its query, key and value, in one pass.

The first key is a key group of its own, so that the same pass gives the row without it: entropy,
distance and mass of the rest, exactly. Taking the first key's part off the whole would lose most
digits where it holds nearly all the mass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from lens_kernels import AttentionGroups, AttentionResult

from lens.common.errors import LensError
from lens.passes.calls import LayerCall, Places, attend, cut, of_heads
from lens.traces.labels import MATCH_RULES, PREFIX, Labels
from lens.traces.layouts import bias_table
from lens.traces.shared import Shared, make_shared, prefix_is_moved

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
_BY_GROUP = {
    "entropy_sink_excluded": "entropy",
    "distance_sink_excluded": "distance",
    "first_mass": "lse",
    "rest_mass": "lse",
}
COMPARING = {"distance", "distance_sink_excluded", "diagonal", "match_mass"}
"""Those that compare the position or token of a key with the query's."""
OF_CROSS = ("strongest", "center")
"""Of cross-attention alone."""
VARIABLES = (*_KERNEL, "match_mass", *_BY_GROUP, *OF_CROSS)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        variables: names out of `VARIABLES`.
        block_size: positions per block of the maps.
        keep_qk: also keep q and k.
        backend: of `lens_kernels`.
        labels: the user's own, of the prompt that is run.
        made: what layers that see the same tokens through the same mask share, of the last few masks.
    """

    variables: frozenset[str]
    block_size: int
    keep_qk: bool
    backend: str
    labels: tuple[Labels, ...] = ()
    made: deque[Shared] = field(
        default_factory=lambda: deque(maxlen=4), init=False, compare=False, repr=False
    )

    def with_labels(self, labels: tuple[Labels, ...]) -> Settings:
        """The same for a prompt with these labels."""
        more = {"match_mass"} if labels else set()
        return replace(self, labels=labels, variables=self.variables | more)


@dataclass(frozen=True)
class LayerRecord:
    """What one layer did in one forward pass.

    Attributes:
        step: forward pass, from 0; generation has one for the prompt and one per token.
        layer: the model's own number of it, from 0.
        part: which of the layer's calls in this pass; above 0 where it attends twice.
        place: of a model in parts which of them (an encoder-decoder's "cross", "stage0"), else "".
        cross: whether the keys are of another sequence: positions of keys are that sequence's, and what
            compares them with the query's is NaN.
        key_start: position of the first key; above 0 when a cache has dropped older ones. Blocks and
            `received` count from it.
        query_start: position of the first query; above 0 when the keys before it were cached.
        queries, keys, heads, kv_heads, head_dim: sizes.
        causal, window, scale, softcap: of the layer; `window` counts the query itself.
        sink_logits: [heads], float32, or None.
        backend: the one that ran.
        seen: [2, queries], first key that each query sees and one past its last, where `causal` and `window` do not say it.
        partition: [keys], which of them see each other, where they fall into parts (windows).
        query_places, key_places: what its positions are, where the layer itself says it.
        extra: as in `LayerCall`.
        biased: whether something is added to the logits that `variables` does not have.
        variables: name -> [batch, ...] tensor on the CPU: what was asked for, float32, and always
            `visible` (int32 [batch, keys], the number of queries that see a key).
    """

    step: int
    layer: int
    part: int
    place: str
    cross: bool
    key_start: int
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
    seen: torch.Tensor | None = None
    partition: torch.Tensor | None = None
    query_places: Places | None = None
    key_places: Places | None = None
    extra: tuple[str, ...] = ()
    biased: bool = False

    def __repr__(self) -> str:
        where = f"{self.place} " if self.place else ""
        return (
            f"LayerRecord(step {self.step}, {where}layer {self.layer}: {self.queries} queries × {self.keys} keys, "
            f"{self.heads} heads; {', '.join(self.variables)})"
        )


def make_settings(
    *, statistics: str | Sequence[str], block_size: int, keep_qk: bool, backend: str
) -> Settings:
    """Checked settings.

    Raises:
        LensError: a statistic that does not exist.
    """
    names = VARIABLES if statistics == "all" else statistics
    if not isinstance(names, Iterable) or isinstance(names, Mapping):
        raise LensError(f"statistics must be 'all' or a list of names, got {names!r}")
    if isinstance(names, str):
        raise LensError(f"statistics must be 'all' or a list of names, got the string {names!r}")
    names = list(names)
    unknown = [str(name) for name in names if name not in VARIABLES]
    if unknown:
        raise LensError(f"unknown statistics {', '.join(unknown)}; known: {', '.join(VARIABLES)}")
    return Settings(frozenset(names), block_size, keep_qk, backend)


def measure(
    call: LayerCall, settings: Settings, attend: Callable[..., AttentionResult] = attend
) -> tuple[torch.Tensor, LayerRecord]:
    """Attention output [batch, heads, queries, value_dim] and the record of the layer.

    `attend` computes it, as that of `lens.passes.calls`.
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    shared = _shared(call, settings)
    result = _attention(call, settings, shared, attend)
    variables = _variables(call, settings, result) | {"visible": shared.visible}
    if settings.keep_qk:
        variables["q"] = _to_cpu(call.query, _storable(call.query.dtype))
        variables["k"] = _to_cpu(call.key, _storable(call.key.dtype))
        if (table := bias_table(call)) is not None:
            variables["bias"] = table
    sinks = call.sink_logits
    record = LayerRecord(
        step=call.step,
        layer=call.layer,
        part=call.part,
        place=call.place,
        cross=call.cross,
        key_start=call.mask.start,
        query_start=call.mask.start + keys - queries if call.mask.causal else 0,
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
        seen=shared.seen,
        partition=shared.partition,
        query_places=call.query_places,
        key_places=call.key_places,
        extra=call.extra,
        biased=call.position_bias is not None
        and bool(variables.get("bias", torch.tensor(torch.nan)).isnan().all()),
    )
    return result.output, record


def _variables(
    call: LayerCall, settings: Settings, result: AttentionResult
) -> dict[str, torch.Tensor]:
    """What was asked for, float32 on the CPU, with NaN where this layer cannot have it."""
    names = settings.variables
    found = {
        name: result.statistics[name]
        for name in _KERNEL
        if name in names and name in result.statistics
    }
    matched = result.statistics.get("match_mass")
    rules = len(MATCH_RULES) + len(settings.labels)
    if matched is not None and "match_mass" in names:
        found["match_mass"] = _matched(matched[..., :rules], call)
    if matched is not None and matched.shape[-1] > rules:
        found["prefix_mass"] = matched[..., -1]
    if result.groups is not None:
        found.update(_by_group(result.statistics["lse"], result.groups, names))
    if not call.mask.placed:
        for name in found.keys() & {"prefix_mass", *_BY_GROUP}:
            found[name] = torch.full_like(found[name], torch.nan)
    if call.cross:
        for name in found.keys() & COMPARING:
            found[name] = torch.full_like(found[name], torch.nan)
        found |= {name: of(call) for name, of in _OF_CROSS.items() if name in names}
    return {name: _to_cpu(tensor, torch.float32) for name, tensor in found.items()}


def _attention(
    call: LayerCall, settings: Settings, shared: Shared, attend: Callable[..., AttentionResult]
) -> AttentionResult:
    names = settings.variables
    statistics = {"lse", *names.intersection(_KERNEL)}
    statistics.update(kernel for variable, kernel in _BY_GROUP.items() if variable in names)
    if shared.match is not None:
        statistics.add("match_mass")
    if prefix_is_moved(call, names):
        statistics.discard("prefix_mass")
    return attend(
        call,
        block_size=settings.block_size,
        statistics=statistics,
        match=shared.match,
        prefix=PREFIX,
        groups=shared.groups,
        group_outputs=False,
        backend=settings.backend,
    )


def _shared(call: LayerCall, settings: Settings) -> Shared:
    """Made once for all layers of a pass that see the same."""
    for one in tuple(settings.made):
        if one.serves(call):
            return one
    grouped = not settings.variables.isdisjoint(_BY_GROUP)
    found = make_shared(call, settings.variables, settings.labels, grouped)
    settings.made.append(found)
    return found


def _matched(mass: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """`match_mass` with NaN for the rules that this layer cannot have."""
    absent = set()
    if call.tokens is None:
        absent = {"same_token", "induction"}
    elif not call.mask.causal:  # induction looks back only; here a row sees later keys too
        absent = {"induction"}
    if not absent:
        return mass
    columns = torch.tensor([rule in absent for rule in MATCH_RULES], device=mass.device)
    own = columns.new_zeros(mass.shape[-1] - len(columns))
    return mass.masked_fill(torch.cat([columns, own]), torch.nan)


def _by_group(
    lse: torch.Tensor, groups: AttentionGroups, names: frozenset[str]
) -> dict[str, torch.Tensor]:
    """Mass of the first key and of the rest; entropy and distance of the rest, NaN where none is."""
    states = dict(zip(("first_mass", "rest_mass"), groups.lse, strict=False))
    is_empty = lse == -torch.inf
    found = {
        name: (state - lse).exp_().masked_fill_(is_empty, 0)
        for name, state in states.items()
        if name in names
    }
    if "rest_mass" in names and "rest_mass" not in states:
        found["rest_mass"] = torch.zeros_like(lse)
    rest = states.get("rest_mass")
    for variable in names.intersection(("entropy_sink_excluded", "distance_sink_excluded")):
        of_rest = groups.statistics[_BY_GROUP[variable]][-1]
        is_none = torch.ones_like(is_empty) if rest is None else rest == -torch.inf
        found[variable] = of_rest.masked_fill(is_none, torch.nan)
    return found


def strongest_keys(call: LayerCall) -> torch.Tensor:
    """[batch, heads, queries] position of the largest probability; some rows of logits in memory at a time."""
    batch, heads, queries, _ = call.query.shape
    keys = call.key.shape[2]
    every = of_heads(call, call.key).float().transpose(-1, -2)
    allowed = call.mask.allowed
    if allowed is None and call.mask.padding is not None:
        allowed = call.mask.padding[:, None, None]
    rows = max(1, _LOGITS // (batch * heads * keys))
    found = []
    for first in range(0, queries, rows):
        part = slice(first, first + rows)
        logits = call.query[:, :, part].float() @ every * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        if call.position_bias is not None:
            logits = logits + cut(call.position_bias, queries=part)
        if allowed is not None:
            seen = cut(allowed, queries=part).to(logits.device)
            logits = logits.masked_fill(~seen, -torch.inf)
        found.append(logits.argmax(-1))
    return torch.cat(found, -1)


def centers(call: LayerCall) -> torch.Tensor:
    """[batch, heads, queries] mean position of the keys by their probability."""
    place = torch.arange(call.key.shape[2], dtype=torch.float32, device=call.key.device)
    value = place[:, None].expand(*call.key.shape[:3], _WIDTH)
    whole = replace(call, query=call.query.float(), key=call.key.float(), value=value.contiguous())
    return attend(whole, statistics=()).output[..., 0]


_OF_CROSS = {"strongest": strongest_keys, "center": centers}
_LOGITS = 1 << 24
_WIDTH = 16


def _storable(dtype: torch.dtype) -> torch.dtype:
    """Type in which q and k are kept: numpy has no bfloat16."""
    return torch.float16 if dtype == torch.float16 else torch.float32


def _to_cpu(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    is_there = tensor.dtype == dtype and tensor.device.type == "cpu" and not tensor.requires_grad
    return tensor if is_there else tensor.detach().to("cpu", dtype)
