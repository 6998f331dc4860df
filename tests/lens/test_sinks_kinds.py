"""`lens.sinks.kinds`: measures equal to whole probabilities, and planted sinks found, tested and moved."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lens
from lens.common.errors import LensError
from lens.common.results import ends, of_kind
from lens.figures.sink_mechanism import sink_origin, sink_tests
from lens.sinks.causes import kind_results, kind_tests, moves
from lens.stats.verdicts import of_many
from tests.lens.architectures import build
from tests.lens.naive import probabilities_and_values, rms_ratio

LENGTH, DIM = 41, 8
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def planted():
    """One layer. L0H0: sink on the first token with a value of 0; L0H1: with one of the prompt; L0H2: with a
    constant one; L0H3: none."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=50,
        rope_parameters={"rope_type": "default", "rope_theta": 1e8}, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlamaForCausalLM(config).eval()
    layer = network.model.layers[0].self_attn
    with torch.no_grad():
        rows = torch.randn(50, 32) / 2
        rows[:, 0], rows[:, 1] = 1, 0
        rows[:4, 1] = 4  # tokens 0 to 3 are sinks
        drawn = torch.randn(4, 8)
        rows[:4, 2:10], rows[:4, 10:18] = 0, 3 * drawn / drawn.norm(dim=-1, keepdim=True)
        rows[:4, 26:] = 0.5  # so that all have one norm
        rows[:4, 18:26] = 2
        network.model.embed_tokens.weight.copy_(rows)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj):
            part.weight.zero_()
        for head, first in enumerate((2, 10, 18, 2)):
            if head < 3:
                layer.q_proj.weight[DIM * head + 3, 0] = 1.5
                layer.k_proj.weight[DIM * head + 3, 1] = 1.5
            layer.v_proj.weight[DIM * head : DIM * head + DIM, first : first + DIM] = torch.eye(DIM)
        layer.o_proj.weight.copy_(torch.randn(32, 32) / 5)
        network.lm_head.weight.copy_(torch.randn(50, 32) / 5)
    return lens.load(network)


