"""The shapes in the signatures of the kernels are true, and are checked where tests ask for it."""

import subprocess
import sys

import pytest

from tests import shapes
from tests.kernels.shape_calls import RIGHT, WRONG

CHECKED = (
    *("api", "decoding", "patching", "rectangles", "redistribution", "states", "types"),
    "weighted",
    "known_lse",
)


@pytest.fixture(scope="module")
def outcomes():
    modules = [f"lens_kernels.{name}" for name in CHECKED]
    return shapes.outcomes("tests.kernels.shape_calls", *modules)


@pytest.mark.parametrize("call", RIGHT)
def test_right_shapes_pass(outcomes, call):
    assert outcomes[call] is None


@pytest.mark.parametrize("call", WRONG)
def test_wrong_shapes_are_caught(outcomes, call):
    """By the signature, before the function's own checks see them."""
    assert outcomes[call] is not None
    assert outcomes[call].startswith("TypeCheckError"), outcomes[call]


def test_users_import_neither_checker():
    code = (
        "import sys, torch, lens_kernels\n"
        "x = torch.zeros(1, 1, 3, 4); lens_kernels.attention(x, x, x, backend='torch')\n"
        "sys.exit(bool({'jaxtyping', 'beartype'} & {*sys.modules}))\n"
    )
    folder = shapes.ROOT / "kernels"
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0
