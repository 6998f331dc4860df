"""What is shipped and what checks a change: the wheel, the hooks before a commit, the workflow."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

from docs.public import PACKAGES, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of the wheel that a release would ship."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        return set(file.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_says_that_it_is_typed(wheel, package):
    assert f"{package}/py.typed" in wheel


def test_the_wheel_holds_the_four_packages_and_nothing_else(wheel):
    folders = {name.partition("/")[0] for name in wheel}
    assert {name for name in folders if not name.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_ships_every_source_and_the_stubs_that_load_the_rooms(wheel):
    sources = {
        file.relative_to(folder.parent).as_posix()
        for folder in PACKAGES.values()
        for kind in ("py", "pyi")
        for file in folder.rglob(f"*.{kind}")
    }
    assert {"lens/__init__.pyi", "lens/heads/__init__.pyi"} <= sources
    assert sources - wheel == set()


def test_the_hooks_before_a_commit_are_valid_and_those_of_ci():
    config = ROOT / ".pre-commit-config.yaml"
    check = [sys.executable, "-m", "pre_commit", "validate-config", str(config)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [repo] = yaml.safe_load(config.read_text())["repos"]
    commands = {hook["id"]: hook["entry"] for hook in repo["hooks"]}
    assert list(commands) == ["ruff-check", "ruff-format", "pyright"]
    test_extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["test"]
    installed = {re.split(r"[\[>=<]", name)[0] for name in test_extra}
    for entry in commands.values():
        assert entry.split()[0].removeprefix(".venv/bin/") in installed


def test_the_workflow_calls_what_ci_runs():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step][-1] == ".ci/run"
    assert os.access(ROOT / ".ci/run", os.X_OK)
    python = next(step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    for file in python["cache-dependency-path"].split():
        assert (ROOT / file).is_file()


def test_what_is_left_out_runs_every_week_in_the_same_environment():
    daily, weekly = (
        yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
        for name in ("ci", "exhaustive")
    )
    assert weekly[True].keys() == {"schedule", "workflow_dispatch"}  # YAML's `on`
    [[job], [other]] = ([*one["jobs"].values()] for one in (weekly, daily))
    commands = ["make models", "make exhaustive"]
    assert job["steps"] == [*other["steps"][:-1], *({"run": command} for command in commands)]
    assert job["env"] == other["env"] | {"CI": "true"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.split()[1] for command in commands} <= {*targets}


def test_what_the_makefile_installs_of_the_project_is_the_checkout_itself():
    """A copy would stay as it is when the checkout changes."""
    installed = re.findall(r"\$\(PIP\) (.*?)'\.", (ROOT / "Makefile").read_text())
    assert installed
    assert {*installed} == {"-e "}
