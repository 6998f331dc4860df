"""`lens.reading.examples`: the best pair of each prompt is that of the model's own eager attention, written out."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.models import random_weights
from lens.passes.interface import switched
from tests.lens.architectures import build

SIZES = (9, 17, 5, 12)


def _prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(3, 60, (size,), generator=random).tolist() for size in SIZES]


def _eager(model, ids):
    with torch.no_grad(), switched(model.model, "eager"):
        out = model.model(torch.tensor([ids]), output_attentions=True)
    return [layer[0].double().numpy() for layer in out.attentions]


def _written(model, ids):
    """[layer][head, key]: |v_j W_O| from the hidden states that the projections read."""
    kept = {}
    hooks = [
        block.self_attn.v_proj.register_forward_hook(
            lambda *given, at=at: kept.__setitem__(at, given[2][0])
        )
        for at, block in enumerate(model.model.model.layers)
    ]
    with torch.no_grad():
        model.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    found = []
    for at, block in enumerate(model.model.model.layers):
        size, heads = block.self_attn.head_dim, model.info.heads
        value = kept[at].view(len(ids), -1, size).repeat_interleave(heads // model.info.kv_heads, 1)
        matrix = block.self_attn.o_proj.weight.T.view(heads, size, -1)
        found.append(torch.einsum("thk,hkd->htd", value, matrix).norm(dim=-1).detach().numpy())
    return found


def _naive(p, by, norms):
    """[queries, keys] weights of one head, NaN in rows without a choice."""
    n, p = len(p), p.copy()
    if by == "sink_excluded":
        p[:, 0] = 0
        p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
        p[:2] = np.nan if n > 1 else p[:2]
    else:
        p = p * (norms if by == "written" else 1)
        p[0] = np.nan
    return p


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_best_pairs_are_those_of_the_written_out_attention(name):
    model = lens.load(build(name))
    given = _prompts()
    found = lens.reading.examples(model, iter(given), n=2, context=6, chance=False, progress=False)
    everything = [(_eager(model, ids), _written(model, ids)) for ids in given]
    assert found.prompts == len(given)
    for by in ("attention", "sink_excluded", "written"):
        for head in found.heads:
            best = []
            for number, (attention, norms) in enumerate(everything):
                weights = _naive(attention[head.layer][head.head], by, norms[head.layer][head.head])
                best.append(
                    (np.nanmax(weights), number, *divmod(np.nanargmax(weights), len(weights)))
                )
                own = found.typical[by][head.layer, head.head, number]
                assert own == pytest.approx(best[-1][0], rel=1e-4)
            chosen = sorted(best, reverse=True)[:2]
            for one, (value, number, query, key) in zip(found.of(head, by), chosen, strict=True):
                assert (one.prompt, one.query, one.key) == (number, query, key)
                assert one.value == pytest.approx(value, rel=1e-4)
                attention, norms = everything[number]
                row = _naive(attention[head.layer][head.head], by, norms[head.layer][head.head])[
                    query
                ]
                for place, weight in zip(one.places, one.weights, strict=True):
                    if weight == weight:
                        assert weight == pytest.approx(row[place], rel=1e-3, abs=1e-6)
                assert {query, key} <= set(one.places)


def test_prompts_without_a_choice_count_neither_in_numbers_nor_in_means():
    """Numbers are places in what was given; two tokens leave no choice without the first."""
    model = lens.load(build("llama"))
    long = _prompts()[0]
    found = lens.reading.examples(
        model, [[5], long, [6], [7, 8]], n=2, chance=False, progress=False
    )
    assert found.prompts == 2
    alone = lens.reading.examples(model, [long], n=1, chance=False, progress=False)
    assert np.isnan(found.typical["sink_excluded"][..., 1]).all()
    rest = alone.typical["sink_excluded"][..., 0]
    table = found.table()
    own = table[table["by"] == "sink_excluded"]
    assert own["typical"].to_numpy() == pytest.approx(rest.ravel())
    assert set(own["n"]) == {1}
    assert set(table["n"][table["by"] == "attention"]) == {2}
    for head in found.heads:
        assert [one.prompt for one in found.of(head, "sink_excluded")] == [1]
        assert {one.prompt for one in found.of(head)} == {1, 3}
    short = lens.reading.examples(model, [[5, 6]], n=1, chance=False, progress=False)
    assert ["without the first" in one for one in short.findings()] == [False, False]


def test_uniform_and_random_weights_stand_beside():
    model = lens.load(build("llama"))
    found = lens.reading.examples(model, _prompts(), n=1, seed=5, progress=False)
    alone = lens.reading.examples(
        random_weights(model, 5), _prompts(), n=1, chance=False, progress=False
    )
    rows = found.table().query("by == 'attention'")
    assert (rows["random_weights"] == alone.typical["attention"].mean(-1).max()).all()
    one = found.of(found.heads[0])[0]
    assert one.uniform == pytest.approx(1 / (one.query + 1))
    rest = found.of(found.heads[0], "sink_excluded")[0]
    assert rest.uniform == pytest.approx(1 / rest.query)
    assert len(found.strips()) == sum(
        len(one.places) for heads in found.found.values() for some in heads.values() for one in some
    )


def test_prompts_come_one_at_a_time_and_what_cannot_be_is_refused():
    model = lens.load(build("llama"))
    assert lens.reading.examples(
        model, (ids for ids in _prompts()), n=1, chance=False, progress=False
    ).prompts == len(SIZES)
    for given, message in (
        ("one text", "give a list"),
        (3, "prompts must be a list, got 3"),
        ([], "no prompt was given"),
        ([[5]], "none has two tokens"),
        ([[[5, 6], [7, 8]]], "one prompt"),
    ):
        with pytest.raises(LensError, match=message):
            lens.reading.examples(model, given, chance=False, progress=False)
