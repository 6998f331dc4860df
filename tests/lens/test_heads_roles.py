"""Role scores equal naive twins on whole matrices, find the known heads, and have their baselines."""

import itertools

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.heads import roles
from lens.heads.behaviour.role_metrics import COLUMNS, ROLE_METRICS
from lens.heads.behaviour.role_scores import sentences
from lens.models import random_weights
from lens.traces import detect
from lens.traces.detector import PATTERNS
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio
from tests.lens.traces import probabilities, trace_of
from tests.tiers import first

TEXT = 'Lily saw a ball. "Is it red?" she said, and ran! Tom came\nand the ball was gone.'


def eager(model, ids):
    """Probabilities, values and residual streams of the model itself: layer -> float64 arrays."""
    seen = {"values": [], "residual": []}
    hooks = []
    for layer in model.model.model.layers:
        hooks.append(
            layer.input_layernorm.register_forward_pre_hook(
                lambda _, args: seen["residual"].append(args[0][0].double().numpy())
            )
        )
        hooks.append(
            layer.self_attn.v_proj.register_forward_hook(
                lambda _, __, out: seen["values"].append(out[0].double().numpy())
            )
        )
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model.model(torch.tensor([ids]), output_attentions=True)
    model.model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    return [a[0].double().numpy() for a in out.attentions], seen["values"], seen["residual"]


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def twin(model, ids, tokens):
    """Scores [layer, head] by the words of `ROLE_METRICS`, from N×N matrices and the modules."""
    attention, values, residual = eager(model, ids)
    info, n = model.info, len(ids)
    own = np.equal.outer(np.array(sentences(tokens)), np.array(sentences(tokens)))
    found = {name: np.full((info.layers, info.heads), np.nan) for name in ROLE_METRICS}
    found |= {
        f"{name}_sink_excluded": np.full((info.layers, info.heads), np.nan)
        for name, metric in ROLE_METRICS.items()
        if metric.sink_excluded
    }
    for layer, head in itertools.product(range(info.layers), range(info.heads)):
        p = attention[layer][head]
        rest = p[1:, 1:] / p[1:, 1:].sum(-1, keepdims=True)
        kv = head // (info.heads // info.kv_heads)
        v = values[layer].reshape(n, info.kv_heads, -1)[:, kv]
        w_o = model.model.model.layers[layer].self_attn.o_proj.weight.double().detach().numpy()
        w_o = w_o.T.reshape(info.heads, info.head_dim, -1)[head]
        size = np.linalg.norm(p @ v @ w_o, axis=-1)
        written = np.linalg.norm(v @ w_o, axis=-1)
        column = p[:, 0] / p[:, 0].sum()
        scores = {
            "segment": (p * own)[1:].sum(-1).mean(),
            "segment_sink_excluded": (rest * own[1:, 1:]).sum(-1).mean(),
            "confidence": p[1:].max(-1).mean(),
            "normalized_entropy": (entropy(p)[1:] / np.log(np.arange(2, n + 1))).mean(),
            "normalized_entropy_sink_excluded": (
                entropy(rest)[1:] / np.log(np.arange(2, n))
            ).mean(),
            "first_column_entropy": entropy(column) / np.log(n),
            "activity": 1 - p[1:, 0].mean(),
            "output_norm": size.mean(),
            "noop": size.mean() / np.linalg.norm(residual[layer], axis=-1).mean(),
            "drain": written[0] / written[1:].mean(),
            "drain_value": np.linalg.norm(v[0]) / np.linalg.norm(v[1:], axis=-1).mean(),
            "first_contribution": (p[1:, 0] * written[0] / (p[1:] @ written)).mean(),
        }
        for name, value in scores.items():
            found[name][layer, head] = value
    return found


@pytest.mark.parametrize("name", ["text-lm-3l", "stories260k"])
def test_role_scores_equal_their_twins(name):
    model = lens.load(name)
    ids = model.encode(TEXT)
    table = roles(model, ids, progress=False).table()
    expected = twin(model, ids, model.token_strings(ids))
    for column, values in expected.items():
        assert np.isfinite(values).all(), column
        found = table[column].to_numpy().reshape(values.shape)
        assert rms_ratio(found, values) < 1e-4, column


