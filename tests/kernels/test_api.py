"""The public entrance: results, statistics by name, choice of the backend, examples that run."""

import doctest
import importlib
import inspect
import subprocess
import sys

import lens_kernels
import pytest
import torch
from lens_kernels import STATISTICS, AttentionMask, attention, explain
from lens_kernels.dispatch import MODULES, load
from lens_kernels.problem import BackendResult, statistic_shape
from lens_kernels.types import AttentionStatistics

from tests.kernels.helpers import CASES, assert_close, case_problem, tensors

CAUSAL = AttentionMask(causal=True)


def test_the_public_names_are_few_and_exist():
    assert len(lens_kernels.__all__) <= 15
    assert all(hasattr(lens_kernels, name) for name in lens_kernels.__all__)
    assert dir(lens_kernels) == sorted(lens_kernels.__all__)


def test_a_public_function_has_an_example():
    found = [getattr(lens_kernels, name) for name in lens_kernels.__all__]
    functions = [each for each in found if inspect.isfunction(each)]
    assert len(functions) >= 7
    assert [each.__name__ for each in functions if ">>> " not in (each.__doc__ or "")] == []


EXAMPLES = (
    *("api", "decoding", "patching", "rectangles", "redistribution", "states", "types"),
    *("distributed.links", "distributed.ring", "known_lse", "weighted"),
)


@pytest.mark.parametrize("module", ["lens_kernels", *(f"lens_kernels.{name}" for name in EXAMPLES)])
def test_examples_in_docstrings_run(module):
    outcome = doctest.testmod(importlib.import_module(module))
    assert outcome.attempted > 1
    assert outcome.failed == 0


def test_importing_the_package_loads_no_triton():
    code = "import sys, lens_kernels; sys.exit('triton' in sys.modules)"
    folder = lens_kernels.__path__[0].rsplit("/", 1)[0]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


def test_only_what_was_asked_for_is_returned():
    query, key, value = tensors(2, 4, 2, 37, 41)
    result = attention(query, key, value, mask=CAUSAL, statistics=("entropy",), backend="torch")
    assert list(result.statistics) == ["entropy"]
    assert len(result.statistics) == 1
    assert result.statistics.entropy is result.statistics["entropy"]
    assert result.output.shape == (2, 4, 37, 16)
    assert result.groups is None
    assert result.backend == "torch"
    with pytest.raises(AttributeError, match="statistic 'lse' was not asked for; got entropy"):
        _ = result.statistics.lse
    with pytest.raises(KeyError, match="statistic 'received' was not asked for"):
        result.statistics["received"]
    assert "received" not in result.statistics


def test_the_repr_names_shapes_and_backend():
    query, key, value = tensors(2, 4, 2, 37, 41)
    result = attention(query, key, value, statistics=("lse",), backend="torch")
    assert repr(result) == (
        "AttentionResult(output=[2, 4, 37, 16], backend='torch', "
        "AttentionStatistics(lse [2, 4, 37]))"
    )


def test_all_is_everything_that_the_arguments_allow():
    query, key, value = tensors(2, 4, 2, 37, 41)
    plain = set(attention(query, key, value, statistics="all", backend="torch").statistics)
    optional = {"match_mass", "block_weighted", "grid_moments"}
    backward = {name for name, entry in STATISTICS.items() if entry.from_backward}
    assert plain == set(STATISTICS) - optional - backward
    problem = case_problem(CASES[1], "cpu")
    assert problem.statistics == set(STATISTICS) - backward


@pytest.mark.parametrize("name", [n for n, entry in STATISTICS.items() if not entry.from_backward])
def test_shapes_are_those_of_the_table(name):
    problem = case_problem(CASES[2], "cpu")
    for backend in ("reference", "torch"):
        result = load(backend).run(problem)
        assert result.tensors[name].shape == statistic_shape(problem, name)


def test_diagonals_know_their_first_distance():
    query, key, value = tensors(1, 2, 1, 3, 5)
    for mask, start, count in ((CAUSAL, 0, 5), (None, -2, 7)):
        got = attention(query, key, value, mask=mask, statistics=("diagonal",), backend="torch")
        assert got.statistics.diagonal_start == start
        assert got.statistics.diagonal.shape == (1, 2, count)
    row = attention(query, key, value, mask=CAUSAL, statistics=("distance",), backend="torch")
    causal = attention(query, key, value, mask=CAUSAL, statistics=("diagonal",), backend="torch")
    mean = (causal.statistics.diagonal * torch.arange(5)).sum(-1)
    assert_close(mean, row.statistics.distance.sum(-1), 1e-6)


