"""Edges at places: each score against the model run with that edge at that place, and the known circuits' places."""

import numpy as np
import pytest
import torch

import lens
from lens.circuits.checks._positions import _pairs
from lens.circuits.checks.evaluation import run_circuits
from lens.circuits.graph.activations import read_activations
from lens.circuits.graph.masked_forward import masked_logits
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.graph.spans import find_spans
from lens.circuits.graph.ways import Ways, calls_of
from lens.circuits.known import induction_transformer
from lens.circuits.scores import position_scores, positions
from lens.circuits.scores.attribution import head_slopes
from lens.common.errors import LensError
from lens.passes.calls import attend
from lens.passes.sessions import listening
from lens.tasks import Task
from tests.lens.circuit_models import Naive, error, small_model, small_task
from tests.tiers import first

SPANS = {"start": (0, 2), "mid": torch.tensor([3, 2, 4])}
WHERE = {  # edges of the known circuit, and the tokens at which they show: BOS 0 1 2 3 4 2 0
    "last token": {"input->a1.h0<q>": [7], "a1.h0->logits": [7]},
    "first token": {"input->a0.h0<v>": [1, 4], "a0.h0->a1.h0<k>": [2, 5], "a1.h0->logits": [7]},
    "successor": {"input->a1.h0<v>": [2], "a1.h0->logits": [7]},
}
WAYS = {  # part of a head, query, key
    "last token": {("a1.h0<q>", "7", "2"), ("a1.h0<q>", "7", "5")},
    "first token": {
        ("a0.h0<v>", "2", "1"), ("a0.h0<v>", "5", "4"), ("a1.h0<k>", "7", "2"), ("a1.h0<k>", "7", "5")
    },
    "successor": {("a1.h0<v>", "7", "2")},
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    return small_model("llama"), small_task(rows=3)


@pytest.fixture(scope="module")
def exact():
    model, task = small_model("gpt2"), small_task(rows=3)
    return model, task, positions(model, task, SPANS, method="exact", progress=False)


def test_an_edge_in_a_span_is_that_of_the_naive_model(exact):
    model, task, found = exact
    graph, where = found.graph, torch.as_tensor(found.where)
    assert found.spans == ("start", "mid", "rest")
    assert where.sum(0).eq(1).all()
    nodes, rows = find_nodes(model), torch.arange(task.n)
    own, corrupt = (read_activations(nodes, ids)[1] for ids in (task.clean, task.corrupt))
    naive = Naive(model)
    clean = task.measure(model.model(task.clean).logits, rows)
    for name in ("input->a0.h1<k>", "a0.h0->a1.h2<v>", "m0->logits", f"a1.h1->{graph.readers[-2]}"):
        edge = graph.find([name])[0]
        mask = torch.zeros(graph.allowed.shape, dtype=torch.float64)
        mask[graph.ends[0][edge], graph.ends[1][edge]] = 1
        for span in range(3):
            at = where[span]
            mixed = own.minus(own.minus(corrupt).each(
                lambda part, at=at: part * (at[..., None] if part.dim() == 3 else at[:, None, :, None])
            ))  # fmt: skip
            with torch.no_grad():
                logits = naive.logits(task.clean, mixed, mask, graph)
            expected = (clean - task.measure(logits, rows)).detach().numpy()
            np.testing.assert_allclose(found.within[:, span, edge], expected, atol=1e-11)


def listened(model, ids):
    kept = []

    def keep(call):
        kept.append(call)
        return attend(call).output

    with listening(model, keep), torch.no_grad():
        model.model(ids)
    return kept


def dense(call, query_rows, key, value, patched_logits=None):
    """A head's rows with the N×N matrix written out."""
    scores = call.scale * query_rows @ key.mT
    if patched_logits is not None:
        at, other = patched_logits
        scores = torch.where(at[:, None, :], call.scale * other @ key.mT, scores)
    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def test_a_way_between_spans_is_that_of_the_dense_head(exact):
    """Head by head with the matrix written out, one of q, k and v of one span replaced, in the rows of another."""
    model, task, found = exact
    where, rows = torch.as_tensor(found.where), torch.arange(task.n)
    clean = task.measure(model.model(task.clean).logits, rows).detach()
    own, other = (listened(model, ids) for ids in (task.clean, task.corrupt))
    for layer, head, part, query, key in [
        (0, 1, 0, 2, 0),
        (1, 2, 1, 2, 0),
        (1, 0, 2, 2, 1),
        (0, 0, 1, 1, 0),
    ]:
        call, its = own[layer], other[layer]
        group = head * call.key.shape[1] // call.query.shape[1]
        q, k, v = call.query[:, head], call.key[:, group], call.value[:, group]
        at = where[key]
        if part == 0:
            z = dense(call, q, k, v, (at, its.query[:, head]))
        elif part == 1:
            z = dense(call, q, torch.where(at[..., None], its.key[:, group], k), v)
        else:
            z = dense(call, q, k, torch.where(at[..., None], its.value[:, group], v))

        def put(given, layer=layer, head=head, z=z, query=query):
            output = attend(given).output.clone()
            if given.layer == layer:
                output[:, head] = torch.where(where[query][..., None], z, output[:, head])
            return output

        with listening(model, put), torch.no_grad():
            expected = clean - task.measure(model.model(task.clean).logits, rows)
        mine = found.across[:, part, layer, head, query, key]
        assert expected.abs().max() > 1e-6
        np.testing.assert_allclose(mine, expected, atol=1e-11)


def pair_by_pair(cut, where, corrupt):
    """A head's rows, every logit and every value by itself, with what is cut from the corrupt prompt."""

    def output(layer, head, q, k, v):
        others, z = corrupt[layer, head], torch.zeros_like(v)
        for row in range(len(q)):
            span = where[:, row].int().argmax(0).tolist()
            for i in range(q.shape[1]):
                logits, values = [], []
                for j in range(i + 1):
                    chosen = [
                        (theirs if cut[part, layer, head, span[i], span[j]] else mine)[row, at]
                        for part, (mine, theirs, at) in enumerate(
                            zip((q, k, v), others, (i, j, j), strict=True)
                        )
                    ]
                    logits.append(chosen[0] @ chosen[1] * q.shape[-1] ** -0.5)
                    values.append(chosen[2])
                z[row, i] = torch.stack(logits).softmax(0) @ torch.stack(values)
        return z

    return output


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_circuit_without_ways_is_the_naive_model_without_them(kind):
    model, task = small_model(kind), small_task(rows=3)
    nodes, where = find_nodes(model), find_spans(task, SPANS).where
    graph = nodes.graph
    generator = torch.Generator().manual_seed(4)
    shape = (2, len("qkv"), graph.layers, graph.heads, 3, 3)
    cut = torch.rand(shape, generator=generator) < 0.4
    masks = (torch.rand(3, 2, *graph.allowed.shape, generator=generator) < 0.3).double()
    reference, corrupt = read_activations(nodes, task.corrupt)[1], {}
    naive = Naive(model)

    def keep(layer, head, q, k, v):
        corrupt[layer, head] = (q, k, v)
        return dense_plain(q, k, v)

    with torch.no_grad():
        naive.logits(task.corrupt, reference, torch.zeros(graph.allowed.shape), graph, keep)
        ways = Ways(cut, where, calls_of(nodes, task.corrupt))
        found = masked_logits(nodes, task.clean, reference, masks, where, ways)
        plain = masked_logits(nodes, task.clean, reference, masks, where)
        for copy in range(2):
            mask = torch.einsum("srw,spt->rwpt", masks[:, copy], where.double())[..., None]
            heads = pair_by_pair(cut[copy], where, corrupt)
            expected = naive.logits(task.clean, reference, mask, graph, heads)
            assert error(found[copy], expected) < 1e-11
            assert error(plain[copy], expected) > 1e-2


def dense_plain(q, k, v):
    hidden = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_one_way_cut_costs_its_exact_score_and_all_ways_of_a_head_its_edges(exact):
    model, task, found = exact
    graph, where = found.graph, torch.as_tensor(found.where)
    tried = [(0, 0, 1, 2, 0), (1, 1, 2, 2, 1), (2, 0, 1, 1, 0), (0, 1, 1, 2, 2)]
    ways = np.ones((len(tried) + 1, *found.across.shape[1:]), bool)
    for number, way in enumerate(tried):
        ways[(number, *way)] = False
    ways[-1, :, 1, 2] = False
    kept = np.ones((len(ways) + 1, len(where), graph.n), bool)
    into = [edge.split("->")[1].startswith("a1.h2<") for edge in graph.edges]
    kept[-1, :, into] = False
    ways = np.concatenate([ways, np.ones_like(ways[:1])])
    done = run_circuits(
        model, task, kept, found.ablation, where=where, ways=ways, progress=False
    )  # fmt: skip
    lost = done.full - done.metric
    for number, way in enumerate(tried):
        np.testing.assert_allclose(lost[number], found.across[(slice(None), *way)], atol=1e-11)
    np.testing.assert_allclose(lost[-2], lost[-1], atol=1e-11)
    assert np.abs(lost).max(1).min() > 1e-6


def test_sums_over_places_are_the_scores_without_them(case):
    model, task = case
    for method in ("eap", lens.circuits.EapIg(steps=2)):
        found = positions(model, task, SPANS, method=method, progress=False)
        whole = lens.circuits.score_edges(model, task, method=method, progress=False)
        assert error(found.edges().per_prompt, whole.per_prompt) < 1e-11
    each = positions(model, task, "each", method="eap", progress=False)
    spans = positions(model, task, SPANS, method="eap", progress=False)
    where = spans.where.astype(float)
    summed = np.einsum("pte,spt->pse", each.within, where)
    np.testing.assert_allclose(summed, spans.within, atol=1e-12)
    values = np.einsum("plhij,spi,upj->plhsu", each.across[:, 2], where, where)
    np.testing.assert_allclose(values, spans.across[:, 2], atol=1e-12)  # values are linear
    assert 0 < each.cancelled < 1


def test_keys_of_single_tokens_are_the_papers_closed_form(case):
    """`A' = A e^d / (1 - A + A e^d)` and `o' - o = (A' - A) / (1 - A) (v_j - o)`, of queries and of keys."""
    model, task = case
    found = positions(model, task, "each", method="eap", progress=False)
    own, other = (listened(model, ids) for ids in (task.clean, task.corrupt))
    nodes = find_nodes(model)
    slope = head_slopes(
        nodes, task.clean, lambda logits: task.measure(logits, torch.arange(task.n))
    ).heads
    for layer, head in ((0, 1), (1, 2)):
        call, its = own[layer], other[layer]
        group = head * call.key.shape[1] // call.query.shape[1]
        q, k, v = call.query[:, head], call.key[:, group], call.value[:, group]
        o = dense(call, q, k, v)
        scores = (call.scale * q @ k.mT).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        a = scores.softmax(-1)
        for part, changed in enumerate((its.query[:, head] @ k.mT, q @ its.key[:, group].mT)):
            shift = call.scale * changed - call.scale * q @ k.mT
            new = a * shift.exp() / (1 - a + a * shift.exp())
            for i, j in ((5, 2), (6, 6), (3, 0)):
                moved = ((new - a) / (1 - a))[:, i, j, None] * (v[:, j] - o[:, i])
                expected = -(slope[layer][:, head, i] * moved).sum(-1)
                np.testing.assert_allclose(
                    found.across[:, part, layer, head, i, j], expected, atol=1e-10
                )


@pytest.mark.parametrize("name", first(WHERE, "successor"))
def test_the_known_circuit_shows_where_it_works_and_nowhere_else(name):
    known = induction_transformer(beta=30.0, dtype="float64")
    task = known.tasks[name]
    found = positions(known.model, task, "each", method="exact", progress=False)
    table = found.table()
    large = table[table["value"].abs() > 1e-3]
    inside = large[large["key_span"] == ""]
    expected = {(edge, str(at)) for edge, places in WHERE[name].items() for at in places}
    assert set(zip(inside["edge"], inside["span"], strict=True)) == expected
    across = large[large["key_span"] != ""]
    assert set(zip(across["edge"], across["span"], across["key_span"], strict=True)) == WAYS[name]
    judged = lens.circuits.checks.evaluate_positions(
        known.model, task, found, [0.025, 0.08], progress=False
    )
    values = judged.table().set_index(["by", "share"])["faithfulness"]
    assert values["at places", 0.025] == pytest.approx(1, abs=1e-6)
    assert values["everywhere", 0.025] == pytest.approx(0, abs=1e-6)
    assert values["random at places", 0.025] == pytest.approx(0, abs=1e-6)
    assert values["places and ways", 0.025] == pytest.approx(1, abs=1e-3)
    assert values["random places and ways", 0.08] == pytest.approx(0, abs=1e-6)
    assert (judged.table()["kept"] <= judged.table()["share"]).all()
    some = judged.table().set_index("by").loc["places and ways"]
    assert (some["ways"] <= some["share"]).all()
    sizes = judged.smallest()
    assert sizes["at places"] < 0.025 < 0.06
    assert sizes["places and ways"] < 0.025
    assert len(judged.plot().data) == 5
    assert judged.findings()[0].kind == "size"
    figure = found.plot(top=6)
    assert sum(len(trace.y) for trace in figure.data) == 6


def test_what_is_said_draws_of_what_it_names_alone(exact, monkeypatch):
    """Not of every edge at every place, of which a real model has hundreds of thousands."""
    sizes = []
    own = position_scores.columns

    def seen(name, values, *args, **options):
        sizes.append(len(values))
        return own(name, values, *args, **options)

    monkeypatch.setattr(position_scores, "columns", seen)
    scores = exact[2]
    said = {one.kind: one for one in scores.findings()}
    assert sizes == [3, 3]
    table = scores.table()
    best = table[table["key_span"] == ""].iloc[0]
    start = f"Largest within spans (intervals as of the largest of all): {best['edge']} at {best['span']} {best['value']:.3g} ["
    assert said["within"].startswith(start)
    median = np.median(np.abs(scores.within.mean(0)))
    assert said["within"].endswith(f"the median size of {scores.within[0].size:,} is {median:.2g}.")
    assert " from " in said["across"]


def test_masks_in_spans_are_masks_everywhere_where_they_are_alike(case):
    model, task = case
    nodes = find_nodes(model)
    _, reference = read_activations(nodes, task.corrupt)
    masks = torch.rand(2, *nodes.graph.allowed.shape, dtype=torch.float64)
    where = find_spans(task, SPANS).where
    with torch.no_grad():
        whole = masked_logits(nodes, task.clean, reference, masks)
        spans = masked_logits(nodes, task.clean, reference, masks.expand(3, -1, -1, -1), where)
        parts = masked_logits(
            nodes, task.clean, reference, torch.stack([masks, 0 * masks, 0 * masks]), where
        )
    assert error(spans, whole) < 1e-12
    assert error(parts, whole) > 1e-3
    at = where[0][0].nonzero()[:, 0]
    assert (
        error(parts[:, 0, at], whole[:, 0, at]) < 1e-12
    )  # nothing before it is replaced elsewhere


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        (None, "has no marks; give spans"),
        ({}, "spans must be None, 'each' or a mapping"),
        ({"rest": 1}, "not 'rest'"),
        ({"a": (0, 3), "b": 2}, "a and b do in prompt 0"),
        ({"a": 7}, "within the 7 tokens"),
        ({"a": (2, 2)}, "and have one"),
        ({"a": [0.5, 1, 2]}, "must be positions"),
        ({"a": [[1, 2, 3]]}, "got the shape"),
    ],
)
def test_spans_that_are_none_are_refused(case, spans, match):
    with pytest.raises(LensError, match=match):
        positions(*case, spans, progress=False)


