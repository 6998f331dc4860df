"""`validate` finds nothing in a whole run, and each kind of damage."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from lens.common.files import write_json
from lens.runs import open_run
from lens.runs.manifest import write_manifest
from lens.runs.sections import Section
from lens.runs.validation import validate
from lens.runs.writer import RunWriter
from lens.traces.profiles import pooled_table, prompt_table
from lens.traces.store import DIMENSIONS, trace_files
from lens.traces.trace import AttentionTrace, TraceWriter
from tests.lens.made_runs import meta
from tests.lens.traces import (
    ATTRIBUTES,
    LENGTH,
    layer_variables,
    probabilities,
    token_ids,
    trace_of,
)

META = meta(
    title="analytic on two prompts", model={"name": "analytic"}, prompts={"total": 2, "done": 2}
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, made once and copied for each damage."""
    return made_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole, tmp_path):
    """A whole run to be damaged."""
    return open_run(shutil.copytree(whole.path, tmp_path / whole.path.name))


def made_run(runs, scale=1.0, of=None, **attributes):
    """A run of two prompts; `scale` below 1 is what a learned sink leaves of each row."""
    writer = RunWriter.start(runs, {"seed": 0}, META)
    of = of or (lambda seed: trace_of(scale * probabilities(2, 3, LENGTH, seed), **attributes))
    traces = {f"p{seed:03d}": of(seed) for seed in range(2)}
    tables = [prompt_table(trace, prompt_id) for prompt_id, trace in traces.items()]
    for prompt_id, trace in traces.items():
        trace.save(writer.path / "trace" / prompt_id)
        writer.record(
            *(f"trace/{prompt_id}/{n}" for n in trace_files(writer.path / "trace" / prompt_id))
        )
    writer.table("prompts", prompts())
    writer.table("heads", pd.concat([*tables, pooled_table(tables, "text")], ignore_index=True))
    return writer.finish()


def prompts():
    return pd.DataFrame(
        {
            "prompt_id": ["p000", "p001"],
            "kind": "text",
            "title": "t",
            "text": "x",
            "tokens": LENGTH,
            "token_ids": [token_ids(LENGTH)] * 2,
            "token_strings": [[f"t{i}" for i in token_ids(LENGTH)]] * 2,
            "loss": 1.0,
            "loss_repeat": np.nan,
            "status": "done",
            "seconds": 0.1,
        }
    )


def rewrite(run, name, change):
    """Change a table on disk, and its size in run.json, so that only its contents are wrong."""
    frame = change(pd.read_parquet(run.path / f"{name}.parquet"))
    frame.to_parquet(run.path / f"{name}.parquet", index=False)
    sizes(run, f"{name}.parquet")


def sizes(run, *names):
    """As if the run had written the files so: in `run.json` and in the manifest."""
    entries = json.loads((run.path / "run.json").read_text())
    entries["files"] |= {name: (run.path / name).stat().st_size for name in names}
    write_json(run.path / "run.json", entries)
    write_manifest(run.path, [*names, "run.json"])


def rewrite_trace(run, change):
    """Change the variables of layer 1 of the first prompt, in place."""
    folder = run.path / "trace" / "p000"
    trace = AttentionTrace.load(folder)
    data = trace.dataset.load()
    for file in folder.iterdir():
        file.unlink()
    writer = TraceWriter(folder)
    for layer in range(2):
        variables = {name: data[name].values[layer] for name in DIMENSIONS if name in data}
        writer.add_layer(layer, change(variables) if layer == 1 else variables)
    writer.finish(
        token_ids=data["token_id"].values.tolist(), tokens=trace.tokens, attributes=trace.attrs
    )
    sizes(run, *(f"trace/p000/{file.name}" for file in folder.iterdir()))


def test_a_whole_run_has_no_problems(run):
    assert validate(run) == []
    with (run.path / "log.txt").open("a") as file:
        file.write("a log may grow")
    assert validate(open_run(run.path)) == []


def test_a_learned_sink_is_no_problem_where_the_trace_says_so(tmp_path):
    assert validate(made_run(tmp_path / "a", scale=0.7, learned_sinks=True)) == []
    problems = validate(made_run(tmp_path / "b", scale=0.7))
    assert any("block rows must sum to 1, head 0 block 0 to 0.7000" in text for text in problems)


