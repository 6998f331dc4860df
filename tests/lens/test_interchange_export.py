"""Exports: the HeadVis tree against exact probabilities, tables that come back whole, refusals."""

import json

import numpy as np
import pandas as pd
import pytest

import lens
from lens.common.errors import LensError
from lens.runs import to_csv, to_headvis, to_parquet
from lens.traces import from_attentions
from tests.lens.traces import probabilities, trace_of

CONFIG = {
    "model_name",
    "dataset_name",
    "heads",
    "n_layers",
    "n_heads",
    "n_intervals",
    "metrics",
    "metric_descriptions",
    "head_data_pattern",
    "has_umap",
    "umap_heads",
    "custom_plots",
    "custom_tables",
    "statistics_display",
    "pipeline_config",
}
HEAD = {
    "sequences",
    "qk_distance_histogram",
    "top_query_tokens",
    "top_key_tokens",
    "histogram",
    "statistics",
}
LENGTHS = (51, 31, 41)


@pytest.fixture(scope="module")
def traces():
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, length // 2, length) for length in LENGTHS]
    return lens.capture(model, prompts, keep_qk=True)


@pytest.fixture(scope="module")
def tree(traces, tmp_path_factory):
    return to_headvis(
        traces, tmp_path_factory.mktemp("export") / "tree", dataset="copied", intervals=5
    )


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_tree_has_every_file_and_key(tree, traces):
    config = read(tree / "config.json")
    assert set(config) == CONFIG
    assert config["heads"] == [[layer, head] for layer in range(2) for head in range(4)]
    assert config["n_intervals"] == 3  # no more than sequences
    assert config["pipeline_config"]["n_sequences"] == 3
    assert set(config["metric_descriptions"]) == set(config["metrics"])
    assert read(tree / "server_config.json") == {}
    assert read(tree / "attributions" / "manifest.json") == {}
    for layer, head in config["heads"]:
        name = config["head_data_pattern"].format(layer=layer, head=head)
        assert set(read(tree / "heads" / name)) == HEAD
    rows = read(tree / "scatter_data.json")
    profile = lens.profile(traces, all=True)
    assert len(rows) == 8
    for row, expected in zip(rows, profile.to_dict("records"), strict=True):
        assert (row["layer"], row["head"]) == (expected["layer"], expected["head"])
        for name in config["metrics"]:
            assert row[name] == pytest.approx(expected[name]) or np.isnan(expected[name])
    induction = {(row["layer"], row["head"]) for row in rows if row["induction"] > 0.4}
    assert induction == {(1, 0), (1, 2), (1, 3)}


def test_attention_in_the_tree_is_the_exact_one(tree, traces):
    data = read(tree / "heads" / "L1H2.json")
    for sequence, trace in zip(data["sequences"], traces, strict=True):
        length = trace.length
        whole = trace.tile(1, 2, (0, length), (0, length))
        dense = np.zeros(length * length)
        dense[sequence["attention_indices"]] = sequence["attention_values"]
        dense = dense.reshape(length, length)
        kept = dense > 0
        assert dense[kept] == pytest.approx(whole[kept], abs=1e-6)
        assert (kept.sum(1) <= 8).all()
        assert (dense[kept] >= 0.005 - 1e-6).all()
        missed = np.where(kept, 0, whole)
        smallest = np.where(kept, whole, 2).min(1)
        full = kept.sum(1) == 8
        assert (missed.max(1)[~full] < 0.005).all()
        assert (missed.max(1)[full] <= smallest[full]).all()
        inside = whole[:, 1:].copy()
        inside[np.arange(1, length), np.arange(length - 1)] = 0
        assert sequence["max_activation"] == pytest.approx(inside.max(), abs=1e-6)
        assert sequence["tokens"] == trace.tokens


