"""Two runs side by side: pairs of prompts, differences against loops, refusals, figures."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lens import stats
from lens.common.errors import LensError
from lens.common.files import write_json
from lens.common.results import of_kind
from lens.runs import compare_runs
from lens.runs.comparison.pairing import paired_prompts
from lens.runs.comparison.pictures import comparison_scatter, difference_grid
from lens.runs.comparison.tables import side_by_side
from lens.runs.comparison.words import signed
from lens.runs.sections import Section
from lens.runs.writer import RunWriter
from lens.traces.profiles import COLUMNS
from tests.lens.made_runs import meta

LAYERS, HEADS = 2, 3
TEXTS = (("a", "b"), ("c", "d"), ("e", "f"))
METRICS = ("induction", "sink_mass", "previous_token", "entropy", "top_key")


def make_run(folder, seed, *, texts=TEXTS, copied=(), shape=(LAYERS, HEADS), scores=None, **config):
    """A run of made-up scores on prompts of the given tokens; `scores` replaces those drawn."""
    random = np.random.default_rng(seed)
    prompts = [("text", tokens) for tokens in texts] + [("copied", tokens) for tokens in copied]
    entries = meta(
        title=f"run {seed}",
        model={"name": "made-up", "layers": shape[0], "heads": shape[1]},
        prompts={"total": len(prompts), "done": len(prompts)},
        versions={"attention-lens": "0"},
    )
    writer = RunWriter.start(
        folder, {"seed": seed, "model": {"name": "made-up"}, **config}, entries
    )
    writer.table(
        "prompts",
        pd.DataFrame(
            {
                "prompt_id": [f"p{number:03d}" for number in range(len(prompts))],
                "kind": [kind for kind, _ in prompts],
                "title": "t",
                "text": "x",
                "tokens": [len(tokens) for _, tokens in prompts],
                "token_ids": [list(range(len(tokens))) for _, tokens in prompts],
                "token_strings": [list(tokens) for _, tokens in prompts],
                "loss": random.random(len(prompts)),
                "loss_repeat": np.where(
                    [kind == "copied" for kind, _ in prompts], random.random(len(prompts)), np.nan
                ),
                "status": "done",
                "seconds": 0.1,
            }
        ),
    )
    values = random.random((len(prompts), len(METRICS), *shape)) if scores is None else scores
    rows = []
    for kind in ("text", "copied"):
        members = [number for number, prompt in enumerate(prompts) if prompt[0] == kind]
        named = [(f"p{number:03d}", values[number]) for number in members]
        if members:
            named.insert(0, (kind, values[members].mean(0)))
        rows += [
            (name, layer, head, metric, "raw", value, value - 0.01, value + 0.01, 1, "", 0.2, 0.2)
            for name, table in named
            for place, metric in enumerate(METRICS)
            for (layer, head), value in np.ndenumerate(table[place])
        ]
    writer.table("heads", pd.DataFrame(rows, columns=list(COLUMNS)))
    return writer.finish()


@pytest.fixture
def pair(tmp_path):
    """Two of the text prompts are shared, in another order."""
    a = make_run(tmp_path, 1)
    return a, make_run(tmp_path, 2, texts=(TEXTS[2], ("g", "h"), TEXTS[0]), copied=[("z", "z")])


def score(run, prompt, metric, layer, head):
    rows = run.heads.set_index(["prompt_id", "metric", "layer", "head"])["value"]
    return rows[prompt, metric, layer, head]


def test_prompts_of_the_same_tokens_are_pairs_each_once(tmp_path):
    a = make_run(tmp_path, 1, texts=(("a", "b"), ("a", "b"), ("c",)))
    b = make_run(tmp_path, 2, texts=(("c",), ("a", "b")), copied=[("a", "b")])
    assert paired_prompts(a, b) == {
        "text": [("p000", "p001"), ("p002", "p000")],
        "copied": [],
        "picture": [],
        "sound": [],
    }


def test_differences_are_means_over_the_shared_prompts(pair):
    a, b = pair
    comparison = compare_runs(a, b)
    assert comparison.shared == {"text": 2}  # A has no copied prompts
    assert len(comparison.heads) == (len(METRICS) - 1) * LAYERS * HEADS
    for row in comparison.heads.to_dict("records"):
        at = (row["metric"], row["layer"], row["head"])
        assert row["name"] == f"L{row['layer']}H{row['head']}"
        x = [score(a, "p000", *at), score(a, "p002", *at)]
        y = [score(b, "p002", *at), score(b, "p000", *at)]
        each = [right - left for left, right in zip(x, y, strict=True)]
        assert row["a"] == pytest.approx(np.mean(x), rel=1e-12)
        assert row["b"] == pytest.approx(np.mean(y), rel=1e-12)
        assert row["difference"] == pytest.approx(np.mean(each), rel=1e-12)
        ends = stats.over_units(np.array(each), np.ones(2), 0, shares=False)
        assert (row["low"], row["high"]) == pytest.approx(tuple(map(float, ends)))
        assert row["n"] == 2
    assert "top_key" not in set(comparison.heads["metric"])


def test_a_score_over_all_heads_has_its_largest_change(pair):
    comparison = compare_runs(*pair)
    for row in comparison.metrics.to_dict("records"):
        part = comparison.heads[comparison.heads["metric"] == row["metric"]]
        assert row["difference"] == pytest.approx(part["difference"].mean())
        worst = part.loc[part["difference"].abs().idxmax()]
        assert row["largest"] == f"L{worst['layer']}H{worst['head']}"
        assert row["largest_difference"] == worst["difference"]
        assert row["rank_correlation"] == pytest.approx(
            stats.spearman(part["a"].to_numpy(), part["b"].to_numpy())
        )


def test_the_interval_holds_the_mean_and_shrinks_with_prompts(tmp_path):
    random = np.random.default_rng(5)
    widths = []
    for count in (4, 64):
        texts = [(str(number), "x") for number in range(count)]
        shape = (count, len(METRICS), LAYERS, HEADS)
        base = random.random(shape)
        a = make_run(tmp_path / str(count), 1, texts=texts, scores=base)
        b = make_run(
            tmp_path / str(count),
            2,
            texts=texts,
            scores=base + 0.2 + 0.1 * random.normal(size=shape),
        )
        heads = compare_runs(a, b).heads
        assert ((heads["low"] < heads["difference"]) & (heads["difference"] < heads["high"])).all()
        assert ((heads["low"] < 0.2) & (heads["high"] > 0.2)).mean() > 0.7
        widths.append((heads["high"] - heads["low"]).mean())
    assert widths[1] < widths[0] / 2


def test_a_score_that_one_run_lacks_drops_its_prompt(tmp_path):
    values = np.random.default_rng(0).random((3, len(METRICS), LAYERS, HEADS))
    a = make_run(tmp_path, 1, scores=values)
    holes = values + 0.25
    holes[1, 0, 1, 2] = np.nan
    holes[:, 1, 0, 0] = np.nan
    heads = compare_runs(a, make_run(tmp_path, 2, scores=holes)).heads
    at = heads.set_index(["metric", "layer", "head"])
    assert at.loc[("induction", 1, 2), "a"] == pytest.approx(values[[0, 2], 0, 1, 2].mean())
    assert at.loc[("induction", 1, 2), "difference"] == pytest.approx(0.25)
    never = at.loc[("sink_mass", 0, 0)]
    assert never[["a", "b", "difference", "low", "high"]].isna().all()


def test_without_shared_prompts_there_is_no_interval(tmp_path):
    a, b = make_run(tmp_path, 1), make_run(tmp_path, 2, texts=[("q",), ("r",), ("s",), ("t",)])
    comparison = compare_runs(a, b)
    row = comparison.heads.iloc[0]
    at = (row["metric"], row["layer"], row["head"])
    assert row["difference"] == pytest.approx(score(b, "text", *at) - score(a, "text", *at))
    assert comparison.heads[["low", "high"]].isna().all(axis=None)
    assert comparison.losses.empty
    assert any("share no prompt of the same tokens" in text for text in comparison.limits)


def test_runs_that_share_no_prompt_are_not_said_to_be_alike(tmp_path):
    """Equal scores on other prompts: neither "no difference" nor a head of one run alone may be claimed."""
    values = np.full((4, 5, LAYERS, HEADS), 0.1)
    values[:, 0, 1, 2] = 0.9
    a = make_run(tmp_path, 1, texts=[("q", "r"), ("s", "t"), ("u", "v"), ("w", "x")], scores=values)
    b = make_run(tmp_path, 2, texts=[("a",), ("b",), ("c",), ("d",)], scores=values)
    said = compare_runs(a, b).findings()
    assert of_kind(said, "change") == (
        "Whether a head's share of attention differs cannot be said: the runs share no prompt of the same "
        "tokens.",
    )
    assert (
        "Induction heads (on text, above 0.3, uniform attention and random weights): 1 of 6 in A, 1 of 6 in "
        "B; not compared head by head, as the runs share no prompt (tokens a prompt: 2 in A, 1 in B)."
    ) in of_kind(said, "heads")


def test_runs_that_share_copied_prompts_alone_say_nothing_of_heads_on_text(tmp_path):
    """Orders and differences on text were told of as if both had read the same."""
    alike, texts = [("r", "s"), ("t", "u")], [("a",), ("b",), ("c",), ("d",)]
    drawn = np.random.default_rng(0).random((6, 5, LAYERS, HEADS))
    other = np.concatenate([1 - drawn[:4], drawn[4:]])
    a = make_run(tmp_path, 1, copied=alike, scores=drawn, texts=texts)
    b = make_run(tmp_path, 2, copied=alike, scores=other, texts=[("q",), ("r",), ("s",), ("t",)])
    comparison = compare_runs(a, b)
    assert comparison.shared == {"text": 0, "copied": 2}
    said = comparison.findings()
    assert of_kind(said, "order") == (
        "Every score puts the heads of both runs into the same order: Spearman's correlation is never below 1.000.",
    )
    assert of_kind(said, "change") == (
        "No head's share of attention on copied random tokens differs by 0.005 or more.",
    )


def test_the_sentence_on_losses_names_each_run_with_its_own(tmp_path):
    a, b = make_run(tmp_path, 1), make_run(tmp_path, 2)
    comparison = compare_runs(a, b)
    (row,) = comparison.losses[comparison.losses["what"] == "loss"].to_dict("records")
    means = [run.prompts["loss"].mean() for run in (a, b)]
    assert (row["a"], row["b"]) == pytest.approx(means)
    assert abs(means[0] - means[1]) > 0.01
    (said,) = of_kind(comparison.findings(), "loss")
    assert said.startswith(
        f"On text the loss is {means[0]:.2f} nats a token in A and {means[1]:.2f} in B: "
        f"{signed(means[1] - means[0])} ["
    )


def test_models_of_other_shapes_are_refused_by_head_and_compared_by_mean(tmp_path):
    a, b = make_run(tmp_path, 1), make_run(tmp_path, 2, shape=(3, 5))
    comparison = compare_runs(a, b)
    assert not comparison.aligned
    assert comparison.heads.empty
    assert "2 layers of 3 heads and made-up has 3 layers of 5 heads" in comparison.refusal
    row = comparison.metrics.set_index("metric").loc["entropy"]
    means = [
        run.heads.query("metric == 'entropy' and prompt_id == 'text'")["value"].mean()
        for run in (a, b)
    ]
    assert (row["a"], row["b"]) == pytest.approx(means)
    assert row["low"] < row["difference"] < row["high"]
    assert np.isnan(row["rank_correlation"])
    for draw in (comparison_scatter, difference_grid, type(comparison).plot):
        with pytest.raises(LensError, match="cannot be matched by their number"):
            draw(comparison)


def test_one_run_is_not_compared_with_itself(pair):
    with pytest.raises(LensError, match="A and B are the same run"):
        compare_runs(pair[0], pair[0])


def test_sentences_count_the_heads_of_each_kind(tmp_path):
    low, high = np.full((3, 5, LAYERS, HEADS), 0.1), np.full((3, 5, LAYERS, HEADS), 0.1)
    low[:, 0, 1, 2] = high[:, 0, 1, 2] = 0.9
    low[:, 0, 0, 1] = 0.8
    high[:, 1, 0, 0] = 0.7
    comparison = compare_runs(make_run(tmp_path, 1, scores=low), make_run(tmp_path, 2, scores=high))
    text = "\n".join(comparison.sentences)
    assert (
        "Induction heads (on text, above 0.3, uniform attention and random weights): 1 (L1H2) in both, 1 "
        "(L0H1) only in A, 0 only in B." in text
    )
    assert "0 in both, 0 only in A, 1 (L0H0) only in B." in text
    assert "L0H1 induction on text from 0.80 to 0.10, −0.7 [−0.7, −0.7]" in text
    assert "L0H0 sink mass on text from 0.10 to 0.70, +0.6" in text
    assert "Neither run has a previous-token head" in text


def test_equal_scores_are_said_to_be_equal(tmp_path):
    values = np.random.default_rng(0).random((3, 5, LAYERS, HEADS))
    comparison = compare_runs(
        make_run(tmp_path, 1, scores=values), make_run(tmp_path, 2, scores=values + 1e-8)
    )
    assert "No head's share of attention differs by 0.005 or more." in comparison.sentences
    assert any(
        "into the same order: Spearman's correlation is never below 1.000" in s
        for s in comparison.sentences
    )


def test_a_picture_of_equal_runs_says_that_no_head_differs(tmp_path):
    values = np.random.default_rng(0).random((3, 5, LAYERS, HEADS))
    comparison = compare_runs(
        make_run(tmp_path, 1, scores=values), make_run(tmp_path, 2, scores=values)
    )
    title = comparison.plot("entropy").layout.title.text
    assert title.endswith(": no head differs; rank correlation 1.00")


def test_settings_that_differ_are_listed(tmp_path):
    a = make_run(tmp_path, 1, capture={"block_size": 7})
    b = make_run(tmp_path, 2, capture={"block_size": 11}, prompts={"tokens": 3})
    settings = compare_runs(a, b).settings.set_index("setting")
    assert settings.loc["capture.block_size"].tolist() == ["7", "11"]
    assert settings.loc["prompts.tokens"].tolist() == ["", "3"]
    assert "model.name" not in settings.index


def section(name, table):
    return Section(name, name, columns={str(column): "?" for column in table}, tables={"t": table})


def test_tables_of_sections_are_merged_on_what_names_their_rows(tmp_path):
    a, b = make_run(tmp_path, 1), make_run(tmp_path, 2)
    x = pd.DataFrame(
        {"rule": ["m", "m", "d"], "amount": [0.0, 1, 1], "loss": [1.0, 2, 3], "loss_low": 0.0}
    )
    y = pd.DataFrame(
        {"rule": ["d", "m", "m"], "amount": [1.0, 0, 1], "loss": [7.0, 1, 2.5], "loss_low": 1.0}
    )
    for run, table in ((a, x), (b, y)):
        section("doses", table).save(run.path)
    rows = compare_runs(a, b).sections
    assert rows[["section", "table", "column", "rows"]].values.tolist() == [
        ["doses", "t", "loss", 3]
    ]
    row = rows.iloc[0]
    assert (row["a"], row["b"], row["difference"]) == pytest.approx((2, 3.5, 1.5))
    assert (row["largest"], row["largest_difference"]) == ("d, 1", 4)


@pytest.mark.parametrize(
    ("x", "y", "aligned", "reason"),
    [
        ({"v": [1.0, 1.0]}, {"v": [1.0, 1.0]}, True, "no columns that both runs have name its rows"),
        ({"cluster": [0, 1]}, {"cluster": [0, 1]}, True, "no columns that both runs have"),
        ({"a": [1, 2], "v": 1.0}, {"b": [1, 2], "v": 1.0}, True, "no columns that both runs have"),
        ({"head": ["L0H1"], "v": 1.0}, {"head": ["L0H1"], "v": 2.0}, False, "heads of differing models"),
        ({"name": ["L0H1"], "v": 1.0}, {"name": ["L0H1"], "v": 2.0}, False, "heads of differing models"),
        ({"k": ["a", "b", "c"], "v": 1.0}, {"k": ["c", "d", "e"], "v": 1.0}, True, "1 of its 3 rows in A are among the 3 in B"),
        ({"k": [1, 2], "v": 1.0}, {"k": ["a", "b"], "v": 1.0}, True, "k are other kinds of values in A than in B"),
        ({"k": [{"a": 1}], "v": 1.0}, {"k": [{"a": 1}], "v": 1.0}, True, "no columns that both runs have"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_compared_say_why(x, y, aligned, reason):
    with pytest.raises(LensError, match=reason):
        side_by_side(
            section("s", pd.DataFrame(x)), section("s", pd.DataFrame(y)), "t", aligned=aligned
        )


def test_refused_tables_are_limits(tmp_path):
    a, b = make_run(tmp_path, 1), make_run(tmp_path, 2)
    for run in (a, b):
        section("similarity", pd.DataFrame({"cluster": [0, 1], "v": 1.0})).save(run.path)
    limits = compare_runs(a, b).limits
    assert "similarity/t is not compared: no columns that both runs have name its rows." in limits


def test_the_scatter_holds_a_and_b_and_sets_off_what_differs(pair):
    comparison = compare_runs(*pair)
    sure = comparison.heads.index % 2 == 0  # two prompts tell nothing apart
    ends = {
        end: comparison.heads[end].where(~sure, comparison.heads["difference"])
        for end in ("low", "high")
    }
    comparison = replace(comparison, heads=comparison.heads.assign(**ends))
    rows = comparison.heads[comparison.heads["metric"] == "entropy"]
    figure = comparison.plot("entropy", title="T", width=310, height=210, theme="dark")
    differs = (rows["low"] > 0) | (rows["high"] < 0)
    assert list(figure.data[0].x) == list(figure.data[0].y)
    by_name = {trace.name: trace for trace in figure.data}
    for name, part in (("head", rows[~differs]), ("differs beyond its interval", rows[differs])):
        np.testing.assert_array_equal(by_name[name].x, part["a"])
        np.testing.assert_array_equal(by_name[name].y, part["b"])
    assert (figure.layout.title.text, figure.layout.width, figure.layout.height) == ("T", 310, 210)
    meta = json.loads(figure.to_json())["layout"]["meta"]
    assert (meta["a"], meta["b"], meta["prompts"]) == (pair[0].id, pair[1].id, "text")


def test_the_grid_holds_every_difference_centred_at_zero(pair):
    comparison = compare_runs(*pair)
    figure = difference_grid(comparison, "sink_mass")
    rows = comparison.heads[comparison.heads["metric"] == "sink_mass"]
    for row in rows.to_dict("records"):
        assert figure.data[0].z[row["layer"]][row["head"]] == row["difference"]
    assert figure.data[0].zmin == -figure.data[0].zmax
    row = comparison.metrics.set_index("metric").loc["sink_mass"]
    assert row["largest"] in figure.layout.title.text


def test_a_score_that_is_not_there_is_named(pair):
    comparison = compare_runs(*pair)
    with pytest.raises(
        LensError, match=r"no head has a difference of 'locality' \(raw\); compared are: ind"
    ):
        comparison_scatter(comparison, "locality")
    with pytest.raises(LensError, match=r"'induction' \(raw\) on copied"):
        difference_grid(comparison, "induction", prompts="copied")


def test_the_repr_says_what_is_compared(pair):
    text = repr(compare_runs(*pair))
    assert "heads aligned, shared prompts: 2 text)" in text


GRAPH = {"layers": 2, "heads": 3, "kv_heads": 3, "mlps": True, "parallel": False, "kv": "head"}


def write_circuit(run, name, nodes, edges, **other):
    curve = {"share": [0.5, 1.0], "edges": [10.0, 20.0], "faithfulness": [0.5, 1.0]}
    about = {"version": 1, "model": "m", "task": name, "made": "by hand"}
    data = {"format": "lens-circuit", **about, "graph": GRAPH, "faithfulness": curve, **other}
    named = [f"input->a1.h{ord(edge)}<q>" for edge in edges]
    write_json(run.path / "circuits" / f"{name}.json", {**data, "nodes": nodes, "edges": named})


def test_circuits_share_what_sets_share_beside_chance(pair):
    a, b = pair
    write_circuit(a, "ioi", ["input", "a0.h0", "a0.h1"], list("abcdef"))
    write_circuit(b, "induction", ["input", "a0.h1"], list("efgh"))
    comparison = compare_runs(a, b)
    rows = comparison.circuits.set_index("part")
    assert rows.loc["edges", ["shared", "only_a", "only_b"]].tolist() == [2, 4, 2]
    assert rows.loc["edges", "jaccard"] == pytest.approx(2 / 8)
    # E shared = 6 * 4 / 20
    assert rows.loc["edges", "by_chance"] == pytest.approx(1.2 / (10 - 1.2))
    # 9 writers: the input, 6 heads, 2 MLPs
    assert rows.loc["nodes", "by_chance"] == pytest.approx((6 / 9) / (5 - 6 / 9))
    assert (
        "The circuits ioi of A and induction of B share 2 of 8 edges (Jaccard index 0.25; by chance 0.14)."
        in comparison.sentences
    )
    assert any("from the whole graph" in text for text in comparison.limits)


def test_the_mean_over_random_sets_is_the_chance(pair):
    """The formula takes the ratio of means, which lies close to the mean of the ratio."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        x, y = (set(random.choice(20, size, replace=False).tolist()) for size in (6, 4))
        found.append(len(x & y) / len(x | y))
    assert np.mean(found) == pytest.approx(1.2 / 8.8, rel=0.1)


def test_circuits_that_cannot_be_compared_are_limits(pair):
    a, b = pair
    write_circuit(a, "ioi", [], [])
    write_circuit(b, "ioi", [], [], graph={**GRAPH, "layers": 5})
    write_json(b.path / "circuits" / "broken.json", {"format": "lens-circuit"})
    comparison = compare_runs(a, b)
    assert comparison.circuits.empty
    text = "\n".join(comparison.limits)
    assert "circuits ioi and ioi are not compared: their models have differing graphs." in text
    assert f"circuit broken of {b.id} is not compared" in text
    assert "broken.json is damaged: version is missing; model is missing" in text
