"""Results on stdout, everything else on stderr, errors in one line with an exit code."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from lens_analyses.console import (
    Output,
    UsageError,
    finite,
    log,
    progress_bar,
    stoppable,
    to_json,
    told_each_minute,
)
from lens_analyses.estimate import Pace

from lens.common.errors import LensError


def leave(output, error):
    """Exit code of a command in which `error` is raised."""
    with pytest.raises(SystemExit) as caught, output.session():
        raise error
    return caught.value.code


def test_a_lens_error_is_one_line_without_traceback(capsys):
    assert leave(Output(), LensError("block size\nis bad; use 64")) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: block size is bad; use 64\n"


def test_wrong_usage_has_its_own_exit_code(capsys):
    assert leave(Output(), UsageError("which text?")) == 2
    assert capsys.readouterr().err == "error: which text?\n"


def test_an_unforeseen_error_says_so_and_debug_shows_where(capsys):
    assert leave(Output(), ZeroDivisionError("by zero")) == 1
    short = capsys.readouterr().err
    assert short.startswith("error: ZeroDivisionError: by zero (not foreseen")
    assert "Traceback" not in short
    assert leave(Output(debug=True), ZeroDivisionError("by zero")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_errors_are_json_on_stdout_too_when_asked_for(capsys):
    leave(Output(json=True), LensError("no such model"))
    said = capsys.readouterr()
    assert json.loads(said.out) == {
        "status": "error",
        "error": {"type": "LensError", "message": "no such model"},
    }
    assert said.err == "error: no such model\n"


def test_quiet_hides_the_log_and_not_the_result(capsys):
    for quiet in (False, True):
        output = Output(quiet=quiet)
        with output.session():
            log.info("loading")
            output.result("the answer", {})
        said = capsys.readouterr()
        assert said.out == "the answer\n"
        assert said.err == ("" if quiet else "loading\n")


def test_a_session_leaves_no_handler_behind():
    before = list(log.handlers)
    leave(Output(), LensError("x"))
    assert log.handlers == before


def test_the_bar_asks_how_much_is_done(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    asked = []

    def completed():
        asked.append(1)
        return 3.0

    with progress_bar(Output(), "model", 4.0, completed):
        pass
    assert asked
    assert "75%" in capsys.readouterr().err


def test_no_bar_without_a_terminal(capsys):
    with progress_bar(Output(), "model", 4.0, lambda: 1.0):
        pass
    assert capsys.readouterr().err == ""


def test_json_has_no_nan():
    data = {"a": [1.5, math.nan, (math.inf, "x")], 2: None}
    assert finite(data) == {"a": [1.5, None, [None, "x"]], "2": None}
    assert json.loads(to_json(data))["a"] == [1.5, None, [None, "x"]]


def test_outside_a_terminal_a_line_now_and_then_says_what_is_going_on(capsys):
    for quiet in (False, True):
        output = Output(False, quiet, False)
        with output.session(), told_each_minute(output, "roles", lambda: ", 50%", every=0.05):
            time.sleep(0.3)
        said = capsys.readouterr().err
        assert ("roles: 0 min so far, 50%" in said) is not quiet


def test_what_is_left_follows_the_speed_that_was_seen():
    pace = Pace({"profile": 10.0, "roles": 100.0, "importance": 300.0, "layers": 90.0})
    assert pace.left() == 500.0
    pace.took("profile", 100.0)  # too little of the whole to tell a speed
    assert pace.left() == 490.0
    pace.took("roles", 230.0)  # 330 s where 110 were expected
    assert pace.left() == pytest.approx(3 * 390)
    assert pace.left("importance", 600.0) == pytest.approx(3 * 390 - 600)
    # 930 s for 110, and 300 more were expected: the rest takes as much longer
    assert pace.left("importance", 1200.0) == pytest.approx((330 + 1200) / 410 * 90)
    assert pace.words("importance", 600.0) == ", about 10 min of the run left"
    pace.took("importance", None)  # finished before: it tells no speed
    assert pace.left() == pytest.approx(3 * 90)
    pace.took("layers", 1.0)
    assert (pace.left(), pace.words()) == (0.0, "")


def test_what_stops_a_run_a_second_time_leaves_it_to_end_in_order():
    """A worker that is killed dies thread by thread, and the system tells its child of each."""
    before = signal.getsignal(signal.SIGTERM)
    closed = False
    with stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            closed = True
    assert closed
    assert signal.getsignal(signal.SIGTERM) == before


NOT_READ = """
from lens_analyses.console import Output, log
output = Output()
with output.session():
    log.warning("nobody reads this")
    log.warning("nor this")
print("done")
"""


def test_a_command_whose_log_nobody_reads_ends_as_if_it_were_read():
    """Python holds back what was not taken, unless it is told not to, and fails on it at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", NOT_READ], stdout=subprocess.PIPE, stderr=writing, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"done\n")
