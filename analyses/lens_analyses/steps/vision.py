"""What is looked at on pictures, how far, and which structure that has."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

import lens
from lens.common.errors import LensError
from lens.figures.style import escaped
from lens.figures.vision import prototypes, ring_trend
from lens.runs.headlines import Headline, those_that_stand
from lens.runs.sections import Section
from lens.traces.overlays import Overlay
from lens.traces.pictures import grids_of
from lens.traces.trace import AttentionTrace
from lens.vision.rings import Rings
from lens_analyses.config.listed import listed
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject
from lens_analyses.steps.vision_headlines import crossing, strongest

_MOST = 12  # pictures that are drawn; all are in the tables
_LONGEST = 40  # letters of the name of a picture


class Pictured(NamedTuple):
    """A picture of the run.

    Attributes:
        name: as in the table of prompts.
        title: for people.
        trace: of it.
    """

    name: str
    title: str
    trace: AttentionTrace

    def overlay(self, heads: list[str], **how: Any) -> Overlay:
        """Where heads look: from [CLS], if there is one."""
        query = "[CLS]" if "[CLS]" in self.trace.tokens else None
        return self.trace.overlay(heads, query=query, **how)

    def titled(self, figure: go.Figure) -> go.Figure:
        """A figure that says which picture it is of."""
        layout: Any = figure.layout
        return figure.update_layout(title_text=f"{escaped(self.title)}: {layout.title.text}")


def overlays(subject: Subject) -> Section:
    """Where heads look, on every picture; raw and without sinks."""
    asked = subject.settings.overlays
    figures, maps, regions, said = {}, [], [], []
    headlines: list[Headline] = []
    for one in pictured(subject):
        name, title, trace = one
        heads = listed(asked) if asked else _chosen(trace)
        for variant in ("raw", "sink_excluded"):
            found = one.overlay(heads, variant=variant)
            table = found.table().drop(columns=["left", "top", "right", "bottom"])
            maps.append(table.assign(prompt_id=name, variant=variant))
            if len(figures) < 2 * _MOST:
                end = "" if variant == "raw" else "_without_sinks"
                figures[f"{name}{end}"] = one.titled(found.plot(path=variant == "raw"))
            if variant == "raw":
                none = f"{title}: no patch is told apart from uniform attention in these maps."
                try:
                    stands = those_that_stand(
                        strongest(title, name, trace, found.names, subject.seed)
                    )
                except LensError as reason:  # rows that are not kept, or not exact, or too many
                    stands = ()
                    none = f"{title}: which patch stands out is not told: {reason}."
                said.append(stands[0].text if stands else none)
                headlines += stands if name in figures else []
                regions += [
                    found.regions(place).assign(prompt_id=name, map=head)
                    for place, head in enumerate(found.names)
                ]
    tables = {"maps": _front(maps), "regions": _front(regions)}
    return Section(
        name="overlays",
        title="What was looked at",
        summary=tuple(said),
        limits=(
            "An overlay shows where attention lies, and not that it matters to the answer.",
            "Attention on [CLS], registers and text is not drawn; the title says how much that is.",
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"heads": asked or "chosen", "pictures": len(subject.pictures)},
        tables=tables,
        figures=figures,
        headlines=tuple(headlines),
    )


def rings(subject: Subject) -> Section:
    """How far heads look over the picture: rings, shapes, receptive field; beside uniform attention."""
    tables: dict[str, list[pd.DataFrame]] = {}
    figures, said = {}, []
    headlines: list[Headline] = []
    strengths: list[Rings] = []
    for one in pictured(subject):
        name, title, trace = one
        results = {
            "rings": lens.vision.rings(trace, seed=subject.seed),
            "shapes": lens.vision.shapes(trace, window=_window(trace), seed=subject.seed),
            "distances": lens.vision.patch_distance(trace, seed=subject.seed)
            if _is_tower(trace)
            else None,
            "field": lens.vision.receptive_field(trace, seed=subject.seed)
            if not trace.attrs["causal"]
            else None,
        }
        strengths.append(results["rings"])
        for part, found in results.items():
            if found is None:
                continue
            tables.setdefault(part, []).append(found.table().assign(prompt_id=name))
            if len(figures) < 4 * _MOST:
                figures[f"{name}_{part}"] = one.titled(found.plot())
            said += [f"{title}: {text}" for text in found.findings()]
        if f"{name}_shapes" in figures:
            headlines += crossing(title, name, trace, subject.seed)
    joined = {part: _front(ones) for part, ones in tables.items()}
    alike = [one for one in strengths if one.grid == strengths[0].grid]
    mass = np.mean([one.mass for one in alike], 0)
    figures = {"trend": ring_trend(mass, alike[0].uniform, alike[0].layers), **figures}
    return Section(
        name="rings",
        title="How far heads look over the picture",
        summary=tuple(said),
        limits=(
            "The receptive field is what can have reached a patch through attention, not what was used of it.",
            "Intervals are over the patches of one picture.",
            f"The trend over layers is the mean of the {len(alike)} pictures with {' × '.join(map(str, alike[0].grid))} patches.",
        ),
        columns=defined(joined.values(), _COLUMNS),
        configuration={"seed": subject.seed},
        tables=joined,
        figures=figures,
        headlines=tuple(headlines),
    )


def pattern_summary(subject: Subject) -> Section:
    """Which patterns of attention there are: an autoencoder's groups of all maps, principal components beside."""
    names, _, traces = zip(*pictured(subject), strict=True)
    found = lens.vision.patterns(list(traces), seed=subject.seed, progress=subject.progress)
    table = found.table()
    table.insert(0, "prompt_id", np.array(names)[table["picture"]])
    groups = found.found.table().rename(columns={"share": "share_of_maps"})
    heads = found.heads()
    tables = {"maps": table.drop(columns="picture"), "heads": heads, "groups": groups}
    shares = {
        f"group_{group}": f"Share of its maps in group {group}." for group in range(len(groups))
    }
    return Section(
        name="pattern_summary",
        title="Which patterns of attention there are",
        summary=tuple(found.findings()),
        limits=(
            "Maps are block means of the attention among patches, as multiples of uniform attention; what lies on [CLS], "
            "registers or text is left out.",
            "Of 2 to 12 groups those are taken that are most stable and separated beside single normal clouds of the same length in "
            "each direction, cut in the same way; a map between two groups is in one all the same.",
        ),
        columns=defined(tables.values(), _COLUMNS | _PATTERNS | shares),
        configuration={
            "side": found.side,
            "numbers": found.found.latent.shape[1],
            "missed": {one.name: one.missed for one in (found.found, found.baseline)},
            "rand": {
                one.name: float(one.groups.rand.mean()) for one in (found.found, found.baseline)
            },
            "apart": {one.name: one.groups.apart for one in (found.found, found.baseline)},
            "agreement": found.agreement,
            "seed": subject.seed,
        },
        tables=tables,
        figures={"scatter": found.plot(), "prototypes": prototypes(found)},
    )


