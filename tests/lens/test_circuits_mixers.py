"""Edges of hybrids: heads of mixers as nodes, each edge replaced by hand, slopes against differences, what is refused."""

import copy
import json

import numpy as np
import pytest
import torch

import lens
from lens.circuits import score_edges
from lens.circuits.checks._control import magnitudes
from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.activations import Ablation
from lens.circuits.graph.mixed import Mixed, mixed_of
from lens.circuits.graph.nodes import find_nodes
from lens.common.errors import LensError
from lens.figures.circuits import head_map, layered_graph
from lens.runs.schema import CircuitFile, ImportancesFile
from tests.tiers import first

from .architectures import build
from .hybrids import hybrid

CLEAN = torch.tensor([list(range(3, 15)), list(range(40, 52))])
CORRUPT = CLEAN.clone()
CORRUPT[:, 5] = 60
ANSWERS = torch.tensor([[20], [21]])


def task_of(corrupt=CORRUPT):
    return lens.tasks.Task("made", CLEAN, torch.full((2, 1), 11), ANSWERS, "loss", corrupt)


def losses(model, ids=CLEAN):
    return -model(ids).logits[:, 11].log_softmax(-1).gather(1, ANSWERS)[:, 0]


def read_of(module, model, ids):
    """What a module read in a pass."""
    found = []
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(ids)
    hook.remove()
    return found[0]


