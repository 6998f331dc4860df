"""The shapes in the signatures of lens.stats are true."""

import pytest

from lens import stats
from tests import shapes
from tests.lens.stats.shape_calls import RIGHT, WRONG


@pytest.fixture(scope="module")
def outcomes():
    modules = [f"lens.stats.{name}" for name in ("clusters", "controls", "intervals", "orders")]
    return shapes.outcomes("tests.lens.stats.shape_calls", *modules)


def test_every_function_is_called():
    functions = {name for name in stats.__all__ if callable(getattr(stats, name))}
    assert functions <= RIGHT.keys()


@pytest.mark.parametrize("call", RIGHT)
def test_right_shapes_pass(outcomes, call):
    assert outcomes[call] is None


@pytest.mark.parametrize("call", WRONG)
def test_wrong_shapes_are_caught(outcomes, call):
    """By the signature, before the function's own checks see them."""
    assert outcomes[call] is not None
    assert outcomes[call].startswith("TypeCheckError"), outcomes[call]
