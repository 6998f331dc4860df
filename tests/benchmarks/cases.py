"""The registry: what is measured, against what, with which statistics.

A `Case` is one set of inputs; a `Contender` is one way to compute attention on them. Every
contender of a case is timed in the same process, in turn, and its memory in a process of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lens_kernels import AttentionMask, attention, explain
from torch import Tensor
from torch.nn import functional

ROWS = ("lse", "max_logit", "entropy", "concentration", "distance", "prefix_mass")
MAPS = (*ROWS, "block_mass")
COLUMNS = (*MAPS, "received", "diagonal")
STATISTICS: dict[str, tuple[str, ...]] = {
    "lse": ("lse",),
    "rows": ROWS,
    "rows + blocks": MAPS,
    "rows + blocks + columns": COLUMNS,
    "all": (
        *COLUMNS,
        *("block_max", "block_max_logit", "top_keys", "match_mass", "moments", "value_norm"),
    ),
    "lse + attribution": ("lse", "block_attribution"),
}
"""Names of statistics sets; "" stands for a contender that has no statistics."""


@dataclass(frozen=True)
class Case:
    """One set of inputs: self-attention of `queries` on `keys` positions, batch 1."""

    name: str
    queries: int
    keys: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    device: str = "cpu"
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    backward: bool = False
    quick: bool = False

    @property
    def mask(self) -> AttentionMask:
        return AttentionMask(causal=self.causal, window=self.window)

    @property
    def flops(self) -> float:
        """Multiplications and additions of Q K' and P V over the visible pairs."""
        pairs = self.queries * self.keys
        if self.causal and self.queries == self.keys:
            pairs = self.keys * (self.keys + 1) / 2
            if self.window is not None and self.window < self.keys:
                pairs -= (self.keys - self.window) * (self.keys - self.window + 1) / 2
        return 4.0 * pairs * self.heads * self.head_dim * (3.5 if self.backward else 1.0)

    @property
    def eager_bytes(self) -> int:
        """What eager attention needs at once: logits, their mask and weights."""
        return 3 * self.heads * self.queries * self.keys * getattr(torch, self.dtype).itemsize

    def small(self) -> Case:
        """The same flags at odd sizes that fit into the reference."""
        window = None if self.window is None else 47
        keys = 193 if self.device == "cpu" else 208  # 16 divides it: the kernels of the full size
        queries = keys if self.queries == self.keys else min(self.queries, 37)
        return replace(self, queries=queries, keys=keys, window=window)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(heads: int, positions: int) -> Tensor:
            shape = (1, heads, positions, self.head_dim)
            x = torch.randn(shape, generator=generator, device=self.device)
            return x.to(getattr(torch, self.dtype)).requires_grad_(self.backward)

        return (
            normal(self.heads, self.queries),
            normal(self.kv_heads, self.keys),
            normal(self.kv_heads, self.keys),
        )

    def options(self, statistics: str) -> dict[str, Any]:
        """Arguments of `attention` beside the inputs."""
        options: dict[str, Any] = {"mask": self.mask, "statistics": STATISTICS[statistics]}
        if "match_mass" in options["statistics"]:
            row = torch.arange(self.queries, device=self.device)
            column = torch.arange(self.keys, device=self.device)
            options["match"] = [(row - 1, column), (row % 97, column % 97)]
        return options


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: as it stands in the tables.
        statistics: key of `STATISTICS`, or "" for none.
        prepare: inputs -> a function without arguments that computes the output.
        refuses: a case -> why it is not run there, or None.
        is_attention: its output is held against the stock one's.
    """

    name: str
    statistics: str
    prepare: Callable[[Case, tuple[Tensor, Tensor, Tensor]], Callable[[], Tensor]]
    refuses: Callable[[Case], str | None] = lambda case: None
    is_attention: bool = True


def _ours(backend: str, statistics: str) -> Contender:
    def prepare(case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
        options = case.options(statistics)
        if case.backward:
            made_by = explain(*inputs, **options, backend=backend).gradients
            if made_by != backend:
                raise RuntimeError(f"its backward pass is made by {made_by}")

        def call() -> Tensor:
            return attention(*inputs, **options, backend=backend).output

        return call

    def refuses(case: Case) -> str | None:
        if backend == "torch" and case.device == "cpu" and case.queries > 2048:
            return "the slow path, measured up to 2,048 tokens"
        return None

    return Contender(f"ours ({backend})", statistics, prepare, refuses)


def bool_mask(case: Case) -> Tensor | None:
    """What stock attention needs where `is_causal` does not say it."""
    if case.window is None:
        return None
    distance = torch.arange(case.queries)[:, None] - torch.arange(case.keys)
    return ((distance >= 0) & (distance < case.window)).to(case.device)


def _sdpa(case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    mask = bool_mask(case)
    causal = mask is None and case.causal and case.queries == case.keys
    return functools.partial(
        functional.scaled_dot_product_attention,
        *inputs,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=case.heads != case.kv_heads,
    )


def _sdpa_on(name: str) -> Contender:
    """Stock attention held to one GPU backend."""

    def prepare(case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        stock = _sdpa(case, inputs)

        def call() -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, name)):
                return stock()

        return call

    return Contender(f"SDPA ({name.split('_')[0].lower()})", "", prepare)


def _eager(case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """As transformers' eager attention does it: repeated heads, float mask, whole weights."""
    q, k, v = inputs
    repeat = case.heads // case.kv_heads
    visible = bool_mask(case)
    if visible is None:
        visible = torch.ones(case.queries, case.keys, dtype=torch.bool, device=case.device)
        if case.causal:
            visible = visible.tril(case.keys - case.queries)
    hidden = torch.zeros(visible.shape, dtype=q.dtype, device=case.device)
    hidden.masked_fill_(~visible, torch.finfo(q.dtype).min)

    def call() -> Tensor:
        key, value = (x.repeat_interleave(repeat, dim=1) if repeat > 1 else x for x in (k, v))
        logits = q @ key.mT / math.sqrt(case.head_dim) + hidden
        weights = functional.softmax(logits, dim=-1, dtype=torch.float32).to(q.dtype)
        return weights @ value

    return call