@pytest.mark.parametrize("kind", first(["mistral", "gpt_oss", "bert", "qwen3"], "gpt_oss", "bert"))
def test_role_scores_under_windows_learned_sinks_and_both_ways(kind):
    """Rows of the model's own eager attention, in which a learned sink leaves less than 1."""
    model = lens.load(build(kind))
    ids = torch.randint(3, 90, (37,), generator=torch.Generator().manual_seed(1)).tolist()
    table = roles(model, ids, progress=False).table()
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model.model(torch.tensor([ids]), output_attentions=True).attentions
    for layer, p in enumerate(attentions):
        p = p[0].double().numpy()
        seen = (p > 0).any(0).sum(-1)
        rows = seen >= 2
        rest = p[..., 1:] / p[..., 1:].sum(-1, keepdims=True).clip(1e-300)
        rest_seen = (p[..., 1:] > 0).any(0).sum(-1)
        few = rest_seen >= 2
        column = p[..., 0] / p[..., 0].sum(-1, keepdims=True)
        expected = {
            "confidence": p[:, 1:].max(-1).mean(-1),
            "normalized_entropy": (entropy(p)[:, rows] / np.log(seen[rows])).mean(-1),
            "normalized_entropy_sink_excluded": (
                entropy(rest)[:, few] / np.log(rest_seen[few])
            ).mean(-1),
            "activity": 1 - p[:, 1:, 0].mean(-1),
            "first_column_entropy": entropy(column) / np.log((p[0, :, 0] > 0).sum()),
        }
        for column_name, values in expected.items():
            found = table.loc[table["layer"] == layer, column_name]
            assert rms_ratio(found, values) < 1e-4, (layer, column_name)
    assert table["drain_value"].notna().all()
    reasons = roles(model, ids, progress=False).reasons
    assert table["noop"].isna().all() == ("noop" in reasons)
    assert table["noop"].isna().all() == (kind == "bert")
    if kind == "bert":
        assert "bert norms what its heads write before it reaches the stream" in reasons["noop"]


@pytest.fixture(scope="module")
def toy():
    return lens.load("induction-2l")


@pytest.fixture(scope="module")
def toy_roles(toy):
    prompts = [lens.tasks.copied(toy, 25, seed=seed) for seed in range(5)]
    return roles(toy, prompts, progress=False)


def test_the_known_heads_of_induction_2l_rank_first(toy_roles):
    """Its page: L0H1 previous token; L1H0, L1H2, L1H3 induction and sinks; L1H1 duplicate token."""
    assert toy_roles.top("previous_token", 1)["name"].tolist() == ["L0H1"]
    assert set(toy_roles.top("induction", 3)["name"]) == {"L1H0", "L1H2", "L1H3"}
    assert toy_roles.top("duplicate_token", 1)["name"].tolist() == ["L1H1"]
    assert set(toy_roles.top("first_token", 4)["name"]) == {"L1H0", "L1H1", "L1H2", "L1H3"}
    distances = toy_roles.table().set_index("name")["positional_distance"]
    assert distances[["L0H0", "L0H1", "L0H2"]].tolist() == [2, 1, 2]
    assert distances[["L1H0", "L1H2", "L1H3"]].tolist() == [24, 24, 24]


def test_the_known_heads_of_text_lm_rank_first():
    """Its page: previous token L0H0, L0H5; induction L1H2, L1H3, L1H5; strongest sinks L1H0, L1H5."""
    model = lens.load("text-lm-3l")
    copied = roles(model, lens.tasks.copied(model, 50), progress=False)
    assert copied.top("previous_token", 2)["name"].tolist() == ["L0H0", "L0H5"]
    assert set(copied.top("induction", 3)["name"]) == {"L1H2", "L1H3", "L1H5"}
    text = roles(model, lens.tasks.take(model, lens.tasks.text("lily"), 128), progress=False)
    assert text.top("first_token", 2)["name"].tolist() == ["L1H0", "L1H5"]
    assert set(text.table().nsmallest(2, "activity")["name"]) == {"L1H0", "L1H5"}


def test_the_table_has_every_column_defined_with_interval_and_baseline(toy_roles):
    table = toy_roles.table()
    assert len(table) == 8
    assert (table["prompts"] == 5).all()
    scored = {
        f"{name}{suffix}"
        for name, metric in COLUMNS.items()
        for suffix in ("", "_sink_excluded")[: 1 + metric.sink_excluded]
    }
    assert set(toy_roles.columns) == scored
    for name in scored:
        assert {name, f"{name}_low", f"{name}_high"} <= set(table)
        assert toy_roles.columns[name].endswith(".")
    inside = table["induction_low"].le(table["induction"]) & table["induction"].le(
        table["induction_high"]
    )
    assert inside.all()
    assert "no punctuation" in toy_roles.reasons["delimiter"]
    assert "HeadRoles(induction-2l: 8 heads, 5 prompts, baseline uniform" in repr(toy_roles)


def test_the_uniform_baseline_is_the_closed_form(toy, toy_roles):
    """Uniform causal attention: P[i, j] = 1 / (i + 1), entropy ln(i + 1)."""
    row = toy_roles.table().iloc[0]
    i = np.arange(1, 51)
    assert row["previous_token_baseline"] == pytest.approx(np.mean(1 / (i + 1)), rel=1e-5)
    assert row["entropy_baseline"] == pytest.approx(np.mean(np.log(i + 1)), rel=1e-5)
    assert row["normalized_entropy_baseline"] == pytest.approx(1, rel=1e-5)
    assert row["activity_baseline"] == pytest.approx(1 - np.mean(1 / (i + 1)), rel=1e-5)
    assert row["locality_baseline"] == pytest.approx(np.minimum(1, 9 / np.arange(1, 52)).mean())
    assert np.isnan(row["noop_baseline"])


