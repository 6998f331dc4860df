"""Traces: schema, disk, laziness, refusals."""

import json

import numpy as np
import pytest
import xarray as xr
from safetensors.numpy import save_file

from lens.common.errors import LensError
from lens.traces.store import LayeredArray, layer_file
from lens.traces.trace import AttentionTrace, TraceWriter
from lens.traces.uniform import visible_queries
from tests.lens.traces import ATTRIBUTES, LENGTH, layer_variables, probabilities, trace_of


@pytest.fixture(scope="module")
def p():
    return probabilities(layers=3, heads=2, length=LENGTH, seed=1)


def test_memory_and_disk_hold_the_same(p, tmp_path):
    memory = trace_of(p)
    memory.save(tmp_path / "t")
    disk = AttentionTrace.load(tmp_path / "t")
    xr.testing.assert_identical(disk.dataset.load(), memory.dataset)
    assert disk.block_mass.dims == ("layer", "head", "query_block", "key_block")
    assert disk.tokens == [f"t{i % 5}" for i in range(LENGTH)]


def test_a_head_is_read_alone(p, tmp_path, monkeypatch):
    trace_of(p).save(tmp_path / "t")
    disk = AttentionTrace.load(tmp_path / "t")
    read = []
    original = LayeredArray._read_layer

    def spy(self, path, key):
        read.append((path.name, *key))
        return original(self, path, key)

    monkeypatch.setattr(LayeredArray, "_read_layer", spy)
    found = disk.entropy.sel(layer=2, head=1).values
    assert read == [("layer-02.safetensors", 1, slice(None))]
    np.testing.assert_array_equal(found, trace_of(p).entropy.values[2, 1])


@pytest.mark.parametrize(
    "index",
    [
        {"layer": 1, "head": slice(None, None, -1)},
        {"layer": [2, 0], "head": 1, "query": [5, 3]},
        {"layer": slice(1, None, 2), "query": slice(7, 2, -2)},
        {"layer": slice(0, 0)},
        {"layer": -1, "head": -1, "query": -1},
    ],
)
def test_indexing_from_disk_equals_numpy(p, tmp_path, index):
    memory = trace_of(p)
    memory.save(tmp_path / "t")
    disk = AttentionTrace.load(tmp_path / "t")
    xr.testing.assert_identical(disk.lse.isel(index), memory.lse.isel(index))


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None), (False, 3)])
def test_visible_queries_counts_the_mask(causal, window):
    i, j = np.arange(11)[:, None], np.arange(11)[None]
    seen = np.ones((11, 11), bool)
    if causal:
        seen &= j <= i
    if window:
        seen &= (i - j < window) & (j - i < window)
    np.testing.assert_array_equal(visible_queries(11, causal=causal, window=window), seen.sum(0))


def test_tab_completion_knows_what_it_holds(p):
    assert {"received", "block_mass", "tile"} <= {*dir(trace_of(p))}


def test_repr_says_what_it_is(p):
    text = repr(trace_of(p))
    assert "analytic: 67 tokens, 3 layers × 2 heads" in text
    html = trace_of(p)._repr_html_()
    assert "data:image/png;base64," in html
    assert "http" not in html
    assert len(html) < 200_000


def test_a_missing_statistic_says_how_to_get_it(p):
    trace = trace_of(p, without=("entropy",))
    with pytest.raises(AttributeError, match="no entropy; capture it with statistics including"):
        _ = trace.entropy
    with pytest.raises(LensError, match="keep_qk=True"):
        trace.tile(0, 0, (0, 4), (0, 4))


def test_a_trace_is_not_overwritten(p, tmp_path):
    trace_of(p).save(tmp_path / "t")
    with pytest.raises(LensError, match="holds a trace already"):
        trace_of(p).save(tmp_path / "t")
    with pytest.raises(LensError, match="holds a trace already"):
        TraceWriter(tmp_path / "t")


