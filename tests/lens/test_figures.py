"""Figures hold the numbers that they say, under every mask."""

import inspect
import json
from typing import Any, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.subplots import make_subplots

import lens
from lens import figures
from lens.common.errors import LensError
from lens.figures.heads import plain_grids
from lens.figures.reading import pair_products
from lens.figures.roles import share_grid
from lens.figures.small import small
from lens.figures.style import Look, grid_axes, set_axes, set_layout, style
from lens.traces.profiles import prompt_table
from tests.lens.traces import LENGTH, probabilities, trace_of


@pytest.fixture(scope="module")
def p():
    return probabilities(layers=2, heads=3, length=LENGTH, seed=2)


@pytest.fixture(scope="module")
def trace(p):
    return trace_of(p)


@pytest.fixture(scope="module")
def table(trace):
    return prompt_table(trace, "p000")


def test_distance_profile_is_the_mean_of_each_diagonal(p, trace):
    figure = figures.distance_profile(trace, 1, 2)
    expected = [np.mean([p[1, 2, i, i - d] for i in range(d, LENGTH)]) for d in range(LENGTH)]
    np.testing.assert_allclose(figure.data[0].y, expected, rtol=1e-5)
    uniform = [np.mean([1 / (i + 1) for i in range(d, LENGTH)]) for d in range(LENGTH)]
    np.testing.assert_allclose(figure.data[1].y, uniform, rtol=1e-9)


def test_received_mass_is_the_mean_over_the_queries_that_see_the_key(p, trace):
    figure = figures.received_mass(trace, 0, 1)
    expected = [p[0, 1, k:, k].mean() for k in range(LENGTH)]
    np.testing.assert_allclose(figure.data[0].y, expected, rtol=1e-5)
    uniform = [np.mean([1 / (i + 1) for i in range(k, LENGTH)]) for k in range(LENGTH)]
    np.testing.assert_allclose(figure.data[1].y, uniform, rtol=1e-9)
    assert f"{expected[0]:.1%}" in figure.layout.title.text


def test_row_entropy_is_below_uniform(p, trace):
    figure = figures.row_entropy(trace, 0, 0)
    by_name = {line.name: np.asarray(line.y) for line in figure.data}
    expected = [-(r[r > 0] * np.log(r[r > 0])).sum() for r in p[0, 0]]
    np.testing.assert_allclose(by_name["raw"], expected, rtol=1e-5, atol=1e-7)
    assert (by_name["raw"] <= by_name["uniform attention"] + 1e-6).all()
    assert np.isnan(by_name["sink excluded"][0])


def test_block_map_is_log_mass_below_the_diagonal(trace):
    figure = figures.block_map(trace, 0, 2)
    shown, mass = figure.data[0].z, trace.block_mass.values[0, 2]
    lower = np.tri(len(mass), dtype=bool)
    np.testing.assert_allclose(shown[lower], np.log10(np.maximum(mass[lower], 1e-6)), rtol=1e-5)
    assert np.isnan(shown[~lower]).all()


def test_a_large_block_map_is_pooled_and_says_so(monkeypatch, trace):
    monkeypatch.setattr("lens.figures.head.MOST_CELLS", 2)
    figure = figures.block_map(trace, 0, 2)
    mass = trace.block_mass.values[0, 2]
    assert figure.data[0].z.shape == (2, 2)
    assert figure.data[0].z[0, 0] == pytest.approx(np.log10(mass[:3, :3].max()))
    assert "largest of 3 × 3 blocks" in figure.layout.title.text


def test_a_long_line_is_thinned_without_losing_a_sink(monkeypatch, trace):
    monkeypatch.setattr("lens.figures.head.MOST_POINTS", 10)
    received = figures.received_mass(trace, 0, 0)
    alpha = trace.received.values[0, 0] / trace.visible.values[0]
    assert received.data[0].y[1] == pytest.approx(alpha[7:14].max())
    assert "(largest of 7)" in received.layout.xaxis.title.text
    entropy = figures.row_entropy(trace, 0, 0)
    assert entropy.data[1].y[1] == pytest.approx(trace.entropy.values[0, 0, 7:14].mean())
    assert "(means of 7)" in entropy.layout.xaxis.title.text


