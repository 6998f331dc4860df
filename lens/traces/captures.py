"""`lens.capture`: prompts in, traces out, one layer in memory at a time."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch
from lens_kernels.distributed import Processes

from lens.common.choices import check_counts
from lens.common.errors import LensError
from lens.common.progress import advancing
from lens.common.version import __version__
from lens.models.loaded import LoadedModel, check_loaded
from lens.models.sizes import image_token
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.pieces import check_pieces
from lens.passes.sessions import listening, run
from lens.passes.sources import read_sources
from lens.passes.split import check_split, processes
from lens.traces.given import given_traces
from lens.traces.labels import read_labels
from lens.traces.naming import keys_of, queries_of
from lens.traces.parts import TraceParts
from lens.traces.pictures import picture_note
from lens.traces.pieces import check_chunk, pieces_of, recorded_in_pieces
from lens.traces.recorder import Once, Recorder
from lens.traces.segments import segments
from lens.traces.split import record_split
from lens.traces.statistics import COMPARING, PREFIX, LayerRecord, Settings, make_settings
from lens.traces.trace import AttentionTrace, TraceWriter

LARGEST_MAPS = 4 << 30  # bytes of block maps of one layer
_PACKAGES = ("torch", "transformers", "transformer-lens", "numpy", "xarray")


class CaptureOptions(TypedDict, total=False):
    """The options of `capture`, which its overloads share."""

    block_size: int
    statistics: str | Sequence[str]
    keep_qk: bool
    backend: str
    chunk: int | None
    group: Any
    out: str | Path | None
    progress: bool
    seed: int | None
    attentions: Sequence[Any] | None
    labels: Mapping[str, Any] | None


@overload
def capture(
    model: LoadedModel | None, prompts: str | Sequence[int], **options: Unpack[CaptureOptions]
) -> AttentionTrace: ...
@overload
def capture(
    model: LoadedModel | None,
    prompts: list[str] | list[list[int]] | list[torch.Tensor],
    **options: Unpack[CaptureOptions],
) -> list[AttentionTrace]: ...
@overload
def capture(model: LoadedModel | None, prompts: Any, **options: Unpack[CaptureOptions]) -> Any: ...
def capture(
    model: LoadedModel | None,
    prompts: Any,
    *,
    block_size: int = 64,
    statistics: str | Sequence[str] = "all",
    keep_qk: bool = False,
    backend: str = "auto",
    chunk: int | None = None,
    group: Any = None,
    out: str | Path | None = None,
    progress: bool = True,
    seed: int | None = None,
    attentions: Sequence[Any] | None = None,
    labels: Mapping[str, Any] | None = None,
) -> AttentionTrace | list[AttentionTrace]:
    """Run the model once per prompt and keep what its attention did, without ever building N×N.

    Args:
        model: as `lens.load` returns it.
        prompts: one prompt: a text, token ids (a list of integers, a 1-D tensor), what a tokenizer or a
            processor makes of one text or image (of text with images the trace is that of the language
            model, `lens.vision.trace_segments(trace)` says which tokens are the image). Or several: a
            list of these, a 2-D tensor of ids, what a tokenizer or an image processor makes of several.
            Each prompt is run on its own, so padding is left out. Of an encoder-decoder a prompt is a source, and
            the model writes the target itself, or a pair (source, target), or a mapping of its inputs.
        block_size: positions per block of the maps.
        statistics: "all", or names of trace variables (docs/schema/trace.md).
        keep_qk: keep q and k too, for exact tiles; 2 × positions × head_dim numbers per head.
        backend: of `lens_kernels`: "auto", "cpu", "triton", "torch" or "reference".
        chunk: run prompts of more tokens than this in pieces of so many, with the model's key cache: the
            trace is that of the whole prompt, to rounding, and what the model holds beside keys and
            statistics is that of one piece. A multiple of `block_size`. Models whose tokens see later ones,
            that keep no keys or compute something else in pieces are refused. None: whole.
        group: a process group of torch.distributed (`torch.distributed.group.WORLD` for all of torchrun): each
            process runs the model on its part of the tokens, keys go round, and every process returns the
            trace of the whole; all of them must call with the same prompts. `out` is written by the first.
            What cannot be split is refused.
        out: folder for the trace (for several prompts `out/p000`, `out/p001`, ...): each layer is
            written when it is done and leaves memory. In memory if None.
        progress: show a bar with the time left, on stderr, if that is a terminal.
        seed: that made the prompts, if any; only noted in the trace.
        attentions: probabilities that somebody has already, one array [batch, heads, n, n] per layer as
            transformers returns them: nothing is run, and what cannot be known from them (`lse`, `max_logit`, q and
            k) is absent. `model` says what its tokens are; it may be None, and `prompts` a list of token strings
            or ids, or None.
        labels: your own, name -> (query labels, key labels): the mass of each row on keys that have its
            label is a rule of `match_mass` and a column of `lens.profile`, exact at any length. Either
            is a list of integers or texts, one per token, None where a token matches nothing; of
            several prompts one for all or a list for each; or, for the pair, a function of a prompt's
            tokens that returns it.

    Returns:
        The trace of one prompt; a list of traces for a list or a 2-D tensor, also for one of a single row. Of an
        encoder-decoder three traces, `.encoder`, `.decoder` and `.cross`, unless it is `model.part(...)`.

    Raises:
        LensError: empty or too long prompts, a bad block size, or attention that capture does not
            understand; with `chunk`, a model or prompt that cannot go in pieces. A text is never cut: `lens.tasks.take` does that. Given attentions as
            `lens.traces.from_attentions`.

    Example:
        >>> trace = lens.capture(model, "It was the best of times, it was the worst of times")
        >>> trace.received.dims
        ('layer', 'head', 'key')
        >>> numbers = lambda tokens: ([1] * len(tokens), [token.strip().isdigit() for token in tokens])
        >>> trace = lens.capture(model, "In 1851 he wrote of 135 chapters", labels={"numbers": numbers})
        >>> lens.profile(trace)[["layer", "head", "numbers", "numbers_uniform"]]
    """
    if attentions is not None:
        if keep_qk or labels is not None or statistics != "all" or chunk or group:
            raise LensError(
                "attentions hold no q and k, and every statistic that they have is kept; leave keep_qk, "
                "statistics, chunk, group and labels out"
            )
        found = given_traces(model, prompts, attentions, block_size)
        for number, one in enumerate(found if isinstance(found, list) else [found]):
            if out is not None:
                one.save(Path(out) / f"p{number:03d}" if isinstance(found, list) else out)
        return found
    if model is None:
        raise LensError("model may be None only beside attentions; pass what lens.load returns")
    if seed is not None:
        check_counts(0, seed=seed)
    if out is not None and (not isinstance(out, str | os.PathLike) or not str(out)):
        raise LensError(f"out must be a folder, got {out!r}")
    settings = make_settings(
        statistics=statistics, block_size=block_size, keep_qk=keep_qk, backend=backend
    )
    if not (settings.variables or keep_qk or labels):
        raise LensError("statistics names none; ask for at least one, or for keep_qk=True")
    if chunk is not None and group is not None:
        raise LensError("a prompt goes in pieces (chunk) or over processes (group); leave one out")
    if chunk is not None:
        check_chunk(chunk, settings)
    links = None if group is None else processes(group)
    check_loaded(model)
    if model.parts:
        _refuse_on_parts(labels=labels, chunk=chunk, group=group)
    reading = read_sources(model, prompts) if model.parts else None
    found, is_single = reading or read_prompts(model, prompts, whole=True)
    for prompt in found:
        _check_size(model, prompt, settings)
        if chunk is not None:
            check_pieces(model, prompt, chunk)
        if links is not None:
            check_split(model, prompt, links)
    tokens = [None if one.ids is None else model.token_strings(one.ids) for one in found]
    own = read_labels(labels, tokens)
    views = {part: model.part(part) for part in model.parts if part == (model.chosen or part)}
    layers = [len(one.info.attending) for one in views.values() or [model]]
    traces = []
    total = sum(pieces_of(prompt, chunk) for prompt in found) * sum(layers)
    with advancing(f"{model.name}: layers", total, progress) as advance:
        for number, prompt in enumerate(found):
            if links is not None and links.rank:
                out = None
            folder = out if out is None or is_single else Path(out) / f"p{number:03d}"
            chosen = settings.with_labels(own[number])

            def captured(
                view: LoadedModel,
                part: str = "",
                folder: Any = folder,
                prompt: Any = prompt,
                chosen: Any = chosen,
            ) -> Any:
                inside = folder if folder is None or not part else Path(folder) / part
                return _capture_one(view, prompt, chosen, chunk, links, inside, seed, advance)

            if not model.parts or model.chosen:
                traces.append(captured(model))
            else:
                traces.append(TraceParts({part: captured(views[part], part) for part in views}))
    return traces[0] if is_single else traces


def _refuse_on_parts(**given: Any) -> None:
    """Raises LensError: what an encoder-decoder's prompts cannot have."""
    for name, value in given.items():
        if value:
            raise LensError(
                f"{name} is for one row of tokens, and an encoder-decoder has two; which keys of the source a "
                "target looks at, lens.traces.alignment says"
            )


