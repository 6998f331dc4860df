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


def test_positions_that_come_with_the_ids_are_run_and_are_another_prompt():
    network = build("gpt2")
    model = lens.load(network)
    inputs = {"input_ids": IDS[:1], "position_ids": torch.arange(29)[None] + 5}
    clean = CleanRuns(model)
    found = effect(model, inputs, Mask(), controls=(), clean=clean)
    effect(model, IDS[0], Mask(), controls=(), clean=clean)
    assert len(clean) == 2

    def loss():
        with torch.no_grad():
            logits = network(**inputs).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, IDS[0, 1:])

    before = loss()
    with lens.edit(model, Mask()):
        change = float(loss() - before)
    assert abs(change) > 1e-5
    assert found.values["edit"]["delta_loss"][0, 0] == pytest.approx(change, abs=1e-6)
