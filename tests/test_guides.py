"""The guides for people who come from another tool: both sides run, agree, and ours is not longer."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import lens

ROOT = Path(__file__).parents[1]
OTHERS = {"TransformerLens": "from-transformer-lens", "BertViz": "from-bertviz"}
TEXT = "It was the best of times, it was the worst of times"
NOT_HERE = ("circuitsvis", "cv.", "bertviz", "head_view", "model_view")  # they only draw


def tasks(other: str) -> dict[str, list[str]]:
    """Title -> our code and, where there is any, theirs."""
    sections = (ROOT / f"docs/{OTHERS[other]}.md").read_text().split("\n## ")
    found = {}
    for section in sections[1:]:
        title = section.partition("\n")[0]
        if re.match(r"\d+\. ", title):
            found[title] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return found


def lines(code: str) -> int:
    return sum(bool(line.strip()) for line in code.splitlines())


def run(codes, folder: Path) -> SimpleNamespace:
    """Names that the blocks make one after another, `gpt2` being a small one in a folder."""
    names: dict[str, object] = {"text": TEXT}
    for code in codes:
        exec(code.replace('"gpt2"', repr(str(folder))), names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 with random weights large enough for attention that is far from uniform."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=512, n_positions=128, n_embd=48, n_layer=3, n_head=6,
        bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    lens.load("text-lm-3l").tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(gpt2, tmp_path_factory):
    """What our side of the pages makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("ours"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        names = run([codes[0] for codes in tasks("BertViz").values()], gpt2)
        names.page = Path("heads.html").read_text()
    return names


def test_both_pages_have_the_same_ten_tasks_and_the_same_lines_of_ours():
    first, second = (tasks(other) for other in OTHERS)
    assert len(first) == 10
    assert {title: codes[0] for title, codes in first.items()} == {
        title: codes[0] for title, codes in second.items()
    }


@pytest.mark.parametrize("other", OTHERS)
def test_ours_is_never_longer_and_the_table_counts_right(other):
    page = (ROOT / f"docs/{OTHERS[other]}.md").read_text()
    beside = {name: tasks(name) for name in OTHERS}
    for title, (our, *_) in beside[other].items():
        theirs = [sum(map(lines, codes[title][1:])) for codes in beside.values()]
        assert all(lines(our) <= count for count in theirs if count), title
        cells = " | ".join(str(count or "–") for count in theirs)
        assert f"| {title} | {lines(our)} | {cells} |" in page
    code = "\n".join(code for codes in beside[other].values() for code in codes)
    ast.parse(code)
    assert max(map(len, code.splitlines())) < 100
    assert ";" not in code


def test_the_page_for_serving_has_the_same_ten_tasks_their_counts_and_our_lines():
    page = (ROOT / "docs/for-serving-engineers.md").read_text()
    beside = [tasks(other) for other in OTHERS]
    for title, (our, *_) in beside[0].items():
        theirs = [sum(map(lines, codes[title][1:])) for codes in beside]
        cells = " | ".join(str(count or "–") for count in theirs)
        assert page.count(f"| {title} | {lines(our)} | {cells} |") == 1
    every = "\n".join(codes[0].strip("\n") for codes in beside[0].values())
    assert f"```python\n{every}\n```" in page


def test_our_side_gives_what_the_page_says(ours):
    assert ours.tile.shape == (8, 8)
    assert "L1H3" in ours.page
    assert "default-src 'none'" in ours.page  # nothing is fetched
    assert len(ours.patched.top(18)) == 18


def test_bertviz_draws_the_numbers_that_are_here(ours, gpt2):
    codes = [codes[1] for codes in tasks("BertViz").values() if codes[1:]]
    theirs = run([code for code in codes if not any(word in code for word in NOT_HERE)], gpt2)
    assert len(codes) == 6
    assert np.allclose(theirs.tile.detach(), ours.tile, atol=1e-5)
    assert len(theirs.tokens) == ours.trace.length


@pytest.mark.slow  # importing TransformerLens alone takes five seconds
def test_transformer_lens_gives_the_numbers_that_are_here(ours, gpt2, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    codes = [codes[1] for codes in tasks("TransformerLens").values()]
    bare = [code for code in codes if not any(word in code for word in NOT_HERE)]
    assert len(bare) == len(codes) - 2
    torch.manual_seed(1)
    theirs = run(["import torch", *bare], gpt2)
    assert "transformer_lens" in sys.modules
    assert np.allclose(theirs.tile.detach(), ours.tile, atol=1e-5)
    assert np.allclose(theirs.product.detach(), ours.product.values, atol=1e-4)
    assert theirs.scores.shape == (3, 6)
    assert theirs.without.detach().item() == pytest.approx(ours.without, abs=1e-4)
    assert theirs.written.tolist() == ours.written.tolist()
    # their patching on their prompts is our importance on these prompts
    positions = torch.arange(25, 49).expand(8, -1)
    task = lens.tasks.Task(
        "copies", theirs.clean, positions, theirs.clean[:, 26:], "loss", theirs.corrupt
    )
    found = lens.heads.importance(ours.model, task, baseline="counterfactual", progress=False)
    expected = theirs.patched - theirs.loss(theirs.model(theirs.clean))
    assert np.allclose(found.per_prompt.mean(-1), expected.detach(), atol=1e-4)
    assert np.abs(expected.detach().numpy()).max() > 0.01