def _capture_one(
    model: LoadedModel,
    prompt: Prompt,
    settings: Settings,
    chunk: int | None,
    links: Processes | None,
    out: str | Path | None,
    seed: int | None,
    advance: Callable[[int], None],
) -> AttentionTrace:
    start = time.perf_counter()
    tokens_of = _segments(model, prompt)
    writer = TraceWriter(out)
    layers: list[LayerRecord] = []

    def take(record: LayerRecord) -> None:
        """Hand the arrays to the writer and keep only the numbers that describe the layer."""
        if layers:
            _check_alike(model, layers[0], record, settings)
        kept = {
            name: tensor[0].numpy()
            for name, tensor in record.variables.items()
            if not record.cross or name not in COMPARING
        }
        writer.add_layer(record.layer, kept)
        record.variables.clear()
        layers.append(record)

    def done(record: LayerRecord) -> None:
        take(record)
        advance(1)

    if links is not None:
        record_split(model, prompt, settings, links, done)
    elif chunk is None or pieces_of(prompt, chunk) == 1:
        chunk = None
        once = Once(Recorder(settings, done), model.info.class_name)
        with torch.no_grad(), listening(model, once.on_layer, parts=True):
            run(model, prompt.inputs)
    else:
        for record in recorded_in_pieces(model, prompt, settings, chunk, advance):
            take(record)
    if not layers:
        raise LensError(
            f"cannot reach the attention of {model.info.class_name}: no layer asked for its "
            "attention function on this prompt"
        )
    for own in settings.labels:
        own.check(layers[0].keys)
    keys = keys_of(model, prompt, layers[0].keys)
    rows = queries_of(model, prompt, layers[0].queries) if model.chosen == "cross" else None
    more: dict[str, Any] = {"segments": tokens_of, "patches": keys.patches}
    more |= {"picture": picture_note(model, prompt)}
    if model.parts:
        more |= {"part": model.chosen}
    if keys.seconds is not None:
        more |= {"seconds_per_position": keys.seconds}
    return writer.finish(
        token_ids=keys.ids,
        tokens=keys.names,
        query_ids=None if rows is None else rows.ids,
        query_tokens=None if rows is None else rows.names,
        attributes=_attributes(model, prompt, settings, layers, seed)
        | more
        | {"chunk": chunk, "processes": 1 if links is None else links.size}
        | {"seconds": time.perf_counter() - start},
    )


