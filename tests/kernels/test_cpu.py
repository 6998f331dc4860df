"""The compiled CPU backend at sizes beyond its tiles, and the making of its library.

`test_statistics.py` holds every backend against the reference at small sizes. Here sizes are odd,
pairwise different and larger than a tile (64 queries x 128 keys), and scratch memory and outputs
start as NaN: what is read before it is written, or never written, shows.
"""

import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import lens_kernels
import pytest
import torch
from lens_kernels import AttentionMask, attention, cpu, explain, reference, tiled_backward
from lens_kernels.backward import Gradients, Saved, Upstream
from lens_kernels.cpu import build, calls, library
from lens_kernels.problem import Problem, statistic_shape
from lens_kernels.statistics import STATISTICS
from lens_kernels.validation import make_problem
from torch import Tensor

from tests.analyses.started import forked
from tests.kernels.helpers import compare, rms_ratio
from tests.tiers import first

LIMIT = 3e-6
"""RMS error ratio of float32 against float64."""

LIBRARY = library.load()
needs_library = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no library: {LIBRARY}")


def make(
    mask: AttentionMask | None = None,
    *,
    sizes: tuple[int, int, int, int, int, int, int] = (2, 4, 2, 131, 131, 37, 53),
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Problem:
    """A problem with every statistic; sizes: batch, heads, kv_heads, queries, keys, dims."""
    batch, heads, kv_heads, queries, keys, head_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def labels(classes: int, *shape: int) -> Tensor:
        return torch.randint(-1, classes, shape, generator=generator)

    known = {
        "statistics": "all",
        "match": [
            (labels(5, queries), labels(5, keys)),
            (labels(40, batch, queries), labels(40, batch, keys)),
        ],
        "key_weights": normal(batch, heads, keys),
        "grid": (3, 5, 2) if keys >= 17 else (1, 1),
        "block_size": 32,
    }
    return make_problem(
        (1.5 * normal(batch, heads, queries, head_dim)).to(dtype),
        normal(batch, kv_heads, keys, head_dim).to(dtype),
        normal(batch, kv_heads, keys, value_dim).to(dtype),
        mask=mask,
        **(known | options),
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_poison", True)


def _random(shape: tuple[int, ...], seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _chance(probability: float, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.rand(shape, generator=generator) < probability


CASES: dict[str, Callable[[], Problem]] = {
    "everything visible": make,
    "causal": lambda: make(AttentionMask(causal=True)),
    "cached prefix": lambda: make(AttentionMask(causal=True), sizes=(1, 3, 3, 31, 199, 20, 24)),
    "more queries than keys": lambda: make(
        AttentionMask(causal=True), sizes=(1, 3, 1, 199, 31, 24, 20)
    ),
    "one query": lambda: make(AttentionMask(causal=True), sizes=(2, 6, 2, 1, 257, 64, 48)),
    "three queries": lambda: make(sizes=(1, 5, 1, 3, 257, 48, 64)),
    "one key": lambda: make(sizes=(2, 2, 1, 70, 1, 17, 19), top_k=1),
    "causal window": lambda: make(AttentionMask(causal=True, window=17)),
    "window both ways": lambda: make(AttentionMask(window=23)),
    "window of one": lambda: make(AttentionMask(causal=True, window=1)),
    "ragged": lambda: make(
        AttentionMask(causal=True, key_lengths=[131, 57], query_lengths=[131, 57])
    ),
    "an empty row of the batch": lambda: make(AttentionMask(key_lengths=[101, 0])),
    "left padding": lambda: make(AttentionMask(causal=True, key_start=[0, 40])),
    "key padding": lambda: make(AttentionMask(causal=True, key_padding=_chance(0.7, 2, 131))),
    "prefix-LM": lambda: make(AttentionMask(causal=True, prefix=[9, 70])),
    "prefix-LM with window": lambda: make(AttentionMask(causal=True, prefix=[90, 20], window=15)),
    "packed": lambda: make(AttentionMask(causal=True, cu_seqlens=[0, 11, 60, 60, 120])),
    "ALiBi": lambda: make(
        AttentionMask(causal=True, alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.01]))
    ),
    "ALiBi both ways": lambda: make(
        AttentionMask(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.01]))
    ),
    "bias": lambda: make(AttentionMask(bias=_random((2, 4, 131, 131)))),
    "bias of the keys": lambda: make(AttentionMask(causal=True, bias=_random((2, 1, 1, 131)))),
    "bias that hides": lambda: make(
        AttentionMask(
            bias=_random((1, 4, 131, 131)).masked_fill(_chance(0.4, 131, 131), -torch.inf)
        )
    ),
    "boolean": lambda: make(AttentionMask(allowed=_chance(0.4, 1, 4, 131, 131))),
    "boolean per batch row": lambda: make(
        AttentionMask(causal=True, allowed=_chance(0.4, 2, 1, 131, 131))
    ),
    "softcap": lambda: make(AttentionMask(causal=True), softcap=3.0),
    "softcap and bias": lambda: make(AttentionMask(bias=_random((2, 1, 131, 131))), softcap=20.0),
    "learned sinks": lambda: make(
        AttentionMask(causal=True, window=31),
        sink_logits=torch.tensor([2.0, -30.0, 50.0, 1.0]),
    ),
    "learned sinks beside an empty row": lambda: make(
        AttentionMask(key_lengths=[90, 0]), sink_logits=_random((4,))
    ),
    "groups mixed": lambda: make(
        AttentionMask(causal=True), groups=(torch.arange(262) % 7 % 4).view(2, 131)
    ),
    "groups in segments": lambda: make(
        groups=(torch.arange(262).view(2, 131) // 50).clamp(max=3), sink_logits=_random((4,))
    ),
    "groups of one key": lambda: make(
        AttentionMask(causal=True, key_start=[0, 40]),
        groups=(torch.arange(131) != torch.tensor([[0], [40]])).long(),
        sink_logits=_random((4,)),
    ),
    "groups of one key among three": lambda: make(
        groups=torch.tensor([2, 0, *([1] * 128), 0]).expand(2, 131), block_size=48
    ),
    "block mask": lambda: make(
        AttentionMask(causal=True), block_mask=_chance(0.6, 1, 4, 5, 5), sink_logits=_random((4,))
    ),
    "block mask, narrow and wide blocks": lambda: make(
        block_size=(16, 48), block_mask=_chance(0.5, 2, 1, 9, 3)
    ),
    "block mask, high and short blocks": lambda: make(
        block_size=(96, 16), block_mask=_chance(0.5, 1, 1, 2, 9)
    ),
    "float16": lambda: make(AttentionMask(causal=True), dtype=torch.float16),
    "bfloat16": lambda: make(AttentionMask(causal=True), dtype=torch.bfloat16),
    "bfloat16, no whole vectors": lambda: make(
        AttentionMask(causal=True, window=77),
        sizes=(1, 4, 2, 131, 199, 50, 30),
        dtype=torch.bfloat16,
        scale=-0.3,
    ),
    "bfloat16, odd head_dim": lambda: make(
        sizes=(1, 2, 1, 70, 35, 33, 65), dtype=torch.bfloat16, softcap=3.0
    ),
    "bfloat16, groups and few rows": lambda: make(
        AttentionMask(causal=True),
        sizes=(2, 4, 2, 67, 67, 64, 64),
        dtype=torch.bfloat16,
        groups=(torch.arange(134) % 7 % 4).view(2, 67),
    ),
    "bfloat16, whole tiles and more": lambda: make(  # of 16 keys and 32 dimensions (AMX)
        AttentionMask(causal=True), sizes=(1, 4, 2, 203, 331, 64, 96), dtype=torch.bfloat16
    ),
    "bfloat16, whole tiles, groups and slopes": lambda: make(
        AttentionMask(alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.4])),
        sizes=(2, 4, 1, 70, 131, 96, 40),
        dtype=torch.bfloat16,
        groups=(torch.arange(262) % 7 % 4).view(2, 131),
        softcap=5.0,
        scale=-0.3,
    ),
    "bfloat16, wide whole tiles": lambda: make(
        AttentionMask(causal=True, window=100),
        sizes=(1, 2, 2, 300, 300, 256, 256),
        dtype=torch.bfloat16,
        scale=0.1,
    ),
    "scale": lambda: make(scale=-0.3),
}
for _name, _options in {
    "as many queries as keys": {
        "mask": AttentionMask(causal=True),
        "sizes": (1, 2, 1, 331, 331, 32, 96),
        "block_size": 64,
    },
    "window": {"mask": AttentionMask(causal=True, window=77), "scale": -0.3},
    "bias and softcap": {"mask": AttentionMask(bias=_random((2, 1, 203, 331))), "softcap": 5.0},
    "key padding": {"mask": AttentionMask(causal=True, key_padding=_chance(0.7, 2, 331))},
    "groups of one key": {"groups": (torch.arange(331) == 37).long().expand(2, 331)},
    "block mask": {"block_mask": _chance(0.6, 1, 4, 7, 11), "sink_logits": _random((4,))},
    "odd blocks": {"mask": AttentionMask(causal=True), "block_size": (70, 127)},
}.items():  # several tiles of queries meet a tile of keys (AMX)
    CASES[f"bfloat16, whole tiles, {_name}"] = lambda options=_options: make(
        **({"sizes": (2, 4, 2, 203, 331, 64, 40), "dtype": torch.bfloat16} | options)
    )
