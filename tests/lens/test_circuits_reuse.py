"""Redirected heads: against the whole pattern written out, and where the answer is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

import lens
from lens.circuits.known import induction_transformer
from lens.circuits.reuse import redirect
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.results import of_kind
from tests.lens.circuit_models import TOKENS, error, small_model, small_task

HEADS = (HeadId(0, 1), HeadId(1, 0), HeadId(1, 2))


def marked(task):
    """Keys and queries that differ from prompt to prompt; two keys fall together in prompt 1."""
    n = torch.arange(task.n)
    return replace(
        task, marks={"one": n % 3, "two": torch.where(n == 1, 1, 3), "at": 4 + n % (TOKENS - 4)}
    )


def naive(model, task, heads, amount, split, *, query=None):
    """Metric [prompts] with the whole pattern of each chosen head, its rows edited one by one."""
    query = task.marks["at"] if query is None else query

    def twin(module, q, k, v, mask, **kwargs):
        share = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(share, 1) for part in (k, v))
        hidden = torch.ones(TOKENS, TOKENS).triu(1).bool()
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        for layer, head in heads:
            for prompt in range(task.n) if layer == module.layer_idx else ():
                row = pattern[prompt, head, int(query[prompt])]
                keys = sorted({int(task.marks[name][prompt]) for name in ("one", "two")})
                wanted = torch.zeros_like(row)
                wanted[keys] = row[keys] / row[keys].sum() if split == "own" else 1 / len(keys)
                row[:] = (1 - amount) * row + amount * wanted
        return (pattern @ v).transpose(1, 2), None

    AttentionInterface.register("redirect-twin", twin)
    inner = model.model
    before = inner.config._attn_implementation
    inner.config._attn_implementation = "redirect-twin"
    with torch.no_grad():
        logits = inner(task.clean).logits
    inner.config._attn_implementation = before
    return task.measure(logits, torch.arange(task.n)).double().numpy()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("amount", "split"), [(1.0, "equal"), (0.7, "equal"), (0.7, "own")])
def test_rows_are_those_of_the_whole_pattern(kind, amount, split):
    model, task = small_model(kind), marked(small_task())
    found = redirect(
        model, task, HEADS, ["one", "two"], at="at", amount=amount, split=split, controls=2,
        match="all", progress=False,
    )  # fmt: skip
    runs = [(), found.heads, *found.controls]
    for number, heads in enumerate(runs):
        expected = naive(model, task, heads, amount, split)
        assert error(found.metric[number], expected) < 1e-9, number
    assert error(found.metric[1], found.metric[0]) > 1e-3
    for control in found.controls:
        assert len(control) == len(HEADS)
        assert not set(control) & set(HEADS)


def test_mass_is_that_of_the_model_as_it_is():
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 3, length=7)
    keys = [torch.tensor([2, 5, 1]), torch.tensor([4, 0, 3])]
    found = redirect(model, task, ["L0H1", "L0H2", "L1H0"], keys, controls=1, match="all",
                     progress=False)  # fmt: skip
    for prompt in range(task.n):
        ids = task.clean[prompt].tolist()
        trace: Any = lens.capture(model, ids, statistics=["block_mass"], block_size=1)
        maps = trace.dataset["block_mass"].to_numpy()[:, :, int(task.positions[prompt].max())]
        for number, head in enumerate(found.heads):
            expected = sum(maps[head][int(key[prompt])] for key in keys)
            assert found.mass[number, prompt] == pytest.approx(expected, 1e-4)
    plain = task.evaluate(model).double().numpy()
    np.testing.assert_allclose(found.metric[0], plain, rtol=1e-5)


@pytest.mark.parametrize("amount", [1.0, 0.25])
def test_induction_head_repairs_a_prompt_that_asks_for_another_token(amount):
    known = induction_transformer(beta=30)
    clean = known.tasks["last token"]
    broken = replace(
        clean, clean=clean.corrupt_or_refuse(), corrupt=None
    )  # says 4, and 1 is wanted
    right = torch.tensor([2])  # where 1 stands
    found = redirect(
        known.model, broken, ["L1H0"], [right], amount=amount, controls=3, progress=False
    )
    # logits are the values of L1H0: 1 - amount on 4, amount on 1
    np.testing.assert_allclose(found.metric[:, 0], [-1, 2 * amount - 1, -1, -1, -1], atol=1e-5)
    assert found.accuracy[:, 0].tolist() == [0, amount == 1, 0, 0, 0]
    assert set(found.controls) == {(HeadId(1, 1),)}
    both = redirect(
        known.model, broken, ["L1H0"], [right, torch.tensor([5])], controls=1, progress=False
    )  # an equal share for 1 and 4
    assert both.metric[1, 0] == pytest.approx(0, abs=1e-6)


def broken_induction(model):
    """Copied symbols in which the earlier copy of the last one is another, so nothing finds it."""
    task = lens.tasks.induction(model, 12, length=11)
    last = task.positions.max(1).values
    asked = task.clean[torch.arange(task.n), last]
    twice = (task.clean == asked[:, None]).sum(1) == 2
    earlier = (task.clean == asked[:, None]).int().argmax(1)
    ids = task.clean.clone()
    for row, place in zip(ids, earlier.tolist(), strict=True):
        row[place] = min(set(range(model.info.vocab)) - set(row.tolist()))
    return replace(
        task,
        clean=ids,
        corrupt=None,
        positions=last[:, None],
        correct=task.correct[:, -1:],
        marks={"answer": earlier + 1},
    ).take(twice.nonzero()[:, 0])


def test_trained_induction_heads_repair_broken_prompts_and_other_heads_do_not():
    model = lens.load("induction-2l")
    task = broken_induction(model)
    found = redirect(
        model, task, ["L1H0", "L1H2", "L1H3"], ["answer"], match="all", controls=6, progress=False
    )
    assert found.n > 5
    assert found.accuracy[0].mean() < 0.1
    assert found.accuracy[1].mean() > 0.9
    assert found.accuracy[2:].mean() < 0.1
    assert found.p_value() == 1 / 7
    assert "the heads repair the task" in of_kind(found.findings(), "effect")[0]
    assert found.p_value("metric") == 1 / 7  # a loss: less is better
    assert replace(found, sign=1).p_value("metric") == 1
    assert (
        f"The loss goes from {found.metric[0].mean():.3g}" in of_kind(found.findings(), "metric")[0]
    )
    rows = found.table().set_index("run")
    assert rows.loc["redirected - as it is", "accuracy_low"] > 0.5
    gap = rows.loc["redirected - other heads", "loss"]
    assert gap == pytest.approx((found.metric[1] - found.metric[2:].mean(0)).mean())
    undone = replace(found, accuracy=found.accuracy[[1, 0, *[1] * 6]])
    assert "the heads harm the task" in of_kind(undone.findings(), "effect")[0]


def test_plot_and_repr():
    model, task = small_model("gpt2"), marked(small_task())
    found = redirect(model, task, ["L0H1"], ["one"], controls=4, progress=False)
    drawn: Any = found.plot().data
    bars, others = drawn
    means = found.accuracy.mean(1)
    assert list(bars.y) == means[:2].tolist()
    assert list(others.y) == means[2:].tolist()
    assert others.text[0] == str(found.controls[0][0])
    assert "Redirection(1 heads onto one on 'drawn'" in repr(found)
    again = redirect(model, task, ["L0H1"], ["one"], controls=4, progress=False)
    assert again.controls == found.controls


def test_refusals():
    model, task = small_model("gpt2"), marked(small_task())

    def run(heads=("L0H1",), onto=("one",), **options):
        redirect(model, task, list(heads), list(onto), progress=False, **options)

    with pytest.raises(LensError, match=r"above 0 to 1; got 1\.5"):
        run(amount=1.5)
    with pytest.raises(LensError, match="split must be one of 'equal', 'own', got 'half'"):
        run(split="half")
    with pytest.raises(LensError, match="match must be one of 'layers', 'all', got 'none'"):
        run(match="none")
    with pytest.raises(LensError, match="controls must be a positive integer, got 0"):
        run(controls=0)
    with pytest.raises(LensError, match="there is no L2H0"):
        run(["L2H0"])
    with pytest.raises(LensError, match="onto must be a list of marks or positions"):
        run(onto=())
    with pytest.raises(LensError, match="has no mark 'three'; it has one, two, at"):
        run(onto=("three",))
    with pytest.raises(LensError, match=r"one of 0 to 6 for each of 5 prompts.* 7 to 7"):
        run(onto=(torch.full((5,), 7),))
    with pytest.raises(LensError, match="comes after its query"):
        run(onto=("two",), at="one")
    with pytest.raises(LensError, match="2 heads were chosen and 1 others are left in layer 0"):
        run(["L0H1", "L0H2"])
    with pytest.raises(LensError, match="5 heads were chosen and 1 others are left to compare"):
        run(["L0H0", "L0H1", "L0H2", "L1H0", "L1H1"], match="all")


def test_a_window_that_hides_a_key_is_refused():
    import transformers

    config = transformers.MistralConfig(
        vocab_size=23, hidden_size=12, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=1, head_dim=4, sliding_window=3,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = lens.load(transformers.MistralForCausalLM(config).eval())
    task = small_task()
    near, far = (torch.full((task.n,), TOKENS - 1 - distance) for distance in (2, 3))
    redirect(model, task, ["L0H1"], [near], controls=1, progress=False)
    for keys in ([far], [near, far]):
        with pytest.raises(LensError, match="layer 0 does not see all of the keys"):
            redirect(model, task, ["L0H1"], keys, controls=1, progress=False)