def test_derived_numbers_follow_from_the_sequences(tree):
    data = read(tree / "heads" / "L0H1.json")
    strength = [sequence["max_activation"] for sequence in data["sequences"]]
    intervals = [sequence["interval"] for sequence in data["sequences"]]
    assert sorted(intervals) == [1, 2, 3]
    assert intervals[int(np.argmax(strength))] == 3
    assert data["statistics"]["n_samples"] == 3
    assert data["statistics"]["mean_max_activation"] == pytest.approx(np.mean(strength), abs=1e-6)
    assert sum(data["histogram"]["bin_values"]) == 3
    assert len(data["histogram"]["bin_edges"]) == 51
    total = sum(sum(sequence["attention_values"]) for sequence in data["sequences"])
    distances = data["qk_distance_histogram"]
    assert sum(distances["bin_values"]) == pytest.approx(total, abs=1e-2)
    at_one = distances["bin_values"][distances["bin_edges"].index(1)]
    assert at_one > 0.8 * total  # a previous-token head
    keys = [entry["weight"] for entry in data["top_key_tokens"]]
    assert keys == sorted(keys, reverse=True)


def test_long_heads_are_read_in_pieces(traces, tree, tmp_path, monkeypatch):
    monkeypatch.setattr("lens.runs.exchange.headvis._ROWS", 7)
    again = to_headvis(traces, tmp_path / "again", dataset="copied")
    for name in ("L0H0.json", "L1H3.json"):
        assert read(again / "heads" / name) == read(tree / "heads" / name)


def test_tables_come_back_whole(tmp_path, traces):
    profile = lens.profile(traces, all=True)
    texts = {"=f": ["=1+1", "-0.5", "@x", "- y", "+1", "a=b", None], "n": [-1.5, 2, 3, 4, 5, 6, 7]}
    lines = to_csv(pd.DataFrame(texts), tmp_path / "texts.csv").read_text().splitlines()
    assert lines == [
        "'=f,n",
        "'=1+1,-1.5",
        "-0.5,2.0",
        "'@x,3.0",
        "'- y,4.0",
        "+1,5.0",
        "a=b,6.0",
        ",7.0",
    ]
    by_csv = pd.read_csv(to_csv(profile, tmp_path / "profile.csv"))
    pd.testing.assert_frame_equal(by_csv, profile, check_dtype=False, check_exact=True)
    by_parquet = pd.read_parquet(to_parquet(profile, tmp_path / "profile.parquet"))
    assert profile.attrs  # the reasons stay with the table that was passed
    pd.testing.assert_frame_equal(by_parquet, profile)
    scores = lens.heads.similarity(lens.load("induction-2l"), [[64, 1, 2, 3, 1, 2]])
    table = pd.read_parquet(to_parquet(scores, tmp_path / "similar.parquet"))
    pd.testing.assert_frame_equal(table, scores.table())


def test_what_cannot_be_exported_is_refused(tmp_path, traces):
    imported = from_attentions(list(probabilities(1, 2, 9, 0)[:, None]))
    other = trace_of(probabilities(1, 2, 17, 0))
    cases = [
        (lambda: to_headvis([], tmp_path / "a"), "at least one trace, got an empty list"),
        (lambda: to_headvis(traces, tmp_path), "exists already"),
        (
            lambda: to_headvis(traces, tmp_path / "a", keys=0),
            "keys must be a positive integer, got 0",
        ),
        (
            lambda: to_headvis(traces, tmp_path / "a", least=1),
            "least must be from 0 to below 1, got 1",
        ),
        (lambda: to_headvis(imported, tmp_path / "a"), "exact tiles need q, k and lse"),
        (lambda: to_headvis(other, tmp_path / "a"), "exact tiles need q, k and lse"),
        (lambda: to_csv(3, tmp_path / "x.csv"), "expected a DataFrame or a result"),  # type: ignore[arg-type]
        (lambda: to_parquet(pd.DataFrame(), tmp_path / "x"), "the table has no rows"),
    ]
    for call, message in cases:
        with pytest.raises(LensError, match=message):
            call()
    assert not (tmp_path / "a").exists()