for _size in (16, 48, 64, 128, 256, (96, 16), (16, 160), (160, 32), (176, 144)):
    CASES[f"blocks {_size}"] = lambda size=_size: make(
        AttentionMask(causal=True), sizes=(1, 2, 1, 331, 331, 20, 28), block_size=size
    )
for _dims in ((16, 16), (80, 96), (96, 80), (128, 7), (7, 128), (256, 256), (33, 200)):
    CASES[f"dims {_dims}"] = lambda dims=_dims: make(
        AttentionMask(causal=True), sizes=(1, 2, 1, 71, 139, *dims)
    )
_LONG = (2, 4, 2, 3, 2099, 20, 28)
"""Few queries on several pieces of the keys, the last one short."""
for _name, _mask in {
    "causal": AttentionMask(causal=True),
    "both ways": None,
    "window": AttentionMask(causal=True, window=1300),
    "window both ways": AttentionMask(window=1100),
    "window of one": AttentionMask(causal=True, window=1),
    "ragged": AttentionMask(causal=True, key_lengths=[2099, 1031], query_lengths=[3, 2]),
    "an empty row of the batch": AttentionMask(key_lengths=[1500, 0]),
    "left padding": AttentionMask(causal=True, key_start=[0, 1040]),
    "key padding": AttentionMask(causal=True, key_padding=_chance(0.7, 2, 2099)),
    "prefix-LM": AttentionMask(causal=True, prefix=[9, 2099]),
    "ALiBi": AttentionMask(alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.001])),
    "bias that hides": AttentionMask(
        bias=_random((1, 4, 3, 2099)).masked_fill(_chance(0.4, 3, 2099), -torch.inf)
    ),
    "bias of the keys": AttentionMask(causal=True, bias=_random((2, 1, 1, 2099))),
    "boolean": AttentionMask(allowed=_chance(0.4, 1, 4, 3, 2099)),
}.items():
    CASES[f"few on many, {_name}"] = lambda mask=_mask: make(mask, sizes=_LONG)
