"""`lens.capture`: known heads of the embedded models, the golden run, inputs, memory and refusals."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import lens
from lens.common.errors import LensError
from lens.passes import interface, masks
from lens.passes.interface import lens_attention
from lens.traces.arrays import LayerArrays
from tests.lens import naive
from tests.lens.architectures import build

DATA = Path(__file__).parent / "data"


def _second_copy(trace, rule: str) -> np.ndarray:
    """[layer, head]: mean mass of a label rule over the queries of the second copy."""
    length = (trace.length - 1) // 2
    mass = trace.match_mass.sel(match=rule).isel(query=slice(length + 1, None))
    return mass.mean("query").values


def _mean_over_copied(name: str, length: int, rule: str, prompts: int = 8) -> np.ndarray:
    model = lens.load(name)
    ids = [lens.tasks.copied(model, length, seed) for seed in range(prompts)]
    traces = lens.capture(model, ids, statistics=["match_mass"])
    return np.mean([_second_copy(trace, rule) for trace in traces], axis=0)


# --- known truth (the READMEs of the embedded models) ---------------------------------------------


def test_known_heads_of_induction_2l():
    previous = _mean_over_copied("induction-2l", 25, "previous_token")
    assert previous[0, 1] == pytest.approx(0.97, abs=0.03)
    induction = _mean_over_copied("induction-2l", 25, "induction")
    assert induction[1, [0, 2, 3]] == pytest.approx([0.95, 0.89, 0.89], abs=0.06)
    assert induction[1, 1] < 0.1
    assert induction[0].max() < 0.1
    same = _mean_over_copied("induction-2l", 25, "same_token")
    own = _mean_over_copied("induction-2l", 25, "current_token_position")
    assert (same - own)[1, 1] == pytest.approx(0.84, abs=0.05)
    assert (same - own).max() == (same - own)[1, 1]


def test_heads_of_induction_2l_park_on_bos_when_nothing_matches():
    model = lens.load("induction-2l")
    ids = [lens.tasks.copied(model, 25, seed) for seed in range(8)]
    traces = lens.capture(model, ids, statistics=["first_mass"])
    mass = np.mean([trace.first_mass.sel(layer=1).values for trace in traces], axis=0)
    first, second = mass[:, 1:26].mean(-1), mass[:, 26:].mean(-1)
    assert (first > [0.7, 0.35, 0.85, 0.85]).all()
    assert (second < 0.1).all()


def test_known_heads_of_text_lm_3l():
    previous = _mean_over_copied("text-lm-3l", 50, "previous_token")
    assert previous[0, 0] == pytest.approx(0.99, abs=0.02)
    assert previous[0, 5] == pytest.approx(0.69, abs=0.08)
    induction = _mean_over_copied("text-lm-3l", 50, "induction")
    assert induction[1, [2, 3, 5]] == pytest.approx([0.93, 0.94, 0.89], abs=0.06)
    others = induction.copy()
    others[1, [2, 3, 5]] = 0
    assert others.max() < 0.15


def test_sinks_of_text_lm_3l_depend_on_the_input():
    model = lens.load("text-lm-3l")
    text = lens.tasks.text("moby-dick")
    parts = [text[start : start + 400] for start in range(0, 8000, 1000)]
    ids = [lens.tasks.take(model, part, 128) for part in parts]
    traces = lens.capture(model, ids, statistics=["first_mass"])
    mass = np.mean(
        [t.first_mass.isel(query=slice(20, None)).mean("query").values for t in traces], axis=0
    )
    assert mass[1, [0, 5, 3, 1, 2]] == pytest.approx([0.86, 0.74, 0.44, 0.31, 0.25], abs=0.1)
    assert mass[[0, 2]].max() < 0.12
    copied = [lens.tasks.copied(model, 50, seed) for seed in range(4)]
    random = [
        t.first_mass.isel(query=slice(20, None)).mean("query").values
        for t in lens.capture(model, copied, statistics=["first_mass"])
    ]
    assert np.mean(random, axis=0)[1].max() < 0.2


def test_stories260k_has_no_induction_head_and_no_sink():
    assert _mean_over_copied("stories260k", 50, "induction").max() < 0.03
    model = lens.load("stories260k")
    trace = lens.capture(model, lens.tasks.text("lily"), statistics=["received"])
    alpha = (trace.received / trace.visible).isel(key=0)
    assert float(alpha.max()) < 0.3
    assert _mean_over_copied("stories260k", 50, "previous_token")[3, 6] > 0.6


def test_golden_run_of_stories260k():
    model = lens.load("stories260k")
    golden = load_file(DATA / "golden.safetensors")
    prompt = json.loads((DATA / "golden.json").read_text())["prompt"]
    assert model.encode(prompt) == golden["input_ids"].tolist()
    trace = lens.capture(model, prompt, block_size=16)
    assert naive.rms_ratio(trace.lse.values, golden["lse"]) < 1e-5
    for layer, weights in enumerate(golden["attention"]):
        expected = naive.statistics(weights, golden["input_ids"], 16, causal=True)
        for variable, values in expected.items():
            found = trace.dataset[variable].sel(layer=layer).values
            assert naive.rms_ratio(found, values) < 1e-5, (layer, variable)
    with torch.no_grad():
        logits = model.model(torch.from_numpy(golden["input_ids"])[None]).logits[0]
    assert naive.rms_ratio(logits, golden["logits"]) < 1e-5


# --- what a trace says ----------------------------------------------------------------------------


def test_provenance_and_coordinates():
    model = lens.load("text-lm-3l")
    trace = lens.capture(model, "Call me Ishmael.", block_size=5, seed=11)
    attrs = trace.attrs
    assert attrs["model"] == "text-lm-3l"
    assert attrs["model_class"] == "LlamaForCausalLM"
    assert (attrs["dtype"], attrs["device"], attrs["bos"]) == ("float32", "cpu", "added")
    assert (attrs["block_size"], attrs["seed"], attrs["prefix"]) == (5, 11, 4)
    assert attrs["windows"] == [None] * 3
    assert attrs["scale"] == [0.25] * 3
    assert attrs["check"] == model.check
    assert attrs["versions"]["attention-lens"] == lens.__version__
    assert attrs["versions"]["torch"] == torch.__version__
    assert attrs["tokens"] == trace.length == len(trace.tokens)
    assert "".join(trace.tokens[1:]) == "Call me Ishmael."
    assert json.loads(json.dumps(attrs)) == attrs
    again = lens.capture(model, "Call me Ishmael", statistics=["lse"])
    assert again.attrs["text_sha256"] != attrs["text_sha256"]
    assert [*again.dataset.data_vars] == ["lse", "visible"]


def test_models_with_windows_and_softcap_say_so(tmp_path):
    model = lens.load(build("gemma2"))
    ids = list(range(3, 40))
    trace = lens.capture(model, ids, out=tmp_path / "trace")
    assert trace.attrs["windows"] == [11, None, 11]
    assert trace.attrs["softcap"] == 0.7
    assert trace.attrs["kv_heads"] == 2
    assert trace.attrs["bos"] == "absent"
    visible = trace.visible.values
    assert visible[0].tolist() == [11] * 27 + list(range(10, 0, -1))
    assert visible[1].tolist() == list(range(37, 0, -1))
    reopened = lens.traces.AttentionTrace.load(tmp_path / "trace")
    assert (reopened.lse.values == trace.lse.values).all()
    sinks = lens.capture(lens.load(build("gpt_oss")), ids, statistics=["lse"])
    assert sinks.attrs["learned_sinks"] is True
    chunked = lens.capture(lens.load(build("llama4")), ids, statistics=["received"])
    assert chunked.visible.isel(layer=0).values.tolist()[:12] == [*range(11, 0, -1), 11]


def test_an_image_is_captured_with_its_patches():
    model = lens.load(build("vit"))
    pixels = torch.randn(2, 1, 10, 10, generator=torch.Generator().manual_seed(3))
    traces = lens.capture(model, {"pixel_values": pixels})
    assert [trace.length for trace in traces] == [26, 26]
    assert traces[0].tokens[:3] == ["[CLS]", "0,0", "0,1"]
    assert traces[0].tokens[-1] == "4,4"
    assert not traces[0].attrs["causal"]
    assert traces[0].offset.values.tolist() == list(range(-25, 26))
    assert np.isnan(traces[0].match_mass.sel(match="induction")).all()
    assert not np.array_equal(traces[0].lse.values, traces[1].lse.values)


def test_q_and_k_are_kept_on_request_and_give_the_lse():
    model = lens.load("stories260k")
    trace = lens.capture(model, "Once upon a time there was", keep_qk=True, statistics=["lse"])
    q, k = trace.q.values.astype(np.float64), trace.k.values.astype(np.float64)
    assert q.shape == (5, 8, trace.length, 8)
    assert k.shape == (5, 4, trace.length, 8)
    scores = q @ np.repeat(k, 2, axis=1).swapaxes(-1, -2) * 8**-0.5
    scores = np.where(np.tri(trace.length, dtype=bool), scores, -np.inf)
    assert naive.rms_ratio(trace.lse.values, np.log(np.exp(scores).sum(-1))) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_agree(backend):
    model = lens.load("stories260k")
    text = "Lily had a red ball and a small dog."
    default, other = lens.capture(model, text), lens.capture(model, text, backend=backend)
    assert other.attrs["backend"] == backend
    for variable in default.dataset.data_vars:
        ratio = naive.rms_ratio(other.dataset[variable].values, default.dataset[variable].values)
        assert ratio < 1e-5, variable


# --- what can be passed ---------------------------------------------------------------------------


def test_every_form_of_a_prompt_gives_the_same_trace():
    model = lens.load("text-lm-3l")
    text = "Call me Ishmael."
    ids = model.encode(text)
    expected = lens.capture(model, text).lse.values
    batch = model.tokenizer(text, return_tensors="pt")
    for prompt in (ids, torch.tensor(ids), model.tokenizer(text), batch, dict(batch)):
        trace = lens.capture(model, prompt)
        assert isinstance(trace, lens.traces.AttentionTrace)
        assert np.array_equal(trace.lse.values, expected)
    for prompts in ([text, ids], [torch.tensor(ids)] * 2, torch.tensor([ids, ids])):
        traces = lens.capture(model, prompts)
        assert [np.array_equal(trace.lse.values, expected) for trace in traces] == [True, True]
    for prompts in (
        [text],
        [batch["input_ids"][0]],
        torch.tensor([ids]),
    ):  # a list of one is a list
        traces = lens.capture(model, prompts)
        assert isinstance(traces, list)
        assert [np.array_equal(trace.lse.values, expected) for trace in traces] == [True]


def test_padding_is_left_out():
    model = lens.load("text-lm-3l")
    texts = ["Call me Ishmael.", "Some years ago"]
    batch = model.tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].min() == 0
    for trace, text in zip(lens.capture(model, batch), texts, strict=True):
        alone = lens.capture(
            model, text
        ).lse.values  # some processors multiply two rows in another order
        np.testing.assert_allclose(trace.lse.values, alone, rtol=2e-6)


def test_several_prompts_go_into_numbered_folders(tmp_path):
    lens.capture(lens.load(), ["one", "another"], out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p000", "p001"]
    assert "".join(lens.traces.AttentionTrace.load(tmp_path / "p001").tokens[1:]) == "another"


def test_a_single_token_has_no_rest():
    trace = lens.capture(lens.load("induction-2l"), [64])
    assert trace.first_mass.values == pytest.approx(1)
    assert trace.rest_mass.values == pytest.approx(0)
    assert np.isnan(trace.entropy_sink_excluded.values).all()


# --- memory ---------------------------------------------------------------------------------------


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest memory, in numbers, of a tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numel = max(self.numel, numbers)
        return found


def test_nothing_of_the_size_of_the_square_is_ever_built():
    length = 1536
    config = transformers.LlamaConfig(
        vocab_size=3000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
    )
    model = lens.load(transformers.LlamaForCausalLM(config).eval())
    ids = [index % 3000 for index in range(length)]
    with _LargestTensor() as capture:
        lens.capture(model, ids)
    with _LargestTensor() as eager, interface.switched(model.model, "eager"), torch.no_grad():
        model.model.base_model(torch.tensor([ids]))
    assert eager.numel >= 4 * length**2
    assert capture.numel < length**2 / 4


def test_a_layer_is_on_disk_before_the_next_one_runs(tmp_path):
    model = lens.load("text-lm-3l")
    there = []
    layers = model.model.model.layers
    handles = [
        layer.register_forward_pre_hook(
            lambda *_: there.append(sorted(path.name for path in tmp_path.iterdir()))
        )
        for layer in layers
    ]
    try:
        lens.capture(model, "Call me Ishmael.", out=tmp_path)
    finally:
        for handle in handles:
            handle.remove()
    first, second = "layer-00.safetensors", "layer-01.safetensors"
    assert there == [[], [first], [first, second]]


# --- progress -------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    model = lens.load()
    for stream, progress, shown in (
        (_Terminal(), True, True),
        (_Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        lens.capture(model, "Call me Ishmael.", progress=progress)
        assert ("text-lm-3l: layers" in stream.getvalue()) is shown


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  ", "the text is empty"),
        ([], "no prompts were given"),
        (torch.zeros(0, dtype=torch.long), "the prompt has no tokens"),
        (
            "word " * 500,
            "the prompt has 1,002 tokens and text-lm-3l takes 128; shorten it: lens",
        ),
        ([0, 512], "token ids of text-lm-3l go from 0 to 511, got 0 to 512"),
        ([-1, 3], "token ids of text-lm-3l go from 0 to 511, got -1 to 3"),
        (3.5, "a prompt must be a text, token ids, a picture, a list of these .*, got float"),
        (torch.zeros(3), r"got a torch\.float32 tensor \[3\]"),
        (
            [["a"]],
            r"a prompt must be a text or token ids \(a list of integers\), a picture, .*, or a mapping, got",
        ),
        ({"labels": torch.zeros(1)}, "inputs must hold input_ids or pixel_values, got labels"),
        (
            {"input_ids": torch.ones(1, 3).long(), "labels": torch.zeros(1)},
            r"takes no labels \(of inputs it takes input_ids, attention_mask, position_ids",
        ),
    ],
)
def test_prompts_that_cannot_be_captured(prompt, expected, tmp_path):
    with pytest.raises(LensError, match=expected) as caught:
        lens.capture(lens.load(), prompt, out=tmp_path / "trace")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"block_size": 0}, "block_size must be a positive integer, got 0"),
        ({"block_size": True}, "block_size must be a positive integer, got True"),
        ({"block_size": "64"}, "block_size must be a positive integer, got '64'"),
        ({"statistics": ["lse", "entropie"]}, "unknown statistics entropie; known: lse, max_logit"),
        (
            {"statistics": "lse"},
            "statistics must be 'all' or a list of names, got the string 'lse'",
        ),
        ({"statistics": 5}, "statistics must be 'all' or a list of names, got 5"),
        ({"statistics": None}, "statistics must be 'all' or a list of names, got None"),
        ({"statistics": []}, "statistics names none; ask for at least one"),
        ({"backend": "abacus"}, "abacus"),
    ],
)
def test_options_that_do_not_exist(options, expected):
    with pytest.raises(LensError, match=expected):
        lens.capture(lens.load(), "Call me Ishmael.", **options)
    if "backend" not in options and options != {"statistics": []}:  # that records nothing
        with (
            pytest.raises(LensError, match=expected),
            lens.traces.capturing(lens.load(), **options),
        ):
            pytest.fail("the block must not be entered")


def test_statistics_may_come_one_by_one():
    names = ["lse", "entropy"]
    found = lens.capture(lens.load(), "Call me Ishmael.", statistics=iter(names))
    assert set(found.dataset.data_vars) == {*names, "visible"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"out": 5}, "out must be the path of a file or folder, got 5"),
        ({"out": ""}, "out must be the path of a file or folder, got ''"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
    ],
)
def test_what_is_no_folder_or_seed_is_refused(options, expected):
    with pytest.raises(LensError, match=expected):
        lens.capture(lens.load(), "Call me Ishmael.", **options)


def test_queries_and_keys_alone_make_a_trace():
    trace = lens.capture(lens.load(), [1, 2, 3], statistics=[], keep_qk=True, progress=False)
    assert set(trace.dataset.data_vars) == {"q", "k", "visible"}


def test_blocks_too_small_for_memory_are_refused_with_a_size_that_fits(monkeypatch):
    monkeypatch.setattr("lens.traces.captures.LARGEST_MAPS", 6 * 8 * 10 * 10)
    model = lens.load()
    ids = lens.tasks.copied(model, 50)
    with pytest.raises(LensError, match="for 101 tokens; use at least 11"):
        lens.capture(model, ids, block_size=4)
    assert lens.capture(model, ids, block_size=11).attrs["block_size"] == 11


def test_the_capture_of_a_model_that_no_longer_asks_is_refused(monkeypatch):
    model = lens.load("induction-2l")
    for block in model.model.blocks:
        monkeypatch.setattr(block.attn, "forward", lambda hidden, mask, **_: (hidden, None))
    with pytest.raises(LensError, match="cannot reach the attention of AttentionOnlyModel"):
        lens.capture(model, [64, 1, 2])


def test_layers_of_different_lengths_do_not_fit_one_trace():
    model = lens.load(build("vit"))
    second = model.model.layers[1]
    handle = second.register_forward_pre_hook(lambda _, args: (args[0][:, :-1], *args[1:]))
    try:
        with pytest.raises(LensError, match="layer 1 of ViTModel attends from 25 to 25 positions"):
            lens.capture(model, {"pixel_values": torch.zeros(1, 1, 10, 10)})
    finally:
        handle.remove()


def _attention_arguments() -> tuple:
    module = torch.nn.Module()
    parts = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    return (module, *parts, None)


def test_attention_outside_of_a_capture_is_refused():
    with pytest.raises(
        LensError, match="runs with the attention implementation 'attention_lens' outside of what"
    ):
        lens_attention(*_attention_arguments())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dropout": 0.1}, r"drops out attention \(p=0\.1\); call model\.eval\(\)"),
        ({"temperature": 2.0}, r"passes temperature=2\.0 to its attention, which capture does not"),
        ({"unheard": torch.zeros(3)}, r"passes unheard=<tensor \[3\]> to its attention"),
        ({"output_attentions": True}, "passes output_attentions=True to its attention"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(arguments, expected):
    model = lens.load("induction-2l")
    with lens.traces.capturing(model), pytest.raises(LensError, match=expected):
        lens_attention(*_attention_arguments(), **arguments)


def test_harmless_arguments_pass():
    model = lens.load("induction-2l")
    given = _attention_arguments()
    with lens.traces.capturing(model) as recorder:
        output, _ = lens_attention(*given, use_cache=True, position_ids=torch.zeros(1), foo=None)
    expected = torch.nn.functional.scaled_dot_product_attention(*given[1:4], is_causal=True)
    assert naive.rms_ratio(output, expected.transpose(1, 2)) < 1e-5
    assert not recorder.records, "it belongs to no pass of this model"


def test_a_mask_that_the_model_made_itself(monkeypatch):
    model = lens.load(build("llama"))
    ids = torch.arange(3, 40)[None]
    allowed = torch.ones(37, 37, dtype=torch.bool).tril()
    allowed[30:, 5:9] = False
    additive = torch.zeros(37, 37).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with interface.switched(model.model, "eager"), torch.no_grad():
        expected = model.model(ids, attention_mask=additive[None, None]).logits
    for mask in (allowed, additive):
        with lens.traces.capturing(model) as recorder, torch.no_grad():
            found = model.model(ids, attention_mask=mask[None, None]).logits
        assert naive.rms_ratio(found, expected) < 1e-5
        assert recorder.records[0].causal
        assert recorder.records[0].variables["visible"][0].tolist() == allowed.sum(0).tolist()
    structure, added = masks.structure_of(additive[None, None] + 0.5, True, None, 37)
    assert torch.equal(structure.allowed[0, 0], allowed)
    assert torch.equal(added[0, 0], 0.5 * allowed)
    with pytest.raises(LensError, match=r"mask of its own, torch\.float32 of shape \(37, 37\)"):
        masks.structure_of(additive, True, None, 37)
    before = torch.ones(5, 5, dtype=torch.bool).tril(-1)  # the last query is none of padding
    structure, _ = masks.structure_of(before[None, None], True, None, 5)
    assert torch.equal(structure.allowed[0, 0], before)
    of_heads = torch.stack([allowed, ~allowed])[None]
    with pytest.raises(LensError, match="hides other keys from one head than from another"):
        masks.structure_of(of_heads, True, None, 37)


def test_a_large_mask_of_unknown_pattern_is_refused(monkeypatch):
    model = lens.load(build("llama4"))
    monkeypatch.setattr(masks, "LARGEST_SPELLED_OUT", 400)
    with pytest.raises(LensError, match="no compact form; capture at most 20 tokens of this model"):
        lens.capture(model, list(range(3, 40)))


def test_a_cache_of_fixed_size_is_refused():
    model = lens.load(build("llama"))
    options = {"max_new_tokens": 2, "cache_implementation": "static", "pad_token_id": 0}
    with lens.traces.capturing(model), pytest.raises(LensError, match="a cache that grows"):
        model.model.generate(torch.arange(3, 12)[None], **options)


@torch.no_grad()
def test_holes_in_a_prompt_are_left_holes():
    model = lens.load(build("llama"))
    ids, mask = torch.arange(3, 14)[None], torch.ones(1, 11, dtype=torch.long)
    mask[0, 4:6] = 0
    with interface.switched(model.model, "eager"):
        eager = model.model(ids, attention_mask=mask, output_attentions=True).attentions
    with lens.traces.capturing(model, block_size=1) as recorder:
        model.model(ids, attention_mask=mask)
    for record, weights in zip(recorder.records, eager, strict=True):
        assert (record.variables["block_mass"][0] - weights[0]).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_gpu_gives_the_same_trace():
    text = lens.tasks.text("lily")[:800]
    expected = lens.capture(lens.load("stories260k"), text)
    found = lens.capture(lens.load("stories260k", device="cuda"), text)
    assert found.attrs["device"] == "cuda:0"
    for variable in expected.dataset.data_vars:
        values = expected.dataset[variable].values
        assert naive.rms_ratio(found.dataset[variable].values, values) < 1e-3, variable


def test_a_layer_of_a_wider_type_than_the_first_keeps_it():
    arrays = LayerArrays(2)
    for value, kind in ((1.0, np.float16), (1e5, np.float32), (2.0, np.float16)):
        arrays.add({"q": np.full(2, value, kind)})
    assert arrays.in_order([0, 1, 2])["q"].tolist() == [[1.0] * 2, [1e5] * 2, [2.0] * 2]


def test_a_head_is_chosen_with_the_key_that_it_reads():
    """Of grouped queries `trace.k.sel(kv_head=head)` is another head's, or nobody's."""
    trace = lens.capture(lens.load("stories260k"), "Once upon a time", keep_qk=True, progress=False)
    assert trace.k.sizes["kv_head"] == 4
    for name in ("L0H1", "L3H7"):
        head, row = trace.select(name), trace.length - 1
        logits = (head.q[row] * head.k).sum("dim") * trace.attrs["scale"][trace.head_id(name).layer]
        weights = np.exp(logits.values - logits.values.max())
        found = trace.tile(*trace.head_id(name), (row, row + 1), (0, trace.length))[0]
        np.testing.assert_allclose(weights / weights.sum(), found, atol=1e-5)
