"""Scores of blocks of a long prompt: what is exact there, and what is approximate, which is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import Count
from lens.common.progress import advancing
from lens.common.results import Result, Sentence
from lens.models.loaded import LoadedModel
from lens.reading import _blocks
from lens.reading._answers import Answer
from lens.reading.attributing import Method, along_path, times
from lens.reading.judged import APPROXIMATE

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True, repr=False, eq=False)
class BlockScores(Result):
    """How much each block of a prompt matters to the answer, by one method.

    Attributes:
        values: [blocks].
        block: tokens of each; of the last what is left.
        texts: of each block.
        method: as in `lens.reading.attribute`.
        approximate: whether the sum of the tokens' own scores would be another number.
        model: its name.
    """

    values: Float[np.ndarray, " blocks"]
    block: int
    texts: tuple[str, ...]
    method: str
    approximate: bool
    model: str

    def table(self) -> pd.DataFrame:
        """One row per block: `block`, `first` (its first token), `score`, `approximate`, `text`."""
        count = np.arange(len(self.values))
        return pd.DataFrame(
            {
                "block": count,
                "first": count * self.block,
                "score": self.values,
                "approximate": self.approximate,
                "text": self.texts,
            }
        )

    def findings(self) -> tuple[Sentence, ...]:
        """The blocks that score highest ("best"), and what the numbers are ("limit")."""
        median = float(np.median(self.values))
        best = ", ".join(
            f"{place} (from token {place * self.block}) {self.values[place]:.3g}"
            for place in np.argsort(-self.values, kind="stable")[:3]
        )
        kind = (
            "approximate: maps of layers are multiplied as means over blocks"
            if self.approximate
            else "exact: what the block has as a whole, deleted at once"
            if self.method == "leave_one_out"
            else "exact: the sum of its tokens' scores"
        )
        return (
            Sentence(
                f"By {self.method} the blocks {best} score highest; the median block has {median:.3g}.",
                kind="best",
            ),
            Sentence(f"The score of a block of {self.block} tokens is {kind}.", kind="limit"),
        )


def attribute_blocks(
    model: LoadedModel,
    prompt: Any,
    method: Method,
    *,
    block: Count = 64,
    answer: int | None = None,
    progress: bool = True,
) -> BlockScores:
    """A score for each block of a prompt of any length, by the methods of `attribute`; no map of all queries and keys is held.

    Exact, the sum over the block's tokens: raw, effective, norm, gradient_attention, gradient_input, integrated_gradients,
    attnlrp, cp_lrp. leave_one_out deletes whole blocks. Approximate, and said so: rollout, flow and gradient_rollout, of
    maps of blocks, which are those of tokens where attention is even inside of blocks; `flow` takes at most 128 blocks.

    Args:
        model, prompt, method, answer: as in `lens.reading.attribute`; prompts may be as long as the model takes.
        block: tokens of a block.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: as `attribute`, or a block of no tokens.

    Example:
        >>> found = lens.reading.attribute_blocks(small, lens.tasks.copied(small, 12), "attnlrp", block=5)
        >>> found.approximate, len(found.values)
        (False, 5)
    """
    with advancing(f"{model.name}: {method}", 1, progress) as advance:
        asked = Answer(model, prompt, answer, block=block)
        values = scored_blocks(asked, method)
        advance(1)
    tokens = model.token_strings(asked.ids[0].tolist())
    texts = ["".join(tokens[start : start + block]) for start in range(0, len(tokens), block)]
    return BlockScores(
        values=values.numpy(),
        block=block,
        texts=tuple(texts),
        method=method,
        approximate=method in APPROXIMATE and block > 1,
        model=model.name,
    )


def scored_blocks(answer: Answer, method: Method) -> Tensor:
    """[blocks], float64 on the CPU: `attribute_blocks` of an answer."""
    block = answer.block
    if method == "leave_one_out":
        return answer.probability - answer.kept(~torch.eye(answer.units, dtype=torch.bool))
    if method == "integrated_gradients":
        return _blocks.summed(along_path(answer, _blocks.BlockGradients), block)
    found = _blocks.BlockGradients(answer, method if method in ("attnlrp", "cp_lrp") else "plain")
    if method in _MAPS:
        return _MAPS[method](answer, found, block).cpu()
    if method in _TOKENS:
        return _blocks.summed(_TOKENS[method](answer, found), block).cpu()
    return _blocks.summed(times(found.hidden, answer.own), block)


_TOKENS: dict[str, Callable[[Answer, _blocks.BlockGradients], Tensor]] = {
    "raw": _blocks.raw,
    "effective": _blocks.effective,
    "norm": _blocks.norm,
    "gradient_attention": _blocks.gradient_attention,
}
_MAPS: dict[str, Callable[[Answer, _blocks.BlockGradients, int], Tensor]] = {
    "rollout": _blocks.rollout,
    "flow": _blocks.flow,
    "gradient_rollout": _blocks.gradient_rollout,
}
