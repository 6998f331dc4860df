"""Logits taken apart: exact on every architecture, equal to a slow twin, and the parts that were written down."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

import lens
from lens.circuits.known import PROGRAMS, induction_transformer, tracr
from lens.common.errors import LensError
from lens.common.head_ids import head_of_node
from lens.passes.replay import proved
from lens.reading import _groups, _pairs, _writers, explaining
from lens.reading._head import read_head
from lens.reading._rotation import Rotation, find_rotation
from lens.reading.explaining import pair_cells
from tests.lens.layouts import ALWAYS, KINDS, layout_model
from tests.tiers import first

LENGTH = 13


@pytest.fixture(scope="module")
def models():
    made: dict = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = lens.load(layout_model(kind))
        return made[kind]

    return get


def inputs_of(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "vit":
        return {"pixel_values": torch.randn(1, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 60, (1, LENGTH), generator=generator)}


def explained(model, kind, head="L2H4", query=9, key=7, **options):
    return lens.reading.explain(model, inputs_of(kind), head, query, key, progress=False, **options)


@pytest.mark.parametrize("kind", first(KINDS, *ALWAYS, "vit"))
def test_the_parts_sum_to_the_logit(models, kind):
    """Against the logit from the layer's own queries and keys, and the attention that the kernel's LSE says."""
    model = models(kind)
    head = f"L{model.info.layers - 1}H2"
    found = explained(model, kind, head, against="attention")
    calls = []

    def keep(call):
        calls.append(call)
        return lens.passes.calls.attend(call).output

    with lens.passes.sessions.listening(model, keep), torch.no_grad():
        model.model(**inputs_of(kind))
    call = calls[found.head.layer]
    group = 2 * call.key.shape[1] // call.query.shape[1]
    logit = call.scale * float(call.query[0, 2, 9].double() @ call.key[0, group, 7].double())
    if call.position_bias is not None:
        logit += float(
            call.position_bias.expand(1, call.query.shape[1], LENGTH, LENGTH)[0, 2, 9, 7]
        )
    scale = max(1, abs(logit))
    assert found.logit == pytest.approx(logit, rel=1e-6)
    assert abs(found.values.sum() - logit) < 1e-5 * scale
    assert abs(found.contrast.sum() - (found.logit - found.average)) < 1e-5 * scale
    assert found.error < 1e-5 * scale
    capped = call.softcap * math.tanh(logit / call.softcap) if call.softcap else logit
    lse = lens.passes.calls.attend(call, statistics=("lse",)).statistics.lse[0, 2, 9].detach()
    assert found.mass == pytest.approx(math.exp(capped - float(lse)), rel=1e-4)
    assert len(found.table()) == found.values.size
    assert found.side("key")["value"].sum() == pytest.approx(logit, abs=1e-5 * scale)


def naive_cells(model, ids, layer, head, query, key):
    """Of a Qwen3: every part of one query and key by hand, from what its modules were given and gave."""
    inner, config = model.model.model, model.model.config
    width, heads = config.head_dim, config.num_attention_heads
    seen: dict = {}
    handles = [
        inner.layers[number].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, number=number: seen.__setitem__(("z", number), args[0][0])
        )
        for number in range(layer)
    ]
    handles += [
        inner.layers[number].mlp.register_forward_hook(
            lambda _, __, output, number=number: seen.__setitem__(("mlp", number), output[0])
        )
        for number in range(layer)
    ]
    handles.append(
        inner.layers[layer].input_layernorm.register_forward_pre_hook(
            lambda _, args: seen.__setitem__("x", args[0][0])
        )
    )
    with torch.no_grad():
        model.model(ids)
    for handle in handles:
        handle.remove()
    parts = {"embedding": inner.embed_tokens(ids)[0]}
    for number in range(layer):
        weight = inner.layers[number].self_attn.o_proj.weight
        for one in range(heads):
            own = slice(one * width, (one + 1) * width)
            parts[f"L{number}H{one}"] = seen["z", number][:, own] @ weight[:, own].T
        parts[f"L{number} MLP"] = seen["mlp", number]
    block = inner.layers[layer]
    cos, sin = inner.rotary_emb(seen["x"][None], torch.arange(ids.shape[1])[None])
    sides = {}
    for side, projection, norm, which in (
        ("q", block.self_attn.q_proj, block.self_attn.q_norm, head),
        ("k", block.self_attn.k_proj, block.self_attn.k_norm, head // (heads // config.num_key_value_heads)),
    ):  # fmt: skip
        weight = projection.weight[which * width : (which + 1) * width]
        size = (seen["x"].square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        whole = (seen["x"] / size * block.input_layernorm.weight) @ weight.T
        head_size = (whole.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        for name, part in parts.items():
            made = (part / size * block.input_layernorm.weight) @ weight.T / head_size * norm.weight
            sides[side, name] = apply_rotary_pos_emb(made[None, None], made[None, None], cos, sin)[
                0
            ][0, 0]
    sides = {name: part.detach() for name, part in sides.items()}
    return {
        (a, b): block.self_attn.scaling * float(sides["q", a][query] @ sides["k", b][key])
        for a in parts
        for b in parts
    }


def test_each_cell_is_that_of_the_slow_twin(models):
    found = explained(models("qwen3"), "qwen3")
    table = found.table()
    own = dict(
        zip(zip(table["query_part"], table["key_part"], strict=True), table["value"], strict=True)
    )
    expected = naive_cells(models("qwen3"), inputs_of("qwen3")["input_ids"], 2, 4, 9, 7)
    assert set(own) == set(expected)
    assert max(abs(own[cell] - expected[cell]) for cell in own) < 3e-5
    assert max(map(abs, expected.values())) > 0.1


def held_logit(model, inputs, layer, head, query, key, louder):
    """Logit of a pair; `louder` writes half as much again, into norms that divide as in the plain run.

    By hooks on the model's own modules: what MLPs and all other heads write stays as it is, too.
    """
    layout = proved(model)
    plain: dict = {}
    calls, changed = [], [False]

    def norm_hook(name, norm):
        def hook(_, args, output):
            if name not in plain:
                plain[name] = norm.size(args[0])
            found = norm.frozen(args[0], plain[name])
            return found if norm.shift is None else found + norm.shift

        return hook

    def hold(name):
        return lambda _, __, output: plain.setdefault(name, output)

    def write_hook(number):
        def hook(_, args):
            z = plain.setdefault(("z", number), args[0])
            if changed[0] and number == louder[0]:
                width = z.shape[-1] // model.info.heads
                z = z.clone()
                z[..., louder[1] * width : (louder[1] + 1) * width] *= 1.5
            return (z, *args[1:])

        return hook

    handles = []
    for number, block in enumerate(layout.blocks[: layer + 1]):
        norms = {"n": block.norm, "m": block.mlp_norm, "a": block.after, "q": block.head_norms[0], "k": block.head_norms[1]}  # fmt: skip
        for name, norm in norms.items():
            if norm.module is not None:
                handles.append(norm.module.register_forward_hook(norm_hook((number, name), norm)))
        if number < layer:
            handles.append(block.mlp[-1].register_forward_hook(hold((number, "mlp"))))
            handles.append(block.output_module.register_forward_pre_hook(write_hook(number)))

    def keep(call):
        calls.append(call)
        return lens.passes.calls.attend(call).output

    for again in (False, True):
        calls.clear()
        changed[0] = again
        with lens.passes.sessions.listening(model, keep), torch.no_grad():
            model.model(**inputs)
    for handle in handles:
        handle.remove()
    call = calls[layer]
    group = head * call.key.shape[1] // call.query.shape[1]
    return call.scale * float(
        call.query[0, head, query].double() @ call.key[0, group, key].double()
    )


@pytest.mark.parametrize(
    "kind",
    ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "bert", "granite", "phi", "gpt_neox", "cohere", "opt", "vit"],
)  # fmt: skip
def test_a_part_is_what_a_louder_writer_adds(models, kind):
    """With norms held the logit is linear in each writer of each side: 1.5 times z of L0H1 adds half its parts."""
    model, writer = models(kind), "L0H1"
    found = explained(model, kind, "L2H4")
    row, column = (names.index(writer) for names in found.parts)
    change = 0.5 * (found.values[row].sum() + found.values[:, column].sum())
    change += 0.25 * found.values[row, column]
    logit = held_logit(model, inputs_of(kind), 2, 4, 9, 7, louder=(0, 1))
    assert abs(change) > 1e-4
    assert logit == pytest.approx(found.logit + change, abs=2e-5 * max(1, abs(found.logit)))


@pytest.mark.parametrize(
    "program", [induction_transformer(), *map(tracr, PROGRAMS)], ids=lambda known: known.name
)
def test_hand_written_models_give_the_parts_that_were_written_and_no_others(program):
    """Over all pairs, the parts with any product are the edges of the circuit that end in the head."""
    layout = proved(program.model)
    for node in sorted({edge.split("->")[1][:-3] for edge in program.edges if "<" in edge}):
        found: dict = {"q": set(), "k": set()}
        for ids in program.task.clean[:4]:
            head = read_head(layout, {"input_ids": ids[None]}, head_of_node(node))
            pairs = [
                (query, key)
                for query in range(len(ids))
                for key in range(len(ids))
                if key <= query or not head.call.mask.causal
            ]
            ((_, cells),) = pair_cells(head, torch.tensor(pairs))
            assert cells.error < 1e-12
            for side, axis in (("q", 2), ("k", 1)):
                sizes = np.abs(cells.values).sum(axis).max(0)
                names = cells.names[0 if side == "q" else 1]
                found[side] |= {
                    _node(name) for name, size in zip(names, sizes, strict=True) if size > 1e-9
                }
        for side, nodes in found.items():
            known = {e.split("->")[0] for e in program.edges if e.endswith(f"{node}<{side}>")}
            assert nodes - {"query bias", "key bias"} == known


def _node(name):
    if name in ("embedding", "position"):
        return "input"
    if name.endswith("MLP"):
        return f"m{name[1:-4]}"
    return f"a{name[1:].replace('H', '.h')}" if "H" in name else name


def test_the_induction_head_by_hand():
    """`BOS 0 1 2 3 4 2 0`: the last 0 meets, at the 1, the 0 that L0H0 wrote there, with its attention."""
    known = induction_transformer(beta=8.0)
    ids = known.task.clean[0]
    found = lens.reading.explain(known.model, ids, "L1H0", -1, 2, progress=False)
    best = found.table().iloc[0]
    assert (best["query_part"], best["key_part"]) == ("embedding", "L0H0")
    written = lens.reading.explain(known.model, ids, "L0H0", 2, 1, progress=False).mass
    assert best["value"] == pytest.approx(8 * written, rel=1e-5)
    assert found.table()["value"].iloc[1:].abs().max() == 0
    assert found.sources[1]["L0H0"] == f"'0' at 1, {written:.2f}"


def test_against_another_key_is_the_log_ratio_and_against_attention_the_gradient(models):
    model = models("llama")
    one, two = explained(model, "llama", key=3), explained(model, "llama", key=7, against=3)
    assert two.contrast.sum() == pytest.approx(math.log(two.mass / one.mass), abs=1e-5)
    assert two.average == pytest.approx(one.logit)
    weighted = explained(model, "llama", against="attention")
    head = read_head(proved(model), inputs_of("llama"), weighted.head)
    parts = _writers.take_apart(
        head, torch.tensor([9]), torch.arange(13), torch.zeros(1, 13).double(), whole=("L0H1",)
    )
    part, step = parts.whole["L0H1"], 1e-6
    logits = head.logits(torch.tensor([9]))
    more = logits + step * head.call.scale * head.query[9] @ part.T
    rows = [head.rows(torch.tensor([9]), one)[0, 7].log() for one in (logits, more)]
    slope = float(rows[1] - rows[0]) / step
    column = weighted.contrast[:, weighted.parts[1].index("L0H1")].sum()
    assert column == pytest.approx(slope, rel=1e-4)


def test_a_part_that_all_keys_share_is_no_contrast(models):
    """The key bias without rotary embedding; with it, its turns differ."""
    for kind, shared in (("gpt2", True), ("llama", False)):
        found = explained(models(kind), kind)
        column = found.parts[1].index("key bias")
        assert np.abs(found.values[:, column]).max() > 1e-3
        assert (np.abs(found.contrast[:, column]).max() < 1e-9) == shared


def test_rotary_embedding_is_told_from_content(models):
    found = explained(models("llama"), "llama")
    again = explained(models("llama"), "llama", query=9, key=9)
    assert np.abs(found.values - found.content).max() > 1e-3
    np.testing.assert_allclose(again.values, again.content, atol=1e-9)
    absolute = explained(models("gpt2"), "gpt2")
    assert np.array_equal(absolute.values, absolute.content)
    q = torch.randn(1, 5, 8, dtype=torch.float64)
    angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.3, 0.01])
    for side in (False, True):
        turn = Rotation(angle.cos(), angle.sin(), side)
        one, other = turn.turned(q, slice(None)), turn.turned(q[:, [0] * 5], slice(None))
        assert torch.allclose(one.norm(dim=-1), q.norm(dim=-1))
        # only the difference of places counts
        ones = turn.turned(q[:, [1] * 5], torch.arange(5))
        gaps = (other[0, 1:] * ones[0, :-1]).sum(-1)
        assert torch.allclose(gaps, gaps[:1].expand(4))
        assert torch.equal(one[..., 6:], q[..., 6:])


def test_a_bias_of_distance_is_a_part_of_its_own(models):
    """ALiBi: a head's slope for every place between query and key, and none of it content."""
    model = models("bloom")
    found = explained(model, "bloom")
    assert [names[-1] for names in found.parts] == ["position bias"] * 2
    slope = float(
        model.model.transformer.build_alibi_tensor(torch.ones(1, LENGTH), 6, torch.float64)[4, 0, 1]
    )
    own = (
        found.table().set_index(["query_part", "key_part"]).loc[("position bias", "position bias")]
    )
    assert own["distance"] == pytest.approx(-2 * slope, rel=1e-6)
    assert np.count_nonzero(found.values[-1]) == np.count_nonzero(found.values[:, -1]) == 1
    content = (found.values - found.content)[:-1, :-1]
    assert np.abs(content).max() < 1e-9


