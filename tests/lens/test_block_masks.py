"""Masks by which a query sees its own block whole (frames of a video): a few numbers, and what transformers makes of them."""

from functools import partial

import numpy as np
import pytest
import torch
from lens_kernels import AttentionMask, attention
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    create_causal_mask,
    or_masks,
    sdpa_mask,
)
from transformers.models.llama import modeling_llama

import lens
from lens.passes.masks import structured_mask
from lens.passes.structures import BlockStructure

IDS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, 2, 3, 3], [5, 5, 5, 5, 7, 7, -1, -1, -1, -1, 9]])


def made(ids, queries):
    keys = ids.shape[1]
    function = or_masks(causal_mask_function, blockwise_overlay(ids))
    places = (len(ids), queries, keys, keys - queries, 0, function)
    spelled = sdpa_mask(*places, allow_is_causal_skip=False)
    return structured_mask(*places).structure, spelled[:, 0]


@pytest.mark.parametrize("queries", [11, 4, 1])
def test_the_compact_mask_is_that_of_transformers(queries):
    structure, spelled = made(IDS, queries)
    assert isinstance(structure, BlockStructure)
    assert structure.visible(2, queries, 11).tolist() == spelled.sum(1).tolist()
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, queries, 8), torch.randn(2, 2, 11, 8)
    found = attention(q, k, k, mask=structure.for_kernel(queries)).output
    right = attention(q, k, k, mask=AttentionMask(allowed=spelled[:, None])).output
    assert torch.allclose(found, right, atol=1e-6)
    assert torch.equal(structure.allowed & True, spelled[:, None])  # where somebody asks for it


def test_of_one_prompt_every_question_has_the_answer_of_the_mask_written_out():
    for ids in (IDS[:1], IDS[1:]):
        structure, (spelled,) = made(ids, 11)
        first, past = structure.ranges()
        assert first.tolist() == [0] * 11
        assert past.tolist() == spelled.sum(-1).tolist()
        rows = torch.tensor([0, 2, 7, 9])
        assert torch.equal(structure.seen_by(rows, 11), spelled[rows])
        hidden = [not bool(spelled[: place + 1, place + 1].any()) for place in range(10)]
        assert structure.hides_next(11).tolist() == hidden
        short = structure.without_last(3)
        assert torch.equal(short.allowed[0, 0] & True, spelled[:-3, :-3])
        assert short.visible(1, 8, 8).tolist() == [spelled[:-3, :-3].sum(0).tolist()]


def test_a_block_with_others_between_its_own_is_spelled_out():
    structure, spelled = made(torch.tensor([[0, 1, 1, 0]]), 4)
    assert not isinstance(structure, BlockStructure)
    assert torch.equal(structure.allowed[:, 0], spelled)


def test_blocks_of_one_token_are_a_causal_mask():
    structure, spelled = made(torch.tensor([[-1, 0, 3, -1, -1]]), 5)
    assert (structure.causal, structure.allowed) == (True, None)
    assert torch.equal(spelled[0], torch.ones(5, 5).tril() > 0)


def in_frames(monkeypatch, frames, tokens, width):
    """A Llama of one layer that reads frames of tokens, each of which sees its own frame whole."""
    ids = torch.arange(tokens)[None] // frames
    causal = partial(create_causal_mask, block_sequence_ids=ids)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", causal)
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
    config = LlamaConfig(
        num_hidden_layers=1, vocab_size=32, max_position_embeddings=tokens, **sizes
    )
    return LlamaModel(config).eval(), torch.arange(tokens) * 7 % 32


def test_a_model_that_reads_frames_is_captured_as_eager_attention_sees_it(monkeypatch):
    module, ids = in_frames(monkeypatch, 5, 23, 16)
    trace = lens.capture(lens.load(module), ids, keep_qk=True, block_size=4, progress=False)
    module.set_attn_implementation("eager")
    (expected,) = module(ids[None], output_attentions=True).attentions
    expected = expected[0].detach().double().numpy()
    assert expected[:, 0, 4].min() > 0  # the first of a frame sees its last
    assert np.abs(trace.received[0] - expected.sum(1)).max() < 1e-5
    entropy = -(expected * np.log(np.where(expected > 0, expected, 1))).sum(-1)
    assert np.abs(trace.dataset["entropy"][0] - entropy).max() < 1e-5
    assert np.abs(trace.tile(0, 1, (3, 12), (0, 23)) - expected[1, 3:12]).max() < 1e-5


def test_some_rows_of_a_block_mask_see_what_they_saw(monkeypatch):
    module, ids = in_frames(monkeypatch, 5, 23, 16)
    head = LlamaForCausalLM(module.config).eval()
    head.model = module
    edits = (
        lens.edits.Knockout([11, 12, 20], [0, 2, 3]),
        lens.edits.Sparse(lens.policies.AShape(2, 4), block_size=2, first_row=9),
    )

    def measured():
        model, found = lens.load(head), []
        for edit in edits:
            with lens.edit(model, edit):
                found.append(model.logits(ids))
        return torch.stack(found)

    compact = measured()
    monkeypatch.setattr("lens.passes.masks.bounds_of", lambda *_: None)  # spelled out
    torch.testing.assert_close(compact, measured())


@pytest.mark.exhaustive
def test_32_768_tokens_in_frames_of_256(monkeypatch):
    module, ids = in_frames(monkeypatch, 256, 32768, 16)
    trace = lens.capture(lens.load(module), ids, keep_qk=True, block_size=256, progress=False)
    ahead = np.triu(trace.dataset["block_mass"][0, 0], 1)
    assert ahead.max() == 0
    assert np.allclose(trace.received.values.sum(-1), 32768, rtol=1e-4)
    tile = trace.tile(0, 0, (512, 520), (0, 1024))
    assert np.allclose(tile.sum(-1), 1, atol=1e-4)
    assert (tile[:, :768] > 0).all()
    assert (tile[:, 768:] == 0).all()
