"""One small run of the default model, made once, that the tests of this folder read."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from lens_analyses.cli import app
from typer.testing import CliRunner

from lens.runs import open_run

from .started import Started

TEXT = "--text-name moby-dick --tokens 61 --windows 3"
ARGUMENTS = ["run", *TEXT.split(), "--copied", "2", "--copied-length", "11", "--block-size", "7"]


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """stdout as JSON; fails when anything else is there."""
        return json.loads(self.out)


def tables(folder):
    """Head metrics and prompts of a run, without the times."""
    run = open_run(folder)
    return run.heads, run.prompts.drop(columns="seconds")


def file_names(folder):
    """Everything under a folder, as relative paths."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def serious_violations(browser, path, ready="h1"):
    """What axe finds on a page that is a file, once `ready` is there."""
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(bypass_csp=True)
    page.goto(f"file://{path}")
    page.wait_for_selector(ready)
    found = [
        (violation["id"], [node["html"][:120] for node in violation["nodes"]])
        for violation in Axe().run(page).response["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    page.close()
    return found


@pytest.fixture(scope="session")
def lens_command():
    """Run `lens ...` in this process."""

    def run(*arguments: object) -> Answer:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def run_folder(lens_command, tmp_path_factory) -> Path:
    """Three windows of text and two copied prompts through `text-lm-3l`."""
    out = tmp_path_factory.mktemp("runs")
    answer = lens_command(*ARGUMENTS, "--out", out, "--json")
    assert answer.code == 0, answer.err
    return Path(answer.json["path"])


@pytest.fixture
def spawn_lens():
    """Start `lens ...` as a process of its own; killed at the end if it still runs."""
    started = []

    def spawn(*arguments: object, complaints: int | None = None) -> Started:
        started.append(Started(*arguments, complaints=complaints))
        return started[-1]

    yield spawn
    for process in started:
        process.end()
