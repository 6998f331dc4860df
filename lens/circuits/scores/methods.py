"""How edges are scored: a word, or an object where a method takes arguments of its own."""

from dataclasses import dataclass
from typing import Literal, get_args

from lens.common.choices import check_between, check_choice, check_counts
from lens.common.errors import LensError

Method = Literal[
    "exact", "eap", "clean-corrupted", "eap-ig", "eap-ig-activations", "eap-ig-stages",
    "atp*", "atp*-together", "atp*-grad-drop", "relp", "relp-values", "hybrid",
]  # fmt: skip
Over = Literal["inputs", "activations", "stages"]
Rule = Literal["midpoint", "left"]
_WORDS: dict[Over, Method] = {
    "inputs": "eap-ig",
    "activations": "eap-ig-activations",
    "stages": "eap-ig-stages",
}


@dataclass(frozen=True)
class EapIg:
    """Integrated gradients: the gradient is a mean over steps from the reference to the clean prompt.

    Attributes:
        steps: at least 1; "auto" (over inputs alone) doubles 5 until what is missing of the whole effect, mean
            size over the prompts, is below 1 % of it.
        rule: "midpoint", or "left", as published code does: over inputs it starts at the reference, over
            activations one step after it.
        over: what is interpolated: "inputs" (the method "eap-ig"), "activations" or "stages", see
            `lens.circuits.score_edges`.

    Raises:
        LensError: another word, or no number of steps.

    Example:
        >>> lens.circuits.score_edges(small, copying, method=lens.circuits.EapIg(steps=2)).steps
        2
    """

    steps: int | Literal["auto"] = 5
    rule: Rule = "midpoint"
    over: Over = "inputs"

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, Rule)
        check_choice("over", self.over, Over)
        if self.steps != "auto":
            check_counts(steps=self.steps)
        elif self.over != "inputs":
            raise LensError(
                f"steps='auto' belongs to over='inputs', got {self.over!r}; give a number"
            )

    @property
    def word(self) -> Method:
        """The method's name."""
        return _WORDS[self.over]


@dataclass(frozen=True)
class Hybrid:
    """The mean of the scores of several methods, each divided by its root mean square over the edges.

    It is given back in the scale of the first of them, so that it is in units of the metric.

    Attributes:
        methods: words or objects; at least two.
        pruning: share of the edges that edge pruning takes out, above 0 and below 1: its probabilities that an edge is kept,
            with the sign of the first method, are one part more; its gates start from that method's sizes. None: without,
            as it takes `steps` passes with gradients.
        steps: of edge pruning.

    Raises:
        LensError: fewer than two, a hybrid in it, what is no method, or a share or a number of steps that is none.

    Reference: the hybrid entry of the Mechanistic Interpretability Benchmark, 2025, arXiv 2510.06811, which has edge pruning in
        it.

    Example:
        >>> lens.circuits.score_edges(small, copying, method=lens.circuits.scores.Hybrid(("eap", "exact"))).method
        'hybrid'
    """

    methods: tuple[Method | EapIg, ...] = ("eap-ig", "eap", "eap-ig-activations")
    pruning: float | None = None
    steps: int = 300

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)
        if self.pruning is not None:
            check_between(0, 1, pruning=[self.pruning])
        given = self.methods
        if isinstance(given, str) or len(given) < 2:
            raise LensError(f"Hybrid takes at least two methods, got {given!r}")
        if "hybrid" in [named(one)[0] for one in given]:
            raise LensError("Hybrid takes plain methods, got a hybrid")
        object.__setattr__(self, "methods", tuple(given))


def named(method: Method | EapIg) -> tuple[Method, EapIg | None]:
    """The method's name, and its steps where it has any.

    Raises:
        LensError: no such method.
    """
    if isinstance(method, EapIg):
        return method.word, method
    check_choice("method", method, get_args(Method))
    return method, next((EapIg(over=over) for over in _WORDS if _WORDS[over] == method), None)
