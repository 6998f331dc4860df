"""Tasks that need no data set: copying random tokens, and predicting text."""

from collections.abc import Sequence

import torch

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel, check_loaded
from lens.tasks.prompts import copied
from lens.tasks.task import Task

_SEEDS = 1_000_003  # a prime: prompts of different seeds share no draw


def induction(
    model: LoadedModel, n: int = 64, seed: int = 0, *, length: int = 25, metric: str = "loss"
) -> Task:
    """Copying: `BOS + r + r`, r random tokens; the metric is on the second copy.

    Answers are the tokens of the second copy from its second on (nothing tells its first). A corrupt
    prompt is `BOS + r' + r`: the same end, and nothing to copy from.

    Args:
        model: whose vocabulary to draw from.
        n: number of prompts.
        seed: of the draws.
        length: tokens of r.
        metric: "loss" or "accuracy".

    Reference: Olsson et al., In-context Learning and Induction Heads, 2022, arXiv 2209.11895.

    Raises:
        LensError: no prompts, or a length that does not fit the model.

    Example:
        >>> task = lens.tasks.induction(small, n=8, metric="accuracy")
        >>> float(task.evaluate(small).mean())
        1.0
    """
    check_loaded(model)
    _positive("n", n)
    if length < 2:
        raise LensError(f"length must be at least 2 to have a token to copy, got {length}")
    first = seed * _SEEDS
    clean = torch.tensor([copied(model, length, first + 2 * row) for row in range(n)])
    other = torch.tensor([copied(model, length, first + 2 * row + 1) for row in range(n)])
    start = clean.shape[1] - length  # first token of the second copy
    corrupt = torch.cat([other[:, :start], clean[:, start:]], 1)
    positions = torch.arange(start, clean.shape[1] - 1).expand(n, -1)
    return Task("induction", clean, positions, clean[:, start + 1 :], metric, corrupt)


def language_modelling(
    model: LoadedModel,
    texts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    length: int | None = None,
    n: int | None = None,
    metric: str = "loss",
) -> Task:
    """Predicting each next token of a text.

    Args:
        model: whose tokens to use.
        texts: a text or several, cut into windows of `length` tokens, each after a BOS if the
            tokenizer puts one first; or windows of token ids, all of one length, taken as they are.
        length: tokens of a window of text, BOS included; None: what the model takes.
        n: use only the first n windows; None: all. The rest of a text that fills no window is left out.
        metric: "loss" or "accuracy".

    Raises:
        LensError: no whole window, windows of differing lengths, or no length to cut to.

    Example:
        >>> lens.tasks.language_modelling(model, lens.tasks.text("lily"), length=32, n=4)
        Task(language modelling: 4 prompts of 32 tokens, without corrupt ones; loss, less is better)
    """
    check_loaded(model)
    if isinstance(texts, str):
        texts = [texts]
    if not len(texts):
        raise LensError("no texts were given; pass a text, several, or windows of token ids")
    windows: list[list[int]] = []
    for text in texts:
        windows += _cut(model, text, length) if isinstance(text, str) else [list(text)]
    if n is not None:
        _positive("n", n)
        if len(windows) < n:
            raise LensError(f"the texts make {len(windows)} windows, {n} were asked for")
        windows = windows[:n]
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or lengths[0] < 2:
        raise LensError(
            f"windows must have one length of at least 2 tokens, got the lengths {lengths}"
        )
    clean = torch.tensor(windows)
    positions = torch.arange(lengths[0] - 1).expand(len(windows), -1)
    return Task("language modelling", clean, positions, clean[:, 1:], metric)


def _cut(model: LoadedModel, text: str, length: int | None) -> list[list[int]]:
    """Windows of `length` tokens of one text."""
    length = model.info.context if length is None else length
    if length is None or length < 3:
        raise LensError(f"length must be at least 3 tokens, got {length}; e.g. length=128")
    ids = model.encode(text)
    start = ids[:1] if ids[0] == model.bos_id else []
    body, size = ids[len(start) :], length - len(start)
    windows = [start + body[at : at + size] for at in range(0, len(body) - size + 1, size)]
    if not windows:
        raise LensError(
            f"a text has {len(ids)} tokens of {model.name}, less than one window of {length}"
        )
    return windows


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LensError(f"{name} must be a positive integer, got {value!r}")
