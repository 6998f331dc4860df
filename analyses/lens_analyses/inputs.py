"""From a configuration to prompts: texts cut only on request, and copied random tokens.

Everything that can be wrong with the input is found here, before a run folder exists.
"""

import hashlib
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lens.common.errors import LensError, first_line
from lens.common.files import json_of_line, open_regular, shorten
from lens.models.catalogue import KNOWN
from lens.runs import open_run
from lens_analyses.boxes import read_boxes
from lens_analyses.config import RunConfig
from lens_analyses.config.analyses import CircuitSettings, ExamplesSettings, PoliciesSettings
from lens_analyses.config.paths import local
from lens_analyses.config.pictures import PictureConfig
from lens_analyses.config.prompts import labelled_by
from lens_analyses.config.settings import Section
from lens_analyses.console import UsageError
from lens_analyses.pictured import (
    bytes_of,
    check_reads_text,
    read_labelled_prompts,
    reads_pictures,
    unchanged,
)
from lens_analyses.planned import PlannedPrompt, Source, asked_of, copied_prompts, cut, say_of

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel


OF_PARTS = ("profile", "heads", "sinks", "generate")
"""What a command does that takes encoder-decoders, one attention at a time."""
OF_MIXERS = ("mixers", "circuit")
"""What a command does that takes models without any softmax attention."""
_READ = {
    "input_ids": "text",
    "input_features": "audio",
    "input_values": "audio",
    "pixel_values": "image",
}
"""Input of a model -> the setting that names it."""
_SAID = {"text": "text", "audio": "a sound", "image": "a picture"}
LARGEST_TEXT = 256 << 20
"""Bytes of a file of text; tokens of this much take hours."""
_S = TypeVar("_S", bound=Section)


def read_sources(config: RunConfig) -> tuple[RunConfig, list[Source]]:
    """The texts that `config` names, and `config` with the SHA-256 of the file they come from.

    Raises:
        LensError: missing, unreadable, empty or changed file, or unknown embedded text.
    """
    config, prompts = _absolute_beside(_absolute_model(config)), config.prompts
    if (name := labelled_by(prompts)) is not None:
        config, found = read_labelled_prompts(config, name)
        return config, [Source(*one) for one in found]
    if isinstance(prompts, PictureConfig):
        return _read_pictures(config, prompts)
    if prompts.files:
        return _read_files(config)
    if prompts.text_name is not None:
        from lens.tasks import prompts as embedded

        return config, [_embedded(embedded, prompts.text_name)]
    if prompts.prompt is not None:
        if not prompts.prompt.strip():
            raise LensError("--prompt has no words; give some")
        return config, [Source(shorten(prompts.prompt), prompts.prompt)]
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
    from lens.passes.inputs import accepted

    if (known := KNOWN.get(config.model.name)) is not None and known.context is not None:
        check_reads_text(config, known.name)
    name = config.model.device or "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # ModuleNotFoundError too, of a device that another package brings
        raise UsageError(
            f"device {name!r} cannot be used ({first_line(error)}); use cpu, or see `lens doctor`"
        ) from None
    asked = config.model
    model = lens.load(asked.name, revision=asked.revision, dtype=asked.dtype, device=name)
    if not model.info.attending and config.what not in OF_MIXERS:
        raise UsageError(
            f"{asked.name} has no softmax attention, and this command profiles its heads first; a model of mixers alone "
            "(Mamba, RWKV) is for `lens mixers` and `lens circuit`, in Python lens.mixers and lens.circuits"
        )
    of_pictures = reads_pictures(config)
    if not model.parts and not {*map(_READ.get, accepted(model))} - {"text", None}:
        check_reads_text(config, f"{model.name} ({model.info.class_name})")
    if model.info.vocab is None and model.tokenizer is None and not of_pictures and not model.parts:
        raise UsageError(
            f"{model.name} ({model.info.class_name}) has no vocabulary and reads no text, which this "
            "command is about; `lens vision --image FILE` is for models of pictures (--images FOLDER of heads, sinks, circuit "
            "and redistribute for classifiers), and lens.capture(model, ...) takes what else it reads"
        )
    if model.towers:
        raise UsageError(
            f"{model.info.class_name} has the towers {', '.join(model.towers)}, which read several things at once; "
            "lens.capture(model, inputs) takes them, and model.part(...) is one tower"
        )
    if asked.part is not None and not model.parts:
        raise UsageError(
            f"{model.info.class_name} is no encoder-decoder and has no stages; leave --part out"
        )
    if model.parts:
        return _of_part(model, config)
    for name in ("target", "audio", "image"):
        if not of_pictures and getattr(config.prompts, name, None) is not None:
            raise UsageError(
                f"{model.info.class_name} is no encoder-decoder; leave --{name} out"
                + "; `lens vision --image FILE` is for other models of pictures" * (name == "image")
            )
    return model


