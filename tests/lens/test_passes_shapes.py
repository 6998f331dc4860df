"""The shapes in the signatures of lens.passes hold in every call, and calls with wrong ones are refused."""

import pytest

from tests import shapes
from tests.lens.passes_shape_calls import RIGHT, WRONG


@pytest.fixture(scope="module")
def outcomes():
    modules = [f"lens.passes.{name}" for name in ("logits", "stream", "keys", "head_outputs")]
    return shapes.outcomes("tests.lens.passes_shape_calls", *modules, plain="lens.passes.visit")


@pytest.mark.parametrize("name", RIGHT)
def test_shapes_are_those_of_the_signature(outcomes, name):
    assert outcomes[name] is None


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_refused(outcomes, name):
    assert "TypeCheckError" in str(outcomes[name])