def _check_alike(
    model: LoadedModel, first: LayerRecord, record: LayerRecord, settings: Settings
) -> None:
    """Raises LensError: a layer that does not fit into one trace with the first."""
    where = f"layer {record.layer} of {model.info.class_name}"
    if (record.queries, record.keys) != (first.queries, first.keys):
        raise LensError(
            f"{where} attends from {record.queries} to {record.keys} positions, layer {first.layer} from "
            f"{first.queries} to {first.keys}; a trace holds one sequence: capture one tower, or use "
            "lens.traces.capturing(model)"
        )
    if record.heads != first.heads or record.causal != first.causal:
        kinds = [
            f"{one.heads} {'causal' if one.causal else 'two-way'} heads" for one in (record, first)
        ]
        raise LensError(
            f"{where} has {kinds[0]}, layer {first.layer} {kinds[1]}; a trace needs the same in every "
            "layer: use lens.traces.capturing(model)"
        )
    sizes = [(one.kv_heads, one.head_dim) for one in (record, first)]
    if settings.keep_qk and sizes[0] != sizes[1]:
        raise LensError(
            f"{where} has (key heads, head_dim) = {sizes[0]}, layer {first.layer} {sizes[1]}; q and k of "
            "such layers do not fit into one trace: capture without keep_qk"
        )


def _attributes(
    model: LoadedModel,
    prompt: Prompt,
    settings: Settings,
    layers: list[LayerRecord],
    seed: int | None,
) -> dict[str, Any]:
    """Provenance, as in docs/schema/trace.md."""
    first = layers[0]
    starts_with_bos = (
        bool(prompt.ids) and model.bos_id is not None and prompt.ids[0] == model.bos_id
    )
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.name,
        "model_class": model.info.class_name,
        "revision": model.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "backend": first.backend,
        "block_size": settings.block_size,
        "causal": all(layer.causal for layer in layers),
        "windows": [layer.window for layer in layers],
        "softcap": first.softcap,
        "scale": [layer.scale for layer in layers],
        "learned_sinks": any(layer.sink_logits is not None for layer in layers),
        "kv_heads": first.kv_heads,
        "without_attention": list(model.info.without_attention),
        "twice": list(model.info.twice),
        "prefix": PREFIX,
        "bos": "added" if starts_with_bos else "absent",
        "seed": seed,
        "tokens": first.keys,
        "text_sha256": prompt.sha256,
        "versions": _versions(),
        "check": model.check,
        "labels": {
            one.name: {"query": one.query.tolist(), "key": one.key.tolist()}
            for one in settings.labels
        },
    }


def _segments(model: LoadedModel, prompt: Prompt) -> dict[str, Any] | None:
    """What the tokens of a prompt with images are; None for any other prompt."""
    if prompt.ids is None or "pixel_values" not in prompt.inputs:
        return None
    if image_token(model.model.config) is None:  # images beside the text, not inside
        return None
    return segments(model, prompt.inputs).to_dict()


def _check_size(model: LoadedModel, prompt: Prompt, settings: Settings) -> None:
    if prompt.ids is None or not settings.variables & {"block_mass", "block_max"}:
        return
    blocks = -(-len(prompt.ids) // settings.block_size)
    size = 8 * model.info.heads * blocks**2
    if size > LARGEST_MAPS:
        fits = int(len(prompt.ids) / (LARGEST_MAPS / (8 * model.info.heads)) ** 0.5) + 1
        raise LensError(
            f"block_size {settings.block_size} makes block maps of {size / 2**30:.0f} GiB per layer for "
            f"{len(prompt.ids):,} tokens; use at least {fits}"
        )


def _versions() -> dict[str, str]:
    found = {"attention-lens": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
