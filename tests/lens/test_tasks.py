"""Tasks: what is asked where, that the metric says it, and each refusal."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.circuits.graph.activations import Ablation, read_activations
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.references import References
from lens.common.errors import LensError
from lens.heads import importance
from lens.tasks import Task, from_jsonl, induction, language_modelling
from lens.tasks.metrics import AnswerSets
from tests.lens.architectures import build

N, LENGTH, ANSWERS, VOCAB = 3, 7, 2, 11


@pytest.fixture(scope="module")
def toy():
    return lens.load("induction-2l")


@pytest.fixture(scope="module")
def reader():
    return lens.load("text-lm-3l")


def make(**changes):
    fields = {
        "name": "made",
        "clean": torch.arange(N * LENGTH).reshape(N, LENGTH),
        "positions": torch.tensor([[2, 6], [0, 3], [5, 1]]),
        "correct": torch.tensor([[4, 10], [0, 7], [9, 2]]),
        "metric": "loss",
    }
    return Task(**fields | changes)


def test_some_of_the_prompts_are_measured_as_in_the_whole():
    marks = {"s2": torch.tensor([1, 2, 3])}
    wrong = torch.tensor([[1, 2], [3, 5], [6, 8]])
    task = make(
        metric="logit_difference", wrong=wrong, corrupt=torch.zeros(N, LENGTH).long(), marks=marks
    )
    logits = torch.randn(N, LENGTH, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([2, 0, 2, 1])
    some = task.take(rows)
    whole = task.measure(logits, torch.arange(N))
    assert some.measure(logits[rows], torch.arange(4)).tolist() == whole[rows].tolist()
    assert some.clean.tolist() == task.clean[rows].tolist()
    assert (some.corrupt_or_refuse().shape, some.marks["s2"].tolist()) == (
        (4, LENGTH),
        [3, 1, 3, 2],
    )
    right, bad = torch.tensor([[[4], [5]], [[0], [1]], [[2], [3]]]), torch.tensor([[[9], [8]]] * N)
    sets = make(metric="probability_difference", sets=AnswerSets(right, bad))
    whole = sets.measure(logits, torch.arange(N))
    assert sets.take(rows).measure(logits[rows], torch.arange(4)).tolist() == whole[rows].tolist()


def test_metrics_equal_their_definition_answer_by_answer():
    logits = torch.randn(N, LENGTH, VOCAB, generator=torch.Generator().manual_seed(0))
    wrong = torch.tensor([[1, 2], [3, 5], [6, 8]])
    tasks = {name: make(metric=name) for name in ("loss", "accuracy")}
    tasks["logit_difference"] = make(metric="logit_difference", wrong=wrong)
    right = tasks["loss"].correct
    logits[0, 2, 4] = 9  # one answer of prompt 0 is right
    expected = {"loss": [], "accuracy": [], "logit_difference": []}
    for row in range(N):
        sums = dict.fromkeys(expected, 0.0)
        for answer in range(ANSWERS):
            read = logits[row, tasks["loss"].positions[row, answer]]
            token = right[row, answer]
            sums["loss"] += float(read.exp().sum().log() - read[token])
            sums["accuracy"] += float(read.argmax() == token)
            sums["logit_difference"] += float(read[token] - read[wrong[row, answer]])
        for name in sums:
            expected[name].append(sums[name] / ANSWERS)
    order = torch.tensor([2, 0, 1])
    for name, task in tasks.items():
        assert task.measure(logits[order], order).tolist() == pytest.approx(
            [expected[name][row] for row in order], rel=1e-5
        )
    assert expected["accuracy"][0] >= 0.5
    assert [task.sign for task in tasks.values()] == [-1, 1, 1]


def test_induction_asks_for_the_second_copy(toy):
    task = induction(toy, n=5, seed=3, length=7)
    assert (task.n, task.length) == (5, 15)
    assert (task.clean[:, 0] == toy.bos_id).all()
    assert torch.equal(task.clean[:, 1:8], task.clean[:, 8:])
    assert task.positions[0].tolist() == [8, 9, 10, 11, 12, 13]
    assert torch.equal(task.correct, task.clean[:, 9:])
    assert task.corrupt is not None
    assert torch.equal(task.corrupt[:, 8:], task.clean[:, 8:])
    assert (task.corrupt[:, 1:8] != task.clean[:, 1:8]).float().mean() > 0.9
    assert len({tuple(row) for row in task.clean.tolist()}) == 5
    assert torch.equal(task.clean, induction(toy, n=5, seed=3, length=7).clean)
    assert not torch.equal(task.clean, induction(toy, n=5, seed=4, length=7).clean)


def test_the_known_losses_of_induction_2l(toy):
    """README of the model: loss 0.142 and accuracy 0.995 on the second copy, ln 64 without one."""
    task = induction(toy, n=64)
    assert float(task.evaluate(toy).mean()) == pytest.approx(0.142, abs=0.02)
    assert float(task.with_metric("accuracy").evaluate(toy).mean()) == pytest.approx(
        0.995, abs=5e-3
    )
    assert float(task.evaluate(toy, corrupt=True).mean()) == pytest.approx(4.16, abs=0.1)


def test_evaluation_in_pieces_is_the_same(toy, monkeypatch):
    task = induction(toy, n=7, length=5)
    whole = task.evaluate(toy)
    monkeypatch.setattr("lens.tasks.task._LOGITS", 3 * 2048 * task.length)
    assert task.rows_at_once(toy) == 3
    torch.testing.assert_close(task.evaluate(toy), whole, rtol=1e-5, atol=1e-6)


def test_language_modelling_is_the_loss_of_each_window(reader):
    text = lens.tasks.text("lily")
    task = language_modelling(reader, text, length=31, n=3)
    ids = reader.encode(text)
    assert task.clean[1].tolist() == [ids[0], *ids[31:61]]
    expected = [lens.tasks.loss(reader, row) for row in task.clean.tolist()]
    assert task.evaluate(reader).tolist() == pytest.approx(expected, rel=1e-5)
    windows = language_modelling(reader, task.clean.tolist())
    assert torch.equal(windows.clean, task.clean)
    assert language_modelling(reader, text).length == reader.info.context
    assert repr(task) == (
        "Task(language modelling: 3 prompts of 31 tokens, without corrupt ones; loss, less is better)"
    )


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def row(clean="s1 s2 s3", corrupt="s4 s2 s3", correct="s5", wrong="s6"):
    found = {"clean": clean, "corrupt": corrupt, "correct": correct, "wrong": wrong}
    return {name: value for name, value in found.items() if value is not None}


def test_a_file_of_prompts_becomes_a_task_and_says_what_it_left_out(toy, tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        row(),
        row(corrupt="s1 s2"),
        "",
        row(correct="s5 s7", wrong="s5 s8"),  # read behind the token that both begin with
        row(correct="s5 s7"),  # by its first token
        row(correct="s5 s7", wrong="s5"),
        row("s1 s2 s3 s4", "s0 s2 s3 s4"),
        row([64, 9, 8, 7], [64, 3, 8, 7], correct=11),
        row() | {"position": 1},
        row() | {"position": -5},
    )
    task = from_jsonl(toy, path)
    assert (task.name, task.n, task.length, task.metric) == ("mine", 6, 5, "logit_difference")
    assert task.lengths is not None
    assert task.lengths.tolist() == [4, 5, 4, 5, 4, 4]
    assert task.clean.tolist() == [
        [64, 1, 2, 3, 3],
        [64, 1, 2, 3, 5],
        [64, 1, 2, 3, 3],
        [64, 1, 2, 3, 4],
        [64, 9, 8, 7, 7],
        [64, 1, 2, 3, 3],
    ]
    assert task.corrupt is not None
    assert task.corrupt[:, 1].tolist() == [4, 4, 4, 0, 3, 4]
    assert task.positions[:, 0].tolist() == [3, 4, 3, 4, 3, 1]
    assert task.correct[:, 0].tolist() == [5, 7, 5, 5, 11, 5]
    assert task.wrong is not None
    assert task.wrong[:, 0].tolist() == [6, 8, 6, 6, 6, 6]
    assert task.dropped == (
        "line 2: clean has 4 tokens, corrupt 3",
        "line 6: one answer begins the other, so that no token tells them apart",
        "line 10: position -5 is outside of its 4 tokens",
    )
    assert "6 prompts of 4 to 5 tokens" in repr(task)
    assert "3 dropped" in repr(task)
    for prompt, (ids, at) in enumerate(zip(task.clean, task.positions[:, 0], strict=True)):
        alone = toy.model(ids[None, : at + 1]).logits[0, -1]
        expected = alone[task.correct[prompt, 0]] - alone[task.wrong[prompt, 0]]
        torch.testing.assert_close(task.evaluate(toy)[prompt], expected.detach())


def test_what_fills_up_a_prompt_enters_no_number(toy, tmp_path):
    """Means run over the prompts' own tokens; what needs equal positions refuses."""
    rows = [
        row("s1 s5 s3 s8 s1", "s1 s7 s3 s8 s1"),
        row("s2 s5 s8 s2", "s2 s9 s8 s2"),
        row("s4 s5 s1 s4", "s7 s5 s1 s4"),
    ]
    whole = from_jsonl(toy, write(tmp_path / "mine.jsonl", *rows))
    for method, baseline in (
        ("ablation", "mean"),
        ("ablation", "pooled_mean"),
        ("ablation", "counterfactual"),
        ("attribution", "mean"),
        ("gradient", "zero"),
        ("ablation", "optimal"),
    ):
        more, task = {}, whole
        if baseline == "optimal":
            more, task = {"steps": 1}, whole.with_metric("loss")
        expected = importance(toy, task, method=method, baseline=baseline, **more)
        other = task.clean.clone()
        other[1:, -1] = 41
        corrupt = task.corrupt.clone()
        corrupt[1:, -1] = 42
        found = importance(
            toy,
            replace(task, clean=other, corrupt=corrupt),
            method=method,
            baseline=baseline,
            **more,
        )
        np.testing.assert_allclose(found.per_prompt, expected.per_prompt, atol=1e-5)
        assert np.abs(expected.per_prompt).max() > 0.01
    task = whole
    by_loss = importance(toy, task.with_metric("loss"), baseline="mean").per_prompt
    found = lens.heads.pruning.metrics(toy, task, baseline="mean").per_example["loss"]
    np.testing.assert_allclose(found, by_loss, atol=1e-5)
    alone = from_jsonl(toy, write(tmp_path / "short.jsonl", *rows[1:]))
    pair = replace(task.take(torch.tensor([1, 2])), clean=task.clean[1:], corrupt=task.corrupt[1:])
    np.testing.assert_allclose(
        importance(toy, pair, baseline="mean").per_prompt,
        importance(toy, alone, baseline="mean").per_prompt,
        atol=1e-5,
    )
    refused = "compares prompts by their positions, and those of 'mine' have 5 to 6 tokens"
    for call in (
        lambda: importance(toy, task, baseline="resample"),
        lambda: lens.heads.sublayers.block_influence(toy, task),
        lambda: lens.heads.sublayers.importance(toy, task),
        lambda: lens.effect(toy, task, lens.edits.Mask("first")),
    ):
        with pytest.raises(LensError, match=refused):
            call()


