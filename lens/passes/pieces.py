"""A long prompt through a model in pieces: each piece reads the keys of those before from the cache.

What the model computes is the same to rounding wherever no token sees a later one and nothing depends on how
long the prompt is. Both are checked: on the first tokens of the prompt, once in pieces and once as a whole,
and by name for rotary embeddings that stretch with the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.check import relative_error, tolerance_of
from lens.passes.inputs import Prompt
from lens.passes.sessions import listening, run

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_PROBE = 36
"""Tokens of the prompt that are run both ways."""
_STRETCHING = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
"""Rotary embeddings that are others beyond a length, and what holds that length."""


def check_pieces(model: LoadedModel, prompt: Prompt, chunk: int) -> None:
    """Raises LensError unless pieces of `chunk` tokens give what the whole prompt gives, and says why not."""
    tokens = len(ids_alone(prompt, "chunk"))
    if tokens <= chunk:
        return
    check_length_matters_not(model, tokens, "chunk=")
    ids = prompt.inputs["input_ids"][:, :_PROBE]
    apart = _probe(model, ids, -(-ids.shape[1] // 3))
    whole = _probe(model, ids, ids.shape[1])
    difference = relative_error(apart, whole)
    if not difference <= tolerance_of(model.precision):
        raise LensError(
            f"{model.info.class_name} computes something else in pieces: on the first {ids.shape[1]} tokens "
            f"its output differs by {difference:.1e} from that of the whole (a layer that starts anew in each "
            "piece); leave chunk out"
        )


def ids_alone(prompt: Prompt, word: str) -> list[int]:
    """The ids of a prompt; raises LensError, which names the argument, where it has other inputs too."""
    if prompt.ids is None or set(prompt.inputs) != {"input_ids"}:
        given = ", ".join(sorted(set(prompt.inputs) - {"input_ids"}))
        raise LensError(
            f"{word}= takes prompts of token ids alone, got {given} too; leave {word} out"
        )
    return prompt.ids


def check_length_matters_not(model: LoadedModel, tokens: int, what: str) -> None:
    """Raises LensError where the length of a prompt changes the positions of its first tokens."""
    root: Any = model.transformer
    config = root.config.get_text_config()
    for settings in _rotary(config):
        name = settings.get("rope_type", "default")
        for kind, key in _STRETCHING.items():
            longest = settings.get("original_max_position_embeddings") or getattr(config, key, None)
            if kind in name and longest is not None and tokens > longest:
                raise LensError(
                    f"{model.info.class_name} stretches its rotary embedding ({name}) beyond {longest:,} "
                    f"tokens by the length of the whole prompt, {tokens:,} here, which {what} cannot know "
                    f"at the first piece; leave it out, or shorten the prompt to {longest:,}"
                )


def _rotary(config: Any) -> list[dict[str, Any]]:
    """The settings of its rotary embeddings, one or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    by_type = [part for part in given.values() if isinstance(part, dict)]
    return by_type or [given]


def run_in_pieces(
    model: LoadedModel, ids: Int[torch.Tensor, "1 tokens"], chunk: int
) -> Iterator[Any]:
    """What the model without its head gives for each piece of `ids`, one after the other.

    Raises:
        LensError: a model that keeps no keys; as `run`.
    """
    check_counts(chunk=chunk)
    cache = None
    for start in range(0, ids.shape[1], chunk):
        inputs = {"input_ids": ids[:, start : start + chunk], "use_cache": True}
        if cache is not None:
            inputs["past_key_values"] = cache
        output = run(model, inputs, "a prompt in pieces with its key cache (leave chunk out)")
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise LensError(
                f"{model.info.class_name} keeps no keys for the next piece (past_key_values), so a prompt "
                "cannot go through it in pieces; leave chunk out"
            )
        yield output


def _probe(
    model: LoadedModel, ids: Int[torch.Tensor, "1 tokens"], chunk: int
) -> Float[torch.Tensor, "1 tokens width"]:
    """Last hidden states of a prompt in pieces."""

    def on_layer(call: LayerCall) -> torch.Tensor:
        check_looks_back(call, model.info.class_name)
        return attend(call, statistics=()).output

    with torch.no_grad(), listening(model, on_layer, parts=True):
        return torch.cat([output[0].double() for output in run_in_pieces(model, ids, chunk)], 1)


def check_looks_back(call: LayerCall, name: str) -> None:
    """Raises LensError where queries of a layer see later keys, or keys of another sequence."""
    if call.cross or not call.mask.causal:
        sees = "keys of another sequence" if call.cross else "later tokens too"
        raise LensError(
            f"layer {call.layer} of {name} sees {sees}, so a prompt cannot go through it in pieces: the "
            "first would not know the rest; capture it whole"
        )
