"""Pixels as a processor makes them are prompts of a model of pictures, whole or a stage of it."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens import LensError, edits

SIZES = {
    "num_attention_heads": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}


def swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return lens.load(transformers.SwinModel(config).eval()).part("stage0")


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    return lens.load(transformers.ViTForImageClassification(config).eval())


@pytest.mark.parametrize("make", [swin, vit])
def test_pixels_are_a_prompt(make):
    model, pixels = make(), torch.randn(2, 3, 32, 32)
    wanted = lens.capture(model, {"pixel_values": pixels[:1]}, progress=False)
    one = lens.capture(model, pixels[0], progress=False)
    several = [lens.capture(model, given, progress=False) for given in (pixels, list(pixels))]
    assert [len(found) for found in several] == [2, 2]
    for found in (one, *(found[0] for found in several)):
        np.testing.assert_allclose(found.lse.values, wanted.lse.values, atol=1e-5)


@pytest.mark.parametrize("make", [swin, vit])
def test_a_model_of_pictures_has_no_loss_of_tokens(make):
    model, pixels = make(), torch.randn(3, 32, 32)
    for given in (pixels, pixels[None], {"pixel_values": pixels[None]}):
        with pytest.raises(
            LensError, match="reads no tokens, so that there is no loss of a next one"
        ):
            lens.effect(model, given, edits.Ablate(["L0H0"]), progress=False)


def test_a_model_of_several_models_of_text_is_refused_in_a_line():
    text = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_decoder_layers=1, num_heads=4
    )
    sound = transformers.EncodecConfig(
        hidden_size=16, num_filters=4, codebook_size=64, target_bandwidths=[1.5]
    )
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        ffn_dim=40,
        num_attention_heads=4,
        num_codebooks=2,
    )
    config = transformers.MusicgenConfig(text_encoder=text, audio_encoder=sound, decoder=decoder)
    with pytest.raises(LensError, match=r"several models that read tokens.*lens.passes.wrap"):
        lens.load(transformers.MusicgenForConditionalGeneration(config).eval())
