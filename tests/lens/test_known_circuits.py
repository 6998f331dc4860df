"""Models whose circuit was written down: they compute what they say, by the edges that they name.

Golden numbers of the induction transformer and the gates were computed independently in float64
(metrics to six digits); tracr's cases are the compiler's own.
"""

import math

import pytest
import torch

from lens.circuits.known import (
    GATES,
    PROGRAMS,
    KnownCircuit,
    induction_transformer,
    logic_gate,
    tracr,
)
from lens.circuits.known.compiled import cases
from lens.common.errors import LensError
from lens.heads import importance
from lens.heads.pruning import ablate
from lens.heads.weights import composition, copying
from lens.models.words import WordTokenizer
from lens.passes.interface import switched

GOLDEN = {  # beta: clean, corrupt last token, attention to the previous token, of the induction head
    4: (0.844013, -0.821261, 0.932826, 0.863494),
    8: (0.997301, -0.997283, 0.998660, 0.997638),
    30: (1.0, -1.0, 1.0, 1.0),
}


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request):
    return tracr(request.param)


def scores(known, baseline="zero", method="ablation", task=None):
    return importance(
        known.model, task or known.task, method=method, baseline=baseline, progress=False
    ).values


def attention(known, layer, head):
    with switched(known.model.model, "eager"):
        return known.model.model(known.task.clean, output_attentions=True).attentions[layer][
            0, head
        ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("beta", GOLDEN)
def test_the_golden_numbers_of_the_induction_transformer(beta, dtype):
    known = induction_transformer(beta, dtype=dtype)
    clean, corrupt, previous, found = GOLDEN[beta]
    assert known.task.evaluate(known.model).item() == pytest.approx(clean, abs=6e-7)
    assert known.task.evaluate(known.model, corrupt=True).item() == pytest.approx(corrupt, abs=6e-7)
    rows = attention(known, 0, 0)
    assert rows.diagonal(-1).mean().item() == pytest.approx(previous, abs=6e-7)
    closed = [math.exp(beta) / (math.exp(beta) + at) for at in range(1, 8)]
    assert rows.diagonal(-1).tolist() == pytest.approx(closed, rel=1e-6)
    assert attention(known, 1, 0)[-1, 2].item() == pytest.approx(found, abs=6e-7)


def test_the_other_corruptions_of_the_induction_transformer():
    known = induction_transformer(4, dtype="float64")
    for name, clean, corrupt in (
        ("first token", 0.844013, -0.821261),
        ("successor", 0.86349, -0.86349),
    ):
        task = known.tasks[name]
        assert task.evaluate(known.model).item() == pytest.approx(clean, abs=5e-6)
        assert task.evaluate(known.model, corrupt=True).item() == pytest.approx(corrupt, abs=5e-6)


def test_the_weights_of_the_induction_transformer():
    """METHODS: K-composition 1/sqrt(7) where the chain is, Q and V 0; L1H0's full OV copies."""
    known = induction_transformer(4)
    table = composition(known.model).set_index(["earlier", "later", "kind"])["score"]
    assert table["L0H0", "L1H0", "k"] == pytest.approx(7**-0.5, rel=1e-6)
    assert table["L0H0", "L1H0", "q"] == table["L0H0", "L1H0", "v"] == 0
    heads = copying(known.model).set_index("name")["eigenvalue"]
    assert heads["L1H0"] == pytest.approx(1)
    assert math.isnan(heads["L0H0"])  # writes nothing that the unembedding reads


def test_heads_of_the_induction_transformer_by_ablation_and_by_gradient():
    known = induction_transformer(30)
    by_zero = scores(known)
    assert by_zero.tolist() == [[pytest.approx(1), 0], [pytest.approx(1), 0]]
    replaced = scores(known, "counterfactual", task=known.tasks["first token"])
    assert replaced.tolist() == [[pytest.approx(2), 0], [pytest.approx(2), 0]]
    estimated = scores(known, "counterfactual", "attribution", known.tasks["first token"])
    assert abs(estimated[0, 0]) < 1e-6  # the softmax is saturated: the gradient is blind
    assert estimated[1, 0] == pytest.approx(2)


def test_names_of_a_known_circuit():
    known = induction_transformer(8)
    assert isinstance(known, KnownCircuit)
    assert known.nodes == ("a0.h0", "a1.h0")
    assert known.heads == ((0, 0), (1, 0))
    assert known.inactive_heads == ((0, 1), (1, 1))
    assert known.components == {"a0.h0": True, "a0.h1": False, "a1.h0": True, "a1.h1": False}
    assert set().union(*known.visible.values()) == set(known.edges) - {
        "input->a0.h0<q>",
        "input->a0.h0<k>",
    }
    assert repr(known) == (
        "KnownCircuit(induction transformer: 7 edges between a0.h0, a1.h0; inactive: a0.h1, a1.h1; "
        "tasks: last token, first token, successor)"
    )


@pytest.mark.parametrize("gate", GATES)
def test_gates_say_what_their_tables_say(gate):
    known = logic_gate(gate)
    tokenizer = known.model.tokenizer
    expected = {"and": [0, 0, 0, 1], "or": [0, 1, 1, 1], "sum": [0, 1, 1, 2]}[gate]
    for words, value in zip(("neither", "left", "right", "both"), expected, strict=True):
        logits = known.model.model(torch.tensor([tokenizer(words)["input_ids"]])).logits[0, -1]
        assert logits[tokenizer.id("yes")].item() == value
        assert logits[tokenizer.id("no")].item() == 0


def test_what_single_ablations_and_gradients_see_of_gates():
    for baseline in ("zero", "counterfactual"):
        assert scores(logic_gate("and"), baseline).tolist() == [[1, 1]]  # more than there is
        assert scores(logic_gate("or"), baseline).tolist() == [[0, 0]]  # blind
        assert scores(logic_gate("sum"), baseline).tolist() == [[1, 1]]
    assert scores(logic_gate("or"), method="gradient").tolist() == [[0, 0]]
    assert scores(logic_gate("and"), method="gradient").tolist() == [[1, 1]]
    for gate, total in (("and", 1), ("or", 1), ("sum", 2)):
        known = logic_gate(gate)
        both = ablate(
            known.model, known.task, heads=["L0H0", "L0H1"], baseline="zero", progress=False
        )
        assert both.value == total


def test_tracr_models_give_the_published_outputs(program):
    model = program.model
    published = cases(program.name)
    assert len(published) == 60
    for words, expected in published:
        ids = model.encode(" ".join(words[1:]))
        assert model.token_strings(ids) == words
        logits = model.model(torch.tensor([ids])).logits[0, 1:]
        if isinstance(expected[0], str):
            ids = torch.tensor([model.tokenizer.id(word) for word in expected])
            told = logits.gather(-1, ids[:, None])[:, 0]  # where none is told, letters tie at 5e-7
            assert told.tolist() == pytest.approx(logits.amax(-1).tolist(), rel=0, abs=1e-12)
        else:
            values = logits[:, model.tokenizer.id("value")]
            assert values.tolist() == pytest.approx(expected, abs=1e-6)


def test_inactive_components_of_tracr_write_zero_and_score_zero(program):
    written = {}
    hooks = []
    for layer, block in enumerate(program.model.model.blocks):

        def keep(_, __, output, layer=layer):
            written[f"m{layer}"] = output

        hooks.append(block.mlp.register_forward_hook(keep))
    clean, corrupt = (
        program.task.evaluate(program.model, corrupt=corrupt) for corrupt in (False, True)
    )
    for hook in hooks:
        hook.remove()
    assert (clean >= corrupt - 1e-6).all()
    for name, active in program.components.items():
        if name in written:
            assert bool(written[name].any()) == active
    for baseline in ("zero", "counterfactual", "mean"):
        values = scores(program, baseline)
        assert all(values[head] == 0 for head in program.inactive_heads)
    by_zero = scores(program)
    assert all(by_zero[head] > 0.05 for head in program.heads)


def test_edges_of_tracr_are_the_dimensions_that_are_read():
    known = tracr("reverse")
    assert len(known.edges) == len(set(known.edges)) == 13
    assert {"input->a0.h0<q>", "a0.h0->m0", "m0->m1", "m1->m2", "m2->a3.h0<q>"} < set(known.edges)
    assert "m2->a3.h0<k>" not in known.edges
    assert [edge for edge in known.edges if edge.endswith("logits")] == ["a3.h0->logits"]
    assert set(tracr("hist").edges) == {
        *(f"input->a0.h0<{part}>" for part in "qkv"),
        *("input->m0", "a0.h0->m0", "m0->logits"),
    }


def test_every_component_is_in_the_circuit_or_inactive(program):
    ends = {end.split("<")[0] for edge in program.edges for end in edge.split("->")}
    assert set(program.nodes) == ends - {"input", "logits"}
    assert not set(program.nodes) & set(program.inactive)
    sizes = program.model.info
    assert len(program.components) == sizes.layers * (sizes.heads + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: induction_transformer(0), "beta must be a positive number, got 0"),
        (
            lambda: induction_transformer(4, dtype="half"),
            "dtype must be one of 'float32', 'float64'",
        ),
        (lambda: logic_gate("xor"), "gate must be one of 'and', 'or', 'sum', got 'xor'"),
        (lambda: tracr("sort"), "unknown program 'sort'; known: reverse, frac_prevs"),
        (lambda: WordTokenizer(["a", "B"], "B")("a c"), "the vocabulary is a B; got 'c'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(LensError, match=message):
        make()
