"""What a mapping holds reaches the model as it is, or is refused by name; the truth is `eager`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lens
from lens.common.errors import LensError
from lens.passes import padding
from lens.passes.inputs import read_prompts
from lens.passes.interface import switched
from tests.lens import vision_models

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 97,
}


def grown(model):
    """In eval mode, with attention that is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


def ids_of(tokens: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def largest_error(loaded, trace, inputs) -> float:
    """Of a probability, against the eager attention of the model's own forward pass."""
    with switched(loaded.model, "eager"):
        own = loaded.model(**inputs, output_attentions=True).attentions
    assert len(trace.layers) == len(own)
    found = torch.from_numpy(trace.block_mass.values)
    return float(max((f - w[0]).abs().max() for f, w in zip(found, own, strict=True)))


def bert():
    torch.manual_seed(0)
    return lens.load(
        grown(transformers.BertModel(transformers.BertConfig(**SIZES))), tokenizer=words()
    )


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64)
    return lens.load(grown(transformers.LlamaForCausalLM(config)))


def words():
    """A tokenizer of w3, w4, ... that writes [CLS] a [SEP] b [SEP] with segments 0 and 1."""
    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{number}": number for number in range(3, 97)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


PAIR = ("w5 w9 w60 w31 w8", "w17 w44 w9")


def test_two_texts_have_segments_however_they_are_passed():
    loaded = bert()
    inputs = dict(words()(*PAIR, return_tensors="pt"))
    assert inputs["token_type_ids"].tolist() == [[0] * 7 + [1] * 4]
    without = lens.capture(loaded, inputs["input_ids"][0], block_size=1, progress=False)
    assert largest_error(loaded, without, inputs) > 1e-2
    padded = words()([PAIR, ("w3", "w4")], padding=True, return_tensors="pt")
    both = words()([PAIR, ("w3", "w4")])
    for given in (inputs, {name: tensor.numpy() for name, tensor in inputs.items()}):
        trace = lens.capture(loaded, given, block_size=1, progress=False)
        assert largest_error(loaded, trace, inputs) < 1e-5
    for given in ([PAIR], [inputs], [words()(*PAIR)], padded, both):
        traces = lens.capture(loaded, given, block_size=1, progress=False)
        assert largest_error(loaded, traces[0], inputs) < 1e-5
    alone = lens.capture(loaded, [("w3", "w4")], block_size=1, progress=False)[0]
    for given in (padded, both):
        found = lens.capture(loaded, given, block_size=1, progress=False)[1]
        assert np.array_equal(found.block_mass.values, alone.block_mass.values)


PLACES = {
    "reversed": torch.arange(13).flip(0),
    "with a gap": torch.cat([torch.arange(6), torch.arange(30, 37)]),
    "two packed sequences": torch.cat([torch.arange(6), torch.arange(7)]),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_positions_are_those_that_were_given(name, masked):
    loaded, ids = llama(), ids_of(13)
    inputs = {"input_ids": ids, "position_ids": PLACES[name][None]}
    if masked:  # then transformers sees no packed sequences
        inputs["attention_mask"] = torch.ones_like(ids)
    trace = lens.capture(loaded, inputs, block_size=1, progress=False)
    assert largest_error(loaded, trace, inputs) < 1e-5


ENCODERS = {
    # RoBERTa's positions begin behind the id of its padding: of 22 places it has 20
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, 22, "<s>", "</s>"),
    "albert": (transformers.AlbertConfig, transformers.AlbertForMaskedLM, 20, "[CLS]", "[SEP]"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_windows_of_an_encoder_stand_between_its_own_special_tokens(name):
    config, head, places, first, last = ENCODERS[name]
    vocab = {first: 0, "<pad>": 1, last: 2, "<mask>": 3} | {f"w{i}": i for i in range(4, 97)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.RobertaProcessing((last, 2), (first, 0))
    special = {"cls_token": first, "sep_token": last, "pad_token": "<pad>", "mask_token": "<mask>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    model = lens.load(
        head(config(**SIZES, max_position_embeddings=places, pad_token_id=1)).eval(), tokenizer=fast
    )
    assert model.info.context == 20
    assert len(lens.capture(model, [9] * 20, progress=False).tokens) == 20
    with pytest.raises(LensError, match=r"has 21 tokens and .* takes 20"):
        lens.capture(model, [9] * 21, progress=False)
    words = [number % 90 + 5 for number in range(50)]
    task = lens.tasks.language_modelling(model, " ".join(f"w{one}" for one in words), length=12)
    assert (task.clean[:, 0] == 0).all()
    assert (task.clean[:, -1] == 2).all()
    filled = task.clean.scatter(1, task.positions, task.correct)
    assert filled[:, 1:-1].flatten().tolist() == words
    masked = task.clean.gather(1, task.positions)
    assert (masked == 3).all()
    logits = model.model(task.clean).logits.gather(
        1, task.positions[..., None].expand(-1, -1, SIZES["vocab_size"])
    )
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), task.correct, reduction="none")
    torch.testing.assert_close(task.evaluate(model), loss.mean(1))


LEFT = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"n_embd": 48, "n_layer": 2, "n_head": 6},
    ),
    "bert": (transformers.BertModel, transformers.BertConfig, SIZES),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        SIZES | {"num_key_value_heads": 2},
    ),
}


