"""The answer of a model to one prompt as a function of what enters its first block, row by row.

A token is deleted by putting the mean of all token embeddings in its place, at its position. Attributions,
deletion curves and integrated gradients all use this one way, so that they can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.parts import Layout
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.logits import fills_masks, logits_of
from lens.passes.replay import proved
from lens.passes.sessions import OnLayer, listening
from lens.passes.visit import Hooks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

LONGEST = 512  # tokens of a prompt: maps of all queries and keys of every head are held
_NUMBERS = 2**24  # logits of the rows of one pass


def check_tokens(prompts: Sequence[Prompt]) -> None:
    """Raises LensError: a prompt that is a picture or anything else than a row of tokens."""
    if any(prompt.ids is None for prompt in prompts):
        raise LensError(
            "an answer is explained for prompts of tokens, and this is none; on a picture trace.overlay shows attention"
        )


class Answer:
    """One prompt, and the answer whose logit and probability are asked for.

    Attributes:
        layout: the parts of the model.
        ids: [1, tokens].
        own, deleted: [tokens, d_model], what enters the first block, and the same with every token deleted.
        block: tokens that are deleted or kept together.
        row: place of the query that answers: the last token's; the first of a classifier of BERT's kind, and of a model
            that fills masks the only mask, where there is one.
        answer: the token or label that is answered.
        probability: of it, on the prompt as it is.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompt: Any,
        answer: int | None = None,
        *,
        block: int | None = None,
    ) -> None:
        self.layout: Layout = proved(model)
        self._model = self.layout.model
        read, one = read_prompts(model, prompt)
        if not one:
            raise LensError("an answer is explained for one prompt of tokens at a time")
        check_tokens(read)
        ids = read[0].ids or []
        if block is None and len(ids) > LONGEST:
            raise LensError(
                f"the prompt has {len(ids)} tokens; attributions hold the maps of every head, for at most "
                f"{LONGEST}; score blocks of tokens (block=64)"
            )
        self.block = min(block or 1, len(ids))  # a longer one is the whole prompt
        self.ids = read[0].inputs["input_ids"]
        causal: list[bool] = []

        def on_layer(call: LayerCall) -> Tensor:
            causal.append(call.mask.causal)
            return _plain(call)

        with torch.no_grad():
            self.own, self.deleted = self._entering(), self._deleted()
            found = self._run(self.own[None], on_layer)
            self.row = self._answering(places=found.shape[1], causal=all(causal))
            logits = self._answered(found)[0]
        if answer is not None:
            check_counts(0, answer=answer)
        self.answer = int(logits.argmax() if answer is None else answer)
        if not 0 <= self.answer < len(logits):
            raise LensError(f"answer must be 0 to {len(logits) - 1}, got {answer}")
        self.probability = float(logits.softmax(-1)[self.answer])

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.ids.shape[1]

    @property
    def units(self) -> int:
        """How many blocks of tokens there are."""
        return -(-self.tokens // self.block)

    def logits(
        self, hidden: Float[Tensor, "rows tokens width"], on_layer: OnLayer | None = None
    ) -> Float[Tensor, "rows answers"]:
        """Logits of every row at the query that answers, with `hidden` in place of what enters the first block."""
        found = []
        most = max(1, _NUMBERS // (hidden.shape[1] * max(self._model.info.vocab or 1, 64)))
        for some in hidden.split(most):
            found.append(self._answered(self._run(some, on_layer or _plain)))
        return torch.cat(found)

    def _run(self, hidden: Tensor, on_layer: OnLayer) -> Float[Tensor, "rows places answers"]:
        with (
            self._entered(lambda _: hidden.to(self._model.dtype)),
            listening(self._model, on_layer),
        ):
            return logits_of(self._model, self.ids.expand(len(hidden), -1))

    def _answering(self, places: int, causal: bool) -> int:
        """The query that answers; a classifier of whole prompts has logits at one place."""
        mask = getattr(self._model.tokenizer, "mask_token_id", None)
        masks = torch.nonzero(self.ids[0] == mask)[:, 0] if mask is not None else ()
        if len(masks) == 1 and fills_masks(self._model):
            return int(masks[0])
        return self.tokens - 1 if causal or places > 1 else 0

    def _answered(self, found: Float[Tensor, "rows places answers"]) -> Tensor:
        """[rows, answers]"""
        return found[:, self.row if found.shape[1] > 1 else 0].float()

    def kept(self, keep: Bool[Tensor, "rows units"]) -> Float[Tensor, " rows"]:
        """Probability of the answer with only these tokens, or blocks of them; the others are deleted."""
        keep = keep.repeat_interleave(self.block, 1)[:, : self.tokens].to(self.own.device)
        with torch.no_grad():
            logits = self.logits(torch.where(keep[..., None], self.own, self.deleted))
        return logits.softmax(-1)[:, self.answer].double().cpu()

    def _entering(self) -> Tensor:
        """[tokens, d_model], what enters the first block."""
        found = self.layout.embed({"input_ids": self.ids})[0].detach()
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _deleted(self) -> Tensor:
        """The same with the mean of all embeddings in the place of each."""
        table: nn.Module = self._model.model.get_input_embeddings()
        mean = table(torch.arange(self._model.info.vocab or 1, device=self.ids.device)).mean(0)
        with table.register_forward_hook(lambda _, __, output: mean.expand_as(output)):
            return self._entering()

    @contextmanager
    def _entered(self, change: Callable[[Tensor], Any]) -> Iterator[None]:
        with ExitStack() as stack:
            hooks = Hooks(stack)
            for number, block in enumerate(self.layout.blocks):
                hooks.before(block.module, "enter", change if number == 0 else _nothing)
            yield


def _nothing(_: Tensor) -> None:
    pass


def _plain(call: LayerCall) -> Tensor:
    return attend(call, statistics=()).output
