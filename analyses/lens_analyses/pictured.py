"""Prompts that are pictures, or that have labels: which files they are, and that they are still the same."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.common.errors import LensError
from lens.common.files import open_regular
from lens_analyses.config import RunConfig
from lens_analyses.config.paths import local
from lens_analyses.config.pictures import PictureConfig
from lens_analyses.config.prompts import labelled_by
from lens_analyses.console import UsageError

if TYPE_CHECKING:
    from lens.tasks.labelled import Labelled

LARGEST_PICTURE = 256 << 20
PROFILED = 8
"""Of labelled prompts, whose every head is profiled; the task takes as many as it asks for."""


def reads_pictures(config: RunConfig) -> bool:
    """Whether the prompts of a run are pictures."""
    return isinstance(config.prompts, PictureConfig) or labelled_by(config.prompts) == "images"


def check_reads_text(config: RunConfig, name: str) -> None:
    """Of a model that reads nothing but text.

    Raises:
        UsageError: it is given sounds or pictures.
    """
    given = [one for one in ("audio", "image", "images") if getattr(config.prompts, one, None)]
    if given:
        said = "a sound" if given[0] == "audio" else "a picture"
        raise UsageError(
            f"{name} reads text, and --{given[0]} is {said}; leave it out, or give a model that reads it"
        )


def _profiled(config: RunConfig, place: str | Path) -> "Labelled":
    """The labelled prompts whose heads are profiled: of those of the task the first of each label, a few."""
    from lens.tasks.labelled import read_labelled

    most = PROFILED if config.analysis is None else min(PROFILED, config.analysis.taken)
    return read_labelled(place, most=most)


def pictures_of(config: RunConfig) -> list[Any]:
    """The pictures of a run as `lens.capture` takes them: paths, or pairs of a path and the question."""
    given: Any = config.prompts
    if given.images is not None:
        return _profiled(config, given.images).prompts
    paths = [Path(name) for name in given.files]
    return paths if given.question is None else [(path, given.question) for path in paths]


def read_labelled_prompts(config: RunConfig, name: str) -> tuple[RunConfig, list[tuple[str, str]]]:
    """The title and text of each of the first labelled prompts; of a picture its path is the text.

    The digest is that of all prompts that the task takes, with their labels.
    """
    from lens.tasks.labelled import read_labelled

    prompts, settings = config.prompts, config.analysis
    place = local(getattr(prompts, name))
    found = read_labelled(place, most=None if settings is None else settings.taken)
    is_path = isinstance(found.prompts[0], Path)
    if is_path != (name == "images"):
        other = "--labelled" if name == "images" else "--images"
        raise LensError(f"{place} holds {'pictures' if is_path else 'texts'}; give it as {other}")
    digest = hashlib.sha256()
    for one, label in zip(found.prompts, found.labels, strict=True):
        digest.update(f"{label}\n".encode())
        digest.update(bytes_of(one) if is_path else one.encode())
    sha256 = unchanged(prompts.sha256, digest.hexdigest(), place)
    given = prompts.model_copy(update={name: str(place), "sha256": sha256})
    first = _profiled(config, place)
    sources = [
        (f"{label}: {one.name}" if is_path else f"{label}: {one[:40]}", str(one))
        for one, label in zip(first.prompts, first.labels, strict=True)
    ]
    return config.model_copy(update={"prompts": given}), sources


def bytes_of(path: Path, what: str = "picture") -> bytes:
    """Of a picture, or of what else the files are.

    Raises:
        LensError: there is none.
    """
    if not path.is_file():
        raise LensError(f"no {what} {path}; give {what} files, with commas between them")
    with open_regular(path, most=LARGEST_PICTURE) as file:
        return file.read(LARGEST_PICTURE)


def unchanged(known: str | None, found: str, what: object) -> str:
    """The digest that was found.

    Raises:
        LensError: another one is known.
    """
    if known not in (None, found):
        raise LensError(
            f"{what} changed since the run was configured (SHA-256 {found[:8]}, expected {(known or '')[:8]}); remove "
            "prompts.sha256 from the configuration to take what is there"
        )
    return found
