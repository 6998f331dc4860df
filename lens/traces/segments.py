"""Token segments of a vision-language prompt: what comes before the image, the image, and the text after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.given import given_as
from lens.common.results import Result, Sentence, counted
from lens.models.loaded import LoadedModel
from lens.models.sizes import image_token
from lens.traces.patches import grid_of

if TYPE_CHECKING:
    from lens.passes.keys import KeysAt
    from lens.traces.trace import AttentionTrace

PADDING, SYSTEM, IMAGE, TEXT = range(-1, 3)
KINDS = {"system": SYSTEM, "image": IMAGE, "text": TEXT}


@dataclass(frozen=True, repr=False, eq=False)
class Segments(Result):
    """What each token of each prompt is.

    Attributes:
        kind: [batch, tokens]: 0 system (all before the first image token), 1 image, 2 text, -1 padding.
        grids: per image of the batch, in order: (row of the batch, first token, height, width); the
            tokens of an image lie one after another, row by row. Empty where the shape is not known.
        why_no_grids: the reason, where `grids` is empty.
    """

    kind: torch.Tensor = field(repr=False)
    grids: tuple[tuple[int, int, int, int], ...]
    why_no_grids: str = ""

    def mask(self, kind: str) -> torch.Tensor:
        """bool [batch, tokens] of "system", "image" or "text".

        Raises:
            LensError: another name.
        """
        if kind not in KINDS:
            raise LensError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        return self.kind == KINDS[kind]

    def keys(self, kind: str) -> Callable[[KeysAt], torch.Tensor]:
        """For `lens.edits`: the keys of one kind; generated tokens are text.

        Batch rows may be repeated (several sequences per prompt), as `generate` does it.
        """
        chosen = self.mask(kind)
        real = self.kind != PADDING
        first = real.int().argmax(-1)

        def members(at: KeysAt) -> torch.Tensor:
            rows, batch = len(at.positions), len(chosen)
            if rows % batch:
                raise LensError(
                    f"the segments are of {batch} prompts, the model runs {rows}; make segments of the "
                    "inputs that it runs"
                )
            device = at.positions.device
            places = at.positions + first.repeat_interleave(rows // batch).to(device)[:, None]
            found = chosen.repeat_interleave(rows // batch, 0).to(device)
            beyond = places >= found.shape[1]
            inside = found.gather(1, places.clamp(0, found.shape[1] - 1))
            return torch.where(beyond, kind == "text", inside) & (at.positions >= 0)

        return members

    def to_dict(self) -> dict[str, Any]:
        """As a trace notes it: `kind`, `grids`, `why_no_grids`, in lists, texts and integers."""
        return {
            "kind": self.kind.tolist(),
            "grids": [list(grid) for grid in self.grids],
            "why_no_grids": self.why_no_grids,
        }

    def table(self) -> pd.DataFrame:
        """One row per prompt and stretch of tokens of one kind: `prompt`, `kind`, `start`, `tokens`."""
        names = {number: name for name, number in KINDS.items()} | {PADDING: "padding"}
        rows = []
        for prompt, kinds in enumerate(self.kind):
            values, counts = torch.unique_consecutive(kinds, return_counts=True)
            starts = counts.cumsum(0) - counts
            rows += [
                {"prompt": prompt, "kind": names[value], "start": start, "tokens": count}
                for value, start, count in zip(
                    values.tolist(), starts.tolist(), counts.tolist(), strict=True
                )
            ]
        return pd.DataFrame(rows)

    def findings(self) -> tuple[Sentence, ...]:
        """How many tokens are what ("tokens"), and where the images are ("grids")."""
        real = int((self.kind != PADDING).sum())
        counts = {name: int(self.mask(name).sum()) for name in KINDS}
        shapes = sorted({f"{height} × {width}" for _, _, height, width in self.grids})
        shares = ", ".join(f"{some:,} {name} ({some / real:.1%})" for name, some in counts.items())
        prompts = f"{len(self.kind)} prompt{'s' * (len(self.kind) > 1)} of {real:,} tokens"
        said = [Sentence(f"{prompts}: {shares}.", kind="tokens")]
        if shapes:
            grids = f"{counted(len(self.grids), 'image')} as grids of {', '.join(shapes)}."
            said.append(Sentence(grids, kind="grids"))
        if self.why_no_grids:
            said.append(Sentence(f"No grids: {self.why_no_grids}.", kind="grids"))
        return tuple(said)


def segments(
    model: LoadedModel,
    inputs: Mapping[str, Any],
    *,
    image_token_id: int | None = None,
    grid: Sequence[tuple[int, int]] | None = None,
) -> Segments:
    """Which tokens of a processor's output are system, image and text.

    Args:
        model: with the image token in its configuration (LLaVA, Qwen2-VL, InternVL and their kin).
        inputs: what the model is called with: `input_ids` [batch, tokens], `attention_mask` where
            there is padding, `image_grid_thw` of Qwen2-VL.
        image_token_id: instead of the configuration's.
        grid: (height, width) in tokens of each image in order, instead of what is worked out from
            `image_grid_thw`, or from the shape of `pixel_values` (the configured size without them) and the
            configuration's patch and downsampling sizes; where these do not fit the prompt, there are no
            grids and `why_no_grids` says it.

    Raises:
        LensError: no input_ids, a prompt without an image token, an unknown image token, or a given
            `grid` that does not fit the image tokens.

    Example:
        >>> lens.vision.segments(vlm, inputs).findings()
    """
    ids, config = inputs.get("input_ids"), model.model.config
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise LensError(
            "segments needs input_ids [batch, tokens] as a tensor: pass what the model is called with "
            "(return_tensors='pt')"
        )
    token = image_token(config) if image_token_id is None else image_token_id
    if token is None:
        raise LensError(
            f"the configuration of {model.info.class_name} names no image token; give image_token_id"
        )
    ids = ids.cpu()
    is_image = ids == token
    mask = inputs.get("attention_mask")
    real = torch.ones_like(is_image) if mask is None else torch.as_tensor(mask).cpu().bool()
    is_image = is_image & real
    if not bool(is_image.any(-1).all()):
        row = int((~is_image.any(-1)).nonzero()[0])
        raise LensError(f"prompt {row} holds no image token (id {token}); check image_token_id")
    kind = torch.where(is_image.cumsum(-1) > 0, TEXT, SYSTEM)
    kind = torch.where(is_image, IMAGE, kind).masked_fill(~real, PADDING)
    if grid is not None:
        return Segments(kind, tuple(_placed(is_image, grid)))
    shapes, why = _shapes(model, inputs, int(is_image.sum()))
    try:
        return Segments(kind, tuple(_placed(is_image, shapes)) if shapes else (), why)
    except LensError as error:  # the configuration's shapes: what was not asked for cannot be wrong
        return Segments(kind, (), str(error))


def trace_segments(trace: AttentionTrace) -> Segments:
    """Which tokens of a captured prompt with images are system, image and text.

    Raises:
        LensError: the trace is of a prompt without images.

    Example:
        >>> trace = lens.capture(vlm, inputs)
        >>> lens.vision.trace_segments(trace).plot()
    """
    given_as("AttentionTrace", trace=trace)
    noted = trace.attrs.get("segments")
    if noted is None:
        raise LensError(
            "the trace has no segments: it is of a prompt without images; capture the output of a "
            "vision-language processor (input_ids and pixel_values)"
        )
    grids = tuple((row, start, high, wide) for row, start, high, wide in noted["grids"])
    return Segments(torch.tensor(noted["kind"]), grids, noted["why_no_grids"])


def _placed(
    is_image: torch.Tensor, shapes: Sequence[tuple[int, int]]
) -> list[tuple[int, int, int, int]]:
    """Where each image stands.

    Raises:
        LensError: shapes of another number of tokens, an image that is cut by other tokens or goes over
            the end of a prompt.
    """
    total, given = int(is_image.sum()), sum(height * width for height, width in shapes)
    if shapes and given != total:
        raise LensError(
            f"{len(shapes)} grids of {', '.join(f'{h} × {w}' for h, w in shapes[:4])} make {given} "
            f"tokens, the prompts hold {total} image tokens; give grid as the model lays them out"
        )
    places, found, taken = is_image.nonzero().tolist(), [], 0
    for height, width in shapes:
        tokens = places[taken : taken + height * width]
        (row, start), (last_row, end) = tokens[0], tokens[-1]
        if row != last_row or end - start + 1 != height * width:
            raise LensError(
                f"the {height} × {width} tokens of an image in prompt {row} do not lie one after another "
                "(separators or row ends between them?); give grid=() to go without grids"
            )
        found.append((row, start, height, width))
        taken += height * width
    return found


def _shapes(
    model: LoadedModel, inputs: Mapping[str, Any], total: int
) -> tuple[list[tuple[int, int]], str]:
    """(height, width) of each image in tokens, or none and the reason."""
    config = model.model.config
    vision = getattr(config, "vision_config", None)
    thw = inputs.get("image_grid_thw")
    if thw is not None:
        merge = getattr(vision, "spatial_merge_size", 1)
        return [
            (height // merge, width // merge)
            for frames, height, width in torch.as_tensor(thw).tolist()
            for _ in range(frames)
        ], ""
    grid = grid_of(config, inputs if "pixel_values" in inputs else _configured(vision))
    if grid is None:
        return [], "neither pictures nor configuration give their patches; give grid"
    height, width = grid
    values = inputs.get("pixel_values")
    pictures = None  # or tiles, of [(prompts,) pictures, channels, height, width]
    if isinstance(values, torch.Tensor) and values.dim() > 3:
        pictures = int(values.shape[:-3].numel())
    # models join neighbouring patches into one token; without the pictures only as the configuration says it
    joined = (
        1,
        round(1 / getattr(config, "downsample_ratio", 1)),
        getattr(config, "scale_factor", 1),
    )
    for side in range(1, min(grid) + 1):
        if height % side or width % side or (pictures is None and side not in joined):
            continue
        count, rest = divmod(total, (height // side) * (width // side))
        if count and not rest and pictures in (None, count):
            return [(height // side, width // side)] * count, ""
    return [], (
        f"{total} image tokens are no multiple of the {height} × {width} of the pictures, whole or joined in squares; "
        "give grid"
    )


def _configured(vision: Any) -> dict[str, torch.Tensor]:
    """A picture of the configured size, for prompts that are given without theirs."""
    size = getattr(vision, "image_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2:
        return {}
    return {"pixel_values": torch.empty(1, 0, *sides, device="meta")}
