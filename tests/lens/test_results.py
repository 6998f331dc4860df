"""What every result shares: text, HTML, a figure that takes the same arguments and asks no network."""

import ast
import importlib
import inspect
import pkgutil
import re
import socket
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import lens
from lens.common import plots
from lens.common.errors import LensError
from lens.common.results import ROWS, Result, Sentence
from lens.tasks.needles import copied

ROOT = Path(__file__).parents[2]
LOOK = {"title": "T", "width": 410, "height": 310, "theme": "dark"}


def classes():
    """Every public class with a table or a plot."""
    found = {}
    for module in pkgutil.walk_packages(lens.__path__, "lens."):
        for name, one in vars(importlib.import_module(module.name)).items():
            own = (
                inspect.isclass(one) and one.__module__ == module.name and not name.startswith("_")
            )
            if own and (issubclass(one, Result) or "plot" in vars(one)) and one is not Result:
                found[f"{module.name}.{name}"] = one
    return found


CLASSES = classes()


def test_the_results_are_found():
    assert {
        "lens.heads.measures.scores.HeadScores",
        "lens.edits.effect_results.Effect",
    } < CLASSES.keys()
    assert len(CLASSES) > 50


@pytest.mark.parametrize("name", CLASSES)
def test_every_result_has_text_and_html(name):
    one = CLASSES[name]
    assert not hasattr(one.__repr__, "__wrapped__"), "its text is that of a dataclass"
    if one.__repr__ is Result.__repr__:
        assert one.findings is not Result.findings, "it has no text"
    assert hasattr(one, "_repr_html_")


plots._load()


@pytest.mark.parametrize("name", plots._DRAWN)
def test_every_figure_function_takes_the_same_look(name):
    """A result may be plotted without arguments; that of a trace is of one head, which has to be named."""
    parameters = inspect.signature(plots._DRAWN[name][0]).parameters
    if name != "AttentionTrace":
        others = [p for key, p in parameters.items() if key != "look"][1:]
        assert all(p.default is not p.empty for p in others)
    assert list(parameters)[-1] == "look"
    assert parameters["look"].annotation == "Unpack[Look]"


def test_every_figure_draws_a_class_that_there_is():
    assert {name.rpartition(".")[2] for name in CLASSES} >= plots._DRAWN.keys()


def test_a_class_is_drawn_once():
    with pytest.raises(ValueError, match="HeadScores is drawn by importance_grid already"):
        plots.draws("HeadScores")(lambda result, **look: None)


def test_a_result_without_a_figure_says_so():
    class Plain(Result):
        def table(self):
            return pd.DataFrame()

    with pytest.raises(LensError, match=r"Plain has no figure; its numbers are in \.table\(\)"):
        Plain().plot()


def test_every_result_says_sentences_with_kinds():
    without = {
        name
        for name, one in CLASSES.items()
        if "findings" in vars(one)
        and vars(one)["findings"].__annotations__["return"]
        not in ("tuple[Sentence, ...]", tuple[Sentence, ...])
    }
    assert without == set()


def picks(source):
    """Lines on which a sentence is taken by its place, or by a word in it."""
    found, said = [], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and _is_said(node.value, said):
            said |= {ast.unparse(target) for target in node.targets}
        if isinstance(node, ast.Subscript) and _is_said(node.value, said):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.comprehension) and _is_said(node.iter, said):
            words = {
                ast.unparse(test.comparators[0]) for test in node.ifs if isinstance(test, ast.Compare)
                and isinstance(test.ops[0], ast.In | ast.NotIn)
            }  # fmt: skip
            if ast.unparse(node.target) in words:
                found.append(f"line {node.iter.lineno}: {ast.unparse(node)}")
    return found


