"""What models read whose configuration does not say it: an example for `lens.passes.wrap`, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CLASSES = {
    f"pp_ocrv{version}_rec": f"PPOCRV{name}RecForTextRecognition"
    for version, name in (("5_mobile", "5Mobile"), ("6_small", "6Small"))
}
"""The class of a model type whose bare model has no attention."""


def example(kind: str, config: Any) -> dict[str, Any] | None:
    """Inputs of a small model of this type; None of a type that needs none. Rows of positions have lengths of their own."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(10, 150, (1, length), generator=generator)

    made = _MADE.get(kind)
    return None if made is None else made(config, noise, ids)


def _text_and_picture(_: Any, noise: Callable, ids: Callable) -> dict[str, Any]:
    return {"input_ids": ids(9), "pixel_values": noise(3, 32, 32)}


def _decisions(config: Any, noise: Callable, _: Callable) -> dict[str, Any]:
    sizes = {"states": config.state_dim, "actions": config.act_dim, "rewards": 1}
    found = {name: noise(6, size) for name, size in (sizes | {"returns_to_go": 1}).items()}
    return found | {"timesteps": torch.arange(6)[None], "attention_mask": torch.ones(1, 6).long()}


def _inside(length: int, first: int, count: int) -> torch.Tensor:
    mask = torch.zeros(1, length, dtype=torch.long)
    mask[0, first : first + count] = 1
    return mask


def _kosmos_2(config: Any, noise: Callable, ids: Callable) -> dict[str, Any]:
    given = _text_and_picture(config, noise, lambda _: ids(20))
    return given | {"image_embeds_position_mask": _inside(20, 2, config.latent_query_num)}


def _kosmos_2_5(config: Any, noise: Callable, ids: Callable) -> dict[str, Any]:
    patches = noise(12, config.vision_config.patch_embed_hidden_size + 2)
    place = torch.arange(12)
    patches[0, :, 0], patches[0, :, 1] = place // 4 + 1, place % 4 + 1
    return {
        "input_ids": ids(20),
        "flattened_patches": patches,
        "image_embeds_position_mask": _inside(20, 2, config.latent_query_num),
    }


def _pi0(config: Any, noise: Callable, ids: Callable) -> dict[str, Any]:
    vlm, patches = config.vlm_config, 16
    return {
        "action_embeds": noise(5, config.dit_config.hidden_size),
        "input_ids": torch.cat([torch.full((1, patches), vlm.image_token_id), ids(6)], 1),
        "pixel_values": noise(1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.long),
        "attention_mask": torch.ones(1, patches + 6, dtype=torch.long),
    }


def _question_and_video(config: Any, noise: Callable, ids: Callable) -> dict[str, Any]:
    frames = torch.full((1, 4 * config.num_query_tokens), config.video_token_index)
    return {
        "pixel_values": noise(4, 3, 32, 32),
        "input_ids": torch.cat([frames, ids(9)], 1),
        "qformer_input_ids": ids(7),
    }


_MADE: dict[str, Callable[..., dict[str, Any]]] = {
    "bridgetower": _text_and_picture,
    "clvp": lambda config, noise, ids: {
        "input_ids": ids(9),
        "input_features": noise(config.decoder_config.feature_size, 40),
    },
    "decision_transformer": _decisions,
    "flava": _text_and_picture,
    "instructblipvideo": _question_and_video,
    "kosmos-2": _kosmos_2,
    "kosmos-2.5": _kosmos_2_5,
    "lightglue": lambda _, noise, __: {"pixel_values": noise(2, 3, 48, 64)},
    "muse_glimmer_assistant": lambda config, noise, _: {
        "noise_embeds": noise(5, config.hidden_size),
        "context_hidden_states": noise(7, config.hidden_size * len(config.target_layer_ids)),
    },
    "pi0": _pi0,
    "pp_ocrv5_mobile_rec": lambda _, noise, __: {"pixel_values": noise(3, 96, 160)},
    "pp_ocrv6_small_rec": lambda _, noise, __: {"pixel_values": noise(3, 64, 96)},
    "videoprism": lambda _, noise, ids: {
        "pixel_values_videos": noise(4, 3, 32, 32),
        "input_ids": ids(9),
    },
    "voxtral_realtime": lambda config, noise, ids: {
        "input_ids": ids(8),
        "input_features": noise(config.audio_config.num_mel_bins, 64),
        "num_delay_tokens": 2,
    },
}