def test_an_unfinished_run_misses_nothing(tmp_path):
    writer = RunWriter.start(tmp_path, {"seed": 0}, {**META, "prompts": {"total": 2, "done": 0}})
    run = open_run(writer.path)
    assert run.status == "started"
    assert validate(run) == []
    writer.finish("partial")
    assert validate(open_run(writer.path)) == []


def test_success_without_its_files_is_a_problem(tmp_path):
    writer = RunWriter.start(tmp_path, {"seed": 0}, {**META, "prompts": {"total": 2, "done": 1}})
    problems = validate(writer.finish())
    assert any("heads.parquet is not entered in run.json" in text for text in problems)
    assert "run.json says success with 1 of 2 prompts done; run it again" in problems


def test_tokens_that_the_run_counts_are_those_of_its_prompts(run):
    entries = json.loads((run.path / "run.json").read_text())
    for tokens in (2 * LENGTH, 2 * LENGTH + 1):
        entries["prompts"]["tokens"] = tokens
        write_json(run.path / "run.json", entries)
        write_manifest(run.path, ["run.json"])
        found = [text for text in validate(open_run(run.path)) if "tokens" in text]
        told = (
            f"run.json says that the prompts have {tokens} tokens, prompts.parquet has {2 * LENGTH}"
        )
        assert found == ([] if tokens == 2 * LENGTH else [told])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "heads.parquet").unlink(), "heads.parquet is missing"),
        (lambda f: (f / "heads.parquet").write_bytes(b"PAR1"), "heads.parquet has 4 bytes instead"),
        (
            lambda f: (f / "heads.parquet").write_bytes(b"PAR1"),
            "heads.parquet has 4 bytes instead of .* changed after the run",
        ),
        (lambda f: (f / "trace/p001/trace.json").unlink(), "p001 is done but its trace is missing"),
        (
            lambda f: (f / "trace/p001/layer-01.safetensors").unlink(),
            "trace/p001/layer-01.safetensors is missing",
        ),
    ],
)
def test_missing_and_damaged_files(run, damage, message):
    damage(run.path)
    found = "\n".join(validate(open_run(run.path)))
    assert_matches(message, found)


@pytest.mark.parametrize("name", ["ioi", "a.task"])
def test_a_damaged_circuit_is_told_whatever_its_name(run, name):
    (run.path / "circuits").mkdir()
    (run.path / "circuits" / f"{name}.json").write_text("{}")
    assert any(f"{name}.json" in problem for problem in validate(run))


def test_a_file_outside_of_the_run_is_not_followed(run, tmp_path):
    (tmp_path / "secret").write_text("x")
    run.meta["files"]["../secret"] = 1
    assert any("'../secret', which is outside of the run" in text for text in validate(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="kind"), "lacks the columns kind"),
        (lambda t: t.assign(prompt_id="p000"), "column prompt_id has a prompt twice"),
        (lambda t: t.assign(kind="smell"), "column kind has 'smell', which is not known"),
        (lambda t: t.assign(tokens=3), "p000 has differing token counts"),
        (lambda t: t.assign(status="great"), "column status has 'great', which is not known"),
        (lambda t: t.assign(prompt_id=["p000", "p007"]), "p007 is done but its trace is missing"),
        (lambda t: first(t, loss=np.inf), "column loss has numbers that are negative or infinite"),
        (lambda t: first(t, loss=1e6), r"column loss: p000 has 1e\+06 nats, which no model has"),
        (lambda t: first(t, loss=np.nan), "column loss: p000 has none, and no warning says why"),
        (lambda t: first(t, kind="copied"), "column loss_repeat: p000 is copied and has none"),
        (
            lambda t: t.assign(token_ids=[[7, *ids[1:]] for ids in t["token_ids"]]),
            "column token_ids: p000 has 7, the model knows 0 to 4",
        ),
        (
            lambda t: t.assign(token_ids=[[*ids[:-1], 3] for ids in t["token_ids"]]),
            "trace/p000/trace.json: token_id is not what prompts.parquet has in token_ids",
        ),
        (lambda t: first(t, seconds=-1), "column seconds has numbers that are negative"),
        (lambda t: first(t, status="pending"), "column loss has numbers of prompts that are pend"),
        (lambda t: first(t, loss_repeat=1), "column loss_repeat has .* that are not copied"),
    ],
)
def test_wrong_prompt_tables(run, change, message):
    rewrite(run, "prompts", change)
    assert_matches(message, "\n".join(validate(open_run(run.path))))


