"""Layers are called by the model's own number: hybrids, shared blocks and layers that attend twice."""

import numpy as np
import pytest
import torch

import lens
from lens import LensError, edits
from lens.passes.sublayers import named_sublayers
from lens.traces import AttentionTrace
from tests.lens import hybrids
from tests.tiers import first

IDS = list(range(3, 30))
NEXT = torch.tensor(IDS[1:])[:, None]


ALWAYS = ("qwen3_next", "lfm2", "jamba", "bamba", "diffllama", "falcon_h1", "zamba")
"""Of each kind of layers beside softmax heads or between them, with shared blocks, and heads that attend twice."""


@pytest.fixture(scope="module", params=first(hybrids.MODELS, *ALWAYS))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def both(kind):
    """The kind, its model, and one of the same weights with `eager` attention."""
    return kind, lens.load(hybrids.hybrid(kind)), hybrids.hybrid(kind, eager=True)


def _eager_attentions(model, ids) -> list[torch.Tensor]:
    """Of the layers with softmax attention, in order; MiniMax returns others among them."""
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    return [one[0] for one in found if one is not None and one.shape[-1] == len(ids)]


def test_layers_of_a_trace_are_the_models_own_and_hold_what_eager_gives(both):
    kind, model, eager = both
    _, attending = hybrids.MODELS[kind]
    trace = lens.capture(model, IDS, block_size=1, progress=False)
    assert model.info.attending == trace.layers == attending
    assert trace.without_attention == tuple(sorted(set(range(4)) - set(attending)))
    own = _eager_attentions(eager, IDS)
    assert len(own) == len(attending)
    for layer, expected in zip(attending, own, strict=True):
        found = trace.block_mass.sel(layer=layer).values
        assert np.abs(found - expected.numpy()).max() < 1e-5


def test_a_stored_trace_reopens_with_its_numbers(both, tmp_path):
    _, model, _ = both
    trace = lens.capture(model, IDS, out=tmp_path / "trace", progress=False)
    again = AttentionTrace.load(tmp_path / "trace")
    assert (again.layers, again.without_attention) == (trace.layers, trace.without_attention)
    copy = again.save(tmp_path / "copy")
    assert AttentionTrace.load(copy).layers == model.info.attending
    table = lens.profile(again)
    assert set(table["layer"]) == set(model.info.attending)
    assert len(table) == len(model.info.attending) * model.info.heads


def test_what_is_not_there_is_refused_by_name(both):
    _, model, _ = both
    if not model.info.without_attention:
        return
    layer = model.info.without_attention[0]
    trace = lens.capture(model, IDS, progress=False)
    words = f"layer {layer} of {model.info.class_name} has no softmax attention"
    for refused in (
        edits.Ablate([f"L{layer}H0"]),
        edits.Mask("first", heads=[f"L{layer}H0"]),
        edits.Mask("first", layers=[layer]),
    ):
        with pytest.raises(LensError, match=words), lens.edit(model, refused):
            pass
    with pytest.raises(LensError, match=f"there is no L{layer}H1 in this trace.*no softmax"):
        trace.select(f"L{layer}H1")
    assert "no softmax attention" in repr(trace)
    assert "softmax attention in layers 1 and 3" in repr(model)


def _logits_without_head(model, kind, layer, head) -> torch.Tensor:
    """With our own hook: the head's share of what enters the output projection is 0."""
    block = dict(model.named_modules())[_blocks_of(model)][layer]
    names = ("o_proj", "out_proj", "dense")
    outs = [
        part
        for name, part in block.named_modules()
        if name.split(".")[-1] in names and "attn" in name
    ] or [part for name, part in block.named_modules() if name.split(".")[-1] in names]
    width = outs[0].in_features // 4

    def hook(_, args):
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z,)

    handle = outs[0].register_forward_pre_hook(hook)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    handle.remove()
    return logits


def _blocks_of(model) -> str:
    return next(
        name
        for name, part in model.named_modules()
        if isinstance(part, torch.nn.ModuleList) and len(part) == 4 and "layers" in name
    )


def test_a_head_is_taken_out_by_its_number(both):
    kind, model, eager = both
    layer = model.info.attending[-1]
    with torch.no_grad(), lens.edit(model, edits.Ablate([f"L{layer}H2"])):
        found = model.logits(IDS)
    whole = model.logits(IDS)
    assert (found - whole).abs().max() > 1e-4
    if kind == "diffllama":
        return  # heads are subtracted from each other: see the test of the two parts
    expected = _logits_without_head(eager, kind, layer, 2)  # a gate multiplies the 0
    assert (found - expected).abs().max() < 2e-4 * whole.abs().max()


