"""`weighted_attention`: sigmoid, ReLU, off-by-one and differential attention against their definitions."""

import math
from typing import Any

import pytest
import torch
from lens_kernels import AttentionMask, attention, weighted_attention, weighted_panels
from lens_kernels.normalisers import Differential, OffByOne, Relu, Sigmoid
from lens_kernels.weighted_panels import WEIGHT_STATISTICS
from torch import Tensor

from tests.kernels.helpers import CASES, assert_close, ids, rms_ratio, tensors

PER_HEAD = torch.tensor([0.3, -0.4, 1.2, 0.8])
NORMALISERS = {
    "off by one": OffByOne(),
    "sigmoid": Sigmoid(),
    "sigmoid, bias": Sigmoid(PER_HEAD),
    "relu": Relu(),
    "relu squared, seen": Relu(2, "seen", PER_HEAD),
    "differential": Differential(0.6),
    "differential, per head": Differential(PER_HEAD),
}
USED = {"causal", "causal, cached keys", "causal, more queries", "window both ways", "left padding"}
USED |= {"packed by row", "empty batch row", "alibi", "bias of -inf", "everything"}
MASKS = [case for case in CASES if case.name in USED]
every = pytest.mark.parametrize("normaliser", NORMALISERS.values(), ids=[*NORMALISERS])


def _options(queries: int, keys: int) -> dict[str, Any]:
    row, column = torch.arange(queries) % 5, torch.arange(keys) % 5
    labels = [(row, column), (torch.where(row == 2, -1, row), column - 1)]
    return {"statistics": "all", "match": labels, "prefix": 3, "block_size": (16, 8)}


