"""Gradients and backward statistics of every backend against autograd through the definition."""

import dataclasses
import gc
import weakref

import pytest
import torch
from lens_kernels import AttentionMask, attention, backward, explain, panels, tiled_backward
from lens_kernels.problem import statistic_shape
from lens_kernels.validation import make_problem

from tests.kernels.gradient_setting import EXPORTS, LEAVES, OF_OUTPUT, THROUGH, Setting, compare
from tests.kernels.helpers import (
    BACKENDS,
    CASES,
    assert_close,
    ids,
    tensors,
)

CAUSAL = AttentionMask(causal=True)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_every_gradient_in_float64(case):
    setting = Setting(case)
    compare(setting.run("torch"), setting.run("reference"), 1e-10)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_output_and_lse_in_float32(backend, device, case):
    setting = Setting(case, through=("output", "lse"))
    compare(setting.run(backend, device, torch.float32), setting.run("reference"), 1e-5)


@pytest.mark.parametrize("case", CASES[1::5], ids=ids(CASES[1::5]))
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_everything_in_float32(backend, device, case):
    setting = Setting(case)
    compare(setting.run(backend, device, torch.float32), setting.run("reference"), 1e-5)


@pytest.mark.parametrize("through", THROUGH)
def test_each_result_by_itself(through):
    """A loss of one result alone; without the output nothing is attributed to it."""
    names = (through,) if through != "group_output" else ("group_output", "group_lse")
    setting = Setting(CASES[5], through=names)
    found = setting.run("torch")
    if through != "output":
        assert not any(bool(found[name].any()) for name in OF_OUTPUT)
    compare(found, setting.run("reference"), 1e-10)


