"""From a configuration to prompts: texts cut only on request, and copied random tokens.

Everything that can be wrong with the input is found here, before a run folder exists.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lens.common.errors import LensError
from lens.common.files import open_regular
from lens.models import vocabulary
from lens.models.catalogue import KNOWN
from lens_analyses.config import RunConfig
from lens_analyses.config.models import labelled_by
from lens_analyses.config.paths import local
from lens_analyses.config.pictures import PictureConfig
from lens_analyses.config.settings import Section
from lens_analyses.console import UsageError
from lens_analyses.pictured import bytes_of, read_labelled_prompts, reads_pictures, unchanged

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel


LARGEST_TEXT = 256 << 20
"""Bytes of a file of text; tokens of this much take hours."""
_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt before anything was computed.

    Attributes:
        kind: `text` or `copied`.
        title: for people: where it comes from and how it was cut.
        text: what the tokens say.
        ids: token ids, the first one included that the tokenizer puts there.
        seed: of a copied prompt, else None.
        given: what `lens.capture` takes, where it is not the ids: a picture, or a pair of one and a text.
        strings: of a picture's positions.
    """

    kind: str
    title: str
    text: str
    ids: list[int]
    seed: int | None = None
    given: Any = None
    strings: list[str] | None = None

    @property
    def prompt(self) -> Any:
        """As `lens.capture` takes it."""
        return self.ids if self.given is None else self.given


@dataclass(frozen=True)
class Source:
    """A text to analyse: its title, what it says, and of an encoder-decoder what its decoder reads, if it is given."""

    title: str
    text: str
    target: str | None = None


def read_sources(config: RunConfig) -> tuple[RunConfig, list[Source]]:
    """The texts that `config` names, and `config` with the SHA-256 of the file they come from.

    Raises:
        LensError: missing, unreadable, empty or changed file, or unknown embedded text.
    """
    config, prompts = _absolute_model(config), config.prompts
    if (name := labelled_by(prompts)) is not None:
        config, found = read_labelled_prompts(config, name)
        return config, [Source(*one) for one in found]
    if isinstance(prompts, PictureConfig):
        return _read_pictures(config, prompts)
    if prompts.text_name is not None:
        from lens.tasks import prompts as embedded

        return config, [_embedded(embedded, prompts.text_name)]
    name = prompts.text or prompts.batch
    if name is None:
        return config, []
    path = local(name)
    content = _read(path)
    target = None if prompts.target is None else local(prompts.target)
    said = "" if target is None else _read(target)
    sha256 = hashlib.sha256((content + said).encode()).hexdigest()
    unchanged(prompts.sha256, sha256, path)
    if prompts.text is not None:
        sources = [Source(path.name, content.strip() if target else content, said.strip() or None)]
        config = _with(config, prompts=_with(prompts, text=str(path), sha256=sha256))
    else:
        sources = _batch(path, content)
        if target is not None:
            sources = _with_targets(sources, said, target)
        config = _with(config, prompts=_with(prompts, batch=str(path), sha256=sha256))
    if target is not None:
        config = _with(config, prompts=_with(config.prompts, target=str(target)))
    return config, sources


