"""`lens patch`: the maps of layer by token in a section, in the report, on their page and against the library."""

from dataclasses import replace

import numpy as np
import pytest
from lens_analyses.steps import patching
from lens_dashboards.library import Library
from lens_dashboards.views import render

import lens
from lens.circuits.patches.effects import PatchEffects
from lens.runs import open_run
from lens.runs.validation import validate

COMMAND = "patch --model induction-2l --copied 1 --n 8 --seed 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory, lens_command):
    out = tmp_path_factory.mktemp("patch")
    answer = lens_command(*COMMAND.split(), "--out", out, "--json")
    assert answer.code == 0, answer.err
    return open_run(answer.json["path"])


@pytest.fixture(scope="module")
def model():
    return lens.load("induction-2l")


@pytest.fixture(scope="module")
def task(model):
    return lens.tasks.induction(model, 8, 2)


def grid(found, stream, nodes):
    """[nodes, positions] of the effects in a section's table."""
    table = found.tables["effects"].query(f"stream == {stream!r}").copy()
    table["at"] = table["position"].str.partition(" ")[0].astype(int)
    return table.set_index(["node", "at"])["effect"].unstack().loc[list(nodes)]


def test_the_maps_are_those_of_the_library(run, model, task):
    found = run.section("patching")
    assert run.unsupported == {}
    assert validate(run) == []
    assert set(found.figures) == {"residual", "attention", "heads"}, "it has no MLPs"
    assert "The model has no MLPs." in found.limits
    effects = found.tables["effects"]
    for stream in ("residual", "attention"):
        theirs = lens.circuits.patch(
            model, task, stream, positions="each", direction="denoising", progress=False
        )
        np.testing.assert_allclose(grid(found, stream, theirs.nodes), theirs.effects, atol=1e-6)
    tokens = model.token_strings(task.prompts[0])
    assert set(effects["position"]) == {f"{at} {token!r}" for at, token in enumerate(tokens)}
    heads = found.tables["heads"]
    assert set(heads["name"]) == {f"L{layer}H{head}" for layer in range(2) for head in range(4)}
    assert len(heads) == 8 * task.length


def test_what_was_found_is_said_with_interval_and_baseline(run):
    found = run.section("patching")
    most = found.tables["effects"].query("stream == 'residual'")["effect"].max()
    assert found.summary[0].startswith(
        f"No single token of the residual stream brings back 0.1 of the answer or more (at most {most:.2f} ["
    )
    for name in ("Residual stream", "Attention"):
        assert any(
            one.startswith(f"{name}: Of ") and "the median place" in one for one in found.summary
        )
    assert {one.figure for one in found.headlines} == {
        "attention"
    }  # of many single heads none stands out
    for one in found.headlines:
        assert one.low <= one.value <= one.high
        assert f"{-one.value:.3g} [{-one.high:.3g}, {-one.low:.3g}]" in one.text, "the loss falls"
        assert one.baseline < one.value
    assert "Where the answer is carried in induction-2l" in (run.path / "report.html").read_text()


def test_the_page_shows_the_map_that_is_chosen(run):
    library = Library(run.path.parent)
    shown = str(render(library, f"/run/{run.id}/patching", "?stream=heads"))
    best = run.section("patching").tables["heads"].iloc[0]
    assert "Strongest places of single heads" in shown
    assert f"a{best['layer']}.h{best['head']}" in shown
    assert "corruption: counterfactual" in shown


def test_noise_needs_no_pairs_and_patches_single_heads_too(lens_command, tmp_path, model):
    words = (
        "patch --model induction-2l --copied 1 --n 2 --corruption noise --streams residual,heads"
    )
    answer = lens_command(*words.split(), "--noise", "2", "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    found = open_run(answer.json["path"]).section("patching")
    heads = [f"a{layer}.h{head}" for layer in range(2) for head in range(4)]
    for stream, nodes in (("residual", "residual"), ("heads", heads)):
        theirs = lens.circuits.patch(
            model,
            lens.tasks.induction(model, 2, 0),
            nodes,
            positions="each",
            direction="denoising",
            noise=2.0,
            progress=False,
        )
        np.testing.assert_allclose(grid(found, stream, theirs.nodes), theirs.effects, atol=1e-6)
    assert set(found.figures) == {"residual", "heads"}
    assert any("Noise of 2 standard deviations" in one for one in found.limits)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--task text --text-name lily", "--task text has no paired prompts to patch from"),
        ("--streams residual,head", "must be some of residual, attention, mlp, heads"),
        ("--corruption noise --noise 0", "--noise must be a number above 0"),
        ("--corruption noise --at s2", "analysis.at must be a mark of the task"),
    ],
)
def test_what_cannot_be_patched_is_refused_before_the_profile(
    lens_command, tmp_path, words, reason
):
    answer = lens_command(
        *["patch", "--model", "induction-2l", "--copied", "1"], *words.split(), "--out", tmp_path
    )
    assert answer.code == 2, answer.err
    assert reason in answer.err
    assert not list(tmp_path.iterdir())


def _effects(letter, effects):
    return PatchEffects(
        tuple(f"{letter}{layer}" for layer in range(3)),
        ("0 'a'", "1 'b'", "2 'c'"),
        1 + np.repeat(effects[:, :, None], 2, 2),
        np.ones(2),
        np.full(2, 2.0),
        "denoising",
        (),
        "logit difference",
        "ioi",
        "m",
    )


def test_what_single_precision_makes_of_nothing_is_no_headline():
    effects = np.full((3, 3), 6e-8)
    assert patching._strongest("mlp", _effects("m", effects)) is None
    effects[1, 2] = 0.4
    told = patching._strongest("mlp", _effects("m", effects))
    assert "m1 at token 2 'c' alone changes the logit difference by +0.4" in told.text
    assert told.text.endswith(" between both runs; the median of MLPs by +0.")
    assert told.baseline == 0
    rises = replace(_effects("m", -effects), source=-np.ones(2) * 2, metric="loss")
    told = patching._strongest("mlp", rises)
    assert "alone changes the loss by -0.4" in told.text, "a change has its own sign"


@pytest.mark.parametrize(
    ("high", "said"),
    [
        (True, "0 'a' from r0 on (0.90 [0.90, 0.90]), then 2 'c' from r2 on (0.70 [0.70, 0.70])"),
        (False, None),
    ],
)
def test_where_the_stream_carries_the_answer(high, said):
    effects = np.array([[0.9, 0.0, 0.1], [0.6, 0.2, 0.5], [0.1, 0.0, 0.7]]) * (1 if high else 0.04)
    sentence = patching._carried(_effects("r", effects))
    if said is None:
        assert "No single token" in sentence
        assert "brings back 0.1 of the answer or more (at most 0.04 [0.04, 0.04])" in sentence
    else:
        assert (
            f"most brings back {said}; 1 is all of the answer, less than 0.1 is not named."
            in sentence
        )


def test_runs_of_one_metric_have_nothing_to_move():
    """Not NaN of the answer: corrupt prompts may leave what is measured, such as the accuracy, as it is."""
    found = replace(_effects("r", np.full((3, 3), 0.2)), source=np.ones(2))
    assert np.isnan(found.effects).all()
    assert "largest none, both runs have the same metric" in repr(found)
    assert patching._strongest("mlp", found) is None
    assert patching._carried(found) == ""
    (told,) = found.findings()
    assert told.startswith("Both runs have the same logit difference (1, mean of 2 prompts)")
    assert len(found.plot().data) == 1
