"""`lens.traces.denoising`: what a diffusion model attends to, step by step, layer by layer, word by word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from lens.common.choices import Count, check_counts, is_whole
from lens.common.errors import LensError
from lens.passes.denoising import DenoisingCall, Pass, denoiser_of, denoising_calls
from lens.traces.denoised import Denoising
from lens.traces.labels import Labels
from lens.traces.latents import LatentGrid, latent_grid
from lens.traces.statistics import COMPARING, LayerRecord, Settings, make_settings, measure
from lens.traces.trace import AttentionTrace, TraceWriter
from lens.traces.writing import provenance

SAME = "same_kind"
"""The rule of `match_mass` of joint attention: mass of a row on its own kind, text on text, picture on picture."""


@contextmanager
def denoising(
    pipeline: Any,
    *,
    steps: Sequence[int] | None = None,
    row: int = -1,
    text: Sequence[str] | None = None,
    statistics: str | Sequence[str] = "all",
    block_size: Count = 64,
    keep_qk: bool = False,
    backend: str = "auto",
) -> Iterator[list[Denoising]]:
    """Record the attention of a diffusion model while it denoises inside the block.

    Args:
        pipeline: of diffusers, or its transformer or UNet; run it inside the block as you like.
        steps: numbers of denoising steps, from 0; None: all. Others run as ever.
        row: of the batch; the last one by default, which has the prompt where a pipeline puts "without" before it.
        text: names of the text's positions, in the order in which the denoiser reads them; None: what the tokenizers of
            a pipeline say, else numbers.
        statistics, block_size, keep_qk, backend: as in `lens.capture`; `keep_qk` is needed for maps of words.

    Yields:
        A list that has one `Denoising` when the block is over.

    Raises:
        LensError: no denoiser, attention that cannot be reached, an output that is not the denoiser's own (the first
            captured pass is run twice and compared), or a block in which no chosen step ran.

    Reference: Tang et al., What the DAAM (maps of words), arXiv 2210.04885; Xia et al., AdaSpa, arXiv 2502.21079
    (patterns and LSE over steps: `lens.policies.transfer([found.trace("joint", step) for step in found.steps])`).

    Example:
        >>> import diffusers
        >>> dit = diffusers.DiTTransformer2DModel(2, 8, 4, num_layers=2, sample_size=8, num_embeds_ada_norm=9).eval()
        >>> with lens.traces.denoising(dit, keep_qk=True) as found:
        ...     made = dit(torch.zeros(1, 4, 8, 8), torch.tensor([7]), torch.tensor([1]))
        >>> found[0].maps("0,0").shape
        (1, 4, 4)
    """
    denoiser = denoiser_of(pipeline)
    for step in steps or ():
        check_counts(0, step=step)
    if not is_whole(row):
        raise LensError(f"row must be the number of a row of the batch, got {row!r}")
    settings = make_settings(
        statistics=statistics, block_size=block_size, keep_qk=keep_qk, backend=backend
    )
    names = _Names(pipeline, text)
    keeping = _Keeping(denoiser, settings, names)
    found: list[Denoising] = []
    with ExitStack() as stack:
        names.listen(stack)
        stack.enter_context(
            denoising_calls(denoiser, keeping.on_call, keeping.on_pass, steps=steps, row=row)
        )
        yield found
    found.append(keeping.finish())


@contextmanager
def texts_read(pipeline: Any) -> Iterator[dict[int, list[str]]]:
    """Number of a text encoder of a pipeline -> the tokens that it was given first in the block: the prompt."""
    read: dict[int, list[str]] = {}

    def hear(number: int, tokenizer: Any) -> Any:
        def heard(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and number not in read:
                read[number] = tokenizer.convert_ids_to_tokens(ids[0].tolist())

        return heard

    with ExitStack() as stack:
        for number, end in enumerate(("", "_2", "_3")):
            tokenizer, encoder = (
                getattr(pipeline, f"{a}{end}", None) for a in ("tokenizer", "text_encoder")
            )
            if isinstance(encoder, nn.Module) and tokenizer is not None:
                hook = encoder.register_forward_pre_hook(hear(number, tokenizer), with_kwargs=True)
                stack.callback(hook.remove)
        yield read


class _Names:
    """What the positions of the text are called: said by the caller, or read off the tokenizers of a pipeline."""

    def __init__(self, pipeline: Any, text: Sequence[str] | None) -> None:
        self._given = None if text is None else list(text)
        self._pipeline = pipeline
        self._read: dict[int, list[str]] = {}

    def listen(self, stack: ExitStack) -> None:
        """Hear what the text encoders are given first: the prompt."""
        self._read = stack.enter_context(texts_read(self._pipeline))

    def of(self, count: int) -> list[str]:
        """Names of `count` positions.

        Raises:
            LensError: the caller named another number of positions.
        """
        if self._given is not None:
            if len(self._given) != count:
                raise LensError(f"text must name {count} positions, got {len(self._given)} names")
            return self._given
        read = self._read
        last = read.get(max(read)) if read else None
        several = [read[min(read)] + last] if len(read) > 1 and last else []
        for one in (*reversed(read.values()), *several):
            if len(one) == count:
                return list(one)
        return [f"text {position}" for position in range(count)]


@dataclass
class _Layer:
    record: LayerRecord
    module: str
    text: tuple[int, int] | None


class _Keeping:
    """Measures the calls of each pass and puts them into traces when it is over."""

    def __init__(self, denoiser: nn.Module, settings: Settings, names: _Names) -> None:
        self._denoiser, self._settings, self._names = denoiser, settings, names
        self._layers: list[tuple[str, _Layer]] = []
        self._passes: list[Pass] = []
        self._traces: dict[tuple[str, int], AttentionTrace] = {}
        self._check = 0.0

    def on_call(self, given: DenoisingCall) -> Tensor:
        settings = self._settings
        keys = given.call.key.shape[2]
        if given.kind == "joint" and given.text is not None:
            label = _kinds(keys, given.text)
            settings = settings.with_labels((Labels(SAME, label, label),))
        output, record = measure(given.call, settings)
        self._layers.append((given.kind, _Layer(record, given.module, given.text)))
        return output

    def on_pass(self, one: Pass) -> None:
        self._check = self._check if one.check is None else one.check
        groups: dict[tuple, list[_Layer]] = {}
        for kind, layer in self._layers:
            record = layer.record
            groups.setdefault((kind, record.queries, record.keys, record.heads), []).append(layer)
        self._layers.clear()
        kinds = [kind for kind, *_ in groups]
        named: list[str] = []
        for (kind, queries, *_), layers in groups.items():
            text = layers[0].text
            pictured = queries - (text[1] - text[0] if kind == "joint" and text else 0)
            grid = latent_grid(self._denoiser, one.inputs, pictured)
            part = kind
            if kinds.count(kind) > 1:
                size = "×".join(map(str, grid.shape)) if grid else str(pictured)
                part = f"{kind} {size}"
            named.append(part)
            if (again := named.count(part)) > 1:  # as many rows, but other keys or heads
                part = f"{part}, {again}"
            self._traces[part, one.step] = self._trace(kind, layers, pictured, grid, one)
        self._passes.append(replace(one, inputs={}))

    def _trace(
        self, kind: str, layers: list[_Layer], pictured: int, grid: LatentGrid | None, one: Pass
    ) -> AttentionTrace:
        first, text = layers[0].record, layers[0].text
        writer = TraceWriter()
        for layer in layers:
            kept = {
                name: tensor[0].numpy()
                for name, tensor in layer.record.variables.items()
                if kind != "cross" or name not in COMPARING
            }
            writer.add_layer(layer.record.layer, kept)
        start, end = text or (0, 0)
        places = grid.names if grid else [str(number) for number in range(pictured)]
        words = self._names.of(end - start) if text else []
        rows = places
        if kind == "joint":
            rows = [*words, *places] if start == 0 else [*places, *words]
        keys = rows
        if kind == "cross":
            keys = [*words, *(f"key {number}" for number in range(len(words), first.keys))]
        behind = end if kind == "joint" and start == 0 else 0
        patches: dict[str, Any] = {"first": None, "why": "the latents' shape does not give places"}
        if grid is not None and len(grid.shape) == 3:
            patches["why"] = "it is a video of several pictures: found.maps(word) has each frame's"
        elif grid is not None:
            patches = {"first": behind}
            patches |= {"height": grid.shape[0], "width": grid.shape[1]}
            patches |= {"of": "queries"} if kind == "cross" else {}
        attributes = self._attributes(layers, one) | {
            "patches": patches,
            "text": text and list(text),
        }
        attributes |= {"latents": [list(grid.shape), behind] if grid else None}
        if kind == "joint" and text is not None:
            own = _kinds(first.keys, text).tolist()
            attributes |= {"labels": {SAME: {"query": own, "key": own}}}
        return writer.finish(
            token_ids=[-1] * len(keys),
            tokens=keys,
            query_ids=[-1] * len(rows) if kind == "cross" else None,
            query_tokens=rows if kind == "cross" else None,
            attributes=attributes | {"part": kind, "segments": None, "picture": None},
        )

    def _attributes(self, layers: list[_Layer], one: Pass) -> dict[str, Any]:
        name, weight = type(self._denoiser).__name__, next(self._denoiser.parameters())
        records = [layer.record for layer in layers]
        return provenance(records, self._settings, weight.dtype, weight.device) | {
            "model": name,
            "model_class": name,
            "revision": None,
            "without_attention": [],
            "twice": [],
            "bos": "absent",
            "text_sha256": None,
            "check": self._check,
            "step": one.step,
            "timestep": one.timestep,
            "modules": [layer.module for layer in layers],
            "labels": {},
        }

    def finish(self) -> Denoising:
        if not self._passes:
            raise LensError(
                f"no chosen step of {type(self._denoiser).__name__} ran inside the block; run the pipeline there, with "
                "more steps than the last one asked for"
            )
        return Denoising(
            steps=tuple(one.step for one in self._passes),
            timesteps=tuple(one.timestep for one in self._passes),
            traces=self._traces,
            model=type(self._denoiser).__name__,
            check=self._check,
        )


def _kinds(positions: int, text: tuple[int, int]) -> np.ndarray:
    """[positions]: 0 for text, 1 for the picture."""
    found = np.ones(positions, np.int64)
    found[slice(*text)] = 0
    return found
