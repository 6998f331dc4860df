"""`lens.capture`: prompts in, traces out, one layer in memory at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import torch
from lens_kernels.distributed import Processes

from lens.common.choices import Count, check_counts
from lens.common.errors import LensError
from lens.common.files import as_path
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.inputs import Prompt
from lens.passes.pieces import check_pieces
from lens.passes.sessions import listening, run
from lens.passes.sources import Asked, read_any, read_sources
from lens.passes.split import check_split, processes
from lens.traces.batches import batches, joined, record_of
from lens.traces.generated import check_asked, written_traces
from lens.traces.given import imported_traces
from lens.traces.labels import read_labels
from lens.traces.parts import TraceParts
from lens.traces.pieces import check_chunk, pieces_of, recorded_in_pieces
from lens.traces.recorder import Once, Recorder
from lens.traces.split import record_split
from lens.traces.statistics import LayerRecord, Settings, make_settings
from lens.traces.towers import capture_towers
from lens.traces.trace import AttentionTrace
from lens.traces.writing import Writing, folders_of

LARGEST_MAPS = 4 << 30  # bytes of block maps of one layer


class CaptureOptions(TypedDict, total=False):
    """The options of `capture`, which its overloads share."""

    block_size: int
    statistics: str | Sequence[str]
    keep_qk: bool
    backend: str
    chunk: int | None
    group: Any
    new: int | None
    temperature: float
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
    block_size: Count = 64,
    statistics: str | Sequence[str] = "all",
    keep_qk: bool = False,
    backend: str = "auto",
    chunk: int | None = None,
    group: Any = None,
    new: int | None = None,
    temperature: float = 0.0,
    out: str | Path | None = None,
    progress: bool = True,
    seed: int | None = None,
    attentions: Sequence[Any] | None = None,
    labels: Mapping[str, Any] | None = None,
) -> AttentionTrace | list[AttentionTrace]:
    """Run the model on prompts and keep what its attention did, without ever building N×N.

    Args:
        model: as `lens.load` returns it.
        prompts: one prompt: a text, token ids (a list of integers, a 1-D tensor), what a tokenizer or a
            processor makes of one text or image (of text with images the trace is that of the language
            model, `lens.vision.trace_segments(trace)` says which tokens are the image). Or several: a
            list of these, a 2-D tensor of ids, what a tokenizer or an image processor makes of several.
            Padding is left out; prompts of like length run together where the model takes it, with the
            traces of each alone, to rounding. Of an encoder-decoder a prompt is a source, and
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
        new: tokens that the model writes after each prompt (fewer where it ends): the trace is that of prompt and
            text together as they came about, the prompt in one pass and then token by token. Its attribute
            `prompt_tokens` says where the text begins, and the column `prompt` of `lens.profile` how much a head
            looks back at the prompt while it writes. Of an encoder-decoder the target that it writes for a source, of at
            most so many tokens. None: nothing is written, but by an encoder-decoder where no target is given.
        temperature: of the draws of `new`, by `seed`; 0 takes the likeliest token.
        out: folder for the trace (for several prompts `out/p000`, `out/p001`, ...): each layer is
            written when it is done and leaves memory. In memory if None.
        progress: show a bar with the time left, on stderr, if that is a terminal.
        seed: of the draws of `new`; else that made the prompts, if any, and only noted in the trace.
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
        encoder-decoder three traces, `.encoder`, `.decoder` and `.cross`, unless it is `model.part(...)`; of towers
        (CLIP) one for each, `["text"]` and `["vision"]`.

    Raises:
        LensError: empty or too long prompts, a bad block size, or attention that capture does not
            understand; with `chunk`, a model or prompt that cannot go in pieces; with `new`, a model that does not
            write. A text is never cut: `lens.tasks.take` does that. Given attentions as
            `lens.traces.from_attentions`.

    Example:
        >>> trace = lens.capture(model, "It was the best of times, it was the worst of times")
        >>> trace.received.dims
        ('layer', 'head', 'key')
        >>> numbers = lambda tokens: ([1] * len(tokens), [token.strip().isdigit() for token in tokens])
        >>> trace = lens.capture(model, "In 1851 he wrote of 135 chapters", labels={"numbers": numbers})
        >>> lens.profile(trace)[["layer", "head", "numbers", "numbers_uniform"]]
        >>> written = lens.capture(model, "It was the best of", new=8)
        >>> written.tokens[written.attrs["prompt_tokens"]:]
    """
    if attentions is not None:
        if keep_qk or labels is not None or statistics != "all" or chunk or group or new:
            raise LensError(
                "attentions hold no q and k, and every statistic that they have is kept; leave keep_qk, "
                "statistics, chunk, group, new and labels out"
            )
        return _saved(imported_traces(model, prompts, attentions, block_size), out)
    if model is None:
        raise LensError("model may be None only beside attentions; pass what lens.load returns")
    if new is None and temperature != 0:
        raise LensError("temperature is of what the model writes: give new too, or leave it out")
    if seed is not None:
        check_counts(0, seed=seed)
    if out is not None:
        out = as_path("out", out)
    settings = make_settings(
        statistics=statistics, block_size=block_size, keep_qk=keep_qk, backend=backend
    )
    if not (settings.variables or keep_qk or labels):
        raise LensError("statistics names none; ask for at least one, or for keep_qk=True")
    if chunk is not None and group is not None:
        raise LensError("a prompt goes in pieces (chunk) or over processes (group); leave one out")
    if new is not None:
        _refuse_with(
            "a prompt that the model writes on (new) goes in one pass, with labels of its own",
            chunk=chunk,
            group=group,
            labels=labels,
        )
    if chunk is not None:
        check_chunk(chunk, settings)
    links = None if group is None else processes(group)
    if model.towers:
        _refuse_with(
            "towers read several things at once; of one of them, model.part(...), this can be asked",
            **{"labels": labels, "chunk": chunk, "group": group, "new": new},
        )
        towers: Any = capture_towers(
            model, prompts, settings, out=out, progress=progress, seed=seed
        )
        return towers
    if model.parts:
        _refuse_with(
            "an encoder-decoder has two rows of tokens; which keys of the source a target looks at, "
            "lens.traces.alignment says"
            if model.is_encoder_decoder
            else f"each part of {model.info.class_name} ({', '.join(model.parts)}) has positions of its own",
            **{"labels": labels, "chunk": chunk, "group": group},
            new=None if model.is_encoder_decoder else new,
        )
    wrote: dict[str, Any] = {}
    if new is not None and model.is_encoder_decoder:
        check_asked(new, temperature)
        found, is_single = read_sources(model, prompts, Asked(new, temperature, seed))
        new, wrote = None, {"temperature": float(temperature)}
    else:
        found, is_single = read_any(model, prompts)
    for prompt in found:
        _check_size(model, prompt, settings, new or 0)
        if chunk is not None:
            check_pieces(model, prompt, chunk)
        if links is not None:
            check_split(model, prompt, links)
    writes = links is None or not links.rank
    folders = folders_of(out if writes else None, len(found), is_single)
    if new is not None:
        how = {"new": new, "temperature": temperature, "seed": seed, "progress": progress}
        found = written_traces(model, found, settings, folders, **how)
        return found[0] if is_single else found
    tokens = [
        None if labels is None or one.ids is None else model.token_strings(one.ids) for one in found
    ]
    own = read_labels(labels, tokens)
    has_views = bool(model.parts) and not model.chosen
    views = {part: model.part(part) for part in model.parts} if has_views else {model.chosen: model}

    def written(place: int, chosen: Settings) -> dict[str, Writing]:
        folder = folders[place]
        return {
            part: Writing(
                view, found[place], chosen, folder / part if folder and has_views else folder
            )
            for part, view in views.items()
        }

    layers = sum(len(view.info.attending) for view in views.values())
    traces: list[Any] = [None] * len(found)
    apart = chunk or links or model.parts or labels
    together = [[place] for place in range(len(found))] if apart else batches(model, found)
    total = sum(pieces_of(prompt, chunk) for prompt in found) * layers
    with advancing(f"{model.name}: layers", total, progress) as advance:
        for places in together:
            chosen = settings.with_labels(own[places[0]])
            prompts = [found[place] for place in places]
            writing = [written(place, chosen) for place in places]
            start = time.perf_counter()
            if len(places) > 1:
                _record_together(writing, model, prompts, chosen, advance)
            else:
                folder = folders[places[0]]
                _record(writing[0], model, prompts[0], chosen, chunk, links, advance, folder)
            note = {
                **wrote,
                "seed": seed,
                "chunk": chunk if pieces_of(prompts[0], chunk) > 1 else None,
                "processes": 1 if links is None else links.size,
                "seconds": (time.perf_counter() - start) / len(places),
            }
            for place, parts in zip(places, writing, strict=True):
                done = {part: one.finish(note) for part, one in parts.items()}
                traces[place] = TraceParts(done) if has_views else done[model.chosen]
    return traces[0] if is_single else traces


def _saved(found: AttentionTrace | list[AttentionTrace], out: str | Path | None) -> Any:
    """The trace or traces, each in a folder of its own where `out` is given."""
    several = found if isinstance(found, list) else [found]
    folders = folders_of(out, len(several), several is not found)
    for one, folder in zip(several, folders, strict=True):
        if folder is not None:
            one.save(folder)
    return found


def _refuse_with(why: str, **given: Any) -> None:
    """Raises LensError: arguments that do not go with what else was asked for."""
    if named := [name for name, value in given.items() if value]:
        raise LensError(f"{why}; leave {', '.join(named)} out")


def _record(
    writing: Mapping[str, Writing],
    model: LoadedModel,
    prompt: Prompt,
    settings: Settings,
    chunk: int | None,
    links: Processes | None,
    advance: Callable[[int], None],
    folder: Path | None,
) -> None:
    """Run a prompt once; the traces of all parts take their layers from it."""

    def done(part: str, record: LayerRecord) -> None:
        writing[part].take(record)
        advance(1)

    if links is not None:
        record_split(model, prompt, settings, links, partial(done, model.chosen))
        return
    if chunk is not None and pieces_of(prompt, chunk) > 1:
        for record in recorded_in_pieces(model, prompt, settings, chunk, advance, folder):
            writing[model.chosen].take(record)
        return
    recorders = {
        part: Once(Recorder(settings, partial(done, part)), model.info.class_name)
        for part in writing
    }

    def on_layer(call: LayerCall) -> torch.Tensor:
        if call.place in recorders:
            return recorders[call.place].on_layer(call)
        return attend(call, statistics=()).output

    with torch.no_grad(), listening(model, on_layer, parts=True):
        run(model, prompt.inputs)


def _record_together(
    writing: Sequence[Mapping[str, Writing]],
    model: LoadedModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    advance: Callable[[int], None],
) -> None:
    """Run prompts of token ids as one batch; each trace takes its part of every layer."""
    rows = [one.ids or [] for one in prompts]

    def done(record: LayerRecord) -> None:
        for number, (one, row) in enumerate(zip(writing, rows, strict=True)):
            one[model.chosen].take(record_of(record, number, len(row), settings.block_size))
        advance(len(rows))

    recorder = Once(Recorder(settings, done), model.info.class_name)
    with torch.no_grad(), listening(model, recorder.on_layer, parts=True):
        run(model, joined(model, rows))


def _check_size(model: LoadedModel, prompt: Prompt, settings: Settings, new: int) -> None:
    if prompt.ids is None or not settings.variables & {"block_mass", "block_max"}:
        return
    length = len(prompt.ids) + new
    blocks = -(-length // settings.block_size)
    size = 8 * model.info.heads * blocks**2
    if size > LARGEST_MAPS:
        fits = int(length / (LARGEST_MAPS / (8 * model.info.heads)) ** 0.5) + 1
        raise LensError(
            f"block_size {settings.block_size} makes block maps of {size / 2**30:.0f} GiB per layer for "
            f"{length:,} tokens; use at least {fits}"
        )
