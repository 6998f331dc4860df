"""What rests on the table, on every architecture: edges, direct attribution, weights, spectral bands."""

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

import lens
from lens.circuits import score_edges
from lens.circuits.graph.activations import read_activations
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.scores.attribution import edge_products
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.heads.measures.direct import direct_effects
from lens.passes.head_outputs import edited_logits
from lens.passes.replay import proved
from lens.tasks import Task
from tests.lens.circuit_models import error, stepped
from tests.lens.layouts import ALWAYS, KINDS, VOCAB, layout_model
from tests.lens.test_circuits_relp import cuts
from tests.tiers import first

TEXT = tuple(kind for kind in KINDS if kind != "vit")
BENT = ("gemma2", "gemma3_text", "olmo2", "olmo3", "bert", "albert")
BY_GROUP = ("olmo2", "olmo3", "cohere")  # whose keys are normed with weights of their own
LINEAR = tuple(kind for kind in TEXT if kind not in ("bert", "albert"))
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
ROWS, TOKENS = 2, 6


def kv(kind: str) -> str:
    return "group" if kind in BY_GROUP else "head"


@functools.cache
def loaded(kind: str, *, double: bool = True):
    """One model for all tests, which leave it as it is."""
    model = lens.load(layout_model(kind))
    if double and kind not in EXPERTS:  # norms go through float32 still, experts take no float64
        torch.nn.Module.double(model.model)
    return model


def small_task() -> Task:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(3, VOCAB, shape, generator=generator)

    return Task(
        "drawn", draw(ROWS, TOKENS), torch.full((ROWS, 1), TOKENS - 1), draw(ROWS, 1),
        "logit_difference", draw(ROWS, TOKENS), wrong=draw(ROWS, 1),
    )  # fmt: skip


@pytest.mark.parametrize("kind", first(TEXT, *ALWAYS))
def test_all_edges_are_the_reference_run_and_those_of_a_head_are_that_head(kind):
    model, task = loaded(kind), small_task()
    nodes = find_nodes(model, kv=kv(kind))
    graph = nodes.graph
    with torch.no_grad():
        clean, corrupt = model.model(task.clean).logits, model.model(task.corrupt).logits
        _, reference = read_activations(nodes, task.corrupt_or_refuse())
        masks = torch.zeros(3, *graph.allowed.shape)
        masks[1] = 1
        masks[2, :, graph.writers.index("a1.h2")] = 1
        found = masked_logits(nodes, task.clean, reference, masks)
    expected = edited_logits(
        model, task.clean, [[HeadId(1, 2)]], [lambda layer, _: reference.heads[layer]]
    )[0]
    assert error(found[0], clean) < 1e-5
    assert error(found[1], corrupt) < 1e-5
    assert error(found[2] - clean, expected - clean) < 1e-4
    assert error(expected, clean) > 1e-3


@pytest.mark.parametrize("kind", first(TEXT, *ALWAYS))
def test_first_order_scores_are_gradients_by_the_masks(kind):
    model, task = loaded(kind), small_task()
    nodes = find_nodes(model, kv=kv(kind))
    _, own = read_activations(nodes, task.clean)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    rows = torch.arange(ROWS)
    differences = reference.minus(own)

    def measure(logits):
        return task.measure(logits, rows)

    found = edge_products(nodes, task.clean, measure, differences)
    where = torch.arange(task.length)[None, None] % 2 == torch.arange(2)[:, None, None]
    where = where.expand(-1, ROWS, -1)
    spans = edge_products(nodes, task.clean, measure, differences, where=where)
    alone = differences.each(
        lambda part: part * where[1].view(ROWS, *[1] * (part.dim() - 3), -1, 1)
    )
    assert error(spans[:, 1], edge_products(nodes, task.clean, measure, alone)) < 1e-5
    assert error(spans.sum(1), found) < 1e-4
    masks = torch.zeros(1, *nodes.graph.allowed.shape, requires_grad=True)
    logits = masked_logits(nodes, task.clean, reference, masks)[0]
    (slope,) = torch.autograd.grad(task.measure(logits, rows).sum(), masks)
    expected = slope[0].numpy()[nodes.graph.allowed]
    assert error(found.sum(0), expected) < 1e-3
    assert (expected != 0).mean() > 0.5


