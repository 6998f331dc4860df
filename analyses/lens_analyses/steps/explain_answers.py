"""What attention does for answers: needles, tokens that explain them, other attention, and changed attention."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

import lens
from lens.common.errors import LensError
from lens.common.results import Sentence, ends, of_kind, with_ends
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.explain_shared import COLUMNS, heads_of
from lens_analyses.steps.headlines import beside, change
from lens_analyses.steps.subject import Subject

_PROMPTS, _DRAWS = 6, 5  # of the sections on answers
_LONGEST, _BLOCK = (
    512,
    64,
)  # tokens of a prompt that are judged one by one, and together in longer ones
_TRIALS, _MASKED, _RANDOM = 4, (1, 3), 2  # of the section on retrieval


def retrieval_kinds(subject: Subject) -> Section:
    """Retrieval heads by three definitions on copied needles, and the needles without the first of each."""
    heads = len(subject.model.info.every_head)
    masked = [count for count in _MASKED if 2 * count <= heads]
    if not masked:
        raise LensError("a model of one head has no other to hold needles against without it")
    trials = lens.tasks.needles.copied(
        subject.model, n=_TRIALS, length=32, needle=6, seed=subject.seed
    )
    found = lens.reading.retrieval(
        subject.model,
        trials,
        masked=masked,
        draws=_RANDOM,
        seed=subject.seed,
        progress=subject.progress,
    )
    tables = {"heads": found.table(), "recall": found.recall(), "agreement": found.agreement()}
    rows = tables["recall"]
    chances = rows[rows["by"] == "random"].dropna(subset=["recall"]).set_index("masked")
    lists = rows[(rows["by"] != "random") & rows["masked"].isin(chances.index)]
    best = lists.sort_values("recall", kind="stable").head(1).to_dict("records")
    headlines = tuple(
        _without(own, chances.loc[own["masked"]].to_dict(), len(lists)) for own in best
    )
    return Section(
        name="retrieval_kinds",
        title="Retrieval heads by where they look, for whom, and what they bring",
        summary=found.findings(),
        limits=(f"{_TRIALS} copied random needles of 6 tokens in 32; not questions on text.",),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "trials": _TRIALS,
            "masked": masked,
            "draws": _RANDOM,
            "seed": subject.seed,
        },
        tables=tables,
        figures={"recall": found.plot()},
        headlines=headlines,
    )


def _without(own: Mapping[Any, Any], chance: Mapping[Any, Any], many: int) -> Headline:
    """Recall without the first heads of a list, beside random others."""
    first = "head" if own["masked"] == 1 else f"{own['masked']} heads"
    return beside(
        f"Without the first {first} of retrieval ({own['by']}) recall of needles is "
        f"{with_ends(own, 'recall', '.2f')}, without as many random others {with_ends(chance, 'recall', '.2f')}.",
        "recall",
        own,
        chance,
        "as many random heads",
        figure="recall",
        many=many,
    )


def faithfulness(subject: Subject) -> Section:
    """Whether attention, and what else scores tokens, says what the answers rest on."""
    prompts = subject.task.prompts[:_PROMPTS]
    block = _BLOCK if max(map(len, prompts)) > _LONGEST else None
    found = lens.reading.faithfulness(
        subject.model,
        prompts,
        draws=_DRAWS,
        block=block,
        seed=subject.seed,
        progress=subject.progress,
    )
    table = found.table()
    return Section(
        name="faithfulness",
        title="Whether attention explains the answer: tokens deleted by what scores them",
        summary=of_kind(found.findings(), "best", "sufficiency", "none", "unsupported"),
        limits=(
            *of_kind(found.findings(), "limit"),
            f"The answer is the likeliest token after each of the first {_PROMPTS} prompts of the task at most.",
        ),
        columns=defined([table], COLUMNS),
        configuration={
            "shares": list(found.shares),
            "draws": _DRAWS,
            "block": block or 1,
            "seed": subject.seed,
        },
        tables={"faithfulness": table},
        figures={
            "sufficiency": found.plot(),
            "comprehensiveness": found.plot("comprehensiveness"),
        },
    )


def mixing(subject: Subject) -> Section:
    """How much of each token's next state other tokens bring, by weights, sizes, and with residual stream and norm."""
    found = lens.reading.mixing(
        subject.model, subject.task.prompts, seed=subject.seed, progress=subject.progress
    )
    table = found.table()
    return Section(
        name="mixing",
        title="How much tokens mix: by weights, by sizes, with the residual stream",
        summary=found.findings(),
        limits=("Of each layer what its attention writes, not its MLP.",),
        columns=defined([table], COLUMNS),
        configuration={"task": subject.settings.task, "seed": subject.seed},
        tables={"mixing": table},
        figures={"mixing": found.plot()},
    )


