"""Information-flow routes: against all parts of all states written out, and where the sums are known."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

import lens
from lens.circuits.known import induction_transformer
from lens.circuits.scores import flow_routes
from lens.circuits.scores._flow import proximity
from lens.common.errors import LensError
from tests.lens.circuit_models import small_model, small_task


def states(model, ids):
    """Streams [token, d] of one prompt by plain hooks, and each head's parts [head, query, key, d]."""
    inner, kind = model.model, model.model.config.model_type
    blocks = {
        "gpt2": lambda: inner.transformer.h,
        "llama": lambda: inner.model.layers,
        "gpt_neox": lambda: inner.gpt_neox.layers,
    }[kind]()
    kept: list[dict[str, torch.Tensor]] = [{} for _ in blocks]

    def twin(module, q, k, v, mask, **kwargs):
        share = q.shape[1] // k.shape[1]
        k, v = (part.repeat_interleave(share, 1) for part in (k, v))
        hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        out = {"gpt2": "c_proj", "llama": "o_proj", "gpt_neox": "dense"}[kind]
        weight = getattr(module, out).weight
        weight = weight if kind == "gpt2" else weight.T
        each = v[0] @ weight.unflatten(0, (len(v[0]), -1))  # [head, key, d]
        kept[module.layer_idx]["parts"] = pattern[0, ..., None] * each[:, None]
        return (pattern @ v).transpose(1, 2), None

    AttentionInterface.register("flow-twin", twin)
    hooks = []
    for number, block in enumerate(blocks):
        into = kept[number]
        hooks.append(
            block.register_forward_hook(
                lambda _, given, out, into=into: into.update(
                    before=given[0][0], after=(out if isinstance(out, torch.Tensor) else out[0])[0]
                )
            )
        )
        hooks.append(
            block.mlp.register_forward_hook(lambda _, __, out, into=into: into.update(mlp=out[0]))
        )
    before = inner.config._attn_implementation
    inner.config._attn_implementation = "flow-twin"
    with torch.no_grad():
        inner(ids[None])
    inner.config._attn_implementation = before
    for hook in hooks:
        hook.remove()
    return kept


def naive(model, ids, start, threshold):
    """Edges of the routes, a set of (layer, sum, part, query, key), and their importance."""
    parallel = model.model.config.model_type == "gpt_neox"
    found, reached = {}, {start}

    def shares(whole, parts):
        near = {
            name: max(0.0, float(whole.abs().sum() - (whole - part).abs().sum()))
            for name, part in parts.items()
        }
        return {name: value / sum(near.values()) for name, value in near.items()}

    for layer, kept in reversed(list(enumerate(states(model, ids)))):
        below = set()
        for at in reached:
            heads = {
                (f"L{layer}H{head}", at, key): kept["parts"][head, at, key]
                for head in range(len(kept["parts"]))
                for key in range(at + 1)
            }
            whole, mlp = kept["after"][at], kept["mlp"][at]
            alone = {("residual", at, at): kept["before"][at]}
            sums = "block" if parallel else "attention"
            if parallel:
                alone["mlp", at, at] = mlp
            else:
                middle = whole - mlp
                for name, share in shares(whole, {"residual": middle, "mlp": mlp}).items():
                    found[layer, "mlp", name, at, at] = share
                whole = middle
            parts = {**alone, **heads}
            parts["bias"] = whole - torch.stack(list(parts.values())).sum(0)
            for name, share in shares(whole, parts).items():
                if name != "bias":
                    found[layer, sums, *name] = share
                    if share >= threshold:
                        below.add(name[2])
        reached = below
    return {name: share for name, share in found.items() if share >= threshold}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("threshold", [0.02, 0.09])
