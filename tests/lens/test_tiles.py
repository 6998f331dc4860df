"""Exact tiles: equal to the whole matrix, read no more than they need, refused where they would be wrong."""

import numpy as np
import pytest

from lens.common.errors import LensError
from lens.traces.store import LayeredArray
from lens.traces.trace import AttentionTrace, TraceWriter
from tests.lens.naive import rms_ratio, statistics
from tests.lens.traces import ATTRIBUTES, BLOCK

LENGTH, HEADS, KV_HEADS, DIM, LAYERS = 43, 6, 2, 5, 2
SCALE = [0.31, 0.47]


def attention(causal=True, window=None, softcap=None, sinks=None, bias=None, seed=0):
    """[layers] of q, k, P, lse and largest logit, written out in float64."""
    random = np.random.default_rng(seed)
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    seen = np.ones((LENGTH, LENGTH), bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= np.abs(i - j) < window
    layers = []
    for layer in range(LAYERS):
        q = random.normal(0, 2, (HEADS, LENGTH, DIM)).astype(np.float32)
        k = random.normal(0, 2, (KV_HEADS, LENGTH, DIM)).astype(np.float32)
        each = np.repeat(k, HEADS // KV_HEADS, axis=0).astype(np.float64)
        s = np.einsum("hqd,hkd->hqk", q.astype(np.float64), each) * SCALE[layer]
        if softcap is not None:
            s = softcap * np.tanh(s / softcap)
        if bias is not None:
            s = s + bias
        s = np.where(seen, s, -np.inf)
        total = np.exp(s).sum(-1) + (0 if sinks is None else np.exp(sinks)[:, None])
        layers.append((q, k, np.exp(s) / total[..., None], np.log(total), s.max(-1)))
    return layers


def trace_of(layers, causal=True, window=None, folder=None, without=(), visible=None, **attributes):
    writer = TraceWriter(folder)
    ids = [i % 5 for i in range(LENGTH)]
    for number, (q, k, p, lse, largest) in enumerate(layers):
        found = {**statistics(p, ids, BLOCK, causal), "lse": lse, "max_logit": largest}
        found = {name: array.astype(np.float32) for name, array in found.items()} | {"q": q, "k": k}
        if visible is not None:
            found["visible"] = visible
        writer.add_layer(number, {n: array for n, array in found.items() if n not in without})
    return writer.finish(
        token_ids=ids,
        tokens=[f"t{i}" for i in ids],
        attributes={
            **ATTRIBUTES,
            "causal": causal,
            "windows": [window] * LAYERS,
            "scale": SCALE,
            **attributes,
        },
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 7},
        {"causal": False, "window": 7},
        {"softcap": 3.0},
        {"sinks": np.linspace(-2, 6, HEADS)},
    ],
    ids=["causal", "full", "window", "both ways", "softcap", "sinks"],
)
def test_a_tile_is_its_part_of_the_whole_matrix(options, tmp_path):
    layers = attention(**options)
    shape = {name: options[name] for name in ("causal", "window", "softcap") if name in options}
    trace = trace_of(layers, folder=tmp_path / "t", learned_sinks="sinks" in options, **shape)
    for layer in range(LAYERS):
        for head in range(HEADS):
            p = layers[layer][2][head]
            whole = trace.tile(layer, head, (0, LENGTH), (0, LENGTH))
            assert rms_ratio(whole, p) < 1e-5, (layer, head)
            part = trace.tile(layer, head, (11, 30), (5, 18))
            assert rms_ratio(part, p[11:30, 5:18]) < 1e-5, (layer, head)
    assert trace.tile(1, 4, (42, 43), (0, 1)).shape == (1, 1)


def test_only_the_rectangle_is_read(tmp_path, monkeypatch):
    trace = trace_of(attention(), folder=tmp_path / "t")
    assert trace.tile_refusal(1, 4) == ""
    read = {}
    original = LayeredArray._read_layer

    def spy(self, path, key):
        found = original(self, path, key)
        read[self._name] = (path.name, found.shape)
        return found

    monkeypatch.setattr(LayeredArray, "_read_layer", spy)
    trace.tile(1, 4, (11, 30), (5, 18))
    file = "layer-01.safetensors"
    assert read == {"q": (file, (19, DIM)), "k": (file, (13, DIM)), "lse": (file, (19,))}


