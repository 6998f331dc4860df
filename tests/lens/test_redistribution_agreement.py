"""Precision and recall of sink dimensions against received attention."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.sinks.activations.dims_agreement import DimsAgreement
from tests.lens.hybrids import hybrid
from tests.lens.vision_models import CAUSAL, HEADS, LAYERS, SYSTEM, build, planted


def test_rates_of_a_small_case_by_hand():
    marked = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    received = np.array([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0]], bool)
    found = DimsAgreement(marked, received, (0, 2), 20.0, 0.3, "small")
    table = found.table()
    assert table["layer"].tolist() == [0, 2]
    assert table["precision"][0] == pytest.approx(1 / 3)
    assert np.isnan(table["precision"][1])
    assert table["recall"].tolist() == [0.5, 0]
    assert table["base_rate"].tolist() == [0.4, 0.4]
    assert "33.3% are among the 40.0%" in found.findings()[0]
    assert "a blind choice gives 40.0%; 25.0% of those are marked" in found.findings()[0]
    drawn = {line.name: list(line.y) for line in found.plot().data}
    assert drawn["recall"] == [0.5, 0]
    assert drawn["base rate"] == [0.4, 0.4]
    assert np.isnan(drawn["precision"][1])
    nothing = DimsAgreement(marked & False, received, (0, 2), 20.0, 0.3, "small")
    assert nothing.findings() == ("No token of small reaches phi = 20 in any layer.",)


@pytest.mark.parametrize("name", CAUSAL)
def test_marks_and_received_attention_are_those_of_the_model(name):
    network, inputs, _ = build(name)
    model = lens.load(network)
    places = [SYSTEM + 2, SYSTEM + 3]
    with planted(network, 7, places):
        found = lens.sinks.dims_agreement(model, inputs, dims=[7], tau=4.0, top=0.2)
        network.set_attn_implementation("eager")
        with torch.no_grad():
            maps = network(**inputs, output_attentions=True).attentions
    tokens = inputs["input_ids"].shape[1]
    counted = tokens - 15  # keys that at least 16 queries see
    assert found.marked.shape == (LAYERS, counted)
    assert found.marked[0].nonzero()[0].tolist() == [p for p in places if p < counted]
    alpha = torch.stack(maps)[:, 0].sum(-2) / (tokens - torch.arange(tokens))
    assert alpha.shape[1] == HEADS
    mean = alpha.mean(1)[:, :counted]
    most = mean.topk(round(0.2 * counted)).indices
    for layer in range(LAYERS):
        assert sorted(found.received[layer].nonzero()[0]) == sorted(most[layer].tolist())


def test_marks_of_a_model_with_other_mixers_are_of_the_layers_that_attend():
    model = lens.load(hybrid("lfm2"))
    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
    sizes = [states[layer][0, :9].float() for layer in (1, 3)]  # keys that 16 queries see
    sizes = [one[:, 5].abs() / one.square().mean(-1).sqrt() for one in sizes]
    tau = float(torch.cat(sizes).quantile(0.45))
    found = lens.sinks.dims_agreement(model, ids, dims=[5], tau=tau, top=0.2, progress=False)
    assert found.table()["layer"].tolist() == [1, 3]
    assert np.array_equal(found.marked, np.stack([(one >= tau).numpy() for one in sizes]))


def test_what_cannot_be_compared_is_refused():
    network, inputs, _ = build("llava")
    model = lens.load(network)
    for match, given, options in (
        ("top is a share between 0 and 1, got 1", inputs, {"top": 1}),
        ("dims must be some of 0 to 47 of", inputs, {"dims": [48]}),
        ("reads one prompt, got 2; pass them one by one", [inputs, inputs], {}),
    ):
        with pytest.raises(LensError, match=match):
            lens.sinks.dims_agreement(model, given, **options)
