"""What a run of pictures, or of labelled prompts, reads."""

from typing import Any, Self

from pydantic import model_validator

from lens_analyses.config.listed import listed
from lens_analyses.config.settings import Section, Shown, setting

LABELS = "labels"
"""Name of the task that labelled prompts make."""


def images_setting() -> Any:
    """The labelled pictures of a run."""
    return setting(
        None,
        "Folder of pictures with a sub-folder per label, or a table (.csv, .jsonl) with path and label: the task of an "
        "image classifier.",
        shown=Shown(file=True),
        min_length=1,
    )


class PictureConfig(Section):
    """Which pictures, and what is asked about them."""

    image: str = setting("", "Picture files, with commas.", shown=Shown(file=True, several=True))
    images: str | None = images_setting()
    question: str | None = setting(
        None,
        "A text for each picture, of a vision-language model.",
        shown=Shown(flag="--text"),
        min_length=1,
    )
    boxes: str | None = setting(
        None,
        "Table (.csv, .jsonl) of boxes on the pictures: picture (name of its file), left, top, right, bottom in its pixels; "
        "heads are scored by how well they find them.",
        shown=Shown(file=True),
        min_length=1,
    )
    sha256: str | None = setting(
        None,
        "Of the files that were read, so that a rerun notices others.",
        shown=Shown(file=True, internal=True),
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.image and self.images is not None:
            raise ValueError("give pictures (--image) or labelled ones (--images), not both")
        if self.question is not None and not self.image:
            raise ValueError(
                "prompts.question is asked about pictures that are named; give these with --image"
            )
        if self.boxes is not None and not self.image:
            raise ValueError("boxes lie on pictures that are named; give these with --image")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """The files one by one."""
        return tuple(listed(self.image)) if self.image else ()
