"""Which prompts a run reads: texts, sounds and pictures of encoder-decoders, copied random tokens, labelled ones."""

from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from lens.common.files import shorten
from lens_analyses.config.listed import listed
from lens_analyses.config.pictures import images_setting
from lens_analyses.config.settings import Section, Shown, setting

SOURCES = ("prompt", "text", "text_name", "batch", "audio", "image")
OF_LABELS = ("images", "labelled")


def _texts() -> tuple[str, ...]:
    from lens.tasks import prompts

    return tuple(prompts.TEXTS)


def _known_text(name: str) -> str:
    if name not in _texts():
        raise ValueError(f"unknown text {shorten(name)!r}; known: {', '.join(_texts())}")
    return name


class PromptConfig(Section):
    """Which prompts; at most one of `SOURCES`."""

    prompt: str | None = setting(
        None, "The words to analyse themselves, on one line.", min_length=1
    )
    text: str | None = setting(None, "Text file to analyse.", shown=Shown(file=True), min_length=1)
    text_name: Annotated[str, AfterValidator(_known_text)] | None = setting(
        None,
        "Embedded text, e.g. moby-dick.",
        shown=Shown(start="moby-dick", suggestions=_texts),
    )
    batch: str | None = setting(
        None,
        'File of prompts, one a line (.txt), or {"text": ...} a line (.jsonl).',
        shown=Shown(flag="--prompts", file=True),
        min_length=1,
    )
    audio: str | None = setting(
        None,
        "Sounds (.wav) that an encoder-decoder such as Whisper reads, with commas.",
        shown=Shown(file=True, rare=True),
        min_length=1,
    )
    image: str | None = setting(
        None,
        "Pictures that an encoder-decoder such as TrOCR reads, with commas.",
        shown=Shown(file=True, rare=True),
        min_length=1,
    )
    target: str | None = setting(
        None,
        "Of an encoder-decoder: text file of what its decoder reads, a line for each line of --prompts, sound or "
        "picture; written by the model if not given.",
        shown=Shown(file=True, rare=True),
        min_length=1,
    )
    sha256: str | None = setting(
        None,
        "Of the file that was read, so that a rerun notices another one.",
        shown=Shown(file=True, internal=True),
    )
    tokens: int | None = setting(
        None,
        "Length of each text prompt; all of the text if not given.",
        shown=Shown(start=128),
        ge=1,
    )
    windows: int | None = setting(
        None, "Consecutive prompts of that length, cut from the text.", shown=Shown(start=4), ge=1
    )
    copied: int = setting(
        4, "Number of copied random prompts (BOS + r + r), the probe for induction heads.", ge=0
    )
    copied_length: int = setting(25, "Random tokens in r.", shown=Shown(rare=True), ge=1)

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"only one source at a time, got prompts.{' and prompts.'.join(given)}"
            )
        if self.windows is not None and (self.tokens is None or self.batch is not None):
            raise ValueError(
                "prompts.windows cuts one text into pieces of prompts.tokens tokens: it needs "
                "prompts.tokens, and does not go with prompts.batch"
            )
        if self.target is not None and given in ([], ["prompt"], ["text_name"]):
            raise ValueError("prompts.target goes with prompts.text, batch, audio or image")
        if self.tokens is not None and self.files:
            raise ValueError("prompts.tokens cuts texts; leave it out with prompts.audio or image")
        if not given and not self.copied and labelled_by(self) is None:
            raise ValueError("no prompt: give a text, or prompts.copied of at least 1")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """The sounds or pictures one by one; none where texts are read."""
        named = self.audio or self.image
        return tuple(listed(named)) if named else ()


class LabelledConfig(PromptConfig):
    """Prompts, or labelled ones in their place."""

    images: str | None = images_setting()
    labelled: str | None = setting(
        None,
        "Table (.csv, .jsonl) with text and label: the task of a classifier of texts.",
        shown=Shown(file=True),
        min_length=1,
    )

    @model_validator(mode="after")
    def _alone(self) -> Self:
        given = [name for name in (*SOURCES, *OF_LABELS) if getattr(self, name) is not None]
        if labelled_by(self) is not None and len(given) > 1:
            raise ValueError(
                f"labelled prompts stand alone, got prompts.{' and prompts.'.join(given)}"
            )
        if labelled_by(self) is not None:
            _refuse_changed(
                self,
                ("copied", "copied_length"),
                "there are no copied prompts beside labelled ones",
            )
        if self.images is not None:
            _refuse_changed(self, ("tokens", "windows"), "pictures are not cut")
        return self


def _refuse_changed(prompts: Section, names: tuple[str, ...], why: str) -> None:
    """Raises ValueError: a setting that would not be read has another value than its default."""
    for name in names:
        if getattr(prompts, name) != type(prompts).model_fields[name].default:
            raise ValueError(f"prompts.{name} is not read, since {why}; leave it out")


def labelled_by(prompts: Section) -> str | None:
    """The setting that names labelled prompts: `images` or `labelled`; None: neither."""
    return next((name for name in OF_LABELS if getattr(prompts, name, None) is not None), None)
