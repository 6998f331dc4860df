"""Tasks that need no data set: copying random tokens, and predicting text."""

from collections.abc import Sequence
from typing import Any

import torch

from lens.common.choices import check_counts, check_lists
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.vocabulary import around, windows
from lens.passes.inputs import model_input
from lens.passes.logits import check_predicts_tokens, fills_masks
from lens.passes.sources import read_sources
from lens.tasks.prompts import copied
from lens.tasks.task import Task

_SEEDS = 1_000_003  # a prime: prompts of different seeds share no draw
_MASKED = 0.15  # of a prompt's tokens, as BERT was trained


def induction(
    model: LoadedModel, n: int = 64, seed: int = 0, *, length: int = 25, metric: str = "loss"
) -> Task:
    """Copying: `BOS + r + r`, r random tokens; the metric is on the second copy.

    Answers are the tokens of the second copy from its second on (nothing tells its first); of a masked
    language model 15 % of the second copy, which are masked. A corrupt
    prompt is `BOS + r' + r`: the same end, and nothing to copy from.

    Args:
        model: whose vocabulary to draw from.
        n: number of prompts.
        seed: of the draws.
        length: tokens of r.
        metric: "loss" or "accuracy".

    Reference: Olsson et al., In-context Learning and Induction Heads, 2022, arXiv 2209.11895.

    Raises:
        LensError: no prompts, a length that does not fit the model, or a classifier.

    Example:
        >>> task = lens.tasks.induction(small, n=8, metric="accuracy")
        >>> float(task.evaluate(small).mean())
        1.0
    """
    check_predicts_tokens(model)
    check_counts(n=n)
    check_counts(0, seed=seed, length=length)
    if length < 2:
        raise LensError(f"length must be at least 2 to have a token to copy, got {length}")
    first = seed * _SEEDS % 2**62  # torch draws from seeds of 64 bits
    clean = torch.tensor([copied(model, length, first + 2 * row) for row in range(n)])
    other = torch.tensor([copied(model, length, first + 2 * row + 1) for row in range(n)])
    start = clean.shape[1] - length  # first token of the second copy
    corrupt = torch.cat([other[:, :start], clean[:, start:]], 1)
    if fills_masks(model):
        return _masked(model, "induction", clean, metric, seed, first=start, corrupt=corrupt)
    positions = torch.arange(start, clean.shape[1] - 1).expand(n, -1)
    return Task("induction", clean, positions, clean[:, start + 1 :], metric, corrupt)


def language_modelling(
    model: LoadedModel,
    texts: Any,
    *,
    length: int | None = None,
    n: int | None = None,
    metric: str = "loss",
) -> Task:
    """Predicting each next token of a text, or with a masked language model 15 % of them, which are masked.

    Args:
        model: whose tokens to use.
        texts: of an encoder-decoder pairs (source, target) whose targets have one length, and whose sources have, as
            for `lens.capture`. Of other models a text or several, cut into windows of `length` tokens, each between the
            special tokens that the tokenizer puts round a text; or windows of token ids, all of one length, taken as they are.
        length: tokens of a window of text, special ones included; None: what the model takes.
        n: use only the first n windows; None: all. The rest of a text that fills no window is left out.
        metric: "loss" or "accuracy".

    Raises:
        LensError: no whole window, windows of differing lengths, no length to cut to, or a classifier.

    Example:
        >>> lens.tasks.language_modelling(model, lens.tasks.text("lily"), length=32, n=4)
        Task(language modelling: 4 prompts of 32 tokens, without corrupt ones; loss, less is better)
    """
    check_predicts_tokens(model)
    if model.is_encoder_decoder:
        return _translating(model, texts, n, metric)
    if isinstance(texts, str):
        texts = [texts]
    check_lists(texts=texts)
    if not len(texts):
        raise LensError("no texts were given; pass a text, several, or windows of token ids")
    found: list[list[int]] = []
    for text in texts:
        found += _cut(model, text, length) if isinstance(text, str) else [_ids(model, text)]
    if n is not None:
        found = _first(found, n, "windows")
    lengths = sorted({len(window) for window in found})
    if len(lengths) != 1 or lengths[0] < 2:
        raise LensError(
            f"windows must have one length of at least 2 tokens, got the lengths {lengths}"
        )
    clean = torch.tensor(found)
    if fills_masks(model):
        return _masked(model, "masked tokens", clean, metric, 0, first=0)
    positions = torch.arange(lengths[0] - 1).expand(len(found), -1)
    return Task("language modelling", clean, positions, clean[:, 1:], metric)


