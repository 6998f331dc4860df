"""`lens.edit`: all interventions of whatever runs inside the block, at prefill and in every decoding step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lens.common.errors import LensError
from lens.common.isolation import on_cpu, owned
from lens.edits._keyed import KeyedEdit, edited_together
from lens.edits.base import AttentionEdit
from lens.edits.freezing import FrozenEdit
from lens.edits.language import Edit
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.keys import KeysAt
from lens.passes.sessions import listening


@contextmanager
def edit(model: LoadedModel, *edits: Edit, backend: str = "auto") -> Iterator[tuple[Any, ...]]:
    """Edit the model for the length of a `with` block; generation included, nothing is left behind.

    Several edits act in the order given, each on what the ones before it left. Edits of attention are
    done in the pass that computes it, from the states of a few key groups; no probability is stored.
    Cross-attention of a decoder is left as it is.

    Args:
        model: as `lens.load` returns it.
        edits: from `lens.edits`; none: the model as it is, with the attention of `lens`.
        backend: of `lens_kernels`.

    Yields:
        What each edit did, in the order given: for edits of attention the counters `steps`, `calls`,
        `empty_calls`, `edited_rows`, `skipped_rows`, `mass_before`, `mass_after`
        (`lens.edits.base.AttentionEdit`).

    Raises:
        LensError: what is no edit, an edit that does not fit the model, a recipe beside another edit of
            the same heads; while the model runs, a key that is source and target, a cache that began
            outside of the block, or a capture inside the block (it would take the place of an edit of
            attention, and show the attention without it); another thread works with the model.

    Example:
        >>> with lens.edit(model, lens.edits.Mask("first")) as (done,):
        ...     model.logits("It was the best of times")
        >>> done.calls
        3
    """
    for one in edits:
        if not isinstance(one, Edit):
            raise LensError(
                f"lens.edit takes edits such as lens.edits.Mask('first'), got {type(one).__name__}"
            )
    model.check_part()
    with ExitStack() as stack:
        stack.enter_context(owned(model.module))
        with on_cpu():
            running = [one.start(model, backend) for one in edits]
            attention = [one.attention for one in running if one.attention is not None]
            together = Together(attention, backend)
            for one in running:
                stack.enter_context(one.hooks)
        if attention or model.info.attending:
            stack.enter_context(
                listening(model, together.on_layer, exclusive=bool(attention), parts=True)
            )
        yield tuple(one.done for one in running)


class Together:
    """Several edits of attention: those that share heads of a layer act one after another."""

    def __init__(self, edits: list[AttentionEdit], backend: str) -> None:
        self._all, self._backend = edits, backend
        self._frozen = [one for one in edits if isinstance(one, FrozenEdit)]
        for number, one in enumerate(edits):
            for other in edits[:number]:
                if one in self._frozen and bool((one.heads & other.heads).any()):
                    raise LensError(
                        f"Freeze acts first, and {other.word} comes before it on the same heads; give "
                        "Freeze first, and once"
                    )
        edits = [one for one in edits if one not in self._frozen]
        self._edits = edits
        if not edits:
            return
        chosen = torch.stack([one.heads for one in edits])
        self._sets = [_joined(chosen[:, layer]) for layer in range(chosen.shape[1])]
        for layer, sets in enumerate(self._sets):
            for numbers in sets:
                others = [edits[number] for number in numbers]
                if len(others) > 1 and not all(isinstance(one, KeyedEdit) for one in others):
                    raise LensError(
                        f"{' and '.join(one.word for one in others)} edit the same heads of layer {layer}; "
                        "Var, Act, Pasta and Ablate run alone on their heads: give the others other heads or "
                        "layers"
                    )

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`."""
        if not self._all:
            return attend(call, backend=self._backend).output
        for one in self._all:
            one.steps = call.step + 1
        at, output = self._all[0].keys_at(call), None
        call = self.frozen(call, at)
        if not self._edits or (call.cross and not (call.place or call.extra)):
            return attend(call, backend=self._backend).output
        for numbers in self._sets[call.layer]:
            here = [self._edits[number] for number in numbers]
            keyed = [one for one in here if isinstance(one, KeyedEdit)]
            if keyed:
                found = edited_together(keyed, call, at, self._backend)
            else:
                found = here[0].edited(call, at)
            if found is None:
                continue
            if output is None:
                output = found
            else:
                heads = torch.stack([one.heads[call.layer] for one in here]).any(0)
                output[:, heads] = found[:, heads].to(output.dtype)
        return attend(call, backend=self._backend).output if output is None else output

    def frozen(self, call: LayerCall, at: KeysAt) -> LayerCall:
        """The call with the patterns held that are to be held."""
        for one in self._frozen:
            call = one.frozen(call, at)
        return call


def _joined(chosen: torch.Tensor) -> list[list[int]]:
    """Numbers of edits [edits, heads] that share heads, directly or by a third; those without are in none."""
    sets: list[tuple[torch.Tensor, list[int]]] = []
    for number, heads in enumerate(chosen):
        if not bool(heads.any()):
            continue
        numbers, apart = [number], []
        for others, known in sets:
            if bool((others & heads).any()):
                heads, numbers = heads | others, [*numbers, *known]
            else:
                apart.append((others, known))
        sets = [*apart, (heads, sorted(numbers))]
    return [numbers for _, numbers in sets]