def adversary(subject: Subject) -> Section:
    """Other rows of attention that write what each head's own does, beside even attention."""
    found = lens.reading.adversary(
        subject.model,
        subject.task.prompts[:_PROMPTS],
        heads_of(subject),
        seed=subject.seed,
        progress=subject.progress,
    )
    table = found.table()
    return Section(
        name="adversary",
        title="Other attention with the same answer",
        summary=found.findings(),
        limits=(
            "Corners of all rows with the same output are tried, so another may differ more: divergences are lower bounds.",
            f"The row of the answering query alone, on the first {_PROMPTS} prompts of the task at most.",
        ),
        columns=defined(
            [table],
            COLUMNS
            | {
                "error": "Largest difference of what the two rows write, over the largest number written."
            },
        ),
        configuration={"heads": [str(head) for head in found.heads], "seed": subject.seed},
        tables={"adversary": table},
        figures={"adversary": found.plot()},
        headlines=tuple(_replaceable(table)),
    )


def _replaceable(table: pd.DataFrame) -> Iterator[Headline]:
    """The head whose row can differ most, beside no difference at all, which a head that sits on one key has."""
    row = table.sort_values("divergence", ascending=False, kind="stable").to_dict("records")[0]
    interval = ends(row["divergence_low"], row["divergence_high"], ".2f")
    if row["divergence"] >= math.log(2) / 2:
        yield Headline(
            f"{row['name']} can look elsewhere and write the same: a row {row['divergence']:.2f}{interval} nats away, of "
            f"{math.log(2):.2f} at most; even attention is {row['uniform']:.2f} away.",
            row["divergence"],
            row["divergence_low"],
            row["divergence_high"],
            0.0,
            "a row that nothing else can stand for",
            figure="adversary",
            many=len(table),
            units=int(row.get("n", 0)),
        )


def perturbation(subject: Subject) -> Section:
    """Loss of the answer when attention logits of each head change: along the gradient, between tokens, and at random."""
    tables, figures = [], {}
    said: list[Sentence] = []
    for along in ("logits", "pairs"):
        found = lens.reading.perturb(
            subject.model,
            subject.task.prompts[:_PROMPTS],
            heads_of(subject),
            along=along,
            sizes=subject.settings.sizes_of_changes,
            seed=subject.seed,
            progress=subject.progress,
        )
        said += found.findings()
        tables.append(found.table().assign(along=along))
        figures[along] = found.plot()
    table = pd.concat(tables, ignore_index=True)
    return Section(
        name="perturbation",
        title="The answer when attention logits change, along the gradient and at random",
        summary=tuple(said),
        limits=(
            "The gradient is that at the model as it is: of a large change it need not be the worst direction.",
            f"The loss of the likeliest token after each of the first {_PROMPTS} prompts of the task at most.",
        ),
        columns=defined(
            [table], COLUMNS | {"size": "Of the change, L2 over the logits of the head, nats."}
        ),
        configuration={
            "heads": [str(head) for head in heads_of(subject)],
            "sizes": list(subject.settings.sizes_of_changes),
            "seed": subject.seed,
        },
        tables={"perturbation": table},
        figures=figures,
        headlines=tuple(_fragile(table)),
    )


def _fragile(table: pd.DataFrame) -> Iterator[Headline]:
    """The head whose gradient costs most at the largest size, beside random directions; none where these cost more."""
    rows = table[(table["along"] == "logits") & (table["size"] == table["size"].max())]
    row = rows.sort_values("worst", ascending=False, kind="stable").to_dict("records")[0]
    if row["worst"] <= row["random"]:
        return
    random = {
        end: row[f"random{end.removeprefix('worst')}"]
        for end in ("worst", "worst_low", "worst_high")
    }
    yield beside(
        f"The answer hangs on where {row['name']} looks: its logits changed by {row['size']:g} along the gradient cost "
        f"{change(row, 'worst')} nats, in random directions {change(row, 'random')}.",
        "worst",
        row,
        random,
        "random directions",
        unit="nats",
        figure="logits",
        many=len(rows),
    )
