"""The masked forward pass: its two ends, and a naive model in between."""

import gc
import weakref

import pytest
import torch

import lens
from lens.circuits.graph.activations import Ablation, PlainVisitor, read_activations
from lens.circuits.graph.graph import Graph
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes, visit
from lens.circuits.graph.references import References
from lens.common.errors import LensError
from tests.lens.architectures import build
from tests.lens.circuit_models import KINDS, Naive, error, small_model, small_task
from tests.lens.layouts import layout_model


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return small_model(request.param)


@pytest.mark.parametrize(
    ("sizes", "writers", "readers", "edges"),
    [
        ((12, 12), 157, 445, 32_491),  # GPT-2 small: the benchmark's own count
        ((24, 16), 409, 1177, 231_877),
        ((6, 4), 31, 79, 1_108),
        ((32, 32), 1057, 3105, 1_592_881),
    ],
)
def test_sizes_of_published_graphs(sizes, writers, readers, edges):
    graph = Graph(*sizes, kv_heads=sizes[1])
    assert (len(graph.writers), len(graph.readers), graph.n) == (writers, readers, edges)


def test_names_and_order():
    graph = Graph(2, 2, 1, kv="group")
    assert graph.writers == ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    assert graph.readers[:5] == ("a0.h0<q>", "a0.h1<q>", "a0.kv0<k>", "a0.kv0<v>", "m0")
    assert graph.feeds[2] == (1, 2)
    assert "a0.h1->m0" in graph.edges
    assert "a0.h1->m0" not in Graph(2, 2, 1, parallel=True).edges
    assert "a0.h1->a0.h1<q>" not in graph.edges
    assert graph.edges[graph.find(["m0->a1.kv0<v>"])[0]] == "m0->a1.kv0<v>"
    with pytest.raises(LensError, match="there is no edge 'm1->m0'"):
        graph.find(["m1->m0"])
    with pytest.raises(LensError, match="heads a multiple of kv_heads; got 2, 3 and 2"):
        Graph(2, 3, 2)
    with pytest.raises(LensError, match="kv must be one of 'head', 'group', got 'all'"):
        Graph(2, 2, 2, kv="all")


@pytest.mark.parametrize("kv", ["head", "group"])
def test_no_edge_is_the_clean_run_and_all_edges_are_the_reference_run(model, kv):
    nodes, task = find_nodes(model, kv=kv), small_task()
    with torch.no_grad():
        clean, corrupt = model.model(task.clean).logits, model.model(task.corrupt).logits
        _, reference = read_activations(nodes, task.corrupt_or_refuse())
        shape = nodes.graph.allowed.shape
        masks = torch.stack([torch.zeros(shape), torch.ones(shape)])
        found = masked_logits(nodes, task.clean, reference, masks)
    assert error(found[0], clean) < 1e-13
    assert error(found[1], corrupt) < 1e-13
    assert error(found[0], corrupt) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kv", ["head", "group"])
def test_any_masks_are_those_of_the_naive_model(kind, kv):
    model, task = small_model(kind), small_task()
    nodes = find_nodes(model, kv=kv)
    graph = nodes.graph
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    masks = torch.rand(4, *graph.allowed.shape, dtype=torch.float64)
    masks[2:] = 0
    one = graph.find([f"a0.h1->{graph.readers[-3 if kind == 'gpt2' else -2]}"])[0]
    masks[3, graph.ends[0][one], graph.ends[1][one]] = 1
    poisoned = masks.clone()
    poisoned[:, ~torch.as_tensor(graph.allowed)] = torch.nan  # no edge: never read
    with torch.no_grad():
        found = masked_logits(nodes, task.clean, reference, poisoned)
        naive = Naive(model)
        expected = torch.stack([naive.logits(task.clean, reference, mask, graph) for mask in masks])
    assert error(expected[3], expected[2]) > 1e-6
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs) < 1e-12
    assert error(found[3] - found[2], expected[3] - expected[2]) < 1e-8


def test_all_edges_from_a_writer_are_that_head_replaced():
    model, task = small_model("llama"), small_task()
    nodes = find_nodes(model)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    mask = torch.zeros(1, *nodes.graph.allowed.shape)
    mask[:, :, nodes.graph.writers.index("a1.h4")] = 1
    with torch.no_grad():
        found = masked_logits(nodes, task.clean, reference, mask)[0]
    from lens.common.head_ids import HeadId
    from lens.passes.head_outputs import edited_logits

    expected = edited_logits(
        model, task.clean, [[HeadId(1, 4)]], [lambda layer, _: reference.heads[layer]]
    )[0]
    assert error(found, expected) < 1e-13


def test_zero_and_mean_references():
    model, task = small_model("gpt2"), small_task()
    nodes = find_nodes(model)
    zero = References(nodes, task, Ablation("zero")).of(torch.arange(2))
    assert zero.input.shape[0] == 1
    assert not any(part.any() for part in (zero.input, *zero.heads, *zero.mlps))
    _, all_rows = read_activations(nodes, task.clean)
    mean = References(nodes, task, Ablation("mean")).of(torch.arange(2))
    assert error(mean.heads[1][0], all_rows.heads[1].mean(0)) < 1e-14
    assert error(mean.mlps[1][0], all_rows.mlps[1].mean(0)) < 1e-14
    with pytest.raises(
        LensError, match="baseline must be one of 'counterfactual', 'mean', 'zero', got 'noise'"
    ):
        Ablation("noise")


def test_wrong_shapes_are_refused():
    model, task = small_model("gpt2"), small_task()
    nodes = find_nodes(model)
    _, reference = read_activations(nodes, task.corrupt_or_refuse())
    shape = nodes.graph.allowed.shape
    with pytest.raises(LensError, match=r"masks must be \[masks, readers 21, writers 9\]"):
        masked_logits(nodes, task.clean, reference, torch.zeros(1, 2, 3))
    with pytest.raises(LensError, match="the reference is of 5 prompts of 7 tokens, and there"):
        masked_logits(nodes, task.clean[:3], reference, torch.zeros(1, *shape))
    with pytest.raises(LensError, match="masks has NaN on an edge"):
        masked_logits(nodes, task.clean, reference, torch.full((1, *shape), torch.nan))


def test_models_whose_edges_cannot_be_replaced_are_refused():
    with pytest.raises(LensError, match="where 'llama4_text' keeps its parts is not known here"):
        find_nodes(lens.load(build("llama4")))
    with pytest.raises(
        LensError, match=r"its 2 key heads, so query heads cannot have .* kv='group'"
    ):
        find_nodes(lens.load(layout_model("olmo2")))
    with pytest.raises(
        LensError, match=r"flow_routes takes what is read .* gemma2 norms it in between"
    ):
        lens.circuits.scores.flow_routes(lens.load(layout_model("gemma2")), small_task())


def test_what_a_pass_keeps_is_let_go_of_at_its_end(model):
    """Not when Python next looks for circles: circuits at places held what many passes kept, 9 GB of smollm2."""
    nodes = find_nodes(model)
    visitor = PlainVisitor(nodes)
    alive = weakref.ref(visitor)
    gc.disable()
    try:
        with torch.no_grad():
            visit(nodes, small_task().clean, visitor)
        del visitor
        assert alive() is None
    finally:
        gc.enable()