def _first(found: list[Any], n: int, what: str) -> list[Any]:
    check_counts(n=n)
    if len(found) < n:
        raise LensError(f"the texts make {len(found)} {what}, {n} were asked for")
    return found[:n]


def _translating(model: LoadedModel, pairs: Any, n: int | None, metric: str) -> Task:
    """Predicting the targets of an encoder-decoder from the second token on."""
    found = read_sources(model, pairs)[0]
    if n is not None:
        found = _first(found, n, "pairs")
    main = model_input(model)
    sources = [prompt.inputs[main] for prompt in found]
    targets = [prompt.target or [] for prompt in found]
    lengths = sorted({len(one) for one in targets})
    if len(lengths) != 1 or lengths[0] < 2 or len({one.shape for one in sources}) != 1:
        raise LensError(
            f"a task takes sources of one length and targets of one length of at least 2 tokens, got targets of {lengths}; "
            "lens.effect and lens.heads.importance take the pairs themselves, of any lengths"
        )
    ids = torch.tensor(targets)
    positions = torch.arange(lengths[0] - 1).expand(len(ids), -1)
    clean = torch.cat(sources).cpu()
    return Task("targets", clean, positions, ids[:, 1:], metric, targets=ids)


def _ids(model: LoadedModel, window: Sequence[int]) -> list[int]:
    model.check_ids(window)
    return [int(one) for one in window]


def _cut(model: LoadedModel, text: str, length: int | None) -> list[list[int]]:
    """Windows of `length` tokens of one text."""
    length = model.info.context if length is None else length
    if length is not None:
        check_counts(0, length=length)
    if length is None or length < 3:
        raise LensError(f"length must be at least 3 tokens, got {length}; e.g. length=128")
    ids = model.encode(text)
    found = windows(ids, length, around(model))
    if not found:
        raise LensError(
            f"a text has {len(ids)} tokens of {model.name}, less than one window of {length}"
        )
    return found


def _masked(
    model: LoadedModel,
    name: str,
    clean: torch.Tensor,
    metric: str,
    seed: int,
    *,
    first: int,
    corrupt: torch.Tensor | None = None,
) -> Task:
    """The prompts with 15 % of their tokens from `first` on masked, and these as answers.

    Raises:
        LensError: a tokenizer without a mask token.
    """
    check_counts(0, seed=seed)
    mask = getattr(model.tokenizer, "mask_token_id", None)
    if mask is None:
        raise LensError(
            f"{model.name} fills in masked tokens, and its tokenizer has no mask token; give one that has: "
            "lens.load(..., tokenizer=...)"
        )
    special = torch.tensor(sorted(getattr(model.tokenizer, "all_special_ids", ())))
    drawn = torch.rand(clean.shape, generator=torch.Generator().manual_seed(seed))
    drawn[torch.isin(clean, special)] = -1.0
    drawn[:, :first] = -1.0
    count = max(1, round(_MASKED * int((drawn >= 0).sum(1).min())))
    positions = drawn.topk(count, 1).indices.sort(1).values
    filled = [None if ids is None else ids.scatter(1, positions, mask) for ids in (clean, corrupt)]
    assert filled[0] is not None
    return Task(name, filled[0], positions, clean.gather(1, positions), metric, filled[1])