def test_statistics_of_the_backward_pass_wait_for_it():
    filled: dict[str, torch.Tensor | None] = {"row_attribution": None}
    statistics = AttentionStatistics({}, block_size=(64, 64), from_backward=filled)
    assert list(statistics) == ["row_attribution"]
    assert repr(statistics) == "AttentionStatistics(row_attribution (backward))"
    with pytest.raises(AttributeError, match="comes from the backward pass: call backward"):
        _ = statistics.row_attribution
    filled["row_attribution"] = torch.ones(3)
    assert statistics.row_attribution.shape == (3,)


def test_groups_come_back_as_states():
    query, key, value = tensors(2, 4, 2, 37, 41)
    groups = torch.randint(0, 2, (2, 41), generator=torch.Generator().manual_seed(0))
    result = attention(query, key, value, groups=groups, backend="torch")
    assert result.groups is not None
    assert result.groups.output.shape == (2, 2, 4, 37, 16)
    assert_close(torch.logsumexp(result.groups.lse, 0), result.statistics.lse, 1e-6)
    share = torch.exp(result.groups.lse - result.statistics.lse)
    assert_close((share[..., None] * result.groups.output).sum(0), result.output, 1e-6)


def test_auto_takes_the_fast_backend_or_says_why_not(monkeypatch):
    query, key, value = tensors(1, 2, 1, 37, 41)
    cpu = load("cpu")
    monkeypatch.setattr(cpu, "supports", lambda problem: None)
    fast = explain(query, key, value)
    assert fast.chosen == "cpu"
    assert fast.obstacles["torch"] is None
    assert str(fast).startswith("cpu: the fast one on cpu\nnot triton: ")
    assert "not torch: it could, but is not asked for" in str(fast)
    monkeypatch.setattr(cpu, "supports", lambda problem: "no compiler was found")
    slow = explain(query, key, value)
    assert slow.chosen == "torch"
    assert slow.obstacles["cpu"] == "no compiler was found"
    assert slow.why == "plain torch serves every problem on cpu; it is the slow one"
    assert attention(query, key, value).backend == "torch"


def test_auto_never_takes_the_reference(monkeypatch):
    for name in ("cpu", "torch"):
        monkeypatch.setattr(load(name), "supports", lambda problem: "busy")
    with pytest.raises(RuntimeError, match="no backend can do this on cpu: cpu: busy; torch: busy"):
        explain(*tensors(1, 2, 1, 7, 11))


def test_a_backend_by_name_is_run_or_refused(monkeypatch):
    query, key, value = tensors(1, 2, 1, 37, 41)
    assert attention(query, key, value, backend="reference").output.dtype == torch.float64
    assert explain(query, key, value, backend="reference").why == "asked for by name"
    monkeypatch.setattr(load("cpu"), "supports", lambda problem: "no compiler was found")
    message = "backend 'cpu' cannot do this: no compiler was found; use backend='auto'"
    with pytest.raises(ValueError, match=message):
        attention(query, key, value, backend="cpu")


def test_an_unknown_backend_is_named():
    message = "unknown backend 'flash'; use auto, triton, cpu, torch, reference"
    with pytest.raises(ValueError, match=message):
        attention(*tensors(1, 2, 1, 7, 11), backend="flash")


def test_every_backend_module_keeps_the_contract():
    problem = case_problem(CASES[1], "cpu")
    for name in MODULES:
        obstacle = load(name).supports(problem)
        assert obstacle is None or isinstance(obstacle, str)
        if obstacle is None:
            assert isinstance(load(name).run(problem), BackendResult)


def test_the_definition_is_differentiable():
    """Double precision finite differences through output and LSE of the reference."""
    parts = [part.double().requires_grad_() for part in tensors(1, 2, 1, 5, 7, 3, 2)]
    sinks = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def run(query, key, value, sinks):
        result = attention(
            query,
            key,
            value,
            mask=AttentionMask(causal=True, window=3),
            softcap=2.0,
            sink_logits=sinks,
            backend="reference",
        )
        return result.output, result.statistics.lse.exp()

    assert torch.autograd.gradcheck(run, (*parts, sinks))