for _name, _options in {
    "one query": {"sizes": (1, 6, 2, 1, 2099, 64, 48)},
    "one query a head": {"sizes": (2, 3, 3, 1, 1024, 64, 64)},
    "one key more than a piece": {"sizes": (1, 2, 1, 2, 1025, 33, 7)},
    "more queries than keys": {"sizes": (1, 2, 1, 4, 2, 16, 16), "top_k": 1},
    "as many rows as go": {"sizes": (1, 8, 1, 4, 1100, 16, 16)},
    "softcap": {"softcap": 3.0},
    "learned sinks": {"sink_logits": torch.tensor([2.0, -30.0, 50.0, 1.0])},
    "sinks beside an empty row": {
        "mask": AttentionMask(key_lengths=[90, 0]),
        "sink_logits": _random((4,)),
    },
    "scale": {"scale": -0.3},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 in whole vectors": {"dtype": torch.bfloat16, "sizes": (2, 14, 2, 1, 2099, 64, 80)},
    "bfloat16 in place": {
        "dtype": torch.bfloat16,
        "sizes": (2, 14, 2, 1, 2099, 64, 80),
        "statistics": ("lse", "entropy", "received", "block_mass"),
    },
    "wide": {"sizes": (1, 2, 1, 2, 1100, 256, 200)},
    "groups": {"groups": (torch.arange(2 * 2099) % 7 % 4).view(2, 2099)},
    "blocks": {"block_mask": _chance(0.6, 1, 4, 1, 66)},
    "blocks of 7": {"block_size": (2, 7)},
    "blocks of 176": {"block_size": (1, 176)},
    "blocks of 1,500": {"block_size": (3, 1500)},
    "one block": {"block_size": (4, 4096)},
}.items():
    CASES[f"few on many, {_name}"] = lambda options=_options: make(
        **({"mask": AttentionMask(causal=True), "sizes": _LONG} | options)
    )
