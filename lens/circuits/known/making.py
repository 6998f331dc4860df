"""What the hand-written models have in common: weights set in eval mode, prompts made into tasks."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lens.circuits.known.program import ProgramModel
from lens.common.choices import check_choice
from lens.models.loaded import LoadedModel
from lens.models.words import WordTokenizer
from lens.passes.loading import load
from lens.tasks.task import Task

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def loaded(
    model: ProgramModel, tokenizer: WordTokenizer, name: str, licence: str, dtype: str
) -> LoadedModel:
    """The model as `lens.load` gives it, self-check included.

    Raises:
        LensError: a dtype that is neither float32 nor float64.
    """
    check_choice("dtype", dtype, _DTYPES)
    found = load(nn.Module.to(model, dtype=_DTYPES[dtype]).eval(), tokenizer=tokenizer)
    return replace(found, name=name, info=replace(found.info, licence=licence))


def last_token_task(
    tokenizer: WordTokenizer,
    name: str,
    clean: Sequence[str],
    corrupt: Sequence[str],
    correct: Sequence[str],
    wrong: Sequence[str],
) -> Task:
    """A logit difference after the last token of prompts of one length, given as words."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in clean])
    return Task(
        name=name,
        clean=ids,
        positions=torch.full((len(ids), 1), ids.shape[1] - 1),
        correct=torch.tensor([[tokenizer.id(word)] for word in correct]),
        metric="logit_difference",
        corrupt=torch.tensor([tokenizer(prompt)["input_ids"] for prompt in corrupt]),
        wrong=torch.tensor([[tokenizer.id(word)] for word in wrong]),
    )
