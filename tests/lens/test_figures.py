"""Figures hold the numbers that they say, and findings say what the numbers hold."""

import json

import numpy as np
import pytest

from lens import figures
from lens.errors import LensError
from lens.findings import findings
from lens.profiles import pooled_table, prompt_table
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


def test_signed_values_are_centred_at_zero(table):
    signed = table.assign(value=table["value"] - table["value"].mean())
    figure = figures.head_grid(signed, "entropy")
    assert figure.data[0].zmin == -figure.data[0].zmax


def test_scatter_and_layers_hold_every_head(table):
    scatter = figures.head_scatter(table, "induction", "entropy", "first_token", "sink_excluded")
    assert len(scatter.data[0].x) == 6
    assert "sink excluded" in scatter.layout.xaxis.title.text
    layers = figures.metric_by_layer(table, "locality")
    rows = table[table.metric == "locality"]
    np.testing.assert_allclose(layers.data[1].y, rows.groupby("layer").value.mean())


@pytest.mark.parametrize(
    "make",
    [
        lambda trace, table: figures.block_map(trace, 0, 0, theme="dark", width=300, height=200),
        lambda trace, table: figures.head_grid(
            table, "entropy", theme="dark", width=300, title="T"
        ),
    ],
)
def test_the_common_tail(trace, table, make):
    figure = make(trace, table)
    assert figure.layout.width == 300
    assert figure.layout.paper_bgcolor != "white"
    assert json.loads(figure.to_json())["layout"]["meta"]


def test_wrong_calls_say_what_would_be_right(trace, table):
    with pytest.raises(
        LensError, match="no rows of 'entropie' \\(raw\\) in the table; it has: prev"
    ):
        figures.head_grid(table, "entropie")
    with pytest.raises(LensError, match="layer must be 0 to 1 in analytic, got 2"):
        figures.block_map(trace, 2, 0)
    with pytest.raises(LensError, match="head must be 0 to 2 in analytic, got -1"):
        figures.row_entropy(trace, 0, -1)
    with pytest.raises(ValueError, match="theme must be 'light' or 'dark', got 'blue'"):
        figures.head_grid(table, "entropy", theme="blue")
    both = table.assign(prompt_id=["p000", *["p001"] * (len(table) - 1)])
    with pytest.raises(LensError, match="several prompts; choose one"):
        figures.head_grid(both, "previous_token")


def test_findings_name_heads_over_the_threshold_and_only_those(table):
    copied = pooled_table([table, table], "copied")
    plain = {finding.kind: finding for finding in findings(copied)}
    assert not plain["induction"].found
    assert plain["induction"].text.startswith("No induction head: the highest score on copied")
    planted = copied.copy()
    rows = (planted.metric == "induction") & (planted.variant == "raw")
    chosen = rows & (planted.layer == 1) & planted["head"].isin([0, 2])
    planted.loc[chosen, ["value", "low", "high"]] = [0.9, 0.85, 0.95]
    finding = findings(planted)[0]
    assert (finding.kind, finding.found, finding.prompt_id) == ("induction", True, "copied")
    assert [head.name for head in finding.heads] == ["L1H0", "L1H2"]
    assert "2 induction heads (of 6 heads)" in finding.text
    assert "L1H0 0.90 [0.85, 0.95]" in finding.text


def test_sinks_are_told_from_text_before_copied_tokens(table):
    text, copied = table.assign(prompt_id="text"), table.assign(prompt_id="copied")
    text.loc[(text.metric == "sink_mass"), "value"] = 0.8
    import pandas as pd

    found = {finding.kind: finding for finding in findings(pd.concat([copied, text]))}
    assert found["sink"].prompt_id == "text"
    assert len(found["sink"].heads) == 6
    assert found["induction"].prompt_id == "copied"


def test_what_was_not_scored_gives_no_finding(table):
    nothing = table.assign(prompt_id="copied", value=np.nan)
    assert findings(nothing) == []
