"""Findings say what the table of scores holds, in words with numbers."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from lens.common.errors import LensError
from lens.traces.findings import HeadScore, findings
from lens.traces.profiles import beside_random, pooled_table, prompt_table
from tests.lens.traces import LENGTH, probabilities, trace_of


@pytest.fixture(scope="module")
def table():
    """Scores of six heads of random attention, which does nothing in particular."""
    trace = trace_of(probabilities(layers=2, heads=3, length=LENGTH, seed=2))
    return prompt_table(trace, "p000").assign(uniform=0.052, random_weights=0.071)


def plant(table, metric, heads, low=0.85, high=0.95):
    """The table with `heads` {(layer, head): value} of one metric."""
    table = table.copy()
    for (layer, head), value in heads.items():
        rows = (table["metric"] == metric) & (table["variant"] == "raw")
        rows &= (table["layer"] == layer) & (table["head"] == head)
        assert rows.sum() == 1
        table.loc[rows, ["value", "low", "high"]] = [value, low, high]
    return table


def of_kind(table, kind):
    return {finding.kind: finding for finding in findings(table)}[kind]


def test_heads_above_the_threshold_are_named_and_only_those(table):
    copied = pooled_table([table, table], "copied").assign(random_weights=0.071)
    planted = plant(copied, "induction", {(1, 0): 0.9, (1, 2): 0.88, (0, 1): 0.3})
    first = findings(planted)[0]
    assert (first.kind, first.found, first.prompt_id) == ("induction", True, "copied")
    assert [head.name for head in first.heads] == ["L1H0", "L1H2"]
    assert first.text == (
        "2 induction heads (of 6 heads) score above 0.3 and, with the whole interval, above uniform "
        "attention (0.05) and random weights (0.07). On copied random tokens they put 88% to 90% "
        "of their attention on the token that followed the last time: L1H0 0.90 [0.85, 0.95], "
        "L1H2 0.88 [0.85, 0.95]."
    )


def test_uniform_attention_is_named_with_its_range_over_the_layers(table):
    """Each head stands beside uniform attention of its own layer: 0.45 is above 0.05 and not above 0.60."""
    copied = pooled_table([table, table], "copied").assign(random_weights=0.071)
    copied["uniform"] = np.where(copied["layer"] == 0, 0.05, 0.6)
    finding = of_kind(plant(copied, "induction", {(0, 0): 0.45}, 0.4, 0.5), "induction")
    assert [head.name for head in finding.heads] == ["L0H0"]
    assert (
        "above uniform attention (0.05 to 0.60 by layer) and random weights (0.07)" in finding.text
    )
    none = of_kind(plant(copied, "induction", {(1, 0): 0.45}, 0.4, 0.5), "induction")
    assert not none.found
    assert "an interval above uniform attention (0.05 to 0.60 by layer) and random" in none.text


def test_none_is_said_with_the_highest_score(table):
    copied = table.assign(prompt_id="copied", value=table["value"] * 0.1, low=np.nan, high=np.nan)
    finding = of_kind(plant(copied, "induction", {(0, 1): 0.1}, np.nan, np.nan), "induction")
    assert not finding.found
    assert finding.text == (
        "No induction head: the highest score on copied random tokens is L0H1 0.10; a head needs more than "
        "0.3 and an interval above uniform attention (0.05) and random weights (0.07)."
    )
    assert [head.name for head in finding.heads] == ["L0H1"]


def test_one_head_is_one(table):
    text = plant(table.assign(prompt_id="text"), "sink_mass", {(1, 1): 0.856})
    assert of_kind(text, "sink").text == (
        "1 head with a sink on the first token (of 6 heads) scores above 0.3 and, with the whole interval, "
        "above uniform attention (0.05) and random weights (0.07). On text it parks 86% of its attention on the first token: L1H1 0.86 [0.85, 0.95]."
    )


def test_many_heads_are_counted_and_the_strongest_named(table):
    heads = {(layer, head): 0.5 + 0.01 * head for layer in range(2) for head in range(3)}
    text = plant(table.assign(prompt_id="text"), "sink_mass", heads)
    finding = next(one for one in findings(text, most=2) if one.kind == "sink")
    assert len(finding.heads) == 6
    assert "6 heads with a sink on the first token (of 6 heads) score" in finding.text
    assert "they park 50% to 52% of" in finding.text
    assert finding.text.endswith("L0H2 0.52 [0.85, 0.95], L1H2 0.52 [0.85, 0.95] and 4 more.")


def test_each_kind_is_told_from_the_prompts_that_show_it_best(table):
    text, copied = table.assign(prompt_id="text"), table.assign(prompt_id="copied")
    found = {finding.kind: finding.prompt_id for finding in findings(pd.concat([copied, text]))}
    assert found == {
        "sink": "text",
        "induction": "copied",
        "previous_token": "copied",
        "duplicate_token": "copied",
    }
    assert {finding.prompt_id for finding in findings(text)} == {"text"}
    assert findings(table) == [], "single prompts are not pooled"


def test_what_was_not_scored_gives_no_finding(table):
    assert findings(table.assign(prompt_id="copied", value=np.nan)) == []


def test_findings_are_plain_values(table):
    found = findings(plant(table.assign(prompt_id="text"), "induction", {(0, 0): 0.7}))
    assert json.loads(json.dumps([asdict(one) for one in found]))[0]["heads"][0]["value"] == 0.7
    assert str(HeadScore(3, 5, 0.456, np.nan, np.nan)) == "L3H5 0.46"


@pytest.mark.parametrize("length", [51, 101])
def test_uniform_attention_on_the_probe_is_far_below_every_threshold(length):
    """BOS + r + r: the thresholds must not be what attention gets by spreading evenly."""
    half = np.random.default_rng(0).integers(1, 500, length // 2).tolist()
    even = np.tri(length) / np.arange(1, length + 1)[:, None]
    scores = prompt_table(trace_of(even[None, None], ids=[0, *half, *half]), "copied")
    found = findings(scores)
    assert len(found) == 4
    assert not any(finding.found for finding in found)
    assert max(finding.heads[0].value for finding in found) < 0.1


def test_heads_that_do_no_more_than_uniform_attention_are_not_counted():
    """Nine heads near uniform on prompts of 11 tokens of 3 symbols all pass 0.3; a planted one counts."""
    random = np.random.default_rng(0)
    traces, untrained = [], []
    for seed in range(8):
        ids = [0, *(2 * random.integers(1, 4, 5).tolist())]
        for kept, planted in ((traces, True), (untrained, False)):
            logits = 0.1 * np.random.default_rng([seed, planted]).normal(size=(3, 3, 11, 11))
            if planted:  # L1H2 looks at what followed the last time
                logits[1, 2] += 9 * (np.array([-1, *ids[:-1]]) == np.array(ids)[:, None])
            weights = np.exp(logits) * np.tri(11)
            kept.append(trace_of(weights / weights.sum(-1, keepdims=True), ids=ids))
    copied, beside = (
        pooled_table([prompt_table(trace, "p") for trace in some], "copied")
        for some in (traces, untrained)
    )
    assert (copied.loc[copied["metric"] == "induction", "value"] > 0.3).all()
    for table in (copied, beside_random(copied, beside)):
        finding = of_kind(table, "induction")
        assert [head.name for head in finding.heads] == ["L1H2"]
        assert finding.uniform > 0.3
    assert finding.random_weights > finding.uniform
    assert not of_kind(beside_random(beside, beside), "induction").found


def test_a_head_is_not_counted_on_a_guess(table):
    """Without an interval, or where neither baseline is known, no head is above it."""
    text = plant(table.assign(prompt_id="text"), "induction", {(0, 0): 0.7})
    assert of_kind(text, "induction").found
    assert of_kind(text.assign(random_weights=np.nan), "induction").found
    assert not of_kind(text.assign(random_weights=0.86), "induction").found
    assert not of_kind(text.assign(uniform=np.nan, random_weights=np.nan), "induction").found
    assert not of_kind(text.assign(low=np.nan), "induction").found
    with pytest.raises(
        LensError, match=r"a table with the columns prompt_id, .* random_weights, got"
    ):
        findings(text.drop(columns="random_weights"))
    said = of_kind(text.assign(random_weights=np.nan), "induction").text
    assert "above uniform attention (0.05). " in said
