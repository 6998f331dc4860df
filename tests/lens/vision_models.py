"""Small vision-language models with random weights, in the shapes of seven families."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn

from lens.passes.interface import language_model
from tests.tiers import first

IMAGE, VOCAB, WIDTH, LAYERS, HEADS = 90, 97, 48, 3, 6
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SYSTEM, QUESTION = 5, 11
ANSWER = 4  # of the question, the part that PaliGemma sees one way


def _llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config), (4, 4)


def _qwen2_vl():
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "mlp_ratio": 2,
        },
        text_config={
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen2VLForConditionalGeneration(config), (3, 5)


def _internvl():
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[24, 24],
            patch_size=[4, 4],
        ),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config), (3, 3)


def _qwen3_vl():
    config = transformers.Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 40,
            "out_hidden_size": WIDTH,
            "num_heads": 4,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            **TEXT,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return transformers.Qwen3VLForConditionalGeneration(config), (3, 5)


def _siglip(side, patch=4):
    return {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": patch,
    }


def _paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config={**_siglip(16), "model_type": "siglip_vision_model", "projection_dim": WIDTH},
        text_config={**TEXT, "head_dim": 8, "model_type": "gemma"},
        image_token_index=IMAGE,
        projection_dim=WIDTH,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), (4, 4)


def _gemma3():
    config = transformers.Gemma3Config(
        vision_config=_siglip(24),
        text_config={**TEXT, "head_dim": 8, "sliding_window": 64},
        image_token_index=IMAGE,
        mm_tokens_per_image=9,
    )
    return transformers.Gemma3ForConditionalGeneration(config), (3, 3)


def _idefics3():
    config = transformers.Idefics3Config(
        vision_config=_siglip(24),
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.Idefics3ForConditionalGeneration(config), (3, 3)


BUILDERS = {
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
}


CAUSAL = [name for name in BUILDERS if name not in ("paligemma", "gemma3")]
"""Those in which no token sees a later one."""


FAMILIES = first(BUILDERS, "llava", "gemma3", "qwen3_vl")
"""All; of those whose inputs and masks are those of another the long tests run with `make exhaustive` alone."""


def scored(name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [tokens - 1]: places whose next token is text that none up to there has seen."""
    is_text = inputs["input_ids"][0, 1:] != IMAGE
    if name == "paligemma":
        is_text[:-ANSWER] = False
    return is_text


def build(name: str):
    """The model, its inputs for one prompt (system, image, question), and the grid of the image."""
    torch.manual_seed(0)
    model, (height, width) = BUILDERS[name]()
    model.eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "proj" in parameter_name:
                parameter.mul_(
                    10 if "q_proj" in parameter_name or "k_proj" in parameter_name else 5
                )
            if name == "gemma3" and "q_norm" in parameter_name:  # weights are one more
                parameter.fill_(4.0)
            if "mm_input_projection_weight" in parameter_name:  # zeros before training
                parameter.normal_()
    random = torch.Generator().manual_seed(3)
    before = torch.randint(3, 90, (1, SYSTEM), generator=random)
    after = torch.randint(3, 90, (1, QUESTION), generator=random)
    image = torch.full((1, height * width), IMAGE)
    inputs = {"input_ids": torch.cat([before, image, after], 1)}
    if name in ("qwen2_vl", "qwen3_vl"):
        inputs["pixel_values"] = torch.randn(height * width * 4, 3 * 2 * 2, generator=random)
        inputs["image_grid_thw"] = torch.tensor([[1, height * 2, width * 2]])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    else:
        side = 16 if name in ("llava", "paligemma") else 24
        inputs["pixel_values"] = torch.randn(1, 3, side, side, generator=random)
        if name == "idefics3":  # pictures of each prompt
            inputs["pixel_values"] = inputs["pixel_values"][None]
        if name == "gemma3":  # a picture sees all of itself
            inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        if name == "paligemma":  # all but the answer is seen both ways
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            inputs["token_type_ids"][:, -ANSWER:] = 1
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model, inputs, (height, width)


@contextmanager
def planted(model: nn.Module, dim: int, places: list[int], size: float = 30.0) -> Iterator[None]:
    """A massive activation in one dimension of what enters the first layer, at `places` of a prompt."""

    def plant(_, args, kwargs):
        embeddings = kwargs["inputs_embeds"].clone()
        if embeddings.shape[1] > max(places):
            embeddings[:, places, dim] = size
        return args, {**kwargs, "inputs_embeds": embeddings}

    hook = language_model(model).register_forward_pre_hook(plant, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