def _of_part(model: "LoadedModel", config: RunConfig) -> "LoadedModel":
    """One attention of an encoder-decoder, cross-attention if none is named; of stages one, or the whole if none is.

    Raises:
        LensError: no such part; UsageError: prompts that it does not read, or an analysis that is not of parts.
    """
    from lens.passes.inputs import model_input

    if not model.is_encoder_decoder:
        if config.what != "vision":
            raise UsageError(
                f"{model.info.class_name} has the parts {', '.join(model.parts)}, each with positions of its own; "
                "`lens vision` makes a run of each stage, and lens.capture(model, pictures) gives a trace of each"
            )
        return model if config.model.part is None else model.part(config.model.part)
    if config.what not in OF_PARTS:
        *others, last = (f"`lens {'run' if what == 'profile' else what}`" for what in OF_PARTS)
        raise UsageError(
            f"{model.info.class_name} is an encoder-decoder, which {', '.join(others)} and {last} take (the model writes the "
            "target of a source where none is given); of its heads lens.effect and lens.heads.importance take model.part('cross')"
        )
    prompts: Any = config.prompts
    given = next((name for name in ("audio", "image") if getattr(prompts, name)), "text")
    reads = model_input(model)
    if given != (wanted := _READ.get(reads)):
        how = f"give --{wanted} FILE" if wanted else "lens.capture(model, ...) takes it"
        raise UsageError(
            f"{model.info.class_name} reads {reads}, and --{given} is {_SAID[given]}; {how}"
        )
    return model.part(config.model.part or ("cross" if "cross" in model.parts else "decoder"))


def plan(model: "LoadedModel", config: RunConfig, sources: list[Source]) -> list[PlannedPrompt]:
    """All prompts of the run, in order.

    Raises:
        LensError: a text that is empty, too long or too short, or a copied prompt that does not fit.
    """
    planned = []
    if model.is_encoder_decoder:
        return _pairs(model, config, sources)
    if reads_pictures(config):
        question = getattr(config.prompts, "question", None)
        return [_picture(model, source, question) for source in sources]
    for source in sources:
        try:
            planned += cut(model, config, source)
        except LensError as error:
            if len(sources) == 1:
                raise
            raise LensError(f"{source.title}: {error}") from error
    return planned if labelled_by(config.prompts) else [*planned, *copied_prompts(model, config)]


def _pairs(model: "LoadedModel", config: RunConfig, sources: list[Source]) -> list[PlannedPrompt]:
    """Sources with their targets, which the model writes where none is given; ids are those of the keys."""
    from lens.passes.sources import read_sources

    if not sources:
        raise LensError(
            "an encoder-decoder reads sources: give --prompt, --text, --text-name or --prompts, --audio or --image"
        )
    if config.prompts.files:
        return [_heard_or_seen(model, config, source) for source in sources]
    if config.prompts.target is not None and config.prompts.tokens is not None:
        raise LensError("--tokens cuts sources, and each --target is of a whole one; leave one out")
    say, planned = say_of(model), []
    for source in sources:
        for piece in cut(model, config, source):
            given = piece.ids if source.target is None else (piece.ids, source.target)
            prompt = read_sources(model, given, asked_of(config))[0][0]
            ids, target = prompt.ids or [], prompt.target or []
            keys = target if model.chosen == "decoder" else ids
            title = f"{piece.title}, target of {len(target)} token{'s' * (len(target) != 1)}"
            planned.append(PlannedPrompt("text", title, say(keys), keys, given=(ids, target)))
    return planned


