"""`Subspace`: directions taken out of what heads ask for or are found by, or out of the residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.edits._phi import width_of
from lens.edits.base import AttentionEdit
from lens.edits.language import Hooked, OfHeads, Running, check_number
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.keys import KeysAt
from lens.passes.residual import changed

if TYPE_CHECKING:
    from jaxtyping import Float

Of = Literal["query", "key", "residual"]


@dataclass(frozen=True)
class Subspace(OfHeads):
    """Directions are taken out: `x - a x B B^T`, with B an orthonormal basis of them.

    Queries and keys are those of the attention, behind norms and rotary embedding.

    Attributes:
        basis: [width, rank], any vectors that span it.
        of: "query" or "key" of the heads (keys of a group: for these heads alone), or "residual", what leaves `layers`.
        amount: share, 0 to 1.
        heads, layers: as of `Mask`; of the residual stream layers alone.

    Raises:
        LensError: a basis that is no matrix of independent columns, another `of`; when it starts, a width that the model
            has not got, heads of the residual stream.

    Example:
        >>> found = lens.reading.subspace(small, [lens.tasks.copied(small, 12, seed) for seed in range(4)], "L1H0", rank=4, draws=2)
        >>> with lens.edit(small, lens.edits.Subspace(found.basis, heads=["L1H0"])):
        ...     small.logits(lens.tasks.copied(small, 12))
    """

    basis: Any = field(compare=False, repr=False)
    of: Of = "query"
    amount: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("of", self.of, Of)
        check_number("amount of Subspace", self.amount, 0, 1)
        try:
            basis = torch.as_tensor(self.basis).detach().double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise LensError(
                f"basis of Subspace must be an array, got {type(self.basis).__name__}"
            ) from error
        if basis.dim() != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
            raise LensError(
                f"basis of Subspace must be [width, rank] with rank 1 to width, got the shape {list(basis.shape)}"
            )
        if (
            not bool(basis.isfinite().all())
            or int(torch.linalg.matrix_rank(basis)) < basis.shape[1]
        ):
            raise LensError("basis of Subspace must have independent columns of finite numbers")
        object.__setattr__(self, "basis", torch.linalg.qr(basis).Q)
        if self.of == "residual" and self.heads is not None:
            raise LensError("the residual stream has no heads; give layers")

    @property
    def words(self) -> str:
        """See `Edit`: "Subspace of 4 in query"."""
        return f"Subspace of {self.basis.shape[1]} in {self.of}"

    def drawn(self, generator: torch.Generator) -> Subspace:
        """The same with as many random directions."""
        return replace(self, basis=torch.randn(self.basis.shape, generator=generator).double())

    def start(self, model: LoadedModel, backend: str) -> Running:
        """See `Edit`."""
        chosen = self.chosen(model)
        width = width_of(model) if self.of == "residual" else model.info.head_dim
        if self.basis.shape[0] != width:
            raise LensError(
                f"basis of Subspace must have {width} rows, the width of the {self.of} of {model.name}; got "
                f"{self.basis.shape[0]}"
            )
        if self.of == "residual":
            layers = chosen.any(1).nonzero()[:, 0].tolist()
            done = Hooked()
            return Running(done, hooks=_without(model, layers, self.basis, self.amount, done))
        edit = _Without(self.of == "key", self.basis, self.amount, chosen, backend)
        return Running(edit, edit)


class _Without(AttentionEdit):
    """Queries or keys of heads without the directions; `calls` is counted, no mass is moved."""

    word = "Subspace"

    def __init__(
        self, keys: bool, basis: Tensor, amount: float, heads: Tensor, backend: str
    ) -> None:
        super().__init__(heads, backend)
        self._keys, self._basis, self._amount = keys, basis, amount

    def _edit(self, call: LayerCall, at: KeysAt, heads: Tensor) -> Tensor | None:
        if not self._amount:
            return None
        self.calls += 1
        if not self._keys:
            query = call.query.clone()
            query[:, heads] = taken_out(query[:, heads], self._basis, self._amount)
            edited = attend(replace(call, query=query), backend=self._backend).output
        else:
            key, value = (of_heads(call, part) for part in (call.key, call.value))
            key[:, heads] = taken_out(key[:, heads], self._basis, self._amount)
            edited = attend(replace(call, key=key, value=value), backend=self._backend).output
        if bool(heads.all()):
            return edited
        output = attend(call, backend=self._backend).output.clone()  # the others keep their bits
        output[:, heads] = edited[:, heads]
        return output


def taken_out(
    vectors: Float[Tensor, "*rest width"], basis: Float[Tensor, "width rank"], amount: float = 1.0
) -> Float[Tensor, "*rest width"]:
    """`x - a x B B^T`, in the precision of the vectors."""
    basis = basis.to(vectors)
    return vectors - amount * (vectors @ basis) @ basis.T


@contextmanager
def _without(
    model: LoadedModel, layers: Sequence[int], basis: Tensor, amount: float, done: Hooked
) -> Iterator[None]:
    """What leaves these layers has the directions no more."""

    def change(hidden: Tensor) -> Tensor:
        done.calls += 1
        return taken_out(hidden, basis, amount)

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(changed(model, layer, change))
        yield
