"""Vision towers that look at what is bright, and pictures with one bright patch: where they look is known."""

import numpy as np
import torch
import transformers

import lens
from lens.traces.trace import TraceWriter

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "patch_size": 4,
}
REGISTERS = 3
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _square(side):
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=side))


def _registers():
    config = transformers.Dinov2WithRegistersConfig(
        **SMALL, image_size=24, num_register_tokens=REGISTERS
    )
    return transformers.Dinov2WithRegistersModel(config)


def _resized(height, width):
    return transformers.ViTImageProcessorPil(size={"height": height, "width": width}, **HALF)


def _cropped():
    return transformers.BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 24, "width": 40}, **HALF
    )


def _swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


# name: the network, its processor, the picture's size, patches, and where patch (0, 0) lies in the picture
TOWERS = {
    "square": (lambda: _square(24), lambda: _resized(24, 24), (24, 24), (6, 6), (0, 0, 4, 4)),
    "resized": (lambda: _square(24), lambda: _resized(24, 24), (72, 48), (6, 6), (0, 0, 8, 12)),
    "wide": (
        lambda: _square((16, 28)),
        lambda: _resized(16, 28),
        (32, 84),
        (4, 7),
        (0, 0, 12, 8),
    ),
    "registers": (_registers, _cropped, (64, 96), (6, 10), (8, 8, 16, 16)),
}


SWIN = (_swin, lambda: _resized(32, 32), (64, 96), (8, 8), (0, 0, 12, 8))
"""As one of `TOWERS`, in windows of 4 × 4 patches, in the second layer shifted by two."""


def looking_at_bright(name):
    """A loaded tower in which every position looks at the bright patches alone, of those that it sees."""
    torch.manual_seed(0)
    made, with_pictures, *_ = SWIN if name == "swin" else TOWERS[name]
    network, processor = made().eval(), with_pictures()
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            is_query, is_key = (
                ("query" in key or "q_proj" in key),
                ("key" in key or "k_proj" in key),
            )
            if "projection.weight" in key:
                parameter.zero_()
                parameter[0], parameter[1] = 1 / parameter[0].numel(), -1 / parameter[0].numel()
            elif is_key and key.endswith("weight"):
                parameter.zero_()
                parameter[0, 0] = parameter[4, 0] = 1.0
            elif is_query and key.endswith("bias"):
                parameter.fill_(20.0)
            elif "norm" not in key and "lambda" not in key:
                parameter.zero_()
    return lens.load(network, processor=processor)


def with_a_bright_patch(name, row, column):
    """The picture of a tower, black but for one patch, and the rectangle (top, bottom, left, right) of that."""
    _, _, (height, width), _, (left, top, right, bottom) = SWIN if name == "swin" else TOWERS[name]
    across, down = right - left, bottom - top
    picture = np.zeros((height, width, 3), np.uint8)
    ends = (top + row * down, top + (row + 1) * down, left + column * across, left + (column + 1) * across)  # fmt: skip
    picture[ends[0] : ends[1], ends[2] : ends[3]] = 255
    return picture, ends


def planted(patterns, height, width, order=None, special=0):
    """A trace of given attention [layers, heads, positions, positions] over a picture, with exact tiles."""
    layers, heads, length, _ = patterns.shape
    writer = TraceWriter()
    for layer, maps in enumerate(patterns):
        logits = np.log(np.maximum(maps, 1e-30)).astype(np.float32)
        keys = np.broadcast_to(np.eye(length, dtype=np.float32), maps.shape)
        rows = np.zeros((heads, length), np.float32)
        received = maps.sum(-2).astype(np.float32)
        writer.add_layer(layer, {"q": logits, "k": keys, "lse": rows, "received": received})
    attributes = {
        "model": "planted", "dtype": "float32", "backend": "given", "block_size": 4, "causal": False,
        "windows": [None] * layers, "scale": [1.0] * layers, "softcap": None, "prefix": 4, "bos": "absent",
        "segments": None, "patches": {"first": special, "height": height, "width": width, "order": order},
    }  # fmt: skip
    names = [f"[{n}]" for n in range(special)] + [str(n) for n in range(length - special)]
    return writer.finish(token_ids=[-1] * length, tokens=names, attributes=attributes)
