"""CPU seconds of every test file, those of finished child processes included: what a change of the tests costs.

    python -m pytest -n 3 --dist loadfile -p tests.costs

Seconds on the clock depend on what else the machine does; these hardly do.
"""

import os
from collections import Counter
from typing import Any

import pytest

_files: Counter[str] = Counter()
_tests: Counter[str] = Counter()
_last = 0.0


def _cpu() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def pytest_collection_finish() -> None:
    """Imports and collection are not counted."""
    global _last
    _last = _cpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Any:
    """Each report carries what was spent since the one before it, from the worker to where all are counted."""
    global _last
    report = yield
    now = _cpu()
    report.cpu, _last = now - _last, now
    return report


def pytest_runtest_logreport(report: Any) -> None:
    _files[report.nodeid.partition("::")[0]] += report.cpu
    _tests[report.nodeid] += report.cpu


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section(f"{_files.total():.0f} CPU seconds in {len(_files)} files")
    for counted, most in ((_files, 40), (_tests, 40)):
        for name, seconds in counted.most_common(most):
            if seconds >= 0.5:
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