def test_both_parts_of_a_head_that_attends_twice_are_taken_out():
    model = lens.load(hybrids.hybrid("diffllama"))
    assert model.info.twice == (0, 1, 2, 3)
    with lens.traces.capturing(model) as recorder, torch.no_grad():
        model.model(torch.tensor([IDS]))
    assert [(one.layer, one.part) for one in recorder.layers(0)] == [
        (layer, part) for layer in range(4) for part in range(2)
    ]
    with torch.no_grad(), lens.edit(model, edits.Ablate([f"L3H{h}" for h in range(4)])):
        found = model.logits(IDS)
    handle = model.model.model.layers[3].self_attn.register_forward_hook(
        lambda _, __, output: (torch.zeros_like(output[0]), *output[1:])
    )
    expected = model.logits(IDS)
    handle.remove()
    assert (found - expected).abs().max() < 1e-5
    hook = model.model.model.layers[3].self_attn.register_forward_hook(
        lambda _, __, output: (torch.zeros_like(output[0]), *output[1:])
    )
    gone = float(-model.logits(IDS).log_softmax(-1)[:-1].gather(1, NEXT).mean())
    hook.remove()
    whole = float(-model.logits(IDS).log_softmax(-1)[:-1].gather(1, NEXT).mean())
    effect = lens.effect(model, [IDS], edits.Ablate([f"L3H{h}" for h in range(4)]), progress=False)
    measured = effect.table().set_index("condition").loc["edit", "delta_loss"]
    assert measured == pytest.approx(gone - whole, abs=1e-5)
    task = lens.tasks.induction(model, n=2)
    with pytest.raises(LensError, match="gives its output in two parts"):
        lens.heads.importance(model, task, progress=False)


def test_importance_and_its_figure_have_the_models_numbers(both):
    _, model, _ = both
    if model.info.twice:
        return
    task = lens.tasks.induction(model, n=3, length=8)
    whole = task.evaluate(model)
    for method in ("ablation", "attribution", "gradient"):
        scores = lens.heads.importance(model, task, method=method, progress=False)
        table = scores.table()
        assert set(table["layer"]) == set(model.info.attending)
        assert len(table) == len(model.info.attending) * 4
        assert table["value"].notna().all()
    scores = lens.heads.importance(model, task, method="ablation", baseline="zero", progress=False)
    head = scores.top(1)[0]
    with lens.edit(model, edits.Ablate([head])):
        edited = task.evaluate(model)
    assert np.allclose(scores.per_prompt[head], (edited - whole).numpy() * -task.sign, atol=1e-4)
    figure = scores.plot()
    shown = np.array(figure.data[0].z, float)
    missing = [layer for layer in range(len(shown)) if np.isnan(shown[layer]).all()]
    assert (len(shown), missing) == (4, list(model.info.without_attention))
    assert f"most at {head}" in figure.layout.title.text
    curve = lens.heads.pruning.curve(model, task, order=scores, steps=2, draws=1, progress=False)
    assert {head.layer for head in curve.order} == set(model.info.attending)


def test_retrieval_refuses_a_hybrid_with_the_reason():
    """Circuits of hybrids are found: test_circuits_mixers.py."""
    model = lens.load(hybrids.hybrid("qwen3_next"))
    words = "softmax attention in every layer; layers 0 and 2 of Qwen3NextForCausalLM have none"
    with pytest.raises(LensError, match=words):
        lens.heads.retrieval(model, lens.tasks.needles.copied(model))


@pytest.mark.parametrize("kind", ["qwen3_next", "nemotron_h", "zamba"])
def test_effects_and_controls_are_of_the_layers_that_have_heads(kind):
    model = lens.load(hybrids.hybrid(kind))
    prompts = [IDS, IDS[5:] + IDS[:5]]
    found = lens.effect(model, prompts, edits.Mask("first", layers=[3]), progress=False)
    assert set(found.migration["layer"]) == {1, 3}
    one = lens.effect(model, prompts, edits.Ablate(["L3H0"]), controls=("size", "layer"))
    with lens.edit(model, edits.Ablate(["L3H0"])), torch.no_grad():
        edited = [model.logits(ids).log_softmax(-1) for ids in prompts]
    whole = [model.logits(ids).log_softmax(-1) for ids in prompts]
    ids = [torch.tensor(one[1:]) for one in prompts]
    change = [
        float((a - b)[:-1].gather(1, to[:, None]).mean())
        for a, b, to in zip(whole, edited, ids, strict=True)
    ]
    row = one.table().set_index("condition").loc["edit"]
    assert row["delta_loss"] == pytest.approx(np.mean(change), abs=1e-5)


def test_sub_layers_that_are_no_attention_are_named():
    model = lens.load(hybrids.hybrid("lfm2"))
    with pytest.raises(LensError, match="layer 0 of Lfm2ForCausalLM has no child named self_attn"):
        named_sublayers(model)
