"""Halves of encoder-decoder models: the decoder's own attention is part 0 of a layer, cross-attention part 1."""

import pytest
import torch
import transformers

import lens
from lens.passes.interface import switched
from lens.traces import capturing

SIZES = {
    "vocab_size": 97,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(**SIZES, decoder_start_token_id=2, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=48, d_kv=12, d_ff=32, num_layers=3, num_decoder_layers=2,
        num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def inputs(queries):
    generator = torch.Generator().manual_seed(2)
    source = torch.randint(3, 97, (2, 9), generator=generator)
    mask = torch.ones_like(source)
    mask[1, :3] = 0
    target = torch.randint(3, 97, (2, queries), generator=generator)
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}


@torch.no_grad()
@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("queries", [5, 9, 12])
def test_both_attentions_of_a_decoder_are_what_eager_gives(make, queries):
    model, given = make(), inputs(queries)
    decoder = lens.load(model.get_decoder())
    assert decoder.info.attending == (0, 1)
    assert decoder.info.layers == 2
    own = model(**given).logits
    with capturing(decoder, block_size=1) as recorder:
        found = model(**given).logits
    assert (found - own).abs().max() < 1e-4
    with switched(model, "eager"):
        expected = model(**given, output_attentions=True)
    names = [(record.layer, record.part, record.cross) for record in recorder.records]
    assert names == [(at, part, part == 1) for at in range(2) for part in range(2)]
    for record in recorder.records:
        kind = expected.cross_attentions if record.cross else expected.decoder_attentions
        weights = kind[record.layer]
        assert (record.variables["block_mass"] - weights).abs().max() < 1e-5
        assert (record.variables["received"] - weights.sum(2)).abs().max() < 1e-5
        if record.cross:
            first = given["attention_mask"].argmax(-1)
            mass = torch.stack([weights[row, ..., at] for row, at in enumerate(first)])
            assert (record.variables["first_mass"] - mass).abs().max() < 1e-5
            assert record.variables["match_mass"].isnan().all()
            assert record.variables["distance"].isnan().all()
            assert (record.variables["visible"] == queries * given["attention_mask"]).all()


@torch.no_grad()
@pytest.mark.parametrize("make", [bart, t5])
def test_generation_of_the_whole_records_the_half_that_was_loaded(make):
    model, given = make(), inputs(1)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    source = {name: given[name] for name in ("input_ids", "attention_mask")}
    own = model.generate(**source, **options)
    decoder, encoder = lens.load(model.get_decoder()), lens.load(model.get_encoder())
    assert encoder.info.attending == (0, 1, 2)
    with capturing(decoder) as recorder:
        assert model.generate(**source, **options).tolist() == own.tolist()
    assert recorder.steps == 4
    for step in range(4):
        names = [(record.layer, record.part) for record in recorder.layers(step)]
        assert names == [(0, 0), (0, 1), (1, 0), (1, 1)], "none of the encoder among them"
        for record in recorder.layers(step):
            assert record.keys == (9 if record.cross else step + 1)
            known = record.variables["match_mass"][..., 2].isfinite().all()
            assert bool(known) == (not record.cross)
    with capturing(encoder) as recorder:
        model.generate(**source, **options)
    assert [(one.step, one.layer, one.part) for one in recorder.records] == [
        (0, layer, 0) for layer in range(3)
    ]


@torch.no_grad()
def test_layers_that_read_an_image_beside_the_text_keep_their_number():
    """Mllama's layer 1 attends to the image alone, and not at all where there is none."""
    text = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1],
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    images = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    config = transformers.MllamaConfig(text_config=text, vision_config=images, image_token_index=96)
    torch.manual_seed(0)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    loaded = lens.load(model)
    assert loaded.info.attending == (0, 2, 3)
    ones = torch.ones(1, 1, dtype=torch.long)
    given = {
        "input_ids": torch.tensor([[96, *range(3, 15)]]),
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": ones,
        "aspect_ratio_mask": ones[None],
        "cross_attention_mask": torch.ones(1, 13, 1, 1, dtype=torch.long),
    }
    with capturing(loaded, block_size=1) as recorder:
        model(**given)
    found = [(one.layer, one.part, one.cross, one.keys) for one in recorder.records]
    assert found == [(0, 0, False, 13), (1, 0, True, 5), (2, 0, False, 13), (3, 0, False, 13)]
    with switched(model, "eager"):
        weights = model(**given, output_attentions=True).attentions
    for record, own in zip(recorder.records, weights, strict=True):
        assert (record.variables["block_mass"] - own).abs().max() < 1e-5
    with pytest.raises(lens.LensError, match=r"layer 1 of .* attends from 13 to 5 positions"):
        lens.capture(loaded, given, progress=False)
