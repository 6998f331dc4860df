"""Heads of a circuit joined with their attention: against an N×N twin, and on known circuits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens.circuits import head_parts
from lens.circuits.graph.head_sets import heads_of
from lens.circuits.known import induction_transformer
from lens.circuits.patches.head_patching import PARTS, split_effects
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.traces.trace import AttentionTrace
from tests.lens.circuit_models import TOKENS, error, small_model, small_task

HEADS, SIZE = 3, 5


def naive(model, task, head: HeadId) -> np.ndarray:
    """[parts, prompts] with plain hooks and the whole pattern of a GPT-2."""
    block = model.model.transformer.h[head.layer].attn

    def qkv(ids):
        found = []
        hook = block.c_attn.register_forward_hook(lambda _, __, out: found.append(out))
        with torch.no_grad():
            model.model(ids)
        hook.remove()
        parts = found[0].split(HEADS * SIZE, -1)
        return [part[..., head.head * SIZE : (head.head + 1) * SIZE] for part in parts]

    def pattern(q, k, sink=True):
        hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
        if not sink:
            hidden[1:, 0] = True  # the first row sees nothing else, and keeps it
        return (q @ k.mT / SIZE**0.5).masked_fill(hidden, -torch.inf).softmax(-1)

    def metric(z=None):
        def put(_, inputs):
            edited = inputs[0].clone()
            edited[..., head.head * SIZE : (head.head + 1) * SIZE] = z
            return (edited,)

        hook = block.c_proj.register_forward_pre_hook(put) if z is not None else None
        with torch.no_grad():
            logits = model.model(task.clean).logits
        if hook:
            hook.remove()
        return task.sign * task.measure(logits, torch.arange(task.n)).numpy()

    (q, k, v), (q2, k2, v2) = qkv(task.clean), qkv(task.corrupt)
    base = metric()
    full = base - metric(pattern(q2, k2) @ v2)
    by_pattern = base - metric(pattern(q2, k2) @ v)
    by_value = base - metric(pattern(q, k) @ v2)
    without = metric(pattern(q, k, False) @ v) - metric(pattern(q2, k2, False) @ v2)
    return np.stack([full, by_pattern, by_value, full - by_pattern - by_value, without])


@pytest.mark.parametrize("head", [HeadId(0, 2), HeadId(1, 0)])
def test_split_is_that_of_the_whole_pattern(head):
    model, task = small_model("gpt2"), small_task()
    found = split_effects(model, task, (HeadId(1, 1), head))[1]
    twin = naive(model, task, head)
    for part in range(len(PARTS)):
        assert error(torch.tensor(found[part]), torch.tensor(twin[part])) < 1e-9, PARTS[part]


@pytest.mark.parametrize("metric", ["logit_difference", "loss"])
def test_full_effect_is_the_ablation_to_the_corrupt_prompt(metric):
    model, task = small_model("llama"), small_task().with_metric(metric)
    heads = (HeadId(0, 1), HeadId(1, 5), HeadId(2, 3))
    found = split_effects(model, task, heads)
    scores = lens.heads.importance(
        model, task, method="ablation", baseline="counterfactual", progress=False
    )
    for number, head in enumerate(heads):
        assert error(torch.tensor(found[number, 0]), torch.tensor(scores.per_prompt[head])) < 1e-9
    assert error(torch.tensor(found[:, 1:4].sum(1)), torch.tensor(found[:, 0])) < 1e-12


@pytest.fixture(scope="module")
def joined():
    model = lens.load("induction-2l")
    return head_parts(model, lens.tasks.induction(model, 5, length=11), ["L1H0", "L0H1"], keys=2)


def test_previous_token_head_acts_through_values_and_induction_head_through_its_pattern(joined):
    table = joined.table().set_index("name")
    assert list(table.index) == ["L0H1", "L1H0"]
    previous, induction = table.loc["L0H1"], table.loc["L1H0"]
    assert previous["previous_token"] > 0.9
    assert previous["full_low"] > 0
    assert abs(previous["pattern"]) < 0.01 * previous["value"]
    assert induction["induction"] > 0.5
    assert induction["full_low"] > 0
    assert induction["pattern"] > 2 * induction["value"]
    assert (table["full_low"] <= table["full"]).all()
    assert (table["full"] <= table["full_high"]).all()
    by_head = dict(zip(table.index, joined.findings(), strict=True))
    assert "more through its values than its pattern" in by_head["L0H1"]
    assert "more through its pattern than its values" in by_head["L1H0"]
    assert {said.kind for said in joined.findings()} == {"effect"}
    largest = table["full"].abs().idxmax()
    assert joined.findings(most=1) == (by_head[largest],)


def test_attended_keys_are_those_of_the_captured_row(joined):
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 5, length=11)
    rows = joined.attended
    assert len(rows) == 2 * 5 * 2  # heads, prompts, keys
    for prompt in (0, 3):
        at = int(task.positions[prompt].max())
        ids = task.clean[prompt].tolist()
        trace = lens.capture(model, ids, statistics=["block_mass"], block_size=1)
        assert isinstance(trace, AttentionTrace)
        maps = trace.dataset["block_mass"].to_numpy()
        for head in joined.heads:
            row = maps[head.layer, head.head, at]
            place = joined.heads.index(head)
            assert joined.first_key[place, prompt] == pytest.approx(row[0], rel=1e-4)
            mine = rows[(rows["name"] == str(head)) & (rows["prompt"] == prompt)]
            best = np.sort(row)[::-1][:2]
            np.testing.assert_allclose(mine["mass"], best, rtol=1e-4)
            np.testing.assert_allclose(row[mine["position"]], mine["mass"], rtol=1e-4)
            token = model.token_strings([int(task.clean[prompt, mine["position"].iloc[0]])])[0]
            assert mine["token"].iloc[0] == token


def test_plot_shows_every_part(joined):
    figure = joined.plot()
    assert [trace.name for trace in figure.data] == [
        "pattern",
        "value",
        "interaction",
        "full effect",
    ]
    assert list(figure.data[1].y) == joined.table()["value"].tolist()
    assert "L0H1" in repr(joined)


def test_heads_of_a_circuit():
    known = induction_transformer()
    assert heads_of(known) == (HeadId(0, 0), HeadId(1, 0))
    found = head_parts(known.model, known.task, known)
    assert found.heads == known.heads
    assert "one prompt, no interval" in " ".join(found.findings())
    scores = lens.circuits.score_edges(known.model, known.task, method="exact")
    assert set(heads_of(scores.top(7))) <= set(known.heads)


def test_a_circuit_that_was_found_is_taken_as_one():
    """It is what `find` returns, and ended in raw errors."""
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 4, length=9)
    found: Any = lens.circuits.find(model, task, method="eap", progress=False)
    circuit = found.circuit
    assert heads_of(found) == heads_of(circuit)
    quiet = {"progress": False}
    assert head_parts(model, task, found, **quiet).heads == heads_of(circuit)
    assert lens.circuits.checks.sink_check(model, task, found, draws=1, **quiet).heads == heads_of(
        circuit
    )
    place = [torch.full((task.n,), 1)]
    asked = {"controls": 1, "match": "all", **quiet}
    few = lens.circuits.reuse.redirect(
        model, task, replace(found, circuit=found.scores.top(4)), place, **asked
    )
    assert few.heads == heads_of(found.scores.top(4))
    shared = lens.circuits.reuse.overlap(found, found, draws=4)
    assert (shared.values["edges"], shared.values["rank correlation"]) == pytest.approx((1, 1))
    assert (lens.circuits.checks.consensus([found, circuit]).core.kept == circuit.kept).all()


def test_refusals():
    model, task = small_model("gpt2"), small_task()
    with pytest.raises(LensError, match="there are no heads in it"):
        head_parts(model, task, [])
    with pytest.raises(LensError, match="must be a list such as"):
        head_parts(model, task, "L0H0")
    with pytest.raises(LensError, match="there is no L0H3"):
        head_parts(model, task, ["L0H3"])
    with pytest.raises(LensError, match="keys must be a positive integer, got 0"):
        head_parts(model, task, ["L0H1"], keys=0)
    with pytest.raises(LensError, match="has no corrupt prompts"):
        head_parts(model, replace(task, corrupt=None), ["L0H1"])
