"""Which sparse pattern a head has, and which heads are alike."""

from typing import Any

from lens import heads
from lens.common.errors import LensError
from lens.heads.behaviour.patterns import CLASSES
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject

_HEAD = {
    "name": "The head.",
    "layer": "Layer, from 0.",
    "head": "Head in the layer, from 0.",
    "n": "Number of prompts.",
}
_ALIKE_PROMPTS = 4  # prompts that heads are compared on


def patterns(subject: Subject) -> Section:
    """The class of sparse pattern that keeps most of each head's mass at one budget."""
    kind = "text" if subject.prompts("text") else "copied"
    traces = [subject.run.trace(name) for name in subject.prompt_ids(kind)]
    if not traces:
        raise LensError("sparse patterns are of tokens in a row, and the prompts are pictures")
    found = heads.patterns(traces)
    table = found.table(seed=subject.seed)
    kept = {name: f"Mass kept by the best {name.replace('_', '-')} pattern." for name in CLASSES}
    return Section(
        name="patterns",
        title="Which sparse pattern each head has",
        summary=tuple(f"On {kind} prompts: {said}" for said in found.findings()),
        limits=(
            "Kept mass is no quality: what the model loses when only the pattern is run was not measured.",
            "The best pattern was chosen and measured on the same prompts, so kept mass is an upper bound "
            "for other prompts.",
        ),
        columns=defined([table], _HEAD | kept | _PATTERN),
        configuration={
            "budget": found.budget,
            "enough": found.enough,
            "sink": found.sink,
            "prompts": kind,
        },
        tables={"heads": table},
        figures={"grid": found.plot()},
    )


def similarity(subject: Subject) -> Section:
    """Which heads look alike and which write alike, as groups with their stability."""
    kind, prompts, alike = _compared(subject)
    tables, figures, said = {}, {}, []
    of_part = subject.model.is_encoder_decoder
    of_maps = kind == "picture" or of_part  # rows are many, or two: block maps, a lower bound
    traces = []
    if of_maps:
        traces = [subject.run.trace(name) for name in subject.prompt_ids(kind)[: len(prompts)]]
    if traces and not of_part:
        of_maps = traces[0].dataset["block_mass"].shape[-1] > 1  # else its rows are few
    methods = ("js",) if of_part else ("js", "cka")
    for method in methods:
        if of_maps and method == "js":
            found = heads.similarity(traces)
        else:
            found = heads.similarity(
                subject.model,
                prompts,
                method=method,
                sink_excluded=method == "js",
                floor=alike,
                progress=subject.progress,
            )
        grouped = found.clusters(seed=subject.seed)
        tables[f"{method}_clusters"] = grouped.table()
        tables[f"{method}_redundancy"] = found.redundancy(seed=subject.seed)
        figures[method] = found.plot()
        what = "attend" if method == "js" else "write"
        said += [f"Heads that {what} alike: {text}" for text in grouped.findings()]
    return Section(
        name="similarity",
        title="Which heads are alike",
        summary=tuple(said),
        limits=(
            f"Compared on {len(prompts)} {kind} prompts; "
            + (
                "attention by blocks, which brings heads closer than they are."
                if of_maps
                else "attention without the first key, so that a sink does not make all heads alike."
            ),
            *(["What heads write is not compared between sources and targets."] if of_part else []),
            "Heads that are alike can still differ in what they do to the model: see importance.",
        ),
        columns=defined(tables.values(), _HEAD | _CLUSTERS | _REDUNDANCY),
        configuration={"methods": list(methods), "prompts": kind, "seed": subject.seed},
        tables=tables,
        figures=figures,
    )


def _compared(subject: Subject) -> tuple[str, list[Any], bool]:
    """The kind of the prompts, some of them, and whether all have one length."""
    if subject.model.is_encoder_decoder:
        return subject.run.prompts["kind"][0], list(subject.given[:_ALIKE_PROMPTS]), False
    if subject.prompt_ids("picture"):
        pictures = subject.pictures[:_ALIKE_PROMPTS]
        lengths = subject.run.prompts["tokens"][: len(pictures)]
        return "picture", pictures, len(pictures) > 1 and lengths.nunique() == 1
    kind = "text" if len(subject.prompts("text")) > 1 else "copied"
    prompts = subject.prompts(kind) or subject.prompts("text")
    prompts = [ids[: subject.length] for ids in prompts[:_ALIKE_PROMPTS]]
    return kind, prompts, len(prompts) > 1 and len({len(ids) for ids in prompts}) == 1


_PATTERN = {
    "pattern": "Simplest class within 0.02 of the best, or diffuse (MInference, arXiv 2407.02490).",
    "margin": "Its kept mass less the best of the others; if diffuse, what is lacking.",
}
_CLUSTERS = {
    "cluster": "Number of the group, the largest first.",
    "size": "Heads in it.",
    "prototype": "Head with the smallest mean distance to the others.",
    "heads": "All of them.",
    "stability": "Share of its group that a head keeps on prompts drawn again, mean over heads.",
}
_REDUNDANCY = {
    "value": "Closeness to the head most like it, 1 = another one does the same.",
    "low": "Low end of its 95 % interval over prompts.",
    "high": "High end of its 95 % interval.",
    "nearest": "That head.",
    "floor": "Closeness of the two across different prompts; missing where it was not measured.",
    "above_floor": "(value - floor) / (1 - floor), 0 = no more alike than on different prompts.",
}