def _inputs(
    queries: int = 37, keys: int = 37, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return tensors(2, 4, 2, queries, keys, 16, 24, seed=seed, dtype=dtype)


def _compare(actual, expected, limit: float = 1e-5) -> None:
    names = {
        name: (actual.statistics[name], expected.statistics[name]) for name in expected.statistics
    }
    names["output"] = (actual.output, expected.output)
    ratios = {name: rms_ratio(*pair) for name, pair in names.items()}
    assert {name: ratio for name, ratio in ratios.items() if not ratio <= limit} == {}
    assert {*actual.statistics} == {*expected.statistics}


def test_the_reference_is_the_formulas_of_the_papers():
    """Element by element, in Python's own arithmetic: nothing is shared with the code under test."""
    query, key, value = _inputs(5, 5, dtype=torch.float64)
    for normaliser in (
        OffByOne(),
        Sigmoid(),
        Relu(),
        Relu(2, "seen", PER_HEAD),
        Differential(PER_HEAD),
    ):
        found = weighted_attention(
            query, key, value, normaliser, mask=AttentionMask(causal=True), backend="reference"
        )
        for head in range(4):
            for row in range(5):
                size = 8 if isinstance(normaliser, Differential) else 16

                def logits(part, head=head, row=row, size=size):
                    q = query[1, head, row].tolist()
                    keys = key[1, head // 2].tolist()
                    cut = slice(part * size, part * size + size)
                    return [
                        sum(a * b for a, b in zip(q[cut], k[cut], strict=True)) / math.sqrt(size)
                        for k in keys[: row + 1]
                    ]

                s, number = logits(0), float(PER_HEAD[head].double())
                match normaliser:
                    case OffByOne():
                        weights = [math.exp(x) / (1 + sum(map(math.exp, s))) for x in s]
                    case Sigmoid():
                        weights = [1 / (1 + math.exp(-(x - math.log(5)))) for x in s]
                    case Relu(power=1):
                        weights = [max(x, 0) / 5 for x in s]
                    case Relu():
                        weights = [max(x + number, 0) ** 2 / len(s) for x in s]
                    case _:
                        other = [math.exp(x) for x in logits(1)]
                        first = [math.exp(x) for x in s]
                        weights = [
                            a / sum(first) - number * b / sum(other)
                            for a, b in zip(first, other, strict=True)
                        ]
                expected = [
                    sum(w * v for w, v in zip(weights, column, strict=True))
                    for column in value[1, head // 2, : row + 1].T.tolist()
                ]
                assert found.output[1, head, row].tolist() == pytest.approx(
                    expected, rel=1e-12, abs=1e-14
                )


@every
@pytest.mark.parametrize("case", MASKS, ids=ids(MASKS))
def test_panels_give_the_reference(normaliser, case, monkeypatch):
    monkeypatch.setattr(weighted_panels, "BUDGET", 2000)  # several panels in a block
    query, key, value = _inputs(case.queries, case.keys)
    options: dict[str, Any] = _options(case.queries, case.keys) | {
        "mask": case.mask(4, case.queries, case.keys)
    }
    found = weighted_attention(query, key, value, normaliser, backend="torch", **options)
    expected = weighted_attention(query, key, value, normaliser, backend="reference", **options)
    _compare(found, expected)
    assert {*found.statistics} == {*WEIGHT_STATISTICS}


@pytest.mark.parametrize("name", ["off by one", "differential", "differential, per head"])
def test_what_the_backends_of_attention_give(name):
    names = ("prefix_mass", "match_mass", "value_norm", "received", "diagonal", "block_mass")
    options: dict[str, Any] = _options(37, 37) | {
        "statistics": names,
        "mask": AttentionMask(causal=True, window=21),
    }
    found = weighted_attention(*_inputs(), NORMALISERS[name], **options)
    assert found.backend == "softmax"
    _compare(
        found, weighted_attention(*_inputs(), NORMALISERS[name], backend="reference", **options)
    )
    options["statistics"] = "all"
    slow = weighted_attention(*_inputs(), NORMALISERS[name], **options)
    assert slow.backend == "torch"


def test_softcap_scale_and_half_precision():
    options = _options(37, 37) | {"mask": AttentionMask(causal=True), "softcap": 2.0, "scale": 0.4}
    for normaliser in (Sigmoid(), Differential(0.6)):
        found = weighted_attention(*_inputs(), normaliser, backend="torch", **options)
        _compare(found, weighted_attention(*_inputs(), normaliser, backend="reference", **options))
        query, key, value = (tensor.bfloat16() for tensor in _inputs())
        low = query, key, value
        found = weighted_attention(*low, normaliser, backend="torch", **options)
        assert found.output.dtype == torch.bfloat16
        assert found.statistics.received.dtype == torch.float32
        expected = weighted_attention(*low, normaliser, backend="reference", **options)
        assert_close(found.statistics.received, expected.statistics.received, 1e-5)
        assert_close(found.output, expected.output, 4e-3)


def test_off_by_one_is_a_sink_of_logit_0_and_never_overflows():
    query, key, value = _inputs()
    asked = ("received", "diagonal", "block_mass")
    mask = AttentionMask(causal=True)
    found = weighted_attention(
        query, key, value, OffByOne(), mask=mask, statistics=asked, backend="torch"
    )
    same = attention(query, key, value, mask=mask, sink_logits=torch.zeros(4), statistics=asked)
    _compare(found, same)
    for size in (1e3, -1e3):
        logits = torch.full((1, 1, 3, 1), size)
        one = torch.ones(1, 1, 3, 1)
        sums = weighted_attention(logits, one, one, OffByOne(), scale=1.0, statistics=("row_sum",))
        assert sums.statistics.row_sum.flatten().tolist() == pytest.approx([float(size > 0)] * 3)


def test_known_weights():
    zero = torch.zeros(1, 2, 6, 4)
    value = torch.eye(6)[None, None].expand(1, 2, -1, -1)

    def sums(normaliser, name="row_sum"):
        mask = AttentionMask(causal=True)
        found = weighted_attention(zero, zero, value, normaliser, mask=mask, statistics=(name,))
        return found.statistics[name][0, 0]

    seen = torch.arange(1.0, 7)
    assert torch.allclose(sums(OffByOne()), seen / (1 + seen))
    assert torch.allclose(sums(Sigmoid()), seen / 7)
    assert torch.allclose(sums(Relu()), torch.zeros(6))
    assert sums(Relu(), "active").tolist() == [0] * 6
    assert torch.allclose(sums(Relu(2, "seen", 3.0)), torch.full((6,), 9.0))
    assert torch.allclose(sums(Relu(1, "keys", 3.0)), 3 * seen / 6)
    assert torch.allclose(sums(Differential(1.0), "magnitude"), torch.zeros(6), atol=1e-7)
    assert torch.allclose(sums(Differential(0.25)), torch.full((6,), 0.75))
    assert torch.allclose(sums(Sigmoid(), "entropy"), seen.log(), atol=1e-6)


# --- gradients ------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("asked", [("block_mass", "received"), "all"], ids=["sums", "all"])
def test_gradients_are_those_of_the_reference(normaliser, asked, monkeypatch):
    monkeypatch.setattr(weighted_panels, "BUDGET", 4000)
    generator = torch.Generator().manual_seed(5)
    field = {Differential: "subtracted", Sigmoid: "bias", Relu: "bias"}.get(type(normaliser))
    losses: dict[str, Any] = {}
    weights: dict[str, torch.Tensor] = {}
    for backend in ("reference", "auto"):
        leaves = [tensor.requires_grad_() for tensor in _inputs()]
        given = normaliser
        if field is not None and isinstance(getattr(normaliser, field), torch.Tensor):
            number = getattr(normaliser, field).clone().requires_grad_()
            given = type(normaliser)(**vars(normaliser) | {field: number})
            leaves.append(number)
        options = _options(37, 37) | {"statistics": asked, "mask": AttentionMask(causal=True)}
        found = weighted_attention(
            leaves[0], leaves[1], leaves[2], given, backend=backend, **options
        )
        parts = {"output": found.output, **found.statistics}
        loss = torch.zeros(())
        for name, tensor in parts.items():
            if name in ("active", "block_max"):  # a count; and ties
                continue
            if name not in weights:
                weights[name] = torch.randn(tensor.shape, generator=generator)
            loss = loss + (tensor.double() * weights[name]).sum()
        losses[backend] = torch.autograd.grad(loss, leaves)
    for actual, expected in zip(losses["auto"], losses["reference"], strict=True):
        assert_close(actual, expected, 2e-5)


# --- inputs that are no numbers -------------------------------------------------------------------


@every
def test_what_is_not_finite_reaches_the_rows_that_see_it(normaliser):
    query, key, value = _inputs()
    query[0, 1, 9, 3] = torch.nan
    key[0, 1, 20, 15] = torch.inf
    value[1, 0, 30, 7] = -torch.inf
    options: dict[str, Any] = _options(37, 37) | {"mask": AttentionMask(causal=True)}
    clean = weighted_attention(*_inputs(), normaliser, **options)
    names = ("received", "block_mass", "diagonal")
    for backend, statistics in (("torch", "all"), ("auto", names), ("reference", "all")):
        given: dict[str, Any] = options | {"statistics": statistics}
        found = weighted_attention(query, key, value, normaliser, backend=backend, **given)
        bad = found.output.isnan()
        expected = torch.zeros_like(bad)
        expected[0, 1, 9] = True
        expected[0, 2:, 20:] = True
        expected[1, :2, 30:, 7] = True
        assert torch.equal(bad, expected), backend
        rows = expected.all(-1)
        assert_close(found.output[~bad], clean.output[~bad], 1e-5)
        touched = torch.zeros(2, 4, 37, dtype=torch.bool)
        touched[0, 1, :10] = True
        touched[0, 2:] = True
        assert torch.equal(found.statistics.received.isnan(), touched), backend
        if statistics == "all":
            assert torch.equal(found.statistics.entropy.isnan(), rows), backend
            assert torch.equal(found.statistics.row_sum.isnan(), rows), backend
            assert torch.equal(found.statistics.value_norm.isnan(), bad.any(-1)), backend


def test_padding_may_hold_anything():
    query, key, value = _inputs()
    mask = AttentionMask(causal=True, key_start=[0, 5])
    for normaliser in NORMALISERS.values():
        clean = weighted_attention(query, key, value, normaliser, mask=mask, statistics="all")
        dirty = query.clone(), key.clone(), value.clone()
        for tensor in dirty:
            tensor[1, :, :5] = torch.nan
        found = weighted_attention(*dirty, normaliser, mask=mask, statistics="all")
        _compare(found, clean, 1e-6)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normaliser", "error", "expected"),
    [
        ("sigmoid", TypeError, r"normaliser must be OffByOne\(\), .* got str"),
        (Sigmoid, TypeError, "got Sigmoid"),
        (Relu(3), ValueError, "power of Relu must be 1 or 2, got 3"),
        (Relu(over="row"), ValueError, "over of Relu must be one of seen, keys, got 'row'"),  # pyright: ignore
        (Relu(bias=math.nan), ValueError, "bias of Relu must be finite"),
        (Sigmoid(torch.zeros(3)), ValueError, r"one per head \(\[4\]\), got torch.float32 \[3\]"),
        (Sigmoid("much"), TypeError, "bias of Sigmoid must be a number"),  # pyright: ignore
        (
            Differential(torch.full((4,), torch.inf)),
            ValueError,
            "subtracted of Differential must be finite",
        ),
    ],
)
def test_normalisers_that_are_none(normaliser, error, expected):
    with pytest.raises(error, match=expected):
        weighted_attention(*_inputs(), normaliser)


def test_arguments_that_do_not_fit():
    odd = torch.zeros(1, 1, 3, 5)
    with pytest.raises(ValueError, match="head_dim must be even, got 5"):
        weighted_attention(odd, odd, odd, Differential(0.5))
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"statistics": ("lse",)},
            "unknown statistic 'lse' of weights that are no softmax; known: row_sum",
        ),
        ({"statistics": ("match_mass",)}, "needs match="),
        ({"statistics": "entropy"}, r"write \('entropy',\)"),
        ({"backend": "cpu"}, "unknown backend 'cpu'; use auto, torch, reference"),
    )
    for options, expected in wrong:
        with pytest.raises(ValueError, match=expected):
            weighted_attention(*_inputs(), Sigmoid(), **options)
