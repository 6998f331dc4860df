"""`lens generate`: prompt and written text as one trace in a run folder, step by step on the page of a head."""

import re

import pandas as pd
import pytest
import torch
from lens_analyses.steps.generation import LABEL, _headlines

from lens.passes.loading import load
from lens.runs import open_run
from lens.runs.validation import validate
from tests.dashboards.conftest import served

COMMAND = (
    "generate --text-name moby-dick --tokens 14 --windows 2 --copied 1 --copied-length 6 --new 5"
)


@pytest.fixture(scope="module")
def folder(lens_command, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lens_analyses.estimate._WORTH_WORDS", 0.0)
        answer = lens_command(*COMMAND.split(), "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert re.search(r"generation, about \d+ s of the run left", answer.err)
    return open_run(answer.json["path"]).path


def test_the_prompts_hold_what_the_model_wrote(folder):
    run, model = open_run(folder), load("text-lm-3l")
    assert validate(run) == []
    rows = run.prompts.set_index("prompt_id")
    assert rows["tokens"].tolist() == [19, 19, 13]  # the copied prompt is not written on
    ids = list(map(int, rows.loc["p001", "token_ids"]))
    with torch.no_grad():
        chosen = model.model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert ids[14:] == chosen[13:18]
    trace = run.trace("p001")
    assert trace.attrs["prompt_tokens"] == 14
    assert trace.dataset["token_id"].values.tolist() == ids
    assert "prompt" not in set(run.heads["metric"])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h1>What heads look at while this model writes: text-lm-3l" in page


def test_the_section_has_each_step_and_each_head(folder):
    run = open_run(folder)
    section = run.section("generation")
    steps, heads = section.tables["steps"], section.tables["heads"]
    assert len(steps) == 2 * 5
    trace = run.trace("p000")
    mass = trace.match_mass.sel(match="prompt").values[:, :, 14:]
    assert steps.query("prompt_id == 'p000'")["prompt"].tolist() == pytest.approx(mass.mean((0, 1)))
    assert steps["prompt_uniform"].iloc[0] == pytest.approx(14 / 15)
    own = [
        run.trace(name).match_mass.sel(match="prompt").values[..., 14:] for name in ("p000", "p001")
    ]
    assert heads["prompt"].tolist() == pytest.approx(sum(own).mean(-1).ravel() / 2)
    assert {one.against for one in section.headlines} == {"uniform attention"}


def test_a_finished_run_is_found_again_and_nonsense_is_refused(folder, lens_command):
    again = lens_command(*COMMAND.split(), "--out", folder.parent, "--json")
    assert again.json["computed"] is False
    refused = lens_command(*COMMAND.split(), "--temperature", "hot", "--out", folder.parent)
    assert (refused.code, "0 (the likeliest token) or more" in refused.err) == (2, True)


def test_the_slider_shows_how_far_the_text_had_come(folder, browser):
    from lens_dashboards.server import create_app

    with served(create_app(folder.parent)) as address:
        page = browser.new_page()
        page.goto(f"{address}/run/{folder.name}/head/1/3")
        page.wait_for_selector("#map[data-ready]")
        slider = page.locator(".map-steps input")
        page.wait_for_selector("#strip[data-query='18']")
        for query in (17, 16, 15):
            slider.press("ArrowLeft")
            page.wait_for_selector(f"#strip[data-query='{query}']")
        assert "q1=16&k0=0&k1=16&query=15" in page.url
        assert page.locator(".map-steps output").inner_text().startswith("token 2 of 5")
        page.reload()
        page.wait_for_selector("#map[data-ready='tokens 0,16 0,16']")
        assert slider.input_value() == "2"
        page.close()


def test_no_head_is_set_beside_uniform_attention_where_masks_leave_that_unknown():
    """GPT-Neo's local layers have a mask of their own; the whole section failed for its headline."""
    rows = {"name": ["L0H0", "L1H0"], LABEL: [0.2, 0.6]}
    rows |= {f"{LABEL}_{end}": rows[LABEL] for end in ("low", "high")}
    known = pd.DataFrame(rows | {f"{LABEL}_uniform": [0.3, 0.3]})
    assert [one.value for one in _headlines(known)] == [0.6, 0.2]
    assert not list(_headlines(known.assign(**{f"{LABEL}_uniform": [0.3, float("nan")]})))
