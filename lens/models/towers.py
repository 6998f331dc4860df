"""Models of several encoders side by side, such as CLIP: which they are, each as a model of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.models.sizes import describe, image_token, in_stages, reads_tokens
from lens.models.stages import stages

_ENDING = re.compile(r"_(model|tower|encoder)$")


def described_towers(
    model: PreTrainedModel, tokenizer: Any, name: str, revision: str | None
) -> dict[str, LoadedModel]:
    """Encoders side by side with their sizes, by short names ("text", "vision"); none of a model of one sequence.

    Raises:
        LensError: sizes of one that its configuration does not say.
    """
    config = model.config
    subs = [getattr(config, name, None) for name in config.sub_configs]
    joined = any(
        re.fullmatch(r"(audio|speech|video)_token_(id|index)", name) for name in vars(config)
    )
    if joined or image_token(config) is not None or sum(sub is not None for sub in subs) < 2:
        return {}
    towers: dict[str, Any] = {
        name: part
        for name, part in model.named_children()
        if any(getattr(part, "config", None) is sub for sub in subs)
    }
    if len(towers) < 2:
        return {}
    found = {}
    for path, one in towers.items():
        short = _ENDING.sub("", path)
        own = tokenizer if reads_tokens(one) else None
        try:
            if staged := stages(one):
                parts = dict.fromkeys(staged, in_stages(one))
                for stage in parts:  # a tower in stages (GroupViT) has a trace for each
                    within = f"{short}_{stage}"
                    found[within] = LoadedModel(
                        *(one, own, f"{name} {within}", revision, parts[stage]),
                        parts=parts,
                        chosen=stage,
                    )
                continue
            found[short] = LoadedModel(one, own, f"{name} {short}", revision, describe(one))
        except LensError as error:
            raise LensError(cannot_take(type(model).__name__, towers, short, error)) from error
    return found


def cannot_take(name: str, towers: Iterable[str], which: str, error: LensError) -> str:
    """What to say of a model of several towers one of which is not known here."""
    why = str(error).partition(";")[0]
    return (
        f"of the towers of {name} ({', '.join(towers)}) {which!r} cannot be taken: {why}; {WHOLE}"
    )


WHOLE = "give an example of what it reads: lens.passes.wrap(model, inputs)"
"""What can be done where towers are not known here."""