def test_routes_are_those_of_all_parts_written_out(kind, threshold):
    model, task = small_model(kind), small_task(rows=2)
    found = flow_routes(model, task, threshold=threshold, progress=False)
    total = np.zeros_like(found.per_prompt)
    for prompt in range(task.n):
        rows = found.edges[found.edges["prompt"] == prompt]
        mine = {tuple(row[1:6]): row[6] for row in rows.itertuples(index=False)}
        twin = naive(model, task.clean[prompt], int(task.positions[prompt, 0]), threshold)
        assert set(mine) == set(twin)
        assert len(mine) == len(rows) > 5
        for edge, share in twin.items():
            assert mine[edge] == pytest.approx(share, rel=1e-9)
            if edge[2].startswith("L"):
                layer, head = edge[2][1:].split("H")
                total[int(layer), int(head), prompt] += share
    np.testing.assert_allclose(found.per_prompt, total, rtol=1e-9)
    assert (total > 0).any()


def test_proximity_of_parts_that_do_not_meet_is_their_size():
    parts = torch.tensor([[3.0, 0, 0, 0], [0, -1, 2, 0], [0, 0, 0, 0.5], [0, 0, -1, 0]])
    whole = parts[:3].sum(0)
    assert proximity(parts, whole).tolist() == [3, 3, 0.5, 0]  # the last points away


def test_known_routes():
    """The state has a token, a position and what heads add, each 1 in a place of its own."""
    known = induction_transformer(beta=30)
    found = flow_routes(known.model, known.task, progress=False)
    rows = {
        (row.layer, row.part, row.query, row.key): row.importance
        for row in found.edges.itertuples(index=False)
    }
    expected = {
        (1, "residual", 7, 7): 3 / 4,
        (1, "L1H0", 7, 2): 1 / 4,  # token 1 stands at 2
        (0, "residual", 7, 7): 2 / 3,
        (0, "L0H0", 7, 6): 1 / 3,  # the token before
        (0, "residual", 2, 2): 2 / 3,
        (0, "L0H0", 2, 1): 1 / 3,
    }
    assert rows == pytest.approx(expected, abs=1e-4)
    assert found.table()["name"].tolist()[:2] == ["L0H0", "L1H0"]
    np.testing.assert_allclose(found.values, [[2 / 3, 0], [1 / 4, 0]], atol=1e-4)
    few = flow_routes(known.model, known.task, threshold=0.3, progress=False)
    assert set(few.edges["part"]) == {"residual", "L0H0"}
    assert (few.edges["query"] == 7).all()  # what L1H0 read was never looked at


def test_induction_head_is_on_the_way():
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 6, length=11)
    found = flow_routes(model, task, progress=False)
    table = found.table().set_index("name")
    assert table.loc["L1H0", "used"] == 1
    assert (table["low"] <= table["value"]).all()
    assert found.edges["importance"].min() >= found.threshold
    assert "FlowRoutes('induction'" in repr(found)
    starts = task.positions.max(1).values
    top = found.edges[found.edges["layer"] == 1]
    assert set(zip(top["prompt"], top["query"], strict=True)) == set(enumerate(starts.tolist()))


def test_plot_has_a_dot_for_each_edge():
    found = flow_routes(small_model("gpt2"), small_task(rows=2), threshold=0.05, progress=False)
    drawn: Any = found.plot(1).data
    dots = [trace for trace in drawn if trace.mode == "markers"]
    edges = found.edges[found.edges["prompt"] == 1]
    assert sum(len(trace.x) for trace in dots) == len(edges)
    assert sum(len(trace.x) for trace in drawn if trace.mode == "lines") == 3 * len(edges)
    with pytest.raises(LensError, match="there are prompts 0 to 1, got 2"):
        found.plot(2)


def test_refusals():
    model, task = small_model("gpt2"), small_task()
    for wrong in (0, 0.5, True):
        with pytest.raises(LensError, match=r"a share above 0 and below 0\.5, got"):
            flow_routes(model, task, threshold=wrong)
    with pytest.raises(LensError, match="has no mark 'end'; it has none"):
        flow_routes(model, task, at="end")


def test_norms_behind_the_attention_are_refused():
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=23, hidden_size=12, intermediate_size=8, num_hidden_layers=2, head_dim=4,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    model = lens.load(transformers.Gemma2ForCausalLM(config).eval())
    with pytest.raises(LensError, match=r"flow_routes takes what is read .* gemma2 norms it in"):
        flow_routes(model, small_task(), progress=False)