@pytest.mark.parametrize("leaf", LEAVES)
def test_each_leaf_by_itself(leaf):
    case = next(case for case in CASES if case.name == "bias of a head and key")
    setting = Setting(case, of=(leaf,))
    compare(setting.run("torch"), setting.run("reference"), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_half_precision(backend, device, dtype):
    setting = Setting(CASES[1], through=("output", "lse"))
    setting.tensors = {name: part.to(dtype).float() for name, part in setting.tensors.items()}
    found = setting.run(backend, device, dtype)
    assert all(found[name].dtype == dtype for name in ("query", "key", "value"))
    assert all(found[name].dtype == torch.float32 for name in EXPORTS)
    compare(found, setting.run("reference"), 2e-2)


def test_block_sparse():
    setting = Setting(CASES[1], through=("output", "lse", "block_mass"))
    kept = torch.rand(2, 4, 3, 2, generator=torch.Generator().manual_seed(0)) > 0.4
    compare(setting.run("torch", block_mask=kept), setting.run("reference", block_mask=kept), 1e-10)


def test_panels_smaller_than_a_block_change_nothing(monkeypatch):
    setting = Setting(CASES[15])
    whole = setting.run("torch")
    monkeypatch.setattr(panels, "BUDGET", 97)
    compare(setting.run("torch"), whole, 1e-12)


def test_statistics_of_the_backward_pass_follow_their_identities():
    """sum_J block_attribution = sum_i row_attribution; logit gradients of a row sum to 0."""
    query, key, value = (part.double() for part in tensors(2, 4, 2, 37, 41))
    query.requires_grad_()
    result = attention(query, key, value, mask=CAUSAL, statistics=EXPORTS, block_size=(1, 7))
    upstream = torch.randn(result.output.shape, dtype=torch.float64)
    result.output.backward(upstream)
    found = result.statistics
    row = (upstream * result.output.detach()).sum(-1)
    assert_close(found.row_attribution, row, 1e-12)
    assert_close(found.block_attribution.sum(-1), row, 1e-12)
    signed, size = found.block_logit_gradient.sum(-1), found.block_logit_gradient_abs.sum(-1)
    assert float(signed.abs().max()) < 1e-13 < float(size.median())


@pytest.mark.parametrize("sharp", [1, 14])
@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_influence_is_masking_one_key(backend, sharp):
    """Blocks of one row and key: each number is a masked run, the loss being linear; also where a key has nearly all."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    query, key, value = (part.to(dtype) for part in tensors(1, 2, 1, 7, 11))
    query = query * sharp
    upstream = torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    query.requires_grad_()
    options = {"mask": CAUSAL, "statistics": ("block_influence",), "block_size": 1}
    result = attention(query, key, value, backend=backend, **options)
    result.output.backward(upstream.to(result.output.dtype))
    for masked in range(11):
        keep = torch.ones(1, 11, dtype=torch.bool)
        keep[0, masked] = False
        mask = dataclasses.replace(CAUSAL, key_padding=keep)
        with torch.no_grad():
            without = attention(query, key, value, mask=mask, backend="reference").output
        effect = (upstream * (without - result.output.detach())).sum(-1)
        got = result.statistics.block_influence[..., masked]
        assert float((got - effect).abs().max()) < 1e-5 * float(effect.abs().max() + 1)


def test_backward_statistics_wait_for_backward_and_hold_the_last_one():
    query, key, value = tensors(1, 2, 1, 7, 11)
    query.requires_grad_()
    result = attention(query, key, value, statistics=("row_attribution",), backend="torch")
    with pytest.raises(AttributeError, match="comes from the backward pass: call backward"):
        _ = result.statistics.row_attribution
    result.output.sum().backward(retain_graph=True)
    once = result.statistics.row_attribution
    (3 * result.output.sum()).backward()
    assert_close(result.statistics.row_attribution, 3 * once, 1e-6)


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
def test_only_what_was_opted_in_carries_a_gradient(backend):
    query, key, value = tensors(1, 2, 1, 23, 29)
    query.requires_grad_()
    result = attention(
        query, key, value, statistics="all", differentiable=["received"], backend=backend
    )
    carries = {name for name, part in result.statistics.items() if part.requires_grad}
    assert carries == {"lse", "received"}
    assert result.output.requires_grad
    with torch.no_grad():
        assert not attention(query, key, value, backend=backend).output.requires_grad


def test_what_is_not_asked_for_cannot_be_opted_in():
    query, key, value = tensors(1, 2, 1, 23, 29)
    with pytest.raises(
        ValueError, match="differentiable names entropy, which statistics= does not"
    ):
        attention(query, key, value, differentiable=["entropy"])


def test_a_gradient_of_a_gradient_is_refused():
    query, key, value = tensors(1, 2, 1, 7, 11)
    query.requires_grad_()
    output = attention(query, key, value, backend="torch").output
    (first,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_changing_an_input_between_the_passes_is_noticed():
    query, key, value = tensors(1, 2, 1, 7, 11)
    query.requires_grad_()
    output = attention(query, key, value, backend="torch").output
    with torch.no_grad():
        key.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_inputs_are_freed_with_the_backward_pass():
    """What is kept between the passes is kept by autograd alone, which frees it."""
    query, key, value = (part.requires_grad_() for part in tensors(1, 2, 1, 7, 11))
    doubled = key * 2
    key_seen = weakref.ref(doubled)
    output = attention(query, doubled, value, backend="torch").output
    del doubled
    gc.collect()
    assert key_seen() is not None
    node = output.grad_fn
    output.sum().backward()
    gc.collect()
    assert key_seen() is None
    kept = [getattr(node.problem, name) for name in ("query", "key", "value")]
    assert [part.untyped_storage().nbytes() for part in kept] == [4, 4, 4]


def test_memory_is_linear(monkeypatch):
    """No tensor of the backward pass is as large as one head's matrix."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    monkeypatch.setattr(panels, "BUDGET", 1 << 14)
    query, key, value = tensors(1, 2, 1, 769, 769)
    problem = dataclasses.replace(
        make_problem(query, key, value, mask=CAUSAL), statistics=frozenset(EXPORTS)
    )
    lse = torch.zeros(1, 2, 769)
    saved = backward.Saved(problem, lse, None, frozenset(LEAVES))
    with Largest() as largest:
        tiled_backward.gradients(saved, backward.Upstream(output=torch.ones_like(query)))
    assert largest.numel <= 1 << 16 < 769 * 769 / 8


class OwnBackward:
    """A backend that has a backward pass for causal masks alone."""

    calls = 0

    @staticmethod
    def supports(problem):
        return None

    @staticmethod
    def run(problem):
        from lens_kernels import tiled

        return tiled.run(problem)

    @staticmethod
    def supports_gradients(problem):
        return None if problem.plan.causal else "it knows causal masks alone"

    @classmethod
    def gradients(cls, saved, upstream):
        cls.calls += 1
        return tiled_backward.gradients(saved, upstream)


def test_a_backend_may_bring_its_own_backward_pass(monkeypatch):
    monkeypatch.setattr("lens_kernels.dispatch.load", lambda name: OwnBackward)
    monkeypatch.setattr("lens_kernels.api.load", lambda name: OwnBackward)
    monkeypatch.setattr(OwnBackward, "calls", 0)
    query, key, value = tensors(1, 2, 1, 7, 11)
    query.requires_grad_()
    for mask, calls, line in (
        (CAUSAL, 1, "gradients: triton"),
        (None, 1, "gradients: torch, panel by panel; not triton: it knows causal masks alone"),
    ):
        assert line in str(explain(query, key, value, mask=mask, backend="triton")).split("\n")
        attention(query, key, value, mask=mask, backend="triton").output.sum().backward()
        assert OwnBackward.calls == calls


def test_explain_says_what_computes_the_gradients():
    query, key, value = tensors(1, 2, 1, 7, 11)
    assert explain(query, key, value, backend="torch").gradients is None
    query.requires_grad_()
    assert explain(query, key, value, backend="torch").gradients == "torch, panel by panel"
    assert explain(query, key, value, backend="reference").gradients == "reference, by autograd"


def test_shapes_of_the_backward_statistics_are_those_of_the_table():
    query, key, value = tensors(2, 4, 2, 37, 41)
    query.requires_grad_()
    result = attention(query, key, value, statistics=EXPORTS, block_size=(16, 7), backend="torch")
    result.output.sum().backward()
    problem = make_problem(query, key, value, block_size=(16, 7))
    for name in EXPORTS:
        assert result.statistics[name].shape == statistic_shape(problem, name)
