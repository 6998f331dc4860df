"""Which heads fetch from far back, and which see enough with the first and the nearest keys."""

from lens import heads
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.runs.sections import Section
from lens.tasks import needles
from lens_analyses.config.sizes import LARGE
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_highest
from lens_analyses.steps.subject import Subject

_FIRST = 1  # first keys of a streaming head
_TRIALS = 8


def retrieval(subject: Subject) -> Section:
    """Retrieval score on copied needles, kept mass and error of streaming, and the trained gate."""
    kind = "copied" if subject.prompts("copied") else "text"
    prompts = [ids[: subject.length] for ids in subject.prompts(kind)]
    if not prompts:
        raise LensError("needles and streams are of tokens in a row, and the prompts are pictures")
    last = max(4, min(map(len, prompts)) // 6)
    options = {"first": _FIRST, "last": last, "progress": subject.progress}
    tables, figures, said, limits = {}, {}, [], []
    try:
        streaming = heads.streaming(subject.model, prompts, loss=False, **options)
        tables["streaming"] = streaming.table(seed=subject.seed)
        figures["streaming"] = streaming.plot()
        said += of_kind(streaming.findings(seed=subject.seed), "kept", "error")
        if subject.model.info.parameters <= LARGE:
            gate = heads.pruning.gate(subject.model, prompts, seed=subject.seed, **options)
            tables["gate"] = gate.table()
            figures["gate"] = gate.plot()
            said += gate.findings()
        else:
            limits.append(
                "The gate was not trained: the model is large for that here; use lens.heads.pruning.gate."
            )
    except LensError as problem:
        limits.append(f"No streaming scores: {problem}.")
    try:
        trials = needles.copied(subject.model, n=_TRIALS, length=32, needle=6, seed=subject.seed)
        found = heads.retrieval(subject.model, trials, progress=subject.progress)
        tables["retrieval"] = found.table(seed=subject.seed)
        figures["retrieval"] = found.plot()
        said += found.findings()
    except LensError as problem:
        limits.append(f"No retrieval scores: {problem}.")
    return Section(
        name="retrieval",
        title="Which heads fetch from far back",
        summary=tuple(said),
        limits=(
            *limits,
            f"On {len(prompts)} {kind} prompts and copied random needles, not on questions.",
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"first": _FIRST, "last": last, "prompts": kind, "trials": _TRIALS},
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_highest(
                tables["retrieval"],
                "retrieval",
                "{name} fetches most from far back: {value} of a needle's tokens, the median head {baseline}.",
                "the median head",
                figure="retrieval",
            )
            if "retrieval" in tables
            else ()
        ),
    )


_COLUMNS = {
    "name": "The head.",
    "layer": "Layer, from 0.",
    "head": "Head in the layer, from 0.",
    "n": "Number of prompts, or of needles that came back.",
    "kept": "Attention on the first and the last keys, of all.",
    "row_error": "Size of the change of a row's output without the others, over its size; mean over rows.",
    "rms_error": "Root mean square of that change over all rows, over that of the outputs.",
    "delta_loss": "Change of the loss with all heads streaming, nats per token; NaN: not measured.",
    "alpha": "Trained gate of its key-value head: 1 needs all keys, 0 streams (DuoAttention, arXiv 2410.10819).",
    "retrieval": "Share of the needle that was its strongest key while its token was written (arXiv 2404.15574).",
    "retrieval_low": "Low end of its 95 % interval over needles.",
    "retrieval_high": "High end of it.",
    "trials": "Number of needles.",
}
