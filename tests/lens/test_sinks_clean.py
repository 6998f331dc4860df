"""Clean runs are shared, belong to one model, and change no number."""

import pytest
import torch

import lens
from lens import effect
from lens.common.errors import LensError
from lens.edits import Ablate, Drop, Mask
from lens.edits.clean_runs import CleanRuns
from tests.lens.architectures import build

IDS = torch.randint(3, 97, (2, 29), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model():
    return lens.load(build("llama"))


@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        (effect, {"edit": Drop()}),
        (effect, {"edit": Ablate("L1H2")}),
        (effect, {"edit": Mask(), "amounts": (0.5, 1.0), "controls": ("size",)}),
    ],
)
def test_shared_runs_give_the_same_table_without_running_the_prompts_again(
    model, test, arguments, monkeypatch
):
    plain = test(model, IDS, **arguments).table()
    clean = CleanRuns(model)
    effect(model, IDS, Mask(), controls=(), clean=clean)
    assert len(clean) == 2
    monkeypatch.setattr("lens.edits.clean_runs.predictions", None)  # any clean run would fail
    assert test(model, IDS, clean=clean, **arguments).table().equals(plain)


def test_runs_of_another_model_are_refused(model):
    with pytest.raises(LensError, match="clean holds runs of another model; make one CleanRuns"):
        effect(model, IDS, Mask(), clean=CleanRuns(lens.load(build("llama"))))
