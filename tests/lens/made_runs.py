"""Entries of `run.json` for tests that write a run by hand."""

from typing import Any


def meta(**changes: Any) -> dict[str, Any]:
    """All entries that a command gives `RunWriter.start`, of a model of 2 layers and 3 heads."""
    model = {
        "name": "text-lm-3l",
        "class": "Made",
        "revision": None,
        "layers": 2,
        "heads": 3,
        "kv_heads": 3,
        "head_dim": 4,
        "vocab": 5,
        "context": 64,
        "parameters": 7,
        "dtype": "float32",
        "licence": "unknown",
    }
    return {
        "title": "text-lm-3l on two prompts",
        "what": "profile",
        "command": "lens run",
        "device": "cpu",
        "backend": "reference",
        "block_size": 16,
        "seed": 0,
        "bos": "absent",
        "prompts": {"total": 2, "done": 0},
        "versions": {"attention-lens": "0.1.0"},
        **changes,
        "model": {**model, **changes.get("model", {})},
    }