def test_a_model_before_training_has_no_induction_heads(toy, toy_roles):
    before = toy.model.state_dict()["blocks.0.attn.q.weight"].clone()
    state = torch.random.get_rng_state()
    other = random_weights(toy, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(toy.model.state_dict()["blocks.0.attn.q.weight"], before)
    assert not torch.equal(other.model.state_dict()["blocks.0.attn.q.weight"], before)
    again = random_weights(toy, seed=1).model.state_dict()
    assert all(torch.equal(again[name], value) for name, value in other.model.state_dict().items())
    prompts = [lens.tasks.copied(toy, 25, seed=seed) for seed in range(2)]
    table = roles(toy, prompts, baseline="random_weights", seed=1, progress=False).table()
    direct = roles(other, prompts, progress=False).table()
    for column in ("induction", "noop", "drain"):
        means = direct.groupby("layer")[column].mean()
        assert rms_ratio(table[f"{column}_baseline"], means[table["layer"]]) < 1e-12
    assert (table["induction_baseline"] < 0.1).all()


def test_sentences_end_with_their_marks():
    assert sentences(["A", ".", '"', " b", "\n", "\n", "c", ",", " d"]) == [
        0,
        0,
        1,
        1,
        1,
        1,
        2,
        2,
        2,
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("current", [False, True])
def test_the_detector_is_that_of_transformer_lens(pattern, bos, current):
    length = 23
    ids = np.random.default_rng(1).integers(0, 4, length)  # repeats at once, and of the first token
    p = probabilities(layers=2, heads=3, length=length, seed=4)
    found = detect(
        trace_of(p, ids=ids.tolist()), pattern, exclude_bos=bos, exclude_current_token=current
    )
    from transformer_lens import head_detector  # not while tests are collected: it takes long

    make = getattr(head_detector, f"get_{pattern}_detection_pattern")
    mask = make(torch.tensor(ids)[None]).double()
    for layer, head in itertools.product(range(2), range(3)):
        expected = head_detector.compute_head_attention_similarity_score(
            torch.tensor(p[layer, head]),
            mask,
            exclude_bos=bos,
            exclude_current_token=current,
            error_measure="mul",
        )
        assert found[layer, head] == pytest.approx(expected, abs=1e-5)


def test_the_detector_agrees_on_a_real_model(toy):
    from transformer_lens import head_detector

    ids = lens.tasks.copied(toy, 13)
    trace = lens.capture(toy, ids, progress=False)
    found = detect(trace, "induction_head")
    tiles = lens.capture(toy, ids, keep_qk=True, progress=False)
    mask = head_detector.get_induction_head_detection_pattern(torch.tensor([ids])).double()
    p = torch.tensor(tiles.tile(1, 2, (0, 27), (0, 27)))
    expected = head_detector.compute_head_attention_similarity_score(
        p, mask, exclude_bos=False, exclude_current_token=False, error_measure="mul"
    )
    assert found[1, 2] == pytest.approx(expected, abs=1e-5)


def test_the_figure_shows_the_table(toy_roles):
    figure = toy_roles.plot(columns=["induction", "segment"])
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z, toy_roles.table()[["induction", "segment"]])
    assert list(heat.y) == toy_roles.table()["name"].tolist()
    assert "baseline" in heat.text[0][0]
    with pytest.raises(LensError, match="has no column nonsense"):
        toy_roles.plot(columns=["nonsense"])


def test_what_cannot_be_asked_for_is_said(toy, toy_roles):
    with pytest.raises(
        LensError, match="baseline must be one of 'uniform', 'random_weights', got 'zero'"
    ):
        roles(toy, [1, 2, 3], baseline="zero")
    with pytest.raises(LensError, match="unknown column 'x'; known: previous_token"):
        toy_roles.top("x")
    for method, options, said in (
        ("top", {"column": "induction", "count": 1.5}, "count must be a positive integer, got 1.5"),
        ("top", {"column": ["induction"]}, "column must be a text, got"),
        ("findings", {"most": "x"}, "most must be a positive integer, got 'x'"),
        ("findings", {"columns": 3}, "columns must be a list, got 3"),
        ("findings", {"random_weights": [1]}, "random_weights must be a mapping, got"),
        ("sink_heads", {"rows_below": "x", "column_above": 1}, "rows_below must be a number"),
    ):
        with pytest.raises(LensError, match=said):
            getattr(toy_roles, method)(**options)
    p = probabilities(layers=1, heads=2, length=11, seed=4)
    with pytest.raises(LensError, match="pattern must be one of 'previous_token_head'"):
        detect(trace_of(p), "x")
    with pytest.raises(LensError, match="needs match_mass; capture with statistics='all'"):
        detect(trace_of(p, without=("match_mass",)), "induction_head")
    with pytest.raises(LensError, match="no token ids, which the patterns compare"):
        detect(trace_of(p, ids=[-1] * 11), "induction_head")
    with pytest.raises(LensError, match="analytic looks ahead"):
        detect(trace_of(p, causal=False), "induction_head")