def test_a_learned_sink_is_a_key(models):
    model = models("gpt_oss")
    sink = explained(model, "gpt_oss", key="sink", against="attention")
    logit = float(model.model.model.layers[2].self_attn.sinks[4].detach())
    assert sink.logit == pytest.approx(logit)
    assert sink.key is None
    assert sink.values[-1, -1] == pytest.approx(logit)
    assert np.count_nonzero(sink.values) == 1
    assert sink.contrast.sum() == pytest.approx(sink.logit - sink.average)
    whole = sink.mass + sum(explained(model, "gpt_oss", key=key).mass for key in range(5, 10))
    assert whole == pytest.approx(1, abs=1e-6)  # its window is five keys
    assert "its learned sink" in sink.findings()[0]


def test_a_softcap_is_said(models):
    found = explained(models("gemma2"), "gemma2", query=3, key=1)
    cap = models("gemma2").model.config.attn_logit_softcapping
    assert found.slope == pytest.approx(1 - math.tanh(found.logit / cap) ** 2)
    assert [said.kind for said in found.findings()][-1] == "limit"


def test_many_pairs_are_the_mean_of_single_ones(models, monkeypatch):
    """Whatever is taken together: rows in chunks of 2, tokens in chunks of 5, a pair's products alone."""
    model = models("qwen3")
    given = [[(9, 7), (3, 1), (12, 0)], [(4, 4)]]
    prompts = [inputs_of("qwen3"), {"input_ids": inputs_of("qwen3")["input_ids"].flip(1)}]
    monkeypatch.setattr(explaining, "_ROWS", 2)
    monkeypatch.setattr(_writers, "_AT_ONCE", 5)
    monkeypatch.setattr(explaining, "_PRODUCTS", 1)
    found = lens.reading.explain_pairs(model, prompts, "L2H4", given, progress=False)
    monkeypatch.undo()
    for number, pairs in enumerate(given):
        singles = [
            lens.reading.explain(model, prompts[number], "L2H4", *pair, progress=False)
            for pair in pairs
        ]
        for name in ("values", "contrast", "content"):
            mean = np.mean([getattr(one, name) for one in singles], 0)
            np.testing.assert_allclose(getattr(found, name)[0, number], mean, atol=1e-9)
        size = np.mean([np.abs(one.contrast) for one in singles], 0)
        np.testing.assert_allclose(found.size[0, number], size, atol=1e-9)
        assert found.mass[0, number] == pytest.approx(np.mean([one.mass for one in singles]))
        even = np.mean([1 / (1 + query) for query, _ in pairs])  # a causal row sees so many keys
        assert found.even[0, number] == pytest.approx(even)
        assert found.even[0, number] == pytest.approx(np.mean([one.even for one in singles]))
    assert found.count.tolist() == [[3, 1]]
    assert set(found.table(top=None)["pairs"]) == {4}
    with pytest.raises(LensError, match="top must be a positive integer, got -3"):
        found.table(top=-3)