def first(table, **values):
    """The table with other values in its first row."""
    table = table.copy()
    table.loc[0, list(values)] = list(values.values())
    return table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="detail"), "lacks the columns detail"),
        (lambda t: t.assign(metric="entropie"), "column metric has 'entropie', which is not known"),
        (lambda t: t.assign(variant="cooked"), "column variant has 'cooked'"),
        (lambda t: pd.concat([t, t.head(1)]), "has a score twice"),
        (lambda t: first(t, layer=2), "column layer has numbers outside of 0 to 1"),
        (lambda t: first(t, head=-1), "column head has numbers outside of 0 to 2"),
        (lambda t: first(t, prompt_id="p009"), "column prompt_id has 'p009', which is not known"),
        (lambda t: t.tail(-1), "not every metric has all 6 heads"),
        (lambda t: first(t, value=np.inf), "has infinite scores"),
        (lambda t: first(t, value=np.nan), "NaN without a reason"),
        (lambda t: first(t, low=0.9, high=0.1), "intervals whose ends are swapped"),
        (lambda t: first(t, n=-1), "scores of fewer than 0 rows"),
        (
            lambda t: first(t, low=t["high"][0], high=2 * t["high"][0]),
            "heads.parquet: column value: .* in row 0 lies outside of its own interval",
        ),
        (lambda t: first(t, value=1.1), "previous_token outside of 0 to 1"),
        (lambda t: first(t, value=-0.1), "previous_token outside of 0 to 1"),
        (lambda t: t[t["head"] % 2 == 0], "column head: layer 0 has 2 of 3 heads"),
        (lambda t: t[t["layer"] != 1], "column layer: p000 has other layers than its trace"),
        (lambda t: t.iloc[:0], "it has no rows"),
        (lambda t: t[t["prompt_id"] != "p001"], "heads.parquet has no scores of p001"),
        (
            lambda t: t.assign(layer=1 - t["layer"]),
            r"column value: .* of L1H0 on p000 is .*, its trace gives",
        ),
        (
            lambda t: t.assign(value=t["value"].where(t["prompt_id"] != "text", 0.5)),
            r"on text is 0\.5, the mean over the prompts gives",
        ),
        (
            lambda t: t.assign(n=t["n"] + (t["prompt_id"] == "text")),
            r"column n: .* on text has 3, the mean over the prompts gives 2",
        ),
        (
            lambda t: t.assign(low=t["low"].where(t["prompt_id"] != "text", t["value"] - 0.01)),
            "column low: .* on text is .*, the mean over the prompts gives",
        ),
        (lambda t: t.assign(value="x"), "column value must hold numbers, got .*string"),
        (
            lambda t: t.assign(layer=t["layer"] + 0.5),
            "column layer must hold whole numbers, got double",
        ),
    ],
)
def test_wrong_head_tables(run, change, message):
    rewrite(run, "heads", change)
    assert_matches(message, "\n".join(validate(open_run(run.path))))


