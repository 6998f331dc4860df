"""Labels by position in generation, held against `eager` attention of the same tokens, in every mode of it."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
)

import lens
from lens import LensError, edits
from lens.passes.interface import switched
from lens.traces import capturing
from tests.lens import hybrids
from tests.lens.architectures import build
from tests.tiers import first

ARCHITECTURES = ("llama", "mistral", "gemma2", "gemma3")
LENGTH = 14
OPTIONS = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


class Sequences(LogitsProcessor):
    """What each row has read when its next token is chosen."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


def _prompts(rows=1, top=40):
    """Few different tokens, so that they repeat."""
    return torch.randint(3, top, (rows, LENGTH), generator=torch.Generator().manual_seed(4))


def _hold(model, recorder, sequences, mask=None):
    """Every record against eager attention: `sequences[step]` are the tokens [rows, n] up to that pass."""
    for step in range(recorder.steps):
        tokens = sequences[step]
        rows, length = tokens.shape
        real = torch.ones(rows, length, dtype=torch.long)
        if mask is not None:
            real[:, : mask.shape[1]] = mask
        with torch.no_grad(), switched(model, "eager"):
            weights = model(
                tokens,
                attention_mask=real,
                position_ids=(real.cumsum(-1) - 1).clamp(min=0),
                output_attentions=True,
            ).attentions
        first = real.argmax(-1)
        for record in recorder.layers(step):
            assert record.key_start + record.keys == length
            assert record.query_start + record.queries == length
            whole = weights[record.layer].double()[:, :, record.query_start :]
            _hold_record(record, whole, tokens, first, real)


def _hold_record(record, whole, tokens, first, real):
    """`whole`: [rows, heads, queries, tokens], by absolute positions."""
    length = tokens.shape[1]
    here = torch.arange(record.query_start, length)
    for row in range(len(tokens)):
        at, seen, own = int(first[row]), whole[row], tokens[row]
        keep = here >= at  # rows of padding show nothing
        key = torch.arange(length)
        before = torch.cat([torch.tensor([-1]), own[:-1]])
        if at:
            before[at] = -1
        expected = {
            "first_mass": seen[..., at],
            "rest_mass": seen.sum(-1) - seen[..., at],
            "prefix_mass": seen[..., at : at + 4].sum(-1),
            "received": seen[:, keep].sum(1)[:, record.key_start :],
            "distance": (seen * (here[:, None] - key)).sum(-1),
        }
        matches = {
            0: here[:, None] == key,
            1: here[:, None] - 1 == key,
            2: own[here][:, None] == own,
            3: own[here][:, None] == before,
        }
        for name, values in expected.items():
            found = record.variables[name][row].double()
            if name != "received":
                found, values = found[:, keep], values[:, keep]
            assert (found - values).abs().max() < 1e-5, (name, record.step, record.layer, row)
        for rule, where in matches.items():
            found = record.variables["match_mass"][row, ..., rule].double()[:, keep]
            values = (seen * where).sum(-1)[:, keep]
            assert (found - values).abs().max() < 1e-5, (rule, record.step, record.layer, row)
        count = record.variables["block_mass"][row].double()[:, keep]
        assert (count - seen[:, keep][..., record.key_start :]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", first(ARCHITECTURES, "mistral", "gemma3"))
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {},
    ],
    ids=["beams", "sampled beams", "samples", "greedy"],
)
def test_rows_keep_their_own_tokens(name, mode):
    model, ids, keeper = build(name), _prompts(2), Sequences()
    loaded = lens.load(model)
    options = OPTIONS | mode | {"logits_processor": LogitsProcessorList([keeper])}
    torch.manual_seed(0)
    with capturing(loaded, block_size=1) as recorder:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert recorder.steps == 9
    _hold(model, recorder, keeper.seen)


@torch.no_grad()
@pytest.mark.parametrize("name", first(ARCHITECTURES, "mistral", "gemma3"))
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padding_on_the_left_moves_the_first_token(name, mode):
    model, ids, keeper = build(name), _prompts(2), Sequences()
    mask = torch.ones_like(ids)
    mask[0, :6], mask[1, :1] = 0, 0
    options = OPTIONS | mode | {"logits_processor": LogitsProcessorList([keeper])}
    rows = mask.repeat_interleave(mode.get("num_beams", 1), 0)
    with capturing(lens.load(model), block_size=1) as recorder:
        model.generate(ids, attention_mask=mask, **options)
    _hold(model, recorder, keeper.seen, rows)


@torch.no_grad()
@pytest.mark.parametrize("name", first(ARCHITECTURES, "mistral", "gemma3"))
@pytest.mark.parametrize("mode", ["lookup", "assistant"])
def test_rejected_drafts_are_taken_out(name, mode):
    model, ids = build(name).double(), _prompts().repeat(1, 2)  # held to 1e-5 of distances of 22
    loaded = lens.load(model)
    given = {"prompt_lookup_num_tokens": 4}
    if mode == "assistant":
        given = {"assistant_model": build("qwen3").double()}
    passes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with capturing(loaded, block_size=1) as recorder:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, **given)
    hook.remove()
    assert sum(passes) > found.shape[1] - 1, "some drafts were rejected"
    drafted = sum(record.queries for record in recorder.records if record.layer == 0)
    assert drafted == found.shape[1] - 1, "what is left is each token once, but the last"
    ends = [recorder.layers(step)[0] for step in range(recorder.steps)]
    _hold(model, recorder, [found[:, : one.query_start + one.queries] for one in ends])


