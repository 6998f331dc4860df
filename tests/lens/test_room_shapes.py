"""The shapes in the signatures of some rooms hold in every call, and calls with wrong ones are refused."""

import pytest

from tests import shapes
from tests.lens import calls_shape_calls, edits_shape_calls, passes_shape_calls

CALLS = {"edits": edits_shape_calls, "passes": passes_shape_calls, "calls": calls_shape_calls}
CHECKED = {
    "edits": (
        *("edits._phi", "edits.losses", "edits.base", "edits.clean_runs"),
        *("edits._others", "edits.effects"),
    ),
    "passes": ("passes.logits", "passes.stream", "passes.keys", "passes.head_outputs"),
    "calls": ("passes.masks", "passes.calls"),
}
PLAIN = {
    "edits": "lens.traces.captures",
    "passes": "lens.passes.visit",
    "calls": "transformers.masking_utils",
}


def outcomes(room):
    modules = [f"lens.{name}" for name in CHECKED[room]]
    return shapes.outcomes(f"tests.lens.{room}_shape_calls", *modules, plain=PLAIN[room])


@pytest.mark.parametrize(
    ("room", "name"), [(room, name) for room in CALLS for name in CALLS[room].RIGHT]
)
def test_shapes_are_those_of_the_signature(room, name):
    assert outcomes(room)[name] is None


@pytest.mark.parametrize(
    ("room", "name"), [(room, name) for room in CALLS for name in CALLS[room].WRONG]
)
def test_wrong_shapes_are_refused(room, name):
    assert "TypeCheckError" in str(outcomes(room)[name])