def test_head_grid_puts_every_head_in_its_place(table):
    figure = figures.head_grid(table, "entropy", "sink_excluded")
    rows = table[(table.metric == "entropy") & (table.variant == "sink_excluded")]
    for row in rows.itertuples():
        assert figure.data[0].z[row.layer][row.head] == row.value
    best = rows.loc[rows.value.idxmax()]
    assert f"L{best.layer}H{best['head']}" in figure.layout.title.text
    assert figure.data[0].zmin == 0
    assert figure.data[0].zmax == rows["value"].max()
    probability = figures.head_grid(table, "induction")
    assert (probability.data[0].zmin, probability.data[0].zmax) == (0, 1)


def test_grids_that_share_a_layout_are_those_that_are_made_one_by_one(table):
    signed = table.assign(value=table["value"].where(table["metric"] != "entropy", -0.5))
    deep = pd.concat([signed.assign(layer=signed["layer"] + 2 * copy) for copy in range(5)])
    few = deep[(deep["metric"] != "distance") | (deep["layer"] == 0)]  # one row: not as high
    pairs = list(dict.fromkeys(zip(few["metric"], few["variant"], strict=True)))
    made = plain_grids(few, pairs)
    assert list(made) == pairs
    assert {"entropy", "distance", "induction", "top_key"} <= {metric for metric, _ in pairs}
    for pair in pairs:
        assert made[pair] == figures.head_grid(few, *pair).to_plotly_json()


def test_signed_values_are_centred_at_zero(table):
    signed = table.assign(value=table["value"] - table["value"].mean())
    figure = figures.head_grid(signed, "entropy")
    assert figure.data[0].zmin == -figure.data[0].zmax


def test_scatter_and_layers_hold_every_head(table):
    scatter = figures.head_scatter(table, "induction", "entropy", "first_token", "sink_excluded")
    assert len(scatter.data[0].x) == 6
    assert "sink excluded" in scatter.layout.xaxis.title.text
    layers = figures.metric_by_layer(table, "locality")
    rows = table[(table.metric == "locality") & (table.variant == "raw")]
    np.testing.assert_allclose(layers.data[1].y, rows.groupby("layer").value.mean())


def test_layers_are_whole_numbers_on_every_axis(table):
    heads = pd.DataFrame({"layer": [0, 0, 2], "head": [0, 1, 0], "a": [0.1, 0.2, 0.3], "b": 1.0})
    (points,) = figures.columns.column_scatter(heads, "a", "b").data
    assert points.marker.colorbar.tickvals == (0, 1, 2)
    figure = go.Figure(go.Scatter(x=[-1, 0, 1, 40], y=[3, 4, 5, 6]))
    figure.update_xaxes(title="After layer (-1: embedding)").update_yaxes(title="layers of heads")
    style(figure, "", {})
    assert figure.layout.xaxis.tickvals == tuple(range(0, 40, 3))
    assert figure.layout.yaxis.tickvals is None
    blocks = go.Figure(go.Heatmap(z=np.eye(4)[:3])).update_xaxes(title="block of keys")
    blocks.update_yaxes(title="row")
    style(blocks, "", {})
    assert (blocks.layout.xaxis.tickvals, blocks.layout.yaxis.tickvals) == ((0, 1, 2, 3), (0, 1, 2))
    halves = make_subplots(1, 2).add_scatter(x=list(range(16)), y=[0] * 16, row=1, col=1)
    style(halves.update_xaxes(title="ring"), "", {})
    assert halves.layout.xaxis.tickvals == (0, 3, 6, 9, 12, 15)
    named = go.Figure(go.Scatter(x=["L0", "L1"], y=[3, 4])).update_xaxes(title="Layer")
    assert style(named, "", {}).layout.xaxis.tickvals is None


