"""A section that fails in a way that nobody foresaw: the run keeps the others, says so and is tried again."""

import pytest
from lens_analyses import runner
from lens_analyses.estimate import Pace
from lens_analyses.steps import STEPS, circuits, patterns, roles

from lens.runs import open_run
from lens.runs.validation import validate

HEADS = "heads --model induction-2l --copied 2 --n 4 --task induction --measures gradient"
CIRCUIT = "circuit --model induction-2l --task induction --n 4 --copied 2"
SOME = tuple(
    one for one in STEPS["heads"] if one.name in ("roles", "importance", "patterns", "heads")
)
SAID = "the section roles failed: IndexError: index 7 is out of bounds"


def fail(subject):
    raise IndexError("index 7 is\nout of bounds")


@pytest.fixture(scope="module")
def made(lens_command, tmp_path_factory):
    """Output and folder of a run of which one section failed."""
    out = tmp_path_factory.mktemp("failed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles, "roles", fail)
        patch.setitem(STEPS, "heads", SOME)
        answer = lens_command(*HEADS.split(), "--out", out)
    (folder,) = out.iterdir()
    return answer, folder


def test_the_run_is_partial_and_has_the_other_sections(made):
    answer, folder = made
    run = open_run(folder)
    assert (answer.code, run.status) == (3, "partial")
    assert "roles" not in run.sections
    assert {"importance", "patterns", "heads"} <= set(run.sections)
    assert run.unsupported == {}
    assert run.meta["error"] == {"type": "LensError", "message": SAID}
    assert validate(run) == []


def test_every_view_names_the_section_and_why(made, lens_command):
    answer, folder = made
    assert f"not whole: {SAID}; the same command, or `lens run -c " in answer.out
    assert f"report: {folder / 'report.html'}" in answer.out
    assert SAID in (folder / "report.html").read_text()
    assert SAID in lens_command("list", folder.parent).out
    log = (folder / "log.txt").read_text()
    assert "Traceback" in log
    assert "Traceback" not in answer.err


def test_the_same_command_makes_what_is_missing(made, lens_command, monkeypatch):
    _, folder = made
    monkeypatch.setattr(patterns, "patterns", fail)  # is there already
    monkeypatch.setitem(STEPS, "heads", SOME)
    answer = lens_command(*HEADS.split(), "--out", folder.parent, "--json")
    assert (answer.code, answer.json["status"], answer.json["error"]) == (0, "success", None)
    run = open_run(folder)
    assert "roles" in run.sections
    assert run.meta["warnings"] == []


def test_what_needs_a_failed_section_says_so(lens_command, tmp_path, monkeypatch):
    paces = []
    monkeypatch.setattr(circuits, "edges", fail)
    monkeypatch.setattr(runner, "Pace", lambda steps: paces.append(Pace(steps)) or paces[-1])
    answer = lens_command(*CIRCUIT.split(), "--out", tmp_path, "--json")
    assert answer.code == 3
    assert [pace.left() for pace in paces] == [0]  # nothing is waited for that was left out
    run = open_run(answer.json["path"])
    assert (run.sections, run.unsupported) == ([], {})
    assert run.meta["warnings"] == [
        "the section edges failed: IndexError: index 7 is out of bounds",
        "the section circuit failed: needs the section edges, which failed",
        "the section joined failed: needs the section edges, which failed",
        "the section reading failed: needs the section edges, which failed",
    ]


def test_a_full_disk_is_no_fault_of_the_section(lens_command, tmp_path, monkeypatch):
    def full(subject):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(circuits, "edges", full)
    answer = lens_command(*CIRCUIT.split(), "--out", tmp_path)
    assert (answer.code, answer.out) == (1, "")
    (folder,) = tmp_path.iterdir()
    assert open_run(folder).status == "error"


def test_a_sweep_goes_on_after_it(lens_command, tmp_path, monkeypatch):
    monkeypatch.setattr(circuits, "edges", fail)
    plan = tmp_path / "two.toml"
    plan.write_text(
        'models = ["induction-2l"]\n'
        'analyses = [{what = "circuit", tasks = ["induction"]}, "profile"]\n'
        "settings.prompts.copied = 1\nsettings.analysis.n = 4\n"
    )
    answer = lens_command("sweep", "-c", plan, "--out", tmp_path / "runs", "--json")
    assert answer.code == 3
    assert [one["status"] for one in answer.json["runs"]] == ["partial", "success"]
    assert "the section edges failed" in answer.json["runs"][0]["error"]