MORE = {  # outputs that are multiplied before they are added
    "falcon_h1": {"ssm_out_multiplier": 0.6, "attention_out_multiplier": 1.4, "mlp_multipliers": [0.5, 0.8], "initializer_range": 0.04},
    "granitemoehybrid": {"residual_multiplier": 0.7},
}  # fmt: skip
SCALES = {"falcon_h1": (0.6, 1.4), "granitemoehybrid": (0.7, 0.7)}  # of mixers, of softmax heads
HEADS = {  # kind -> (its mixer's output projection in layer 0, columns of head 2, the norm before the MLP of layer 2)
    "bamba": (lambda m: m.model.layers[0].mamba.out_proj, slice(64, 96), lambda m: m.model.layers[2].pre_ff_layernorm),
    "qwen3_5_text": (
        lambda m: m.model.layers[0].linear_attn.out_proj, slice(32, 48), lambda m: m.model.layers[2].post_attention_layernorm
    ),
    "lfm2": (lambda m: m.model.layers[0].conv.out_proj, slice(2, 3), lambda m: m.model.layers[2].ffn_norm),
    "falcon_h1": (
        lambda m: m.model.layers[0].mamba.out_proj, slice(64, 96), lambda m: m.model.layers[2].pre_ff_layernorm
    ),
    "granitemoehybrid": (
        lambda m: m.model.layers[0].mamba.out_proj, slice(64, 96), lambda m: m.model.layers[2].post_attention_layernorm
    ),
    "olmo_hybrid": (
        lambda m: m.model.layers[0].linear_attn.o_proj, slice(32, 48), lambda m: m.model.layers[2].post_attention_layernorm
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", first(HEADS, "qwen3_5_text", "falcon_h1", "olmo_hybrid"))
def test_an_edge_of_a_mixer_head_is_replaced_where_one_reader_reads(kind):
    model = hybrid(kind, **MORE.get(kind, {}))
    projection, columns, norm = HEADS[kind]
    of_mixer, of_softmax = SCALES.get(kind, (1, 1))
    edge = "a0.s2->m2" if kind == "falcon_h1" else "a0.h2->m2"  # beside softmax heads, or alone
    found = score_edges(lens.load(model), task_of(), method="exact", progress=False)
    assert edge in found.graph.edges
    clean, corrupt = (read_of(projection(model), model, ids) for ids in (CLEAN, CORRUPT))
    change = of_mixer * (corrupt - clean)[..., columns] @ projection(model).weight[:, columns].T
    own = losses(model)
    hook = norm(model).register_forward_pre_hook(lambda _, args: (args[0] + change,))
    expected = losses(model) - own
    hook.remove()
    score = found.per_prompt[:, found.graph.find([edge])[0]]
    assert score == pytest.approx(expected.numpy(), abs=1e-6)
    assert np.abs(score).max() > 1e-4
    attention = found.graph.find(["a1.h3->logits"])[
        0
    ]  # and of a softmax head, whose last reader is the last norm
    output = next(
        module
        for name, module in model.model.layers[1].named_modules()
        if name.endswith(("o_proj", "self_attn.out_proj"))
    )
    clean, corrupt = (read_of(output, model, ids) for ids in (CLEAN, CORRUPT))
    width = output.in_features // 4
    change = of_softmax * (corrupt - clean)[..., 3 * width :] @ output.weight[:, 3 * width :].T
    if kind == "olmo_hybrid":  # a norm comes between heads and stream
        between = model.model.layers[1].post_attention_layernorm
        whole = clean @ output.weight.T
        change = between(whole + change) - between(whole)
    last = next(m for n, m in model.model.named_children() if "norm" in n)
    hook = last.register_forward_pre_hook(lambda _, args: (args[0] + change,))
    assert found.per_prompt[:, attention] == pytest.approx((losses(model) - own).numpy(), abs=1e-6)
    hook.remove()


@torch.no_grad()
def test_all_edges_of_a_head_together_are_its_ablation():
    model = hybrid("bamba")
    loaded, without = lens.load(model), copy.deepcopy(model)
    without.model.layers[2].mamba.out_proj.weight[:, 32:64] = 0
    mixed = Mixed(loaded)
    clean = mixed.run(CLEAN)
    reader = mixed.graph.readers.index("a2")
    head = list(mixed.graph.writers).index("a2.h1")
    written = mixed.written(reader, clean.heads[reader])[:, 1]

    def change(number, read):
        return read - written if mixed.graph.allowed[number, head] else read

    # what the head writes does not change, since nothing before it does
    found = mixed.run(CLEAN, change).logits
    assert (found - without(CLEAN).logits).abs().max() < 1e-4
    assert (found - clean.logits).abs().max() > 1e-3


def moved_by(mixed, reader, change):
    """The loss with something added to what one reader reads."""
    logits = mixed.run(CLEAN, lambda at, read: read + change if at == reader else read).logits
    return -logits[:, 11].log_softmax(-1).gather(1, ANSWERS)[:, 0]


def test_gradients_are_slopes_of_the_replacement():
    model = hybrid("bamba").double()  # its scan stays float32
    loaded, task = lens.load(model), task_of()
    found = score_edges(loaded, task, method="eap", progress=False)
    mixed = Mixed(loaded)
    with torch.no_grad():
        clean, corrupt = mixed.run(CLEAN), mixed.run(CORRUPT)
        for edge in ("a0.h2->m2", "a2.h1->logits", "input->a1", "m0->a2", "a1.h0->a2"):
            writer, reader = edge.split("->")
            number = list(mixed.graph.readers).index(reader)
            place = list(mixed.graph.writers).index(writer)
            if place:
                source = next(n for n, own in enumerate(mixed.graph.feeds) if place in own)
                own = mixed.graph.feeds[source].index(place)
                difference = mixed.written(source, clean.heads[source] - corrupt.heads[source])[
                    :, own
                ]
            else:
                difference = clean.input - corrupt.input
            moved = [moved_by(mixed, number, sign * 0.01 * difference) for sign in (-1, 1)]
            slope = (moved[0] - moved[1]) / 0.02  # less is better of a loss
            score = found.per_prompt[:, found.graph.find([edge])[0]]
            assert score == pytest.approx(slope.numpy(), rel=1e-2, abs=1e-4)


def test_slopes_pass_the_norm_between_heads_and_stream():
    """Softmax layers of OLMo-hybrid norm the sum of their heads before they add it, and their MLPs read without a norm."""
    loaded = lens.load(hybrid("olmo_hybrid").double())
    found = score_edges(loaded, task_of(), method="eap", progress=False)
    mixed, edges = Mixed(loaded), ["a1.h3->m2", "a1.h0->logits", "a0.h2->a1", "m1->a2", "a1.h1->m1"]
    with torch.no_grad():
        reference = mixed.run(CORRUPT)
        for edge, number in zip(edges, mixed.graph.find(edges), strict=True):
            masks = torch.zeros(2, len(mixed.graph.readers), len(mixed.graph.writers))
            masks[:, mixed.graph.ends[0][number], mixed.graph.ends[1][number]] = torch.tensor(
                [-0.01, 0.01]
            )
            moved = [
                -one[:, 11].log_softmax(-1).gather(1, ANSWERS)[:, 0]
                for one in mixed.masked(CLEAN, reference, masks)
            ]
            slope = (moved[1] - moved[0]) / 0.02  # less is better of a loss
            assert found.per_prompt[:, number] == pytest.approx(slope.numpy(), rel=1e-2, abs=1e-4)
            assert slope.abs().max() > 1e-3, edge


def test_integrated_gradients_add_up_to_the_effect_of_the_input():
    loaded = lens.load(hybrid("bamba"))
    found = score_edges(loaded, task_of(), method=lens.circuits.EapIg(steps=24), progress=False)
    of_input = found.per_prompt[:, found.graph.ends[1] == 0].sum(1)
    with torch.no_grad():
        whole = losses(loaded.model, CORRUPT) - losses(loaded.model)  # less is better of a loss
    assert of_input == pytest.approx(whole.numpy(), rel=0.1, abs=0.03)
    assert (found.steps, found.rule) == (24, "midpoint")
    best = found.table(count=3).iloc[0]
    assert best["edge"] in found.top(3, prune=False).edges
    zero = score_edges(loaded, task_of(None), method="exact", baseline="zero", progress=False)
    assert np.isfinite(zero.per_prompt).all()


def test_means_leave_padding_out_and_rules_are_followed():
    loaded, found = lens.load(hybrid("bamba")), []
    for padding in (0, 50):
        clean = CLEAN.clone()
        clean[1, 8:] = padding
        task = lens.tasks.Task(
            "made", clean, torch.tensor([[11], [7]]), ANSWERS, "loss", lengths=torch.tensor([12, 8])
        )
        scores = score_edges(loaded, task, method="eap", baseline="mean", progress=False)
        found.append(scores.per_prompt)
    assert np.abs(found[0]).max() > 1e-3
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    left, middle = (
        score_edges(
            loaded, task_of(), method=lens.circuits.EapIg(steps=1, rule=rule), progress=False
        )
        for rule in ("left", "midpoint")
    )
    assert (left.rule, middle.rule) == ("left", "midpoint")
    assert np.abs(left.per_prompt - middle.per_prompt).max() > 1e-4


@torch.no_grad()
def test_edges_left_out_of_a_pass_are_those_replaced_by_hand():
    loaded, task = lens.load(hybrid("bamba")), task_of()
    exact = score_edges(loaded, task, method="exact", progress=False)
    graph, names = exact.graph, ["a0.h2->m2", "a1.h3->logits", "input->a1"]
    kept = np.ones((len(names), graph.n), bool)
    for row, edge in enumerate(graph.find(names)):
        kept[row, edge] = False
    found = run_circuits(loaded, task, kept, exact.ablation, progress=False)
    assert found.full == pytest.approx(-losses(loaded.model).numpy(), abs=1e-5)
    assert found.empty == pytest.approx(-losses(loaded.model, CORRUPT).numpy(), abs=1e-5)
    lost = found.full - found.metric
    assert lost == pytest.approx(exact.per_prompt[:, graph.find(names)].T, abs=1e-5)
    # what a writer gives changes with what it reads: two edges in a row, the second by hand
    mixed, both = Mixed(loaded), ["a0.h2->m0", "m0->a1"]
    masks = torch.zeros(1, len(graph.readers), len(graph.writers))
    for edge in graph.find(both):
        masks[0, graph.ends[0][edge], graph.ends[1][edge]] = 1
    clean, corrupt = mixed.run(CLEAN), mixed.run(CORRUPT)
    changed = mixed.written(0, corrupt.heads[0] - clean.heads[0])[:, 2]
    norm, later = (
        getattr(loaded.model.model.layers[n], name)
        for n, name in ((0, "pre_ff_layernorm"), (1, "input_layernorm"))
    )
    hook = norm.register_forward_pre_hook(lambda _, args: (args[0] + changed,))
    new = mixed.run(CLEAN)
    difference = (corrupt.heads[1] - new.heads[1])[:, 0]
    other = later.register_forward_pre_hook(lambda _, args: (args[0] + difference,))
    expected = loaded.model(CLEAN).logits
    hook.remove(), other.remove()
    torch.testing.assert_close(
        mixed.masked(CLEAN, corrupt, masks)[0], expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "edges"), [("bamba", 40), ("falcon_h1", 120), ("olmo_hybrid", 40)]
)
def test_circuits_are_found_saved_evaluated_and_drawn(kind, edges, tmp_path):
    loaded, task = lens.load(hybrid(kind, **MORE.get(kind, {}))), task_of()
    found = lens.circuits.find(loaded, task, method="eap", edges=edges, progress=False)
    circuit = found.circuit
    circuit.save(tmp_path / "c.json", scores=found.scores.values)
    CircuitFile.model_validate_json((tmp_path / "c.json").read_text(), strict=True)
    lens.circuits.exports.to_mib(found.scores, tmp_path / "importances.json")
    ImportancesFile.model_validate_json((tmp_path / "importances.json").read_text(), strict=True)
    again = lens.circuits.load_circuit(tmp_path / "c.json")
    assert (again.edges, again.graph) == (circuit.edges, circuit.graph)
    outcome = lens.circuits.run_circuit(loaded, task, again, progress=False)
    (row,) = found.table()[found.table()["chosen"]].to_dict("records")
    assert outcome.faithfulness() == pytest.approx([row["faithfulness"]], abs=1e-4)
    for baseline in ("zero", "mean"):
        scores = score_edges(loaded, task, method="eap", baseline=baseline, progress=False)
        curve = lens.circuits.evaluate(loaded, task, scores, draws=1, progress=False)
        assert curve.absolute.faithfulness()[-1] == pytest.approx(1, abs=1e-4)
    drawn = layered_graph(circuit, found.scores)
    nodes = next(one for one in drawn.data if one.mode == "markers+text").customdata
    assert set(circuit.nodes) <= set(nodes)
    assert head_map(circuit, found.scores).data[0].z.shape == (4, 4)


@torch.no_grad()
def test_magnitudes_are_the_lengths_of_what_the_ablation_changes():
    model = hybrid("bamba")
    projection, columns, _ = HEADS["bamba"]
    found = magnitudes(lens.load(model), task_of(), Ablation())
    clean, corrupt = (read_of(projection(model), model, ids) for ids in (CLEAN, CORRUPT))
    change = (corrupt - clean)[..., columns] @ projection(model).weight[:, columns].T
    writers = Mixed(lens.load(model)).graph.writers
    assert found.shape == (len(writers),)
    assert found[writers.index("a0.h2")] == pytest.approx(
        float(change.norm(dim=-1).mean()), rel=1e-4
    )
    own = model.model.embed_tokens.weight
    entered = (own[CORRUPT] - own[CLEAN]).norm(dim=-1).mean()
    assert found[0] == pytest.approx(float(entered), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda: hybrid("olmo_hybrid"), lambda: build("gemma2")])