def test_wrong_calls_say_what_would_be_right(trace, table):
    with pytest.raises(
        LensError, match="no rows of 'entropie' \\(raw\\) in the table; it has: prev"
    ):
        figures.head_grid(table, "entropie")
    with pytest.raises(
        LensError, match=r"no L2H0 in this trace of analytic: it has the layers 0 and 1"
    ):
        figures.block_map(trace, 2, 0)
    with pytest.raises(LensError, match=r"a head is written .*; got \(0, -1\)"):
        figures.row_entropy(trace, 0, -1)
    with pytest.raises(ValueError, match="theme must be 'light' or 'dark', got 'blue'"):
        figures.head_grid(table, "entropy", theme="blue")
    both = table.assign(prompt_id=["p000", *["p001"] * (len(table) - 1)])
    with pytest.raises(
        LensError,
        match=r"lacks prompt_id, metric, variant, value, low, high, detail: use lens\.traces\.profiles\.prompt_table",
    ):
        figures.head_grid(
            pd.DataFrame({"layer": [0], "head": [0], "induction": [0.5]}), "induction"
        )
    with pytest.raises(LensError, match="several prompts; choose one"):
        figures.head_grid(both, "previous_token")


LAYOUTS = [(True, None), (True, 7), (False, None), (False, 7)]


def even(length, causal, window):
    """Uniform attention under a mask, [length, length], and the mask."""
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    seen = np.abs(i - j) < (length if window is None else window)
    if causal:
        seen &= j <= i
    return seen / seen.sum(-1, keepdims=True), seen


@pytest.mark.parametrize(("causal", "window"), LAYOUTS)
def test_the_baselines_are_those_of_the_layers_mask(causal, window):
    length = 23
    p, _ = even(length, causal, window)
    trace = trace_of(p[None, None], causal=causal, windows=[window])
    for draw in (figures.distance_profile, figures.received_mass, figures.row_entropy):
        lines = {line.name: np.asarray(line.y, float) for line in draw(trace, 0, 0).data}
        measured = lines.get("L0H0", lines.get("raw"))
        assert len(measured) > 5
        np.testing.assert_allclose(measured, lines["uniform attention"], rtol=1e-5, atol=1e-6)
    distances = np.asarray(figures.distance_profile(trace, 0, 0).data[0].x)
    reach = length if window is None else window
    assert distances.tolist() == list(range(0 if causal else 1 - reach, reach))