@pytest.fixture(scope="module")
def found(planted):
    ids = torch.randint(4, 50, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = torch.arange(4)
    return lens.sinks.kinds(planted, ids, targets=[7], progress=False)


def test_measures_equal_those_of_whole_probabilities():
    network = build("llama")
    source, rows = [0, 5], slice(6, None)
    expected = {name: np.zeros((2, 18)) for name in ("mass", "share", "uniform_share", "rank")}
    written = []
    for number, ids in enumerate(IDS):
        p, values = probabilities_and_values(network, ids[None])
        even = torch.ones(LENGTH, LENGTH).tril().double()
        even = even / even.sum(-1, keepdim=True)
        for place in range(18):
            layer, head = divmod(place, 6)
            weight = network.model.layers[layer].self_attn.o_proj.weight.detach().double()
            out = values[layer, head // 3].double() @ weight[:, 8 * head : 8 * head + 8].T
            written.append(out[source])
            rest = [j for j in range(LENGTH) if j not in source]
            for name, full in (("share", p[layer, head].double()), ("uniform_share", even)):
                sizes = [(full[rows][:, of] @ out[of]).norm(dim=-1).mean() for of in (source, rest)]
                expected[name][number, place] = sizes[0] / sum(sizes)
            full = p[layer, head].double()[rows]
            expected["mass"][number, place] = full[:, source].sum(-1).mean()
            whole = full @ out
            expected["rank"][number, place] = (
                whole.square().sum() / torch.linalg.matrix_norm(whole, 2) ** 2
            )
    table = lens.sinks.kinds(lens.load(network), IDS, sources=source, progress=False).table()
    for name, values in expected.items():
        assert rms_ratio(table[name], values.mean(0)) < 1e-4, name
    both = torch.stack(written).reshape(2, 18, 2, -1)
    spread = both.var(0).sum((1, 2)) / both.square().sum(-1).mean(0).sum(-1)
    assert rms_ratio(table["variation"], spread) < 1e-4


def test_planted_kinds_are_found(found):
    assert found.table()["kind"].tolist() == ["nop", "input broadcast", "fixed broadcast", "none"]
    assert found.counts == dict.fromkeys(found.rows["kind"], 1)
    assert (found.table()["uniform_mass"] < 0.1).all()
    assert {one.kind for one in found.findings()} == {"kinds", "test", "origin", "move", "limit"}


def test_kinds_are_said_with_thresholds_baseline_and_how_many_are_sure(found):
    (said,) = of_kind(found.findings(), "kinds")
    even = found.rows["uniform_mass"].mean()
    assert f"a sink takes more than 30%, even attention gives the sources {even:.1%}" in said
    assert found.rows["sure"].tolist() == [True] * 4
    assert said.endswith("; 4 are of their kind at all ends of the intervals of mass and share.")
    row: dict = found.rows.to_dict("records")[0]  # a nop
    assert not kind_results.is_sure(row | {"share_high": 0.2})
    assert not kind_results.is_sure(row | {"mass_low": 0.2})
    assert not kind_results.is_sure(row | {"mass_low": np.nan, "mass_high": np.nan})


def test_each_kind_is_told_by_its_test(found):
    change = found.tests.set_index(["kind", "test"])["delta_loss"].abs()
    assert change["nop", "zero"] < 1e-5 < change["nop", "mask"]
    for test in ("mean", "other"):
        assert change["fixed broadcast", test] < 0.05 * change["fixed broadcast", "zero"]
        assert change["nop", test] < 1e-5
    assert change["input broadcast", "other"] > 1e-3
    own = found.tests.set_index(["kind", "test"])
    assert own.loc[("nop", "mask"), "mass"] == pytest.approx(found.rows["mass"][0], abs=0.03)
    assert np.isfinite(own.loc[("nop", "mask"), "control"])
    drawn = sink_tests(found.tests).data
    colors = {one.name: one.marker.color for one in drawn if "random" not in one.name}
    assert set(colors) == {"zero", "mask", "mean", "other"}
    assert len(set(colors.values())) == 4
    assert len({one.line.color for one in sink_origin(found.origin).data}) == 4


def test_the_sink_moves_with_the_state_and_not_with_another(found):
    rows = found.moves.set_index("way")
    assert rows.loc["state", "layer"] == -1
    assert rows.loc["state", "target_after"] > 0.7 > 0.2 > rows.loc["state", "source_after"]
    assert rows.loc["other state", "source_after"] > 0.8
    assert rows.loc["other state", "target_after"] < 0.05 > rows.loc["alone", "target_after"]
    assert (rows["source_before"] > 0.8).all()


def test_moves_without_another_position_or_a_head_behind_are_left_out(planted, monkeypatch):
    """18 tokens have two positions that 16 queries see; the one layer is not behind the massive activations that it makes."""
    ids = torch.randint(4, 50, (2, 18), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = torch.arange(2)
    large = SimpleNamespace(dimensions=(0,), layer=0)
    monkeypatch.setattr(moves, "massive", lambda *_, **__: large)
    result = lens.sinks.kinds(planted, ids, progress=False)
    assert result.moves["way"].tolist() == ["state", "alone"]
    assert "nan" not in " ".join(of_kind(result.findings(), "move"))


def test_origin_is_what_hooks_and_autograd_say(planted, found):
    ids = torch.randint(4, 50, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    states = planted.model.model.embed_tokens(ids).detach().requires_grad_()
    logits = planted.model(inputs_embeds=states).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    sizes = states.grad[0].norm(dim=-1)
    origin = lens.sinks.kinds(planted, ids, progress=False).origin.iloc[0]
    assert origin["gradient"] == pytest.approx(
        float(sizes[0] / sizes[1:-1].quantile(0.5)), rel=1e-4
    )
    norms = states[0].detach().norm(dim=-1)
    assert origin["norm"] == pytest.approx(float(norms[0] / norms[1:-1].quantile(0.5)), rel=1e-4)
    assert found.origin["norm"][0] > 1.5


def test_a_super_neuron_is_found_and_shares_are_those_of_its_weights():
    network = build("llama")
    with torch.no_grad():
        network.model.layers[1].mlp.down_proj.weight[:, 9] = 0
        network.model.layers[1].mlp.down_proj.weight[4, 9] = 30.0
    result = lens.sinks.kinds(lens.load(network), IDS, sources=[0, 5], progress=False)
    origin, read = result.origin, {}
    for number, layer in enumerate(network.model.layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, x, number=number: read.update({number: x[0]})
        )
    with torch.no_grad():
        network(IDS)
    for number, layer in enumerate(network.model.layers):
        sizes = read[number].abs() * layer.mlp.down_proj.weight.norm(dim=0)
        share = (sizes / sizes.sum(-1, keepdim=True)).detach()  # [prompts, tokens, neurons]
        own = share[:, [0, 5]].mean((0, 1))
        others = [place for place in range(LENGTH) if place not in (0, 5)]
        row = origin.iloc[number]
        assert row["neuron_share"] == pytest.approx(float(own.max()), rel=1e-5)
        assert row["neuron"] == int(own.argmax())
        assert row["neuron_share_low"] < row["neuron_share"] < row["neuron_share_high"]
        assert row["neuron_share_others"] == pytest.approx(
            float(np.median(share.amax(-1)[:, others], axis=1).mean()), rel=1e-5
        )
    assert origin["neuron"][1] == 9
    assert origin["channels"][1] == pytest.approx(1)
    assert origin["channels"][0] > 5
    row = origin.iloc[1]
    held = [row["neuron_share_low"], row["neuron_share_high"]]
    held = of_many(row["neuron_share"], *held, 3, len(result.tokens), least=0, most=1)
    assert f"makes {row['neuron_share']:.0%}{ends(*held, '.0%')} of what" in " ".join(
        of_kind(result.findings(), "origin")
    )


def test_one_prompt_has_numbers_without_intervals(planted):
    ids = torch.randint(4, 50, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 2
    said = lens.sinks.kinds(planted, ids, progress=False).findings()
    assert {"test", "origin", "move"} <= {one.kind for one in said}
    assert "nan" not in " ".join(said)


def test_tests_of_sinks_stand_alone_where_no_random_keys_could_be_edited(planted, monkeypatch):
    """A control whose every draw leaves a prompt as it is, is missing; it ended in a raw error."""

    def without_control(*given, **asked):
        done = lens.effect(*given, **asked)
        return replace(done, values={"edit": done.values["edit"]})

    monkeypatch.setattr(kind_tests, "effect", without_control)
    ids = torch.randint(4, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = torch.arange(2)
    result = lens.sinks.kinds(planted, ids, progress=False)
    rows = result.tests[result.tests["test"].isin(["zero", "mask"])]
    assert len(rows) > 0
    assert rows["delta_loss"].notna().all()
    assert rows[["control", "excess", "control_mass"]].isna().to_numpy().all()
    assert "random keys" not in " ".join(of_kind(result.findings(), "test"))


def test_learned_sinks_are_a_kind():
    network = build("gpt_oss")
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.sinks.fill_(6.0)
    result = lens.sinks.kinds(lens.load(network), IDS, progress=False)
    assert set(result.counts) == {"learned"}
    assert (result.rows["learned"] > 0.8).all()
    (row,) = result.tests.to_dict("records")
    assert (row["kind"], row["test"], row["heads"]) == ("learned", "without", 18)
    losses = []
    for value in (6.0, -1e9):
        with torch.no_grad():
            for layer in network.model.layers:
                layer.self_attn.sinks.fill_(value)
            logits = network(IDS).logits[:, :-1]
        losses.append(
            float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))
        )
    assert row["delta_loss"] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    assert row["mass"] == pytest.approx(result.rows["learned"].mean())
    assert result.moves.empty


def with_sinks(silent):
    """Heads that a learned sink keeps small, on texts that the model goes on with; `silent`: they write nothing."""
    network = build("gpt_oss")
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.sinks.fill_(6.0)
            for part in (layer.self_attn.o_proj.weight, layer.self_attn.o_proj.bias):
                part.mul_(0 if silent else 8)
        ids = (IDS[:, :3].repeat(2, 1) + torch.arange(4)[:, None]) % 90 + 3
        for _ in range(20):
            ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], 1)
    return lens.load(network), ids


@pytest.mark.parametrize(("silent", "match"), [(False, ", more)"), (True, ", not told apart)")])
def test_taking_learned_sinks_away_stands_beside_random_keys(silent, match):
    model, ids = with_sinks(silent)
    result = lens.sinks.kinds(model, ids, progress=False)
    (said,) = of_kind(result.findings(), "test")
    assert match in said
    (row,) = result.tests.to_dict("records")
    # the sink takes more than all other keys have, so that every one but the first is hidden
    others = lens.edits.Mask(list(range(1, ids.shape[1])))
    done = lens.effect(model, ids, others, controls=(), progress=False)
    hidden = done.values["edit"]["delta_loss"][-1].mean()
    assert row["control"] == pytest.approx(hidden, abs=1e-5)
    assert row["control_mass"] < 0.2 < row["mass"]
    assert row["excess"] == pytest.approx(row["delta_loss"] - row["control"], abs=1e-6)


@pytest.mark.parametrize(
    ("match", "asked"),
    [
        (r"got positions \[\]", {"sources": [50]}),
        (r"got positions \[40\]", {"sources": [40]}),
        ("same in every layer", {"sources": lambda at: at.positions == 0}),
        ("targets must be no sources", {"targets": [0 + 30]}),
        ("draws must be", {"draws": 0}),
    ],
)
def test_refusals(planted, match, asked):
    with pytest.raises(LensError, match=match):
        lens.sinks.kinds(planted, IDS.clamp(max=49), progress=False, **asked)