def test_prompts_of_several_lengths_are_refused_by_a_model_that_would_read_what_fills_them_up():
    sizes = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = lens.load(
        transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=8)).eval()
    )
    task = make(
        positions=torch.zeros(N, 1, dtype=torch.long), correct=torch.ones(N, 1, dtype=torch.long)
    )
    assert task.evaluate(bert).shape == (N,)
    with pytest.raises(
        LensError, match="lets prompts see what fills them up, and those of 'made' have 4 to 7"
    ):
        importance(bert, replace(task, lengths=torch.tensor([4, 7, 5])))


def test_the_reference_of_circuits_is_the_mean_over_own_tokens(toy, tmp_path):
    rows = [row("s1 s2 s3 s4", "s0 s2 s3 s4"), row(), row("s7 s2 s3", "s4 s2 s3")]
    task = from_jsonl(toy, write(tmp_path / "mine.jsonl", *rows))
    nodes = find_nodes(toy)
    found = References(nodes, task, Ablation("mean")).of(torch.arange(3))
    outputs = [
        read_activations(nodes, ids[None])[1] for ids in (task.clean[0], *task.clean[1:, :4])
    ]
    for part in range(len(found.heads)):
        at = torch.stack([one.heads[part][0, :, :4] for one in outputs])
        torch.testing.assert_close(found.heads[part][0, :, :4], at.mean(0))
        torch.testing.assert_close(found.heads[part][0, :, 4], outputs[0].heads[part][0, :, 4])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((row(), row(corrupt=None)), "line 2 has no 'corrupt' and others do"),
        (("{",), "line 1 is no JSON"),
        ((row(wrong=None),), "line 1 must be an object with clean, correct, wrong"),
        (([1],), "line 1 must be an object"),
        ((row() | {"extra": 1},), "unknown fields extra"),
        (
            (row(correct="s1 s2", wrong="s1"),),
            "no prompt that can be used; line 1: one answer begins",
        ),
        ((row(correct=1.5),), "line 1 needs a text or a token id as correct"),
        ((row(clean=[]),), "line 1 needs a text or token ids as clean"),
        ((row(), row(clean=" ")), "bad.jsonl: line 2: the text is empty"),
        ((row() | {"position": "end"},), "line 1 has the position 'end', which is no number"),
    ],
)
def test_a_file_that_is_no_task_is_refused(toy, tmp_path, rows, message):
    with pytest.raises(LensError, match=message):
        from_jsonl(toy, write(tmp_path / "bad.jsonl", *rows))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": torch.zeros(3)}, r"clean must be token ids \[prompts, tokens\]"),
        ({"corrupt": torch.zeros(N, LENGTH + 1)}, "corrupt must have the shape of clean"),
        ({"correct": torch.zeros(N, 1)}, "correct must have the shape of positions"),
        (
            {"positions": torch.zeros(2, 2).long(), "correct": torch.zeros(2, 2).long()},
            r"positions must be \[prompts, answers\] for 3 prompts",
        ),
        (
            {"positions": torch.zeros(N, 0), "correct": torch.zeros(N, 0)},
            "positions has no answers",
        ),
        ({"positions": torch.full((N, 2), LENGTH)}, "positions must be 0 to 6; got 7 to 7"),
        ({"metric": "bleu"}, "unknown metric 'bleu'; known: loss, accuracy, logit_difference"),
        ({"metric": "logit_difference"}, "got 'logit_difference' without them"),
        ({"wrong": torch.zeros(N, 2)}, "got 'loss' with them"),
        ({"clean": torch.zeros(N, LENGTH)}, "clean must be whole numbers, got torch.float32"),
        ({"positions": torch.full((N, 2), 1.5)}, "positions must be whole numbers"),
        ({"correct": torch.zeros(N, 2) > 0}, "correct must be whole numbers, got torch.bool"),
        ({"corrupt": [[1]]}, "corrupt must be a Tensor"),
    ],
)
def test_tasks_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(LensError, match=message):
        make(**changes)


