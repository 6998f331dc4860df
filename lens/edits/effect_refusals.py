"""What `lens.effect` does not measure: models without next tokens, pictures on several grids."""

from __future__ import annotations

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.keys import Keys
from lens.passes.logits import check_predicts_tokens, fills_masks, predicts_next
from lens.tasks.task import Task


def check_predicts_next(model: LoadedModel) -> None:
    """Raises LensError for a model that predicts no next token of a text; it says which task it has."""
    reads = getattr(model.model, "main_input_name", "input_ids")
    if reads != "input_ids" and model.info.vocab is None and not model.is_encoder_decoder:
        raise LensError(
            f"{model.info.class_name} reads no tokens, so that there is no loss of a next one to measure; which heads a "
            "classifier needs says lens.heads.importance(model, lens.tasks.classification(...)), and lens.edit(model, edit) "
            "runs any model under the edit"
        )
    check_predicts_tokens(model)
    if fills_masks(model):
        raise LensError(
            f"{model.info.class_name} fills in masked tokens and predicts no next token; give a task, such as "
            "lens.tasks.language_modelling(model, texts)"
        )


def refuse_stages(model: LoadedModel, task: Task) -> None:
    """Raises LensError for pictures that are looked at on several grids, or in windows: a key is of one window then."""
    if task.clean.is_floating_point() and model.chosen and not model.is_encoder_decoder:
        raise LensError(
            f"lens.effect edits keys of one grid of patches, {model.info.class_name} has several, and {task.name!r} is of "
            "pictures; which heads matter says lens.heads.importance(model, task)"
        )


def refuse_scored(model: LoadedModel, scored: Keys | None) -> None:
    """Raises LensError for `scored` without next tokens."""
    if scored is not None and not predicts_next(model):
        raise LensError(
            "scored chooses positions whose next token is measured, and "
            f"{model.info.class_name} predicts none; leave it out"
        )