def structure(subject: Subject) -> Section:
    """Segments and trees of the last layer, flow, and coding rates."""
    tables: dict[str, list[pd.DataFrame]] = {}
    figures, said = {}, []
    tau = float(subject.settings.tau)
    for one in pictured(subject):
        name, title, trace = one
        last = f"L{trace.layers[-1]}"
        results = {
            "segments": lens.vision.cluster(trace, last, tau=tau),
            "tree": lens.vision.tree(trace, last),
        }
        for part, found in results.items():
            tables.setdefault(part, []).append(found.table().assign(prompt_id=name))
            if len(figures) < 3 * _MOST:
                figures[f"{name}_{part}"] = one.titled(found.plot())
            said += [f"{title}: {text}" for text in found.findings()]
    joined = {part: _front(ones) for part, ones in tables.items()}
    flow = lens.vision.flow([one.trace for one in pictured(subject)], seed=subject.seed)
    rates = lens.vision.coding_rate(
        subject.model, subject.pictures, seed=subject.seed, progress=subject.progress
    )
    for part, found in (("flow", flow), ("rates", rates)):
        joined[part], figures[part] = found.table(), found.plot()
    return Section(
        name="structure",
        title="Segments, trees and flow",
        summary=(*said, *flow.findings(), *rates.findings()),
        limits=(
            "Segments are patches that attend alike; that they are things is for the eye, or for masks "
            "(lens.vision.cluster(...).iou).",
            f"Segments depend on tau = {tau:g} nats, trees on which heads are taken (here all of the last layer).",
        ),
        columns=defined(joined.values(), _COLUMNS),
        configuration={"tau": tau},
        tables=joined,
        figures=figures,
    )


def pictured(subject: Subject) -> list[Pictured]:
    """The pictures of a run with their traces.

    Raises:
        LensError: there is none, or where its patches lie is not known.
    """
    table = subject.run.prompts
    rows = table[(table["kind"] == "picture").to_numpy()]
    named = rows["title"].str.slice(0, _LONGEST)
    titles = np.where(named.duplicated(keep=False), named + " (" + rows["prompt_id"] + ")", named)
    found = [
        Pictured(name, title, subject.run.trace(name))
        for name, title in zip(rows["prompt_id"], titles, strict=True)
    ]
    for one in found:
        grids_of(one.trace.attrs)  # says what is not known, before any work
    if not found:
        raise LensError("the run has no picture")
    return found


