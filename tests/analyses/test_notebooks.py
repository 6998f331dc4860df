"""The notebooks run from top to bottom, draw, and never reach for the network.

A notebook is a script in jupytext's percent format; its claims are `assert`s, so running it is testing
it. The cells run one by one, as a notebook does, so that what each of them shows is seen here too.
"""

import ast
import os
import re
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "analyses" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
FIGURES = {  # the least number that each shows
    "circuits": 3,
    "first_look": 4,
    "heads": 6,
    "long_context": 3,
    "pictures": 7,
    "reading": 5,
    "sinks_and_redistribution": 6,
    "sparse_attention": 5,
    "your_own_model": 2,
}
_START = re.compile(r"^# %%(?P<kind>.*)$", re.MULTILINE)


def cells(source: str) -> list[tuple[str, str]]:
    """The cells of a percent script after its header, as (kind, text); kind is "code" or "markdown"."""
    starts = list(_START.finditer(source))
    ends = [start.start() for start in starts[1:]] + [len(source)]
    return [
        ("markdown" if "[markdown]" in start["kind"] else "code", source[start.end() : end])
        for start, end in zip(starts, ends, strict=True)
    ]


def run_cell(text: str, namespace: dict[str, Any], name: str) -> Any:
    """Run one cell; what its last expression gives, or None."""
    tree = ast.parse(text, name)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        exec(compile(tree, name, "exec"), namespace)
        return None
    tree.body.pop()
    exec(compile(tree, name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every socket to another machine is an error, and so is a question to the model hub."""

    def refuse(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"a notebook reached for the network: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("offline")
def test_notebook_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    shown = []
    before = set(os.listdir())
    for number, (kind, text) in enumerate(cells(path.read_text(encoding="utf-8"))):
        if kind == "code":
            shown.append(run_cell(text, namespace, f"{path.name}[{number}]"))
    figures = [value for value in shown if isinstance(value, go.Figure)]
    assert len(figures) >= FIGURES[path.stem]
    for figure in figures:
        assert figure.to_dict()["data"]
        assert figure.layout.title.text, "a figure says what it shows"
        assert len(str(figure.to_json())) < 2_000_000
    assert any(isinstance(value, pd.DataFrame) for value in shown)
    said = capsys.readouterr().out
    assert len(said) > 200
    assert "nan" not in re.findall(r"\b\w+\b", said), "no sentence says nan"
    assert set(os.listdir()) == before, "a notebook leaves nothing behind in the working folder"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_explains_itself(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    found = cells(source)
    assert source.startswith("# ---\n# jupyter:")
    assert found[0][0] == "markdown"
    text = "".join(body for kind, body in found if kind == "markdown")
    assert "MODEL" in source
    assert "does not" in text or "not " in text, "it says what it does not show"
    assert sum("assert " in body for kind, body in found if kind == "code") >= 2
    assert not re.search(r"\d\.\d", text), "no number is copied into text by hand"


def test_the_list_of_notebooks_is_the_folder() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(FIGURES)


def test_cells_are_read_as_a_notebook_reads_them() -> None:
    source = "# ---\n# ---\n# %% [markdown]\n# words\n\n# %%\na = 2\na + 1\n\n# %%\nassert a == 3\n"
    kinds, texts = zip(*cells(source), strict=True)
    assert kinds == ("markdown", "code", "code")
    namespace: dict[str, Any] = {}
    assert run_cell(texts[1], namespace, "cell") == 3
    with pytest.raises(AssertionError):
        run_cell(texts[2], namespace, "cell")


@pytest.mark.usefixtures("offline")
def test_a_notebook_that_calls_out_fails() -> None:
    with (
        pytest.raises(AssertionError, match="reached for the network"),
        socket.socket() as connection,
    ):
        connection.connect(("127.0.0.1", 9))
