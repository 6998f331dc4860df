"""`lens.capture(new=)`: what happened while a model wrote is what its own eager attention gives over the whole."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.passes.interface import switched
from tests.lens import naive
from tests.lens.architectures import build
from tests.lens.test_computed import CONFIGS

LENGTH, NEW = 21, 9


@pytest.fixture(scope="module", params=["gpt2", "mistral", "gemma3"])
def model(request):
    """Learned positions; a window whose cache drops keys; windows in some layers only."""
    found = lens.load(build(request.param))
    found.model.generation_config.eos_token_id = None
    return found


def _ids() -> list[int]:
    return torch.randint(3, 60, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def _greedy(model, count: int) -> list[int]:
    """Without a cache: the whole once more for each token."""
    ids = _ids()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_the_trace_is_that_of_a_full_pass_over_all_that_was_read(model):
    trace = lens.capture(model, _ids(), new=NEW, block_size=8, keep_qk=True)
    ids = trace.dataset["token_id"].values.tolist()
    assert ids == _greedy(model, NEW)
    assert trace.attrs["prompt_tokens"] == LENGTH
    with torch.no_grad(), switched(model.model, "eager"):
        eager = model.model(torch.tensor([ids]), output_attentions=True).attentions
    for layer in trace.layers:
        whole = eager[layer][0].double().numpy()
        np.testing.assert_allclose(trace.received.sel(layer=layer), whole.sum(1), atol=1e-5)
        looked = whole[:, :, :LENGTH].sum(-1) * (np.arange(len(ids)) >= LENGTH)
        mass = trace.match_mass.sel(layer=layer, match="prompt")
        np.testing.assert_allclose(mass, looked, atol=1e-5)
        tile = trace.tile(layer, 1, (0, len(ids)), (0, len(ids)))
        np.testing.assert_allclose(tile, whole[1], atol=1e-5)
    full = lens.capture(model, ids, block_size=8, keep_qk=True)
    for name in full.dataset.data_vars:
        found = trace.dataset[name]
        found = found.isel(match=slice(4)) if "match" in found.dims else found
        assert naive.rms_ratio(found.values, full.dataset[name].values) < 3e-6, name


def test_it_ends_where_the_model_ends_and_draws_by_its_seed():
    model = lens.load(build("llama"))
    written = _greedy(model, 4)[LENGTH:]
    model.model.generation_config.eos_token_id = written[-1]
    trace = lens.capture(model, _ids(), new=NEW, block_size=8)
    end = written.index(written[-1]) + 1
    assert trace.dataset["token_id"].values.tolist()[LENGTH:] == written[:end]
    assert trace.block_mass.shape[-1] == -(-(LENGTH + end) // 8)
    model.model.generation_config.eos_token_id = None
    drawn = [
        lens.capture(model, _ids(), new=NEW, temperature=9.0, seed=seed, statistics=["lse"])
        for seed in (1, 1, 2)
    ]
    texts = [one.dataset["token_id"].values.tolist() for one in drawn]
    assert texts[0] == texts[1] != texts[2]


def test_several_prompts_are_written_on_and_profiled():
    model = lens.load(build("llama"))
    traces = lens.capture(model, [_ids(), _ids()[:9]], new=3, block_size=8)
    assert [one.attrs["prompt_tokens"] for one in traces] == [LENGTH, 9]
    assert lens.profile(traces)["prompt"].between(0, 1).all()
    assert "prompt_tokens" not in lens.capture(model, _ids(), block_size=8).attrs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new": 0}, "new must be"),
        ({"new": 4, "chunk": 64}, "leave chunk out"),
        ({"new": 4, "labels": {"mine": ([1] * LENGTH, [1] * LENGTH)}}, "leave labels out"),
        ({"new": 4, "temperature": -1.0}, "temperature must be 0"),
        ({"temperature": 3.0}, "temperature is of what the model writes: give new too"),
        ({"new": 4, "temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"new": 99999}, "takes .*give a shorter prompt, or new="),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    model = lens.load(build("llama"))
    with pytest.raises(LensError, match=message):
        lens.capture(model, _ids(), **options)


def test_a_model_that_does_not_write_is_refused():
    with pytest.raises(LensError, match="leave new out"):
        lens.capture(lens.load(build("bert")), _ids(), new=3)


@pytest.mark.parametrize("kind", ["bloom", "gpt_neo"])
def test_masks_of_a_models_own_say_what_every_token_that_was_written_sees(kind, tmp_path):
    """They said it of the prompt's tokens alone, and such a trace could not be read back; and a window of one layer hid
    where the first token is."""
    torch.manual_seed(0)
    model = lens.load(transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]).eval())
    found = lens.capture(model, _ids(), new=NEW, block_size=8)
    whole = lens.capture(
        model, [int(one) for one in found.dataset["token_id"].values], block_size=8
    )
    assert found.attrs["seen"] == whole.attrs["seen"]
    for name in ("first_mass", "rest_mass", "prefix_mass", "received", "block_mass"):
        error = np.abs(found.dataset[name].values - whole.dataset[name].values).max()
        assert error < 1e-4, name  # NaN fails
    found.save(tmp_path / "written")
    assert type(found).load(tmp_path / "written").attrs["seen"] == found.attrs["seen"]
