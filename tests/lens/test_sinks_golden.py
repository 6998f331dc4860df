"""Every sentence about sinks, whole, on data where its other half would be false."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lens
from lens.common.head_ids import HeadId
from lens.common.results import Sentence
from lens.sinks.activations.dims import SinkDims
from lens.sinks.activations.massive import MassiveActivations
from lens.sinks.activations.norms import HighNormTokens
from lens.sinks.causes.gates import EffectiveGates
from lens.sinks.causes.geometry import SinkMechanism
from lens.sinks.causes.persistent import PersistentMemory
from lens.sinks.causes.spectral import BandLosses, SpectralBands
from lens.sinks.detection.alphas import Samples
from lens.sinks.detection.blocks import BlockAlphas
from tests.lens.test_sinks import parked, windowed
from tests.lens.traces import trace_of

Words = list[tuple[str, str]]
SETTINGS = "T = 67, BOS added, n = 2"


def said(result: Any) -> Words:
    found = result.findings()
    assert isinstance(found, tuple)
    assert all(isinstance(one, Sentence) for one in found)
    return [(one.kind, one.text) for one in found]


def traces(*masses, key=13):
    return [trace_of(parked(67, mass, key=key), bos="added") for mass in masses]


def test_rate():
    found = said(lens.sinks.rate(traces(0.4, 0.1), key=13))
    assert found == [
        ("rate", "Key 13 is a sink in 50.0% [0.0%, 100.0%] of heads (with uniform attention 0.0%; α above 0.3, "
                 f"mean over the queries that see it; {SETTINGS})."),
        ("heads", "It receives most in L0H0 0.26 (mean α)."),
        ("limit", "The rate is a share of heads, no mass, and compares only at equal ε, T, BOS and normalise."),
    ]  # fmt: skip
    two = [
        trace_of(np.concatenate([parked(67, mass, key=13) for mass in (first, 0.3)]))
        for first in (0.6, 0.2)
    ]
    assert dict(said(lens.sinks.rate(two, key=13)))["heads"].endswith(
        "L0H0 is not told apart from L1H0."
    )
    two = [
        trace_of(np.concatenate([parked(67, mass, key=13) for mass in (first, 0.3)]))
        for first in (0.6, 0.599)
    ]
    assert dict(said(lens.sinks.rate(two, key=13)))["heads"].endswith(
        "(mean α)."
    )  # more in each prompt
    one = said(lens.sinks.rate(traces(0.4)[0], key=13, normalise="all"))
    assert one[0][1].startswith("Key 13 is a sink in 100.0% of heads")  # one prompt: no interval
    assert "mean over all queries from it on" in one[0][1]
    holes = trace_of(parked(67, 0.4, key=13), visible=np.full(67, 60))
    assert "(with uniform attention not known;" in said(lens.sinks.rate(holes, key=13))[0][1]


def test_curve():
    found = said(lens.sinks.rate(traces(0.4, 0.1), key=13).curve((0.05, 0.2, 0.5)))
    model = lens.sinks.rate(traces(0.4, 0.1), key=13).samples.model
    even = "with uniform attention"
    assert found == [
        ("rate", f"The share of heads with a sink on key 13 is 100.0% [100.0%, 100.0%] at ε = 0.05 ({even} 0.0%), 50.0% [0.0%, "
                 f"100.0%] at ε = 0.2 ({even} 0.0%), 0.0% [0.0%, 0.0%] at ε = 0.5 ({even} 0.0%) (mean over the queries that see "
                 f"it; {model}, {SETTINGS}, float32)."),
    ]  # fmt: skip
    once = said(lens.sinks.rate(traces(0.4, 0.1), key=13).curve((0.2,)))[0][1]
    assert once.count("ε = 0.2") == 1
    first = lens.sinks.rate(traces(0.4, 0.1, key=0)).curve((0.05, 0.3))
    assert first.table()["uniform"].tolist() == [
        1.0,
        0.0,
    ]  # the first key gets (1 + 1/2 + ...) / 67 = 0.07


def test_keys_and_profile():
    several = traces(0.4, 0.5)
    result = lens.sinks.find(several)
    settings = f"(α above 0.3, mean over the queries that see it; {result.profile.samples})"
    limit = (
        "limit",
        "15 positions were not judged: in some layer fewer than 16 queries count for them.",
    )
    rate = "100.0% [100.0%, 100.0%] of heads (with uniform attention 0.0%)"
    common = ("positions", f"Sinks in more than 25% of heads: position 13 in {rate} {settings}.")
    assert said(result) == [
        (
            "heads",
            f"Sinks in at least one of 2 prompts: 1 key in 1 head, from layer 0 on {settings}.",
        ),
        ("key", f"Key 13 ('t3') is a sink in {rate}, with α up to {(1 + 53 * 0.5) / 54:.2f}."),
        common,
        limit,
    ]
    assert said(result.profile) == [common, limit]
    assert said(lens.sinks.find(trace_of(np.eye(67)[None, None], bos="added")))[:2] == [
        ("heads", f"No key is a sink in any head {settings.replace('n = 2', 'n = 1')}."),
        ("positions", f"No position is a sink in more than 25% of heads {settings.replace('n = 2', 'n = 1')}."),
    ]  # fmt: skip


def test_keys_are_named_by_how_often_they_are_sinks():
    """Keys 3 to 8 are a sink of one prompt each, key 13 of all: it comes first, whatever the number of prompts."""
    several = [
        trace_of((one + parked(67, 0.9, key=key)) / 2, bos="added")
        for key, one in zip(range(3, 9), [parked(67, 0.9, key=13)] * 6, strict=True)
    ]
    result = lens.sinks.find(several, epsilon=0.4)
    assert result.keys == [3, 4, 5, 6, 7, 8, 13]
    table = result.profile.table().set_index("key")
    assert table.loc[13, "rate"] == 1
    assert table.loc[3, "rate"] == pytest.approx(1 / 6)
    assert table.loc[3, "low"] == 0 < table.loc[3, "high"]
    named = [text for kind, text in said(result) if kind == "key"]
    assert len(named) == 5
    assert named[0].startswith("Key 13 ('t3') is a sink in 100.0% [100.0%, 100.0%] of heads")
    assert named[1].startswith("Key 3 ('t3') is a sink in 16.7% [0.0%, 64.6%] of heads (with")


def test_a_key_that_one_layer_shows_to_few_is_named_by_the_heads_of_the_others():
    """It came last, and without a number."""
    near, park, once = (
        windowed(67, 8)[0, 0],
        parked(67, 0.9, key=20)[0, 0],
        parked(67, 0.9, key=3)[0, 0],
    )
    p = np.array([[near, near, near], [park, park, once]])
    result = lens.sinks.find(trace_of(p, windows=[8, None]))
    named = [text for kind, text in said(result) if kind == "key"]
    assert np.isnan(result.profile.rate[20])
    both = [text for text in named if text.startswith(("Key 20 ", "Key 3 "))]
    assert both[0].startswith(
        "Key 20 ('t0') is a sink in 2 heads of the layers in which it is judged, with α up to 0.9"
    )
    assert both[1].startswith(
        "Key 3 ('t3') is a sink in 1 head of the layers in which it is judged"
    )


def test_intervals_of_keys_are_drawn_by_the_seed():
    several = traces(0.9, 0.1)
    shares = np.random.default_rng(0).random((9, 67))
    first, again, other = (
        replace(lens.sinks.find(several, seed=seed).profile, by_prompt=shares)
        .table()["low"]
        .tolist()
        for seed in (0, 0, 9)
    )
    assert first == again != other
    with pytest.raises(lens.LensError, match="seed"):
        lens.sinks.find(several, seed=-1)


def test_blocks():
    samples = Samples("small", "float32", 9, "added", 1)
    bounds = {"lower": [0.4, 0.1, 0.2], "upper": [0.5, 0.2, 0.4]}
    arrays = {name: np.array(values)[None, None] for name, values in bounds.items()}
    edges = {"start": np.array([0, 3, 6]), "stop": np.array([3, 6, 9])}
    arrays |= {"judged": np.ones((1, 3), bool)}
    result = BlockAlphas(**arrays, **edges, layers=(5,), epsilon=0.3, samples=samples)
    assert said(result) == [
        ("blocks", "Of 3 blocks of keys (all heads) 1 hold a sink for certain and 1 hold none (ε = 0.3, small, "
                   "T = 9, BOS added, n = 1, float32)."),
        ("limit", "1 are undecided: the block map bounds alpha and does not give it. Capture `received` for exact "
                  "numbers."),
    ]  # fmt: skip
    assert result.table()["sink"].tolist() == ["yes", "no", "undecided"]
    assert set(result.table()["name"]) == {"L5H0"}


def heads(**columns) -> pd.DataFrame:
    count = len(next(iter(columns.values())))
    places = {"name": [f"L1H{head}" for head in range(count)], "layer": 1, "head": range(count)}
    return pd.DataFrame(places | columns)


def test_mechanism():
    columns = {
        "alpha": [0.9, 0.8, 0.1], "key_norm": [0.25, 0.35, 9], "value_norm": [0.4, 0.6, 9], "cosine": [0.5, 0.7, 9],
        "cosine_others": [-0.2, -0.4, 9], "drain": [0.1, 0.3, 9], "contribution": [0.5, 0.7, 9],
        "alpha_baseline": [0.05] * 3, "contribution_baseline": [0.1] * 3,
    }  # fmt: skip
    values = np.array(list(columns.values()))[..., None] + np.array([0, 0])
    values[1, :2] += [-0.05, 0.05]  # key norms of two prompts
    names = tuple(HeadId(1, head) for head in range(3))
    even = "0.05 with even attention"
    park = (
        "heads",
        f"2 of 3 heads park on the sources (mean α above 0.3, {even}; 2 prompts, BOS added).",
    )
    of = "(median of 2 heads)"
    result = SinkMechanism(values, names, "added", 0)
    found = said(result)
    assert found == [
        park,
        ("keys", f"The sources' keys are 0.30 [0.00, 0.76] times as long as the others {of}."),
        ("directions", f"Their cosine with the queries is 0.60 [0.60, 0.60], that of other keys -0.30 [-0.30, -0.30] {of}."),
        ("values", f"Their values are 0.50 [0.50, 0.50] times as long as the others {of}."),
        ("outputs", "They write 0.20 [0.20, 0.20] times as much as another token with equal attention, and 60% [60%, 60%] of "
                    f"the head's output, with even attention 10% [10%, 10%] {of}."),
        ("limit", "This describes the heads as they are; it proves no cause."),
    ]  # fmt: skip
    assert result.table()["key_norm_low"].tolist() == pytest.approx([0, 0, 9])
    unknown = values.copy()
    unknown[5:7] = np.nan
    kinds = [kind for kind, _ in said(replace(result, values=unknown))]
    assert kinds == ["heads", "keys", "directions", "values", "limit"]
    none = values.copy()
    none[0] = 0.3
    assert said(replace(result, values=none)) == [
        ("heads", f"No head gives the sources a mean α above 0.3 ({even}), so there is no mechanism to explain (2 prompts, "
                  "BOS added)."),
    ]  # fmt: skip
    drawn: Any = result.plot().data[0]
    assert np.array_equal(drawn.y, result.rows["drain"])


def test_gates():
    rows = [
        heads(gate=[0.9, 0.1], low=[0.8, 0.05], high=[1.0, 0.2], gate_baseline=[even] * 2).assign(
            mechanism=name
        )
        for name, even in (("keys", 0.9), ("learned", 0.8), ("off_by_one", 0.7), ("output", np.nan))
    ]
    means = {rows["mechanism"][0]: np.array([0.4, 0.6]) for rows in rows}
    limit = "2 prompts, BOS added; what lies on the sources is that of the rows behind them."
    mean, start = "50% [0%, 100%]", "on average (effective gate"
    least = "L1H1 least, 10.0% [0.0%, 30.0%]."  # the lowest of two
    assert said(EffectiveGates(pd.concat(rows), means, (9, 9), "added", "found", 0)) == [
        ("keys", f"Beside what lies on the sources the heads keep {mean} of their attention {start}; 90% with even "
                 f"attention); {least}"),
        ("learned", f"Beside the model's learned sinks the heads keep {mean} of their attention {start}; 80% with even "
                    f"attention); {least}"),
        ("off_by_one", f"With softmax-off-by-one, which the model does not have, the heads would keep {mean} of their "
                       f"attention {start}; 70% with even attention); {least}"),
        ("output", f"The gates behind the attention let {mean} of the heads' output through {start}); {least}"),
        ("limit", limit),
    ]  # fmt: skip
    hidden = said(EffectiveGates(rows[0], means, (9, 9), "added", "Not looked for.", 0))
    assert hidden[-1] == ("limit", f"{limit} Not looked for.")


def test_memory():
    rows = heads(
        gate=[0.9, 0.1], low=[0.8, 0.05], high=[1.0, 0.2], contribution=[0.1, 0.2], removal=[0.2, 0.4],
        early_mass=[0.5, 0.7], late_mass=[0.1, 0.3], gate_baseline=[0.8, 0.8], early_mass_baseline=[0.4, 0.4],
        late_mass_baseline=[0.1, 0.1],
    )  # fmt: skip
    gate, drift, removed = (0.5, 0.4, 0.6), (-0.4, -0.5, -0.3), (0.3, 0.2, 0.4)
    assert said(PersistentMemory(rows, gate, drift, removed, 1, (9, 9), "absent")) == [
        ("gate", "With 1 pair of memory the heads keep 50% [40%, 60%] of their attention on average (80% with even attention); "
                 "L1H1 least, 10.0% [0.0%, 30.0%]."),
        ("drift", "The mass of the memory goes from 60.0% in the first quarter of the rows to 20.0% in the last, "
                  "-40.0% [-50.0%, -30.0%]; with even attention from 40.0% to 10.0%."),
        ("removal", "Masking the memory changes a head's output by 30% [20%, 40%] of its size on average."),
        ("limit", "2 prompts, BOS absent."),
    ]  # fmt: skip
    wide = said(PersistentMemory(rows, gate, (-0.4, -0.9, 0.1), removed, 3, (9, 9), "absent"))
    assert wide[0][1].startswith("With 3 pairs of")
    assert "-40.0% [-90.0%, +10.0%], not told apart from no change; with" in wide[1][1]
    alone = said(PersistentMemory(rows, gate, (-0.4, np.nan, np.nan), removed, 3, (9,), "absent"))
    assert "-40.0%, of which one prompt tells nothing; with" in alone[1][1]


LIMIT = (
    "Only the stream before the last norm was filtered: what earlier layers read of a band is not in these "
    "numbers."
)


def test_bands():
    random = np.array([[0.0, 0.2], [0.1, 0.1], [0.3, 0.3]])
    losses = BandLosses(
        np.array([[0.1, 0.3], [0.599, 0.601], [0.0, 0.2]]), random, (9, 9), "added", 0
    )
    worth = ("losses", "Without band 1 of 3 the loss rises most, by 0.600 [0.572, 0.628] nats per token, without as many random "
                       "directions by 0.100 [0.100, 0.100]; without the weakest by 0.100 [0.000, 1.017] nats per token, without "
                       "as many random directions by 0.300 [0.300, 0.300] (2 prompts, BOS added).")  # fmt: skip
    assert said(losses) == [worth, ("limit", LIMIT)]
    assert said(replace(losses, delta_loss=-losses.delta_loss - 0.1))[0] == (
        "losses", "Without none of 3 bands the loss is told to rise; without the weakest it changes by -0.200 [-1.117, "
                  "0.000] nats per token, without as many random directions by 0.300 [0.300, 0.300] (2 prompts, BOS added).",
    )  # fmt: skip
    by_chance = replace(losses, delta_loss=np.array([[-0.5, 0.9], [-0.6, 0.6], [-0.4, 0.4]]))
    assert said(by_chance)[0][1].startswith("Without none of 3 bands")  # the highest mean is 0.2
    alone = replace(losses, delta_loss=losses.delta_loss[:, :1], random=random[:, :1], tokens=(9,))
    assert said(alone)[0][1].startswith("Without band 1 of 3 the loss rises most, by 0.599 nats")
    weights = pd.concat(
        [heads(energy=share).assign(weight="query", band=band)
         for band, share in enumerate(([0.2, 0.4], [0.1, 0.3], [0.7, 0.3]))]
    )  # fmt: skip
    nothing: Any = None
    result = SpectralBands(nothing, (0, 3, 6, 8), np.ones(3) / 3, weights, losses)
    energies = ("energies", "Share of the weights in the weakest of 3 bands, mean over heads: query 50.0% (by chance "
                            "25.0%).")  # fmt: skip
    assert said(result) == [energies, worth, ("limit", LIMIT)]
    assert said(SpectralBands(nothing, (0, 3, 6, 8), np.ones(3) / 3, weights)) == [energies]


def massive(rows: list[dict[str, Any]]) -> MassiveActivations:
    top, median = np.array([[[2.0, 1, 1], [60.0, 3, 2]]]), np.array([[1.0, 2.0]])
    table = pd.DataFrame(rows)
    return MassiveActivations(table, top, median, 30.0, 50.0, (9, 7), "added")


def test_massive():
    row = {
        "dimension": 88, "position": 0, "token": "<s>", "emergence": 1, "vanishing": np.nan, "value": -120.3,
        "ratio": 34.8, "prompts": 0.5,
    }  # fmt: skip
    other = row | {"dimension": 7, "position": 3, "vanishing": 4.0}
    limits = "(|h| > 50 and |h| ≥ 30 × the layer's median; 2 prompts of 7 to 9 tokens, BOS added)"
    first = ("dimension", "Dimension 88 at position 0 ('<s>') appears after layer 1 with -120, reaches 35 medians, stays to "
                          "the last layer; in 50% of the prompts.")  # fmt: skip
    assert said(massive([row])) == [("dimensions", f"1 dimension is massive {limits}."), first]
    several = said(massive([row, other]))
    assert several[:2] == [("dimensions", f"2 dimensions are massive {limits}."), first]
    assert "Dimension 7 at position 3" in several[2][1]
    assert "is gone after layer 4;" in several[2][1]
    assert said(massive([])) == [
        ("dimensions", "No activation is massive (|h| > 50 and |h| ≥ 30 × the layer's median): the largest is 60, and the "
                       "largest ratio to a median 30 (2 prompts of 7 to 9 tokens, BOS added)."),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("is_given", "how"), [(True, "given"), (False, "the valley between two modes")]
)
def test_high_norms(is_given, how):
    norms, rows = np.array([[1.0, 9, 1], [1, 1, np.nan]]), pd.DataFrame({"norm": [9.0]})
    found = HighNormTokens(norms, 2, 5.0, 8.0, 9.0, is_given, rows, ())
    assert said(found) == [
        ("tokens", f"1 tokens (20.00%) have a norm above 5 ({how}; 5 tokens of 2 prompts, after layer 2), 9.0 times the "
                   "others' mean."),
    ]  # fmt: skip
    none = HighNormTokens(norms, 2, np.nan, 3.5, 2.5, False, rows[:0], ())
    assert said(none) == [
        ("tokens", "None found: the norms have one mode (5 tokens of 2 prompts, after layer 2). The best cut separates their "
                   "logarithms by D = 3.50 and norms by a factor of 2.50; two modes need 4 and 3."),
    ]  # fmt: skip


def test_dims():
    largest, tokens = np.array([[1.0, 30, 25], [1, 40, 2]]), np.array([[0, 2, 1], [0, 3, 0]])
    found = said(SinkDims((1, 2), largest, tokens, 20.0, 50, "small"))
    assert found[0] == (
        "dims", "2 sink dimensions of small: 1 (up to 40 times the RMS, at most 3 of 50 tokens, entering layers 0 to 1), 2 "
                "(up to 25 times the RMS, at most 1 of 50 tokens, entering layers 0 to 0).",
    )  # fmt: skip
    assert found[1][0] == "limit"
    assert said(SinkDims((), largest / 9, tokens * 0, 20.0, 50, "small")) == [
        ("dims", "No dimension of small passes 20 times the RMS on 50 tokens: the largest reaches 4.4 (with 3 dimensions "
                 "none can)."),
    ]  # fmt: skip
