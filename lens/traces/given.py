"""`lens.capture(..., attentions=...)`: traces of probabilities that somebody has already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lens.common.choices import is_whole
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.traces.attentions import from_attentions
from lens.traces.trace import AttentionTrace


def imported_traces(
    model: LoadedModel | None, prompts: Any, attentions: Sequence[Any], block_size: int
) -> AttentionTrace | list[AttentionTrace]:
    """`lens.capture(model, prompts, attentions=...)`: see there."""
    if model is None:
        return _of_tokens(prompts, attentions, block_size)
    found, is_single = read_prompts(model, prompts, whole=True)
    traces = []
    for row, prompt in enumerate(found):
        names = None if prompt.ids is None else model.token_strings(prompt.ids)
        traces.append(
            from_attentions(
                attentions,
                token_ids=prompt.ids,
                tokens=names,
                row=None if is_single else row,
                block_size=block_size,
                bos_id=model.bos_id,
                model=model.name,
            )
        )
    return traces[0] if is_single else traces


def _of_tokens(prompts: Any, attentions: Sequence[Any], block_size: int) -> AttentionTrace:
    """Of no model: the tokens are strings, ids, or nothing."""
    tokens = ids = None
    if isinstance(prompts, str) or (prompts is not None and not isinstance(prompts, Sequence)):
        raise LensError(
            f"without a model prompts are one prompt's tokens, as strings or ids, or None, got "
            f"{type(prompts).__name__}"
        )
    if prompts is not None and all(isinstance(one, str) for one in prompts):
        tokens = list(prompts)
    elif prompts is not None:
        if not all(map(is_whole, prompts)):
            raise LensError("tokens must be strings, or ids, all of one kind")
        ids = [int(one) for one in prompts]
    return from_attentions(attentions, token_ids=ids, tokens=tokens, block_size=block_size)
