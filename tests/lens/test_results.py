"""What every result shares: text, HTML, a figure that takes the same arguments and asks no network."""

import importlib
import inspect
import pkgutil
import socket

import pandas as pd
import plotly.graph_objects as go
import pytest

import lens
from lens.common import plots
from lens.common.errors import LensError
from lens.common.results import ROWS, Result

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
    assert "__repr__" in vars(one)
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
        lens.sinks.sensitivity(traces),
        lens.sinks.profile(traces),
        lens.sinks.find(traces[0]),
        lens.effect(model, prompts, lens.edits.Mask("first")),
        lens.effect(model, prompts, lens.edits.Mask("first"), amounts=(0.0, 1.0), controls=()),
        edges,
        lens.circuits.evaluate(induction, task, edges, random=2, progress=False),
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
