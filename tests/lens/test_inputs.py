"""What a mapping holds reaches the model as it is, or is refused by name; the truth is `eager`."""

import pytest
import torch
import transformers

import lens
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
    assert trace.layers == len(own)
    found = torch.from_numpy(trace.block_mass.values)
    return float(max((f - w[0]).abs().max() for f, w in zip(found, own, strict=True)))


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