FEW = (
    "few on many, ragged",
    "few on many, bfloat16",
    "few on many, bfloat16 in place",
    "bfloat16, whole tiles and more",
    "few on many, blocks of 7",
    "causal window",
    "one query",
    "packed",
    "ALiBi both ways",
    "boolean",
    "softcap",
    "groups mixed",
    "float16",
    "blocks (96, 16)",
    "dims (33, 200)",
)


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_everything_equals_the_reference(name: str) -> None:
    problem = CASES[name]()
    compare(problem, cpu.run(problem), reference.run(problem), LIMIT, _value_limit(problem))


def _value_limit(problem: Problem) -> float:
    """The output is rounded to the input's type."""
    half = problem.query.dtype != torch.float32
    return torch.finfo(problem.query.dtype).eps if half else LIMIT


def _instruction_sets() -> list[Any]:
    """The oldest always: that of this machine is what the other tests run."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return [""]
    pairs = "-march=cooperlake -DPREFERS_PAIRS=1"  # where Intel's cores go another way
    return first(["-march=x86-64", "-march=x86-64-v3", pairs], "-march=x86-64", pairs)


@needs_library
@pytest.mark.parametrize("target", _instruction_sets())
def test_every_instruction_set_gives_the_same(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "v3" in target and not re.search(r"\bavx2\b.*\bfma\b|\bfma\b.*\bavx2\b", flags):
        pytest.skip("this processor has no AVX2")
    if "cooperlake" in target and "avx512_bf16" not in flags:
        pytest.skip(
            "this processor has no AVX512_BF16"
        )  # and where it has AMX too, that is left out
    monkeypatch.setenv("LENS_KERNELS_CACHE", str(tmp_path))
    made = library.open_library(str(build.library_path(target)))
    monkeypatch.setattr(calls, "load", lambda: made)
    for name in FEW:
        problem = CASES[name]()
        compare(problem, cpu.run(problem), reference.run(problem), LIMIT, _value_limit(problem))


@needs_library
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize(
    "flags", first(["-mno-avx512bf16", "-U__linux__", "-mno-amx-bf16", ""], "-mno-avx512bf16", "")
)
def test_it_compiles_where_a_part_of_the_bfloat16_instructions_is_missing(flags: str) -> None:
    """Machines that rent out processors hide some of them."""
    sources = [str(build.SOURCES / name) for name in ("forward.c", "backward.c", "decode.c")]
    command = [build.find_compiler(), "-std=gnu11", "-fsyntax-only", "-march=sapphirerapids"]
    done = subprocess.run(
        [*command, *flags.split(), *sources], capture_output=True, text=True, check=False
    )
    if "sapphirerapids" in done.stderr:
        pytest.skip("this compiler does not know that processor")
    assert done.returncode == 0, done.stderr


@needs_library
def test_products_of_torch_between_calls_are_as_before() -> None:
    """Both set up the same tiles (AMX)."""
    left, right = (_random((2, 96, 64), seed).to(torch.bfloat16) for seed in (1, 2))
    before = left @ right.mT
    problem = CASES["bfloat16, whole tiles and more"]()
    output = cpu.run(problem).output
    for _ in range(3):
        assert torch.equal(left @ right.mT, before)
        assert torch.equal(cpu.run(problem).output, output)


@needs_library
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "groups mixed",
        "blocks (160, 32)",
        "few on many, key padding",
        "bfloat16, whole tiles and more",
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["torch's threads", "own threads"])
def test_the_number_of_threads_does_not_change_a_bit(
    name: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own:
        monkeypatch.setattr(calls, "openmp_parallel", lambda: None)
    elif calls.openmp_parallel() is None:
        pytest.skip("torch's OpenMP library cannot be reached here")
    problem = CASES[name]()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.run(problem)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            many = cpu.run(problem)
            assert torch.equal(one.output, many.output)
            for key, tensor in one.tensors.items():
                assert torch.equal(tensor, many.tensors[key]), key
    finally:
        torch.set_num_threads(before)


@needs_library
def test_calls_at_the_same_time_do_not_meet() -> None:
    """From several threads of Python: the library keeps nothing between calls."""
    problems = [CASES[name]() for name in ("causal", "groups mixed", "few on many, causal")] * 4
    expected = [cpu.run(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(cpu.run, problems))
    for result, alone in zip(results, expected, strict=True):
        assert torch.equal(result.output, alone.output)
        for name, tensor in alone.tensors.items():
            assert torch.equal(result.tensors[name], tensor), name


@needs_library
def test_long_rows_keep_their_digits() -> None:
    """Columns over many query tiles and chunks, rows over many key tiles."""
    problem = make(AttentionMask(causal=True), sizes=(1, 1, 1, 2311, 2311, 16, 16), block_size=64)
    compare(problem, cpu.run(problem), reference.run(problem), LIMIT)


GRADIENTS = (
    "everything visible",
    "more queries than keys",
    "one query",
    "three queries",
    "window both ways",
    "an empty row of the batch",
    "left padding",
    "key padding",
    "packed",
    "ALiBi",
    "boolean",
    "softcap",
    "softcap and bias",
    "learned sinks",
    "learned sinks beside an empty row",
    "block mask",
    "block mask, high and short blocks",
    "blocks (16, 160)",
    "blocks (176, 144)",
    "dims (7, 128)",
    "dims (256, 256)",
    "dims (33, 200)",
)
EXPORTS = tuple(name for name, entry in STATISTICS.items() if entry.from_backward)


def upstream(problem: Problem, *names: str) -> Upstream:
    """Random gradients of the results of those names."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"output": (*problem.query.shape[:3], problem.value_dim)}
    shapes |= {name: statistic_shape(problem, name) for name in names if name != "output"}
    return Upstream(
        **{name: torch.randn(shapes[name], generator=generator).double() for name in names}
    )