@torch.no_grad()
def test_padding_is_proved_for_each_prompt_where_blocks_begin_with_the_row(monkeypatch):
    head, config, sizes = LEFT["bert"]
    loaded = lens.load(head(config(**{"vocab_size": 97, **sizes})).eval())
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": ids_of(9, 1).masked_fill(mask == 0, 0), "attention_mask": mask}
    own, calls = padding.first_of, []
    monkeypatch.setattr(padding, "first_of", lambda *given: calls.append(given) or own(*given))

    def proofs():
        calls.clear()
        lens.capture(loaded, inputs, progress=False)
        return len(calls) > 0

    assert [proofs(), proofs()] == [True, False]
    loaded.model.config.index_block_size = 4  # as MiniMax M3 has it
    padding._proved.clear()
    assert [proofs(), proofs()] == [True, True]


@torch.no_grad()
@pytest.mark.parametrize("name", LEFT)
def test_padding_before_a_prompt_moves_it_as_it_does_in_the_model(name, monkeypatch):
    head, config, sizes = LEFT[name]
    torch.manual_seed(0)
    loaded = lens.load(grown(head(config(**{"vocab_size": 97, **sizes}))))
    ids, mask = ids_of(13, 2), torch.ones(2, 13, dtype=torch.long)
    mask[0, :3], ids[0, :5] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    traces = lens.capture(loaded, inputs, block_size=1, progress=False)
    more = {name: tensor.clone() for name, tensor in inputs.items()}
    more["attention_mask"][0, :5] = 0
    with monkeypatch.context() as patch:
        patch.setattr(padding, "first_of", None)  # it was proved
        traces += lens.capture(loaded, more, block_size=1, progress=False)
    with switched(loaded.model, "eager"):
        own = [
            loaded.model(**one, output_attentions=True).attentions for one in (inputs, inputs, more)
        ]
    for trace, row, start, weights in zip(traces, (0, 1, 0), (3, 0, 5), own, strict=False):
        assert trace.length == 13 - start
        for found, each in zip(trace.block_mass.values, weights, strict=True):
            np.testing.assert_allclose(found, each[row, :, start:, start:], atol=1e-5)
    if name != "qwen2":
        with pytest.raises(
            LensError, match="puts a prompt at other positions when 3 tokens of padding"
        ):
            read_prompts(loaded, inputs, whole=False)


@torch.no_grad()
def test_padding_before_a_prompt_that_cannot_be_told_is_refused():
    torch.manual_seed(0)
    loaded = lens.load(grown(transformers.RobertaModel(transformers.RobertaConfig(**SIZES))))
    mask = torch.ones(1, 13, dtype=torch.long)
    mask[0, :3] = 0
    ids = ids_of(13)
    with pytest.raises(LensError, match="pad behind it"):
        lens.capture(loaded, {"input_ids": ids, "attention_mask": mask}, progress=False)
    ids[0, :3] = 1  # the padding's own id, which its positions leave out
    trace = lens.capture(loaded, {"input_ids": ids, "attention_mask": mask}, progress=False)
    assert trace.length == 10


