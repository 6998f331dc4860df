"""A user's own labels: the mass on keys that have them, exact, and what the profile makes of it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import lens
from lens.models import random_weights
from lens.traces.trace import AttentionTrace
from tests.lens.architectures import build

LENGTH = 23
DRAW = np.random.default_rng(3)
QUERY = DRAW.integers(-1, 3, LENGTH).tolist()
KEY = DRAW.integers(-1, 3, LENGTH).tolist()


def a_model(name: str = "llama"):
    torch.manual_seed(0)
    return lens.load(build(name))


def ids(seed: int = 2, length: int = LENGTH):
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


def eager(model, prompt):
    """[layers, heads, queries, keys] float64 of the model's own eager attention."""
    own = model.model
    own.set_attn_implementation("eager")
    with torch.no_grad():
        found = own(prompt[None], output_attentions=True).attentions
    own.set_attn_implementation("sdpa")
    return torch.cat(list(found)).double().numpy()


def matching(query, key):
    return np.array([[q == k and q is not None and q != -1 for k in key] for q in query])


def naive(p, pairs, window=None):
    """Mean over the rows that see a key with their label, with and without the first key."""
    distance = np.subtract.outer(np.arange(len(p)), np.arange(len(p)))
    seen = (distance >= 0) & (distance < (window or len(p)))
    rows = [i for i in range(len(p)) if (pairs & seen)[i].any()]
    raw = np.mean([p[i][pairs[i]].sum() for i in rows])
    rest = [i for i in range(len(p)) if (pairs & seen)[i, 1:].any()]
    excluded = np.mean([p[i, 1:][pairs[i, 1:]].sum() / p[i, 1:].sum() for i in rest])
    even = seen / seen.sum(-1, keepdims=True)
    uniform = np.mean([even[i][pairs[i]].sum() for i in rows])
    return raw, excluded, uniform


@pytest.mark.parametrize(("name", "window"), [("llama", None), ("mistral", 11), ("gpt2", None)])
def test_mass_on_a_users_labels_is_that_of_the_matrix(name, window):
    model = a_model(name)
    if window:
        assert model.model.config.sliding_window == window
    trace = lens.capture(model, ids(), labels={"atoms": (QUERY, KEY)}, block_size=8)
    p, pairs = eager(model, ids()), matching(QUERY, KEY)
    mass = trace.match_mass.sel(match="atoms").values
    np.testing.assert_allclose(mass, (p * pairs).sum(-1), atol=2e-6)
    table = lens.profile(trace)
    for row in table.to_dict("records"):
        raw, excluded, uniform = naive(p[row["layer"], row["head"]], pairs, window)
        assert row["atoms"] == pytest.approx(raw, rel=1e-4)
        assert row["atoms_sink_excluded"] == pytest.approx(excluded, rel=1e-4)
        assert row["atoms_uniform"] == pytest.approx(uniform, rel=1e-6)
    assert (table["atoms_low"] <= table["atoms"]).all()


def test_the_other_scores_do_not_change():
    model = a_model()
    plain = lens.profile(lens.capture(model, ids()))
    own = lens.profile(lens.capture(model, ids(), labels={"atoms": (QUERY, KEY)}))
    pd.testing.assert_frame_equal(own[plain.columns], plain)


def test_texts_none_and_functions_are_labels_too():
    model = a_model()
    words = ["a", None, "b", "a", "c", None, "b", "a"]
    given = {"same": (words, words), "even": lambda tokens: ([1] * 8, [n % 2 for n in range(8)])}
    trace = lens.capture(model, ids(length=8), labels=given)
    assert trace.labels == ("same", "even")
    p = eager(model, ids(length=8))
    for name, pairs in (
        ("same", matching(words, words)),
        ("even", matching([1] * 8, [n % 2 for n in range(8)])),
    ):
        found = trace.match_mass.sel(match=name).values
        np.testing.assert_allclose(found, (p * pairs).sum(-1), atol=2e-6)


