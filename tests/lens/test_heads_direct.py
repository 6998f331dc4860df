"""Direct logit attribution: parts of the logit difference that add up, and what it cannot see."""

import numpy as np
import pytest
import torch
from torch import nn

import lens
from lens.common.errors import LensError
from lens.heads import importance
from lens.tasks import Task, induction
from tests.lens.architectures import build

PROJECTION = {
    "toy": "blocks.{}.attn.o",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
}
NORM = {"toy": "ln_final", "gpt2": "transformer.ln_f", "llama": "model.norm"}


def loaded(kind):
    """A model whose last norm has a scale and a shift of its own."""
    model = lens.load("induction-2l") if kind == "toy" else lens.load(build(kind))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.model.get_submodule(NORM[kind]).parameters():
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def some_task():
    return Task(
        name="random",
        clean=torch.randint(0, 64, (5, 11), generator=torch.Generator().manual_seed(0)),
        positions=torch.tensor([[2, 10], [0, 3], [5, 1], [10, 9], [7, 7]]),
        correct=torch.tensor([[4, 10], [0, 7], [9, 2], [3, 3], [60, 1]]),
        wrong=torch.tensor([[1, 2], [3, 5], [6, 8], [4, 9], [2, 5]]),
        metric="logit_difference",
    )


def by_hand(kind, model, task):
    """Frozen-norm logit difference of what each head wrote, [layers, heads, prompts]."""
    root, info = model.model, model.info
    inputs = {}
    handles = []
    for layer in range(info.layers):
        module = root.get_submodule(PROJECTION[kind].format(layer))
        handles.append(
            module.register_forward_pre_hook(lambda _, x, at=layer: inputs.update({at: x[0]}))
        )
    norm = root.get_submodule(NORM[kind])
    handles.append(norm.register_forward_pre_hook(lambda _, x: inputs.update({"norm": x[0]})))
    found = np.empty((info.layers, info.heads, task.n))
    with torch.no_grad():
        root(task.clean)
        for handle in handles:
            handle.remove()
        stream = inputs["norm"]
        is_layer_norm = isinstance(norm, nn.LayerNorm)
        centred = stream - stream.mean(-1, keepdim=True) if is_layer_norm else stream
        eps = norm.eps if is_layer_norm else norm.variance_epsilon
        size = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        unembedding = root.get_output_embeddings().weight
        for layer in range(info.layers):
            module = root.get_submodule(PROJECTION[kind].format(layer))
            bias = module(torch.zeros_like(inputs[layer]))
            for head in range(info.heads):
                z = torch.zeros_like(inputs[layer])
                part = slice(head * info.head_dim, (head + 1) * info.head_dim)
                z[..., part] = inputs[layer][..., part]
                written = module(z) - bias
                if is_layer_norm:
                    written = written - written.mean(-1, keepdim=True)
                logits = (written / size * norm.weight) @ unembedding.T
                found[layer, head] = task.measure(logits, torch.arange(task.n)).numpy()
    return found


@pytest.mark.parametrize("kind", PROJECTION)
def test_direct_effects_are_what_each_head_wrote(kind, monkeypatch):
    model, task = loaded(kind), some_task()
    monkeypatch.setattr("lens.tasks.task._LOGITS", 3 * 2048 * task.length)  # in two pieces
    scores = importance(model, task, method="direct", progress=False)
    expected = by_hand(kind, model, task)
    error = scores.per_prompt - expected
    assert np.sqrt((error**2).mean() / (expected**2).mean()) < 1e-4
    np.testing.assert_allclose(scores.clean, task.evaluate(model), rtol=1e-4, atol=1e-4)
    assert scores.label == "direct"
    assert scores.intervention.granularity.startswith("direct path from the head to the logits")


def test_it_sees_the_induction_heads_and_not_the_head_that_feeds_them():
    model = lens.load("induction-2l")
    copying = induction(model, n=16)
    wrong = (copying.correct + 1) % 64
    task = Task("copying", copying.clean, copying.positions, copying.correct,
                "logit_difference", wrong=wrong)  # fmt: skip
    scores = importance(model, task, method="direct", progress=False)
    names = [str(head) for head in scores.top(3)]
    assert set(names) == {"L1H0", "L1H2", "L1H3"}
    assert abs(scores.values[0, 1]) < 0.05 * scores.values.max()


def test_refusals():
    model = lens.load("induction-2l")
    with pytest.raises(LensError, match="needs the metric 'logit_difference', got 'loss'"):
        importance(model, induction(model, n=2), method="direct", progress=False)
    with pytest.raises(
        LensError, match="method='direct' compares with zero alone, got the baseline"
    ):
        importance(model, some_task(), method="direct", baseline="mean", progress=False)
    with pytest.raises(LensError, match="where 'llama4_text' keeps its parts"):
        importance(lens.load(build("llama4")), some_task(), method="direct", progress=False)
