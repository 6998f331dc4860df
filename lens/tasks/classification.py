"""Classifiers of whole texts or pictures: the right label's logit beside those of the others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import check_choice
from lens.common.errors import LensError
from lens.common.files import read_text
from lens.models.loaded import LoadedModel, check_loaded
from lens.models.vocabulary import around, windows
from lens.passes.inputs import read_prompts
from lens.passes.logits import labels_of, logits_of
from lens.tasks.metrics import AnswerSets
from lens.tasks.task import Task

METRIC = ("max_logit_difference", "probability_difference", "loss", "accuracy")
_LARGEST = 256 << 20  # bytes of a file


def classification(
    model: LoadedModel,
    prompts: Any,
    labels: Sequence[int | str] | Tensor | None = None,
    *,
    length: int | None = None,
    metric: str = "max_logit_difference",
) -> Task:
    """Labels of whole texts or pictures; the metric is the right label's logit minus the largest other.

    Texts of a task have one length: without `length` the most frequent one, and `task.dropped` lists the
    others. There are no corrupt prompts.

    Args:
        model: a classifier of sequences or images, as `lens.load` returns it.
        prompts: texts or token ids, a list of them; a table with the columns `text` and `label`, or a
            .jsonl file of such objects; or pictures, as pixel values [pictures, channels, height, width] or
            an image processor's output.
        labels: of each prompt its number or its name in the model's configuration; None: in the table.
        length: tokens of each text, special ones included: longer ones are cut, shorter ones left out.
        metric: "max_logit_difference", "probability_difference", "loss" or "accuracy".

    Raises:
        LensError: no classifier, labels that it does not have or that are not as many as prompts, or
            prompts that it does not take.

    Example:
        >>> classifier = lens.load(transformers.ViTForImageClassification(vit.model.config).eval())
        >>> task = lens.tasks.classification(classifier, torch.randn(4, 3, 16, 16), [0, 1, 1, 0])
        >>> lens.heads.importance(classifier, task, progress=False).metric
        'max_logit_difference'
    """
    check_loaded(model)
    check_choice("metric", metric, METRIC)
    count = labels_of(model)
    if count is None or count < 2:
        reason = (
            "is no classifier of whole prompts" if count is None else "has one output, no labels"
        )
        raise LensError(
            f"{model.info.class_name} {reason}; load one with a head for it, such as "
            "BertForSequenceClassification or ViTForImageClassification"
        )
    if labels is None:
        prompts, labels = _of_table(prompts)
    if isinstance(prompts, Mapping):
        prompts = prompts["pixel_values"] if "pixel_values" in prompts else _ids_of(model, prompts)
    if prompts is None or isinstance(prompts, str | Path) or not len(prompts):
        raise LensError("prompts must be a list of texts or token ids, or pixel values; got none")
    if len(labels) != len(prompts):
        raise LensError(f"each prompt needs a label; got {len(prompts)} and {len(labels)} labels")
    right = torch.tensor([_number(model, label, count) for label in labels])
    pictures = isinstance(prompts, Tensor) and prompts.is_floating_point()
    if pictures:
        clean, kept, dropped = prompts.detach().cpu(), list(range(len(prompts))), []
        if clean.dim() != 4:
            raise LensError(
                "pixel values must be [pictures, channels, height, width], got the shape "
                f"{list(clean.shape)}"
            )
    else:
        clean, kept, dropped = _of_one_length(model, list(prompts), length)
    right = right[kept][:, None]
    others = torch.arange(count).expand(len(kept), -1)
    others = others[others != right].reshape(len(kept), 1, count - 1)
    task = Task(
        name="classification",
        clean=clean,
        positions=torch.zeros_like(right),
        correct=right,
        metric=metric,
        dropped=tuple(dropped),
        sets=AnswerSets(right[..., None], others),
        labels=count,
    )
    task.check(model)
    try:
        with torch.no_grad():
            logits_of(model, clean[:1].repeat(2, *[1] * (clean.dim() - 1)))
    except (
        ValueError,
        RuntimeError,
        TypeError,
    ) as error:  # no padding token, another size of pictures
        raise LensError(
            f"{model.info.class_name} does not take these prompts: {str(error).splitlines()[0]}"
        ) from error
    return task


def _of_table(given: Any) -> tuple[list[str], list[Any]]:
    """Texts and labels of a table or of a file of lines."""
    if isinstance(given, str | Path) and Path(given).suffix == ".jsonl":
        lines = [
            line for line in read_text(Path(given), most=_LARGEST).splitlines() if line.strip()
        ]
        try:
            given = pd.DataFrame([dict(json.loads(line)) for line in lines])
        except (ValueError, TypeError) as error:
            raise LensError(f"{given} holds a line that is no JSON object") from error
    if not isinstance(given, pd.DataFrame) or not {"text", "label"} <= set(given.columns):
        raise LensError(
            "without labels prompts must be a table or a .jsonl file with text and label of each; got "
            f"{type(given).__name__}"
        )
    if bool(given[["text", "label"]].isna().any(axis=None)):
        raise LensError("a row of the table lacks its text or its label; fill it or leave it out")
    return given["text"].tolist(), given["label"].tolist()


def _ids_of(model: LoadedModel, given: Any) -> list[list[int]]:
    """The prompts' own tokens: without padding; segments of one text say nothing."""
    if isinstance(given, Mapping) and not torch.as_tensor(given.get("token_type_ids", 0)).any():
        given = {name: value for name, value in given.items() if name != "token_type_ids"}
    return [prompt.ids or [] for prompt in read_prompts(model, given)[0]]


def _number(model: LoadedModel, label: Any, count: int) -> int:
    """The number of a label.

    Raises:
        LensError: the model has no such label.
    """
    names = dict(getattr(model.model.config, "label2id", None) or {})
    number = names.get(label) if isinstance(label, str) else label
    if (
        isinstance(number, bool)
        or number is None
        or int(number) != number
        or not 0 <= number < count
    ):
        known = ", ".join(list(names)[:8])
        raise LensError(f"labels are 0 to {count - 1}, or names ({known}); got {label!r}")
    return int(number)


def _of_one_length(
    model: LoadedModel, prompts: Sequence[Any], length: int | None
) -> tuple[Tensor, list[int], list[str]]:
    """Ids [prompts, tokens], which prompts they are, and what is left out.

    Raises:
        LensError: no prompt has the length.
    """
    found = [
        model.encode(one) if isinstance(one, str) else _ids_of(model, one)[0] for one in prompts
    ]
    if length is None:
        counts = Counter(map(len, found))
        length = min(counts, key=lambda size: (-counts[size], size))
    else:
        pair = around(model) if any(isinstance(one, str) for one in prompts) else ([], [])
        found = [(windows(ids, length, pair) or [ids])[0] for ids in found]
    kept = [number for number, ids in enumerate(found) if len(ids) == length]
    if not kept:
        longest = max(map(len, found))
        raise LensError(f"no prompt has {length} tokens, the longest has {longest}; ask for fewer")
    dropped = [
        f"prompt {number}: {len(ids)} tokens, {length} are taken"
        for number, ids in enumerate(found)
        if len(ids) != length
    ]
    return torch.tensor([found[number] for number in kept]), kept, dropped