def test_several_prompts_have_their_own_labels_or_share_them():
    model = a_model()
    prompts = [ids(1), ids(2, 11)]
    sides = [QUERY, QUERY[:11]], [KEY, KEY[:11]]
    traces = lens.capture(model, prompts, labels={"atoms": sides})
    for prompt, trace, query, key in zip(prompts, traces, *sides, strict=True):
        alone = lens.capture(model, prompt, labels={"atoms": (query, key)})
        assert np.array_equal(trace.match_mass, alone.match_mass)
    shared = lens.capture(model, torch.stack([ids(1), ids(2)]), labels={"atoms": (QUERY, KEY)})
    assert np.array_equal(shared[0].match_mass, traces[0].match_mass)
    table = lens.profile(traces)
    means = np.mean([lens.profile(trace)["atoms"] for trace in traces], axis=0)
    np.testing.assert_allclose(table["atoms"], means)


def test_random_weights_stand_beside_a_label():
    model = a_model()
    given = {"labels": {"atoms": (QUERY, KEY)}, "statistics": ["lse"], "progress": False}
    assert "match_mass" in lens.capture(model, ids(), **given).dataset
    given.pop("statistics")
    traces = [lens.capture(one, ids(), **given) for one in (model, random_weights(model))]
    table = lens.profile(traces[0], random_weights=traces[1])
    highest = lens.profile(traces[1])["atoms"].max()
    assert table["atoms_random_weights"].tolist() == [highest] * len(table)


def test_labels_are_saved_and_a_damaged_one_is_told(tmp_path):
    model = a_model()
    trace = lens.capture(model, ids(), labels={"atoms": (QUERY, KEY)}, out=tmp_path / "t")
    again = AttentionTrace.load(tmp_path / "t")
    assert again.labels == ("atoms",)
    pd.testing.assert_frame_equal(lens.profile(again), lens.profile(trace))
    index = json.loads((tmp_path / "t" / "trace.json").read_text())
    index["attributes"]["labels"]["atoms"]["key"].pop()
    (tmp_path / "t" / "trace.json").write_text(json.dumps(index))
    with pytest.raises(lens.LensError, match=r"labels.atoms must have one query and one key label"):
        AttentionTrace.load(tmp_path / "t")
    index["attributes"]["labels"] = {}
    (tmp_path / "t" / "trace.json").write_text(json.dumps(index))
    with pytest.raises(lens.LensError, match=r"match_mass of shape .* instead of"):
        AttentionTrace.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({}, "got an empty one"),
        ([1, 2], "labels must be a mapping"),
        ({"induction": (QUERY, KEY)}, "'induction' is taken by a score"),
        ({"atoms_low": (QUERY, KEY)}, "is taken by a score"),
        ({"my atoms": (QUERY, KEY)}, "must be a word"),
        ({"atoms": QUERY}, "must be a pair"),
        ({"atoms": (QUERY, KEY[:-1])}, "one label for each of 23 positions, got 23 .* and 22"),
        ({"atoms": (QUERY, "x" * LENGTH)}, "key labels must be a list"),
        ({"atoms": (QUERY, [0.5] * LENGTH)}, "an integer, a text or None, got 0.5"),
        ({"atoms": ([QUERY, QUERY], KEY)}, "query labels are 2 lists for 1 prompts"),
    ],
)
def test_what_are_no_labels_is_refused_before_any_work(labels, said):
    model = a_model()
    model.model.forward = None  # nothing runs
    with pytest.raises(lens.LensError, match=said):
        lens.capture(model, ids(), labels=labels)


def test_traces_of_other_labels_are_profiled_apart():
    model = a_model()
    traces = [lens.capture(model, ids(), labels=given) for given in (None, {"a": (QUERY, KEY)})]
    with pytest.raises(lens.LensError, match="the same labels"):
        lens.profile(traces)


def test_a_row_that_sees_no_key_with_its_label_does_not_count():
    trace = lens.capture(a_model(), ids(), labels={"none": ([0] * LENGTH, [1] * LENGTH)})
    table = lens.profile(trace)
    assert table["none"].isna().all()
    assert table.attrs["reasons"]["none"] == "no row sees a key with its label"
