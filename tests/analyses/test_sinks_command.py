"""`lens sinks` and `lens redistribute`: sections in the folder of a profile."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from lens_analyses.config import make_config
from lens_analyses.config.analyses import NOT_FROM_A_COMMAND, Rule
from lens_analyses.steps import redistribute
from lens_analyses.steps.sink_effects import in_short

import lens
from lens.common.results import Sentence
from lens.passes.loading import load
from lens.runs import open_run
from lens.runs.validation import validate
from lens.tasks import prompts

TEXT = "--model text-lm-3l --text-name moby-dick --tokens 32 --windows 4 --n 4 --set analysis.length=32"
SINKS = f"sinks {TEXT} --edits mask --amounts 0,1 --set prompts.copied=0"
MOVE = f"redistribute {TEXT} --task text --amounts 0,0.5,1 --set prompts.copied=0"


@pytest.fixture(scope="module")
def sinks_run(lens_command, tmp_path_factory):
    answer = lens_command(*SINKS.split(), "--out", tmp_path_factory.mktemp("sinks"), "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


@pytest.fixture(scope="module")
def moved_run(lens_command, tmp_path_factory):
    answer = lens_command(*MOVE.split(), "--out", tmp_path_factory.mktemp("moved"), "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


def test_every_step_leaves_its_section_and_the_folders_are_whole(sinks_run, moved_run):
    assert sinks_run.sections == [
        *("detection", "mechanism", "kinds", "effects", "first_token", "dose"),
        *("redistribution", "streaming", "spectrum"),
    ]
    assert moved_run.sections == ["dose", "search"]
    assert validate(sinks_run) == []
    assert validate(moved_run) == []


def test_the_sink_of_the_model_card_is_found(sinks_run):
    heads = sinks_run.section("detection").tables["heads"].sort_values("alpha", ascending=False)
    assert (heads.iloc[0]["layer"], heads.iloc[0]["head"]) == (1, 0)
    assert sinks_run.section("effects").configuration["head"] == "L1H0"
    assert "BOS added, n = 4" in sinks_run.section("detection").summary[0]


def test_the_edit_is_that_of_the_library(sinks_run):
    model = load("text-lm-3l")
    texts = [list(map(int, ids)) for ids in sinks_run.prompts["token_ids"]]
    expected = lens.effect(model, texts, lens.edits.Mask("first"), seed=0).table()
    table = sinks_run.section("effects").tables["edits"]
    table = table[(table["edit"] == "mask") & (table["scope"] == "all heads")]
    assert table["delta_loss"].tolist() == pytest.approx(expected["delta_loss"].tolist(), rel=1e-4)
    assert table["condition"].tolist() == expected["condition"].tolist()


def test_each_edit_has_a_control_and_says_where_the_mass_went(sinks_run):
    section = sinks_run.section("effects")
    summary = section.summary
    edits = section.tables["edits"][["edit", "scope"]].drop_duplicates()
    for words in ("control of equal mass", "alpha rose"):
        assert sum(words in text for text in summary) == len(edits)
    assert len(set(summary)) == len(summary)
    assert {"source_before", "other_after"} <= set(section.tables["migration"])


def test_the_report_goes_from_the_keys_to_the_dark_band(sinks_run):
    detection = sinks_run.section("detection").tables
    keys = detection["keys"]
    assert set(keys.loc[keys["prompt"] == 0, "key"]) == {0}
    first = sinks_run.section("first_token").tables
    assert set(first["bos"]["reach"]) == {"with BOS", "without BOS"}
    assert first["activity"].loc[first["activity"]["loss"].notna(), "domain"].nunique() == 3
    moved = sinks_run.section("redistribution").tables["response"]
    assert moved["amount"].tolist() == [1.0]
    control = sinks_run.section("redistribution").tables["control"]
    assert control["condition"].tolist() == ["edit", "mass"]
    assert control["delta_loss"][0] == pytest.approx(moved["delta_loss"][0], rel=1e-3)
    energies = sinks_run.section("spectrum").tables["energies"]
    assert energies.groupby("weight")["energy"].sum().tolist() == pytest.approx([1] * 4)
    summaries = [text for name in sinks_run.sections for text in sinks_run.section(name).summary]
    assert len(set(summaries)) == len(summaries)


def test_redistribution_reports_the_task_the_side_effects_and_the_held_out_choice(moved_run):
    dose, search = moved_run.section("dose"), moved_run.section("search")
    assert dose.tables["response"]["amount"].tolist() == [0.5, 1.0]
    gain, loss = dose.tables["response"]["gain"], dose.tables["side_effects"]["delta_loss"]
    assert gain.tolist() == pytest.approx((-loss).tolist(), abs=1e-4)  # the task is the same text
    assert search.tables["judged"]["prompts"].tolist() == ["validation", "test", "test"]


def test_the_largest_amount_stands_beside_as_much_attention_elsewhere(moved_run):
    dose = moved_run.section("dose")
    for name in ("control", "side_control"):
        assert dose.tables[name]["condition"].tolist() == ["edit", "mass"], name
        assert dose.tables[name]["amount"].tolist() == [1.0, 1.0]
    done = "Edit Move first (amount 1) of all heads changes the loss by "
    for where in ("On the task", "On text"):
        (said,) = [one for one in dose.summary if one.startswith(f"{where}: ")]
        assert said.startswith(f"{where}: {done}")
        assert " control of equal mass" in said
    assert not any("no control" in one for one in dose.limits)


def test_the_control_that_is_told_is_chosen_by_its_kind():
    words = [
        ("mass", "beside mass"),
        ("size", "beside size"),
        ("effect", "does it"),
        ("norm", "beside norm"),
    ]
    said = tuple(Sentence(text, kind=kind) for kind, text in words)

    def effect(*missing):
        return SimpleNamespace(findings=lambda: said, missing=dict.fromkeys(missing, "why"))

    assert in_short(effect()) == "does it beside mass"
    assert in_short(effect("mass")) == "does it beside norm"
    assert in_short(effect("mass", "norm", "size")) == "does it"


def test_sinks_need_text(lens_command, tmp_path):
    answer = lens_command(
        *["sinks", "--model", "induction-2l", "--set", "prompts.copied=2", "--out"], tmp_path
    )
    assert answer.code == 2
    assert "--text" in answer.err


def test_the_rules_of_the_command_are_those_of_the_library():
    assert set(get_args(Rule)) == set(redistribute.EDIT_OF)
    assert not set(get_args(Rule)) & set(NOT_FROM_A_COMMAND)


@pytest.mark.parametrize(
    ("rule", "amount", "words"),
    [
        ("act", "0.6", "Keys after the first with alpha above 5 / N"),
        ("off_by_one", "1", "exp(x) / (1 + sum exp(x))"),
        ("logit_bias", "-2", "added to the first token's logit"),
        ("learned_sink", "1", "whose exp(logit) is the amount"),
        ("drop", "0.5", "sum to less than 1"),
    ],
)
def test_every_other_rule_runs_and_says_what_it_does(rule, amount, words):
    model = load("text-lm-3l")
    ids = model.encode(prompts.text("moby-dick"))
    texts = [[0, *ids[at : at + 40]] for at in (0, 40)]
    config = {"what": "redistribute", "analysis": {"rule": rule, "amounts": amount}}
    settings = make_config(config).analysis
    subject = SimpleNamespace(model=model, text_windows=texts, settings=settings, seed=0)
    section = redistribute.redistribution(subject)
    assert words in section.limits[0]
    change = section.tables["response"]["delta_loss"][0]
    assert np.isfinite(change)
    assert change != 0
    expected = (
        "found by alpha" if rule == "act" else "first" if rule in ("drop", "logit_bias") else "none"
    )
    assert section.configuration["sources"] == expected
    assert ("maps" in section.figures) == (rule == "drop")
    assert any("There is no control" in one for one in section.limits) == (rule != "drop")
