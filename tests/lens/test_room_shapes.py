"""The shapes in the signatures of some rooms hold in every call, and calls with wrong ones are refused."""

import pytest

from tests import shapes
from tests.lens.room_shape_calls import RIGHT, WRONG

CHECKED = (
    *("plain transformers.masking_utils", "lens.passes.structures", "lens.passes.masks"),
    "lens.passes.calls",
    *("plain lens.passes.bridge", "plain lens.passes.computed", "plain lens.passes.history"),
    *("lens.passes.sessions", "lens.passes.logits", "lens.passes.visit", "lens.passes.residual"),
    *("lens.passes.keys", "lens.passes.pieces", "plain lens.passes.sources"),
    *("lens.passes.head_outputs", "lens.passes.blocks", "lens.edits._phi", "lens.edits.losses"),
    *("lens.edits.base", "lens.edits._gathered", "lens.edits._rows", "lens.edits._keyed"),
    *("lens.edits._parts", "lens.edits.freezing", "lens.edits.sparse"),
    *("plain lens.edits.attention", "lens.edits.subspaces", "lens.edits.parts"),
    *("plain lens.edits._var", "plain lens.edits._act", "plain lens.edits._pasta"),
    *("lens.edits.published", "plain lens.edits.running", "plain lens.traces.captures"),
    "plain lens.tasks.task",
    *("lens.edits.watching", "lens.edits.clean_runs", "lens.edits._others", "lens.edits.controls"),
    "lens.edits.effects",
)
"""From those that import none of the others to those that import many."""


@pytest.fixture(scope="module")
def outcomes():
    return shapes.outcomes("tests.lens.room_shape_calls", *CHECKED)


@pytest.mark.parametrize("name", RIGHT)
def test_shapes_are_those_of_the_signature(outcomes, name):
    assert outcomes[name] is None


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_refused(outcomes, name):
    assert "TypeCheckError" in str(outcomes[name])