@torch.no_grad()
@pytest.mark.parametrize("name", first(ARCHITECTURES, "mistral", "gemma3"))
def test_a_prompt_in_pieces_keeps_its_positions(name):
    model, ids = build(name), _prompts().repeat(1, 2)
    loaded = lens.load(model)
    cache = DynamicCache(config=model.config)
    ends = [0, 5, 11, 12, 20, 28]
    with capturing(loaded, block_size=1) as recorder:
        for start, end in pairwise(ends):
            model(ids[:, start:end], past_key_values=cache)
    _hold(model, recorder, [ids[:, :end] for end in ends[1:]])
    with capturing(loaded, block_size=1) as recorder:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), prefill_chunk_size=8, **OPTIONS
        )
    ends = [recorder.layers(step)[0] for step in range(recorder.steps)]
    assert [one.queries for one in ends[:4]] == [8, 8, 8, 4]
    _hold(model, recorder, [found[:, : one.query_start + one.queries] for one in ends])


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", first(["qwen3_next", "bamba", "zamba", "lfm2", "falcon_h1"], "qwen3_next", "falcon_h1")
)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_hybrids_generate_like_others(kind, mode):
    model, ids, keeper = hybrids.hybrid(kind), _prompts(2), Sequences()
    with capturing(lens.load(model), block_size=1) as recorder:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([keeper]),
            **OPTIONS,
            **mode,
        )
    attending = hybrids.MODELS[kind][1]
    for step in range(recorder.steps):
        assert [record.layer for record in recorder.layers(step)] == list(attending)
        tokens = keeper.seen[step]
        for record in recorder.layers(step):
            own = tokens[:, record.query_start :]
            mass = record.variables["block_mass"].double()
            same = (own[:, :, None] == tokens[:, None])[:, None]
            found = record.variables["match_mass"][..., 2].double()
            assert ((mass * same).sum(-1) - found).abs().max() < 1e-5
            assert (mass[..., 0] - record.variables["first_mass"]).abs().max() < 1e-5


@torch.no_grad()
def test_a_decoder_that_hides_nothing_from_its_last_token_counts_from_the_first():
    """BLOOM computes its own attention, and makes a mask that says nothing for one query."""
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=48, n_layer=2, n_head=6, vocab_size=40)
    model, ids, keeper = BloomForCausalLM(config).eval(), _prompts(), Sequences()
    options = OPTIONS | {"logits_processor": LogitsProcessorList([keeper])}
    with capturing(lens.load(model), block_size=1) as recorder:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for step in range(recorder.steps):
        for record in recorder.layers(step):
            assert record.causal
            assert record.query_start + record.queries == keeper.seen[step].shape[1]


@torch.no_grad()
def test_what_a_cache_holds_from_elsewhere_has_no_tokens_but_its_positions():
    model, ids = build("mistral"), _prompts()
    loaded, cache = lens.load(model), DynamicCache(config=build("mistral").config)
    model(ids, past_key_values=cache)
    with capturing(loaded, block_size=1) as recorder:
        model(ids[:, :1], past_key_values=cache)
    record = recorder.records[0]
    assert (record.query_start, record.key_start) == (LENGTH, LENGTH + 1 - record.keys)
    assert record.variables["match_mass"][..., 2:].isnan().all()
    assert record.variables["match_mass"][..., :2].isfinite().all()
    assert (record.variables["first_mass"] == 0).all(), "the first token is out of the window"


@torch.no_grad()
def test_a_cache_of_fixed_size_is_refused_with_the_way_out():
    model, ids = build("llama"), _prompts()
    loaded = lens.load(model)
    with capturing(loaded), pytest.raises(LensError, match=r"cache that grows .*dynamic"):
        model.generate(ids, cache_implementation="static", **OPTIONS)


@torch.no_grad()
def test_drafts_of_a_long_pass_are_refused(monkeypatch):
    monkeypatch.setattr("lens.traces.recorder.MOST_DRAFTED", 8)
    model, ids = build("llama"), _prompts().repeat(1, 2)
    loaded = lens.load(model)
    words = "drafted tokens of pass 0 were rejected, and that pass had more than 8"
    with pytest.raises(LensError, match=words), capturing(loaded):
        model.generate(ids, prompt_lookup_num_tokens=4, **OPTIONS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize(
    "mode",
    [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}],
    ids=["greedy", "beams", "drafts"],
)
def test_an_edit_of_the_first_key_stays_with_it_in_every_mode(name, mode):
    """Masked is the token at position 0, also where a window's cache has dropped it."""
    model, ids = build(name), _prompts().repeat(1, 2)
    loaded, places = lens.load(model), []

    def keys(at):
        places.append(at.positions.clone())
        return at.positions == 0

    with lens.edit(loaded, edits.Mask(keys, layers=[0])):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS, **mode)
    assert max(int(one.max()) for one in places) >= ids.shape[1] + 6
    with lens.edit(loaded, edits.Mask("first", layers=[0])):
        whole = model(found[:, :-1]).logits
    expected = whole[0, ids.shape[1] - 1 :].argmax(-1)
    if "num_beams" not in mode:
        assert expected.tolist() == found[0, ids.shape[1] :].tolist()