def test_no_baseline_is_drawn_for_a_mask_that_the_trace_does_not_know():
    p, seen = even(23, True, None)
    seen = seen & (np.arange(23)[:, None] // 5 == np.arange(23)[None] // 5)
    p = np.where(seen, p, 0) / np.where(seen, p, 0).sum(-1, keepdims=True)
    trace = trace_of(p[None, None], visible=seen.sum(0).astype(np.int32))
    for draw in (figures.distance_profile, figures.received_mass, figures.row_entropy):
        assert "uniform attention" not in [line.name for line in draw(trace, 0, 0).data]


def test_a_thinned_line_keeps_the_place_of_its_peak(monkeypatch, p):
    monkeypatch.setattr("lens.figures.head.MOST_POINTS", 10)
    p = p[:1, :1].copy()
    p[0, 0, 40:, 38] += 5
    p /= p.sum(-1, keepdims=True)
    figure = figures.received_mass(trace_of(p), 0, 0)
    assert 38 in figure.data[0].x
    assert figure.data[0].text[list(figure.data[0].x).index(38)] == "t3"


def test_a_logarithmic_axis_ends_where_nothing_can_be_read(p):
    sharp = np.zeros_like(p[:1, :1])
    sharp[0, 0] = np.eye(LENGTH) * (1 - 1e-9) + np.eye(LENGTH, k=-5) * 1e-9
    figure = figures.distance_profile(trace_of(sharp), 0, 0)
    assert figure.layout.yaxis.range[0] == pytest.approx(-6.1)
    assert np.isnan(figure.data[0].y[1])
    assert "most at distance 0" in figure.layout.title.text


def test_a_head_without_attention_says_so(p):
    figure = figures.distance_profile(trace_of(0 * p, learned_sinks=True), 0, 0)
    assert figure.layout.title.text == "L0H0: no attention at all"


def test_block_map_cells_lie_between_their_first_tokens(trace):
    figure = figures.block_map(trace, 0, 0)
    assert list(figure.data[0].x) == [0, 16, 32, 48, 64, LENGTH]
    assert figure.layout.yaxis.autorange == "reversed"


def test_token_strip_shows_what_each_token_receives(p, trace):
    figure = figures.token_strip(trace, 1, 2)
    alpha = [p[1, 2, k:, k].mean() for k in range(LENGTH)]
    shown = np.asarray(figure.data[0].z, float)
    assert shown.shape == (5, 16)
    np.testing.assert_allclose(shown.ravel()[:LENGTH], alpha, rtol=1e-5)
    assert np.isnan(shown.ravel()[LENGTH:]).all()
    assert figure.data[0].text[0][3] == "t3"
    assert figure.data[0].customdata[1][0] == "16 t1"


def test_token_strip_of_a_query_needs_q_and_k_and_shows_its_row(monkeypatch, p, trace):
    with pytest.raises(LensError, match="exact tiles need q, k and lse"):
        figures.token_strip(trace, 1, 2, 40)
    with pytest.raises(LensError, match="query must be 0 to 66, got 67"):
        figures.token_strip(trace, 1, 2, 67)
    monkeypatch.setattr(
        type(trace), "tile", lambda self, layer, head, q, k: p[layer, head, slice(*q), slice(*k)]
    )
    monkeypatch.setattr("lens.figures.tokens.MOST_TOKENS", 32)
    figure = figures.token_strip(trace, 1, 2, 40)
    np.testing.assert_allclose(np.ravel(figure.data[0].z), p[1, 2, 40, 9:41])
    best = p[1, 2, 40].argmax()
    assert f"query 40 t0 looks most at key {best} t{best % 5}" in figure.layout.title.text
    assert "(tokens 9 to 40 of 67)" in figure.layout.title.text


def test_tokens_are_no_markup(p):
    trace = trace_of(p[:1, :1])
    tokens = np.array(
        ["<b>", "a\nb c", "&lt", "\x00", "abcdefghij", *["x"] * (LENGTH - 5)], dtype=object
    )
    trace.dataset["key_token"] = ("key", tokens)
    text = figures.token_strip(trace, 0, 0).data[0].text[0]
    assert list(text[:5]) == [
        "&lt;b&gt;",
        "a↵b␣c",
        "&amp;lt",
        "\N{REPLACEMENT CHARACTER}",
        "abcdef…",
    ]
    assert figures.received_mass(trace, 0, 0).data[0].text[0] == "&lt;b&gt;"


@pytest.mark.parametrize("name", sorted({*figures.__all__} - {"for_paper"}))
def test_every_figure_takes_the_same_look(name):
    *_, last = inspect.signature(getattr(figures, name)).parameters.values()
    assert last.kind is last.VAR_KEYWORD
    assert last.annotation in (Unpack[Look], "Unpack[Look]")


def test_many_layers_make_a_grid_taller_until_a_look_says_otherwise():
    deep = np.linspace(0, 1, 90).reshape(30, 3)
    figure = share_grid(deep, "found", unit="share")
    assert figure.layout.height > 30 * 14
    assert share_grid(deep, "found", unit="share", height=210).layout.height == 210


def test_a_look_that_no_figure_has_is_named(trace):
    with pytest.raises(TypeError, match="unknown argument titel; every figure takes title, width"):
        figures.block_map(trace, 1, 2, titel="T")


OF_TRACES_AND_HEADS = [
    name
    for name in figures.__all__
    if inspect.unwrap(getattr(figures, name)).__module__.rpartition(".")[2]
    in ("head", "heads", "tokens")
]


@pytest.mark.parametrize("name", OF_TRACES_AND_HEADS)
def test_figures_of_traces_and_heads_say_where_they_are_from(name, trace, table):
    assert len(OF_TRACES_AND_HEADS) > 5
    draw = getattr(figures, name)
    parameters = inspect.signature(draw).parameters
    given = {"head_scatter": (table, "induction", "entropy")}
    of_table = (table, "entropy") if "table" in parameters else (trace, 1, 2)
    figure = draw(*given.get(name, of_table), title="T", width=310, height=210, theme="dark")
    assert (figure.layout.title.text, figure.layout.width, figure.layout.height) == ("T", 310, 210)
    meta = json.loads(figure.to_json())["layout"]["meta"]
    assert meta["figure"] == name
    assert meta.get("prompt_id", meta.get("model")) in ("p000", "analytic")


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (figures.block_map, "block_mass"),
        (figures.received_mass, "received"),
        (figures.row_entropy, "entropy"),
        (figures.distance_profile, "diagonal"),
        (figures.token_strip, "received"),
    ],
)
def test_a_missing_statistic_is_named(p, draw, name):
    with pytest.raises(LensError, match=f"no {name}; capture it with statistics including"):
        draw(trace_of(p, without=(name,)), 0, 0)