def test_magnitudes_of_heads_are_what_comes_out_of_the_norm_behind_them(make):
    """They were those of what goes in, beside MLPs behind their norm: two scales in one order."""
    model = make()
    layer = model.model.layers[1]
    output, norm = layer.self_attn.o_proj, layer.post_attention_layernorm
    clean, corrupt = (read_of(output, model, ids) for ids in (CLEAN, CORRUPT))
    loaded = lens.load(model)
    found = magnitudes(loaded, task_of(), Ablation())
    graph = (mixed_of(loaded) or find_nodes(loaded)).graph
    width = clean.shape[-1] // loaded.info.heads
    for head in (0, 2):
        replaced, own = clean.clone(), slice(head * width, (head + 1) * width)
        replaced[..., own] = corrupt[..., own]
        change = norm(output(clean)) - norm(output(replaced))
        expected = float(change.norm(dim=-1).mean())
        assert found[graph.writers.index(f"a1.h{head}")] == pytest.approx(expected, rel=1e-4)


def test_slopes_are_taken_back_to_what_a_reader_reads_alone(monkeypatch):
    loaded, asked = lens.load(hybrid("olmo_hybrid")), []
    own = Mixed.slope
    monkeypatch.setattr(
        Mixed, "slope", lambda self, number, *rest: asked.append(number) or own(self, number, *rest)
    )
    score_edges(loaded, task_of(), method="eap", progress=False)
    graph = Mixed(loaded).graph
    starts = [
        feeds[0] for feeds in graph.feeds if feeds
    ]  # of this model each sub-layer is one part
    assert len(asked) == sum(start < before for before in graph.before for start in starts)
    assert len(asked) < len(graph.readers) * len(starts)