def saved(problem: Problem) -> Saved:
    wanted = {"query", "key", "value"}
    wanted |= set() if problem.sink_logits is None else {"sink_logits"}
    return Saved(problem, reference.run(problem).tensors["lse"], None, frozenset(wanted))


def compare_gradients(got: Gradients, expected: Gradients) -> None:
    found = {name: getattr(got, name) for name in ("query", "key", "value", "sink_logits")}
    wanted = {name: getattr(expected, name) for name in found} | expected.exports
    found |= got.exports
    assert set(found) == set(wanted)
    errors = {
        name: rms_ratio(found[name], tensor)
        for name, tensor in wanted.items()
        if tensor is not None and name != "block_logit_gradient"
    }
    if "block_logit_gradient" in wanted:  # may cancel to 0: held to the size of what is summed
        difference = found["block_logit_gradient"] - wanted["block_logit_gradient"]
        size = wanted["block_logit_gradient_abs"].norm()
        errors["block_logit_gradient"] = float(difference.norm() / size)
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@needs_library
@pytest.mark.parametrize(
    "of",
    [("output",), ("output", "lse", "entropy", "block_mass", "received")],
    ids=["output", "statistics too"],
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_those_in_float64(name: str, of: tuple[str, ...]) -> None:
    exports = EXPORTS if of == ("output",) else set(EXPORTS) - {"block_influence"}
    problem = replace(CASES[name](), statistics=frozenset(exports))
    assert cpu.supports_gradients(problem) is None
    gradients = upstream(problem, *of)
    single = Upstream(**{name: getattr(gradients, name).float() for name in of})
    got = cpu.gradients(saved(problem), single)
    wide = replace(
        problem,
        query=problem.query.double(),
        key=problem.key.double(),
        value=problem.value.double(),
        plan=replace(
            problem.plan,
            bias=None if problem.plan.bias is None else problem.plan.bias.double(),
            slopes=None if problem.plan.slopes is None else problem.plan.slopes.double(),
        ),
        sink_logits=None if problem.sink_logits is None else problem.sink_logits.double(),
    )
    compare_gradients(got, tiled_backward.gradients(saved(wide), gradients))


@needs_library
@pytest.mark.parametrize("own", [False, True], ids=["torch's threads", "own threads"])
def test_the_number_of_threads_does_not_change_a_bit_of_the_gradients(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own:
        monkeypatch.setattr(calls, "openmp_parallel", lambda: None)
    problem = replace(CASES["causal"](), statistics=frozenset(EXPORTS))
    state, gradients = saved(problem), upstream(problem, "output", "lse")
    gradients = Upstream(output=gradients.output.float(), lse=gradients.lse)  # pyright: ignore
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cpu.gradients(state, gradients)
        torch.set_num_threads(3)
        many = cpu.gradients(state, gradients)
    finally:
        torch.set_num_threads(before)
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(one, name), getattr(many, name)), name
    for name, tensor in one.exports.items():
        assert torch.equal(tensor, many.exports[name]), name


@needs_library
def test_only_wanted_gradients_are_made() -> None:
    problem = replace(CASES["learned sinks"](), statistics=frozenset())
    state = replace(saved(problem), wanted=frozenset({"key"}))
    everything = cpu.gradients(saved(problem), upstream(problem, "lse"))
    found = cpu.gradients(state, upstream(problem, "lse"))
    assert found.query is None
    assert found.value is None
    assert found.sink_logits is None
    assert found.key is not None
    assert torch.equal(found.key, everything.key)  # pyright: ignore
    assert not bool(everything.value.any())  # pyright: ignore  # no value in the LSE


def test_gradients_that_it_lacks_are_refused_with_the_reason() -> None:
    problem = CASES["bias"]()
    assert cpu.supports_gradients(problem) is None
    trained = replace(problem.plan, bias=problem.plan.bias.clone().requires_grad_())  # pyright: ignore
    assert cpu.supports_gradients(replace(problem, plan=trained)) == (
        "it has no gradient of an additive bias"
    )
    grouped = CASES["groups mixed"]()
    assert cpu.supports_gradients(grouped) == "it has no gradient of group states"
    opted = replace(problem, statistics=frozenset(EXPORTS), differentiable=frozenset({"received"}))
    assert "block_influence only through the output" in str(cpu.supports_gradients(opted))


@needs_library
@pytest.mark.parametrize("name", ["causal", "few on many, causal", "few on many, bfloat16"])
def test_any_strides_are_read(name: str) -> None:
    problem = CASES[name]()
    expected = cpu.run(problem)
    q, k, v = problem.query, problem.key, problem.value
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "positions before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "dim first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": lambda x: torch.stack((x, x.neg()), dim=3).flatten(3)[..., : x.shape[3]],
    }
    for name, lay in layouts.items():
        moved = replace(problem, query=lay(q), key=lay(k), value=lay(v))
        assert torch.equal(moved.key, k), name
        result = cpu.run(moved)
        assert torch.equal(result.output, expected.output), name
        assert torch.equal(result.tensors["received"], expected.tensors["received"]), name