def test_kinds_of_pairs_and_groups():
    model = lens.load("induction-2l")
    prompt = [64, 5, 6, 7, 5, 6, 5]
    head = read_head(proved(model), {"input_ids": torch.tensor([prompt])}, model.info.head("L1H0"))
    chosen = {
        kind: _pairs.pairs_of(head, kind, 0).tolist()
        for kind in lens.common.choices.words(_pairs.Kind)
    }
    assert chosen["induction"] == [[4, 2], [5, 3], [6, 2], [6, 5]]
    assert chosen["duplicate"] == [[4, 1], [5, 2], [6, 1], [6, 4]]
    assert chosen["previous"] == [[i, i - 1] for i in range(1, 7)]
    rows = head.rows(torch.arange(7))
    assert chosen["strongest"] == [[i, int(rows[i].argmax())] for i in range(1, 7)]
    found = lens.reading.explain_pairs(model, prompt, "L1H0", by="offset", progress=False)
    assert found.groups == ("1", "2", "4")
    assert found.count[:, 0].tolist() == [1, 2, 1]
    classes = [["start", *"abcabc"[:6]]]
    found = lens.reading.explain_pairs(model, prompt, "L1H0", by=classes, progress=False)
    assert found.groups == ("a → b", "b → c", "c → b")
    with pytest.raises(LensError, match="by must be 'offset', 'class', or the class of each token"):
        lens.reading.explain_pairs(model, prompt, "L1H0", by="distance", progress=False)
    assert sorted(("10", "-2", "9", "0"), key=_groups.rank) == ["-2", "0", "9", "10"]
    with pytest.raises(LensError, match="by has no classes for prompt 0, which has 7 tokens"):
        lens.reading.explain_pairs(model, prompt, "L1H0", by=[[]], progress=False)
    with pytest.raises(LensError, match="by must hold the classes of each of 1 prompts, got 2"):
        lens.reading.explain_pairs(model, prompt, "L1H0", by=[*classes, []], progress=False)


