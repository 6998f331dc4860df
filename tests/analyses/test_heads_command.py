"""`lens heads`: a profile, then roles, importance, patterns, redundancy and pruning in the same folder."""

import json

import numpy as np
import pytest

import lens
from lens import heads, tasks
from lens.common.results import with_ends
from lens.passes.loading import load
from lens.runs import open_run
from lens.runs.validation import validate

ARGUMENTS = "heads --model induction-2l --copied 3 --n 6 --measures ablation/mean,gradient,direct"


@pytest.fixture(scope="module")
def folder(lens_command, tmp_path_factory):
    """The run of the model whose three induction heads are known to stand in for each other."""
    answer = lens_command(*ARGUMENTS.split(), "--out", tmp_path_factory.mktemp("heads"), "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_every_step_leaves_its_section_and_the_folder_is_whole(folder):
    assert folder.sections == [
        "roles",
        "importance",
        "patterns",
        "retrieval",
        "similarity",
        "stability",
        "pruning",
        "layers",
        "heads",
    ]
    assert validate(folder) == []
    assert not (folder.path / "work").exists()


def test_the_numbers_are_those_of_the_library(folder):
    model = load("induction-2l")
    task = tasks.induction(model, 6, 0)
    expected = heads.importance(model, task, method="ablation", baseline="mean", progress=False)
    table = folder.section("importance").tables["scores"].sort_values(["layer", "head"])
    np.testing.assert_allclose(
        table["ablation (mean)"].to_numpy(), expected.values.ravel(), rtol=1e-5, atol=1e-6
    )


def test_patterns_are_said_with_the_prompts_that_they_are_of(folder):
    section = folder.section("patterns")
    (said,) = section.summary
    assert said.startswith("On copied prompts: With 25% of the visible pairs, of ")


def test_the_summary_says_that_redundant_heads_are_understated(folder):
    said = [
        text for text in folder.section("importance").summary if "stand in for each other" in text
    ]
    assert said[0].startswith("Induction heads: Together L1H0, L1H2, L1H3 are worth ")
    together = folder.section("importance").tables["together"].set_index("role")
    assert together.loc["induction", "value"] > 2 * together.loc["induction", "alone"]


def test_a_measure_that_cannot_be_had_is_named_with_its_reason(folder):
    limits = folder.section("importance").limits
    assert any("direct on induction" in text and "logit_difference" in text for text in limits)


def test_one_table_joins_all_measures_with_every_column_defined(folder):
    section = folder.section("heads")
    table = section.tables["heads"]
    assert len(table) == 8
    assert {"induction", "ablation (mean)", "gradient", "pattern", "redundancy"} <= set(table)
    assert table.loc[table["induction"].idxmax(), "name"] == "L1H0"
    assert set(table.nlargest(3, "retrieval")["name"]) == {"L1H0", "L1H2", "L1H3"}
    streaming = table["full_attention_gate"] < 0.5
    assert table.loc[streaming, "layer"].tolist() == [0, 0, 0, 0]
    assert table.loc[table["previous_token"].idxmax(), "name"] == "L0H1"
    like = (
        folder.section("similarity").tables["cka_redundancy"].set_index("name").loc[table["name"]]
    )
    for name, column in (("redundancy_low", "low"), ("redundancy_floor", "floor")):
        np.testing.assert_array_equal(table[name], like[column])
    said = " ".join(section.summary)
    best = table.loc[table["ablation (mean)"].idxmax()]
    assert (
        f"(CKA {with_ends(best, 'redundancy', '.2f')}, across different prompts {best['redundancy_floor']:.2f})"
        in said
    )
    known = table.loc[table["induction"].idxmax()]
    assert f"has the highest induction score, {with_ends(known, 'induction', '.2f')};" in said


def test_sections_say_what_the_results_say(folder):
    fetching = folder.section("retrieval").summary
    assert any(one.startswith("With the first 1 and the last ") and " [" in one for one in fetching)
    assert any(
        one.startswith("The outputs of ") and "those of the median head" in one for one in fetching
    )
    assert any(one.startswith("The trained gate keeps ") and "above 0.5" in one for one in fetching)
    keeping = folder.section("stability").summary
    assert keeping[0].startswith("Between some and others, ")
    assert (
        sum(one.startswith("The LSE of ") and "on one pair of prompts" in one for one in keeping)
        == 2
    )
    assert any("over the conditions half, whole" in one and "%]" in one for one in keeping)
    roles = folder.section("roles").summary
    assert roles[0].startswith("Most induction of 8 heads on ")
    assert "(above uniform " in roles[0]
    layers = folder.section("layers")
    assert list(layers.tables) == ["sweep", "influence", "removal"]
    assert (
        sum(one.startswith("Layer ") and "the median layer" in one for one in layers.summary) == 1
    )


def test_heads_that_look_at_places_keep_their_pattern_on_other_prompts(folder):
    section = folder.section("stability")
    table = section.tables["heads"].set_index("name")
    copied = folder.prompts
    assert set(copied["kind"]) == {"copied"}
    traces = [
        lens.capture(load("induction-2l"), ids.tolist(), block_size=4, statistics="all")
        for ids in copied["token_ids"].iloc[:2]
    ]
    expected = heads.stability({"some": traces[:1], "others": traces[1:]}).table()
    jaccard = expected.query(
        "first == 'some' and metric == 'jaccard' and variant == 'sink_excluded'"
    )
    np.testing.assert_allclose(table["jaccard"], jaccard["value"])
    assert table.loc["L0H1", "jaccard"] > table.loc[["L1H0", "L1H2", "L1H3"], "jaccard"].max()
    assert section.tables["variance"]["share"].sum() == pytest.approx(1)


def test_the_report_shows_what_the_sections_say(folder):
    page = (folder.path / "report.html").read_text()
    data = json.loads((folder.path / "report.json").read_text())
    for section, name in zip(data["sections"], folder.sections, strict=True):
        saved = folder.section(name)
        assert section["summary"] == list(saved.summary)
        assert f'id="section-{name}"' in page
        for figure in saved.figures:
            assert f'data-figure="section/{name}/{figure}"' in page
            assert f'"section/{name}/{figure}"' in page


def test_the_same_command_takes_up_the_sections_that_are_there(lens_command, folder):
    before = folder.section("roles").tables["copied"]
    stamps = {name: _changed(folder, name) for name in folder.sections}
    index = folder.path / "sections" / "pruning" / "section.json"
    curve = folder.section("pruning").tables["curve"]
    index.unlink()
    (folder.path / "report.html").unlink()
    answer = lens_command(*ARGUMENTS.split(), "--out", folder.path.parent, "--json")
    assert answer.code == 0, answer.err
    again = open_run(folder.path)
    assert {name for name, stamp in stamps.items() if _changed(again, name) != stamp} == {"pruning"}
    assert again.section("roles").tables["copied"].equals(before)
    assert again.section("pruning").tables["curve"].equals(curve)


def _changed(run, name):
    return (run.path / "sections" / name / "section.json").stat().st_mtime_ns