@needs_library
def test_a_group_of_vanishing_mass_is_exact() -> None:
    """A pivot per group: keys 200 nats below the sink still have their own output and LSE."""
    generator = torch.Generator().manual_seed(3)
    query = torch.ones(1, 1, 5, 16)
    key = torch.randn(1, 1, 131, 16, generator=generator)
    key[:, :, 3] += 50.0
    value = torch.randn(1, 1, 131, 19, generator=generator)
    groups = (torch.arange(131) == 3).long()[None]
    problem = make_problem(query, key, value, groups=groups, statistics=())
    result, expected = cpu.run(problem).groups, reference.run(problem).groups
    assert result is not None
    assert expected is not None
    assert float((expected.lse[1] - expected.lse[0]).min()) > 150
    assert rms_ratio(result.output[0], expected.output[0]) < LIMIT
    assert rms_ratio(result.lse, expected.lse) < LIMIT


@needs_library
@pytest.mark.parametrize(("name", "row"), [("causal", 17), ("few on many, causal", 1)])
def test_nan_reaches_its_row_and_no_other(name: str, row: int) -> None:
    problem = CASES[name]()
    query = problem.query.clone()
    query[1, 2, row, 5] = torch.nan
    clean, result = cpu.run(problem), cpu.run(replace(problem, query=query))
    assert result.output[1, 2, row].isnan().all()
    assert result.tensors["entropy"][1, 2, row].isnan()
    mine = torch.zeros(problem.query.shape[:3], dtype=torch.bool)
    mine[1, 2, row] = True
    assert torch.equal(result.output[~mine], clean.output[~mine])
    assert torch.equal(result.tensors["lse"][~mine], clean.tensors["lse"][~mine])


