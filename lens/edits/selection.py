"""`HeadSelection`: how often each head passed VAR's test for looking at the image."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lens.common.head_ids import head_columns
from lens.common.results import Result, Sentence


@dataclass(frozen=True, repr=False, eq=False)
class HeadSelection(Result):
    """Rows of text tokens by head.

    Attributes:
        text: [layer, head], rows of text tokens that were looked at.
        visual: [layer, head], those with enough mass on the image.
        selected: [layer, head], those that were image-centric.
        edited: bool [layer, head], heads that the edit could touch.
        model: its name.
    """

    text: np.ndarray = field(repr=False)
    visual: np.ndarray = field(repr=False)
    selected: np.ndarray = field(repr=False)
    edited: np.ndarray = field(repr=False)
    model: str

    @property
    def share(self) -> np.ndarray:
        """[layer, head], selected of all rows of text tokens; NaN where there was none."""
        seen = self.edited & (self.text > 0)
        return np.where(seen, self.selected / np.where(seen, self.text, 1), np.nan)

    def table(self) -> pd.DataFrame:
        """One row per head that the edit could touch, the most image-centric first."""
        layers, heads = np.nonzero(self.edited)
        rows = pd.DataFrame(
            {
                "layer": layers,
                "head": heads,
                "name": head_columns(np.argwhere(self.edited).tolist())["name"],
                "text_rows": self.text[layers, heads],
                "visual_rows": self.visual[layers, heads],
                "selected_rows": self.selected[layers, heads],
                "share": self.share[layers, heads],
            }
        )
        return rows.sort_values("share", ascending=False, kind="stable", ignore_index=True)

    def findings(self) -> tuple[Sentence, ...]:
        """How many heads were image-centric and in how many rows, as the kind `selected`."""
        rows = self.table()
        rows = rows[rows["text_rows"] > 0]
        if not len(rows):
            text = (
                f"No row of {self.model} was looked at: there was no image, no sink or no text after "
                "the image."
            )
            return (Sentence(text, kind="selected"),)
        named = rows[rows["selected_rows"] > 0]
        total = int(rows["text_rows"].sum())
        chosen, visual = int(rows["selected_rows"].sum()), int(rows["visual_rows"].sum())
        top = ", ".join(
            f"{row['name']} {row['share']:.2f}" for row in named.head(6).to_dict("records")
        )
        text = (
            f"{len(named)} of {len(rows)} heads were image-centric in some row: {chosen:,} of {total:,} "
            f"rows ({chosen / total:.1%}); {visual:,} rows had enough mass on the image"
            + (f". Most often: {top}." if top else ".")
        )
        return (Sentence(text, kind="selected"),)
