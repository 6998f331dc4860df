"""Classifiers of whole texts or pictures: the right label's logit beside those of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import multimode
from typing import Any

import torch
from torch import Tensor

from lens.common.choices import check_choice, check_counts
from lens.common.errors import LensError
from lens.common.results import few
from lens.models.ids import length_of
from lens.models.loaded import LoadedModel
from lens.models.vocabulary import around, windows
from lens.passes.inputs import read_prompts
from lens.passes.logits import labels_of, logits_of
from lens.passes.pictures import reads_pictures_alone
from lens.tasks.labelled import read_labelled
from lens.tasks.metrics import AnswerSets
from lens.tasks.task import Task

_SHOWN = 10  # labels whose prompts were not all taken
METRIC = ("max_logit_difference", "probability_difference", "loss", "accuracy")


def classification(
    model: LoadedModel,
    prompts: Any,
    labels: Sequence[int | str] | Tensor | None = None,
    *,
    length: int | None = None,
    n: int | None = None,
    metric: str = "max_logit_difference",
) -> Task:
    """Labels of whole texts or pictures; the metric is the right label's logit minus the largest other.

    Texts of a task have one length: without `length` the most frequent one, and `task.dropped` lists the
    others. There are no corrupt prompts.

    Args:
        model: a classifier of sequences or images, as `lens.load` returns it.
        prompts: texts or token ids, a list of them; pictures (of PIL, arrays, paths), a list of them, pixel values
            [pictures, channels, height, width] or an image processor's output; or, without labels, a folder of pictures
            with a sub-folder per label, or a table (a data frame, .csv, .jsonl) with `label`, and `text` or `path`.
        labels: of each prompt its number or its name in the model's configuration; None: in the folder or table.
        length: tokens of each text, special ones included: longer ones are cut, shorter ones left out.
        n: prompts to take of a folder or a table, as evenly over the labels as they allow; None: all.
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
    check_choice("metric", metric, METRIC)
    if n is not None:
        check_counts(n=n)
    count = labels_of(model)
    if count is None or count < 2:
        reason = (
            "is no classifier of whole prompts" if count is None else "has one output, no labels"
        )
        raise LensError(
            f"{model.info.class_name} {reason}; load one with a head for it, such as "
            "BertForSequenceClassification or ViTForImageClassification"
        )
    more: list[str] = []
    if labels is None:
        prompts, labels, left = read_labelled(prompts, most=n)
        if left:
            shown = few([f"{count} of {label}" for label, count in left.items()], _SHOWN)
            more = [f"{sum(left.values())} more than the {n} prompts taken: {shown}"]
    elif n is not None:
        raise LensError(
            "n takes some of a folder or a table; of prompts with labels give those you mean"
        )
    if isinstance(prompts, Mapping):
        prompts = prompts["pixel_values"] if "pixel_values" in prompts else _ids_of(model, prompts)
    if not length_of(prompts):
        raise LensError(
            "prompts must be a list of texts, token ids or pictures, or pixel values; got none"
        )
    if (given := length_of(labels)) != len(prompts):
        raise LensError(
            f"each prompt needs a label; got {len(prompts)} and {'no list of' if given is None else given} labels"
        )
    right = torch.tensor([_number(model, label, count) for label in labels])
    if not isinstance(prompts, Tensor) and reads_pictures_alone(model):
        prompts = _pixels(model, list(prompts))
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
        dropped=(*more, *dropped),
        sets=AnswerSets(right[..., None], others),
        labels=count,
    )
    task.check(model)
    with torch.no_grad():  # refuses a model without a padding token, and another size of pictures
        logits_of(model, clean[:1].repeat(2, *[1] * (clean.dim() - 1)))
    return task


def _pixels(model: LoadedModel, pictures: Sequence[Any]) -> Tensor:
    """[pictures, channels, height, width] that the model's processor makes of pictures.

    Raises:
        LensError: pictures of several sizes after it, or more inputs than pixels.
    """
    prompts, _ = read_prompts(model, pictures, whole=True)
    if more := sorted({name for one in prompts for name in one.inputs} - {"pixel_values"}):
        raise LensError(
            f"{model.info.class_name} takes {', '.join(more)} beside pixels, which differ from picture to picture; a task "
            "is made of pixels alone"
        )
    found = [one.inputs["pixel_values"].detach().cpu() for one in prompts]
    if len(sizes := {tuple(one.shape[1:]) for one in found}) > 1:
        shown = ", ".join(" × ".join(map(str, size)) for size in sorted(sizes)[:3])
        raise LensError(
            f"the processor makes pictures of several sizes ({shown}); resize them to one, or give a processor that does"
        )
    return torch.cat(found)


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
        number is None and isinstance(label, str) and label.strip().isdecimal()
    ):  # of a folder, or a table of words
        number = int(label)
    try:
        is_known = not isinstance(number, bool) and int(number) == number and 0 <= number < count  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # no number, or none that is whole
        is_known = False
    if number is None or not is_known:
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
        length = min(multimode(map(len, found)))
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
