"""A real run, its server and a real browser."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lens.runs import open_run
from tests.dashboards.repeated import repeat_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder with one real run of `text-lm-3l`, made by the command that users type."""
    from lens_analyses.cli import main

    folder = tmp_path_factory.mktemp("runs")
    command = "run --text-name moby-dick --tokens 101 --windows 2 --copied 2 --copied-length 43"
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--block-size", "16", "--out", str(folder), "--quiet"])
    assert ended.value.code == 0
    return folder


@pytest.fixture(scope="session")
def run(runs):
    """The run."""
    return open_run(next(path.parent for path in runs.glob("*/run.json")))


@pytest.fixture(scope="session")
def heads_run(tmp_path_factory):
    """A real run of `lens heads` on the model whose induction heads are redundant."""
    command = "heads --model induction-2l --copied 2 --n 4 --measures ablation/mean,gradient"
    return _run_of(tmp_path_factory, "heads", command)


@contextmanager
def served(app) -> Iterator[str]:
    """The address of a Dash app on a free port, as long as the block lasts."""
    from lens_dashboards.listening import listen, make_server
    from waitress import wasyncore

    server = make_server(app.server, listen("127.0.0.1", 0), threads=8)
    thread = threading.Thread(target=server.run)
    thread.start()

    def close() -> None:
        """In the server's own loop, which ends when nothing is open: browsers keep their connections."""
        for channel in list(server.active_channels.values()):
            channel.handle_close()
        wasyncore.close_all(server._map, ignore_all=True)

    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        server.task_dispatcher.shutdown()
        server.trigger.pull_trigger(close)
        thread.join()


@pytest.fixture(scope="session")
def serve():
    """Serves folders of runs on free ports; returns the address of each."""
    from lens_dashboards.server import create_app

    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(served(create_app(folder)))


@pytest.fixture(scope="session")
def address(serve, runs) -> str:
    """Where the real run is served."""
    return serve(runs)


@pytest.fixture
def page(browser, address):
    """A page that fails the test for a console error, a page error or a request elsewhere."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    tab = context.new_page()
    problems: list[str] = []
    allowed = ("http://127.0.0.1:", "data:", "blob:")
    tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith(allowed) else problems.append(r.url))
    tab.problems = problems
    yield tab
    context.close()
    assert problems == []


def _run_of(tmp_path_factory, name, command, steps=()):
    """A real run of a command, in a folder of its own; of its analyses only `steps` if given."""
    from lens_analyses.cli import main
    from lens_analyses.steps import STEPS

    folder, what = tmp_path_factory.mktemp(name), command.split()[0]
    with pytest.MonkeyPatch.context() as patch:
        if steps:
            patch.setitem(STEPS, what, tuple(step for step in STEPS[what] if step.name in steps))
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--out", str(folder), "--quiet"])
    assert ended.value.code == 0
    return open_run(next(path.parent for path in folder.glob("*/run.json")))


@pytest.fixture(scope="session")
def circuit_run(tmp_path_factory):
    """A real run of `lens circuit`."""
    return _run_of(tmp_path_factory, "circuit", "circuit --model induction-2l --copied 2 --n 8")


@pytest.fixture(scope="session")
def explain_run(tmp_path_factory):
    """A real run of `lens explain`."""
    command = "explain --model induction-2l --task induction --n 2 --copied 1 --heads L1H0,L1H2"
    return _run_of(tmp_path_factory, "explain", command, ("explain",))


@pytest.fixture(scope="session")
def patch_run(tmp_path_factory):
    """A real run of `lens patch`."""
    command = "patch --model induction-2l --copied 1 --n 2 --streams residual"
    return _run_of(tmp_path_factory, "patch", command)


_TEXT = "--text-name moby-dick --tokens 64 --windows 4 --n 4 --set analysis.length=64"
_ON_TEXT = f"--model text-lm-3l {_TEXT} --set prompts.copied=0"


@pytest.fixture(scope="session")
def sinks_run(tmp_path_factory):
    """A real run of `lens sinks` on the model whose sink does not matter."""
    command = f"sinks {_ON_TEXT} --edits mask --amounts 0,1"
    return _run_of(tmp_path_factory, "sinks", command, ("detection", "mechanism", "effects"))


@pytest.fixture(scope="session")
def redistribute_run(tmp_path_factory):
    """A real run of `lens redistribute`."""
    command = f"redistribute {_ON_TEXT} --task text --amounts 0,0.5,1"
    return _run_of(tmp_path_factory, "moved", command, ("dose",))


@pytest.fixture(scope="session")
def big_run(tmp_path_factory, run):
    """A run as large as one of 32 layers of 32 heads."""
    return repeat_run(tmp_path_factory.mktemp("big"), run, 32, 32)
