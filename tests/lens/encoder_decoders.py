"""Small random encoder-decoders of each kind, what they read, and what `eager` says of their attention."""

import torch
import transformers

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
    "decoder_start_token_id": 2,
}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_TEXT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}


def _bart():
    config = transformers.BartConfig(**SIZES, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config)


def _marian():
    config = transformers.MarianConfig(**SIZES, forced_eos_token_id=None)
    return transformers.MarianMTModel(config)


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=97, d_model=48, d_kv=12, d_ff=32, num_layers=3, num_decoder_layers=2,
            num_heads=4, decoder_start_token_id=0,
        )
    )  # fmt: skip


def _whisper():
    config = transformers.WhisperConfig(
        **SIZES, num_mel_bins=8, max_source_positions=20, max_target_positions=30,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _trocr():
    decoder = transformers.TrOCRConfig(
        vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2,
    )  # fmt: skip
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**_VIT), decoder
    )
    return transformers.VisionEncoderDecoderModel(config=both)


def _blip():
    text = {**_TEXT, "encoder_hidden_size": 32, "num_attention_heads": 4, "projection_dim": 16}
    text |= {"bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0, "eos_token_id": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=_VIT, projection_dim=16)
    return transformers.BlipForConditionalGeneration(config)


def _qformer():
    config = transformers.Blip2QFormerConfig(
        **{**_TEXT, "num_hidden_layers": 3}, num_attention_heads=4, encoder_hidden_size=24,
        cross_attention_frequency=2,
    )  # fmt: skip
    return transformers.Blip2QFormerModel(config)


def _detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"],
        layer_type="basic",
    )  # fmt: skip
    return transformers.DetrModel(
        transformers.DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
            backbone_config=backbone, d_model=32, encoder_layers=2, decoder_layers=3,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
            decoder_ffn_dim=40, num_queries=6,
        )
    )  # fmt: skip


MAKE = {
    "bart": _bart, "marian": _marian, "t5": _t5, "whisper": _whisper, "trocr": _trocr,
    "blip": _blip, "qformer": _qformer, "detr": _detr,
}  # fmt: skip


def made(name):
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # far from uniform attention
                parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter[0].numel() ** 0.5)
    return model


def inputs_of(name):
    drawn = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=drawn)

    ids, target = torch.tensor([[3, 4, 5, 6, 7, 8, 9]]), torch.tensor([[2, 30, 31, 32, 33]])
    return {
        "whisper": {"input_features": noise(1, 8, 40), "decoder_input_ids": target},
        "trocr": {"pixel_values": noise(1, 3, 16, 16), "decoder_input_ids": target},
        "blip": {"pixel_values": noise(1, 3, 16, 16), "input_ids": target},
        "qformer": {"query_embeds": noise(1, 5, 32), "encoder_hidden_states": noise(1, 9, 24)},
        "detr": {"pixel_values": noise(1, 3, 64, 96)},
    }.get(name, {"input_ids": ids, "decoder_input_ids": target})


def eager(name, model, given):
    """Part -> attention of each layer that has it, [heads, queries, keys]; of `eager` itself."""
    if name == "blip":
        image = model.vision_model(given["pixel_values"], output_attentions=True)
        text = model.text_decoder(
            input_ids=given["input_ids"], encoder_hidden_states=image[0], output_attentions=True
        )
        parts = image.attentions, text.attentions, text.cross_attentions
    else:
        found = model(**given, output_attentions=True)
        own = "attentions" if name == "qformer" else "decoder_attentions"
        parts = found.get("encoder_attentions"), found[own], found["cross_attentions"]
    if name == "qformer":  # its list holds both
        parts = None, [one for one in parts[1] if one.shape[-1] == 5], parts[2]
    return {
        part: [one[0] for one in layers if one is not None]
        for part, layers in zip(("encoder", "decoder", "cross"), parts, strict=True)
        if layers
    }
