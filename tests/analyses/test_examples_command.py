"""`lens examples`: the library's examples in the run folder, and on the page of a head."""

import json

import pytest
from lens_dashboards.library import Library
from lens_dashboards.pages import head
from lens_dashboards.selection import Selection

import lens
from lens.models.vocabulary import around, windows
from lens.passes.loading import load
from lens.runs import open_run
from lens.runs.validation import validate

COMMAND = "examples --text-name moby-dick --tokens 16 --copied 1 --copied-length 6 --n 5 --length 12 --top 3"


@pytest.fixture(scope="module")
def folder(lens_command, tmp_path_factory):
    answer = lens_command(*COMMAND.split(), "--out", tmp_path_factory.mktemp("made"), "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"]).path


def test_the_numbers_are_those_of_the_library_over_the_whole_text(folder):
    run, model = open_run(folder), load("text-lm-3l")
    assert validate(run) == []
    ids = model.encode(lens.tasks.text("moby-dick"))
    corpus = windows(ids, 12, around(model))[:5]
    found = lens.reading.examples(model, corpus, n=3, progress=False)
    section = run.section("examples")
    assert section.tables["heads"]["typical"].tolist() == pytest.approx(
        found.table()["typical"].tolist()
    )
    assert (
        section.tables["examples"]["query_token"].tolist()
        == found.examples()["query_token"].tolist()
    )
    assert len(section.tables["strips"]) == len(found.strips())
    assert section.summary == found.findings()
    assert {one.against for one in section.headlines} == {"random weights"}
    for one in section.headlines:
        assert f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}] on average" in one.text
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>Top activating examples of the heads of text-lm-3l" in page


def test_a_corpus_of_its_own_is_read(folder, lens_command, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("one two one two", "a b c a b c"))
    )
    more = ("--corpus", corpus, "--no-chance", "--out", tmp_path, "--json")
    section = open_run(lens_command(*COMMAND.split(), *more).json["path"]).section("examples")
    assert section.configuration["windows"] == 2
    assert section.headlines == ()
    assert section.tables["heads"]["random_weights"].isna().all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--corpus", "gone.jsonl"), "no file"),
        ((), "the run has copied prompts alone"),
    ],
)
def test_a_corpus_that_is_not_there_is_refused_before_the_profile(
    lens_command, tmp_path, more, said
):
    answer = lens_command("examples", "--copied", "1", *more, "--out", tmp_path)
    assert (answer.code, list(tmp_path.iterdir())) == (2, [])
    assert said in answer.err


def test_the_page_of_a_head_shows_its_examples(folder):
    view = Selection(page="head", run=folder.name, layer=1, head=3)
    library = Library(folder.parent)
    for by, words in (("", "attention"), ("written", "what the pair writes")):
        chosen = view.where(by=by)
        parts = [
            json.dumps(one.to_plotly_json(), default=lambda x: x.to_plotly_json())
            for one in head.page(library, chosen)
        ]
        page = " ".join(parts)
        assert "Texts on which L1H3 attends most" in page
        assert words in page
        table = open_run(folder).section("examples").tables["examples"]
        rows = table[(table["name"] == "L1H3") & (table["by"] == (by or "attention"))]
        assert f"text {rows['prompt'].iloc[0]}, " in page