def _is_said(node, said):
    """Whether this is `result.findings()`, or a name for it."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr == "findings"
    return isinstance(node, ast.Name) and node.id in said


def test_no_sentence_is_picked_by_place_or_word():
    files = [
        file
        for folder in ("lens", "analyses", "dashboards")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(files) > 300
    found = {
        str(file.relative_to(ROOT)): lines for file in files if (lines := picks(file.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["a.findings()[0]", "b = a.findings()\nb[-1]", "[x for x in a.findings() if 'no' in x]"],
)
def test_a_pick_is_seen(source):
    assert len(picks(source)) == 1
    assert not picks("b = of_kind(a.findings(), 'effect')\nc = [x for x in a.findings()]\nd[0]")


def test_tables_of_heads_join():
    """Every result with a row per head has `name`, `layer` and `head`, so that tables can be joined."""
    model = lens.load("induction-2l")
    task, quiet = lens.tasks.induction(model, 4), {"progress": False}
    prompts = [lens.tasks.copied(model, 25, seed=seed) for seed in range(2)]
    traces = [lens.capture(model, one, keep_qk=True, block_size=8, **quiet) for one in prompts]
    scores = lens.heads.importance(model, task, method="gradient", **quiet)
    vit, digit = lens.load("vit-digits"), np.zeros((8, 8), np.uint8)
    picture = lens.capture(vit, digit, keep_qk=True, **quiet)
    made = [
        scores,
        lens.heads.activity(model, {"copies": prompts}, **quiet),
        lens.heads.patterns(traces),
        lens.heads.retrieval(model, copied(model), **quiet),
        lens.heads.roles(model, prompts, **quiet),
        lens.heads.streaming(model, prompts, first=1, last=4, **quiet),
        lens.heads.stability({"one": traces[:1], "other": traces[1:]}),
        lens.heads.pruning.gate(model, prompts, first=1, last=4, steps=1, **quiet),
        lens.heads.pruning.metrics(model, task, **quiet),
        lens.circuits.head_parts(model, task, ["L1H0"], **quiet),
        lens.circuits.scores.flow_routes(model, task, **quiet),
        lens.circuits.scores.codes(model, task, examples=2, epochs=2, seeds=1, **quiet),
        lens.sinks.rate(traces),
        lens.sinks.block_bounds(traces[0]),
        lens.vision.rings(picture),
        lens.vision.shapes(picture, window=2),
        lens.vision.flow(picture),
        lens.vision.coding_rate(vit, digit, **quiet),
        lens.edits.search_heads(model, task, lens.edits.Mask("first"), most=1, **quiet),
        lens.policies.maps(model, prompts[0], lens.policies.AShape(4, 8), block_size=8),
        lens.reading.perturb(model, prompts, ["L1H0"], sizes=[0.5], draws=1, **quiet),
        lens.reading.adversary(model, prompts, ["L1H0"], draws=1, **quiet),
        lens.reading.retrieval(model, copied(model), masked=[], **quiet),
        lens.reading.examples(model, prompts, n=1, chance=False, **quiet),
        lens.policies.stability(model, prompts, block_size=8, **quiet),
    ]
    of_heads = {
        name.rpartition(".")[2]
        for name, one in CLASSES.items()
        if re.match(
            r"One row per [^.:]*\bhead\b", inspect.getdoc(getattr(one, "table", None)) or ""
        )
    }
    elsewhere = {
        "Alignment",
        "Denoising",
        "HeadSelection",
        "MixerCapture",
        "MixerMeasures",
        "PatchDistances",
        "PolicyScores",
        "PolicySearch",
        "PolicyTransfer",
        "PositionScores",
        "RunSeries",
    }
    assert of_heads - elsewhere == {type(one).__name__ for one in made}
    tables = {type(one).__name__: one.table() for one in made}
    similar = lens.heads.similarity(model, prompts, **quiet)
    tables["redundancy"], tables["neighbours"] = similar.redundancy(), similar.neighbours("L0H1")
    tables["profile"] = lens.profile(traces)
    tables["copying"] = lens.heads.weights.copying(model)
    tables["overlap"] = lens.circuits.reuse.overlap(["L0H1"], ["L1H0"], shape=(2, 4)).heads()
    for name, table in tables.items():
        assert {"name", "layer", "head"} <= set(table), name
        assert {str(table[column].dtype) for column in ("layer", "head")} == {"int64"}, name
        both = zip(table["layer"], table["head"], strict=True)
        assert table["name"].tolist() == [f"L{layer}H{head}" for layer, head in both], name
    joined = lens.heads.join(scores, lens.circuits.scores.flow_routes(model, task, **quiet))
    assert len(joined) == 8


RUN_NONE = {
    "lens.circuits.make_circuit",
    "lens.edit",
    "lens.heads.weights.composition",
    "lens.heads.weights.copying",
    "lens.heads.weights.head_weights",
    "lens.models.random_weights",
    "lens.traces.from_attentions",
    "lens.traces.from_transformer_lens",
    "lens.traces.capturing",
    "lens.vision.segments",
}
"""Take a model and run nothing through it, or what runs in it is the user's."""


