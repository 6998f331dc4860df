"""The other commands: help, version, demo, estimates, doctor and the way to the dashboard."""

import importlib.util
import shlex
import socket
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from lens_analyses import demo as demo_module
from lens_analyses import viewing
from lens_analyses.cli import main
from lens_analyses.config import (
    CONFIGS,
    WHATS,
    CaptureConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    make_config,
    settings_of,
)
from lens_analyses.doctor import Check, Diagnosis, examine
from lens_analyses.estimate import estimate
from lens_analyses.jobs.store import JobStore
from lens_analyses.steps import STEPS
from lens_analyses.steps.costs import COSTS, Load
from lens_analyses.steps.layers import layers

import lens
from lens.common.errors import LensError

from .conftest import ARGUMENTS

COMMANDS = (
    *(
        "demo",
        "run",
        "heads",
        "sinks",
        "redistribute",
        "policies",
        "mixers",
        "explain",
        "examples",
        "generate",
        "patch",
        "circuit",
        "sweep",
        "view",
        "worker",
    ),
    *("report", "compare", "delete", "export", "list", "validate", "doctor"),
)


def test_help_names_every_command_and_the_exit_codes(lens_command):
    answer = lens_command("--help")
    assert answer.code == 0
    assert all(f"\n  {name} " in answer.out for name in COMMANDS)
    assert "3 partly done" in answer.out


def test_lens_alone_shows_the_help(lens_command):
    assert "Commands:" in lens_command().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(lens_command, command):
    answer = lens_command(command, "--help")
    assert answer.code == 0
    assert answer.out.startswith("Usage: ")
    assert "--debug" in answer.out


