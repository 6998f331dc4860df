"""Tiny random denoisers of diffusers, and what they read."""

import diffusers
import torch

WORDS = 7


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    ids = torch.zeros(12, 3)
    ids[:, 1], ids[:, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    return model.eval(), {
        "hidden_states": torch.randn(1, 12, 4),
        "encoder_hidden_states": torch.randn(1, WORDS, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(WORDS, 3),
    }


def sd3():
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=16, dual_attention_layers=(0,),
        qk_norm="rms_norm", pos_embed_max_size=8,
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "encoder_hidden_states": torch.randn(2, WORDS, 32),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3.0, 3.0]),
    }


def pixart():
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=16, in_channels=4, cross_attention_dim=24, out_channels=8,
        num_embeds_ada_norm=8, use_additional_conditions=False,
    )  # fmt: skip
    mask = torch.ones(2, WORDS)
    mask[1, 4:] = 0
    return model.eval(), {
        "hidden_states": torch.randn(2, 4, 8, 6),
        "encoder_hidden_states": torch.randn(2, WORDS, 16),
        "timestep": torch.tensor([3, 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": mask,
    }


def dit():
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
        in_channels=4, out_channels=8, num_embeds_ada_norm=8,
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 2]),
    }


def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4,
        out_channels=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    return model.eval(), {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 10,
        "encoder_hidden_states": torch.randn(2, WORDS, 32),
    }


def wan():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 3, 8, 6),
        "encoder_hidden_states": torch.randn(1, WORDS, 16),
        "timestep": torch.tensor([3]),
    }


DENOISERS = {one.__name__: one for one in (flux, sd3, pixart, dit, unet, wan)}
