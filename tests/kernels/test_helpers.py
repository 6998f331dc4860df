"""The comparison itself must be able to fail."""

import dataclasses

import pytest
import torch
from lens_kernels import reference
from lens_kernels.problem import BackendResult

from tests.kernels.helpers import CASES, assert_close, case_problem, compare, rms_ratio


def test_ratio_is_relative_to_the_size_of_the_numbers():
    expected = torch.full((7, 11), 1e-4)
    assert rms_ratio(expected * 1.27, expected) == pytest.approx(0.27, rel=1e-5)
    assert torch.allclose(expected * 1.27, expected, atol=1e-3)  # what would have passed it


@pytest.mark.parametrize(
    "actual",
    [
        torch.tensor([1.0, torch.nan]),
        torch.tensor([1.0, torch.inf]),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([[1.0, 2.0]]),
    ],
    ids=["nan", "inf", "longer", "one more axis"],
)
def test_nan_infinities_and_shapes_fail(actual):
    assert rms_ratio(actual, torch.tensor([1.0, 2.0])) == torch.inf


def test_infinities_must_have_the_same_place_and_sign():
    expected = torch.tensor([-torch.inf, 2.0])
    assert rms_ratio(expected.clone(), expected) == 0
    assert rms_ratio(-expected, expected) == torch.inf
    assert rms_ratio(expected.flip(0), expected) == torch.inf


def test_zeros_must_be_zeros():
    assert rms_ratio(torch.zeros(3), torch.zeros(3)) == 0
    assert rms_ratio(torch.tensor([0.0, 1e-30, 0.0]), torch.zeros(3)) == torch.inf


def test_assert_close_names_what_is_wrong():
    with pytest.raises(AssertionError, match=r"entropy: RMS error ratio 2\.00e-01 is above 1e-05"):
        assert_close(torch.full((3,), 1.2), torch.ones(3), 1e-5, "entropy")


def spoiled(result: BackendResult, name: str) -> BackendResult:
    if name == "output":
        return dataclasses.replace(result, output=result.output * 1.001)
    tensors = dict(result.tensors)
    if name == "top_keys":
        tensors[name] = tensors[name].flip(-1)
    else:
        tensors[name] = tensors[name].roll(1, -1)
    return dataclasses.replace(result, tensors=tensors)


PROBLEM = case_problem(CASES[1], "cpu")


@pytest.mark.parametrize("name", [*sorted(PROBLEM.statistics), "output"])
def test_compare_sees_one_spoiled_tensor(name):
    expected = reference.run(PROBLEM)
    problem = dataclasses.replace(
        PROBLEM, **{part: getattr(PROBLEM, part).double() for part in ("query", "key", "value")}
    )
    compare(problem, expected, expected, 1e-12)
    with pytest.raises(AssertionError):
        compare(problem, spoiled(expected, name), expected, 1e-5)