def functions(room, seen=None):
    """Dotted name -> function of a room, of the rooms in it, and of modules that a room shows."""
    seen = set() if seen is None else seen
    found = {}
    for name in getattr(room, "__all__", [name for name in vars(room) if not name.startswith("_")]):
        one = getattr(room, name)
        if inspect.isfunction(one) and one.__module__.startswith("lens"):
            own = hasattr(room, "__all__") or one.__module__ == room.__name__
            found |= {f"{room.__name__}.{name}": one} if own else {}
        elif isinstance(one, ModuleType) and one.__name__.startswith("lens.") and one not in seen:
            seen.add(one)
            found |= functions(one, seen)
    return found


def test_every_function_that_runs_a_model_shows_progress():
    found = functions(lens)
    assert {"lens.heads.sublayers.block_influence", "lens.circuits.checks.control"} < found.keys()
    without = {
        name
        for name, one in found.items()
        if "model" in (parameters := inspect.signature(one).parameters)
        and "progress" not in parameters
        and name not in RUN_NONE
        and not name.startswith("lens.tasks.")
    }
    assert without == set()
    for name in ("capture", "effect"):
        assert "progress" in inspect.signature(getattr(lens, name)).parameters


@pytest.fixture(scope="module")
def results():
    """One of each kind that takes less than a second."""
    model = lens.load("text-lm-3l")
    prompts = [lens.tasks.copied(model, 20, seed=seed) for seed in range(3)]
    traces = [lens.capture(model, prompt, block_size=16, progress=False) for prompt in prompts]
    induction = lens.load("induction-2l")
    task = lens.tasks.induction(induction, 6, length=9)
    edges = lens.circuits.score_edges(induction, task, method="eap", progress=False)

    return [
        lens.heads.importance(model, lens.tasks.induction(model, n=4), method="gradient", progress=False),
        lens.heads.similarity(model, prompts, progress=False),
        lens.heads.roles(model, prompts, progress=False),
        lens.sinks.rate(traces),
        lens.sinks.rate(traces).curve(),
        lens.sinks.find(traces).profile,
        lens.sinks.find(traces[0]),
        lens.effect(model, prompts, lens.edits.Mask("first")),
        lens.effect(model, prompts, lens.edits.Mask("first"), amounts=(0.0, 1.0), controls=()),
        edges,
        lens.circuits.evaluate(induction, task, edges, draws=2, progress=False),
    ]  # fmt: skip


def test_results_are_shown_in_a_notebook_without_a_network(results, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a result asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for result in results:
        assert isinstance(result, Result)
        assert type(result).__name__ in repr(result)
        html, table = result._repr_html_(), result.table()
        assert html.count("<tr") == min(len(table), ROWS) + 1
        assert (f"{len(table):,} rows in" in html) == (len(table) > ROWS)
        figure = result.plot(**LOOK)
        assert isinstance(figure, go.Figure)
        layout = figure.layout
        assert (layout.title.text, layout.width, layout.height) == ("T", 410, 310)
        assert layout.paper_bgcolor == "#161b22"


def test_html_of_a_result_is_escaped():
    class Loud(Result):
        def table(self):
            return pd.DataFrame({"token": ["<b>"]})

        def __repr__(self):
            return "Loud\n  <script>"

    html = Loud()._repr_html_()
    assert "<script>" not in html
    assert "<b>&" not in html
    assert "&lt;b&gt;" in html