def _heard_or_seen(model: "LoadedModel", config: RunConfig, source: Source) -> PlannedPrompt:
    """A sound or a picture with its target; of its positions only a pass tells what they are."""
    import lens
    from lens.passes.sources import read_sources

    path = Path(source.text)
    given = path if source.target is None else (path, source.target)
    target = read_sources(model, given, asked_of(config))[0][0].target or []
    said = say_of(model)(target)
    title = f"{source.title}, target of {len(target)} token{'s' * (len(target) != 1)}"
    if model.chosen == "decoder":
        return PlannedPrompt("text", title, said, target, given=(path, target))
    trace = lens.capture(model, (path, target), statistics=["received"], progress=False)
    kind = "sound" if config.prompts.audio else "picture"
    ids = trace.dataset["token_id"].values.tolist()
    return PlannedPrompt(kind, title, said, ids, given=(path, target), strings=trace.tokens)


def _read_files(config: RunConfig) -> tuple[RunConfig, list[Source]]:
    """A source for each sound or picture that an encoder-decoder reads: its name, its path as the text, its target."""
    prompts = config.prompts
    paths, digest = [local(name) for name in prompts.files], hashlib.sha256()
    for path in paths:
        digest.update(bytes_of(path, "sound" if prompts.audio else "picture"))
    changed = {"audio" if prompts.audio else "image": ",".join(map(str, paths))}
    sources = [Source(path.name, str(path)) for path in paths]
    if prompts.target is not None:
        target = local(prompts.target)
        said = _read(target)
        digest.update(said.encode())
        sources = _with_targets(sources, said, target)
        changed["target"] = str(target)
    named = ", ".join(path.name for path in paths)
    changed["sha256"] = unchanged(prompts.sha256, digest.hexdigest(), named)
    return _with(config, prompts=_with(prompts, **changed)), sources


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
    names = [path.name for path in paths]
    changed = {"image": ",".join(map(str, paths))}
    if prompts.boxes is not None:
        boxes = local(prompts.boxes)
        digest.update(read_boxes(boxes, names).to_csv().encode())
        changed["boxes"] = str(boxes)
    sha256 = unchanged(prompts.sha256, digest.hexdigest(), ", ".join(names))
    given = _with(prompts, **changed, sha256=sha256)
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


def _absolute_beside(config: RunConfig) -> RunConfig:
    """What an analysis lays beside its own, by its full path; a file that is none is refused before a model is loaded."""
    settings = config.analysis
    if isinstance(settings, PoliciesSettings) and settings.published is not None:
        path = local(settings.published)
        if not path.exists():
            raise LensError(f"no file {path}; --published takes one of policies, or a folder")
        from lens.policies.files import format_of

        format_of(path)
        return _with(config, analysis=_with(settings, published=str(path)))
    if isinstance(settings, CircuitSettings) and settings.compare is not None:
        path = local(settings.compare)
        from lens_analyses.steps.run_circuits import circuit_of

        circuit_of(open_run(path))  # of which model it is is asked later
        return _with(config, analysis=_with(settings, compare=str(path)))
    if isinstance(settings, ExamplesSettings) and settings.corpus is not None:
        path = local(settings.corpus)
        if not path.exists():
            raise LensError(f"no file {path}; --corpus takes a text file, or prompts in one")
        _read(path)
        return _with(config, analysis=_with(settings, corpus=str(path)))
    return config


def _read(path: Path) -> str:
    if not path.exists():
        raise LensError(
            f"no file {path}; give a text file, the words themselves with --prompt, or an embedded text with --text-name"
        )
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
        record = json_of_line(line)
    except ValueError as error:
        raise LensError(
            f"{place} is no JSON: {first_line(error)}; each line is an object with a text"
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


def _with(section: _S, **changed: Any) -> _S:
    return section.model_copy(update=changed)
