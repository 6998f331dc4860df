"""Published numbers of GPT-2 small, where its weights are.

    LENS_GPT2=/path/to/gpt2 python -m pytest tests/lens/test_circuits_gpt2.py -s

takes a folder of weights and tokenizer, or a hub id where the network may be used. Targets and
tolerances are of METHODS for circuits: the benchmark's notebooks and EAP-IG's (Hanna et al. 2024, arXiv
2403.17806; Mueller et al. 2025, arXiv 2504.13151; TransformerLens' demo of activation patching).
"""

import os

import pytest
import torch

import lens
from lens.circuits import evaluate, find_nodes, path_patch, run_circuit, score_edges
from lens.tasks import Task, greater_than, ioi

SOURCE = os.environ.get("LENS_GPT2")
pytestmark = pytest.mark.skipif(
    SOURCE is None, reason="the weights of GPT-2 are not shipped: set LENS_GPT2 to their folder"
)
SENTENCES = {
    ("John", "Mary"): "When John and Mary went to the shops,{} gave the bag to",
    ("Tom", "James"): "When Tom and James went to the park,{} gave the ball to",
    ("Dan", "Sid"): "When Dan and Sid went to the shops,{} gave an apple to",
    ("Martin", "Amy"): "After Martin and Amy went to the park,{} gave a drink to",
}


@pytest.fixture(scope="module")
def gpt2():
    return lens.load(SOURCE)


@pytest.fixture(scope="module")
def years(gpt2):
    return greater_than(gpt2, 100, 0)


def test_sizes_and_the_eight_prompts(gpt2):
    assert find_nodes(gpt2).graph.n == 32_491
    ids = gpt2.tokenizer
    clean, corrupt, correct, wrong = [], [], [], []
    for names, text in SENTENCES.items():
        for subject, other in (names, names[::-1]):
            clean.append([ids.bos_token_id, *ids.encode(text.format(f" {subject}"))])
            corrupt.append([ids.bos_token_id, *ids.encode(text.format(f" {other}"))])
            correct.append(ids.encode(f" {other}"))
            wrong.append(ids.encode(f" {subject}"))
    task = Task(
        "eight",
        torch.tensor(clean),
        torch.full((8, 1), len(clean[0]) - 1),
        torch.tensor(correct),
        "logit_difference",
        torch.tensor(corrupt),
        wrong=torch.tensor(wrong),
    )
    assert task.evaluate(gpt2).mean().item() == pytest.approx(3.5519, abs=1e-3)
    assert task.evaluate(gpt2, corrupt=True).mean().item() == pytest.approx(-3.5519, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "published"), [("eap-ig", 0.7449), ("eap", 0.6563), ("clean-corrupted", 0.6858)]
)
def test_greater_than_by_the_top_200_edges(gpt2, years, method, published):
    """EAP-IG's notebook: 0.8143 for the model, on 490 prompts of its own nouns and years."""
    scores = score_edges(gpt2, years, method=method, steps=5, rule="left")
    found = run_circuit(gpt2, years, scores.top(200))
    print(method, found.full.mean(), found.metric.mean())
    assert found.full.mean() == pytest.approx(0.8143, abs=0.03)
    assert found.metric.mean() == pytest.approx(published, abs=0.05)


def test_ioi_by_the_benchmark(gpt2):
    task = ioi(gpt2, 100, 0, corruption="s2_io")
    scores = score_edges(gpt2, task, steps=5, rule="left")
    found = evaluate(gpt2, task, scores, random=3)
    print(found)
    assert found.cpr == pytest.approx(1.85, abs=0.1)
    assert found.cmd == pytest.approx(0.03, abs=0.02)
    assert found.random_cpr.mean() == pytest.approx(0.25, abs=0.02)
    assert found.random_cmd.mean() == pytest.approx(0.75, abs=0.02)


def test_name_movers_by_direct_path_patching(gpt2):
    task = ioi(gpt2, 50, 0, corruption="abc")
    heads = [name for name in find_nodes(gpt2).graph.writers if name.startswith("a")]
    found = path_patch(gpt2, task, ["logits"], heads)
    change = dict(zip(found.nodes, found.relative[:, 0], strict=True))
    order = sorted(heads, key=lambda name: change[name])
    print([(name, change[name]) for name in (*order[:3], *order[-2:])])
    assert set(order[:3]) == {"a9.h9", "a10.h0", "a9.h6"}
    assert set(order[-2:]) == {"a10.h7", "a11.h10"}
