"""Models whose input is no picture of a configured size: a tiny one is drawn, and capture is `eager`'s."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.passes.interface import switched
from lens.passes.tiny_inputs import tiny_inputs

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
SPEECH = {**SIZES, "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [5, 5]}
SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 3, "vocab_size": 12}
CONFIGS = {
    "blip": lambda: transformers.BlipVisionConfig(**SIZES, image_size=8, patch_size=4),
    "siglip 2": lambda: transformers.Siglip2VisionConfig(**SIZES, patch_size=2, num_patches=16),
    "aimv2": lambda: transformers.Aimv2VisionConfig(**SIZES, image_size=8, patch_size=4),
    "wavlm": lambda: transformers.WavLMConfig(**SPEECH, num_buckets=16),
    "sew-d": lambda: transformers.SEWDConfig(
        **SPEECH, squeeze_factor=2, max_position_embeddings=64
    ),
}


def built(name):
    torch.manual_seed(0)
    made = transformers.BlipVisionModel if name == "blip" else transformers.AutoModel.from_config
    root = made(CONFIGS[name]()).eval()
    with torch.no_grad():
        for weight in root.parameters():
            weight.add_(0.2 * torch.randn(weight.shape) / max(1, weight[0].numel() / 9) ** 0.5)
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_model_reads_is_drawn_and_it_is_captured(name):
    root = built(name)
    model = lens.load(root)
    assert model.check < 1e-5
    inputs = tiny_inputs(model)
    trace = lens.capture(model, inputs, block_size=1, progress=False)
    assert trace.layers == (0, 1)  # the query that reads AIMv2's last layer is of none
    with torch.no_grad(), switched(root, "eager"):
        own = root(**inputs, output_attentions=True).attentions
    for found, weights in zip(trace.block_mass.values, own, strict=True):
        if name == "wavlm":  # which returns the mean of its heads
            found, weights = found.mean(0), weights[:, 0]
        np.testing.assert_allclose(found, weights[0], atol=1e-5)


def test_a_head_of_wavlm_is_taken_out_where_its_output_is_read():
    root = built("wavlm")
    model = lens.load(root)
    inputs = tiny_inputs(model)
    attention = root.encoder.layers[1].attention
    with torch.no_grad():
        with lens.edit(model, lens.edits.Ablate("L1H2")):
            found = root(**inputs)[0]
        attention.out_proj.weight[:, 16:] = 0
        own = root(**inputs)[0]
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_drawn_is_given():
    sizes = {"hidden_size": 24, "n_layer": 2, "n_head": 3, "state_dim": 5, "act_dim": 2}
    root = transformers.DecisionTransformerModel(
        transformers.DecisionTransformerConfig(**sizes)
    ).eval()
    with pytest.raises(LensError, match=r"give an example of what it reads: lens\.passes\.wrap"):
        lens.load(root)
    generator = torch.Generator().manual_seed(4)
    widths = {"states": 5, "actions": 2, "rewards": 1, "returns_to_go": 1}
    inputs: dict = {
        name: torch.randn(1, 4, width, generator=generator) for name, width in widths.items()
    }
    inputs |= {"timesteps": torch.arange(4)[None], "attention_mask": torch.ones(1, 4).long()}
    model = lens.passes.wrap(root, inputs, attention="encoder.h.*.attn")
    assert model.check < 1e-5
    assert (model.info.layers, model.info.heads) == (2, 3)
