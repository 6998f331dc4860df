"""The shapes in the signatures of the kernels are true, and are checked where tests ask for it."""

import importlib
import subprocess
import sys

import jaxtyping
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


def test_a_module_is_checked_where_another_list_left_it_unchecked(tmp_path, monkeypatch):
    """Its bytecode lies beside it: with one name for both, the second list ran what the first had kept."""
    (tmp_path / "shapes_outer.py").write_text("import shapes_inner\n")
    (tmp_path / "shapes_inner.py").write_text(
        "def half(number: int) -> float:\n    return number / 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    caught = []
    for modules in (["shapes_outer"], ["shapes_outer", "shapes_inner"], ["shapes_outer"]):
        with shapes.hook(modules):
            inner = importlib.import_module("shapes_outer").shapes_inner
        try:
            caught.append(inner.half(2.0))
        except jaxtyping.TypeCheckError:
            caught.append("caught")
        for name in ("shapes_outer", "shapes_inner"):
            monkeypatch.delitem(sys.modules, name)
    assert caught == [1, "caught", 1]


def test_users_import_neither_checker():
    code = (
        "import sys, torch, lens_kernels\n"
        "x = torch.zeros(1, 1, 3, 4); lens_kernels.attention(x, x, x, backend='torch')\n"
        "sys.exit(bool({'jaxtyping', 'beartype'} & {*sys.modules}))\n"
    )
    folder = shapes.ROOT / "kernels"
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0
