"""A circuit read aloud: the known circuits say what they were built to do, and a sentence about a decoy does not hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import lens
from lens.circuits.graph.graph import Graph, Kv
from lens.circuits.known import induction_transformer
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.passes.replay import proved
from lens.reading import circuits
from lens.reading._head import read_head
from lens.reading._written import written_shares
from tests.lens.layouts import layout_model
from tests.tiers import first

DECOYS = ("input->a0.h1<v>", "a0.h1->a1.h0<k>")


@pytest.fixture(scope="module")
def known():
    return induction_transformer(beta=8)


def read(known, name, *more, shifts=(0, 1, 2)):
    """On the known prompt and the same with other symbols in place of each (the last id is BOS)."""
    graph = Graph(2, 2, 2, mlps=False)
    made = lens.circuits.make_circuit(graph, [*known.edges, *more])
    one = known.tasks[name]
    bos = known.model.info.vocab - 1
    given = {
        part: torch.cat(
            [
                torch.where(ids == bos, ids, (ids + shift) % bos)
                for shift in shifts
                for ids in (getattr(one, part),)
            ]
        )
        for part in ("clean", "corrupt", "correct", "wrong")
    }
    task = replace(one, positions=one.positions.repeat(len(shifts), 1), **given)
    return lens.reading.circuit(known.model, task, made, progress=False)


def test_the_induction_transformer_says_what_it_was_built_to_do(known):
    found = read(known, "first token")
    heads = found.heads.set_index("name")
    assert heads["looks_at"].to_dict() == {
        "L0H0": "the token before",
        "L1H0": "the token after an earlier copy",
    }
    assert (heads["mass"] > 0.99).all()
    assert heads.loc["L1H0", "uniform"] == pytest.approx(1 / 8)
    assert found.table()["share"].dropna().tolist() == pytest.approx([1.0] * 6, abs=1e-5)
    said = next(one for one in found.findings() if "L1H0 looks" in one)
    assert (
        "on the key side L0H0, which looks at the token before, carries 100% [100%, 100%] of the logit"
        in said
    )
    assert "(cut off, 100% [100%, 100%] of the effect is lost)" in said
    once = read(known, "first token", shifts=(0,))
    assert not once.rows["holds"].any()  # one prompt has no interval, and shows nothing
    assert (
        "Of 7 edges 7 can be cut alone without a sure loss on this one prompt, so"
        in once.findings()[-1]
    )


def test_what_a_cut_costs_is_a_share_of_the_effect_with_its_interval():
    """Of the mean effect over prompts; prompts with a large effect count for more."""
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 4, seed=2)
    graph = lens.circuits.score_edges(model, task, progress=False).graph
    made = lens.circuits.make_circuit(graph, ["a0.h1->a1.h0<k>", "a1.h0->logits"])
    found = lens.reading.circuit(model, task, made, progress=False)
    for row in found.rows.to_dict("records"):
        assert row["of_effect_low"] <= row["of_effect"] <= row["of_effect_high"]
    row = found.rows.set_index("writer").loc["L1H0"]
    interval = f"{row['of_effect']:.0%} [{row['of_effect_low']:.0%}, {row['of_effect_high']:.0%}]"
    said = [one for one in found.findings() if one.kind == "logits"]
    assert said == [
        f"L1H0 writes the answer: cutting it off the logits takes {interval} of the effect."
    ]
    ends = ("of_effect_low", "of_effect", "of_effect_high")
    small = replace(
        found, rows=found.rows.assign(**dict(zip(ends, (0.001, 0.002, 0.003), strict=True)))
    )
    (said,) = (one for one in small.findings() if one.kind == "logits")
    assert said.endswith("takes 0.20% [0.10%, 0.30%] of the effect.")  # and not 0% [0%, 0%]


@pytest.mark.parametrize("name", first(["first token", "last token", "successor"], "successor"))
def test_exactly_the_edges_that_show_hold(known, name):
    rows = read(known, name, *DECOYS).table().set_index("edge")
    assert set(rows.index[rows["holds"]]) == set(known.visible[name])
    for decoy in DECOYS:
        assert not rows.loc[decoy, "holds"]
    assert rows.loc["a0.h1->a1.h0<k>", "share"] == pytest.approx(0, abs=1e-6)
    failed = [one for one in read(known, name, *DECOYS).findings() if one.kind == "fails"]
    assert len(failed) == 1
    assert failed[0].endswith(" (of 9 edges that do nothing 0.23 would show a loss by chance).")


def test_an_edge_into_the_keys_of_a_group_has_the_share_of_each_of_its_heads():
    """Heads 0, 1 and 2 of a group of three, each read through an edge of its own, carry what the shared edge says of each."""
    model = lens.load(layout_model("llama"))
    heads, groups = model.info.heads, model.info.kv_heads
    last, size = model.info.layers - 1, heads // groups
    prompts = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    task = lens.tasks.Task(
        "drawn", prompts, torch.full((2, 1), 8), prompts[:, :1], "loss", prompts.flip(0)
    )
    out = [f"a{last}.h{head}->logits" for head in range(size)]
    found = {}
    cases: list[tuple[Kv, list[str]]] = [
        ("group", ["kv0"]),
        ("head", [f"h{head}" for head in range(size)]),
    ]
    for kv, readers in cases:
        graph = Graph(model.info.layers, heads, groups, kv=kv)
        into = [f"input->a{last}.{reader}<{side}>" for reader in readers for side in "kv"]
        made = lens.circuits.make_circuit(graph, [*into, *out])
        found[kv] = lens.reading.circuit(model, task, made, progress=False)
    own, shared = (
        found[kv].rows.query("side != ''").set_index(["reader", "side"])["share"].sort_index()
        for kv in ("head", "group")
    )
    assert len(own) == len(shared) == 2 * size
    assert own.to_numpy() == pytest.approx(shared.to_numpy(), abs=1e-6)
    assert own.groupby("side").nunique().tolist() == [size, size]
    assert found["group"].rows.groupby("edge")["drop"].nunique().eq(1).all()
    (failed,) = [one for one in found["group"].findings() if one.kind == "fails"]
    assert f"Of {2 + size} edges" in failed


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma2"])
def test_shares_of_what_a_head_writes_are_those_of_its_own_values(kind):
    model = lens.load(layout_model(kind))
    ids = torch.randint(3, 60, (1, 11), generator=torch.Generator().manual_seed(3))
    head = read_head(proved(model), {"input_ids": ids}, HeadId(model.info.layers - 1, 2))
    rows = torch.tensor([6, 10])
    shares = written_shares(head, rows)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-6)
    assert {"embedding", "L0H0", "L0 MLP"} <= set(shares)
    # turning one writer's output up by a half, norms held, adds half of its share: here by the layer's own projection
    block = head.layout.blocks[head.id.layer]
    parts = _values_of_first_mlp(head, ids)
    weight, _ = block.weights[2]
    output = block.output[head.id.head].double()
    own = head.rows(rows) @ parts @ weight[head.group].double() @ output
    whole = head.rows(rows) @ head.call.value[0, head.group].double() @ output
    expected = ((own * whole).sum(-1) / whole.square().sum(-1)).mean()
    assert shares["L0 MLP"] == pytest.approx(float(expected), abs=1e-5)


def _values_of_first_mlp(head, ids):
    """[tokens, d_model], what MLP 0 wrote, through the norm before the head; from a hook of its own."""
    from lens.passes.visit import visiting
    from lens.reading._head import Plain

    class Keeping(Plain):
        def mlp(self, layer, output):
            if layer == 0:
                self.found = output[0].double()
            return output

    keeping = Keeping(head.layout)
    with torch.no_grad(), visiting(head.layout, 1, keeping):
        head.layout.model.model(ids)
    norm = head.layout.blocks[head.id.layer].norm
    return norm.frozen(keeping.found, head.sizes[head.id.layer, "read"])


def test_shares_are_of_all_prompts_and_of_no_logit_below_the_mean(known):
    """A prompt with a logit of almost nothing does not outweigh the others; of one below the mean there is no interval."""
    carried, above = np.array([0.5, 0.5, 0.01]), np.array([1.0, 1.0, 1e-6])
    found = circuits._shares(
        [(carried, above), (carried, above * [1, 1, -1]), (carried, -above), None], 0
    )
    assert found["share"][:2] == pytest.approx([0.505, 0.505], abs=1e-3)
    assert found["share_low"][0] < 0.505 < found["share_high"][0]
    assert np.isnan(found["share"]).tolist() == [False, False, True, True]
    assert np.isnan(found["share_low"]).tolist() == [False, True, True, True]
    reading = read(known, "first token")
    unknown = replace(reading, rows=reading.rows.assign(share=np.nan))
    assert "nan" not in " ".join(unknown.findings())


def test_refusals(known):
    graph = Graph(2, 2, 2, mlps=False)
    none = lens.circuits.make_circuit(graph, [])
    with pytest.raises(LensError, match="1 to 400 edges is read, got 0"):
        lens.reading.circuit(known.model, known.task, none)
    other = lens.circuits.make_circuit(Graph(3, 2, 2, mlps=False), ["input->a0.h0<v>"])
    with pytest.raises(LensError, match="made for"):
        lens.reading.circuit(known.model, known.task, other, progress=False)
    with pytest.raises(LensError, match="circuit"):
        lens.reading.circuit(known.model, known.task, np.ones(3))
