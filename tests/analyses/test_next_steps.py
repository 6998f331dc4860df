"""Commands that pages and messages tell a user to type: each is run as it stands, quoted by a shell's rules."""

import json
import re
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import tomli_w
from lens_analyses.config import load_config, make_config
from lens_analyses.jobs.desk import JobDesk
from lens_analyses.steps import STEPS
from lens_dashboards.library import Library
from lens_dashboards.pages import (
    circuits,
    head,
    heads,
    overview,
    patching,
    policies,
    reading,
    redistribution,
    sinks,
)
from lens_dashboards.pages.next_steps import WORDS
from lens_dashboards.pages.tabs import holds
from lens_dashboards.selection import Selection

from lens.common.errors import LensError
from lens.runs import commands, open_run

PAGES = {
    "overview": overview.page,
    "heads": heads.page,
    "sinks": sinks.page,
    "redistribution": redistribution.page,
    "policies": policies.page,
    "circuits": circuits.page,
    "patching": patching.page,
    "reading": reading.page,
    "head": head.page,
}
TEXT = {"text_name": "lily", "tokens": 40, "windows": 2}
RUNS = {
    "profile": ({}, ()),
    "heads": ({"task": "ioi", "measures": "ablation/mean"}, ()),
    "sinks": ({"edits": "mask", "rule": "mask"}, ()),
    "redistribute": ({"task": "text", "rule": "learned_sink", "amounts": "0,3"}, ()),
    "policies": ({"sections": "policies", "block": 8}, ()),
    "mixers": ({"block": 8}, ()),
    "explain": ({"task": "ioi", "sections": "explain", "heads": "L1H0"}, ()),
    "examples": ({"n": 1, "top": 3}, ()),
    "generate": ({"new": 8}, ()),
    "patch": ({"task": "ioi", "corruption": "noise", "at": "s2"}, ()),
    "circuit": ({"task": "ioi", "method": "eap"}, ()),
    "vision": ({"overlays": "L1H0"}, tuple(WORDS)),
}
"""Analysis -> settings of its own, and what cannot follow."""


@pytest.fixture(scope="module", params=["text", "copied"])
def folder(request, run_folder, lens_command, tmp_path_factory):
    """A profile in a folder whose name a shell must quote."""
    out = tmp_path_factory.mktemp("runs") / "it's my runs"
    if request.param == "text":
        shutil.copytree(run_folder, out / run_folder.name)
        return out / run_folder.name
    model = ["--model", "induction-2l", "--copied", "2", "--copied-length", "9"]
    return open_run(lens_command("run", *model, "--out", out, "--json").json["path"]).path


def shown(folder, page, starts_jobs=False):
    """What a page says, as text."""
    library = Library(folder.parent, starts_jobs)
    return json.dumps(
        [
            part.to_plotly_json()
            for part in PAGES[page](library, Selection(page=page, run=folder.name))
        ],
        default=lambda one: one.to_plotly_json(),
    )


def lines(text):
    """The commands in it that stand alone to be copied; what a sentence names is none of them."""
    alone = r'"children": \{"props": \{"children": "(lens (?:[^"\\]|\\.)*)"'
    return [json.loads(f'"{found}"') for found in re.findall(alone, text)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_is_taken(folder, page, lens_command):
    text = shown(folder, page)
    found = lines(text)
    has_text = "text" in set(open_run(folder).prompts["kind"])
    assert bool(found) or not has_text
    for line in found:
        words = shlex.split(line)
        assert words[:1] == ["lens"]
        assert words[-2:] == ["--out", str(folder.parent)]
        answer = lens_command(*words[1:], "--dry-run", "--json")
        assert answer.code == 0, (line, answer.err)
        assert answer.json["what"] == words[1]
    if not has_text and page in ("sinks", "policies"):
        assert re.search(rf'"children": "lens {page}".*?" needs text, and this run has', text)


@pytest.mark.parametrize("whose", RUNS)
def test_the_command_and_the_job_after_any_run_are_one_and_are_taken(whose, tmp_path):
    analysis, refused = RUNS[whose]
    prompts = {"image": "cat.png"} if whose == "vision" else TEXT
    given = {"what": whose, "prompts": prompts, "capture": {"block_size": 8}, "seed": 3}
    ran = make_config(given | ({"analysis": analysis} if analysis else {})).fitted(10**6)
    config = ran.as_mapping()
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config))
    assert follows(config, tmp_path) == set(WORDS) - set(refused)
    for what in set(WORDS) - set(refused):
        typed = load_config(tmp_path / "config.toml", {"what": what})
        assert typed == load_config(None, commands.settings(config, what)), what
        assert (typed.seed, typed.prompts.text_name, typed.capture.block_size) == (3, "lily", 8)
        if analysis.get("task") == "ioi" and what in ("heads", "patch", "circuit", "explain"):
            assert typed.analysis.task == "ioi"


