"""Pictures as PNG files, written and read without an imaging library."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

_START = b"\x89PNG\r\n\x1a\n"


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a [height, width, 3] uint8 picture."""
    height, width, _ = picture.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    found = _START
    for kind, data in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(lines.tobytes())),
        (b"IEND", b""),
    ):
        found += struct.pack(">I", len(data)) + kind + data
        found += struct.pack(">I", zlib.crc32(kind + data))
    return found


def pixels_of(file: bytes) -> np.ndarray:
    """[height, width, 3] uint8 of a file that `png` wrote.

    Raises:
        ValueError: another file.
    """
    if file[:8] != _START or file[12:16] != b"IHDR" or file[24:26] != b"\x08\x02":
        raise ValueError("no PNG of 8-bit colours")
    width, height = struct.unpack(">II", file[16:24])
    start, parts = 8, b""
    while start < len(file):
        (size,) = struct.unpack(">I", file[start : start + 4])
        if file[start + 4 : start + 8] == b"IDAT":
            parts += file[start + 8 : start + 8 + size]
        start += size + 12
    limit = height * (width * 3 + 1)
    data = zlib.decompressobj().decompress(parts, limit)
    lines = np.frombuffer(data, np.uint8)
    if not 0 < len(lines) == limit or (lines := lines.reshape(height, -1))[:, 0].any():
        raise ValueError("a PNG that is filtered or cut off")
    return lines[:, 1:].reshape(height, width, 3).copy()


def as_uri(picture: np.ndarray) -> str:
    """The picture as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()