HEAD_SCORES = pd.DataFrame(
    {
        **{"name": ["L0H1", "L1H0"], "layer": [0, 1], "head": [1, 0]},
        **{"kl": [0.2, 0.3], "kl_low": [0.1, np.nan], "kl_high": [0.4, np.nan]},
        **{"tau": [1.0, 2.0], "tau_low": [0.5, 2.5], "tau_high": [1.5, 3.0]},
        **{"value": [1.0, 2.0], "low": [0.5, 2.0], "high": [1.5, 2.0], "amount": [0.0, -np.inf]},
    }
)
"""The interval of what is no mean need not hold it, and amounts may be infinite."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: first(t, layer=2), "column layer has numbers outside of 0 to 1"),
        (lambda t: first(t, name="L0H7"), "column name: there is no L0H7"),
        (lambda t: t.assign(name=t["name"][::-1].to_numpy()), "column name has other heads than"),
        (lambda t: first(t, kl=np.inf), "column kl has infinite numbers"),
        (lambda t: first(t, high=np.inf), "column high has infinite numbers"),
        (
            lambda t: t.assign(kl_low=t["kl_high"], kl_high=t["kl_low"]),
            "column kl_low is above kl_high",
        ),
        (
            lambda t: first(t, kl=0.5),
            "column kl: 0.5 in row 0 lies outside of its own interval, 0.1",
        ),
        (lambda t: first(t, value=np.nan), "column value: nan in row 0 lies outside of its own"),
    ],
)
def test_a_section_whose_numbers_cannot_be_is_told(run, change, message):
    columns = dict.fromkeys(HEAD_SCORES, "x")
    section = Section("scored", "Scored", columns=columns, tables={"scores": HEAD_SCORES})
    section.save(run.path)
    assert validate(open_run(run.path)) == []
    name = "sections/scored/scores"
    rewrite(run, name, lambda table: change(table)[table.columns])
    assert_matches(rf"scores\.parquet: {message}", "\n".join(validate(open_run(run.path))))


def spoiled(name, change):
    """Variables of which one is changed."""
    return lambda variables: {**variables, name: change(variables[name].copy())}


def put(value, *where):
    def change(array):
        array[where] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("entropy", put(np.nan, 2, 5), "layer 1: entropy has NaN"),
        ("block_max", put(np.inf, 1, 2, 0), "layer 1: block_max has infinite values"),
        ("block_mass", lambda a: a.swapaxes(1, 2), "block rows must sum to 1, head 0 block 0"),
        ("block_mass", put(0.0, 1, 3), "block rows must sum to 1, head 1 block 3 to 0.0000"),
        ("received", lambda a: a * 1.01, "received of head . adds up to 67.67 in 67 rows"),
        ("diagonal", put(0.0, 2), "diagonal of head 2 adds up to 0 in 67 rows"),
        ("rest_mass", lambda a: a / 2, "first_mass and rest_mass of head . adds up to"),
        ("block_mass", lambda a: a[[1, 0, 2]], "block_mass of head 0 does not add up to received"),
        (
            "block_mass",
            lambda a: a[:, [3, 1, 2, 0, 4]],
            "block_mass of head 0 lies elsewhere than distance",
        ),
        ("block_max", lambda a: a[[1, 2, 0]], "block_max of head . cannot be in block"),
        ("prefix_mass", lambda a: a / 2, "prefix_mass and received of the first keys differ"),
        (
            "match_mass",
            lambda a: a[..., [1, 0, 2, 3]],
            "match_mass of current_token_position and dia",
        ),
        ("entropy", put(4.3, 0, 0), "entropy lies outside of 0 to 4.205"),
        ("concentration", put(-0.1, 0, 0), "concentration lies outside of 0 to 1"),
        ("distance", put(70.0, 0, 0), "distance lies outside of -66 to 66"),
    ],
)
def test_wrong_traces(run, name, change, message):
    rewrite_trace(run, spoiled(name, change))
    found = "\n".join(validate(open_run(run.path)))
    assert_matches(f"trace of p000: .*{message}", found)
    assert "trace of p001" not in found


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers", 3, r"layers with softmax attention are \[0, 1\], run.json says \[0, 1, 2\]"),
        ("attending", [1, 0], r"run.json: model.attending \[1, 0\] are no layers of 2, in order"),
        (
            "kv_heads",
            4,
            "run.json: model.kv_heads is 4, which does not divide the 3 of model.heads",
        ),
        ("kv_heads", 2, "run.json: model.kv_heads is 2, which does not divide"),
        ("name", "gpt2", "trace/p000/trace.json: model is 'analytic', run.json says 'gpt2'"),
        ("dtype", "float16", "trace/p001/trace.json: dtype is 'float32', run.json says 'float16'"),
    ],
)
def test_a_model_that_is_another_one_in_the_traces_is_told(run, name, value, message):
    entries = json.loads((run.path / "run.json").read_text())
    entries["model"][name] = value
    write_json(run.path / "run.json", entries)
    write_manifest(run.path, ["run.json"])
    assert_matches(message, "\n".join(validate(open_run(run.path))))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", "gpt2", "model is 'gpt2', run.json says 'analytic'"),
        ("dtype", "float16", "dtype is 'float16', run.json says 'float32'"),
        ("bos", "added", "bos is 'added', run.json and its first token say 'absent'"),
        ("scale", [1.0, 2.0], r"scale is \[1.0, 2.0\], in p000 \[1.0, 1.0\]"),
        ("softcap", 30.0, "softcap is 30.0, in p000 None"),
        ("without_attention", [2], "its layers are 3, run.json says 2"),
        ("kv_heads", 2, "kv_heads is 2, of 3 heads"),
    ],
)
def test_a_trace_that_says_something_else_of_the_model_is_told(run, name, value, message):
    index = run.path / "trace" / "p001" / "trace.json"
    entries = json.loads(index.read_text())
    entries["attributes"][name] = value
    write_json(index, entries)
    sizes(run, "trace/p001/trace.json")
    found = validate(open_run(run.path))
    assert len(found) == 1
    assert_matches(f"trace/p001/trace.json: {message}", found[0])


def kept_trace(seed, **attributes):
    """A trace with the q and k that its probabilities come from."""
    random, writer = np.random.default_rng(seed), TraceWriter()
    for layer in range(2):
        q, k = random.normal(0, 1, (2, 3, LENGTH, 4))
        logits = np.where(np.tri(LENGTH, dtype=bool), q @ k.swapaxes(1, 2), -np.inf)
        lse = np.log(np.exp(logits).sum(-1))
        own = {"lse": lse, "max_logit": logits.max(-1), "q": q, "k": k}
        found = layer_variables(np.exp(logits - lse[..., None]))
        writer.add_layer(layer, found | {name: x.astype(np.float32) for name, x in own.items()})
    alike = {"windows": [None] * 2, "scale": [1.0] * 2, "kv_heads": 3, "biased": False}
    ids = token_ids(LENGTH)
    return writer.finish(
        token_ids=ids, tokens=[f"t{i}" for i in ids], attributes=ATTRIBUTES | alike | attributes
    )


def test_q_and_k_that_do_not_give_back_what_was_measured_are_told(tmp_path):
    run = made_run(tmp_path, of=kept_trace)
    assert validate(run) == []
    rewrite_trace(run, spoiled("q", lambda q: 2 * q))
    told = "trace of p000: layer 1: q and k of head 0 do not give back its lse"
    assert validate(open_run(run.path)) == [told]


def test_of_logits_with_more_than_q_and_k_nothing_is_known(tmp_path):
    run = made_run(tmp_path, of=lambda seed: kept_trace(seed, biased=True))
    rewrite_trace(run, spoiled("q", lambda q: 2 * q))
    assert validate(open_run(run.path)) == []


def test_undoing_nothing_leaves_the_run_whole(run):
    """The helpers that rewrite a run do not damage it themselves."""
    rewrite(run, "heads", lambda table: table)
    rewrite_trace(run, lambda variables: variables)
    assert validate(open_run(run.path)) == []


def assert_matches(pattern, text):
    assert re.search(pattern, text), f"{pattern!r} not in:\n{text}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"processes": 0}, "processes is 0, of a prompt of 67 tokens"),
        ({"processes": 68}, "processes is 68"),
        ({"processes": "two"}, "processes is 'two'"),
        ({"processes": 2, "chunk": 8}, "processes is 2 and chunk 8: a prompt is split in one of"),
        ({"chunk": 0}, "chunk is 0, of a prompt of 67 tokens"),
        ({"chunk": 67}, "chunk is 67"),
        ({"check": 5.0}, "check is 5.0; a model whose output differs by more than 0.1"),
        ({"tokens": 999}, "tokens is 999, its layers have 67 keys"),
        ({"twice": [0, 7]}, "twice is [0, 7], and [7] are no layers of it"),
        ({"model_class": "Other"}, "model_class is 'Other', run.json says 'Made'"),
    ],
)
def test_how_a_prompt_was_captured_is_what_the_run_says(tmp_path, change, said):
    captured = {"processes": 1, "chunk": None, "check": 1e-7, "model_class": "Made"}
    assert validate(made_run(tmp_path / "good", **captured)) == []
    found = validate(made_run(tmp_path / "lie", **(captured | change)))
    assert any(said in problem for problem in found), found


def test_traces_of_one_run_are_captured_alike(tmp_path):
    def of(seed):
        said = {"processes": 1 + seed, "model_class": "Made"}
        return trace_of(probabilities(2, 3, LENGTH, seed), **said)

    (found,) = validate(made_run(tmp_path, of=of))
    assert "trace/p001/trace.json: processes is 2, in p000 1" in found


def test_rows_of_a_score_are_those_of_its_trace(run):
    rewrite(run, "heads", lambda table: table.assign(n=table["n"].where(table.index != 5, 99)))
    (found,) = [one for one in validate(run) if "column n" in one]
    assert "on p000 has 99, its trace gives " in found


def test_ends_of_intervals_of_shares_are_shares(run):
    def lower(table):
        place = table.index[table["low"].notna()][0]
        return table.assign(low=table["low"].where(table.index != place, -0.5))

    rewrite(run, "heads", lower)
    assert any("outside of 0 to 1" in one for one in validate(run))


def saved_section(run, name, configuration=(), figures=(), **tables):
    columns = dict.fromkeys([one for table in tables.values() for one in table], "x")
    Section(
        name,
        name,
        columns=columns,
        configuration=dict(configuration),
        tables=tables,
        figures={one: go.Figure() for one in figures},
    ).save(run.path)


GRAPH = {"layers": 2, "heads": 3, "kv_heads": 3, "mlps": True, "parallel": False, "kv": "head"}
OF_HEADS = pd.DataFrame(
    {"name": ["L0H1", "L1H0"], "layer": [0, 1], "head": [1, 0], "gradient": [0.5, np.nan]}
)


def test_sections_that_are_joined_have_the_numbers_of_those_that_they_are_joined_of(run):
    """Both are whole, and of the same heads: one is of another run of the model."""
    saved_section(run, "importance", scores=OF_HEADS.assign(kind=["a", "b"]))
    saved_section(run, "roles", text=OF_HEADS.assign(gradient=9.0))  # which has one of its own
    joined = {"joined": ["importance", "roles", "copying"]}
    for table, said in (
        (OF_HEADS[::-1].assign(kind=["b", "a"]), None),
        (OF_HEADS.assign(gradient=[0.6, np.nan]), "column gradient has other numbers"),
        (OF_HEADS.assign(gradient=[0.5, 0.5]), "column gradient has other numbers"),
        (OF_HEADS.assign(kind=["a", "a"]), "column kind has other numbers"),
    ):
        saved_section(run, "heads", joined, heads=table.reset_index(drop=True))
        problems = validate(open_run(run.path))
        assert_matches("^$" if said is None else said, "\n".join(problems))


@pytest.mark.parametrize(
    ("configuration", "problems"),
    [({"seed": 0}, 0), ({"seed": 1}, 1), ({"kind": "own numbers", "seed": 1}, 0), ({}, 0)],
)
def test_a_section_of_another_seed_is_of_another_run(run, configuration, problems):
    saved_section(run, "scored", configuration, scores=OF_HEADS)
    found = validate(open_run(run.path))
    assert len(found) == problems
    assert all("configuration.seed is 1, the run has the seed 0" in one for one in found)


def test_a_table_of_edges_is_that_of_the_circuit_s_file(run):
    edges = ["input->a0.h1<v>", "a0.h1->logits"]
    curve = {"share": [0.5, 1.0], "faithfulness": [0.2, 1.0]}
    data = {
        **{
            "format": "lens-circuit",
            "version": 1,
            "model": "analytic",
            "task": "t",
            "made": "by hand",
        },
        **{"graph": GRAPH, "nodes": ["input", "a0.h1"], "edges": edges, "scores": [1.0, -2.0]},
        "faithfulness": curve,
    }
    (run.path / "circuits").mkdir()
    write_json(run.path / "circuits" / "t.json", data)
    table = pd.DataFrame(
        {
            "edge": [*edges[::-1], "input->logits"],
            "value": [-2.0, 1.0, 3.0],
            "in_circuit": [True, True, False],
        }
    )
    same = pd.DataFrame(
        {"circuit": ["circuit", "uniform"], "faithfulness": 0.1, "low": 0.1, "high": 0.1}
    )
    rest = {"edges": 10} | dict.fromkeys(
        ("low", "high", "random", "random_low", "random_high", "kl"), np.nan
    )
    of_curve = pd.DataFrame({"ranking": ["signed"] * 2 + ["absolute"] * 2} | rest | {n: [*np.array(c) + 1, *c] for n, c in curve.items()})  # fmt: skip
    for changed, ranked, said in (
        (table, of_curve, None),
        (table.assign(value=2 * table["value"]), of_curve, "value has other scores than circuits/t.json"),
        (table.assign(in_circuit=True), of_curve, "in_circuit has other edges than circuits/t.json"),
        (table, of_curve.assign(faithfulness=3.0), "no ranking has the curve of circuits/t.json"),
    ):  # fmt: skip
        saved_section(run, "edges", edges=changed)
        figure = ("faithfulness",)
        saved_section(run, "circuit", figures=figure, faithfulness=ranked, same_size=same)
        problems = validate(open_run(run.path))
        assert_matches("^$" if said is None else said, "\n".join(problems))
