"""The first key taken out of a circuit's heads: against a model whose patterns are edited by hand."""

import numpy as np
import pytest
import torch

import lens
from lens.circuits.checks import sink_check
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from tests.lens.circuit_models import TOKENS, error, small_model, small_task

HEADS, SIZE = 3, 5


def naive(model, task, heads, edit) -> np.ndarray:
    """[prompt] the metric with the whole patterns of a GPT-2 edited in the same run."""
    handles = []
    for layer, block in enumerate(model.model.transformer.h):
        made = []

        def keep(_, __, output, made=made):
            made[:] = [
                part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in output.chunk(3, -1)
            ]

        def put(_, inputs, layer=layer, made=made):
            q, k, v = made
            hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
            weights = (q @ k.mT / SIZE**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            edited = weights.clone()
            edited[..., 0] = 0
            if edit == "redistributed":
                edited[..., 1:, :] /= edited[..., 1:, :].sum(-1, keepdim=True)
                edited[..., 0, 0] = 1  # sees nothing else
            z = weights @ v
            for head in (head.head for head in heads if head.layer == layer):
                z[:, head] = edited[:, head] @ v[:, head]
            return (z.transpose(1, 2).flatten(2),)

        handles.append(block.attn.c_attn.register_forward_hook(keep))
        handles.append(block.attn.c_proj.register_forward_pre_hook(put))
    with torch.no_grad():
        logits = model.model(task.clean).logits
    for handle in handles:
        handle.remove()
    return (task.sign * task.measure(logits, torch.arange(task.n))).numpy()


@pytest.fixture(scope="module")
def case():
    return small_model("gpt2"), small_task()


def test_edits_are_those_of_whole_patterns(case):
    model, task = case
    heads = [HeadId(0, 2), HeadId(1, 0), HeadId(1, 1)]
    found = sink_check(model, task, heads, draws=3)
    for edit in ("excluded", "redistributed"):
        assert error(found.edited[edit], naive(model, task, heads, edit)) < 1e-9
    assert error(found.edited["excluded"], found.edited["redistributed"]) > 1e-3
    assert found.drawn == 2  # one is left of layer 1, where two were chosen
    left = [[HeadId(0, one), HeadId(1, 2)] for one in (0, 1)]
    possible = [naive(model, task, one, "excluded") for one in left]
    for drawn in found.others["excluded"]:
        assert min(error(drawn, one) for one in possible) < 1e-9


def test_table_and_figure_have_both_sets_of_heads(case):
    found = sink_check(case[0], case[1], ["L0H1"], draws=2)
    table = found.table().set_index(["edit", "heads"])
    assert list(table.index) == [
        (edit, heads) for edit in ("excluded", "redistributed") for heads in ("circuit", "others")
    ]
    row = found.table().iloc[2]
    assert row["gain"] == pytest.approx((found.edited["redistributed"] - found.plain).mean())
    assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    assert [list(bar.y) for bar in found.plot().data] == [
        found.table().loc[found.table()["heads"] == heads, "gain"].tolist()
        for heads in ("circuit", "others")
    ]
    title = found.plot().layout.title.text  # type: ignore[attr-defined]
    assert f"Without the first key in 1 heads: gain {table['gain'].iloc[0]:+.3g}" in title
    assert "L0H1" not in repr(found)
    assert repr(found).startswith("SinkCheck(1 heads on 'drawn'")


def test_all_heads_of_a_layer_leave_no_others(case):
    found = sink_check(case[0], case[1], ["L1H0", "L1H1", "L1H2"])
    assert found.others["excluded"].shape == (0, case[1].n)
    assert set(found.table()["heads"]) == {"circuit"}
    assert not any("others" in said for said in found.findings())


def test_the_induction_circuit_does_not_work_through_its_sink():
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 8)
    found = sink_check(model, task, ["L0H1", "L1H0"], draws=1)
    whole = (task.evaluate(model, corrupt=True) - task.evaluate(model)).mean()
    assert abs((found.edited["redistributed"] - found.plain).mean()) < 0.1 * float(whole)


def test_refusals(case):
    with pytest.raises(LensError, match="draws must be a positive integer, got 0"):
        sink_check(case[0], case[1], ["L0H1"], draws=0)
    with pytest.raises(LensError, match="there are no heads in it"):
        sink_check(case[0], case[1], [])