def test_a_head_is_chosen_by_any_of_its_names(p):
    trace = trace_of(p)
    for name in ("L2H1", "2.1", (2, 1)):
        np.testing.assert_array_equal(trace.select(name)["lse"], trace.lse.values[2, 1])
    with pytest.raises(
        LensError, match="no L3H0 in this trace of analytic: it has the layers 0 to 2"
    ):
        trace.select("L3H0")
    assert "L2H1: block mass" in trace.plot("L2H1").layout.title.text


def test_tokens_survive_the_disk_as_they_are(p, tmp_path):
    trace = trace_of(p[:1])
    tokens = ["\x00", "a\x00", "\n", "é", "\N{GRINNING FACE}", *["x"] * (LENGTH - 5)]
    trace.dataset["key_token"] = ("key", np.array(tokens, dtype=object))
    assert AttentionTrace.load(trace.save(tmp_path / "t")).tokens == tokens


def test_html_shows_as_many_layers_as_fit():
    trace = trace_of(probabilities(layers=50, heads=3, length=LENGTH, seed=0))
    html = trace._repr_html_()
    assert "layers 0 to 47 of 50" in html
    assert len(html) < 200_000


def test_names_of_tokens_and_models_are_no_markup(p):
    assert "<script>" not in trace_of(p, model="<script>")._repr_html_()


def edit(**entries):
    """Change entries of trace.json."""

    def change(folder):
        index = json.loads((folder / "trace.json").read_text())
        (folder / "trace.json").write_text(json.dumps({**index, **entries}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / layer_file(1)).unlink(), r"layer-01\.safetensors cannot be read"),
        (lambda f: (f / layer_file(1)).write_bytes(b"short"), "5 bytes instead of"),
        (lambda f: (f / "trace.json").unlink(), "no finished trace"),
        (lambda f: (f / "trace.json").write_text("{"), "cannot be read"),
        (edit(layers=[]), "layers List should have at least 1 item"),
        (edit(layers=["../0"]), "layers.0 should be a valid integer"),
        (edit(layers=[1, 0]), "layers must rise"),
        (edit(layers=[0, 1]), "files must name one file per layer"),
        (edit(files={"../../etc/passwd": 1}), "files must name one file per layer"),
        (edit(coordinates={"token": ["a"]}), "coordinates.token_id is missing"),
        (edit(coordinates={"token": ["a"], "token_id": []}), "equally long"),
        (
            edit(coordinates={"token": ["a"], "token_id": [1]}),
            r"layer-00\.safetensors has .* of shape \[.*\] instead of",
        ),
        (edit(attributes={}), "attributes.model is missing; attributes.dtype is missing"),
        (
            edit(attributes={**ATTRIBUTES, "windows": [None], "scale": [1.0] * 3}),
            r"one entry per layer \(3\), got {'windows': 1, 'scale': 3}",
        ),
    ],
)
def test_damage_is_named(p, tmp_path, damage, message):
    folder = trace_of(p).save(tmp_path / "t")
    damage(folder)
    with pytest.raises(LensError, match=message) as caught:
        AttentionTrace.load(folder)
    assert "again" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("entropy"), r"layer-01\.safetensors has other variables .*: entropy"),
        (
            lambda v: v.update(entropy=v["entropy"][:1]),
            r"entropy of shape \[1, 67\] instead of \[2, 67\]",
        ),
        (
            lambda v: v.update(entropy=v["entropy"].astype("int8")),
            "has entropy as I8 instead of F32",
        ),
        (lambda v: v.update(block_mass=v["block_mass"][:, :4]), "block_mass of shape"),
    ],
)
def test_a_layer_that_differs_from_the_first_is_refused(p, tmp_path, change, message):
    trace = trace_of(p)
    folder = trace.save(tmp_path / "t")
    variables = {**layer_variables(p[1]), "visible": trace.visible.values[1]}
    change(variables)
    save_file(variables, folder / layer_file(1))
    new_sizes(folder)
    with pytest.raises(LensError, match=message):
        AttentionTrace.load(folder)