def test_a_position_bias_is_noticed():
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    trace = trace_of(attention(bias=-0.1 * np.abs(i - j)))
    with pytest.raises(
        LensError, match=r"q and k of L1H4 of analytic do not give back .* block_mass"
    ):
        trace.tile(1, 4, (0, 4), (0, 4))
    assert "position bias" in trace.tile_refusal(1, 4)


@pytest.mark.parametrize("without", [("max_logit", "first_mass"), ("max_logit",), ("first_mass",)])
def test_a_position_bias_is_noticed_from_what_was_captured(without):
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    assert trace_of(attention(bias=-0.1 * np.abs(i - j)), without=without).tile_refusal(0, 0)
    assert not trace_of(attention(), without=without).tile_refusal(0, 0)


def test_a_mask_without_compact_form_is_refused():
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    seen = (j <= i) & (i // 10 == j // 10)
    trace = trace_of(
        attention(bias=np.where(seen, 0, -np.inf)), visible=seen.sum(0).astype(np.int32)
    )
    with pytest.raises(LensError, match="a mask by which queries see keys with others between"):
        trace.tile(0, 0, (0, 4), (0, 4))


@pytest.mark.parametrize(
    "ends",
    [
        *((0.0, 5), (0, 5.5), (True, 3), ("0", 3), (None, 3), (3, 3), (-3, 5)),
        *(5, None, "01", slice(0, 8), range(8), (1, 2, 3), np.array(5)),
    ],
)
def test_ends_that_are_no_positions_are_refused(ends):
    trace = trace_of(attention())
    with pytest.raises(LensError, match=f"queries must be a range within 0..{LENGTH}, got"):
        trace.tile(0, 0, ends, (0, 4))


@pytest.mark.parametrize("without", [("q",), ("k",), ("lse",)])
def test_what_was_not_kept_is_asked_for(without):
    trace = trace_of(attention(), without=without)
    with pytest.raises(LensError, match=r"exact tiles need q, k and lse.*keep_qk=True"):
        trace.tile(0, 0, (0, 4), (0, 4))


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ((0, 44), (0, 1), r"queries must be a range within 0\.\.43, got \(0, 44\)"),
        ((3, 3), (0, 1), "queries must be a range"),
        ((0, 1), (-1, 4), "keys must be a range"),
        ((0, 1), (9, 4), "keys must be a range"),
    ],
)
def test_a_range_outside_of_the_prompt_is_refused(queries, keys, message):
    with pytest.raises(LensError, match=message):
        trace_of(attention()).tile(0, 0, queries, keys)


@pytest.mark.parametrize("head", [(2, 0), (0, 6), (-1, 0)])
def test_a_head_that_is_not_there_is_refused(head):
    with pytest.raises(LensError, match=r"there is no|counted from 0"):
        trace_of(attention()).tile(*head, (0, 4), (0, 4))


def test_layers_keep_their_names_when_some_are_left_out(tmp_path):
    """Scale and window belong to a layer, not to its place in the file."""
    layers = attention(window=7)
    whole = trace_of(layers, window=7, folder=tmp_path / "t")
    dataset = whole.dataset.isel(layer=[1]).load()
    dataset.attrs = {**whole.attrs, "scale": SCALE[1:], "windows": [7]}
    AttentionTrace(dataset).save(tmp_path / "one")
    one = AttentionTrace.load(tmp_path / "one")
    assert rms_ratio(one.tile(1, 3, (0, LENGTH), (0, LENGTH)), layers[1][2][3]) < 1e-5
    with pytest.raises(LensError, match=r"there is no L0H3 .* it has the layer 1 and"):
        one.tile(0, 3, (0, 4), (0, 4))
