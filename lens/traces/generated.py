"""A prompt and what a model writes after it, as one trace: the prompt in one pass, then token by token.

What is recorded is what happened while the model wrote, from its key cache; nothing is run again but the last
token, which no other was written from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import check_counts, is_number
from lens.common.errors import LensError, first_line
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.inputs import Prompt
from lens.passes.pieces import ids_alone
from lens.passes.sessions import listening, run
from lens.traces.labels import NONE, Labels
from lens.traces.pieces import Pieces, into_pieces
from lens.traces.statistics import LayerRecord, Settings
from lens.traces.trace import AttentionTrace
from lens.traces.writing import Writing

LABEL = "prompt"
"""The label by which the mass on the prompt's tokens is kept, of every token that was written."""


def check_asked(new: int, temperature: float) -> None:
    """Raises LensError: a number of tokens or a temperature that is none."""
    check_counts(new=new)
    if not is_number(temperature) or not 0 <= temperature < float("inf"):
        raise LensError(
            f"temperature must be 0 (the likeliest token) or more, got {temperature!r}; e.g. 0.8"
        )


def check_writes(model: LoadedModel, prompt: Prompt, new: int, temperature: float) -> None:
    """Whether the model can write `new` tokens after a prompt.

    Raises:
        LensError: it does not write, or takes fewer tokens than both have; or a temperature that is none.
    """
    check_asked(new, temperature)
    count = len(ids_alone(prompt, "new"))
    can = not model.is_bridge and getattr(model.model, "can_generate", lambda: False)()
    if not can:
        raise LensError(
            f"{model.info.class_name} does not write with a key cache (transformers' generate); leave new out, "
            "or load the model of transformers with its head"
        )
    length, context = count + new, model.info.context
    if context is not None and length > context:
        raise LensError(
            f"{count:,} tokens and {new:,} new ones are {length:,}, and {model.name} takes {context:,}; "
            f"give a shorter prompt, or new={max(1, context - count)}"
        )


def written_traces(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    folders: Sequence[str | Path | None],
    *,
    new: int,
    temperature: float,
    seed: int | None,
    progress: bool,
) -> list[AttentionTrace]:
    """The trace of each prompt with what the model writes after it; arguments as `lens.capture`, a folder each."""
    for prompt in prompts:
        check_writes(model, prompt, new, temperature)
    traces = []
    total = len(prompts) * (new + 1) * len(model.info.attending)
    with advancing(f"{model.name}: layers", total, progress) as advance:
        for prompt, folder in zip(prompts, folders, strict=True):
            start = time.perf_counter()
            whole, chosen, records = _recorded(
                model, prompt, settings, new, temperature, seed, advance
            )
            writing = Writing(model, whole, chosen, folder)
            for record in records:
                writing.take(record)
            note = {
                "prompt_tokens": len(prompt.ids or ()),
                "temperature": float(temperature),
                "seed": seed,
                "chunk": None,
                "processes": 1,
                "seconds": time.perf_counter() - start,
            }
            traces.append(writing.finish(note))
    return traces


def _recorded(
    model: LoadedModel,
    prompt: Prompt,
    settings: Settings,
    new: int,
    temperature: float,
    seed: int | None,
    advance: Callable[[int], None],
) -> tuple[Prompt, Settings, Iterator[LayerRecord]]:
    """The prompt with what the model wrote, its settings and the record of each layer.

    `advance` is told of each layer of each pass.
    """
    assert prompt.ids is not None
    count = len(prompt.ids)
    label = _of_prompt(count, count + new)
    chosen = settings.with_labels((label,))
    pieces = Pieces([*prompt.ids, *[0] * new], chosen)
    on_layer = into_pieces(pieces, model, chosen, advance)
    with torch.no_grad(), listening(model, on_layer, parts=True):
        found = _written(model, prompt, new, temperature, seed, pieces.read)
        ids = found.sequences[0]
        if found.past_key_values is None:
            raise LensError(
                f"{model.info.class_name} writes without a key cache, each token in a pass of the whole text; capture "
                "the text that it wrote instead: lens.capture(model, model.generate(prompt)[0])"
            )
        run(
            model,
            {"input_ids": ids[None, -1:], "past_key_values": found.past_key_values},
            "the last token that it wrote",
        )
    length = len(ids)
    whole = replace(prompt, inputs={"input_ids": ids[None]}, ids=ids.tolist(), text=None)
    return whole, settings.with_labels((_of_prompt(count, length),)), pieces.records(length)


def _of_prompt(count: int, length: int) -> Labels:
    """Queries that were written, and keys of the prompt."""
    place = np.arange(length)
    return Labels(LABEL, np.where(place < count, NONE, 1), np.where(place < count, 1, NONE))


def _written(
    model: LoadedModel,
    prompt: Prompt,
    new: int,
    temperature: float,
    seed: int | None,
    read: Callable[[Tensor], None],
) -> Any:
    """What `generate` returns; `read` is told the tokens before each pass."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Told(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            read(input_ids[0])
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": float(temperature)}
    ids = prompt.inputs["input_ids"]
    devices = [ids.device] if ids.device.type == "cuda" else []
    owner: Any = model.model
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed or 0)
        try:
            return owner.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                num_beams=1,
                use_cache=True,
                return_dict_in_generate=True,
                pad_token_id=getattr(owner.generation_config, "pad_token_id", None) or 0,
                stopping_criteria=StoppingCriteriaList([Told()]),
                **how,
            )
        except LensError:
            raise
        except (ValueError, RuntimeError, TypeError, IndexError, AttributeError) as error:
            raise LensError(
                f"{model.info.class_name} cannot write after this prompt ({first_line(error)}); leave new out"
            ) from error