@needs_library
def test_huge_logits_do_not_overflow() -> None:
    problem = make(AttentionMask(causal=True), scale=400.0)
    result, expected = cpu.run(problem), reference.run(problem)
    assert float(expected.tensors["max_logit"].max()) > 5000
    # float32 logits of this size are exact to 5e-4, and so are the probabilities
    assert rms_ratio(result.output, expected.output) < 2e-3
    assert rms_ratio(result.tensors["lse"], expected.tensors["lse"]) < 1e-6


# --- what it cannot do, and how it says so ---


def _problem(dtype: torch.dtype = torch.float32) -> Problem:
    tensor = torch.zeros(1, 1, 4, 8, dtype=dtype)
    return make_problem(tensor, tensor, tensor)


def test_other_types_are_refused_with_the_reason() -> None:
    reason = cpu.supports(_problem(torch.float64))
    assert reason == "it computes in float32, and the inputs are torch.float64"


def test_without_a_library_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpu, calls):
        monkeypatch.setattr(module, "load", lambda: "no C compiler was found (cc, gcc, clang)")
    problem = _problem()
    assert cpu.supports(problem) == "no C compiler was found (cc, gcc, clang)"
    with pytest.raises(RuntimeError, match="the cpu backend cannot run: no C compiler was found"):
        cpu.run(problem)
    explanation = explain(problem.query, problem.key, problem.value)
    assert explanation.chosen == "torch"
    assert explanation.obstacles["cpu"] == "no C compiler was found (cc, gcc, clang)"
    assert "slow" in explanation.why


def test_lack_of_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        @staticmethod
        def lens_forward(_: object) -> int:
            return 1

    monkeypatch.setattr(calls, "load", Exhausted)
    with pytest.raises(MemoryError, match="no scratch memory for 4 queries and 4 keys; ask for"):
        cpu.run(_problem())


# --- the making of the library ---


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("LENS_KERNELS_CACHE", str(path))
    return path