def _eager_refuses(case: Case) -> str | None:
    limit = 4 if case.device == "cpu" else 64
    gigabytes = case.eager_bytes / 1e9
    return f"needs {gigabytes:.0f} GB" if gigabytes > limit else None


def _flex(case: Case, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    offset, window = case.keys - case.queries, case.window

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query + offset >= key
        return seen if window is None else seen & (query + offset - key < window)

    # compiled, it does not hold the whole mask: 17 GB at 131,072 tokens
    sizes = (None, None, case.queries, case.keys)
    mask = create_block_mask(visible, *sizes, device=case.device, _compile=case.device == "cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = case.heads != case.kv_heads

    def call() -> Tensor:
        return compiled(*inputs, block_mask=mask, enable_gqa=gqa)  # pyright: ignore

    return call


def _flex_refuses(case: Case) -> str | None:
    if case.device == "cpu" and case.backward:
        return "has no backward on the CPU"
    measured = 4096 if case.device == "cpu" else 8192
    if case.queries != measured:
        return f"compiles for 20 s a size, measured at {measured:,} tokens"
    return None


def _products(case: Case, _inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """Matrix products with as many operations in all as the two of attention have on visible pairs."""
    side, rows = 1024, 2048
    wanted = round(case.flops / (2 * side * side))
    left, right, out = (torch.randn(size, side) for size in (rows, side, rows))

    def call() -> Tensor:
        for done in range(0, wanted, rows):
            size = min(rows, wanted - done)
            torch.mm(left[:size], right, out=out[:size])
        return out

    return call


SDPA = Contender("SDPA", "", _sdpa)
"""What every ratio is taken to."""

EAGER = Contender("eager with weights", "", _eager, _eager_refuses)
FLEX = Contender("FlexAttention (compiled)", "", _flex, _flex_refuses)
PRODUCTS = Contender("matrix products alone", "", _products, is_attention=False)
"""What torch.mm takes for as many operations: no attention by float32 can be expected to take less."""


def contenders(case: Case) -> Iterator[Contender]:
    """Everything that is measured on a case, the stock attention first."""
    yield SDPA
    fast = "cpu" if case.device == "cpu" else "triton"
    if case.device != "cpu":
        yield _sdpa_on("FLASH_ATTENTION")
        yield _sdpa_on("CUDNN_ATTENTION")
    if case.quick:
        sets: tuple[str, ...] = ("lse", "rows + blocks", "rows + blocks + columns")
    elif case.backward:
        sets = ("lse", "lse + attribution")
    elif case.device == "cpu" and case.queries > 4096:
        sets = ("lse", "rows + blocks + columns", "all")
    else:
        sets = ("lse", "rows", "rows + blocks", "rows + blocks + columns", "all")
    if case.device == "cpu" and case.dtype == "float32" and case.queries > 1 and not case.backward:
        yield PRODUCTS
    for statistics in sets:
        yield _ours(fast, statistics)
    yield EAGER
    if not case.quick:
        if case.device == "cpu":  # on a GPU nobody would take the slow path
            yield _ours("torch", sets[-1])
        yield FLEX


def _cpu_cases() -> Iterator[Case]:
    for length in (1024, 2048, 4096, 8192, 16384):
        yield Case(f"causal {length:,}", length, length)
    yield Case("causal 4,096, dim 128", 4096, 4096, head_dim=128)
    yield Case("causal 4,096, 2 kv heads", 4096, 4096, kv_heads=2)
    yield Case("causal 4,096, bfloat16", 4096, 4096, dtype="bfloat16")
    yield Case("window 512 of 4,096", 4096, 4096, window=512)
    yield Case("both ways 2,048", 2048, 2048, causal=False)
    yield Case("one query on 16,384 keys", 1, 16384, causal=False)
    yield Case("one query on 16,384 keys, bfloat16", 1, 16384, causal=False, dtype="bfloat16")
    yield Case("one query on 16,384 keys, 2 kv heads", 1, 16384, causal=False, kv_heads=2)
    yield Case("forward and backward 2,048", 2048, 2048, backward=True)


def _gpu_cases() -> Iterator[Case]:
    big = Case("", 0, 0, heads=32, kv_heads=32, head_dim=128, device="cuda", dtype="bfloat16")
    for length in (8192, 16384, 32768, 65536, 131072):
        yield replace(big, name=f"causal {length:,}", queries=length, keys=length)
    eight = replace(big, queries=8192, keys=8192)
    yield replace(eight, name="causal 8,192, dim 64", head_dim=64)
    yield replace(eight, name="causal 8,192, 8 kv heads", kv_heads=8)
    yield replace(eight, name="window 1,024 of 8,192", window=1024)
    yield replace(eight, name="forward and backward 8,192", backward=True)


CASES: tuple[Case, ...] = (*_cpu_cases(), *_gpu_cases())
QUICK: tuple[Case, ...] = (
    Case("causal 1,024", 1024, 1024, quick=True),
    Case("causal 4,096", 4096, 4096, quick=True),
)
