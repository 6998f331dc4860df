"""Persistent memory: a dense twin, closed forms with planted pairs, and what is refused."""

import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.passes.sessions import listening
from lens.sinks.causes.persistent import WithMemory
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

IDS = torch.randint(3, 97, (3, 41), generator=torch.Generator().manual_seed(5))
LAYERS, KV_HEADS, DIM = 3, 2, 8


def pairs(count, seed=2, value=1.0):
    random = torch.Generator().manual_seed(seed)
    shape = (KV_HEADS, count, DIM)
    return [
        (torch.randn(shape, generator=random), value * torch.randn(shape, generator=random))
        for _ in range(LAYERS)
    ]


def logits(network, ids, runner):
    with torch.no_grad(), listening(lens.load(network), runner.on_layer):
        return network(ids).logits


class Kept(WithMemory):
    """Keeps what the layers were given and what they got."""

    def on_layer(self, call):
        found = super().on_layer(call)
        self.calls = [*getattr(self, "calls", []), (call, found)]
        return found


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss", "gemma2"])
def test_every_measure_is_that_of_the_joined_softmax(architecture):
    """Windows, grouped heads, soft-caps and learned sinks included."""
    network, given = build(architecture), pairs(5)
    runner = Kept(given)
    logits(network, IDS[:1], runner)
    table = lens.sinks.persistent_memory(lens.load(network), IDS[:1], given).table()
    table = table.set_index(["layer", "head"])
    for layer, ((call, output), (keys, values)) in enumerate(zip(runner.calls, given, strict=True)):
        share = call.query.shape[1] // KV_HEADS
        key, value = (
            torch.cat(both, 1).repeat_interleave(share, 0).double()
            for both in ((keys, call.key[0]), (values, call.value[0]))
        )
        s = call.query[0].double() @ key.mT * call.scale
        if call.softcap is not None:
            s = (s / call.softcap).tanh() * call.softcap
        place = torch.arange(41)
        visible = place <= place[:, None]
        if call.mask.window is not None:
            visible &= place > place[:, None] - call.mask.window
        s[..., 5:] = s[..., 5:].masked_fill(~visible, -torch.inf)
        if call.sink_logits is not None:
            extra = call.sink_logits.detach().double()[:, None, None].expand(-1, 41, 1)
            s = torch.cat([s, extra], -1)
        p = s.softmax(-1)[..., : key.shape[1]]
        expected = p @ value
        assert rms_ratio(output[0], expected) < 1e-5
        own = p[..., 5:] @ value[:, 5:]
        mass = p[..., :5].sum(-1)
        alone = own / (1 - mass)[..., None]
        given_size = (expected - own).norm(dim=-1)
        twin = {
            "gate": 1 - mass.mean(-1),
            "contribution": (given_size / (given_size + own.norm(dim=-1))).mean(-1),
            "removal": ((alone - expected).norm(dim=-1) / expected.norm(dim=-1)).mean(-1),
            "early_mass": mass[:, :10].mean(-1),
            "late_mass": mass[:, -10:].mean(-1),
        }
        for name, numbers in twin.items():
            assert rms_ratio(table.loc[layer, name].to_numpy(), numbers) < 1e-5, name


def test_one_pair_of_zeros_is_softmax_off_by_one():
    """q · 0 = 0: gate = sigmoid(L), and the model with the memory is the one under that rule."""
    network = build("llama")
    model = lens.load(network)
    zeros = [(torch.zeros(KV_HEADS, 1, DIM), torch.zeros(KV_HEADS, 1, DIM))] * LAYERS
    with torch.no_grad(), lens.edit(model, lens.edits.LearnedSink()):
        expected = network(IDS[:1]).logits
    assert rms_ratio(logits(network, IDS[:1], WithMemory(zeros)), expected) < 1e-5
    found = lens.sinks.persistent_memory(model, IDS, zeros).table()
    first = found[found["layer"] == 0]["gate"]  # later layers read what the memory has changed
    other = lens.sinks.gates(model, IDS).table().query("mechanism == 'off_by_one'")
    assert rms_ratio(first, other[other["layer"] == 0]["gate"]) < 1e-5
    assert rms_ratio(found["contribution"] + 1, 1.0 + 0 * found["contribution"]) < 1e-7


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.999])
def test_a_planted_mass_is_the_gate(mass):
    """Equal logits of tokens and memory: row i has mass P / (P + i), which P is chosen for."""
    network = build("gpt2")
    with torch.no_grad():
        for block in network.transformer.h:
            block.attn.c_attn.weight[:, :48] = 0  # no query: all logits are 0
            block.attn.c_attn.bias[:48] = 0
    count = round(mass / (1 - mass) * 20)
    given = [(torch.zeros(6, count, 8), torch.zeros(6, count, 8)), None, None]
    found = lens.sinks.persistent_memory(lens.load(network), IDS[:1], given).table()
    expected = (torch.arange(1, 42) / (count + torch.arange(1, 42.0))).mean()
    assert found["gate"].tolist() == pytest.approx([float(expected)] * 6, rel=1e-5)
    for name in ("gate", "early_mass", "late_mass"):  # that is even attention
        assert found[f"{name}_baseline"].tolist() == pytest.approx(found[name].tolist(), rel=1e-5)
    assert set(found["layer"]) == {0}
    assert (found["late_mass"] < found["early_mass"]).all()
    assert found["removal"].iloc[0] > mass


def test_no_memory_changes_nothing_and_the_words_say_what_was_found():
    network = build("llama")
    given = pairs(3)
    with torch.no_grad():
        plain = network(IDS[:1]).logits
    none = WithMemory([None] * LAYERS)
    assert rms_ratio(logits(network, IDS[:1], none), plain) < 1e-6
    found = lens.sinks.persistent_memory(lens.load(network), IDS, given)
    assert "With 3 pairs of memory the heads keep" in found.findings()[0]
    assert found.findings()[-1] == "3 prompts, BOS absent."
    assert (found.table()["low"] <= found.table()["gate"]).all()
    assert sum(len(trace.y) for trace in found.plot().data) == LAYERS * 6


def test_refusals():
    model = lens.load(build("llama"))
    with pytest.raises(LensError, match=r"one entry for each of the 3 layers.*got 2 entries"):
        lens.sinks.persistent_memory(model, IDS, pairs(2)[:2])
    with pytest.raises(LensError, match="at least one of them"):
        lens.sinks.persistent_memory(model, IDS, [None] * 3)
    flat = [(torch.zeros(2, 0, 8), torch.zeros(2, 0, 8)), None, None]
    with pytest.raises(LensError, match=r"must be keys \[2, P, 8\] .* got \[2, 0, 8\]"):
        lens.sinks.persistent_memory(model, IDS, flat)
    other = [None, (torch.zeros(3, 1, 8), torch.zeros(2, 1, 8)), None]
    with pytest.raises(LensError, match=r"memory of layer 1 must be .* got \[3, 1, 8\]"):
        lens.sinks.persistent_memory(model, IDS, other)
    bert = lens.load(build("bert"))
    with pytest.raises(
        LensError, match="layer 0 sees later tokens; persistent_memory is for causal"
    ):
        lens.sinks.persistent_memory(bert, IDS, [(torch.zeros(6, 1, 8), torch.zeros(6, 1, 8))] * 3)