def test_what_leads_in_each_group_is_said_with_the_groups_where_it_does_not():
    """Of a head that looks at the first token or at copies: what leads there is another part, surely; not so by offset."""
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, length, length) for length in (8, 8, 12, 12)]
    asked = {"progress": False, "head": "L1H0"}
    offsets = lens.reading.explain_pairs(model, prompts, by="offset", **asked)
    kinds = {one.kind for one in offsets.findings()}
    assert kinds == {"groups"}
    (said,) = [one for one in offsets.findings() if "key side" in one]
    rows = offsets.leading("key")
    often = rows[rows["share_low"].notna()]
    assert set(often["part"]) == {"L0H1"}
    assert f"L0H1 carries most in {len(often)} of {len(often)} groups with logits above" in said
    classes = lens.reading.explain_pairs(model, prompts, pairs="strongest", by="class", **asked)
    assert classes.groups == ("word → first", "word → word")
    leading = classes.leading("key").set_index("group")
    assert leading["part"].tolist() == ["embedding", "L0H1"]
    assert (leading["lead_low"] > 0).all()
    (other,) = [one for one in classes.findings() if one.kind == "other" and "key side" in one]
    assert "another part leads in 1, surely " in other
    alone = lens.reading.explain_pairs(model, prompts, by="class", **asked)
    assert alone.findings()[0] == "L1H0: all pairs are of one group, word → word."
    key = classes.contrast[1].sum(1)  # [prompts, parts]
    own, second = (key[:, classes.parts[1].index(leading.loc["word → word", name])] for name in ("part", "second"))  # fmt: skip
    lead = (own * np.sign(own.mean()) - second * np.sign(second.mean())).mean()
    assert leading.loc["word → word", "lead"] == pytest.approx(lead)
    cells = np.zeros((2, 4, 1, 2))
    cells[0, :, 0, 0], cells[1, :, 0, 0], cells[1, :, 0, 1] = 1, 0.1, [2, -1, -1, 2]
    ones = np.ones((2, 4))
    unsure = replace(
        classes, parts=(("q",), ("a", "b")), values=cells, contrast=cells, size=cells, content=cells,
        above=ones, mass=ones, count=ones.astype(int),
    )  # fmt: skip
    (other,) = [one for one in unsure.findings() if one.kind == "other"]
    assert other.endswith("key side: another part leads in 1, in none of them surely.")
    below = replace(unsure, above=-ones)
    (said,) = [one for one in below.findings() if "key side" in one]
    assert said.endswith("no group has logits above the mean in all of its prompts, two or more.")


