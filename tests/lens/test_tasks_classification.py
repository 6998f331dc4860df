"""Classifiers of texts and pictures: their own task, heads and edits measured on it, other tasks refused."""

import copy
import json
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch
import transformers

import lens
from lens import edits
from lens.circuits.checks._control import magnitudes
from lens.circuits.graph.activations import Ablation
from lens.common.errors import LensError
from lens.models.vocabulary import around, windows
from lens.tasks import classification, from_jsonl, induction, ioi, language_modelling
from tests.lens.architectures import build

HEADS, DIM, LABELS = 4, 8, 3
SIZES: dict[str, Any] = {
    "hidden_size": HEADS * DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": 48, "num_labels": LABELS,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(60))]


def strong(model):
    """Random weights large enough that heads matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(6)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.BertTokenizer(vocab={word: at for at, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def bert(tokenizer):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **SIZES)
    model = strong(transformers.BertForSequenceClassification(config))
    return lens.load(model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    return lens.load(strong(transformers.ViTForImageClassification(config)))


def texts_of(lengths):
    random = torch.Generator().manual_seed(1)
    return [
        " ".join(f"w{at}" for at in torch.randint(60, (length,), generator=random).tolist())
        for length in lengths
    ]


def a_task(model, **more):
    if model.info.vocab is None:
        prompts = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    else:
        prompts = texts_of([9] * 4)
    return classification(model, prompts, [0, 2, 1, 2], **more)


@contextmanager
def zeroed(model, layer, head):
    """A head's output taken away by a hook in front of the output projection."""
    named = dict(model.model.named_modules())
    (name,) = [
        one for one in named if one.endswith((f"layer.{layer}.attention.output.dense", f"layers.{layer}.attention.o_proj"))
    ]  # fmt: skip

    def cut(_, args):
        z = args[0].clone()
        z[..., head * DIM : (head + 1) * DIM] = 0
        return (z, *args[1:])

    hook = named[name].register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def margins(model, task):
    """The right logit minus the largest other, from what the model returns."""
    logits = model.model(task.clean).logits.double()
    right = logits.gather(1, task.correct)[:, 0]
    return right - logits.scatter(1, task.correct, -torch.inf).amax(1)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_ablation_is_what_a_hook_that_zeroes_the_head_changes(kind, request):
    model = request.getfixturevalue(kind)
    task = a_task(model)
    own = margins(model, task)
    assert task.evaluate(model).double() == pytest.approx(own, abs=1e-5)
    found = lens.heads.importance(model, task, baseline="zero", progress=False)
    assert found.sign == 1
    largest = 0.0
    for layer in range(2):
        for head in range(HEADS):
            with zeroed(model, layer, head):
                change = (own - margins(model, task)).numpy()
            assert found.per_prompt[layer, head] == pytest.approx(change, abs=1e-5)
            largest = max(largest, abs(change).max())
    assert largest > 1e-2


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("baseline", ["mean", "pooled_mean", "resample"])
def test_other_baselines_run_and_gradients_do(kind, baseline, request):
    model = request.getfixturevalue(kind)
    task = a_task(model)
    found = lens.heads.importance(model, task, baseline=baseline, progress=False).per_prompt
    assert torch.tensor(found).isfinite().all()
    assert abs(found).max() > 1e-3
    first = lens.heads.importance(
        model, task, method="attribution", baseline=baseline, progress=False
    )
    assert abs(first.per_prompt).max() > 1e-3


def test_the_mean_of_pictures_is_over_pictures_at_each_place(vit):
    task = a_task(vit)
    kept = {}
    named = dict(vit.model.named_modules())
    (name,) = [
        n
        for n in named
        if n.endswith(("layer.1.attention.output.dense", "layers.1.attention.o_proj"))
    ]
    hook = named[name].register_forward_pre_hook(lambda _, args: kept.update(z=args[0]))
    own = margins(vit, task)
    hook.remove()

    def swap(_, args):
        z = args[0].clone()
        z[..., DIM : 2 * DIM] = kept["z"].mean(0, keepdim=True)[..., DIM : 2 * DIM]
        return (z,)

    hook = named[name].register_forward_pre_hook(swap)
    change = own - margins(vit, task)
    hook.remove()
    found = lens.heads.importance(vit, task, progress=False)
    assert found.per_prompt[1, 1] == pytest.approx(change.numpy(), abs=1e-5)


def test_effect_measures_the_label_beside_the_metric(bert):
    task = a_task(bert)
    found = lens.effect(bert, task, edits.Ablate("L1H2", "zero"), controls=(), progress=False)
    assert found.per == "prompt"
    own, before = margins(bert, task), bert.model(task.clean).logits.log_softmax(-1)
    with zeroed(bert, 1, 2):
        edited, after = margins(bert, task), bert.model(task.clean).logits.log_softmax(-1)
    values = found.values["edit"]
    assert values["gain"][0] == pytest.approx((edited - own).numpy(), abs=1e-5)
    delta = (before - after).gather(1, task.correct)[:, 0].detach().numpy()
    assert values["delta_loss"][0] == pytest.approx(delta, abs=1e-5)
    flips = (before.argmax(1) != after.argmax(1)).float().numpy()
    assert (values["flip_rate"][0] == flips).all()


@pytest.mark.parametrize(
    ("edit", "looked"),
    [(edits.Mask([27]), slice(None)), (edits.Knockout(range(1, 21), [27]), slice(1, 21))],
)
def test_effect_of_keys_that_stand_behind_is_the_edit_itself(bert, edit, looked):
    task = classification(bert, texts_of([30] * 4), [0, 2, 1, 2])
    found = lens.effect(bert, task, edit, draws=2, progress=False)
    own = margins(bert, task)
    with lens.edit(bert, edit):
        edited = margins(bert, task)
    assert found.values["edit"]["gain"][0] == pytest.approx((edited - own).numpy(), abs=1e-5)
    assert abs(edited - own).max() > 1e-3
    eager = type(bert.model)(copy.deepcopy(bert.model.config)).eval()
    eager.load_state_dict(bert.model.state_dict())
    eager.set_attn_implementation("eager")
    patterns = torch.stack(eager(task.clean, output_attentions=True).attentions, 1)
    alpha = patterns[..., looked, edit.keys[0]].mean(-1).mean(0)  # [layers, heads]
    moved = found.migration
    assert moved["source_before"].to_numpy() == pytest.approx(alpha.detach().flatten(), abs=1e-5)
    assert moved["source_after"].to_numpy() == pytest.approx(0, abs=1e-5)


def test_effect_refuses_what_a_classifier_does_not_give(bert):
    mask = edits.Mask("first")
    with pytest.raises(LensError, match=r"lens\.tasks\.classification"):
        lens.effect(bert, texts_of([9]), mask, progress=False)
    with pytest.raises(LensError, match="leave it out"):
        lens.effect(bert, a_task(bert), mask, scored="first", progress=False)


def test_labels_have_numbers_and_names_and_come_from_tables_and_files(bert, tmp_path):
    texts, numbers = texts_of([7, 7, 7]), [2, 0, 1]
    names = [f"LABEL_{number}" for number in numbers]
    rows = [{"text": text, "label": name} for text, name in zip(texts, names, strict=True)]
    file = tmp_path / "reviews.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    expected = classification(bert, texts, numbers)
    assert expected.clean[:, 0].tolist() == [2, 2, 2]
    assert expected.clean[:, -1].tolist() == [3, 3, 3]
    ids = [bert.encode(text) for text in texts]
    tokenized = bert.tokenizer(texts)
    for given in [
        (texts, names), (texts, torch.tensor(numbers)), (pd.DataFrame(rows),), (file,), (str(file),),
        (ids, numbers), (tokenized, numbers),
    ]:  # fmt: skip
        task = classification(bert, *given)
        assert torch.equal(task.clean, expected.clean)
        assert task.correct[:, 0].tolist() == numbers


def test_texts_have_one_length_and_keep_what_stands_round_them(bert):
    texts = texts_of([5, 9, 9, 3])
    task = classification(bert, texts, [0, 1, 2, 0])
    assert task.clean.shape == (2, 11)
    assert task.correct[:, 0].tolist() == [1, 2]
    assert task.dropped == (
        "prompt 0: 7 tokens, 11 are taken",
        "prompt 3: 5 tokens, 11 are taken",
    )
    cut = classification(bert, texts, [0, 1, 2, 0], length=7)
    assert cut.correct[:, 0].tolist() == [0, 1, 2]
    assert cut.clean.tolist() == [[*bert.encode(text)[:6], 3] for text in texts[:3]]


@pytest.mark.parametrize("metric", ["loss", "accuracy", "probability_difference"])
def test_other_metrics_are_of_the_labels(bert, metric):
    task = a_task(bert, metric=metric)
    logits = bert.model(task.clean).logits.detach()
    right = logits.softmax(-1).gather(1, task.correct)[:, 0]
    expected = {
        "loss": -right.log(),
        "accuracy": (logits.argmax(-1) == task.correct[:, 0]).float(),
        "probability_difference": 2 * right - 1,
    }
    torch.testing.assert_close(task.evaluate(bert), expected[metric])


@pytest.mark.parametrize(
    ("prompts", "labels", "said"),
    [
        (["w1 w2"], ["good"], "LABEL_0"),
        (["w1 w2"], [3], "0 to 2"),
        (["w1 w2"], [-1], "0 to 2"),
        (["w1 w2"], [True], "0 to 2"),
        (["w1 w2"], [0, 1], "each prompt needs a label"),
        ([], [], "got none"),
        ("w1 w2", [0], "a list of texts"),
        (["w1 w2"], None, "a table .* with label, and either text or path"),
        (pd.DataFrame({"text": ["w1"], "label": [None]}), None, "lacks its text or its label"),
        ([[1, 400]], [0], "go from 0 to"),
        ([" ".join(["w1"] * 90)], [0], "takes 40"),
        (torch.zeros(1, 3, 16, 16), [0], "BertForSequenceClassification cannot run these prompts"),
    ],
)
def test_what_cannot_be_classified_is_refused(bert, prompts, labels, said):
    with pytest.raises(LensError, match=said):
        classification(bert, prompts, labels)


def test_models_without_labels_are_refused(bert, vit):
    llama = lens.load(build("llama"))
    with pytest.raises(LensError, match="no classifier"):
        classification(llama, [[3, 4, 5]], [0])
    with pytest.raises(LensError, match="has 3 labels and LlamaForCausalLM chooses from none"):
        a_task(bert).evaluate(llama)
    with pytest.raises(LensError, match=r"cannot run these prompts: Input image size \(20\*20\)"):
        classification(vit, torch.zeros(2, 3, 20, 20), [0, 1])


def test_tasks_of_tokens_are_refused_by_name(bert, vit, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"clean": [7, 8], "correct": 9, "wrong": 10}')
    for model in (bert, vit):
        for make in (
            lambda model: induction(model, n=2, length=5),
            lambda model: language_modelling(model, [[7, 8, 9]]),
            lambda model: from_jsonl(model, file),
            lambda model: ioi(model, n=2),
            lambda model: lens.heads.streaming(model, [[7, 8, 9, 10]], first=1, last=1, loss=True),
        ):
            with pytest.raises(LensError, match=r"its task is lens\.tasks\.classification\("):
                make(model)
    other = induction(lens.load(build("llama")), n=2, length=4)
    with pytest.raises(LensError, match=r"its task is lens\.tasks\.classification\("):
        other.evaluate(bert)


def test_a_classifier_of_tokens_has_no_task():
    config = transformers.BertConfig(vocab_size=99, **SIZES)
    model = lens.load(transformers.BertForTokenClassification(config).eval())
    with pytest.raises(LensError, match="gives labels and predicts no token"):
        language_modelling(model, [[7, 8, 9]])


def test_windows_of_an_encoder_stand_between_its_special_tokens(tokenizer):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **SIZES)
    model = lens.load(transformers.BertForMaskedLM(config).eval(), tokenizer=tokenizer)
    assert around(model) == ([2], [3])
    (text,) = texts_of([20])
    ids = model.encode(text)
    found = windows(ids, 8, around(model))
    assert found == [[2, *ids[1 + 6 * at : 7 + 6 * at], 3] for at in range(3)]
    assert windows(ids, 2, around(model)) == []
    assert windows(ids[1:-1], 8, around(model)) == [
        ids[1:9],
        ids[9:17],
    ]  # as the text itself has none
    task = language_modelling(model, text, length=8)
    kept = task.clean.clone().scatter_(1, task.positions, task.correct)
    assert kept.tolist() == found


def test_what_writers_of_a_picture_write_is_measured_at_all_positions(vit):
    """The input's is the mean norm of plain embeddings."""
    task = a_task(vit)
    found = magnitudes(vit, task, Ablation("zero"))
    with torch.no_grad():
        read = vit.model.vit.embeddings(task.clean)
    assert found[0] == pytest.approx(float(read.norm(dim=-1).mean()), rel=1e-4)