def test_scores_that_are_all_missing_are_said_to_be(table):
    rows = table.assign(value=np.nan, detail="too short")
    figure = figures.head_grid(rows, "induction")
    assert figure.layout.title.text == "Induction (probability): not scored (too short)"
    with pytest.raises(LensError, match="no rows of 'entropie'"):
        figures.head_scatter(table, "entropie", "induction")


def test_named_ticks_of_a_small_picture_keep_their_names():
    figure = go.Figure(go.Scatter(x=list(range(12)), y=list(range(12))))
    figure.update_xaxes(tickvals=list(range(12)), ticktext=[f"h{head}" for head in range(12)])
    axis: Any = small(figure).layout.xaxis
    assert len(axis.tickvals) <= 7
    assert [f"h{place}" for place in axis.tickvals] == list(axis.ticktext)


def test_a_short_prompt_with_q_and_k_is_drawn_token_by_token_with_names():
    model = lens.load("text-lm-3l")
    options = {"keep_qk": True, "progress": False}
    short = lens.capture(model, "It was the best of times", **options)
    figure = figures.block_map(short, 1, 3)
    exact = short.tile(1, 3, (0, short.length), (0, short.length))
    lower = np.tri(short.length, dtype=bool)
    shown = np.asarray(figure.data[0].z)
    np.testing.assert_allclose(shown[lower], np.log10(np.maximum(exact[lower], 1e-6)), atol=1e-4)
    assert np.isnan(shown[~lower]).all()
    assert list(figure.layout.xaxis.ticktext)[1:] == short.tokens[1:]
    assert figure.layout.title.text == "L1H3: attention, one token a cell"
    longer = lens.capture(model, lens.tasks.copied(model, 40), **options)
    assert figures.block_map(longer, 1, 3).layout.xaxis.ticktext is None
    without = lens.capture(model, "It was the best of times", progress=False)
    assert "block mass, 64 tokens a cell" in figures.block_map(without, 1, 3).layout.title.text


def test_a_layout_set_at_once_is_the_one_that_plotly_updates_to():
    values = {
        "title": {"text": "found", "font": {"size": 13}},
        "legend": {"orientation": "h"},
        "margin": {"t": 40},
        "paper_bgcolor": "white",
        "width": None,
        "meta": {"figure": "x"},
    }
    axis = {"gridcolor": "#ccc", "title": {"text": "head"}}
    quick, slow = (make_subplots(1, 2, subplot_titles=["a", "b"]) for _ in range(2))
    for figure in (quick, slow):
        figure.add_scatter(y=[1, 2], row=1, col=2)
        figure.update_layout(title={"x": 0.5, "font": {"color": "red"}}, legend={"x": 0.1})
        figure.update_xaxes(title={"standoff": 4}, range=[0, 3], col=2)
    set_layout(quick.layout, values)
    set_axes(quick, axis, {"ticks": ""})
    slow.update_layout(values)
    slow.update_xaxes(axis)
    slow.update_yaxes(ticks="")
    assert quick.to_dict() == slow.to_dict()
    assert quick.layout.title.font.to_plotly_json() == {"color": "red", "size": 13}


def test_a_pair_without_parts_is_refused_in_words():
    products = pd.DataFrame(columns=["query_part", "key_part", "contrast"])
    with pytest.raises(LensError, match="parts of this pair are not there"):
        pair_products(products)


def test_layers_that_are_names_stand_one_by_one():
    figure = go.Figure(go.Heatmap(z=np.ones((3, 2)), y=["1", "3", "5"]))
    grid_axes(figure, 3, 2)
    assert figure.layout.yaxis.type == "category"
    figure = go.Figure(go.Heatmap(z=np.ones((3, 2)), y=np.array([1, 3, 5])))
    grid_axes(figure, 3, 2)
    assert figure.layout.yaxis.type is None