def test_where_no_text_is_named_an_embedded_one_is_taken_and_said(lens_command, tmp_path):
    answer = lens_command("run", "--tokens", "12", "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    assert "no text was named: 4 prompts of 12 tokens of moby-dick" in answer.err
    prompts = lens.runs.open_run(next(tmp_path.iterdir())).prompts
    assert prompts.loc[prompts["kind"] == "text", "tokens"].tolist() == [12] * 4


def test_version(lens_command):
    assert lens_command("--version").out == f"attention-lens {lens.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate"],
            "which text? --prompt WORDS, --text FILE, --text-name moby-dick or --prompts FILE",
        ),
        (
            ["run", "--copied", "1", "--tokens", "many"],
            "--tokens must be an integer of at least 1, got 'many'",
        ),
        (["run", "--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["view", "--port", "99999"], "less than or equal to 65535"),
    ],
)
def test_wrong_usage_exits_with_2(lens_command, arguments, message):
    answer = lens_command(*arguments)
    assert answer.code == 2
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_main_takes_arguments_as_a_list(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert "attention-lens" in capsys.readouterr().out


def test_json_alone_is_on_stdout(lens_command, run_folder):
    answer = lens_command(*ARGUMENTS, "--out", run_folder.parent, "--json")
    assert answer.json["status"] == "success"
    failed = lens_command("run", "--text-name", "nothing", "--json")
    assert failed.code == 2
    assert failed.json["error"]["message"].startswith("unknown text 'nothing'")


def test_quiet_says_nothing_on_stderr(lens_command, tmp_path):
    answer = lens_command(
        "run", "--model", "induction-2l", "--copied", "1", "--out", tmp_path, "--quiet"
    )
    assert answer.code == 0
    assert answer.err == ""
    assert "report: " in answer.out


def test_the_demo_finds_what_the_models_are_known_for(lens_command, tmp_path):
    answer = lens_command("demo", "--no-view", "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    found = {run["id"].split("-profile-")[0][11:]: run for run in answer.json["runs"]}
    assert list(found) == ["text-lm-3l", "induction-2l", "stories260k"]
    assert all(Path(run["report"]).exists() for run in found.values())
    said = {name: " ".join(run["findings"]) for name, run in found.items()}
    assert "3 induction heads (of 18 heads)" in said["text-lm-3l"]
    assert "heads with a sink on the first token" in said["text-lm-3l"]
    assert "3 induction heads (of 8 heads)" in said["induction-2l"]
    assert "1 previous-token head (of 8 heads)" in said["induction-2l"]
    assert "No induction head" in said["stories260k"]
    assert "No head with a sink on the first token" in said["stories260k"]

    again = lens_command("demo", "--no-view", "--out", tmp_path)
    assert again.code == 0
    assert again.out.count("finished before") == 3
    assert "3 runs in" in again.out


def test_the_demo_serves_the_dashboard_at_the_end(lens_command, tmp_path, monkeypatch):
    small = tuple(
        config.model_copy(update={"prompts": PromptConfig(copied=1, copied_length=9)})
        for config in demo_module.EMBEDDED[1:2]
    )
    served = []
    monkeypatch.setattr(demo_module, "EMBEDDED", small)
    monkeypatch.setattr(viewing, "check_port", lambda port: None)
    monkeypatch.setattr(
        viewing, "view_runs", lambda runs, port, **more: served.append((runs, port, more))
    )
    answer = lens_command("demo", "--out", tmp_path, "--port", "8799")
    assert answer.code == 0
    assert served == [(tmp_path, 8799, {"jobs": True, "quiet": False})]
    assert "6 more analyses are made while the dashboard serves" in answer.err
    waiting = {job.config["what"]: job for job in JobStore(tmp_path).jobs()}
    assert set(waiting) == {"circuit", "patch", "sinks", "redistribute", "policies", "heads"}

    assert demo_module.queue_later(tmp_path) == 0  # they wait already
    for job in waiting.values():
        JobStore(tmp_path).cancel(job.id)
    monkeypatch.setitem(STEPS, "redistribute", ())  # a run is looked for, whatever its sections
    made = lens_command(*shlex.split(waiting["redistribute"].command)[1:], "--out", tmp_path)
    assert made.code == 0, made.err
    assert demo_module.queue_later(tmp_path) == 5  # all but the one that is there
    for job in JobStore(tmp_path).jobs():
        if job.status == "queued":
            JobStore(tmp_path).cancel(job.id)
    (index,) = tmp_path.glob("*-redistribute-*/run.json")
    index.write_text("{")
    assert demo_module.queue_later(tmp_path) == 6  # a damaged one is made again


def test_the_demo_of_another_model_reads_a_chapter():
    recipe = demo_module._recipe("smollm2-135m")
    assert (recipe.prompts.text_name, recipe.prompts.tokens) == ("moby-dick", 2048)
    assert recipe.prompts.copied == 4
    assert demo_module._recipe("stories260k") is demo_module.EMBEDDED[2]


def test_a_busy_port_stops_the_demo_before_it_computes(lens_command, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = lens_command("demo", "--out", tmp_path / "runs", "--port", port)
        assert answer.code == 1
        assert f"port {port} on 127.0.0.1 is busy; choose another, e.g. --port" in answer.err
        assert not (tmp_path / "runs").exists()
        answer = lens_command("view", tmp_path, "--port", port)
        assert f"port {port} on 127.0.0.1 is busy" in answer.err


def test_view_needs_a_folder(lens_command, tmp_path):
    answer = lens_command("view", tmp_path / "none")
    assert answer.code == 1
    assert "make a run first: `lens demo`" in answer.err


def test_view_of_one_run_serves_its_folder_and_says_its_page(lens_command, run_folder, monkeypatch):
    served = []
    monkeypatch.setattr(
        "lens_dashboards.server.serve", lambda runs, **how: served.append((runs, how))
    )
    answer = lens_command("view", run_folder, "--port", "8798", "--token", "secret")
    assert answer.code == 0, answer.err
    assert f"http://127.0.0.1:8798/run/{run_folder.name}" in answer.err
    assert served == [(run_folder.parent, {"host": "127.0.0.1", "port": 8798, "token": "secret"})]


def test_view_without_the_dashboard_extra(lens_command, tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without_dash(name, *rest, **kwargs):
        if name == "lens_dashboards.server":
            raise ModuleNotFoundError("No module named 'dash'", name="dash")
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_dash)
    answer = lens_command("view", tmp_path, "--port", "8797")
    assert answer.code == 1
    assert (
        "the dashboard needs dash; install it with pip install 'attention-lens[dashboard]'"
        in answer.err
    )


@pytest.mark.slow
def test_view_serves_a_page(spawn_lens, run_folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = spawn_lens("view", run_folder.parent, "--port", port)
    assert process.complaint().startswith(f"dashboard: http://127.0.0.1:{port}/")
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                assert b"attention-lens" in page.read()
                break
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    else:
        raise AssertionError("no page came")
    process.send_signal(2)
    process.communicate(timeout=60)
    assert process.returncode == 0


def sizes(folder):
    return sum(path.stat().st_size for path in (folder / "trace").rglob("*.safetensors"))


def test_the_estimate_counts_tokens_and_bytes(run_folder, lens_command):
    answer = lens_command(*ARGUMENTS, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    forecast = answer.json
    assert (forecast["model"], forecast["prompts"]) == ("text-lm-3l", 5)
    assert (forecast["tokens"], forecast["longest"]) == (3 * 61 + 2 * 23, 61)
    assert forecast["disk"] == pytest.approx(sizes(run_folder), rel=0.05)
    assert forecast["seconds"] > 0
    assert forecast["memory"] > 4 * 430752


@pytest.mark.parametrize(
    ("keep", "dtype"), [(True, "float32"), (False, "float32"), (True, "float16")]
)
def test_the_estimate_of_grouped_queries_and_half_precision(keep, dtype, tmp_path, lens_command):
    config = RunConfig(
        model=ModelConfig(name="stories260k", dtype=dtype),
        prompts=PromptConfig(text_name="lily", tokens=211, copied=0),
        capture=CaptureConfig(block_size=13, keep_qk=keep),
    )
    words = config.command().split()[1:]
    answer = lens_command(*words, "--out", tmp_path, "--json")
    assert answer.code == 0, answer.err
    assert estimate(config).disk == pytest.approx(sizes(Path(answer.json["path"])), rel=0.05)


def test_a_dry_run_of_an_analysis_counts_its_steps(lens_command):
    words = ("heads", "--model", "induction-2l", "--copied", "2", "--dry-run")
    answer = lens_command(*words, "--json")
    assert answer.code == 0, answer.err
    steps = answer.json["steps"]
    wanted = [step.name for step in STEPS["heads"] if step.setting is None]
    assert list(steps) == ["profile", *wanted]
    assert answer.json["seconds"] == pytest.approx(sum(steps.values()))
    assert min(steps.values()) > 0
    assert "(most for " in lens_command(*words).out


def test_every_step_has_a_cost_that_grows_with_its_settings():
    assert {what: list(costs) for what, costs in COSTS.items()} == {
        what: [step.name for step in steps] for what, steps in STEPS.items() if steps
    }

    def tokens(what, step, heads=8, prompts=100, **settings):
        analysis = make_config({"what": what, "analysis": settings}).analysis
        load = Load(analysis, 2, heads, 65, 50_000, prompts, prompts, prompts, 32)
        return COSTS[what][step](load).tokens

    more = {
        ("heads", "importance"): ({"measures": "gradient"}, {"measures": "gradient,ablation"}),
        ("heads", "pruning"): ({"heads": 8}, {"heads": 16}),
        ("sinks", "effects"): ({"edits": "mask"}, {"edits": "mask,drop"}),
        ("sinks", "dose"): ({"amounts": "0,1"}, {"amounts": "0,0.5,1"}),
        ("redistribute", "search"): ({"heads": 8}, {"heads": 16}),
        ("circuit", "edges"): ({"steps": 5}, {"steps": 10}),
        ("circuit", "circuit"): ({"prompts": 100}, {"prompts": 200}),
    }
    for (what, step), (few, many) in more.items():
        assert 0 < tokens(what, step, **few) < tokens(what, step, **many), (what, step)
    longest, short = (tokens("heads", "pruning", heads=heads) for heads in (64, 65))
    assert short < longest  # as `pruning` itself: the curve of 65 heads is cut short


def test_the_cost_of_sub_layers_is_what_their_step_takes(monkeypatch):
    model = lens.load("text-lm-3l")
    task = lens.tasks.induction(model, 4)
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    monkeypatch.setattr("lens.tasks.task.Task.rows_at_once", lambda self, _: self.n)
    subject = SimpleNamespace(model=model, task=task, seed=0, progress=False)
    layers(subject)  # pyright: ignore[reportArgumentType]
    load = Load(None, model.info.layers, 18, 65, 50_000, 0, 1, 0, 32)
    assert COSTS["heads"]["layers"](load).tokens == len(passes) == 24
    many = Load(None, 13, 18, 65, 50_000, 0, 1, 0, 32)
    assert COSTS["heads"]["layers"](many).tokens == 28  # too many to be taken out one after another


@pytest.mark.parametrize("what", WHATS)
def test_every_setting_of_a_command_has_its_flag(lens_command, what):
    text = lens_command("run" if what == "profile" else what, "--help").out
    for one in settings_of(CONFIGS[what]):
        shown = f" {one.flag} " in text.replace(",", " ")
        assert shown == (one.name not in ("what", "prompts.sha256")), one.name


def test_a_dry_run_refuses_what_the_run_would_and_writes_nothing(lens_command, tmp_path):
    answer = lens_command(
        "run", "--text-name", "moby-dick", "--dry-run", "--out", tmp_path / "runs"
    )
    assert answer.code == 2
    assert "takes 128" in answer.err
    text = lens_command(*ARGUMENTS, "--dry-run", "--out", tmp_path / "runs").out
    assert [line.split()[0] for line in text.splitlines()] == [
        "model", "prompts", "time", "memory", "disk",
    ]  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_doctor_looks_at_everything(lens_command):
    answer = lens_command("doctor", "--json")
    checks = {check["name"]: check for check in answer.json["checks"]}
    assert {"python", "torch", "GPU", "CPU kernel", "dash", "browser", "model cache"} <= set(checks)
    assert answer.code == (1 if any(c["state"] == "problem" for c in checks.values()) else 0)
    assert "text-lm-3l" in checks["models"]["found"]
    people = lens_command("doctor").out
    assert all(name in people for name in checks)


def test_doctor_says_what_falls_back(monkeypatch):
    real, gone = importlib.util.find_spec, ("kaleido", "diffusers", "PIL", "onnx")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else real(name, *a)
    )
    checks = {check.name: check for check in examine().checks}
    assert checks["CPU kernel"].state == "fallback"
    assert "no-such-compiler was not found" in checks["CPU kernel"].found
    assert "plain torch" in checks["CPU kernel"].consequence
    assert checks["kaleido"].state == "fallback"
    assert "pip install 'attention-lens[export]'" in checks["kaleido"].consequence
    assert {checks[name].state for name in ("diffusers", "pillow", "onnx")} == {"fallback"}
    assert "`lens diffusion` cannot run" in checks["diffusers"].consequence
    assert checks["browser"].state == "fallback"
    assert examine().exit_code == 0


def test_doctor_survives_what_is_broken(monkeypatch):
    def broken():
        raise OSError("libtorch.so: cannot open\nshared object")

    monkeypatch.setattr("lens_analyses.doctor._torch", broken)
    diagnosis = examine()
    (check,) = [check for check in diagnosis.checks if check.name == "torch"]
    assert check.state == "problem"
    assert check.found == "OSError: libtorch.so: cannot open shared object"
    assert diagnosis.exit_code == 1
    assert "!!  torch" in diagnosis.text()


def test_doctor_text_shows_consequences():
    text = Diagnosis([Check("a", "ok", "1"), Check("bcd", "fallback", "none", "slower")]).text()
    assert text.splitlines() == ["ok  a    1", "--  bcd  none", "         slower"]


def test_check_port_says_what_is_wrong_with_an_address():
    with pytest.raises(LensError, match=r"--host '203\.0\.113\.7' is no address of this machine"):
        viewing.check_port(80, "203.0.113.7")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "vision --model vit-digits --image a.png --image b.png",
            "--image is given twice; give it once (where it takes several values: with commas",
        ),
        ("run --model induction-2l --copied 2 --copied 3", "--copied is given twice; give it once"),
        ("compare a b --seed 1 --seed 2", "--seed is given twice"),
    ],
)
def test_an_option_that_is_given_twice_is_refused(lens_command, words, said):
    answer = lens_command(*words.split())
    assert answer.code == 2
    assert said in answer.err
