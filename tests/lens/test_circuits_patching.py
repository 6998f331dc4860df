"""Patching: against plain hooks on a GPT-2, and on models whose circuit is known."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lens
from lens.circuits import patch
from lens.circuits.known import induction_transformer, logic_gate
from lens.common.errors import LensError
from lens.stats.controls import drawing
from tests.lens.circuit_models import ROWS, TOKENS, error, small_model, small_task

HEADS, SIZE, WIDTH = 3, 5, 15
MARK = torch.tensor([6, 2, 4, 0, 5])


@pytest.fixture(scope="module")
def gpt2():
    return small_model("gpt2")


@pytest.fixture(scope="module")
def task():
    return replace(small_task(), marks={"here": MARK})


def run(model, ids, hooks: list[tuple[Any, str, Callable]]):
    """Logits with plain hooks: ("pre", module) gets inputs, ("out", module) outputs."""
    handles = [
        module.register_forward_pre_hook(hook)
        if kind == "pre"
        else module.register_forward_hook(hook)
        for module, kind, hook in hooks
    ]
    with torch.no_grad():
        logits = model.model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


def read(model, ids) -> dict[str, Tensor]:
    """z, q, k, v and MLP outputs of a plain run."""
    found: dict[str, Tensor] = {}
    hooks: list = []
    for layer, block in enumerate(model.model.transformer.h):

        def z(_, inputs, layer=layer):
            found[f"z{layer}"] = inputs[0]

        def qkv(_, __, output, layer=layer):
            found[f"qkv{layer}"] = output

        def mlp(_, __, output, layer=layer):
            found[f"m{layer}"] = output

        hooks += [
            (block.attn.c_proj, "pre", z),
            (block.attn.c_attn, "out", qkv),
            (block.mlp, "out", mlp),
        ]
    run(model, ids, hooks)
    return found


def put_z(old, new, head, where):
    part = slice(SIZE * head, SIZE * (head + 1))
    result = old.clone()
    result[..., part] = torch.where(where[..., None], new[..., part], old[..., part])
    return result


def by_hooks(model, task, node, where, into, out_of):
    """Metric [prompts] with one node patched, as one would write it by hand."""
    other = out_of if isinstance(out_of, dict) else read(model, out_of)
    blocks = model.model.transformer.h
    layer = int(node[1])
    if node.startswith("m"):

        def write(_, __, output):
            return torch.where(where[..., None], other[f"m{layer}"], output)

        hooks = [(blocks[layer].mlp, "out", write)]
    else:

        def hook(_, inputs):
            return (put_z(inputs[0], other[f"z{layer}"], int(node[4]), where),)

        hooks = [(blocks[layer].attn.c_proj, "pre", hook)]
    return task.measure(run(model, into, hooks), torch.arange(task.n)).numpy()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_patches_are_those_of_plain_hooks(gpt2, task, direction):
    pair = (task.clean, task.corrupt)
    into, out_of = pair if direction == "noising" else pair[::-1]
    found = patch(gpt2, task, direction=direction, progress=False)
    assert found.nodes == ("a0.h0", "a0.h1", "a0.h2", "m0", "a1.h0", "a1.h1", "a1.h2", "m1")
    everywhere = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for number, node in enumerate(found.nodes):
        expected = by_hooks(gpt2, task, node, everywhere, into, out_of)
        assert error(found.patched[number, 0], expected) < 1e-11, node
    base = run(gpt2, into, [])
    assert error(found.base, task.measure(base, torch.arange(ROWS))) < 1e-11


def test_a_loss_that_rises_is_a_change_above_0(gpt2, task):
    """It was turned round: noising that ruins a task was told as -3.88 of the -4.11 loss between both runs."""
    task = task.with_metric("loss")
    rows = torch.arange(ROWS)
    plain, other = (task.measure(run(gpt2, ids, []), rows) for ids in (task.clean, task.corrupt))
    for found in (
        patch(gpt2, task, progress=False),
        patch(gpt2, task, "residual", progress=False),
        patch(gpt2, task, receivers=["logits"], progress=False),
    ):
        assert error(found.base, plain) < 1e-11
        assert found.whole == pytest.approx(float((other - plain).mean()), rel=1e-9)
        best = found.table().iloc[0]
        assert best["change"] == pytest.approx(best["effect"] * found.whole)
    importance = lens.heads.importance(gpt2, task, baseline="counterfactual", progress=False)
    heads = patch(gpt2, task, list(importance.table()["name"]), progress=False).table()
    change = heads.set_index("node")["change"]
    for row in importance.table().itertuples():
        assert change[f"a{row.layer}.h{row.head}"] == pytest.approx(row.value, abs=1e-6)


def test_a_node_is_a_head_by_any_of_its_names(gpt2, task):
    expected = patch(gpt2, task, ["a1.h2"], receivers=["logits"], progress=False)
    for head in ("L1H2", (1, 2), "a1.h2", "1.2"):
        found = patch(gpt2, task, head, receivers="logits", progress=False)
        assert (found.nodes, found.receivers) == (expected.nodes, expected.receivers)
        np.testing.assert_array_equal(found.patched, expected.patched)
    into = patch(gpt2, task, ["m0"], receivers=[(1, 2)], progress=False)
    assert into.receivers == ("a1.h2<q>", "a1.h2<k>", "a1.h2<v>")


def test_patches_at_a_mark_and_at_each_token(gpt2, task):
    nodes = ["a0.h2", "m0", "a1.h1"]
    marked = patch(gpt2, task, nodes, positions="here", progress=False)
    each = patch(gpt2, task, nodes, positions="each", progress=False)
    assert each.positions == tuple(map(str, range(TOKENS)))
    at = torch.arange(TOKENS) == MARK[:, None]
    for number, node in enumerate(nodes):
        expected = by_hooks(gpt2, task, node, at, task.clean, task.corrupt)
        assert error(marked.patched[number, 0], expected) < 1e-11
        for token in (0, 3, 6):
            there = (torch.arange(TOKENS) == token).expand(ROWS, -1)
            expected = by_hooks(gpt2, task, node, there, task.clean, task.corrupt)
            assert error(each.patched[number, token], expected) < 1e-11


def four_passes(model, task, sender, receiver, freeze_mlps):
    """Path patching as Wang et al. do it: cache, freeze, record, overwrite. Receiver: (layer, head, part)."""
    blocks = model.model.transformer.h
    clean, corrupt = read(model, task.clean), read(model, task.corrupt)
    everywhere = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    recorded: dict[str, Tensor] = {}
    hooks: list = []
    for layer, block in enumerate(blocks):

        def freeze(_, __, output, layer=layer):
            recorded[f"qkv{layer}"] = output
            return clean[f"qkv{layer}"]

        hooks.append((block.attn.c_attn, "out", freeze))
        if freeze_mlps:

            def hold(_, __, ___, layer=layer):
                return clean[f"m{layer}"]

            hooks.append((block.mlp, "out", hold))
    layer = int(sender[1])

    def send(_, inputs):
        return (put_z(inputs[0], corrupt[f"z{layer}"], int(sender[4]), everywhere),)

    hooks.append((blocks[layer].attn.c_proj, "pre", send))
    logits = run(model, task.clean, hooks)
    if receiver != "logits":
        at, head, part = receiver
        place = slice(WIDTH * part + SIZE * head, WIDTH * part + SIZE * (head + 1))

        def receive(_, __, output):
            result = output.clone()
            result[..., place] = recorded[f"qkv{at}"][..., place]
            return result

        logits = run(model, task.clean, [(blocks[at].attn.c_attn, "out", receive)])
    return task.measure(logits, torch.arange(ROWS)).numpy()


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize(
    ("name", "receiver"), [("logits", "logits"), ("a1.h2<q>", (1, 2, 0)), ("a1.h0<v>", (1, 0, 2))]
)
def test_paths_are_those_of_the_four_passes(gpt2, task, freeze_mlps, name, receiver):
    senders = ["a0.h0", "a0.h1", "a0.h2"]
    found = patch(gpt2, task, senders, receivers=[name], freeze_mlps=freeze_mlps, progress=False)
    for number, sender in enumerate(senders):
        expected = four_passes(gpt2, task, sender, receiver, freeze_mlps)
        assert error(found.patched[number, 0] - found.base, expected - found.base) < 1e-9


def test_a_head_as_receiver_reads_by_all_three_parts(gpt2, task):
    whole = patch(gpt2, task, ["a0.h1"], receivers=["a1.h1"], progress=False)
    assert whole.receivers == ("a1.h1<q>", "a1.h1<k>", "a1.h1<v>")
    for named in ("L1H1<q>", "1.1<q>", "a1.h1<q>"):
        found = patch(gpt2, task, ["a0.h1"], receivers=named, progress=False)
        assert found.receivers == ("a1.h1<q>",)
    with pytest.raises(LensError, match=r"there is no receiver 'a1\.h1<z>'"):
        patch(gpt2, task, ["a0.h1"], receivers=["L1H1<z>"], progress=False)
    parts = patch(gpt2, task, ["a0.h1"], receivers=whole.receivers, progress=False)
    assert error(whole.patched, parts.patched) < 1e-12


def test_what_comes_later_has_no_path_and_mlps_and_the_input_can_send(gpt2, task):
    late = patch(gpt2, task, ["a1.h0", "m1"], receivers=["a0.h1"], progress=False)
    assert np.abs(late.patched - late.base).max() < 1e-12
    frozen = patch(
        gpt2, task, ["m1", "input"], receivers=["logits"], freeze_mlps=True, progress=False
    )
    only = patch(gpt2, task, ["m1"], progress=False)  # the last MLP has no reader but the logits
    assert error(frozen.patched[0], only.patched[0]) < 1e-11
    assert np.abs(frozen.effects[1]).max() > 1e-3


def test_and_gates_show_in_noising_and_or_gates_in_denoising():
    effects = {}
    for gate in ("and", "or"):
        known = logic_gate(gate, dtype="float64")
        for direction in ("noising", "denoising"):
            found = patch(
                known.model, known.task, ["a0.h0", "m0"], direction=direction, progress=False
            )
            effects[gate, direction] = found.effects[:, 0]
    assert effects["and", "noising"] == pytest.approx([1, 1])
    assert effects["and", "denoising"] == pytest.approx([0, 1])
    assert effects["or", "noising"] == pytest.approx([0, 1])
    assert effects["or", "denoising"] == pytest.approx([1, 1])


def test_the_chain_of_the_induction_transformer():
    known = induction_transformer(8, dtype="float64")
    task = known.tasks[next(name for name in known.tasks if name != next(iter(known.tasks)))]
    found = patch(known.model, task, progress=False)
    best = found.table().iloc[0]
    assert best["node"] in ("a0.h0", "a1.h0")
    assert best["effect"] == pytest.approx(1, abs=0.02)
    assert "noising on" in repr(found)
    figure: Any = found.plot()
    assert figure.data[0].z.shape == (len(found.nodes), 1)
    table = found.table().set_index("node")
    assert table.loc["a0.h1", "effect"] == pytest.approx(0, abs=1e-9)  # a decoy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"direction": "sideways"},
            "direction must be one of 'noising', 'denoising', got 'sideways'",
        ),
        ({"nodes": ["a9.h0"]}, r"nodes must be writers of the graph.*got 'a9\.h0'"),
        ({"nodes": []}, "nodes must be writers of the graph"),
        ({"nodes": 5}, "nodes must be a list, got 5"),
        ({"nodes": "residul"}, "or one of 'residual', 'attention', 'mlp'; got 'residul'"),
        ({"receivers": 5}, "receivers must be a list, got 5"),
        ({"positions": "s2"}, r"a mark of the task \(here\), got 's2'"),
    ],
)
def test_wrong_patches_are_refused(gpt2, task, options, message):
    with pytest.raises(LensError, match=message):
        patch(gpt2, task, **options)


def test_wrong_paths_are_refused(gpt2, task):
    with pytest.raises(LensError, match=r"there is no receiver 'a1\.h9'"):
        patch(gpt2, task, receivers=["a1.h9"])
    with pytest.raises(LensError, match="needs at least one receiver"):
        patch(gpt2, task, receivers=[])
    with pytest.raises(LensError, match="with receivers patch takes one place at a time"):
        patch(gpt2, task, receivers=["logits"], positions="each")
    with pytest.raises(LensError, match="freeze_mlps is for patching with receivers"):
        patch(gpt2, task, freeze_mlps=True)
    with pytest.raises(LensError, match="has no corrupt prompts"):
        patch(gpt2, replace(task, corrupt=None))


def replaced(model, ids, kind, layer, source, where):
    """Logits with the state of one sub-layer from `source` where asked, by plain hooks."""
    block = model.model.transformer.h[layer]
    if kind == "residual":

        def swap(_, inputs):
            return (source.where(where[..., None], inputs[0]), *inputs[1:])

        return run(model, ids, [(block, "pre", swap)])
    if kind == "attention":

        def swap_heads(_, inputs):
            return (source.where(where[..., None], inputs[0]),)

        return run(model, ids, [(block.attn.c_proj, "pre", swap_heads)])

    def swap_mlp(_, __, output):
        return source.where(where[..., None], output)

    return run(model, ids, [(block.mlp, "out", swap_mlp)])


def states(model, ids, kind, layer):
    """What a sub-layer writes in a plain run; of "residual", what enters the layer."""
    found = []
    block = model.model.transformer.h[layer]
    places = {
        "residual": (block, "pre", lambda _, inputs: found.append(inputs[0])),
        "attention": (block.attn.c_proj, "pre", lambda _, inputs: found.append(inputs[0])),
        "mlp": (block.mlp, "out", lambda _, __, output: found.append(output)),
    }
    run(model, ids, [places[kind]])
    return found[0]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("kind", ["residual", "attention", "mlp"])
def test_states_of_sub_layers_are_patched_as_plain_hooks_do(gpt2, task, kind, direction):
    found = patch(gpt2, task, kind, direction=direction, positions="each", progress=False)
    pair = (task.clean, task.corrupt)
    into, source = pair if direction == "noising" else pair[::-1]
    layers = len(gpt2.model.transformer.h)
    assert found.nodes == tuple(f"{kind[0]}{layer}" for layer in range(layers))
    assert found.patched.shape == (layers, TOKENS, ROWS)
    rows = torch.arange(ROWS)
    for layer in range(layers):
        given = states(gpt2, source, kind, layer)
        for token in (0, 3, TOKENS - 1):
            where = (torch.arange(TOKENS) == token).expand(ROWS, -1)
            logits = replaced(gpt2, into, kind, layer, given, where)
            expected = task.sign * task.measure(logits, rows).double()
            np.testing.assert_allclose(found.patched[layer, token], expected, atol=2e-5)
    plain = [task.sign * task.measure(run(gpt2, ids, []), rows).double() for ids in (into, source)]
    np.testing.assert_allclose(found.base, plain[0], atol=2e-5)
    np.testing.assert_allclose(found.source, plain[1], atol=2e-5)


def test_the_whole_stream_moves_everything_and_noise_is_drawn_by_its_seed(gpt2, task):
    whole = patch(gpt2, task, "residual", progress=False)
    np.testing.assert_allclose(whole.effects, 1, atol=1e-4)
    options = {"direction": "denoising", "noise": 3.0, "noise_at": "here", "progress": False}
    noisy = patch(gpt2, task, "residual", positions="here", **options)
    np.testing.assert_allclose(noisy.effects[0], 1, atol=1e-4)  # the noise itself is taken out
    assert np.abs(noisy.base - noisy.source).max() > 1e-3
    again = patch(gpt2, task, "residual", positions="here", **options)
    np.testing.assert_array_equal(noisy.base, again.base)
    other = patch(gpt2, task, "residual", positions="here", seed=1, **options)
    assert not np.allclose(noisy.base, other.base)
    assert "denoising" in noisy.plot().layout.title.text


@pytest.mark.parametrize("nodes", ["residual", ["a0.h1"]])
def test_noise_beyond_all_numbers_is_refused(nodes):
    """It was said that both runs have the same loss, of nan, so that there is nothing to move."""
    model = lens.load("induction-2l")
    with pytest.raises(LensError, match="no finite loss: numbers overflow"):
        patch(model, lens.tasks.induction(model, n=2), nodes, noise=1e300, progress=False)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_single_heads_are_patched_from_noise(gpt2, task, direction):
    """Against noise that is put on the embeddings by hand, without corrupt prompts."""
    nodes, clean = ["a0.h1", "a1.h2", "m0"], task.clean
    alone = replace(task, corrupt=None)
    options = {"noise": 2.0, "noise_at": "here", "seed": 4, "progress": False}
    found = patch(gpt2, alone, nodes, direction=direction, **options)
    entering = states(gpt2, clean, "residual", 0)
    rows = [drawing(4, *ids).normal(size=entering.shape[1:]) for ids in clean.tolist()]
    drawn = torch.from_numpy(np.stack(rows)).to(entering)
    here = (torch.arange(TOKENS) == MARK[:, None])[..., None]
    noise = drawn * entering.std() * 2 * here
    first = gpt2.model.transformer.h[0]

    def noisy(_, inputs):
        return (inputs[0] + noise, *inputs[1:])

    hook = first.register_forward_pre_hook(noisy)
    with_noise, other = run(gpt2, clean, []), read(gpt2, clean)
    if direction == "denoising":
        hook.remove()
        other = read(gpt2, clean)
        hook = first.register_forward_pre_hook(noisy)
    else:
        hook.remove()
    everywhere = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for number, node in enumerate(nodes):
        expected = by_hooks(gpt2, task, node, everywhere, clean, other)
        assert error(found.patched[number, 0], expected) < 1e-10, node
    hook.remove()
    noised = found.base if direction == "denoising" else found.source
    assert error(noised, task.measure(with_noise, torch.arange(ROWS))) < 1e-10
    to = patch(gpt2, alone, nodes, receivers=["logits"], direction=direction, **options)
    assert error(to.base, found.base) < 1e-12
    assert np.abs(to.patched - found.patched).max() > 1e-4


def test_a_model_without_mlps_has_none_to_patch():
    model = lens.load("induction-2l")
    with pytest.raises(LensError, match="induction-2l has no MLPs to patch"):
        patch(model, lens.tasks.induction(model), "mlp", progress=False)


def test_a_window_patches_layers_together(gpt2, task):
    layers = len(gpt2.model.transformer.h)
    wide = patch(gpt2, task, "mlp", window=2 * layers + 1, progress=False)
    assert np.ptp(wide.patched, axis=0).max() < 1e-5  # every window holds all layers
    alone = patch(gpt2, task, "mlp", progress=False)
    assert np.abs(alone.patched - wide.patched).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": "stream"}, "nodes must be"),
        ({"nodes": "residual", "window": 3}, "window is for 'attention' and 'mlp'"),
        ({"nodes": "residual", "noise": 0.0}, "noise must be a number above 0"),
        (
            {"nodes": "residual", "noise": "a"},
            "noise must be a number, got 'a'",
        ),
        ({"nodes": "residual", "noise": True}, "noise must be a number above 0"),
        (
            {"nodes": "residual", "noise": 3.0, "noise_at": "each"},
            "noise_at must be a mark of the task",
        ),
        ({"nodes": "residual", "noise": 3.0, "seed": "a"}, "seed must be an integer of at least 0"),
        ({"nodes": "residual", "noise_at": "here"}, "give noise"),
        ({"nodes": "residual", "receivers": ["logits"]}, "named one by one"),
        ({"window": 3}, "window goes with nodes='attention'"),
        ({"nodes": ["m0"], "noise": -1.0}, "noise must be a number above 0"),
        ({"nodes": ["m0"], "noise_at": "here"}, "give noise"),
        ({"nodes": "mlp", "window": 0}, "window"),
        ({"positions": [3]}, "positions must be a text, got"),
        ({"nodes": "mlp", "noise": 3.0, "noise_at": [3]}, "noise_at must be a text, got"),
    ],
)
def test_what_does_not_go_together_is_refused(gpt2, task, options, said):
    with pytest.raises(LensError, match=said):
        patch(gpt2, task, **options, progress=False)


def test_a_seed_is_kept_with_every_kind_of_node(gpt2, task):
    """Nodes that were named one by one forgot it."""
    for asked in (
        {"nodes": ["a0.h1"]},
        {"nodes": "mlp"},
        {"nodes": ["a0.h1"], "receivers": ["logits"]},
    ):
        asked: Any = {**asked, "seed": 3, "progress": False}
        assert patch(gpt2, task, **asked).seed == 3
