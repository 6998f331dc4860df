"""The shapes in the signatures of lens.edits hold in every call, and calls with wrong ones are refused."""

import pytest

from tests import shapes
from tests.lens.edits_shape_calls import RIGHT, WRONG


@pytest.fixture(scope="module")
def outcomes():
    modules = [f"lens.edits.{name}" for name in ("_phi", "losses", "_others", "effects")]
    return shapes.outcomes("tests.lens.edits_shape_calls", *modules, plain="lens.traces.captures")


@pytest.mark.parametrize("name", RIGHT)
def test_shapes_are_those_of_the_signature(outcomes, name):
    assert outcomes[name] is None


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_refused(outcomes, name):
    assert "TypeCheckError" in str(outcomes[name])
