"""The examples of the documentation run, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/benchmarks/*.md")]
HISTORY = {ROOT / "CHANGELOG.md"}


def test_every_example_runs(run_folder_of_examples, capsys):
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/examples.md").read_text(), re.DOTALL)
    assert len(blocks) == 10
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert "<Run " in said
    assert "Control('induction'" in said


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


@pytest.fixture
def run_folder_of_examples(tmp_path, monkeypatch):
    """A folder with one run, in which the examples are executed."""
    from lens_analyses.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["run", "--copied", "1", "--out", str(tmp_path / "runs"), "--quiet"])
    assert ended.value.code == 0
    monkeypatch.chdir(tmp_path)


def test_the_script_of_forty_lines_has_no_more():
    section = (ROOT / "docs/examples.md").read_text().partition("in forty lines")[2]
    (script,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert len(script.splitlines()) <= 40