def test_after_labelled_prompts_and_parts_only_what_takes_them_follows(tmp_path):
    labelled = {"what": "heads", "prompts": {"images": "folder"}, "analysis": {"task": "labels"}}
    assert follows(labelled, tmp_path) == {"heads", "sinks", "redistribute", "circuit"}
    part = {"what": "profile", "prompts": {"audio": "a.wav"}, "model": {"part": "cross"}}
    assert follows(part, tmp_path) == {"heads", "sinks"}


def follows(config, folder):
    """The analyses whose commands are told."""
    found = set()
    for what in WORDS:
        with suppress(LensError):
            commands.analysis(folder, config, what)
            found.add(what)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "what"),
    [
        ("text", "redistribute"),
        ("copied", "circuit"),
        ("copied", "redistribute"),
        pytest.param("text", "circuit", marks=pytest.mark.exhaustive),
    ],
    indirect=["folder"],
)
def test_a_command_makes_its_run_beside_the_other(folder, what, lens_command, monkeypatch):
    monkeypatch.setitem(STEPS, what, STEPS[what][:1])
    run = open_run(folder)
    try:
        line = commands.analysis(folder, run.config, what)
    except LensError:
        assert what in commands.NEED_TEXT
        return
    answer = lens_command(*shlex.split(line)[1:], "--json", "--set", "analysis.n=4")
    assert answer.code == 0, answer.err
    made = open_run(answer.json["path"])
    assert made.path.parent == folder.parent
    assert made.config["prompts"] == run.config["prompts"]
    assert made.config["capture"] == run.config["capture"]
    assert made.sections == [STEPS[what][0].name]


def test_a_run_is_completed_by_the_command_that_is_told(folder, lens_command):
    answer = lens_command(*shlex.split(commands.again(folder, open_run(folder).meta))[1:], "--json")
    assert answer.code == 0, answer.err
    assert answer.json["path"] == str(folder)


def test_with_jobs_a_button_starts_it(folder):
    assert "data-job" not in shown(folder, "circuits")
    text = shown(folder, "circuits", starts_jobs=True)
    (sent,) = re.findall(r'"data-job": "((?:[^"\\]|\\.)*)"', text)
    job = json.loads(json.loads(f'"{sent}"'))
    desk = JobDesk(folder.parent)
    desk.submit(job["kind"], job["settings"])
    (queued,) = desk.state()["jobs"]
    assert queued["command"].startswith("lens circuit ")
    config = open_run(folder).config
    assert f"--model {config['model']['name']}" in queued["command"]


def test_an_empty_page_is_told_by_its_tab(folder):
    run = open_run(folder)
    assert not any(holds(run, page) for page in ("sinks", "redistribution", "policies", "circuits"))
    assert all(holds(run, page) for page in ("overview", "heads", "atlas", "provenance"))
    assert "Sinks (empty)" in shown(folder, "overview")


ROOT = Path(__file__).parents[2]
README = re.search(
    r"## On the command line\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
)


@pytest.mark.parametrize(
    "line",
    [
        line.partition("#")[0]
        for line in README[1].splitlines()
        if "--model text-lm-3l" in line or "induction-2l" in line
    ],
)
def test_every_command_of_the_readme_on_embedded_models_is_taken(line, lens_command):
    answer = lens_command(*shlex.split(line)[1:], "--dry-run")
    assert answer.code == 0, answer.err
