"""Whether heads keep their pattern: on other text, and when the same text is longer."""

import pandas as pd

import lens
from lens import heads
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.heads.likeness.stability import HeadStability
from lens.runs.schema import PROMPT_KINDS
from lens.runs.sections import Section
from lens.traces.trace import AttentionTrace
from lens.traces.variance import variance
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_highest
from lens_analyses.steps.subject import Subject

_MOST_PROMPTS, _MOST_TOKENS = 8, 512
_BLOCKS = 12  # along each side of the maps that are compared
_SHOWN = ("jaccard", "recall", "efficiency", "js", "correlation", "drift", "mass_error_p99")
_COMPARED = "sink_excluded"


def stability(subject: Subject) -> Section:
    """Each head on half of the prompts against itself on the others, and what its entropy varies with."""
    kind, prompts = _prompts(subject)
    length = len(prompts[0])
    block = max(1, length // _BLOCKS)
    traces = _capture(subject, prompts, block)
    halves = _capture(subject, [ids[: length // 2] for ids in prompts], block)
    found = heads.stability({"some": traces[::2], "others": traces[1::2]})
    shares = variance({"half": halves, "whole": traces}, metric="entropy", seed=subject.seed)
    by_head, said = _by_head(found, subject.seed), found.findings(seed=subject.seed)
    tables = {"heads": by_head, "variance": shares.table()}
    return Section(
        name="stability",
        title="Which heads keep their pattern",
        summary=(
            *(said or (_TOO_SHORT,)),
            *shares.findings(),
        ),
        limits=(
            f"Compared are {len(prompts)} {kind} prompts of {length} tokens, in pairs, by blocks of "
            f"{block} tokens; the first key block and the diagonal ones are left out, which would make "
            "all heads look stable.",
            "Other seeds and checkpoints are other models: compare them with lens.heads.stability.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "prompts": kind,
            "n": len(prompts),
            "tokens": length,
            "block_size": block,
            "density": found.density,
            "seed": subject.seed,
        },
        tables=tables,
        figures={"jaccard": found.plot("jaccard", _COMPARED)},
        headlines=tuple(
            of_highest(
                by_head,
                "jaccard",
                f"{{name}} keeps its strongest blocks most from one {kind} prompt to another: Jaccard index above "
                "chance {value}; the median head {baseline}.",
                "the median head",
                figure="jaccard",
            )
        ),
    )


def _prompts(subject: Subject) -> tuple[str, list[list[int]]]:
    """An even number of prompts of one length, of one kind.

    Raises:
        LensError: fewer than two.
    """
    if subject.prompt_ids("picture"):
        raise LensError(
            "patterns are compared on texts of two lengths, and the prompts are pictures; for these there is "
            "lens.heads.stability of two sets of traces"
        )
    for kind in PROMPT_KINDS:
        prompts = subject.prompts(kind)[:_MOST_PROMPTS]
        if len(prompts) > 1:
            shortest = min(min(map(len, prompts)), _MOST_TOKENS)
            return kind, [ids[:shortest] for ids in prompts[: len(prompts) // 2 * 2]]
    raise LensError(
        "whether heads keep their pattern needs two prompts of a kind; give --windows 2 or --copied 2"
    )


def _capture(subject: Subject, prompts: list[list[int]], block: int) -> list[AttentionTrace]:
    traces = lens.capture(subject.model, prompts, block_size=block, progress=subject.progress)
    assert isinstance(traces, list)
    return traces


def _by_head(found: HeadStability, seed: int) -> pd.DataFrame:
    """One row per head, a column per metric, the Jaccard index with its interval."""
    table = found.table(seed=seed)
    rows = table[
        (table["first"] == "some").to_numpy()
        & (
            (table["variant"] == _COMPARED) | table["metric"].isin(["drift", "mass_error_p99"])
        ).to_numpy()
    ]
    wide = rows.pivot(index=["layer", "head"], columns="metric", values="value")[list(_SHOWN)]
    interval = rows[(rows["metric"] == "jaccard").to_numpy()].set_index(["layer", "head"])
    wide.insert(1, "low", interval["low"])
    wide.insert(2, "high", interval["high"])
    wide = wide.reset_index()
    names = [str(HeadId(*pair)) for pair in zip(wide["layer"], wide["head"], strict=True)]
    wide.insert(0, "name", names)
    return wide


_TOO_SHORT = "No head could be scored: the prompts are too short for blocks away from the diagonal."
COLUMNS = {
    "name": "The head.",
    "layer": "Layer, from 0.",
    "head": "Head in the layer, from 0.",
    "jaccard": "Strongest fifth of the blocks, shared / in either, above chance: 0 as random, 1 the same.",
    "recall": "Mass of the other prompt on the strongest blocks of the one.",
    "efficiency": "Recall / what the other prompt's own strongest blocks hold.",
    "js": "JS divergence of the block maps, nats: a lower bound of that of the attention.",
    "correlation": "Rank correlation of the block masses.",
    "drift": "Mean over rows of the other prompt's LSE - the one's.",
    "mass_error_p99": "99th percentile over rows of |exp(drift) - 1|.",
    "low": "Low end of the 95 % interval over prompts, of the column before it.",
    "high": "High end of it.",
    "source": "What varies; condition is the length.",
    "share": "Of the sum of squares; all sum to 1.",
    "n": "Number of prompts.",
}
