"""How the importance of heads is measured: a word, or an object where a method takes arguments of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lens.common.choices import check_choice
from lens.common.errors import LensError

Method = Literal["ablation", "gradient", "attribution", "atp", "gate", "direct"]
Baseline = Literal["zero", "mean", "pooled_mean", "resample", "counterfactual", "optimal"]
Absolute = Literal["prompt", "token"]
BASELINES: Mapping[str, tuple[Baseline, ...]] = {
    "ablation": ("mean", "zero", "pooled_mean", "resample", "counterfactual", "optimal"),
    "attribution": ("counterfactual", "zero", "mean", "pooled_mean", "resample"),
    "atp": ("counterfactual", "resample"),
    "gradient": ("zero",),
    "gate": ("zero",),
    "direct": ("zero",),
}
"""Baselines that each method knows, its usual one first."""
READS = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class Gradient:
    """`dO . O`, the first-order estimate of what zero in place of the head costs.

    Attributes:
        absolute: "token" takes the size for each token before the sum, as Michel et al.'s code does,
            "prompt" that of the sum, as they write it. Both lose the sign. None: neither.

    Raises:
        LensError: another word.

    Example:
        >>> task = lens.tasks.induction(small, n=4)
        >>> lens.heads.importance(small, task, method=lens.heads.Gradient("token")).label
        'gradient (absolute per token)'
    """

    absolute: Absolute | None = None

    def __post_init__(self) -> None:
        _check_absolute(self.absolute)


@dataclass(frozen=True)
class AtP:
    """Query, key and value patched, each position alone, the softmax recomputed (`lens.heads.measures.atp`).

    Attributes:
        reads: which of them are patched, some of "qkv".
        grad_drop: average absolute effects over passes with one layer's gradient blocked; effects are
            then absolute for each token.
        absolute: as of `Gradient`.

    Reference: Kramár et al., AtP*, 2024, arXiv 2403.00745.

    Raises:
        LensError: not some of "q", "k" and "v", or arguments that do not go together.

    Example:
        >>> task = lens.tasks.induction(small, n=4)
        >>> lens.heads.importance(small, task, method=lens.heads.AtP(reads="qk")).intervention.granularity
        'query and key of the head, each position alone, softmax recomputed'
    """

    reads: str = "qkv"
    grad_drop: bool = False
    absolute: Absolute | None = None

    def __post_init__(self) -> None:
        letters = set(self.reads)
        if not letters or letters - set(READS) or len(letters) < len(self.reads):
            raise LensError(
                f"reads must be some of 'q', 'k' and 'v', such as 'qk'; got {self.reads!r}"
            )
        _check_absolute(self.absolute)
        if self.grad_drop and self.absolute == "prompt":
            raise LensError(
                "grad_drop takes absolute values of each position: absolute='token' or None"
            )
        if self.grad_drop:
            object.__setattr__(self, "absolute", "token")

    @property
    def granularity(self) -> str:
        """What is patched, in words."""
        names = " and ".join(READS[letter] for letter in self.reads)
        return f"{names} of the head, each position alone, softmax recomputed"


def named(method: Method | Gradient | AtP) -> tuple[str, Gradient | AtP]:
    """The word of a method, and its arguments; those of a word are the usual ones.

    Raises:
        LensError: an unknown word.
    """
    if isinstance(method, Gradient):
        return "gradient", method
    if isinstance(method, AtP):
        return "atp", method
    word = check_choice("method", method, Method)
    return word, AtP() if word == "atp" else Gradient()


def _check_absolute(absolute: Absolute | None) -> None:
    if absolute is not None:
        check_choice("absolute", absolute, Absolute)
