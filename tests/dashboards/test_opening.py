"""`lens.open` and `result.view()`: what is in memory, served from a run folder of its own until it is closed."""

import json
import urllib.error
import urllib.request

import numpy as np
import pytest

import lens
from lens.common.errors import LensError
from lens.runs import open_run
from lens.runs.opening import _written
from lens.runs.validation import validate


@pytest.fixture(scope="module")
def traces():
    model = lens.load("induction-2l")
    return lens.capture(
        model, [[5, 6, 7, 5, 6, 7, 5, 6], [9, 8, 9, 8, 9]], keep_qk=True, progress=False
    )


def _read(address):
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.headers, answer.read()


def test_traces_and_results_are_served_until_they_are_closed(traces, page):
    found = lens.heads.patterns(traces)
    with lens.open(traces, found) as opened:
        assert validate(opened.run) == []
        address = opened.url.partition("/run")[0]
        headers, body = _read(f"{address}/api/run/{opened.run.id}/raster/p001/L1H2")
        [size] = json.loads(headers["X-Raster"])
        values = np.frombuffer(body, "<f4").reshape(size["rows"], size["columns"])
        exact = traces[1].tile(1, 2, (0, 5), (0, 5))
        np.testing.assert_allclose(np.nan_to_num(values), np.tril(exact), atol=1e-6)
        section = opened.run.section("pattern_classes")
        assert section.tables["table"]["name"].tolist() == found.table()["name"].tolist()
        own = page.context.browser.new_page()
        own.goto(opened.url)
        own.wait_for_selector("#map[data-ready='tokens 0,8 0,8']", timeout=60_000)
        own.goto(f"{address}/run/{opened.run.id}/analysis/pattern_classes")
        own.wait_for_selector("h1:has-text('Pattern classes')", timeout=60_000)
        own.close()
        folder = opened.run.path
    assert not folder.exists()
    assert repr(opened) == "Opened(closed)"
    with pytest.raises(urllib.error.URLError):
        _read(address)


def test_a_result_alone_and_a_run_are_shown(traces, run, tmp_path):
    opened = lens.heads.patterns(traces).view()
    assert opened.url.endswith("/analysis/pattern_classes")
    assert b"attention-lens" in _read(opened.url)[1]
    opened.close()
    with lens.open(open_run(run.path)) as shown:
        assert shown.url.endswith(f"/run/{run.id}")
    assert run.path.exists()
    with lens.open(traces[0], folder=tmp_path) as kept:
        assert kept.run.path.parent == tmp_path
    assert validate(open_run(kept.run.path)) == []


def test_nothing_and_something_else_are_refused(traces):
    for given in ((), ("text",), (traces[0], 3)):
        with pytest.raises(LensError, match="shows traces, results and runs"):
            lens.open(*given)


def test_it_loads_unadvertised():
    assert lens.open is not open
    assert "open" not in dir(lens)


def test_two_results_of_one_kind_are_two_sections(traces, tmp_path):
    found = [lens.heads.patterns(traces, budget=budget) for budget in (0.2, 0.5)]
    run = _written(list(traces), found, tmp_path)
    assert [name for name in run.sections if name.startswith("pattern")] == [
        "pattern_classes",
        "pattern_classes_2",
    ]
    titles = [run.section(name).title for name in list(run.sections)[:2]]
    assert titles == ["Pattern classes", "Pattern classes (2)"]
    one, two = (run.section(name).summary for name in list(run.sections)[:2])
    assert one != two