def _chosen(trace: AttentionTrace) -> list[str]:
    """The means of a first, middle and last layer, and three heads of the last."""
    layers = trace.layers
    few = dict.fromkeys(f"L{layer}" for layer in (layers[0], layers[len(layers) // 2], layers[-1]))
    return [*few, *(f"L{layers[-1]}H{head}" for head in range(min(3, trace.heads)))]


def _window(trace: AttentionTrace) -> int:
    grid = grids_of(trace.attrs)[0]
    return max(2, min(grid.height, grid.width) // 4)


def _is_tower(trace: AttentionTrace) -> bool:
    return (trace.attrs.get("patches") or {}).get("first") is not None


def _front(tables: list[pd.DataFrame]) -> pd.DataFrame:
    found = pd.concat(tables, ignore_index=True)
    return found[["prompt_id", *(name for name in found.columns if name != "prompt_id")]]


_PATTERNS = {
    "group": "Number of the pattern, the most frequent first; of a head that most of its maps have.",
    "group_pca": "The same by principal components.",
    "x": "Place in the scatter, by the autoencoder.",
    "y": "Place in the scatter, by the autoencoder.",
    "x_pca": "Place in the scatter, by principal components.",
    "y_pca": "Place in the scatter, by principal components.",
    "maps": "How many.",
    "share_of_maps": "Of all maps.",
    "share": "Of the head's maps, one a picture.",
}
_COLUMNS: dict[str, Any] = (
    {
        "prompt_id": "Picture, as in the table of prompts.",
        "map": "Whose attention: a head, the mean of a layer, or of all.",
        "variant": "raw, or sink_excluded: without patches that receive more than 10 times the median patch.",
        "row": "Of the patch, from the top; of a region or segment its middle.",
        "column": "Of the patch, from the left; of a region or segment its middle.",
        "value": "Attention mass on the patch; without sinks as a share of what is left.",
        "region": "Joined patches among those that hold half of the mass, strongest first.",
        "mass": "Share of the attention: of a region that on patches, of a ring that of the row.",
        "patches": "How many.",
        "x": "Of the middle, in pixels of the picture.",
        "y": "Of the middle, in pixels of the picture.",
        "layer": "Layer, by the model's own number.",
        "head": "Head of the layer, from 0.",
        "name": "Layer and head.",
        "ring": "Chebyshev distance in patches; 0 is the patch itself.",
        "weight": "Mean attention on a patch of the ring; rings are cut at the border.",
        "elsewhere": "Attention of patches on what is no patch of the picture.",
        "uniform_mass": "Mass of the ring under uniform attention.",
        "uniform_weight": "Weight of a patch under uniform attention.",
        "uniform_distance": "Mean distance under uniform attention over the patches.",
        "distance": "Mean distance in patches.",
        "near": "Share of the attention on patches that lies on the patch itself and its 8 neighbours.",
        "half": "Share of the patches that half of what reaches a patch comes from, at least.",
        "segment": "Number of the segment, largest first.",
        "share": "Of the picture.",
        "patch": "Number of the patch, row by row.",
        "parent": "Number of the patch that it hangs on; -1 of a root.",
        "parent_row": "Row of the parent; -1 of a root.",
        "parent_column": "Column of the parent; -1 of a root.",
        "depth": "Edges up to the root.",
        "children": "Patches that hang on it.",
        "largest": "What the key that receives most has under these rows, times that under uniform attention; chosen by other rows.",
        "gini": "Inequality of received mass: 0 alike, near 1 all on one key.",
        "entropy": "Of received mass, as a share of the highest possible.",
        "exclusive": "Lowest conserved intake of a row: small where a row lives on keys that all look at.",
        "rate": "Coding rate of the values, nats.",
        "spread": "0: values on one line, 1: evenly spread.",
        "sparsity": "Share of numbers of what enters the layer that are below 0.001 of their root mean square.",
    }
    | {
        f"{name}_uniform": f"{name} under uniform attention over what each position sees."
        for name in ("largest", "gini", "entropy", "exclusive")
    }
    | {
        part: text
        for shape, words in (
            ("row", "the patch's own row"),
            ("column", "the patch's own column"),
            ("criss_cross", "its own row or column"),
            ("window", "its own window"),
            ("dilated", "every second row and column from it on"),
        )
        for part, text in (
            (f"{shape}_uniform", f"Share of {words} under uniform attention."),
            *(
                [(shape, f"Share of the attention on patches that lies in {words}.")]
                if shape not in ("row", "column")
                else []
            ),
        )
    }
)