def _with_targets(sources: list[Source], said: str, path: Path) -> list[Source]:
    """The sources with the lines of a file of targets."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if len(lines) != len(sources):
        raise LensError(
            f"{path} has {len(lines)} targets and there are {len(sources)} sources; give a line for each"
        )
    return [Source(one.title, one.text, line) for one, line in zip(sources, lines, strict=True)]


def load_model(config: RunConfig) -> "LoadedModel":
    """The model of the run, on its device.

    Raises:
        LensError: as `lens.load`; UsageError: a device that is not there, or a model that reads no text.
    """
    import torch

    import lens

    name = config.model.device or "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(
            f"device {name!r} cannot be used ({reason}); use cpu, or see `lens doctor`"
        ) from None
    asked = config.model
    model = lens.load(asked.name, revision=asked.revision, dtype=asked.dtype, device=name)
    of_pictures = reads_pictures(config)
    if model.info.vocab is None and model.tokenizer is None and not of_pictures:
        raise UsageError(
            f"{model.name} ({model.info.class_name}) has no vocabulary and reads no text, which this "
            "command is about; `lens vision --image FILE` is for models of pictures (`lens heads --images FOLDER` for classifiers), and lens.capture(model, ...) "
            "takes what else it reads"
        )
    if model.towers:
        raise UsageError(
            f"{model.info.class_name} has the towers {', '.join(model.towers)}, which read several things at once; "
            "lens.capture(model, inputs) takes them, and model.part(...) is one tower"
        )
    if asked.part is not None and not model.parts:
        raise UsageError(f"{model.info.class_name} is no encoder-decoder; leave --part out")
    if model.parts:
        return _of_part(model, config)
    if getattr(config.prompts, "target", None) is not None:
        raise UsageError(f"{model.info.class_name} is no encoder-decoder; leave --target out")
    return model


def _of_part(model: "LoadedModel", config: RunConfig) -> "LoadedModel":
    """One attention of an encoder-decoder, cross-attention if none is named.

    Raises:
        LensError: no encoder-decoder, or without such a part; UsageError: one that reads no text, or an analysis.
    """
    from lens.passes.inputs import model_input

    if model.parts and not model.is_encoder_decoder:
        raise UsageError(
            f"{model.info.class_name} has the parts {', '.join(model.parts)}, each with positions of its own; "
            "lens.capture(model, pictures) gives a trace of each"
        )
    if model.parts and config.what != "profile":
        raise UsageError(
            f"{model.info.class_name} is an encoder-decoder, which `lens run` profiles; of its heads lens.effect and "
            "lens.heads.importance take model.part('cross')"
        )
    if model.parts and model_input(model) != "input_ids":
        raise UsageError(
            f"{model.info.class_name} reads {model_input(model)}, and this command reads text; "
            "lens.capture(model, ...) takes it"
        )
    return model.part(config.model.part or ("cross" if "cross" in model.parts else "decoder"))


def plan(model: "LoadedModel", config: RunConfig, sources: list[Source]) -> list[PlannedPrompt]:
    """All prompts of the run, in order.

    Raises:
        LensError: a text that is empty, too long or too short, or a copied prompt that does not fit.
    """
    planned = []
    if model.parts:
        return _pairs(model, config, sources)
    if reads_pictures(config):
        question = getattr(config.prompts, "question", None)
        return [_picture(model, source, question) for source in sources]
    for source in sources:
        try:
            planned += _cut(model, config, source)
        except LensError as error:
            if len(sources) == 1:
                raise
            raise LensError(f"{source.title}: {error}") from error
    return planned if labelled_by(config.prompts) else [*planned, *_copied(model, config)]


def _pairs(model: "LoadedModel", config: RunConfig, sources: list[Source]) -> list[PlannedPrompt]:
    """Sources with their targets, which the model writes where none is given; ids are those of the keys."""
    from lens.passes.sources import read_sources

    if not sources:
        raise LensError("an encoder-decoder reads sources: give --text, --text-name or --prompts")
    if config.prompts.target is not None and config.prompts.tokens is not None:
        raise LensError("--tokens cuts sources, and each --target is of a whole one; leave one out")
    say, planned = _say(model), []
    for source in sources:
        for piece in _cut(model, config, source):
            given = piece.ids if source.target is None else (piece.ids, source.target)
            prompt = read_sources(model, given)[0][0]
            ids, target = prompt.ids or [], prompt.target or []
            keys = target if model.chosen == "decoder" else ids
            title = f"{piece.title}, target of {len(target)} tokens"
            planned.append(PlannedPrompt("text", title, say(keys), keys, given=(ids, target)))
    return planned


def _read_pictures(config: RunConfig, prompts: PictureConfig) -> tuple[RunConfig, list[Source]]:
    """A source for each picture: its name, and its path as the text."""
    if not prompts.files:
        raise LensError(
            "which picture? --image FILE, or several with commas; or --images FOLDER of labelled ones"
        )
    paths = [local(name) for name in prompts.files]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes_of(path))
    named = ", ".join(path.name for path in paths)
    sha256 = unchanged(prompts.sha256, digest.hexdigest(), named)
    given = _with(prompts, image=",".join(map(str, paths)), sha256=sha256)
    return _with(config, prompts=given), [Source(path.name, str(path)) for path in paths]


def _picture(model: "LoadedModel", source: Source, question: str | None) -> PlannedPrompt:
    """A picture (and a question), with what its positions are: of what a model makes of it only a pass tells it."""
    import lens

    path = Path(source.text)
    given = path if question is None else (path, question)
    trace = lens.capture(model, given, statistics=["received"], progress=False)
    ids = trace.dataset["token_id"].values.tolist()
    return PlannedPrompt(
        "picture", source.title, question or "", ids, given=given, strings=trace.tokens
    )


def _absolute_model(config: RunConfig) -> RunConfig:
    """A model folder by its full path, so that the run can be made again from anywhere."""
    folder = local(config.model.name)
    if config.model.name in KNOWN or not folder.is_dir():
        return config
    return _with(config, model=_with(config.model, name=str(folder)))


def _read(path: Path) -> str:
    if not path.exists():
        raise LensError(f"no file {path}; give a text file, or an embedded text with --text-name")
    try:
        with open_regular(path, most=LARGEST_TEXT) as file:
            content = StringIO(file.read(LARGEST_TEXT).decode(), newline=None).read()
    except UnicodeDecodeError as error:
        raise LensError(f"{path} is no UTF-8 text (byte {error.start}); convert it first") from None
    if not content.strip():
        raise LensError(f"the text {path} is empty; give one with at least one token")
    return content


def _embedded(module, name: str) -> Source:
    content = module.text(name)
    return Source(module.TEXTS[name].title, content)


def _batch(path: Path, content: str) -> list[Source]:
    lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    if path.suffix not in (".jsonl", ".ndjson"):
        return [Source(f"{path.name}, line {number}", line.strip()) for number, line in lines]
    return [_record(f"{path.name}, line {number}", line) for number, line in lines]


def _record(place: str, line: str) -> Source:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise LensError(
            f"{place} is no JSON: {error.msg}; each line is an object with a text"
        ) from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise LensError(
            f'{place} has no text; each line must be like {{"text": "Once upon a time"}}'
        )
    title, target = record.get("title"), record.get("target")
    return Source(
        title if isinstance(title, str) and title else place,
        text,
        target if isinstance(target, str) and target.strip() else None,
    )


def _cut(model: "LoadedModel", config: RunConfig, source: Source) -> list[PlannedPrompt]:
    ids = model.encode(source.text)
    tokens, windows, context = config.prompts.tokens, config.prompts.windows, model.info.context
    if tokens is None:
        if context is not None and len(ids) > context:
            raise LensError(
                f"the text has {len(ids):,} tokens and {model.name} takes {context:,}; --tokens {context} "
                f"takes the first {context:,}, and --windows N with it as many pieces as you like"
            )
        return [PlannedPrompt("text", source.title, source.text, ids)]
    if context is not None and tokens > context:
        raise LensError(
            f"--tokens {tokens} is more than the {context:,} that {model.name} takes; use "
            f"--tokens {context}, and --windows {-(-tokens // context)} for as much text"
        )
    if windows is not None:
        return _windows(model, source, ids, tokens, windows)
    if tokens > len(ids):
        raise LensError(
            f"the text has {len(ids):,} tokens of {model.name} and --tokens asks for {tokens:,}; "
            "ask for fewer, or leave --tokens out to take all"
        )
    if tokens == len(ids):
        return [PlannedPrompt("text", source.title, source.text, ids)]
    title = f"{source.title}: first {tokens:,} of {len(ids):,} tokens"
    found = vocabulary.windows(ids, tokens, vocabulary.around(model))
    return [_piece(model, title, found[0] if found else ids[:tokens])]


def _windows(
    model: "LoadedModel", source: Source, ids: list[int], tokens: int, windows: int
) -> list[PlannedPrompt]:
    """Consecutive pieces, each between the special tokens that the tokenizer puts round the whole text."""
    pair = vocabulary.around(model)
    start, _, end = vocabulary.unwrapped(ids, pair)
    found = vocabulary.windows(ids, tokens, pair)
    if len(found) < windows:
        raise LensError(
            f"the text has {len(ids):,} tokens of {model.name}, enough for {len(found)} windows of {tokens} "
            f"and not for {windows}; ask for fewer or shorter ones"
        )
    size = tokens - len(start) - len(end)
    return [
        _piece(
            model,
            f"{source.title}: tokens {index * size:,} to {(index + 1) * size - 1:,}",
            piece,
        )
        for index, piece in enumerate(found[:windows])
    ]


def _piece(model: "LoadedModel", title: str, ids: list[int]) -> PlannedPrompt:
    return PlannedPrompt("text", title, _say(model)(ids), ids)


def _copied(model: "LoadedModel", config: RunConfig) -> list[PlannedPrompt]:
    if not config.prompts.copied:
        return []
    from lens.tasks.prompts import copied

    length = config.prompts.copied_length
    say = _say(model)
    found = []
    for index in range(config.prompts.copied):
        seed = config.seed + index
        ids = copied(model, length, seed)
        title = f"{length} random tokens, then the same {length} again (seed {seed})"
        found.append(PlannedPrompt("copied", title, say(ids), ids, seed))
    return found


def _say(model: "LoadedModel") -> Callable[[list[int]], str]:
    """Ids to text, without the BOS, or what else the tokenizer puts round one."""
    pair = ([], []) if model.tokenizer is None else vocabulary.around(model)

    def say(ids: list[int]) -> str:
        body = vocabulary.unwrapped(ids[1:] if ids[:1] == [model.bos_id] else ids, pair)[1]
        if model.tokenizer is None:
            return " ".join(map(str, body))
        return model.tokenizer.decode(body)

    return say


def _with(section: _S, **changed: Any) -> _S:
    return section.model_copy(update=changed)