def test_an_attribution_graph_hangs_together(tmp_path):
    found = score_edges(lens.load(hybrid("bamba")), task_of(), method="eap", progress=False)
    names = ("input->a0", "a0.h2->m2", "a0.h2->logits", "m2->logits")
    circuit = lens.circuits.make_circuit(found.graph, names)
    lens.circuits.exports.to_attribution_graph(circuit, found, ["x"], tmp_path / "graph.json")
    graph = json.loads((tmp_path / "graph.json").read_text())
    weights = {(one["source"], one["target"]): one["weight"] for one in graph["links"]}
    assert set(weights) == {
        ("input", "a0"), ("a0", "a0.h2"), ("a0.h2", "m2"), ("a0.h2", "logits"), ("m2", "logits")
    }  # fmt: skip
    through = found.values[found.graph.find(names[1:3])].sum()
    assert weights["a0", "a0.h2"] == pytest.approx(through)


def test_a_hybrid_that_rounds_is_to_be_loaded_in_float32():
    """It was said not to read the sum of what was written before."""
    with pytest.raises(LensError, match="rounds to bfloat16; load it in float32"):
        Mixed(lens.load(hybrid("bamba").to(torch.bfloat16)))


def test_what_has_no_such_graph_is_refused():
    loaded = lens.load(hybrid("bamba"))
    for run, said in [
        (lambda: score_edges(loaded, task_of(), method="atp*", progress=False), "exact, eap, eap-ig"),
        (lambda: score_edges(lens.load(hybrid("minimax")), task_of(), method="eap", progress=False), "does not read the sum"),
        (lambda: lens.circuits.find(loaded, task_of(), edges=106, progress=False), "edges must be 1 to 105"),
    ]:  # fmt: skip
        with pytest.raises(lens.LensError, match=said):
            run()
