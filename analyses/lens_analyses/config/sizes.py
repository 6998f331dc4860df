"""What steps cut short on large models. No torch: `--dry-run` reads it too."""

LARGE = 20_000_000
"""Weights; of larger models gates are not trained, and `lens heads` measures without ablation unless asked to."""

FEW_PROMPTS, PROMPTS = 8, 32
"""Of `lens heads` where no number is asked for: with a large model, and else."""

MOST_REMOVED = 24
"""Sub-layers of a model whose greedy removal is run: its cost grows with their square."""

_MANY = 64  # heads; beyond, the pruning curve is short


def pruning_size(heads: int) -> tuple[int | None, int]:
    """Points of the pruning curve (None: one a head) and random orders beside it."""
    return (None, 8) if heads <= _MANY else (24, 2)


def heads_by_position(heads: int, tokens: float) -> bool:
    """Whether heads are patched token by token."""
    return heads * tokens <= 1024