@pytest.mark.parametrize("kind", first(BENT, "gemma2", "olmo2", "bert"))
def test_an_edge_through_norms_is_its_reader_computed_again(kind):
    """`exact` of one edge into the logits: the sum of heads with one replaced goes through its norm."""
    model, task = loaded(kind), small_task()
    nodes = find_nodes(model, kv=kv(kind))
    layout, (_, own) = nodes.layout, read_activations(nodes, task.clean)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    last = nodes.graph.layers - 1
    found = score_edges(model, task, method="exact", kv=kv(kind), progress=False)
    edge = found.graph.find([f"a{last}.h1->logits"])[0]
    block, streams = layout.blocks[last], []
    hook = (block.norm.module or block.attention).register_forward_pre_hook(
        lambda _, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        clean = model.model(task.clean).logits
        hook.remove()
        stream = block.norm.forward(streams[0]) if layout.normed else streams[0]
        z = own.heads[last].clone()
        z[:, 1] = reference.heads[last][:, 1]
        stream = stream + block.after.forward(block.attended(z))
        stream = block.mlp_norm.forward(stream) if layout.normed else stream
        logits = layout.logits(layout.final_norm.forward(stream + own.mlps[last]))
    rows = torch.arange(ROWS)
    expected = task.measure(clean, rows) - task.measure(logits, rows)
    assert expected.abs().max() > 1e-3
    assert error(found.per_prompt[:, edge], expected.numpy()) < 1e-3


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2"])
def test_relevance_is_conserved_through_norms_after_heads(kind):
    model, task = loaded(kind), small_task()
    found = score_edges(
        model, task, method="relp-values", baseline="zero", kv="group", progress=False
    )
    crossing = cuts(found.graph)
    metric = task.evaluate(model).numpy()
    assert error(found.per_prompt @ crossing.T, metric[:, None].repeat(len(crossing), 1)) < 1e-4


@pytest.mark.parametrize("method", ["eap-ig", "atp*"])
def test_methods_on_a_model_with_norms_after_its_heads(method):
    model, task = loaded("gemma2"), small_task()
    if method == "atp*":
        with pytest.raises(LensError, match=r"takes what is read for the sum .* gemma2 norms it"):
            score_edges(model, task, method=method, progress=False)
        return
    found = score_edges(model, task, method=stepped(method, 40), progress=False)
    assert np.isfinite(found.values).all()
    into = np.array([edge.endswith("->logits") for edge in found.graph.edges])
    exact = score_edges(model, task, method="exact", progress=False)
    assert np.corrcoef(found.values[into], exact.values[into])[0, 1] > 0.9


@pytest.mark.parametrize("kind", first(LINEAR, *ALWAYS[:-1]))
def test_direct_effects_with_the_rest_of_the_stream_make_the_difference_of_logits(kind):
    """Heads, biases, embedding and MLPs, each met with the last norm: together they are the logits."""
    model, task = loaded(kind, double=False), small_task()
    layout, rows = proved(model), torch.arange(ROWS)
    assert task.wrong is not None
    _, effects = direct_effects(model, task, rows)
    nodes = find_nodes(model, kv="group")
    with torch.no_grad():
        _, own = read_activations(nodes, task.clean)
        rest, stream = own.input, own.input
        for number, block in enumerate(layout.blocks):
            summed = block.attended(own.heads[number])
            stream = stream + block.after.forward(summed)
            bias = torch.zeros_like(summed) if block.output_bias is None else block.output_bias
            if block.after.scale is not None:
                bias = bias / block.after.size(summed) * block.after.scale
            rest = rest + bias
            if block.mlp:
                stream, rest = stream + own.mlps[number], rest + own.mlps[number]
        size = layout.final_norm.size(stream)[:, -1]
        answers = layout.final_norm.fold(layout.unembed_weight())
        beside = (rest[:, -1] / size) @ answers
        shift = layout.final_norm.shift
        if shift is not None:
            beside = beside + shift @ layout.unembed_weight()
        if (bias := getattr(layout.unembedding, "bias", None)) is not None:
            beside = beside + bias * layout.logit_scale
        logits = model.model(task.clean).logits[:, -1]
        if layout.softcap is not None:
            logits = (logits / layout.softcap).atanh() * layout.softcap
    picked = [
        part.gather(1, task.correct) - part.gather(1, task.wrong) for part in (logits, beside)
    ]
    whole, others = (part[:, 0].numpy() for part in picked)
    assert np.abs(effects.sum((0, 1)) + others - whole).max() < 2e-4 * np.abs(whole).max()
    assert np.abs(effects).max() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "albert"])
def test_no_direct_path_through_a_head_that_is_not_linear(kind):
    with pytest.raises(LensError, match="so no head writes straight into its logits"):
        direct_effects(loaded(kind), small_task(), torch.arange(ROWS))


@pytest.mark.parametrize("kind", first(KINDS, *ALWAYS))
def test_weights_of_every_architecture(kind):
    """Composition of all, copying and bands where heads write straight into logits of tokens."""
    model = loaded(kind, double=False)
    table = lens.heads.weights.composition(model)
    assert len(table) == 3 * model.info.heads**2 * sum(range(model.info.layers))
    assert table["score"].between(0, 1).all()
    if kind in LINEAR:
        assert lens.heads.weights.copying(model, tokens=None)["top_share"].between(0, 1).all()
        found = lens.sinks.bands(model, [[3, 5, 9, 11]], count=4)
        energies = found.table()
        assert np.allclose(energies.groupby(["layer", "head", "weight"])["energy"].sum(), 1)
        assert found.losses is not None
        assert np.isfinite(found.losses.delta_loss).all()


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "olmo2", "cohere", "granite", "phi3"])
def test_folded_weights_do_what_the_parts_do(kind):
    """Queries, and what heads write, are the folded weights up to what norms divide by."""
    model = loaded(kind, double=False)
    layout, weights = proved(model), lens.heads.weights.head_weights(model)
    block = layout.blocks[1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, weights.query.shape[2], generator=generator)
    z = torch.randn(1, model.info.heads, 5, model.info.head_dim, generator=generator)
    weight, bias = block.weights[0]
    q = torch.einsum("td,hdk->thk", block.norm.forward(x), weight)
    assert bias is None
    q = block.head_norms[0].of_heads(q)
    found = torch.einsum("td,hdk->thk", x, weights.query[1])
    ratio = torch.cosine_similarity(found.flatten(1), q.flatten(1), dim=-1)
    if block.head_norms[0].changes and kind != "olmo2":  # each head has a size of its own
        ratio = torch.cosine_similarity(found, q, dim=-1)
    assert (ratio > 1 - 1e-5).all()
    written = block.after.forward(block.attended(z))[0]
    own = torch.einsum("htk,hkd->td", z[0], weights.output[1])
    if layout.final_norm.centred:
        written = written - written.mean(-1, keepdim=True)
    assert (torch.cosine_similarity(own, written, dim=-1) > 1 - 1e-5).all()