def _script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compiler is one that takes half a second to copy the library of this machine."""
    made_before = LIBRARY._name  # pyright: ignore
    copy = f'while [ "$1" != -o ]; do shift; done; sleep 0.5; cp "{made_before}" "$2"'
    monkeypatch.setenv("CC", _script(tmp_path / "cc", f'[ "$1" = --version ] && exit; {copy}'))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C compiler was found \(cc, gcc, clang\)"):
        build.library_path()


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(build.BuildError, match="CC=/nowhere/cc was not found; unset CC or correct"):
        build.library_path()


def test_a_compiler_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    half = (
        'for last; do :; done; echo half > "$out"; echo "x.c:1: error: no such thing" >&2; exit 1'
    )
    find = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done; out=${out:-/dev/null}; '
    monkeypatch.setenv("CC", _script(tmp_path / "badcc", find + half))
    with pytest.raises(
        build.BuildError, match=r"badcc could not compile the kernels: x\.c:1: error: no such"
    ):
        build.library_path()
    assert list(folder.iterdir()) == []


def test_a_compiler_that_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    path = tmp_path / "notcc"
    path.write_bytes(b"\x7fELFbroken")
    path.chmod(0o700)
    monkeypatch.setenv("CC", str(path))
    with pytest.raises(build.BuildError, match="notcc could not be run"):
        build.library_path()


def test_the_reason_reaches_the_caller(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    library.load.cache_clear()
    try:
        assert (
            library.load() == "the C compiler CC=/nowhere/cc was not found; unset CC or correct it"
        )
    finally:
        library.load.cache_clear()


def test_a_folder_that_others_may_write_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(build.BuildError, match="others may write in it; set LENS_KERNELS_CACHE"):
        build.cache_folder()


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LENS_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match=r"cannot be made .*set LENS_KERNELS_CACHE"):
        build.cache_folder()


def test_the_default_folder_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LENS_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = build.cache_folder()
    assert folder.is_relative_to(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@needs_library
def test_half_a_library_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, folder: Path, copying: None
) -> None:
    """Loading it would end the process."""
    whole = build.library_path()
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2])
    assert build.library_path() == whole
    assert whole.read_bytes() == content
    whole.write_bytes(content[: len(content) // 2])
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(build.BuildError, match="no C compiler was found"):
        build.library_path()


@needs_library
def test_a_library_that_was_made_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, copying: None
) -> None:
    made = build.library_path()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(folder))
    assert build.library_path() == made
    folder.chmod(0o500)
    assert build.library_path() == made
    assert library.open_library(str(made))


def test_a_folder_that_cannot_be_written_says_so(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(build.tempfile, "mkstemp", refuse)
    message = r"cache cannot be written \(Permission denied\); set LENS_KERNELS_CACHE"
    with pytest.raises(build.BuildError, match=message):
        build.library_path()
    library.load.cache_clear()
    try:
        query = torch.zeros(1, 1, 3, 4)
        assert attention(query, query, query).backend == "torch"
    finally:
        library.load.cache_clear()


def test_a_damaged_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kernels-0.so"
    path.write_text("half")
    with pytest.raises(build.BuildError, match=r"kernels-0\.so cannot be loaded .*; delete it"):
        library.open_library(str(path))


@needs_library
def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Longer(library.Backward):
        _fields_ = [("one_more", library.ctypes.c_int64)]  # noqa: RUF012

    monkeypatch.setitem(library._FUNCTIONS, "backward", Longer)
    with pytest.raises(build.BuildError, match=r"bytes for backward, not .*; delete it"):
        library.open_library(str(build.library_path()))


@needs_library
def test_processes_that_start_together_make_one_library(folder: Path, copying: None) -> None:
    running = [forked(_load, {**os.environ}) for _ in range(2)]
    for process in running:
        process.join(100)
    assert [process.exitcode for process in running] == [0, 0]
    (made,) = folder.iterdir()
    assert re.fullmatch(r"kernels(-[0-9a-f]{20}){3}\.so", made.name)


def _load(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    library.load.cache_clear()
    assert not isinstance(library.load(), str)


def _fork_after_threads() -> None:
    torch.set_num_threads(2)
    query = torch.linspace(-1, 1, 2 * 200 * 16).view(1, 2, 200, 16)

    def run() -> Tensor:
        mask = AttentionMask(causal=True)
        return attention(query, query, query, mask=mask, backend="cpu").output.sum()

    mine = run()
    if not (child := os.fork()):
        os._exit(0 if torch.equal(run(), mine) else 3)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@needs_library
def test_a_fork_of_a_process_that_used_its_threads_does_not_wait_for_them() -> None:
    process = forked(_fork_after_threads)
    process.join(100)
    assert process.exitcode == 0


@needs_library
def test_a_library_is_made_once(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    body = f'[ "$1" = --version ] && exit; echo >> "{log}"; touch "$(echo "$@" | sed "s/.* -o //; s/ .*//")"'
    monkeypatch.setenv("CC", _script(tmp_path / "cc", body))
    made = build.library_path()
    assert build.library_path() == made
    assert made.exists()
    assert len(log.read_text().splitlines()) == 1


@needs_library
def test_another_source_or_compiler_makes_another_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    old = build._key(("-O3",))
    assert build._key(("-O3",)) == old
    assert build._key(("-O2",)) != old
    changed = shutil.copytree(build.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert build._key(("-O3",)) == old
    (changed / "simd.h").write_text((changed / "simd.h").read_text() + "\n")
    assert build._key(("-O3",)) != old
    made = []
    for name in ("cc", "other"):
        body = '[ "$1" = --version ] && exit; while [ "$1" != -o ]; do shift; done; echo x > "$2"'
        monkeypatch.setenv("CC", _script(tmp_path / name, body))
        made.append(build.library_path())
    assert made[0] != made[1]


def test_fifty_runs_give_the_same_bits():
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 4, 131, 24, generator=generator, requires_grad=True)
    key, value = (torch.randn(1, 2, 137, 24, generator=generator) for _ in range(2))

    def run():
        query.grad = None
        mask = lens_kernels.AttentionMask(causal=True)
        names = ("lse", "entropy", "block_mass", "received", "diagonal", "top_keys")
        result = lens_kernels.attention(
            query, key, value, mask=mask, statistics=names, block_size=16, backend="cpu"
        )
        result.output.sum().backward()
        return [result.output, query.grad, *(result.statistics[name] for name in names[:-1])]

    first = run()
    for _ in range(49):
        same = [torch.equal(one, other) for one, other in zip(first, run(), strict=True)]
        assert same == [True] * len(first)
