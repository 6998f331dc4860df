"""Whether heads look where boxes say that the thing is."""

from pathlib import Path
from typing import Any

import pandas as pd

import lens
from lens.common.head_ids import head_columns, head_id
from lens.common.results import with_ends
from lens.runs.sections import Section
from lens_analyses.boxes import ENDS, read_boxes
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import beside
from lens_analyses.steps.subject import Subject
from lens_analyses.steps.vision import pictured

_MOST = 12  # pictures that are drawn; all are in the tables


def grounding(subject: Subject) -> Section:
    """How well every head finds the boxes of the pictures, beside what needs no model."""
    prompts: Any = subject.config.prompts
    boxes = read_boxes(Path(prompts.boxes), [Path(name).name for name in prompts.files])
    every = pictured(subject)
    several = {number: every[number] for number in sorted(set(boxes["number"]))}
    heads = [str(head) for head in next(iter(several.values())).trace.every_head]
    overlays = [one.overlay(heads) for one in several.values()]
    corners: list[Any] = [
        boxes.loc[boxes["number"] == number, ENDS].to_numpy().tolist() for number in several
    ]
    found = lens.vision.grounding(overlays, corners, seed=subject.seed)
    table = found.table()
    best = table.iloc[int(table["iou"].argmax())]
    blind = "iou_middle" if best["iou_middle"] > best["iou_whole"] else "iou_whole"
    figures = {"scores": found.plot()}
    for one, theirs in list(zip(several.values(), corners, strict=True))[:_MOST]:
        figures[one.name] = one.titled(one.overlay([best["map"]]).plot(boxes=theirs))
    ids = {number: one.name for number, one in several.items()}
    rows = found.rows.assign(prompt_id=found.rows["picture"].map(dict(enumerate(ids.values()))))
    tables = {
        "heads": pd.DataFrame(head_columns(map(head_id, table["map"]))).join(
            table.drop(columns="map")
        ),
        "pictures": rows[["prompt_id", *rows.columns.drop(["prompt_id", "picture"])]],
        "boxes": boxes.assign(prompt_id=boxes["number"].map(ids))[["prompt_id", *ENDS]],
    }
    without = len(every) - len(several)
    return Section(
        name="grounding",
        title="Do heads find the boxes",
        summary=tuple(found.findings()),
        limits=(
            "The threshold is the best one for each picture, of a head as of the patches round the middle; so IoU is an upper bound.",
            f"The best of {len(heads)} heads is chosen on the pictures that it is scored on, and the baselines are not chosen.",
            *([f"{without} pictures have no box and are left out."] if without else ()),
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"boxes": len(boxes), "pictures": len(several), "seed": subject.seed},
        tables=tables,
        figures=figures,
        headlines=(
            beside(
                f"{best['map']} covers the boxes with an IoU of {with_ends(best, 'iou', '.2f')}, the best of {len(heads)} "
                f"heads; patches round the middle of the picture with {with_ends(best, 'iou_middle', '.2f')}, the whole "
                f"picture with {with_ends(best, 'iou_whole', '.2f')}.",
                "iou",
                best.to_dict(),
                {f"iou{end}": best[f"{blind}{end}"] for end in ("", "_low", "_high")},
                "patches round the middle, or the whole picture",
                figure="scores",
                many=len(table),
            ),
        ),
    )


_COLUMNS = {
    "prompt_id": "Picture, as in the table of prompts.",
    "map": "Whose attention: a head.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "name": "Layer and head.",
    "n": "Pictures with boxes.",
    "pointing": "Share of the pictures whose highest patch has its middle in a box.",
    "pointing_blind": "Share of the picture that lies in boxes: a blind point.",
    "pointing_middle": "Whether the middle of the picture lies in a box.",
    "iou": "Intersection over union of the patches at or above the best threshold, and the boxes, in pixels.",
    "threshold": "The best one, as a share of the highest value.",
    "iou_whole": "IoU of the whole picture.",
    "iou_middle": "IoU of the patches nearest to the middle, as many as fit best.",
    "left": "In pixels of the picture.",
    "top": "In pixels of the picture.",
    "right": "In pixels of the picture.",
    "bottom": "In pixels of the picture.",
}
