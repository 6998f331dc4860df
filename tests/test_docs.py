"""The examples of the documentation and of the README run, and its links lead somewhere."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lens.models import dinov2, whisper
from tests.lens.test_comparison import make_run

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/benchmarks/*.md")]
HISTORY = {ROOT / "CHANGELOG.md"}


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def in_small(code: str) -> str:
    """The same with few prompts."""
    return re.sub(r"\bn=(8|16)\b", "n=4", code)


def test_every_example_runs(run_folder_of_examples, capsys):
    names: dict[str, object] = {}
    examples = blocks("docs/examples.md")
    assert len(examples) == 10
    for block in examples:
        exec(in_small(block), names)
    said = capsys.readouterr().out
    assert "<Run " in said
    assert "Control('induction'" in said


def test_the_readme_runs(run_folder_of_examples):
    """In a folder with the run, the picture and the sound that it names, beside numbers and tensors of the reader's own."""
    Image.new("RGB", (60, 40), "gray").save("cat.png")
    Path("a.wav").write_bytes((ROOT / "tests/lens/data/ten_words.wav").read_bytes())
    query, key, value = torch.randn(3, 1, 2, 48, 16)
    names = {"numbers": np.ones((3, 6)), "q": query, "k": key, "v": value}
    notebook, kernels = blocks("README.md")
    if not dinov2.MODEL.available():  # `make models` installs it
        notebook = re.sub(r".*dinov2-small.*\n", "", notebook)
    if not whisper.MODEL.available():
        notebook = re.sub(r".*\bheard\b.*\n", "", notebook)
    exec(in_small(notebook) + kernels, names)
    assert names["table"]["induction"].max() > 0
    assert names["result"].statistics.block_mass.shape[1] == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), (
                f"{page.name} links to {target}"
            )


PATH = re.compile(r"`((?:lens|kernels|analyses|dashboards|tests|docs)/[\w/.-]+)`")


@pytest.mark.parametrize(
    "page", sorted({*PAGES} - HISTORY), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_files_that_a_page_names_are_there(page):
    gone = [path for path in PATH.findall(page.read_text()) if not (ROOT / path).exists()]
    assert gone == []


NAME = re.compile(r"`((?:lens|lens_kernels|lens_analyses|lens_dashboards)(?:\.[A-Za-z_]\w*)+)")
SOURCES = [
    path
    for room in ("lens", "kernels", "analyses", "dashboards")
    for path in (ROOT / room).rglob("*.py")
]


def docstrings(source: str) -> Iterator[str]:
    """Of a file, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def is_there(name: str) -> bool:
    """Whether it is a module, or what one has: a function, a class, an attribute or a field of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if part in getattr(found, "__dataclass_fields__", ()):
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_names_in_docstrings_are_there():
    names = {
        name: path.relative_to(ROOT)
        for path in SOURCES
        for text in docstrings(path.read_text())
        for name in NAME.findall(text)
    }
    assert len(names) > 100
    gone = [f"{path}: {name}" for name, path in names.items() if not is_there(name)]
    assert gone == []
    assert not any(
        map(is_there, ("lens.circuits.nodes", "lens.circuits.score_edges.what", "lens_none.a"))
    )


@pytest.fixture
def run_folder_of_examples(tmp_path, monkeypatch):
    """A folder with one run as large as the README's model, named as there, in which the examples are executed."""
    run = make_run(tmp_path / "made", 0, shape=(3, 6))
    (tmp_path / "runs").mkdir()
    run.path.rename(tmp_path / "runs/...")
    monkeypatch.chdir(tmp_path)


def test_the_script_of_forty_lines_has_no_more():
    (script,) = (block for block in blocks("docs/examples.md") if "from lens import edits" in block)
    assert len(script.splitlines()) <= 40
