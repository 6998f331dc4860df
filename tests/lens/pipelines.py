"""Tiny random pipelines of diffusers, made of configurations: tokenizers, text encoders, autoencoder, denoiser, scheduler."""

from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("a", "red", "cube", "on", "ball", "green")
WIDTH = 32


def _tokenizer(length: int) -> Any:
    """Of whole words, with a token before and behind a text."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length, **special
    )


def _clip(kind: Any = transformers.CLIPTextModel, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH, projection_dim=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=3,
        vocab_size=10, max_position_embeddings=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return kind(config).eval()


def _t5() -> Any:
    torch.manual_seed(1)
    config = transformers.T5Config(
        vocab_size=10, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def _autoencoder(**more: Any) -> Any:
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), layers_per_block=1, **more,
    ).eval()  # fmt: skip


def stable_diffusion() -> Any:
    """A UNet that reads a CLIP."""
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=_autoencoder(), text_encoder=_clip(), tokenizer=_tokenizer(12), unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pixart() -> Any:
    """A transformer that reads a T5."""
    torch.manual_seed(3)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=32, num_layers=1, patch_size=32, attention_head_dim=8, num_attention_heads=3, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=_tokenizer(12), text_encoder=_t5(), vae=_autoencoder(), transformer=transformer.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    )  # fmt: skip


def sd3() -> Any:
    """MMDiT: joint attention of a picture, two CLIPs and a T5."""
    torch.manual_seed(3)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )  # fmt: skip
    with_projection = transformers.CLIPTextModelWithProjection
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(shift_factor=0.06, scaling_factor=1.5), text_encoder=_clip(with_projection, 4), tokenizer=_tokenizer(12),
        text_encoder_2=_clip(with_projection, 5), tokenizer_2=_tokenizer(12), text_encoder_3=_t5(), tokenizer_3=_tokenizer(12),
    )  # fmt: skip


def dit() -> Any:
    """A transformer that reads the number of a class."""
    torch.manual_seed(3)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    return diffusers.DiTPipeline(transformer.eval(), _autoencoder(), scheduler)


PIPELINES = {one.__name__: one for one in (stable_diffusion, pixart, sd3, dit)}