def test_padding_is_cut_from_every_input():
    loaded, ids = llama(), ids_of(13)
    places = torch.arange(13)[None] * 2
    inputs = {"input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}
    expected = lens.capture(loaded, inputs, block_size=1, progress=False)
    before = torch.zeros(1, 4, dtype=torch.long)
    padded = {name: torch.cat([before, tensor], 1) for name, tensor in inputs.items()}
    found = lens.capture(loaded, padded, block_size=1, progress=False)
    assert found.tokens == expected.tokens
    assert np.array_equal(found.block_mass.values, expected.block_mass.values)


@pytest.mark.parametrize("make", [llama, bert])
def test_masks_with_holes_and_square_masks_are_used_as_they_are(make):
    loaded, ids = make(), ids_of(13)
    hidden = torch.ones_like(ids)
    hidden[0, [3, 4, 8]] = 0
    square = torch.rand(1, 1, 13, 13, generator=torch.Generator().manual_seed(1)) > 0.4
    square = torch.zeros(1, 1, 13, 13).masked_fill(
        ~(square | torch.eye(13, dtype=torch.bool)), torch.finfo(torch.float32).min
    )
    for mask in (hidden, square):
        inputs = {"input_ids": ids, "attention_mask": mask}
        trace = lens.capture(loaded, inputs, block_size=1, progress=False)
        assert trace.length == 13
        assert largest_error(loaded, trace, inputs) < 1e-5
    with pytest.raises(LensError, match="hides tokens in the middle"):
        read_prompts(loaded, {"input_ids": ids, "attention_mask": hidden})


def test_ids_in_arrays_are_those_in_tensors():
    loaded, ids = llama(), ids_of(13)
    for kind in (np.uint8, np.int32, np.int64):
        (one,), single = read_prompts(loaded, ids[0].numpy().astype(kind))
        assert (one.ids, single) == (ids[0].tolist(), True)
        several, single = read_prompts(loaded, ids.numpy().astype(kind))
        assert ([each.ids for each in several], single) == (ids.tolist(), False)
    for wrong, said in (
        (np.array([5.0, 6.0]), "a prompt must be a text, token ids"),
        (np.array([5, -6]), "token ids of LlamaForCausalLM go from 0 to"),
        ([[5, 6], []], "a prompt of the list has no tokens"),
        ([np.array([], int)], "no tokens"),
    ):
        with pytest.raises(LensError, match=said):
            read_prompts(loaded, wrong)


@pytest.mark.parametrize(
    "given",
    [
        np.array(3), torch.tensor(3), np.array(3.0), np.array("a"), np.array(None), iter([1, 2]), {3, 4}, [[3], 4],
    ],
)  # fmt: skip
def test_what_is_no_row_of_ids_is_refused_in_words(given):
    """Arrays and tensors of no axis ended in "len() of unsized object"."""
    loaded = llama()
    words = "token ids must be|a prompt must be|input_ids must be"
    for prompts in (given, [given], {"input_ids": given}, [{"input_ids": given}]):
        with pytest.raises(LensError, match=words):
            read_prompts(loaded, prompts)
    with pytest.raises(LensError, match=words):
        loaded.check_ids(given)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    pictures = lens.load(transformers.ViTForImageClassification(config).eval())
    with pytest.raises(LensError):
        read_prompts(pictures, {"pixel_values": given})
    with pytest.raises(LensError):
        lens.tasks.classification(pictures, given, [0])
    with pytest.raises(LensError, match=r"needs a label|labels are"):
        lens.tasks.classification(pictures, torch.zeros(1, 3, 8, 8), given)


@pytest.mark.parametrize("given", [3, np.int64(3), torch.zeros(1, 2, 3, dtype=torch.long)], ids=str)
def test_input_ids_of_one_axis_or_three_are_refused_in_words(given):
    for prompts in ({"input_ids": given}, [{"input_ids": given}]):
        with pytest.raises(LensError, match=r"input_ids must be \[prompts, tokens\], got \["):
            read_prompts(llama(), prompts)
    (one,), _ = read_prompts(llama(), {"input_ids": [np.int64(3), np.int64(4)]})
    assert one.ids == [3, 4]


IDS = {"input_ids": [[5, 6, 7]]}
REFUSED = {
    "a name that no model takes": ({**IDS, "labels": [[5, 6, 7]]}, "takes no labels"),
    "a name for other models": (
        {**IDS, "token_type_ids": [[0, 0, 1]]},
        r"LlamaForCausalLM takes no token_type_ids \(of inputs it takes input_ids, attention_mask, pos",
    ),
    "what a tokenizer notes": (
        {**IDS, "offset_mapping": [[[0, 1]] * 3]},
        "takes no offset_mapping",
    ),
    "a switch": ({**IDS, "use_cache": False}, "use_cache=False is no tensor"),
    "no numbers": ({**IDS, "position_ids": [["a", "b", "c"]]}, "position_ids must be a tensor"),
    "weights as a mask": ({**IDS, "attention_mask": [[1.0, 0.5, 1.0]]}, "must hold 0 and 1 only"),
    "a mask of another length": ({**IDS, "attention_mask": [[1, 1]]}, "attention_mask must be"),
    "a mask of nothing": ({**IDS, "attention_mask": [[0, 0, 0]]}, "the prompt has no tokens"),
    "rows that do not fit": (
        {"input_ids": [[5, 6], [7, 8]], "position_ids": [[0, 1]]},
        r"position_ids \[1, 2\] has other rows than input_ids \[2, 2\]",
    ),
    "two prompts in a mapping of a list": (
        [{"input_ids": [[5], [6]]}],
        "must hold one prompt, got 2",
    ),
    "a mask over embeddings": (
        {"inputs_embeds": torch.zeros(1, 3, 48), "attention_mask": [[1, 1, 0]]},
        "attention_mask hides a part of inputs_embeds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_used_is_refused_by_name(name):
    given, expected = REFUSED[name]
    with pytest.raises(LensError, match=expected):
        lens.capture(llama(), given, progress=False)


def test_what_a_model_cannot_run_is_said_in_one_line():
    far = {**IDS, "position_ids": [[0, 1, 999]]}
    expected = r"BertModel cannot run this prompt \(input_ids \[1, 3\], position_ids \[1, 3\]\): RuntimeError"
    with pytest.raises(LensError, match=expected):
        lens.capture(bert(), far, progress=False)


def test_analyses_that_run_ids_alone_refuse_what_they_would_drop():
    for given in (dict(words()(*PAIR)), [PAIR]):
        with pytest.raises(
            LensError, match="this takes input_ids and attention_mask, got token_type_ids"
        ):
            read_prompts(bert(), given)
    prompts, _ = read_prompts(bert(), [PAIR[0]])
    assert prompts[0].ids == [1, 5, 9, 60, 31, 8, 2]


def paligemma():
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**vision_models.TEXT, head_dim=8),
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=16,
            patch_size=8,
            projection_dim=48,
        ),
        image_token_id=90,
        projection_dim=48,
        hidden_size=48,
    )
    return grown(transformers.PaliGemmaForConditionalGeneration(config))


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 11, 19])
def test_the_prefix_of_paligemma_looks_both_ways(prefix):
    torch.manual_seed(0)
    loaded = lens.load(paligemma())
    ids = ids_of(19)
    ids[0, :4] = 90
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 16, 16),
        "token_type_ids": (torch.arange(19) >= prefix).long()[None],
    }
    trace = lens.capture(loaded, inputs, block_size=1, progress=False)
    assert largest_error(loaded, trace, inputs) < 1e-5
    assert bool(trace.block_mass.values[:, :, 2, 9].any()) == (prefix > 9)
    own = loaded.model(**inputs).logits
    with lens.traces.capturing(loaded):
        assert (loaded.model(**inputs).logits - own).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: lens.tasks.loss(model, "w3 w4"), "has no tokenizer, so it cannot read text"),
        (lambda model: lens.tasks.loss(model, None), "must be a list of integers, got NoneType"),
        (lambda model: lens.tasks.loss(model, [True, False]), "must be a list of integers"),
        (
            lambda model: lens.capture(model, [True, False]),
            "must be a text or token ids .* got bool",
        ),
        (lambda model: lens.reading.explain(model, [True, False], "L0H0", 1, 0), "got bool"),
        (
            lambda model: lens.capture(model, [3, 4], out="/proc/x", progress=False),
            "/proc/x/layer-00.safetensors: it is not there",
        ),
    ],
)
def test_what_is_no_token_ids_and_no_folder_is_refused_in_one_line(call, said):
    with pytest.raises(LensError, match=said):
        call(llama())


