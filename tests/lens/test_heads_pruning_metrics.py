"""Six metrics of a pruned head: a vision transformer and a language model, against hooks on eager attention."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.heads import importance
from lens.heads.pruning import metrics
from lens.passes.head_outputs import mean_outputs, read_heads
from lens.tasks import induction
from tests.lens.naive import rms_ratio

LAYERS, HEADS, DIM, IMAGES, CLASSES = 3, 4, 7, 11, 5


def vit(kind=transformers.ViTForImageClassification):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=HEADS * DIM, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=23, image_size=6, patch_size=2, num_channels=1, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return kind(config).eval()


def images():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(IMAGES, 1, 6, 6, generator=generator)
    return {"pixel_values": pixels}, torch.randint(CLASSES, (IMAGES,), generator=generator)


def eager(baseline, head=None, z_means=None):
    """Probabilities [images, classes], [CLS] embedding and z of each layer with one head replaced."""
    model = vit()
    model.set_attn_implementation("eager")
    seen = []

    def hook(_, inputs):
        z = inputs[0].unflatten(-1, (HEADS, DIM)).clone()
        if head is not None and len(seen) == head[0]:
            z[:, :, head[1]] = 0 if baseline == "zero" else z_means[head[0]][:, :, head[1]]
        seen.append(z)
        return (z.flatten(-2),)

    projections = [
        layer.attention.o_proj if hasattr(layer.attention, "o_proj") else layer.attention.output
        for layer in model.vit.layers
    ]
    for projection in projections:
        projection.register_forward_pre_hook(hook)
    with torch.no_grad():
        states = model.vit(**images()[0]).last_hidden_state[:, 0]
        return model.classifier(states).double().softmax(-1).numpy(), states.numpy(), seen


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_every_metric_equals_its_definition_on_eager_attention(baseline):
    inputs, labels = images()
    found = metrics(lens.load(vit()), inputs, labels, baseline=baseline)
    p, e, z = eager(baseline)
    means = [layer.mean(0, keepdim=True) for layer in z]
    at = np.arange(IMAGES), labels.numpy()
    kl = lambda x, y: (x * np.log(x / y)).sum(-1)  # noqa: E731
    expected = {name: np.empty((LAYERS, HEADS, IMAGES)) for name in found.per_example}
    for layer in range(LAYERS):
        for head in range(HEADS):
            q, f, _ = eager(baseline, (layer, head), means)
            values = {
                "accuracy": (p.argmax(-1) == at[1]) * 1.0 - (q.argmax(-1) == at[1]),
                "probability": p[at] - q[at],
                "loss": np.log(p[at] / q[at]),
                "js": (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
                "cosine": 1 - (e * f).sum(-1) / np.linalg.norm(e, axis=-1) / np.linalg.norm(f, axis=-1),
                "distance": np.linalg.norm(e - f, axis=-1),
            }  # fmt: skip
            for name, value in values.items():
                expected[name][layer, head] = value
    for name, values in expected.items():
        if values.any():
            assert rms_ratio(found.per_example[name], values) < 1e-3, name
    assert found.accuracy == pytest.approx((p.argmax(-1) == at[1]).mean())
    assert 0 < found.values("js").max() < np.log(2)
    one = found.by_class("loss")[int(labels[0])]
    assert rms_ratio(one, expected["loss"][..., labels.numpy() == int(labels[0])].mean(-1)) < 1e-3
    table = found.table()
    assert len(table) == 6 * LAYERS * HEADS
    row = table[(table["name"] == "L2H1") & (table["metric"] == "js")].iloc[0]
    assert row["low"] <= row["value"] <= row["high"]
    assert found.plot("js").data[0].z.tolist() == found.values("js").tolist()
    assert repr(found).startswith(f"PruningMetrics({baseline} on 11 examples")
    pair = found.agreement().set_index(["first", "second"]).loc[("js", "distance"), "tau"]
    assert -1 <= pair <= 1


def test_in_batches_or_at_once(monkeypatch):
    inputs, labels = images()
    model = lens.load(vit())
    whole = metrics(model, inputs, labels, baseline="mean")
    monkeypatch.setattr("lens.heads.pruning.outputs._ROWS", 5)
    parts = metrics(model, inputs, labels, baseline="mean")
    for name in ("probability", "js", "distance"):
        assert rms_ratio(parts.per_example[name], whole.per_example[name]) < 1e-3


def test_a_head_that_writes_nothing_scores_exactly_zero():
    inputs, labels = images()
    model = vit()
    layer = model.vit.layers[1].attention
    projection = layer.o_proj if hasattr(layer, "o_proj") else layer.output.dense
    with torch.no_grad():
        projection.weight[:, 2 * DIM : 3 * DIM] = 0
    found = metrics(lens.load(model), inputs, labels)
    for name, values in found.per_example.items():
        assert np.abs(values[1, 2]).max() == 0, name
    assert np.abs(found.per_example["distance"][1, 1]).min() > 0


def test_a_language_model_by_its_next_tokens():
    model = lens.load("induction-2l")
    task = induction(model, n=5, length=9)
    found = metrics(model, task)
    by_loss = importance(model, task, baseline="zero", progress=False)
    assert rms_ratio(found.per_example["loss"], by_loss.per_prompt) < 1e-3
    with pytest.raises(LensError, match="several answers each, so there are no classes"):
        found.by_class("loss")
    with pytest.raises(LensError, match="a task has its own answers"):
        metrics(model, task, [1])
    with pytest.raises(
        LensError, match=r"metric must be one of 'accuracy', 'probability'.*got 'f1'"
    ):
        found.values("f1")
    with pytest.raises(LensError, match="an output for each token"):
        metrics(model, {"input_ids": task.clean}, [0] * 5)


def test_the_mean_of_texts_that_are_filled_up_is_of_their_own_tokens(monkeypatch):
    sizes = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.BertConfig(**sizes, intermediate_size=8, initializer_range=0.5)
    model = lens.load(transformers.BertForSequenceClassification(config).eval())
    own = (torch.arange(7) < torch.tensor([[7], [4], [5]])).long()
    texts = {"input_ids": torch.arange(21).reshape(3, 7), "attention_mask": own}
    outputs, means = [], []
    read_heads(model, texts, lambda _, z: outputs.append(z.double()))
    right = outputs[0] * own[:, None, :, None]
    right = right.sum(0) / own.sum(0)[:, None]

    def kept(*given, **options):
        means.append(mean_outputs(*given, **options))
        return means[0]

    monkeypatch.setattr("lens.heads.pruning.outputs.mean_outputs", kept)
    metrics(model, texts, [0, 1, 0], baseline="mean")
    np.testing.assert_allclose(means[0][0][0], right, atol=1e-6)
    assert float((right - outputs[0].mean(0)).abs().max()) > 0.1


def test_what_does_not_fit_is_refused():
    inputs, labels = images()
    model = lens.load(vit())
    with pytest.raises(LensError, match="baseline must be one of 'zero', 'mean', got 'resample'"):
        metrics(model, inputs, labels, baseline="resample")
    with pytest.raises(LensError, match=r"one class for each example; got \[3\] for 11"):
        metrics(model, inputs, labels[:3])
    for wrong in ([9] * IMAGES, [-1] * IMAGES, [0.5] * IMAGES, ["a"] * IMAGES):
        with pytest.raises(LensError, match=r"labels must be (whole numbers of 0 to 4|one number)"):
            metrics(model, inputs, wrong)
    with pytest.raises(LensError, match="no examples were given"):
        metrics(model, {"pixel_values": inputs["pixel_values"][:0]}, [])
    bare = lens.load(vit(transformers.ViTModel))
    with pytest.raises(LensError, match="has no classifier or unembedding"):
        metrics(bare, inputs, labels)
