"""Modules of anybody: what capture sees is what the module computes, and edits reach it."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import lens
from lens import edits
from lens.common.errors import LensError
from lens.passes import wrap
from lens.passes.check import tensors_of

HEADS, WIDTH, VOCAB = 3, 24, 53


class Attention(nn.Module):
    """One layer, written in one of several ways; it keeps its probabilities."""

    def __init__(self, way):
        super().__init__()
        self.joint, self.out, self.way = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), way
        self.kept = None

    def forward(self, x):
        batch, tokens, _ = x.shape
        parts = self.joint(x).split(WIDTH, -1)
        q, k, v = (part.view(batch, tokens, HEADS, -1).transpose(1, 2) for part in parts)
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        self.kept = [part.detach().clone() for part in (q, k)]
        if self.way == "mask of none":
            y = functional.scaled_dot_product_attention(q, k, v)
        elif self.way == "torch":
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.way == "mask":
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        elif self.way == "mask of all heads":
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[None])
        elif self.way in ("folded", "folded, mask of all heads"):  # heads in the batch
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
            given = {"is_causal": True} if self.way == "folded" else {"attn_mask": seen[None]}
            y = functional.scaled_dot_product_attention(q, k, v, **given)
            y = y.unflatten(0, (batch, HEADS))
        elif self.way == "written":
            scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
            y = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        else:  # in a way that nobody can follow
            q, k, v = (part.detach().numpy() for part in (q, k, v))
            scores = np.where(seen, q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            y = torch.tensor((weights / weights.sum(-1, keepdims=True)) @ v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Model(nn.Module):
    """A small language model of somebody."""

    def __init__(self, way):
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([nn.ModuleDict({"mix": Attention(way)}) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, idx, targets=None):
        x = self.table(idx)
        for block in self.blocks:
            x = x + block["mix"](x)
        return self.head(x), None


def made(way):
    torch.manual_seed(0)
    model = Model(way).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def probabilities(layer):
    q, k = layer.kept
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5]
EXAMPLE = torch.tensor([[7, 8, 9, 10]])


@torch.no_grad()
@pytest.mark.parametrize(
    "way",
    ["torch", "mask", "mask of all heads", "folded", "folded, mask of all heads", "written"],
)
def test_attention_that_can_be_followed_is_captured(way):
    model = made(way)
    loaded = wrap(model, EXAMPLE, attention="blocks.*.mix", heads=HEADS)
    assert (loaded.info.heads, loaded.info.layers, loaded.info.vocab) == (HEADS, 2, VOCAB)
    own = model(torch.tensor([IDS]))[0]
    trace = lens.capture(loaded, IDS, block_size=1, keep_qk=True, progress=False)
    for layer, block in enumerate(model.blocks):
        expected = probabilities(block["mix"])
        found = torch.tensor(trace.block_mass.sel(layer=layer).values)
        assert (found - expected[0]).abs().max() < 1e-5
    assert trace.attrs["causal"]
    assert (loaded.logits(IDS) - own[0]).abs().max() == 0
    rows = trace.tile(1, 2, (0, 9), (0, 9)).sum(-1)
    assert rows == pytest.approx(np.ones(9), abs=2e-6)  # an LSE of 19 in single precision


@torch.no_grad()
@pytest.mark.parametrize("way", ["written", "numpy"])
def test_attention_between_named_modules_is_captured_and_edited(way):
    model = made(way)
    loaded = wrap(
        model, EXAMPLE, attention=Attention, query="joint", output="out", heads=HEADS, causal=True
    )
    trace = lens.capture(loaded, IDS, block_size=1, progress=False)
    expected = probabilities(model.blocks[1]["mix"])[0]
    assert abs(trace.block_mass.sel(layer=1).values - expected.numpy()).max() < 1e-5
    with lens.edit(loaded, edits.Mask("first", heads=["L1H1"])):
        found = loaded.logits(IDS)
    other = wrap(made("written"), EXAMPLE, attention="blocks.*.mix")
    with lens.edit(other, edits.Mask("first", heads=["L1H1"])):
        assert (found - other.logits(IDS)).abs().max() < 1e-5
    assert (found - loaded.logits(IDS)).abs().max() > 1e-3


def test_functions_say_where_queries_keys_and_values_come_from():
    def part(number):
        def of(module, x):
            return (
                module.joint(x).split(WIDTH, -1)[number].unflatten(-1, (HEADS, -1)).transpose(1, 2)
            )

        return of

    named = {"query": part(0), "key": part(1), "value": part(2), "output": "out", "heads": HEADS}
    loaded = wrap(made("numpy"), EXAMPLE, attention="blocks.*.mix", causal=True, **named)
    assert loaded.check < 1e-6
    with pytest.raises(lens.LensError, match="does not reproduce"):  # looks ahead
        wrap(made("numpy"), EXAMPLE, attention="blocks.*.mix", **named)


class Gated(nn.Module):
    """Heads whose outputs are multiplied before they are read: a number a head, or one a channel."""

    def __init__(self, width):
        super().__init__()
        self.joint, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2).detach().numpy()
            for part in self.joint(x).split(WIDTH, -1)
        )
        scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
        heads = torch.tensor(scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 2)
        return self.out((heads * self.gate(x).unflatten(-1, (HEADS, -1))).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("width", [HEADS, WIDTH])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_gate_between_heads_and_output_stays_and_a_head_behind_it_is_taken_out(width, by_name):
    torch.manual_seed(0)
    module, x = Gated(width).eval(), torch.randn(1, 7, WIDTH)

    def gate(attention, x):
        return attention.gate(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    named = {"attention": Gated, "query": "joint", "output": "out", "heads": HEADS}
    loaded = wrap(module, x, gate="gate" if by_name else gate, **named)
    assert loaded.check < 1e-6
    with pytest.raises(lens.LensError, match="does not reproduce"):
        wrap(module, x, **named)
    without = copy.deepcopy(module)
    without.out.weight[:, WIDTH // HEADS : 2 * WIDTH // HEADS] = 0  # what reads head 1
    with lens.edit(loaded, edits.Ablate(["L0H1"], "zero")):
        assert (loaded.model(x) - without(x)).abs().max() < 1e-6
    assert (without(x) - module(x)).abs().max() > 1e-3


@torch.no_grad()
def test_attention_of_torch_itself_is_captured():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 40, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    given = {"tgt": torch.randn(1, 5, 32), "memory": torch.randn(1, 7, 32)}
    loaded = wrap(model, given)
    assert loaded.info.layers == 4  # two layers with two modules each
    own = model(**given)
    with lens.traces.capturing(loaded, block_size=1) as recorder:
        assert (loaded.model(**given) - own).abs().max() < 1e-6
    assert [(one.queries, one.keys) for one in recorder.records] == [(5, 5), (5, 7)] * 2
    _, expected = model.layers[0].self_attn(*[given["tgt"]] * 3, average_attn_weights=False)
    assert (recorder.records[0].variables["block_mass"] - expected).abs().max() < 1e-6
    assert torch.backends.mha.get_fastpath_enabled()


class Reading(nn.Module):
    """Words and the patches of a picture, each with attention of its own, and words that read the picture."""

    def __init__(self, way="written"):
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.words = nn.ModuleList([Attention(way) for _ in range(2)])
        self.picture = nn.ModuleList([Attention("mask")])
        self.across = nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)])

    def forward(self, words, patches):
        x = self.table(words)
        for attention in self.words:
            x = x + attention(x)
        for attention in self.picture:
            patches = patches + attention(patches)
        return {"picture": patches, "words": x + self.across[0](x, patches, patches)[0]}


def _reading(way="written"):
    torch.manual_seed(0)
    module = Reading(way).eval()
    return module, {
        "words": torch.tensor([[3, 1, 4, 1, 5, 9, 2]]),
        "patches": torch.randn(1, 5, WIDTH),
    }


@torch.no_grad()
def test_rows_of_positions_of_their_own_are_parts():
    module, given = _reading()
    loaded = wrap(module, given)
    assert {name: (one.layers, one.heads) for name, one in loaded.parts.items()} == {
        "words": (2, HEADS),
        "picture": (1, HEADS),
        "across": (1, HEADS),
    }
    traces = lens.capture(loaded, given, block_size=1, progress=False)
    module(**given)
    for part, layers in (("words", module.words), ("picture", module.picture)):
        for layer, attention in enumerate(layers):
            found = torch.tensor(traces[part].block_mass.sel(layer=layer).values)
            assert (found - probabilities(attention)[0]).abs().max() < 1e-6
    x = module.table(given["words"])
    for attention in module.words:
        x = x + attention(x)
    patches = given["patches"] + module.picture[0](given["patches"])
    own = module.across[0](x, patches, patches, average_attn_weights=False)[1][0]
    assert (torch.tensor(traces.across.block_mass.values[0]) - own).abs().max() < 1e-6
    assert (len(traces.across.query_tokens), traces.across.length) == (7, 5)
    without = copy.deepcopy(module)
    without.words[1].out.weight[:, : WIDTH // HEADS] = 0
    with lens.edit(loaded.part("words"), edits.Ablate(["L1H0"], "zero")):
        assert (loaded.model(**given)["words"] - without(**given)["words"]).abs().max() < 1e-6
    with (
        pytest.raises(lens.LensError, match="heads are those of its words, picture, across"),
        lens.edit(loaded, edits.Mask("first")),
    ):
        pass


@torch.no_grad()
def test_parts_may_be_named_and_every_end_of_a_module_is_held():
    module, given = _reading()
    loaded = wrap(module, given, attention={"text": "words.*", "image": "picture.*"})
    assert list(loaded.parts) == ["text", "image"]
    for named, said in (
        ({"cross": "across.*"}, "transformers' encoder-decoders"),
        ({"a": "words.*", "b": "words.0"}, "in two parts"),
        ({"a": "words.*", "b": "table"}, "no attention of b runs"),
    ):
        with pytest.raises(lens.LensError, match=said):
            wrap(module, given, attention=named)
    module, given = _reading("numpy")  # the second end looks back only; the first is not touched
    named = {"attention": "words.*", "query": "joint", "output": "out", "heads": HEADS}
    assert wrap(module, given, causal=True, **named).check < 1e-6
    with pytest.raises(lens.LensError, match="does not reproduce"):
        wrap(module, given, **named)


class Frames(nn.Module):
    """Every frame of a video by itself."""

    def __init__(self):
        super().__init__()
        self.attention = Attention("mask of none")

    def forward(self, x):
        return self.attention(x.flatten(0, 1)).view(x.shape)


@torch.no_grad()
def test_rows_for_one_input_stand_side_by_side():
    torch.manual_seed(0)
    module, x = Frames().eval(), torch.randn(1, 2, 5, WIDTH)
    loaded = wrap(module, x, attention=Attention)
    trace = lens.capture(loaded, {"x": x}, block_size=1, progress=False)
    module(x)
    q, k = module.attention.kept
    own = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    found = trace.block_mass.values[0]
    assert trace.tokens[4:7] == ["0,4", "1,0", "1,1"]
    for row in range(2):
        inside = slice(5 * row, 5 * row + 5)
        assert np.abs(found[:, inside, inside] - own[row].numpy()).max() < 1e-6
    assert found.sum() == pytest.approx(10 * HEADS, abs=1e-4)


def test_what_builds_on_capture_takes_it():
    loaded = wrap(made("torch"), EXAMPLE)
    effect = lens.effect(loaded, [IDS, IDS[::-1]], edits.Ablate(["L0H1"], "mean"), progress=False)
    assert len(effect.findings()) > 0
    task = lens.tasks.induction(loaded, n=4)
    table = lens.heads.importance(loaded, task, method="ablation", progress=False).table()
    assert len(table) == 2 * HEADS
    assert sorted(table["name"]) == ["L0H0", "L0H1", "L0H2", "L1H0", "L1H1", "L1H2"]
    with pytest.raises(lens.LensError, match="keeps its parts is not known"):
        lens.heads.weights.composition(loaded)
    with pytest.raises(lens.LensError, match="no transformers model"):
        loaded.generate(IDS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module": "GPT"}, "takes an nn.Module, got str"),
        ({"module": made("torch").train()}, "training mode"),
        ({"inputs": "text"}, "inputs must be a tensor"),
        ({"attention": "layers.*"}, "no module of Model is meant by attention='layers"),
        ({"module": made("numpy")}, "cannot reach the attention of Attention.*query="),
        ({"key": "joint"}, "go with query"),
        ({"query": "joint"}, "query needs output"),
        ({"query": "joint", "output": "out", "heads": HEADS, "value": "out"}, "key and value, or"),
        ({"query": "nothing", "output": "out", "heads": HEADS}, "no module 'nothing'; it has joint"),
        ({"heads": 0}, "heads must be a positive integer"),
        ({"heads": HEADS + 1}, "heads=4 and the attention of Model has 3; leave it out"),
        ({"attention": 5}, "attention must be a list, got 5"),
        ({"kv_heads": 2}, "go with query"),
        ({"scale": 0.5}, "go with query"),
        ({"gate": "out"}, "go with query"),
        ({"causal": True}, "go with query"),
    ],
)  # fmt: skip
def test_what_cannot_be_wrapped_is_refused(change, said):
    given = {"module": made("torch"), "inputs": EXAMPLE, **change}
    with pytest.raises(lens.LensError, match=said):
        wrap(given.pop("module"), given.pop("inputs"), **given)


def test_matrices_that_somebody_has_give_the_same_tables():
    model = made("written")
    loaded = wrap(model, EXAMPLE, attention="blocks.*.mix")
    own = lens.capture(loaded, IDS, block_size=4, progress=False)
    attentions = [probabilities(block["mix"]) for block in model.blocks]
    given = lens.capture(loaded, IDS, attentions=attentions, block_size=4)
    assert set(own.dataset) - set(given.dataset) == {"lse", "max_logit"}
    for name in given.dataset:
        pair = own.dataset[name], given.dataset[name]
        assert np.allclose(*pair, atol=1e-5, equal_nan=True), name
    tables = [lens.profile(one) for one in (own, given)]
    assert list(tables[0]) == list(tables[1])
    assert tables[0]["entropy"].to_numpy() == pytest.approx(tables[1]["entropy"].to_numpy())
    assert "lse" in given.tile_refusal(0, 0)


def test_matrices_without_a_model(tmp_path):
    attentions = [torch.eye(3).expand(1, 2, 3, 3)] * 4
    trace = lens.capture(None, ["a", "b", "c"], attentions=attentions, out=tmp_path / "t")
    assert lens.traces.AttentionTrace.load(tmp_path / "t").tokens == ["a", "b", "c"] == trace.tokens
    assert lens.capture(None, [5, 6, 5], attentions=attentions).tokens == ["5", "6", "5"]
    own = np.array([5, 6, 5])
    assert lens.capture(None, [*own], attentions=attentions).tokens == ["5", "6", "5"]
    assert lens.capture(None, None, attentions=attentions).length == 3
    for prompts, options, said in [
        ("abc", {}, "one prompt's tokens"),
        (["a", "b"], {}, "tokens must have 3 entries"),
        (["a", 1, 2], {}, "all of one kind"),
        (["a", "b", "c"], {"keep_qk": True}, "hold no q and k"),
    ]:
        with pytest.raises(lens.LensError, match=said):
            lens.capture(None, prompts, attentions=attentions, **options)
    with pytest.raises(lens.LensError, match="only beside attentions"):
        lens.capture(None, "text")


@torch.no_grad()
def test_outputs_named_after_attention_are_held_against_the_own_ones():
    """Only what transformers calls `attentions` is left out: probabilities, which a capture does not make."""

    class Named(Model):
        def forward(self, idx):
            logits = super().forward(idx)[0]
            return {"attention_out": logits} if self.says else SimpleNamespace(out=logits)

    numbers = torch.ones(2)
    assert len(tensors_of({"self_attention": numbers, "attentions": (numbers,)})) == 1
    model = Named("torch").eval()
    model.says = True
    assert wrap(model, EXAMPLE, attention="blocks.*.mix", heads=HEADS).check < 1e-5
    model.says = False
    with pytest.raises(LensError, match="gives no numbers to hold a capture against"):
        wrap(model, EXAMPLE, attention="blocks.*.mix", heads=HEADS)