def new_sizes(folder):
    """Enter the sizes of the files as they are, so that only their contents are wrong."""
    index = json.loads((folder / "trace.json").read_text())
    sizes = {name: (folder / name).stat().st_size for name in index["files"]}
    (folder / "trace.json").write_text(json.dumps({**index, "files": sizes}))


def test_exchanged_layers_are_noticed(p, tmp_path):
    folder = trace_of(p).save(tmp_path / "t")
    first, second = folder / layer_file(0), folder / layer_file(1)
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    new_sizes(folder)
    with pytest.raises(LensError, match=r"layer-00\.safetensors is of layer 1"):
        AttentionTrace.load(folder)


def test_garbage_of_the_right_size_is_named(p, tmp_path):
    folder = trace_of(p).save(tmp_path / "t")
    file = folder / layer_file(0)
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(LensError, match=r"layer-00.safetensors is damaged"):
        AttentionTrace.load(folder)


def test_another_version_names_its_writer(p, tmp_path):
    folder = trace_of(p).save(tmp_path / "t")
    index = json.loads((folder / "trace.json").read_text())
    index["schema_version"] = 2
    index["attributes"]["versions"] = {"attention-lens": "9.9"}
    (folder / "trace.json").write_text(json.dumps(index))
    with pytest.raises(LensError, match=r"version 2, .* reads 1; .* attention-lens 9\.9"):
        AttentionTrace.load(folder)


def test_an_interrupted_capture_leaves_whole_layers_and_no_trace(p, tmp_path):
    writer = TraceWriter(tmp_path / "t")
    writer.add_layer(0, layer_variables(p[0]))
    assert sorted(file.name for file in (tmp_path / "t").iterdir()) == [layer_file(0)]
    with pytest.raises(LensError, match="no finished trace"):
        AttentionTrace.load(tmp_path / "t")


def test_the_writer_refuses_what_the_schema_does_not_know(p):
    writer = TraceWriter()
    with pytest.raises(ValueError, match="unknown variable 'entropie'"):
        writer.add_layer(0, {"entropie": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"dimensions \('head', 'query'\), got shape \(3,\)"):
        writer.add_layer(0, {"lse": np.zeros(3)})
    with pytest.raises(ValueError, match="at least one layer"):
        writer.finish(token_ids=[], tokens=[], attributes=ATTRIBUTES)
    writer.add_layer(0, layer_variables(p[0]))
    with pytest.raises(ValueError, match="layer 0 was added twice"):
        writer.add_layer(0, layer_variables(p[0]))
    fewer = {name: array for name, array in layer_variables(p[0]).items() if name != "lse"}
    with pytest.raises(ValueError, match="layer 1 must have the variables of the layers before"):
        writer.add_layer(1, fewer)
    layered = {**ATTRIBUTES, "windows": [None], "scale": [1.0]}
    with pytest.raises(ValueError, match="equally long, got 2 and 1"):
        writer.finish(token_ids=[1, 2], tokens=["a"], attributes=layered)
    with pytest.raises(ValueError, match="the trace's attributes lack windows, scale"):
        writer.finish(token_ids=[1], tokens=["a"], attributes=ATTRIBUTES)
    with pytest.raises(ValueError, match="1 tokens for 67 positions"):
        writer.finish(token_ids=[1], tokens=["a"], attributes=layered)


def test_a_path_that_no_system_has_is_refused_before_anything_runs(p):
    trace = trace_of(p)
    for wrong in ("a\0b", "", 5):
        with pytest.raises(LensError, match="folder must be the path of a file or folder"):
            trace.save(wrong)


@pytest.mark.parametrize("layer", [99, -1, "a", 0.5, None])
def test_a_layer_that_the_trace_has_not_got_is_refused(p, layer):
    trace = trace_of(p)
    for asked in (trace.window, trace.has_plain_mask, lambda one: trace.tile_refusal(one, 0)):
        with pytest.raises(LensError, match=r"there is no|a head is written"):
            asked(layer)