def test_induction_heads_are_explained_by_the_previous_token_head():
    """The known circuit of induction-2l: keys carry what L0H1 wrote, queries their own embedding."""
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, 25, seed) for seed in range(8)]
    for head in ("L1H0", "L1H2", "L1H3"):
        found = lens.reading.explain_pairs(model, prompts, head, progress=False)
        best = {side: found.side(side).iloc[0] for side in ("query", "key")}
        assert [best["query"]["part"], best["key"]["part"]] == ["embedding", "L0H1"]
        assert 0.6 < best["key"]["share_low"] < best["key"]["share"] < best["key"]["share_high"]
        assert found.table().iloc[0][["query_part", "key_part"]].tolist() == ["embedding", "L0H1"]
        said = {one.kind: one for one in found.findings()}
        assert "L0H1 carries" in said["key"]
        assert "embedding carries" in said["query"]
    duplicate = lens.reading.explain_pairs(model, prompts, "L1H1", "duplicate", progress=False)
    assert duplicate.side("key").iloc[0]["part"] != "L0H1"


class Largest(TorchDispatchMode):
    """The most numbers in one tensor of its own."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.most = max(self.most, found.untyped_storage().nbytes() // found.element_size())
        return found


def test_no_map_of_all_queries_and_keys_is_built():
    model = lens.load(layout_model("llama", max_position_embeddings=1024))
    ids = torch.randint(3, 60, (1, 1000), generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        found = lens.reading.explain(model, {"input_ids": ids}, "L2H4", 990, 20, progress=False)
    assert seen.most < 200_000  # 1,000 tokens × 6 heads × 4 and × 61 words; a map has a million
    assert found.error < 1e-4


def test_products_of_many_pairs_are_not_held_together(monkeypatch):
    """A word that comes a hundred times has pairs by the thousand, and each as many products as parts by parts."""
    model = lens.load(layout_model("llama"))
    ids = torch.randint(3, 6, (1, 60), generator=torch.Generator().manual_seed(0))
    sizes = []
    own = explaining._cells
    monkeypatch.setattr(
        explaining, "_cells", lambda *args, **more: sizes.append(len(args[3])) or own(*args, **more)
    )
    few = explain_duplicates(model, ids)
    assert sizes == [int(few.count.sum())] != [0]
    sizes.clear()
    monkeypatch.setattr(explaining, "_PRODUCTS", 40 * few.values[0, 0].size)
    again = explain_duplicates(model, ids)
    assert max(sizes) == 40
    np.testing.assert_allclose(again.contrast, few.contrast, atol=1e-9)
    monkeypatch.setattr(explaining, "_KEPT", 10 * few.values[0, 0].size)
    with pytest.raises(LensError, match=r"\d+ groups of 1 prompts have .* take fewer prompts"):
        explain_duplicates(model, ids, by="offset")


def explain_duplicates(model, ids, **options):
    return lens.reading.explain_pairs(
        model, {"input_ids": ids}, "L2H4", "duplicate", progress=False, **options
    )


def test_groups_that_a_prompt_has_not_are_counted(monkeypatch):
    """The means of all groups are held for every prompt: three words of each of 6 prompts are 18 groups of 6."""
    monkeypatch.setattr(explaining, "_KEPT", 17 * 6 * 9)
    gathered = explaining._Gathered()
    one, flat = np.ones((3, 3, 3)), np.ones(3)
    cells = explaining.Cells((tuple("abc"),) * 2, one, one, one, flat, flat, flat, flat, flat, 0.0)
    for prompt in range(5):
        gathered.add(prompt, [f"{prompt}{word}" for word in "xyz"], cells)
    with pytest.raises(LensError, match="18 groups of 6 prompts have 972 products"):
        gathered.add(5, ["5x", "5y", "5z"], cells)


def test_groups_are_not_held_twice():
    """The sums of cells are let go of while their means are made."""
    tracemalloc.start()
    gathered = explaining._Gathered()
    one = np.ones((1, 60, 60))
    flat = np.ones(1)
    names = (tuple("abc" * 20),) * 2
    for prompt in range(8):
        for offset in range(12):
            cells = explaining.Cells(names, one, one, one, flat, flat, flat, flat, flat, 0.0)
            gathered.add(prompt, [str(offset)], cells)
    tracemalloc.reset_peak()
    found = gathered.result(prompts=8, pairs="x", head=lens.common.head_ids.HeadId(0, 0), against="keys", seed=0, model="m")  # fmt: skip
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.values.shape == (12, 8, 60, 60)
    assert found.contrast.min() == found.values.max() == 1
    assert peak < 5.5 * found.values.nbytes  # four sums, and the mean of one


def test_what_cannot_be_explained_is_refused(models):
    model = models("llama")
    ids = inputs_of("llama")

    def refused(match, *args, model=model, **options):
        with pytest.raises(LensError, match=match):
            lens.reading.explain(model, *args, progress=False, **options)

    refused("query must be a place from 0 to 12, or -1 for the last; got 13", ids, "L2H4", 13, 1)
    refused("key must be an integer or one of 'sink'", ids, "L2H4", 3, "last")
    refused("query 3 does not see key 5 in L2H4", ids, "L2H4", 3, 5)
    refused("there is no L9H0", ids, "L9H0", 3, 1)
    refused("LlamaForCausalLM has no learned sinks", ids, "L2H4", 3, "sink")
    refused("explain takes one prompt, got 2", [[3, 4], [5, 6]], "L2H4", 1, 0)
    refused("against must be one of 'keys', 'attention'", ids, "L2H4", 3, 1, against="rows")
    refused("against must be a key that the query sees, got 7", ids, "L2H4", 3, 1, against=7)
    with pytest.raises(LensError, match="pairs must be one of 'induction'"):
        lens.reading.explain_pairs(model, ids, "L2H4", "copies", progress=False)
    with pytest.raises(LensError, match=r"1 lists of \(query, key\), got 2"):
        lens.reading.explain_pairs(model, ids, "L2H4", [[], []], progress=False)
    with pytest.raises(LensError, match="query 1 does not see key 4"):
        lens.reading.explain_pairs(model, ids, "L2H4", [[(1, 4)]], progress=False)
    with pytest.raises(LensError, match="no prompt has any of 'duplicate' pairs"):
        lens.reading.explain_pairs(model, [[3, 4, 5]], "L2H4", "duplicate", progress=False)
    with pytest.raises(LensError, match="by has 2 classes for prompt 0, which has 13 tokens"):
        lens.reading.explain_pairs(model, ids, "L2H4", "previous", by=[["a", "b"]], progress=False)
    with pytest.raises(LensError, match="a way that is not known here"):
        find_rotation(None, [(torch.eye(3)[:, None], torch.eye(3).flip(0)[:, None])] * 2, 1e-3, 0)


def test_parts_that_do_not_sum_are_refused(models, monkeypatch):
    """A writer that is left out is seen before any number is given."""
    monkeypatch.setattr(_writers.Taking, "mlp", lambda self, layer, output: output)
    with pytest.raises(LensError, match="the parts of L2H4 do not sum to its queries and keys"):
        explained(models("llama"), "llama")


def test_the_figure_holds_the_contrast(models):
    found = explained(models("gpt2"), "gpt2")
    figure = found.plot(top=4)
    assert np.asarray(figure.data[0].z).shape == (5, 5)
    assert np.sum(figure.data[0].z) == pytest.approx(found.contrast.sum())
    assert list(figure.data[0].y)[-1] == f"{len(found.parts[0]) - 4} others"
    assert len(found.plot(top=99).data[0].y) == len(found.parts[0])
