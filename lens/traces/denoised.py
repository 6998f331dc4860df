"""What a diffusion model attended to: the traces of its steps and parts, maps of words, quadrants of joint attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from lens.common.errors import LensError
from lens.common.head_ids import head_columns
from lens.common.results import Result, Sentence, counted
from lens.traces.overlays import heads_of, token_position
from lens.traces.trace import AttentionTrace

_SAID = {"text": "text", "image": "picture"}
QUADRANTS = ("text_to_text", "text_to_image", "image_to_text", "image_to_image")


@dataclass(frozen=True, repr=False, eq=False)
class Denoising(Result):
    """The traces of a denoiser, by step and by part.

    Attributes:
        steps: that were captured, by number.
        timesteps: that the denoiser was told at each, NaN where none.
        traces: (part, step) -> trace. Parts are "self" (of the picture), "cross" (of the picture to the text) and
            "joint" (of both together); of a UNet, whose layers have several sizes, with the size behind it: "cross 8×8".
        model: class of the denoiser.
        check: largest difference of the captured output from the denoiser's own, over the largest of that.
    """

    steps: tuple[int, ...]
    timesteps: tuple[float, ...]
    traces: dict[tuple[str, int], AttentionTrace] = field(repr=False)
    model: str
    check: float

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(dict.fromkeys(part for part, _ in self.traces))

    def trace(self, part: str | None = None, step: int | None = None) -> AttentionTrace:
        """One trace.

        Args:
            part: its name; may be left out where there is one.
            step: number of the step; None: the last.

        Raises:
            LensError: there is none.
        """
        if part is None and len(self.parts) == 1:
            part = self.parts[0]
        step = self.steps[-1] if step is None else step
        if part is None or (part, step) not in self.traces:
            raise LensError(
                f"there are the parts {', '.join(self.parts)} at steps {', '.join(map(str, self.steps))}; got "
                f"part={part!r}, step={step!r}"
            )
        return self.traces[part, step]

    def maps(self, key: int | str, part: str | None = None, *, heads: Any = "mean") -> np.ndarray:
        """[steps, height, width] attention of each place of the picture to one key: of a word, where it is drawn; of a
        video [steps, frames, height, width].

        Exact, from q, k and LSE: capture with `keep_qk=True`.

        Args:
            key: name or number of a key.
            part: as in `trace`.
            heads: "mean" of all heads, "L3" (mean of a layer) or "L3H5".

        Raises:
            LensError: no such part, key or head, no q and k, or latents whose places are not known.
        """
        found = []
        for step in self.steps:
            trace = self.trace(part, step)
            shape, first = trace.attrs["latents"] or ((), 0)
            if not shape:
                raise LensError(
                    "where the positions stand in the latents is not known, so there is no map"
                )
            place, rows = token_position(trace.tokens, key), (first, first + int(np.prod(shape)))
            columns = [
                trace.tile(*head, rows, (place, place + 1)) for head in heads_of(trace, heads)
            ]
            found.append(np.mean(columns, 0).reshape(shape))
        return np.stack(found)

    def table(self) -> pd.DataFrame:
        """One row per part, step and head: `part`, `step`, `timestep`, `layer`, `head`, `name`, `module`, `entropy`
        (nats, mean over rows) and, of joint attention, the mean mass of the rows of text and picture on keys of
        either: `text_to_text`, `text_to_image`, `image_to_text`, `image_to_image`; NaN elsewhere; `keys`, how many are
        seen, and `text_keys`, how many of them are of the text (0 where they are not apart)."""
        return pd.concat([self._rows(part, step) for part, step in self.traces], ignore_index=True)

    def _rows(self, part: str, step: int) -> pd.DataFrame:
        trace = self.traces[part, step]
        heads = trace.every_head
        timestep = self.timesteps[self.steps.index(step)]
        columns = {"part": part, "step": step, "timestep": timestep, **head_columns(heads)}
        columns["module"] = np.repeat(trace.attrs["modules"], trace.heads)
        nothing = np.full(len(heads), np.nan)
        seen = np.any(trace.visible.values > 0, axis=0)
        columns |= {"keys": seen.sum(), "text_keys": 0}
        entropy = trace.dataset.get("entropy")
        columns["entropy"] = nothing if entropy is None else _mean(entropy.values)
        columns |= dict.fromkeys(QUADRANTS, nothing)
        if trace.attrs["text"] is not None and part == "joint" and "match_mass" in trace.dataset:
            first, last = trace.attrs["text"]
            own = trace.dataset["match_mass"].values[..., -1]
            text = np.zeros(trace.length, bool)
            text[first:last] = True
            columns["text_keys"] = seen[first:last].sum()
            for name, rows in (("text", text), ("image", ~text)):
                other = "image" if name == "text" else "text"
                mass = _mean(own[..., rows])
                columns[f"{name}_to_{name}"], columns[f"{name}_to_{other}"] = mass, 1 - mass
        return pd.DataFrame(columns)

    def findings(self) -> tuple[Sentence, ...]:
        """How the quadrants of joint attention ("quadrants") and the entropy of each part ("entropy") go over steps: the mean of
        its heads, their range, and what uniform attention has."""
        table, said = self.table(), []
        ends = list(dict.fromkeys((self.steps[0], self.steps[-1])))
        for part in self.parts:
            rows = table[table["part"] == part]
            steps = [rows[rows["step"] == step] for step in ends]
            heads = f"mean and range of {counted(len(steps[0]), 'head')}"
            keys, text = int(rows["keys"].iloc[0]), int(rows["text_keys"].iloc[0])
            for name, to in (("image", "text"), ("text", "image")):
                if not rows[f"{name}_to_{to}"].isna().all():
                    values = _over_steps(steps, f"{name}_to_{to}", ".1%")
                    even = (text if to == "text" else keys - text) / keys
                    words = f"mass of the {_SAID[name]} on the {_SAID[to]} {values}; uniform attention {even:.1%}"
                    said.append(Sentence(f"{part}: {words} ({heads}).", kind="quadrants"))
            values = _over_steps(steps, "entropy", ".2f")
            words = f"entropy of a row, nats, {values}; at most {np.log(keys):.2f}"
            said.append(Sentence(f"{part}: {words} ({heads}).", kind="entropy"))
        return tuple(said)

    def __repr__(self) -> str:
        return f"Denoising({self.model}: {', '.join(self.parts)} at {len(self.steps)} steps, check {self.check:.0e})"


def _over_steps(steps: list[pd.DataFrame], name: str, form: str) -> str:
    """ "20.0% (10.0% to 30.0%) at step 0, ...": mean and range over the heads of each step."""
    return ", ".join(
        f"{one[name].mean():{form}} ({one[name].min():{form}} to {one[name].max():{form}}) at step {one['step'].iloc[0]}"
        for one in steps
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """[layers * heads] means over rows of [layers, heads, rows]."""
    return values.reshape(-1, values.shape[-1]).mean(-1)
