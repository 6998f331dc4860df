"""The map of a head as a file of its own and as a widget: the same numbers, nothing fetched."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from lens_dashboards.notebook import attention_map
from lens_dashboards.raster import raster, row
from lens_dashboards.widget import answer_to, make_widget

import lens
from lens.common.errors import LensError


@pytest.fixture(scope="module")
def shown():
    model = lens.load("text-lm-3l")
    trace = lens.capture(
        model, lens.tasks.copied(model, 30), keep_qk=True, block_size=16, progress=False
    )
    return attention_map(trace, 1, 3, query=40)


@pytest.mark.browser
def test_the_file_opens_offline_and_hover_shows_the_probability(browser, shown, tmp_path):
    file = tmp_path / "map.html"
    shown.to_html(file)
    tab = browser.new_page()
    problems = []
    tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: None if r.url.startswith("file:") else problems.append(r.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("#map[data-ready]")
    length = shown.trace.length
    box = tab.locator(".map-canvas").bounding_box()
    left, top, side = map(float, tab.locator(".map-canvas").get_attribute("data-plot").split())
    query, key = 45, 12
    tab.mouse.move(
        box["x"] + left + side * (key + 0.5) / length,
        box["y"] + top + side * (query + 0.5) / length,
    )
    tab.wait_for_selector(".map-tip:visible")
    expected = float(shown.trace.tile(1, 3, (query, query + 1), (key, key + 1))[0, 0])
    numbers = re.findall(r"\d+\.\d+(?:e-?\d+)?", tab.locator(".map-tip").inner_text())
    assert any(abs(float(value) / expected - 1) < 1e-3 for value in numbers)
    assert tab.locator("#strip").get_attribute("data-query") == "40"
    assert tab.locator("#strip .arcs path").count() >= 1
    tab.locator(".map-canvas").focus()
    tab.keyboard.press("+")
    tab.wait_for_function(
        "() => !document.querySelector('#map').dataset.ready.startsWith('tokens 0,61')"
    )
    assert problems == []
    tab.close()


def test_the_inline_map_is_small_pooled_and_has_no_address(shown):
    model = lens.load("text-lm-3l")
    long = lens.capture(
        model, lens.tasks.copied(model, 60), keep_qk=True, block_size=16, progress=False
    )
    page = attention_map(long, 0, 0)._repr_html_()
    assert len(page) < 200_000
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    alone = attention_map(long, 0, 0)
    held = alone._held(alone._raster(64))
    assert held["header"]["level"] == "pooled"
    assert held["header"]["cell"] == 2
    whole = raster(long, 0, 0).values
    pooled = alone._raster(64).values
    assert pooled[20, 6] == np.nanmax(whole[40:42, 12:14])
    assert "the largest value of each 2 × 2 tokens" in attention_map(long, 0, 0).to_html(cells=64)
    assert repr(shown) == (
        "AttentionMap(L1H3 of text-lm-3l: 61 tokens, exact probabilities of single tokens)"
    )
    assert shown.plot().data


def test_the_widget_answers_with_the_numbers_of_the_server(shown):
    ask = {"id": 1, "kind": "raster", "q0": 3, "q1": 20, "k0": 0, "k1": 11, "pooling": "max"}
    header, values = answer_to(shown, ask)
    np.testing.assert_array_equal(values, raster(shown.trace, 1, 3, (3, 20, 0, 11)).values)
    assert (header["rows"], header["columns"], header["level"]) == (17, 11, "tokens")
    _, values = answer_to(shown, {"id": 2, "kind": "row", "query": 7})
    np.testing.assert_array_equal(values, row(shown.trace, 1, 3, 7))
    with pytest.raises(LensError, match="pooling must be one of 'max', 'mean', got 'sum'"):
        answer_to(shown, ask | {"pooling": "sum"})


@pytest.mark.browser
def test_the_script_of_the_widget_draws_in_a_page(browser, shown, tmp_path):
    """A stand-in for the notebook: a model object that answers what Python would answer."""
    pytest.importorskip("anywidget")
    widget = make_widget(shown)
    header, values = answer_to(
        shown, {"kind": "raster", "q0": 0, "q1": 61, "k0": 0, "k1": 61, "pooling": "max"}
    )
    _, last = answer_to(shown, {"kind": "row", "query": 40})
    given = {
        "state": {"config": widget.config, "tokens": widget.tokens, "style": widget.style},
        "raster": [header, np.nan_to_num(values, nan=-1).ravel().tolist()],
        "row": [{}, last.tolist()],
    }
    (tmp_path / "widget.js").write_text(widget._esm)
    page = f"""<!DOCTYPE html><html lang="en"><body><div id="el"></div><script type="module">
    import widget from "./widget.js";
    const given = {json.dumps(given)};
    const heard = [];
    const model = {{
      get: (name) => given.state[name],
      on: (_, callback) => heard.push(callback),
      off: () => heard.pop(),
      send: (message) => {{
        const [header, numbers] = given[message.kind];
        const floats = Float32Array.from(numbers, (v) => (v < 0 ? NaN : v));
        setTimeout(() => heard.forEach((call) => call({{ id: message.id, header }}, [new DataView(floats.buffer)])), 1);
      }},
    }};
    widget.render({{ model, el: document.getElementById("el") }});
    </script></body></html>"""
    folder = {"/": page, "/widget.js": widget._esm}
    tab = browser.new_page()
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.route(
        "http://127.0.0.1:9/**",
        lambda route: route.fulfill(
            body=folder[route.request.url.removeprefix("http://127.0.0.1:9")],
            content_type="text/javascript" if route.request.url.endswith(".js") else "text/html",
        ),
    )
    tab.goto("http://127.0.0.1:9/")
    tab.wait_for_selector(".map[data-ready]")
    tab.wait_for_selector(".strip[data-query='40']")
    assert problems == []
    tab.close()


def test_what_is_not_there_is_refused(shown):
    with pytest.raises(LensError, match="there is no L7H0"):
        attention_map(shown.trace, 7, 0)
    with pytest.raises(LensError, match="there is no query 61"):
        attention_map(shown.trace, 0, 0, query=61)
    with pytest.raises(LensError, match="at least 8 cells a side, got 2"):
        shown.to_html(cells=2)


def test_heads_are_viewed_alone_together_or_by_layer(shown):
    trace = shown.trace
    assert repr(trace.view("L1H3", query=40)) == repr(shown)
    assert trace.view((1, 3)).head == 3
    heads = [(one.layer, one.head) for one in trace.view(["L0H1", "L1H2"]).maps]
    assert heads == [(0, 1), (1, 2)]
    for several in (pd.DataFrame({"name": ["L0H1", "L1H2"]}), np.array([(0, 1), (1, 2)])):
        assert [(one.layer, one.head) for one in trace.view(several).maps] == heads
    layer = trace.view(layer=1)
    assert [one.head for one in layer.maps] == list(range(trace.heads))
    assert (
        repr(layer) == "AttentionMaps(L1H0, L1H1, L1H2, L1H3, L1H4, L1H5 of text-lm-3l: 61 tokens)"
    )
    page = layer._repr_html_()
    assert len(page) < 200_000
    assert page.count("class=&quot;map&quot;") == trace.heads
    for wrong, said in (
        ({}, "view takes a head such as 'L1H3', several, or layer=1"),
        ({"head": "L1H3", "layer": 1}, "view takes a head"),
        ({"head": "L9H0"}, "L9H0"),
        ({"layer": 9}, "9"),
        ({"head": []}, "no head was named"),
    ):
        with pytest.raises(LensError, match=said):
            trace.view(**wrong)


def test_a_token_cannot_end_the_script_that_holds_it(shown, monkeypatch):
    evil = "</script><script>alert(1)</script>"
    names = [evil, *shown.trace.tokens[1:]]
    monkeypatch.setattr(type(shown.trace), "tokens", property(lambda _: names))
    assert shown.trace.view("L1H3")._held(shown._raster(64))
    assert evil not in shown.trace.view("L1H3").to_html()
    assert evil not in shown.trace.view(layer=1).to_html()
    assert "alert(1)" in shown.trace.view("L1H3").to_html()


@pytest.mark.browser
def test_linked_maps_share_zoom_cursor_scale_and_query_and_name_few_tokens(
    browser, shown, tmp_path
):
    file = tmp_path / "maps.html"
    shown.trace.view(["L1H3", "L0H1"]).to_html(file)
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    problems = []
    tab.on("console", lambda m: problems.append(m.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(file.as_uri())
    tab.wait_for_function("() => document.querySelectorAll('.map[data-ready]').length === 2")
    ready = "[...document.querySelectorAll('.map')].map(map => map.dataset.ready)"
    whole = tab.evaluate(ready)
    first = tab.locator(".map-canvas").first
    box = first.bounding_box()
    left, top, side = map(float, first.get_attribute("data-plot").split())
    middle = box["x"] + left + side / 4, box["y"] + top + side / 2
    tab.mouse.move(*middle)
    assert tab.locator(".map-tip:visible").count() == 2  # the cursor is on both
    tab.mouse.wheel(0, 60)
    tab.wait_for_timeout(300)
    assert tab.evaluate(ready) == whole  # the page scrolls, the map does not
    tab.evaluate("window.scrollTo(0, 0)")
    tab.mouse.click(*middle)
    tab.wait_for_function("() => document.querySelector('#strip').dataset.head === 'L1H3'")
    tab.mouse.wheel(0, -200)
    tab.wait_for_function(f"() => {ready}.every(one => !one.startsWith('tokens 0,61'))")
    zoomed = tab.evaluate(ready)
    assert zoomed[0] == zoomed[1] != whole[0]
    first.focus()
    for _ in range(2):
        tab.keyboard.press("+")
    tab.wait_for_function(
        "() => Number(document.querySelector('.map-canvas').dataset.plot.split(' ')[0]) > 64"
    )
    tab.locator(".map-scale").first.select_option("rank")
    assert tab.locator(".map-scale").last.input_value() == "rank"
    colours = tab.evaluate("document.querySelector('.map-canvas').toDataURL()")
    tab.locator(".map-scale").last.select_option("linear")
    assert tab.evaluate("document.querySelector('.map-canvas').toDataURL()") != colours
    assert problems == []
    tab.close()


@pytest.mark.parametrize("heads", ["L1H3", ["L1H3", "L0H1"]])
def test_a_page_that_is_written_is_not_returned_too(shown, tmp_path, heads):
    """A notebook printed the whole page under the cell that wrote it."""
    view = shown.trace.view(heads)
    assert view.to_html(tmp_path / "heads.html") is None
    assert (tmp_path / "heads.html").read_text(encoding="utf-8") == view.to_html()
