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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.edits._keyed import KeyedEdit, Plan, Rule
from lens.edits.base import selected_heads
from lens.edits.language import Edit, Running, check_number, plain_keys, plain_places
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys, members


class AttentionOfKeys(Edit):
    """An edit of the attention of `heads` (or of all heads of `layers`; neither: of all)."""

    amount: float
    heads: Sequence[AnyHead] | None
    layers: Sequence[int] | None

    def plan(self) -> Plan:
        """What is done to the attention."""
        raise NotImplementedError

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        chosen = selected_heads(model, self.layers, self.heads)
        edit = KeyedEdit(self.plan(), chosen, backend, type(self).__name__)
        return Running(edit, edit)

    def _check(self, *names: str, low: float = 0, high: float = 1) -> None:
        """Keys under these names, heads, layers and the amount."""
        for name in names:
            object.__setattr__(self, name, plain_keys(name, getattr(self, name)))
        heads, layers = plain_places(self.heads, self.layers)
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "layers", layers)
        check_number(f"amount of {type(self).__name__}", self.amount, low, high)


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

    keys: Keys = "first"
    amount: float = 1.0
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check("keys")

    def plan(self) -> Plan:
        return Plan("mask", self.amount, self.keys)


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

    keys: Keys = "first"
    amount: float = 1.0
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check("keys")

    def plan(self) -> Plan:
        return Plan("drop", self.amount, self.keys)


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

    keys: Keys
    amount: float
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check("keys", low=-math.inf, high=math.inf)
        if self.amount == math.inf:
            raise LensError("amount of Bias is added to logits and cannot be +inf")

    def plan(self) -> Plan:
        return Plan("bias", self.amount, self.keys)


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

    keys: Keys | None = "first"
    to: Keys | None = None
    amount: float = 1.0
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.keys is None and self.to is None:
            raise LensError("Move needs keys that lose, or keys (to) that receive, or both")
        self._check(*(name for name in ("keys", "to") if getattr(self, name) is not None))

    def plan(self) -> Plan:
        keys, to = self.keys, self.to
        if keys is None:
            assert to is not None
            return Plan("move", self.amount, lambda at: ~members("to", to, at), to)
        return Plan("move", self.amount, keys, to)


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

    amount: float = 1.0
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check(low=-math.inf, high=math.inf)
        if not 0 <= self.amount < math.inf:
            raise LensError(
                f"amount of LearnedSink is exp(its logit), 0 or more, got {self.amount}"
            )

    def plan(self) -> Plan:
        return Plan("sink", self.amount, None)


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
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_choice("baseline of Value", self.baseline, ("zero", "mean"))
        self._check("keys")

    def plan(self) -> Plan:
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

    queries: Keys
    keys: Keys
    amount: float = 1.0
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._check("queries", "keys")

    def plan(self) -> Plan:
        return Plan("mask", self.amount, self.keys, queries=self.queries)


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

    queries: Keys
    keys: Keys
    amount: float = 1.0
    split: Literal["equal", "own"] = "equal"
    heads: Sequence[AnyHead] | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_choice("split of Force", self.split, ("equal", "own"))
        self._check("queries", "keys")

    def plan(self) -> Plan:
        rule: Rule = self.split
        return Plan(rule, self.amount, self.keys, queries=self.queries)
