"""Headlines of sections from their tables: the number, its interval, what it stands beside, and the paired test."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from lens_analyses.report.page import strip_of
from lens_analyses.steps.classes import _headline as classes_headline
from lens_analyses.steps.explain import _without as parts_headline
from lens_analyses.steps.explain_answers import _fragile
from lens_analyses.steps.headlines import (
    of_circuit,
    of_conditions,
    of_edits,
    of_highest,
    of_importance,
    of_pruning,
    of_reaches,
    of_roles,
    of_search,
    of_sink_check,
    of_streaming,
)
from lens_analyses.steps.importance import of_heads_together
from lens_analyses.steps.policies import _of_reuse
from lens_analyses.steps.tried import COLUMNS, told, tried

import lens
from lens.common.head_ids import HeadId
from lens.heads.measures.scores import HeadScores, Intervention
from lens.reading.removals import Removals
from lens.runs.headlines import Headline

NAN = float("nan")


def effects(*rows):
    columns = ["condition", "delta_loss", "delta_loss_low", "delta_loss_high", "excess_low"]
    return pd.DataFrame(rows, columns=[*columns, "excess_high"]).assign(
        edit="mask", scope="all heads", amount=1.0
    )


def test_an_edit_is_told_beside_its_mass_control_where_the_paired_difference_holds():
    edit = ("edit", 0.4, 0.3, 0.5, NAN, NAN)
    (one,) = of_edits(effects(edit, ("mass", 1.5, 1.2, 1.9, -1.4, -0.8)), {"mask": "edit_0"})
    assert (one.value, one.low, one.high, one.baseline) == (0.4, 0.3, 0.5, 1.5)
    assert one.spread == pytest.approx(0.35)
    assert one.figure == "edit_0"
    assert "by +0.4 [+0.3, +0.5] nats a token, and by +1.5 where as much attention" in one.text
    assert not list(of_edits(effects(edit, ("mass", 1.5, 1.2, 1.9, -1.4, 0.1)), {}))
    assert not list(of_edits(effects(edit), {}))


def test_an_edit_of_one_head_that_costs_more_than_of_all_is_told():
    def rows(head):
        table = effects(head, ("edit", 0.1, 0.05, 0.15, NAN, NAN))
        return table.assign(reach=["head", "all"], scope=["L18H8", "all heads"])

    (one,) = of_reaches(rows(("edit", 3.2, 2.9, 3.6, NAN, NAN)), "scopes")
    assert "of L18H8 alone changes the loss by +3.2 [+2.9, +3.6]" in one.text
    assert one.surprise == pytest.approx((2.9 - 0.1) / 0.05)
    assert not list(of_reaches(rows(("edit", 0.16, 0.1, 0.3, NAN, NAN)), "scopes"))


def test_a_role_is_told_beside_the_higher_of_its_chances():
    table = pd.DataFrame(
        {"name": ["L0H0", "L0H1"], "induction": [0.2, 0.9], "induction_low": [0.1, 0.8]}
    ).assign(induction_high=[0.3, 0.95], induction_baseline=0.05)
    (one,) = of_roles(table, {"induction": 0.1}, "copied")
    assert (one.value, one.baseline, one.against) == (0.9, 0.1, "random weights")
    assert "L1" not in one.text
    assert "L0H1: 0.90 [0.80, 0.95]" in one.text
    (one,) = of_roles(table, {"induction": NAN}, "copied")
    assert (one.baseline, one.against) == (0.05, "uniform attention")
    assert not list(of_roles(table.assign(induction_baseline=NAN), {"induction": NAN}, ""))


def test_the_highest_row_stands_beside_the_median_of_the_others():
    table = pd.DataFrame({"name": ["a", "b", "c", "d"], "drop": [0.1, 0.2, 4.0, 0.3]})
    table = table.assign(low=table["drop"] - 0.05, high=table["drop"] + 0.05)
    (one,) = of_highest(table, "drop", "{name}: {value}, others {baseline}", "x")
    assert one.text == "c: 4 [3.95, 4.05], others 0.2"
    assert one.baseline == pytest.approx(0.2)
    (one,) = of_highest(table, "drop", "{name}: {value}, others {baseline}", "x", spec=".1%")
    assert one.text == "c: 400.0% [395.0%, 405.0%], others 20.0%"
    assert not list(of_highest(table[:1], "drop", "{name}", "x"))


def test_a_condition_stands_beside_the_other():
    table = pd.DataFrame(
        [
            ("text", NAN, 0.3, 0.2, 0.4),
            ("text", 0.0, 0.9, 0.9, 0.9),
            ("random", NAN, 0.1, 0.0, 0.1),
        ],
        columns=["condition", "layer", "rate", "low", "high"],
    )
    (one,) = of_conditions(
        table, "text", "random", "{value} against {baseline}", "random", "layers"
    )
    assert one.text == "30% [20%, 40%] against 10%"
    assert one.surprise == pytest.approx(0.1 / 0.05)
    assert not list(of_conditions(table, "text", "none", "", "", ""))


def test_pruning_stands_beside_random_orders():
    row = {"order": "least", "removed": 12, "cost": 0.05, "low": 0.04, "high": 0.06}
    curve = pd.DataFrame([row | {"random_cost": 1.6, "random_low": 0.9, "random_high": 2.7}])
    (one,) = of_pruning(curve, "least", 12, 18, "loss", -1)
    assert one.text.startswith("12 of 18 heads can go, least first: the loss rises by 0.050")
    assert one.surprise == pytest.approx((1.6 - 0.06) / 0.9)
    assert one.unit == "nats"
    assert not list(of_pruning(curve, "least", 0, 18, "loss", -1))
    (one,) = of_pruning(curve, "least", 12, 18, "logit_difference", 1)  # of a task, without text
    assert "first: the logit_difference falls by 0.050" in one.text
    assert one.unit == "logit_difference"


def test_the_head_that_matters_most_is_that_of_the_ablation_and_others_may_name_another():
    def scores(method, *means):
        noise = np.array([-0.1, 0.0, 0.1])
        return HeadScores(
            per_prompt=np.reshape(means, (2, 2, 1)) + noise,
            clean=np.ones(3),
            method=method,
            intervention=Intervention("mean"),
            metric="loss",
            sign=-1,
            task="made",
            model="toy",
        )

    found = [
        scores("gradient", 0.1, 3.0, 0.2, 0.3),
        scores("ablation", 0.1, 0.2, 2.0, 0.3),
        scores("attribution", 0.1, 0.2, 5.0, 0.3),
    ]
    (one,) = of_importance(found)
    assert (one.value, one.unit, one.figure) == (2.0, "loss", "grid_1")
    assert one.baseline == pytest.approx(0.2)
    assert one.text.startswith(
        "L1H0 matters most for made: without it loss is worse by 2 [1.73, 2.27]"
    )
    assert one.text.endswith(
        "without the median head by 0.2 (ablation (mean)). 2 of 3 measures name it first; by gradient it is L0H1."
    )
    alone = replace(found[1], per_prompt=found[1].per_prompt[:1, :1])
    assert not list(of_importance([alone]))
    (one,) = of_importance(
        [found[0], found[2]]
    )  # nothing was taken away: it is not said that it was
    assert one.text.startswith(
        "L0H1 is first for made by gradient, an estimate: 3 [2.73, 3.27] of loss"
    )


def test_heads_that_estimates_put_first_are_told_by_what_was_lost_without_them():
    """By the gradient L0H1 is worth 3, and nothing is lost without it."""
    rows = [
        ("made", "gradient", "L0H1", 0, 1, 3.0, 0.01, 0.0, 0.02, "pooled_mean", 3),
        ("made", "attribution (zero)", "L1H0", 1, 0, 0.7, 0.6, 0.5, 0.7, "pooled_mean", 3),
        ("made", "random", "L0H0", 0, 0, 0.1, 0.1, 0.0, 0.2, "pooled_mean", 3),
        ("made", "random", "L1H1", 1, 1, 0.1, 0.3, 0.2, 0.4, "pooled_mean", 3),
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    text, fields = told(table, "loss") or ("", {})
    assert text == (
        "L1H0 matters most for made of the heads that estimates put first: without it loss is worse by 0.6 "
        "[0.5, 0.7], without one of 2 random heads by 0.2 on the mean. Gradient puts L0H1 first: 3 estimated, "
        "0.01 lost; attribution (zero) puts L1H0 first: 0.7 estimated, 0.6 lost."
    )
    assert fields == pytest.approx(
        {"value": 0.6, "low": 0.5, "high": 0.7, "baseline": 0.2, "spread": 0.1, "many": 2}
    )
    assert (
        told(table.assign(value=[0.01, 0.15, 0.1, 0.3]), "loss") is None
    )  # others are missed more
    assert told(table[:3], "loss") is None  # one head says nothing of heads at random


def test_heads_are_taken_away_for_real_where_they_were_only_estimated():
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 4)
    scores = [
        lens.heads.importance(model, task, method=method, progress=False)
        for method in ("gradient", "attribution")
    ]
    subject = SimpleNamespace(model=model, seed=0, progress=False)
    found = tried(subject, task, scores)
    ablated = lens.heads.importance(
        model, task, method="ablation", baseline="counterfactual", progress=False
    )
    expected = [ablated.values[place] for place in zip(found["layer"], found["head"], strict=True)]
    np.testing.assert_allclose(found["value"], expected, rtol=1e-5, atol=1e-6)
    assert found["name"].tolist()[:2] == [str(one.top(1)[0]) for one in scores]
    drawn = found.loc[found["by"] == "random", "name"]
    assert len(set(drawn)) == 4
    assert not set(drawn) & set(found["name"][:2])


def test_the_sink_of_a_circuit_stands_beside_as_many_other_heads():
    table = pd.DataFrame(
        [
            ("excluded", "circuit", -0.4, -0.5, -0.3),
            ("excluded", "others", -0.1, -0.2, 0.0),
            ("redistributed", "circuit", 0.3, 0.2, 0.4),
        ],
        columns=["edit", "heads", "gain", "gain_low", "gain_high"],
    )
    (one,) = of_sink_check(table, "ioi", "logit_difference", "sink", 2.0)
    assert one.text == (
        "With the first key excluded in the circuit's heads ioi gains -0.4 [-0.5, -0.3] logit_difference (below 0 it goes "
        "worse), in as many others of the same layers -0.1."
    )
    assert (one.value, one.low, one.high, one.baseline) == (-0.4, -0.5, -0.3, -0.1)
    assert one.spread == pytest.approx(0.1)


def test_the_strip_of_the_highest_of_many_is_as_wide_as_its_sentence():
    one = Headline("", 0.5, 0.4, 0.6, 0.1, "the median head", many=24, units=8)
    low, high = one.ends
    assert low < 0.4
    assert high > 0.6
    plain = replace(one, many=1)
    assert strip_of(one.as_json()) == strip_of(replace(plain, low=low, high=high).as_json())
    assert strip_of(one.as_json()) != strip_of(plain.as_json())


def test_nothing_is_told_of_a_change_that_is_rounding():
    """Of a classifier that was not trained, whose keys change nothing: -4e-8 of a metric of 0.01."""
    table = pd.DataFrame(
        [("excluded", "circuit", -4e-8, -5e-8, -3e-8), ("excluded", "others", 1e-9, 0.0, 2e-9)],
        columns=["edit", "heads", "gain", "gain_low", "gain_high"],
    )
    assert not list(of_sink_check(table, "letters", "logit_difference", "sink", 0.01))
    assert len(list(of_sink_check(table, "letters", "logit_difference", "sink", 1e-4))) == 1


def test_a_role_that_is_highest_by_chance_is_not_told():
    """Of 200 heads the highest lies three standard errors above uniform attention, as one of them does by chance."""
    noise = np.random.default_rng(0).normal(0.1, 0.01, 200)
    table = pd.DataFrame({"name": [f"L{at}H0" for at in range(200)], "induction": noise})
    table = table.assign(
        induction_low=noise - 0.0196, induction_high=noise + 0.0196, induction_baseline=0.1
    )
    (one,) = of_roles(table, {"induction": NAN}, "copied")
    assert one.low > one.baseline
    assert not one.stands


def test_a_circuit_stands_beside_the_best_random_ones():
    table = pd.DataFrame(
        [
            ("circuit", 0.9, 0.85, 0.95, 18),
            ("uniform", 0.0, 0.0, 0.1, 18),
            ("degrees", 0.2, -0.1, 0.4, 18),
            ("magnitude", NAN, NAN, NAN, 18),
        ],
        columns=["circuit", "faithfulness", "low", "high", "edges"],
    )
    words = {"uniform": "random", "degrees": "same degrees", "magnitude": "largest"}
    (one,) = of_circuit(table, words, "faithfulness")
    assert (one.against, one.baseline) == ("same degrees", 0.2)
    assert one.spread == pytest.approx(0.25)


def test_groups_caches_and_searches_say_their_other_side():
    both = pd.DataFrame(
        {"role": ["a", "b"], "heads": ["L0H0 L0H1", "L0H2 L0H3"], "value": [2.0, 1.0]}
    ).assign(low=[1.8, 0.9], high=[2.2, 1.1], alone=[1.2, 1.5], interaction=[0.8, -0.5])
    both = both.assign(interaction_low=[0.6, -0.8], interaction_high=[1.0, -0.2])
    (one,) = of_heads_together(both, "loss")
    assert (one.value, one.low, one.high, one.baseline) == (0.8, 0.6, 1.0, 0.0)
    assert one.text.endswith("worth 2 [1.8, 2.2], alone 1.2 in sum: +0.8 [+0.6, +1] more.")
    assert one.stands
    assert one.against == "heads that do not stand in for each other"
    assert np.isnan(one.spread), "no interaction is exactly 0"
    assert not list(of_heads_together(both.assign(interaction_low=-0.1), "loss"))
    cache = pd.DataFrame({"first": [0, 1, 4], "last": 12, "delta_loss": [0.5, 0.3, 0.2]})
    cache = cache.assign(delta_loss_low=[0.4, 0.2, 0.1], delta_loss_high=[0.6, 0.35, 0.3])
    (one,) = of_streaming(cache, "policies")
    assert (one.value, one.baseline, one.spread) == (0.3, 0.5, pytest.approx(0.1))
    judged = pd.DataFrame(
        {"heads": ["chosen", "chosen", "all"], "prompts": ["validation", "test", "test"]}
    )
    judged = judged.assign(
        gain=[0.2, 0.1, -0.1], gain_low=[0.1, 0.05, -0.2], gain_high=[0.3, 0.2, 0.0]
    )
    (one,) = of_search(judged, "loss", "gains")
    assert (one.value, one.baseline) == (0.1, -0.1)
    assert not list(of_search(judged[:1], "loss", "gains"))


def test_a_baseline_that_was_measured_scatters_as_its_interval_says():
    conditions = pd.DataFrame(
        {
            "condition": ["prompt"],
            "efficiency": [0.8],
            "efficiency_low": [0.7],
            "efficiency_high": [0.9],
        }
    ).assign(own_recall=0.5, random_recall=0.25, random_recall_low=0.2, random_recall_high=0.3)
    (one,) = _of_reuse(conditions)
    assert (one.baseline, one.spread) == (0.5, pytest.approx(0.1))
    assert "keep 0.80 [0.70, 0.90] of" in one.text
    assert "at random 0.50 [0.40, 0.60]" in one.text
    changed = pd.DataFrame(
        {"name": ["L0H0"], "along": "logits", "size": 2.0, "worst": 0.5, "random": 0.3}
    )
    changed = changed.assign(worst_low=0.4, worst_high=0.6, random_low=0.05, random_high=0.55)
    (one,) = _fragile(changed)
    assert (one.baseline, one.spread) == (0.3, pytest.approx(0.25))
    assert not one.stands, "0.1 beyond a baseline that scatters by 0.25"
    lost = pd.DataFrame(
        {"name": ["L0H0"], "label": ["four"], "value": 0.3, "low": 0.25, "high": 0.35}
    )
    (one,) = classes_headline(lost.assign(all=0.1, chance_low=0.06, chance_high=0.14), 12)
    assert (one.baseline, one.spread, one.many) == (0.1, pytest.approx(0.04), 12)
    assert "the class four loses 0.3 [0.25, 0.35] of its probability, as many " in one.text
    assert one.text.endswith("examples of any class 0.1 [0.06, 0.14].")


def test_a_part_is_told_where_the_attention_falls_on_the_same_prompts():
    def without(*measured):
        parts = tuple(f"L0H{number}" for number in range(len(measured)))
        return Removals(
            HeadId(0, 1), "key", parts, "such keys", np.array([0.5, 0.6, 0.7]),
            np.array([[0.2, 0.3, 0.4]] * len(parts)), np.array(measured), 0, "toy",
        )  # fmt: skip

    (one,) = parts_headline({HeadId(0, 1): without([0.3, 0.4, 0.5])})
    assert (one.value, one.baseline) == (pytest.approx(0.4), pytest.approx(0.6))
    assert one.spread == pytest.approx(0.2689, abs=1e-3)
    assert "gives such keys 40.0% [" in one.text
    assert "of its attention instead of 60.0% [" in one.text
    assert not list(parts_headline({HeadId(0, 1): without([0.1, 0.7, 0.8])}))
    assert not list(parts_headline({HeadId(0, 1): without([0.8, 0.9, 1.0])})), "it rises"
    assert not list(parts_headline({HeadId(0, 1): without([NAN] * 3)}))
    (one,) = parts_headline({HeadId(0, 1): without([NAN] * 3, [0.3, 0.4, 0.5])})
    assert "Without what L0H1 wrote" in one.text
    barely = [0.49, 0.585, 0.69]
    assert list(parts_headline({HeadId(0, 1): without(barely)}))
    others = [[0.5, 0.6, 0.7]] * 23
    assert not list(parts_headline({HeadId(0, 1): without(barely, *others)})), "lowest of 24"