def test_pictures_have_no_places(case):
    pictures = torch.rand(2, 1, 8, 8)
    zero = torch.zeros(2, 1, dtype=torch.long)
    task = Task("digits", pictures, zero, zero, "loss", 1 - pictures, labels=7)
    with pytest.raises(
        LensError, match="places are of prompts of tokens, and 'digits' is of pictures"
    ):
        positions(case[0], task, "each", progress=False)


def test_what_has_no_scores_is_refused(case):
    model, task = case
    with pytest.raises(LensError, match="method must be one of 'exact', 'eap', 'eap-ig'"):
        positions(model, task, "each", method="relp", progress=False)
    with pytest.raises(LensError, match="is flat at the clean prompts"):
        positions(model, task.with_kl(model), "each", method="eap", progress=False)
    found = positions(model, task, SPANS, method="eap", progress=False)
    with pytest.raises(LensError, match="top takes 0 to"):
        found.top(10**9)
    with pytest.raises(LensError, match=r"edges at spans, got 2\.5"):
        found.top(2.5)
    assert found.top(5).sum() == 5
    with pytest.raises(LensError, match="the places are of 3 prompts of 7 tokens"):
        lens.circuits.checks.evaluate_positions(model, small_task(rows=2), found, progress=False)
    with pytest.raises(LensError, match="must be named start, mid, rest"):
        lens.circuits.checks.evaluate_positions(
            model, task, found, spans={"end": 6}, progress=False
        )
    other = small_task(seed=1, rows=2)
    places = {"start": (0, 2), "mid": torch.tensor([3, 2])}
    judged = lens.circuits.checks.evaluate_positions(
        model, other, found, [0.3], spans=places, progress=False
    )
    assert (judged.table()["kept"] <= 0.3).all()


def test_ways_from_later_keys_cost_where_a_model_looks_ahead():
    where = np.array([[[1, 1, 0]], [[0, 0, 1]]])
    assert _pairs(where, False).tolist() == [[3, 0], [2, 1]]
    assert _pairs(where, True).tolist() == [[4, 2], [2, 1]]
