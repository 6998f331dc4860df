"""Whether patterns serve elsewhere: exact where they must be, and against loops over single rows."""

import numpy as np
import pytest
import torch
from lens_kernels import AttentionMask, masses_from_lse

import lens
from lens import policies
from lens.common.results import of_kind
from lens.models import random_weights
from lens.passes.blocks import BlockView
from lens.passes.head_outputs import read_calls


@pytest.fixture(scope="module")
def model():
    return lens.load("text-lm-3l")


@pytest.fixture(scope="module")
def prompts(model):
    ids = model.encode(lens.tasks.text("moby-dick"))
    return [ids[at : at + 64] for at in range(0, 192, 64)]


@pytest.fixture(scope="module")
def found(model, prompts):
    other = random_weights(model, 0)
    return policies.stability(
        model, prompts, checkpoint=other, steps=(1, 16), share=0.3, block_size=8
    )


def eager(model, ids):
    """P [layers, heads, tokens, tokens] as transformers computes it."""
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        p = model.model(torch.tensor([ids]), output_attentions=True).attentions
    model.model.set_attn_implementation("sdpa")
    return torch.cat(p).double().numpy()


def best(masses, seen, share):
    count = max(1, int(share * len(seen) + 1e-9))
    return sorted(seen, key=lambda at: (-masses[at], at))[:count]


def test_a_repeat_and_the_start_of_a_longer_prompt_are_exact(found):
    rows = found.summary().set_index("condition")
    assert rows.loc["repeat", "overlap"] == 1
    assert rows.loc["repeat", "lse_error"] == 0
    assert rows.loc["length", "overlap"] > 0.999
    assert rows.loc["length", "lse_error"] < 1e-4
    assert list(rows.index) == [
        "repeat",
        "prompt",
        "length",
        "layer",
        "step 1",
        "step 16",
        "checkpoint",
    ]
    assert rows.loc["prompt", "random_recall"] < rows.loc["prompt", "recall"]
    for condition in ("prompt", "checkpoint"):
        assert rows.loc[condition, "recall"] < rows.loc[condition, "own_recall"] < 1
    assert rows.loc["step 1", "efficiency"] > rows.loc["step 16", "efficiency"]


def test_later_steps_are_those_of_single_rows(model, prompts, found):
    p = eager(model, prompts[1])
    step, layer, head = 16, 1, 2
    whole = own = 0.0
    for row in range(32, 64 - step):
        later = row + step
        masses = [p[layer, head, later, at : at + 8].sum() for at in range(0, 64, 8)]
        source = [p[layer, head, row, at : at + 8].sum() for at in range(0, 64, 8)]
        seen, before = range(later // 8 + 1), range(row // 8 + 1)
        kept = {*best(source, before, 0.3), *(set(seen) - set(before))}
        whole += sum(masses[at] for at in kept)
        own += sum(sorted(masses[: len(seen)], reverse=True)[: len(kept)])
    values = found.values["step 16"][:, 1, layer, head]
    assert values[1] == pytest.approx(whole / (32 - step), abs=1e-5)
    assert values[2] == pytest.approx(own / (32 - step), abs=1e-5)


def test_neighbouring_layers_are_compared_by_the_mean_map(model, prompts, found):
    p = eager(model, prompts[0]).mean(1)
    blocks = p.reshape(3, 8, 8, 8, 8).sum(-1).mean(2)  # [layers, I, J]
    kept = total = 0.0
    for row in range(8):
        chosen = best(blocks[0, row], range(row + 1), 0.3)
        kept += blocks[1, row, chosen].sum()
        total += blocks[1, row].sum()
    values = found.values["layer"]
    assert values[1, 0, 0, 0] == pytest.approx(kept / total, abs=1e-5)
    assert np.isnan(values[:, :, 2]).all()
    assert np.isnan(values[5:]).all()
    assert "layer" not in set(found.table()["condition"])


def test_a_search_with_an_old_lse_is_that_of_its_kernel(model, prompts, found):
    """Against `masses_from_lse` with the LSE of another prompt, for one head."""
    calls = [
        next(one for one in read_calls(model, torch.tensor([ids])) if one.layer == 1)
        for ids in prompts[:2]
    ]
    views = [BlockView(one, 8, 8) for one in calls]
    old = views[0].attended(statistics=("lse",)).statistics.lse
    target = calls[1]
    key = views[1].key
    mask = AttentionMask(causal=True)
    scored = (
        masses_from_lse(
            target.query,
            key,
            old,
            mask=mask,
            scale=target.scale,
            block_size=(8, 8),
            statistics=("block_mass",),
        )
        .statistics.block_mass[0, 2]
        .double()
        .numpy()
    )
    exact = views[1].masses[0, 2].double().numpy()
    kept = own = 0.0
    for row in range(4, 8):
        kept += exact[row, best(scored[row], range(row + 1), 0.3)].sum()
        own += exact[row, best(exact[row], range(row + 1), 0.3)].sum()
    assert found.values["prompt"][6, 0, 1, 2] == pytest.approx(kept / own, abs=1e-5)
    rows = found.summary().set_index("condition")
    assert rows.loc["repeat", "cached_efficiency"] == 1
    assert 0.5 < rows.loc["prompt", "cached_efficiency"] <= 1
    assert np.isnan(rows.loc["step 1", "cached_efficiency"])
    assert np.isnan(
        rows.loc["length", "cached_efficiency"]
    )  # the start of a prompt has no rows of its own half


def test_claims_follow_their_measures(found):
    table = found.claims().set_index("claim")
    rows = found.summary().set_index("condition")
    pattern = table.loc["AdaSpa: the pattern varies from input to input"]
    assert pattern["value"] == rows.loc["prompt", "efficiency"]
    assert (pattern["verdict"] == "holds") == (pattern["high"] < 0.9)
    near = table.loc["IndexCache: neighbouring layers pick nearly the same keys"]
    assert (near["verdict"] == "holds") == (rows.loc["layer", "efficiency_low"] > 0.9)
    lse = table.loc["AdaSpa: the LSE varies from input to input"]
    off = found.values["prompt"][5]
    assert lse["value"] == pytest.approx((off < 0.05).mean())
    assert (lse["verdict"] == "holds") == (lse["high"] < 0.9)
    said = of_kind(found.findings(), "claim")
    assert len(said) == len(table)
    for sentence, (claim, row) in zip(said, table.iterrows(), strict=True):
        told = "cannot be told" if row["verdict"] == "not told apart" else row["verdict"]
        assert sentence.startswith(f"{claim}: {told} here")
    assert "overlap 1.000" in of_kind(found.findings(), "control")[0]
    figure = found.plot()
    assert list(figure.data[2].y) == found.summary()["recall"].tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": [[1] * 64]}, "at least two prompts of one length, got 1"),
        ({"prompts": [[1] * 64, [1] * 60]}, r"got 2 of \[60, 64\] tokens"),
        ({"steps": (40,)}, "too short for steps of 40"),
        ({"steps": (0,)}, "steps"),
        ({"share": 1}, "share must be"),
    ],
)
def test_what_does_not_fit_is_refused(model, prompts, change, said):
    given = {"prompts": prompts[:2], "block_size": 8, "steps": (1,), **change}
    with pytest.raises(lens.LensError, match=said):
        policies.stability(model, given.pop("prompts"), **given)
    with pytest.raises(lens.LensError, match="checkpoint must have"):
        policies.stability(
            model, prompts[:2], checkpoint=lens.load("induction-2l"), steps=(1,), block_size=8
        )
