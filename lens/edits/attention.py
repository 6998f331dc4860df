"""Edits of the attention that chosen heads pay to chosen keys.

With `m_S` the mass that a row gives to the keys S, `a` the amount and P its probabilities:

    Mask          P_S (1 - a), then all divided by their sum 1 - a m_S
    Drop          P_S (1 - a), and nothing else: rows sum to 1 - a m_S
    Bias          softmax of the logits with a added to those of S
    Move          P_S (1 - a), P_T (1 + a m_S / m_T), the rest as it was (VAR's transfer)
    LearnedSink   all divided by 1 + a exp(-lse), a = exp(logit of the sink)
    Value         P as it was, the values of S become 0 or the mean of the others
    Knockout      Mask in chosen rows: edges between queries and keys
    Force         (1 - a) P + a w, w on chosen keys alone, in chosen rows

An amount of 0 changes nothing. A row that has nowhere to put the mass (every key that it sees is masked,
or those that should receive hold below 1e-8) is left as it is and counted.

Several at once: each acts on the probabilities that the one before it left, in the order given. What a
`Drop` or a `LearnedSink` takes away goes to no key and stays there: a `Mask` or `Bias` after it divides
by a sum that counts it, as that of a model with learned sinks does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from lens.common.choices import check_choice, is_number
from lens.common.errors import LensError
from lens.edits._keyed import KeyedEdit, Plan, Rule
from lens.edits.language import OfHeads, Running, check_number, plain_keys
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys, members


@dataclass(frozen=True)
class AttentionOfKeys(OfHeads):
    """An edit of the attention that heads pay to keys."""

    _rule: ClassVar[Rule]
    _keys: ClassVar[tuple[str, ...]] = ("keys",)
    _range: ClassVar[tuple[float, float]] = (0, 1)

    def __post_init__(self) -> None:
        for name in self._keys:
            if (keys := getattr(self, name)) is not None:
                object.__setattr__(self, name, plain_keys(name, keys))
        super().__post_init__()
        check_number(f"amount of {type(self).__name__}", self.dose, *self._range)

    @property
    def asked(self) -> str:
        """The field with the keys that controls stand in for."""
        return "keys"

    @property
    def words(self) -> str:
        """See `Edit`: "Mask first", "Value [0, 5] to mean", "Move to first"."""
        if not self._keys:
            return super().words
        keys = getattr(self, self.asked)
        shown = keys if isinstance(keys, str) else list(keys) if isinstance(keys, tuple) else "keys"
        return f"{type(self).__name__} {'to ' * (self.asked == 'to')}{shown}"

    def plan(self) -> Plan:
        """What is done to the attention."""
        given: dict[str, Any] = {name: getattr(self, name) for name in self._keys}
        keys = given.pop("keys", None)
        return Plan(self._rule, self.dose, keys, **given)

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        edit = KeyedEdit(self.plan(), self.chosen(model), backend, type(self).__name__)
        return Running(edit, edit)


@dataclass(frozen=True)
class Mask(AttentionOfKeys):
    """Keys lose a share of their weight, and rows are normalised again; 1 hides them.

        P_S (1 - a), then all divided by their sum

    Attributes:
        keys: "first", positions from the first real token, a bool tensor over the positions, or a
            function of `KeysAt`, called at each layer and step, that returns bool [keys] or [batch, keys].
        amount: share, 0 to 1.
        heads: such as "L3H5", those to edit; None: all.
        layers: all heads of these, instead of `heads`.

    Raises:
        LensError: keys, amount, heads or layers that make no sense.

    Example:
        >>> with lens.edit(model, lens.edits.Mask("first")):
        ...     model.logits("It was the best of times")
    """

    _rule = "mask"
    keys: Keys = "first"
    amount: float = 1.0


@dataclass(frozen=True)
class Drop(AttentionOfKeys):
    """Keys lose a share of their weight, and nothing else changes: rows sum to 1 - a m_S.

    Attributes:
        keys, amount, heads, layers: as of `Mask`.

    Raises:
        LensError: as `Mask`.

    Example:
        >>> with lens.edit(model, lens.edits.Drop([0, 1], 0.5, heads=["L1H0"])):
        ...     model.logits("It was the best of times")
    """

    _rule = "drop"
    keys: Keys = "first"
    amount: float = 1.0


@dataclass(frozen=True)
class Bias(AttentionOfKeys):
    """A number is added to the logits of keys; `log(1 - a)` is `Mask` with the amount a.

    Attributes:
        keys, heads, layers: as of `Mask`.
        amount: what is added, nats; -inf hides the keys.

    Raises:
        LensError: as `Mask`, or an amount of +inf.

    Example:
        >>> with lens.edit(model, lens.edits.Bias("first", -2.0)):
        ...     model.logits("It was the best of times")
    """

    _rule = "bias"
    _range = (-math.inf, math.inf)
    keys: Keys
    amount: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amount == math.inf:
            raise LensError("amount of Bias is added to logits and cannot be +inf")


@dataclass(frozen=True)
class Move(AttentionOfKeys):
    """A share of what keys hold goes to others, in proportion to what these hold: rows keep their sum.

        P_S (1 - a), P_T (1 + a m_S / m_T)

    Attributes:
        keys, heads, layers: as of `Mask`; keys of None: all that do not receive, so that with an amount
            of 1 rows look at `to` alone.
        to: keys that receive, in the same forms; None: all others that the row sees.
        amount: share, 0 to 1.

    Raises:
        LensError: as `Mask`, or neither keys nor to; while it runs, a key that is in both.

    Reference: VAR, arXiv 2503.03321.

    Example:
        >>> with lens.edit(model, lens.edits.Move("first", to=[2, 3], amount=0.6)):
        ...     model.logits("It was the best of times")
    """

    _rule = "move"
    _keys = ("keys", "to")
    keys: Keys | None = "first"
    to: Keys | None = None
    amount: float = 1.0

    def __post_init__(self) -> None:
        if self.keys is None and self.to is None:
            raise LensError("Move needs keys that lose, or keys (to) that receive, or both")
        super().__post_init__()

    @property
    def asked(self) -> str:
        """See `AttentionOfKeys`; where all others lose, those that receive."""
        return "to" if self.keys is None else "keys"

    def plan(self) -> Plan:
        """See `AttentionOfKeys`."""
        found, to = super().plan(), self.to
        if self.keys is None and to is not None:
            return replace(found, keys=lambda at: ~members("to", to, at))
        return found


@dataclass(frozen=True)
class LearnedSink(AttentionOfKeys):
    """Rows get a learned sink with a value of 0, as gpt-oss has them.

        all divided by 1 + a exp(-lse)

    Attributes:
        amount: a = exp(logit of the sink); 1 is softmax-off-by-one, `exp(x) / (1 + sum exp(x))`; 0 is none.
        heads, layers: as of `Mask`.

    Raises:
        LensError: an amount below 0 or infinite; heads and layers.

    Reference: gpt-oss model card, arXiv 2508.10925; Miller, Attention Is Off By One, 2023.

    Example:
        >>> with lens.edit(model, lens.edits.LearnedSink()):
        ...     model.logits("It was the best of times")
    """

    _rule = "sink"
    _keys = ()
    _range = (-math.inf, math.inf)
    amount: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.amount) and 0 <= self.amount < math.inf):
            raise LensError(
                f"amount of LearnedSink is exp(its logit), 0 or more, got {self.amount}"
            )


@dataclass(frozen=True)
class Value(AttentionOfKeys):
    """What keys hand over is replaced, the attention to them stays.

    Attributes:
        keys, heads, layers: as of `Mask`.
        baseline: "zero", or "mean" of the values of the other keys that a row sees (one mean over the
            whole prompt would tell a row what comes later).
        amount: how far, 0 to 1.

    Raises:
        LensError: as `Mask`, an unknown baseline; "mean" where a layer looks ahead.

    Reference: Gu et al., When Attention Sink Emerges in Language Models, arXiv 2410.10781.

    Example:
        >>> with lens.edit(model, lens.edits.Value("first", "mean")):
        ...     model.logits("It was the best of times")
    """

    keys: Keys = "first"
    baseline: Literal["zero", "mean"] = "zero"
    amount: float = 1.0

    def __post_init__(self) -> None:
        check_choice("baseline of Value", self.baseline, ("zero", "mean"))
        super().__post_init__()

    @property
    def words(self) -> str:
        return f"{super().words} to {self.baseline}"

    def plan(self) -> Plan:
        """See `AttentionOfKeys`."""
        return Plan(self.baseline, self.amount, self.keys)


@dataclass(frozen=True)
class Knockout(AttentionOfKeys):
    """Edges are cut: these queries do not see these keys, and their rows are normalised again.

    Attributes:
        queries: rows, in the forms of `keys`.
        keys, amount, heads, layers: as of `Mask`.

    Raises:
        LensError: as `Mask`.

    Reference: Geva et al., Dissecting Recall of Factual Associations, arXiv 2304.14767.

    Example:
        >>> with lens.edit(model, lens.edits.Knockout([5, 6], [1, 2], layers=[1])):
        ...     model.logits("It was the best of times")
    """

    _rule = "mask"
    _keys = ("queries", "keys")
    queries: Keys
    keys: Keys
    amount: float = 1.0


@dataclass(frozen=True)
class Force(AttentionOfKeys):
    """Rows of heads are forced onto keys.

        (1 - a) P + a w,   w_t = 1 / |T| ("equal") or P_t / P(T) ("own")

    Attributes:
        queries: rows, in the forms of `keys`; each must see all of the keys.
        keys, heads, layers: as of `Mask`.
        amount: share of the row that is forced, 0 to 1.
        split: "equal", all keys alike; "own", as the head itself would look with all others hidden.

    Raises:
        LensError: as `Mask`, an unknown split; while it runs, keys that a row does not see.

    Reference: Merullo, Eickhoff, Pavlick 2024, arXiv 2310.08744.

    Example:
        >>> with lens.edit(model, lens.edits.Force([6], [1, 2], heads=["L1H0"])):
        ...     model.logits("It was the best of times")
    """

    _keys = ("queries", "keys")
    queries: Keys
    keys: Keys
    amount: float = 1.0
    split: Literal["equal", "own"] = "equal"

    def __post_init__(self) -> None:
        check_choice("split of Force", self.split, ("equal", "own"))
        super().__post_init__()

    def plan(self) -> Plan:
        """See `AttentionOfKeys`."""
        return Plan(self.split, self.amount, self.keys, queries=self.queries)