def test_numbers_of_any_width_are_the_same_and_prompts_that_there_are_not_are_refused(toy):
    """torch reads uint8 as a mask; a prompt too many was an IndexError."""
    task = induction(toy, n=3)
    small = replace(task, positions=task.positions.to(torch.uint8), correct=task.correct.int())
    assert torch.equal(small.evaluate(toy), task.evaluate(toy))
    assert torch.equal(task.take([2, 0]).clean, task.clean[[2, 0]])
    for rows in ([3], [-1], [0.5], [True], "ab", [[0]], 1):
        with pytest.raises(LensError, match="rows must be"):
            task.take(rows)


def test_other_refusals(toy, reader):
    with pytest.raises(LensError, match="n must be a positive integer, got 0"):
        induction(toy, n=0)
    with pytest.raises(LensError, match="n must be at most 1,000,000"):
        induction(toy, n=10**18)
    assert induction(toy, n=2, seed=2**62).n == 2
    with pytest.raises(LensError, match="length must be at least 2"):
        induction(toy, n=1, length=1)
    with pytest.raises(LensError, match="no texts were given"):
        language_modelling(reader, [])
    with pytest.raises(LensError, match="windows must have one length"):
        language_modelling(reader, [[1, 2, 3], [1, 2]])
    with pytest.raises(LensError, match="less than one window of 50"):
        language_modelling(reader, "short", length=50)
    with pytest.raises(LensError, match="length must be at least 3"):
        language_modelling(reader, "short", length=2)
    with pytest.raises(LensError, match="2 were asked for"):
        language_modelling(reader, [[1, 2, 3]], n=2)
    with pytest.raises(LensError, match="has no corrupt prompts, so there is no counterfactual"):
        language_modelling(reader, [[1, 2, 3]]).evaluate(reader, corrupt=True)
    with pytest.raises(LensError, match="token ids of induction-2l go from 0 to 64"):
        language_modelling(toy, [[1, 2, 99]]).evaluate(toy)


def test_a_model_of_images_is_refused(toy):
    with pytest.raises(
        LensError, match="ViTModel reads no tokens, and the task 'induction' is made"
    ):
        induction(toy, n=1).evaluate(lens.load(build("vit")))


def test_a_model_without_logits_is_refused(toy, monkeypatch):
    monkeypatch.setattr(type(toy.model), "forward", lambda *_: object())
    with pytest.raises(LensError, match="AttentionOnlyModel returns no logits"):
        induction(toy, n=1).evaluate(toy)