def test_a_task_is_held_against_the_model_before_it_is_run():
    small, task = lens.load("induction-2l"), lens.tasks.induction(lens.load("text-lm-3l"), 2)
    assert int(task.clean.max()) >= small.info.vocab
    for call in (lens.circuits.patch, lens.heads.importance, lens.circuits.score_edges):
        with pytest.raises(LensError, match="token ids of induction-2l go from 0 to 64"):
            call(small, task, progress=False)
    own = lens.tasks.induction(small, 2)
    with pytest.raises(LensError, match="has the answer 65, and token ids of induction-2l go from"):
        lens.circuits.patch(small, replace(own, correct=torch.full_like(own.correct, 65)))


@pytest.mark.parametrize("seed", [-1, 1.5, "x", None, True])
def test_a_seed_that_is_none_is_refused_before_any_work(seed):
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, 2)
    calls = (
        lambda: lens.tasks.induction(model, 2, seed=seed),
        lambda: lens.models.random_weights(model, seed=seed),
        lambda: lens.circuits.checks.sink_check(model, task, ["L0H1"], seed=seed),
        lambda: lens.effect(model, task, lens.edits.Ablate(["L0H1"], "mean"), seed=seed),
        lambda: lens.heads.importance(
            model, task, method="ablation", baseline="resample", seed=seed
        ),
    )
    for call in calls:
        with pytest.raises(LensError, match="seed must be an integer"):
            call()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: lens.edits.Drop(heads=5), "heads must be a list, got 5"),
        (lambda model: lens.tasks.language_modelling(model, 5), "texts must be a list, got 5"),
        (lambda model: lens.tasks.induction(model, 2, length=3.5), "length must be an integer"),
        (lambda model: lens.tasks.induction(model, 2, metric={}), "metric must be a text, got {}"),
        (lambda model: lens.tasks.language_modelling(model, [5, 6]), "token ids must be a list"),
        (lambda model: lens.tasks.language_modelling(model, "a", length="x"), "length must be an"),
        (lambda model: lens.tasks.copied(model, "5"), "length must be an integer"),
        (
            lambda model: lens.effect(model, [[5, 6]], lens.edits.Mask("first"), amounts=["x"]),
            "amounts must be numbers",
        ),
        (lambda model: lens.tasks.loss(model, [5]), "a prompt of one token predicts no other"),
        (lambda model: lens.tasks.from_jsonl(model, ["x"]), "path must be the path of a file"),
        (lambda model: lens.circuits.load_circuit(3), "path must be the path of a file or folder"),
        (lambda model: lens.runs.open_run(None), "folder must be the path of a file or folder"),
        (lambda model: lens.stats.ranks(3.0), "expected several numbers, got a single one"),
        (lambda model: lens.stats.top(["x"], 1), "values must be numbers"),
        (lambda model: lens.stats.top([1.0], "1"), "k must be an integer"),
        (lambda model: lens.figures.row_entropy(3, 0, 0), "trace must be an AttentionTrace"),
        (
            lambda model: lens.traces.detect("x", "induction_head"),
            "trace must be an AttentionTrace",
        ),
        (lambda model: lens.circuits.make_circuit("x", []), "graph must be a Graph"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_its_name(call, said):
    with pytest.raises(LensError, match=said):
        call(lens.load("induction-2l"))


def test_of_several_inputs_that_a_class_notes_the_first_is_meant():
    sizes = SIZES | {"image_size": 16, "patch_size": 8}
    sizes.pop("vocab_size")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).eval()
    model.main_input_name = ["pixel_values", "task_inputs"]  # as OneFormer has
    assert lens.load(model).check < 1e-5
