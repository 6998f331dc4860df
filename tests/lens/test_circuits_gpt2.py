"""Published numbers of circuits, where the weights are; and every row's code on a random GPT-2, anywhere.

    LENS_GPT2=/path/to/gpt2 python -m pytest tests/lens/test_circuits_gpt2.py -rs -s

computes the table of `tests/lens/published.py` and prints it; rows whose weights or files are not there are
skipped with the reason. A hub id may stand for a folder where the network may be used.
"""

import os
from functools import partial

import pytest
import torch
import transformers

import lens
from lens.circuits import score_edges
from lens.circuits.exports import to_mib
from lens.circuits.graph.nodes import find_nodes
from lens.circuits.scores.methods import EapIg
from lens.tasks import ioi
from tests.lens import published
from tests.lens.published import GPT2, HOURS, ROWS, SCORES, Row

IDS = [row.name for row in ROWS]
OTHER_SIZE = (published.acdc, published.repaired)


@pytest.fixture(scope="module")
def weights():
    """Environment variable -> model, loaded when it is first asked for."""
    loaded = {}

    def load(variable: str):
        if variable not in loaded:
            loaded[variable] = lens.load(os.environ[variable])
        return loaded[variable]

    return load


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_published(row: Row, weights):
    if row.missing:
        pytest.skip(row.missing)
    found = row.measure(weights(row.needs[0]), row.prompts)
    off = []
    for name, (target, tolerance) in row.targets.items():
        print(
            f"{row.name}: {name} {found[name]:.4f}, published {target} ± {tolerance}; {row.other}"
        )
        if abs(found[name] - target) > tolerance:
            off.append(name)
    assert not off, f"{row.name}: {', '.join(off)} of {found}, published {row.targets}"


@pytest.fixture(scope="module")
def small():
    """GPT-2 with random weights, as many layers and heads as the small one, and a tokenizer that is here."""
    tokenizer = lens.load("smollm2-135m").tokenizer
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=24, n_layer=12, n_head=12,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return lens.load(transformers.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.measure not in OTHER_SIZE])
def test_rows_run_on_random_weights(name, small, monkeypatch, tmp_path):
    row = ROWS[IDS.index(name)]
    if SCORES in row.needs:
        path = tmp_path / "scores.json"
        to_mib(
            score_edges(small, ioi(small, 2, 0, corruption="s2_io"), method=EapIg(rule="left")),
            path,
        )
        monkeypatch.setenv(SCORES, str(path))
    quick = partial(lens.circuits.scores.codes, epochs=2, seeds=2)
    monkeypatch.setattr(published.circuits.scores, "codes", quick)
    prompts = 8 if name.startswith("codes") else 2
    found = row.measure(small, prompts)
    assert found.keys() == row.targets.keys()
    assert all(torch.tensor(list(found.values())).isfinite())
    if SCORES in row.needs:
        assert found["spearman"] == pytest.approx(1.0)
    if name == "edge count":
        assert found["edges"] == row.targets["edges"][0]


def test_the_repair_and_acdc_run_on_random_weights():
    tokenizer = lens.load("smollm2-135m").tokenizer
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=8, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tiny = lens.load(transformers.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer)
    found = published.repaired(tiny, 4, ["L0H1", "L1H0"])
    assert found.keys() == {"before", "after"}
    assert 0 <= published.acdc(tiny, 4, thresholds=3)["staircase"] <= 1


def test_reference_edges_are_those_of_the_paper(small):
    graph = find_nodes(small).graph
    known = published.known_edges(graph)
    assert "a5.h5->a8.h6<v>" in known  # induction to S-inhibition
    assert "a5.h5->a8.h6<q>" not in known
    assert "a9.h9->logits" in known
    assert "m3->a9.h9<k>" in known
    assert "a9.h9->m9" in known
    assert "a2.h2->a5.h5<k>" in known
    assert not [edge for edge in known if edge.startswith("a6.h0")]


def test_what_is_missing_is_said(monkeypatch):
    for name in (GPT2, HOURS):
        monkeypatch.delenv(name, raising=False)
    row = next(row for row in ROWS if HOURS in row.needs)
    assert row.missing is not None
    assert "set LENS_GPT2 to their folder; ACDC runs 32,491 edges" in row.missing
    monkeypatch.setenv(GPT2, "here")
    monkeypatch.setenv(HOURS, "1")
    assert row.missing is None
