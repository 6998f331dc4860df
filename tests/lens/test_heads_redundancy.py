"""Clusters of heads: closed forms, naive twins, known groups of real models, refusals."""

from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest

import lens
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.figures.similarity import similarity_map
from lens.heads import similarity
from lens.heads.likeness.head_similarity import HeadSimilarity
from lens.heads.likeness.redundancy import clusters, redundancy

INDUCTION = ["L1H0", "L1H2", "L1H3"]
_HEADS = tuple(HeadId(0, at) for at in range(1024))


def of_distances(distances, n=1):
    """A similarity by divergence whose distances are these, the same for each prompt."""
    sums = np.repeat(np.square(distances)[None], n, 0).astype(float)
    return HeadSimilarity(
        sums, np.ones_like(sums), "js", False, "exact", _HEADS[: len(distances)], "toy"
    )


def line(*places):
    return np.abs(np.subtract.outer(places, places)).astype(float)


def test_clusters_of_points_on_a_line():
    found = clusters(of_distances(line(0, 10, 0.1, 10.4, 10.1, 30), n=3))
    assert found.members == [["L0H1", "L0H3", "L0H4"], ["L0H0", "L0H2"], ["L0H5"]]
    assert [str(head) for head in found.medoids] == ["L0H4", "L0H0", "L0H5"]
    assert found.stability[:5] == pytest.approx(1)
    assert np.isnan(found.stability[5])
    assert found.rand == pytest.approx(1)
    assert found.merges[-3, 2] < found.cut < found.merges[-2, 2]
    assert sorted(found.order) == list(range(6))
    labels = found.labels[found.order].tolist()
    assert sum(a != b for a, b in pairwise(labels)) == 2  # each one run
    assert found.table()["prototype"].tolist() == ["L0H4", "L0H0", "L0H5"]


def test_clusters_that_depend_on_the_prompt_are_not_stable():
    near, far = line(0, 0.1, 5, 9), line(0, 5, 0.1, 9)
    sums = np.stack([near, far]) ** 2
    mixed = HeadSimilarity(sums, np.ones_like(sums), "js", False, "exact", _HEADS[:4], "toy")
    found = clusters(mixed, count=3, seed=1)
    assert found.rand.mean() < 0.9
    one = clusters(of_distances(near), count=3)
    assert np.isnan(one.stability).all()
    assert len(one.rand) == 0
    assert "on prompts drawn again" not in one.findings()[0]


def test_redundancy_is_the_closeness_to_the_nearest_head():
    distances = line(0, 0.1, 0.5)
    table = redundancy(of_distances(distances, n=2)).set_index("name")
    assert table.loc["L0H0", "value"] == pytest.approx(1 - 0.01 / np.log(2))
    assert table.loc["L0H2", "value"] == pytest.approx(1 - 0.16 / np.log(2))
    assert table.loc["L0H2", "nearest"] == "L0H1"
    assert table.loc["L0H0", "low"] == pytest.approx(table.loc["L0H0", "value"])
    assert table["floor"].isna().all()


def test_a_head_that_was_not_scored_is_nan_and_in_no_cluster():
    sums = np.array([[[1.0, 0.5, 0], [0.5, 1, 0], [0, 0, 0]]])
    found = HeadSimilarity(sums, np.ones_like(sums), "cka", False, "exact", _HEADS[:3], "toy")
    table = redundancy(found).set_index("name")
    assert table.loc["L0H0", "value"] == pytest.approx(0.5)
    assert np.isnan(table.loc["L0H2", "value"])
    assert table.loc["L0H2", "nearest"] == ""
    with pytest.raises(LensError, match="L0H2 has nothing to compare"):
        clusters(found)


@pytest.fixture(scope="module")
def small():
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, 25, seed) for seed in range(8)]
    return {
        excluded: similarity(model, prompts, sink_excluded=excluded, floor=True)
        for excluded in (False, True)
    }


@pytest.mark.parametrize("excluded", [False, True])
def test_the_three_induction_heads_are_one_stable_cluster(small, excluded):
    found = clusters(small[excluded])
    assert INDUCTION in found.members
    inside = [name in INDUCTION for name in found.names]
    assert (found.stability[inside] > 0.95).all()


def test_what_induction_heads_share_is_above_what_position_alone_gives(small):
    table = redundancy(small[True]).set_index("name")
    assert (table.loc[INDUCTION, "above_floor"] > 0.3).all()
    # L0H0 and L0H2 look at fixed distances: alike on different prompts too
    assert (table.loc[["L0H0", "L0H2"], "above_floor"].abs() < 0.1).all()
    assert (table.loc[["L0H0", "L0H2"], "value"] > 0.8).all()


def test_the_induction_heads_of_the_text_model_are_one_cluster():
    model = lens.load("text-lm-3l")
    prompts = [lens.tasks.copied(model, 25, seed) for seed in range(6)]
    assert ["L1H2", "L1H3", "L1H5"] in clusters(similarity(model, prompts)).members


def test_the_map_is_drawn_in_the_order_of_the_clusters(small):
    grouped = clusters(small[False])
    figure = similarity_map(small[False], grouped)
    heatmap = figure.data[0]
    assert list(heatmap.x) == [grouped.names[head] for head in grouped.order]
    value = small[False].values[grouped.order[2], grouped.order[5]]
    assert heatmap.z[2][5] == pytest.approx(value)
    assert len(figure.layout.shapes) == sum(len(heads) > 1 for heads in grouped.members)
    assert figure.layout.meta["variant"] == "raw"
    plain = small[True].plot()
    assert isinstance(plain, go.Figure)
    assert list(plain.data[0].x) == small[True].names
    assert "sink excluded" in plain.layout.title.text


def test_the_tree_is_drawn_with_every_merge(small):
    grouped = clusters(small[False], count=3)
    figure = grouped.plot()
    assert len(figure.data) == 7
    assert max(max(line.y) for line in figure.data) == pytest.approx(grouped.merges[-1, 2])
    assert "3 clusters" in figure.layout.title.text
    assert "L1H0+L1H2+L1H3" in repr(clusters(small[False]))


def test_what_cannot_be_grouped_is_refused():
    found = of_distances(line(0, 1, 5), n=2)
    cases = [
        (lambda: clusters(found, count=4), "count must be 1 to 3"),
        (lambda: clusters(found, count="x"), "count must be 1 to 3"),
        (lambda: clusters(found, resamples=0), "resamples must be a positive integer"),
        (lambda: redundancy(found, resamples=0), "resamples must be a positive integer"),
        (lambda: clusters(of_distances(line(0, 1))), "at least 3 heads, toy has 2"),
    ]
    for call, message in cases:
        with pytest.raises(LensError, match=message):
            call()


def test_a_map_of_a_thousand_heads_stays_below_two_megabytes_and_keeps_the_closest():
    rng, heads = np.random.default_rng(0), 1024
    distances = 0.3 + rng.random((heads, heads)) / 10
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    distances[1000, 1010] = distances[1010, 1000] = 0.01
    figure = of_distances(distances).plot()
    assert len(figure.to_json()) < 2_000_000
    assert {"L0H1000", "L0H1010"} < set(figure.data[0].x)
    assert "the 512 of 1024 heads with the closest partner" in figure.layout.title.text


def test_the_map_of_as_many_heads_as_have_intervals_stays_below_two_megabytes():
    rng = np.random.default_rng(0)
    distances = rng.random((256, 256))
    figure = of_distances(distances + distances.T, n=3).plot()
    assert figure.data[0].customdata.shape == (256, 256, 2)
    assert len(figure.to_json()) < 2_000_000
