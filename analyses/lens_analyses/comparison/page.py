"""`comparison.html`: the numbers of a comparison as one page that needs nothing else."""

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from lens.runs import Comparison
from lens.runs.comparison.pairing import SHARES
from lens.runs.comparison.pictures import comparison_scatter, difference_grid
from lens.runs.schema import KIND_WORDS
from lens.traces.metrics import METRICS
from lens_analyses.report.charts import slim, template
from lens_analyses.report.page import COLUMNS, embedded_json, environment, signed, source_of

MOST_HEADS = 150  # with more, only the scores of `COLUMNS` are drawn
MOST_ROWS = 40


def figures(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """`scatter/<prompts>/<metric>/<variant>` and `grid/...` of every score that is compared."""
    table = comparison.heads
    drawn = table[table["difference"].notna()]
    many = len(drawn.drop_duplicates(["layer", "head"])) > MOST_HEADS
    kept = {(metric, variant) for metric, variant, _ in COLUMNS}
    made = {}
    for prompts, metric, variant in (
        drawn[["prompts", "metric", "variant"]].drop_duplicates().values
    ):
        if many and (metric, variant) not in kept:
            continue
        name = f"{prompts}/{metric}/{variant}"
        made[f"scatter/{name}"] = comparison_scatter(
            comparison, metric, variant, prompts, title=" ", height=420
        )
        made[f"grid/{name}"] = difference_grid(
            comparison, metric, variant, prompts, title=" ", height=420
        )
    return {name: slim(figure.to_plotly_json()) for name, figure in made.items()}


def page(data: dict[str, Any], drawn: dict[str, dict[str, Any]]) -> str:
    """The whole page.

    Args:
        data: the comparison's numbers.
        drawn: of `figures`.
    """
    return rendered(
        "comparison",
        data,
        drawn,
        choices=choices(name for name in drawn if name.startswith("grid/")),
        largest=largest(data["heads"], "difference", "low", "high", MOST_ROWS),
        labels=_labels(data["metrics"]),
    )


def rendered(
    template_name: str, data: dict[str, Any], drawn: dict[str, dict[str, Any]], **more: Any
) -> str:
    """The page of a template, with what every page of a comparison holds."""
    made = environment()
    made.filters.update(signed=signed)
    return made.get_template(f"{template_name}.html.j2").render(
        data=data,
        names=KIND_WORDS,
        style=Markup(source_of(made, "report.css")),
        script=Markup(source_of(made, "shared.js") + source_of(made, "comparison.js")),
        plotly=Markup(get_plotlyjs()),
        payload=Markup(embedded_json({"template": template(), "figures": drawn})),
        **more,
    )


def choices(drawn: Iterable[str]) -> list[dict[str, str]]:
    """The scores that can be chosen, of figures such as `grid/<prompts>/<metric>/<variant>`; one is selected."""
    keys = [name.partition("/")[2] for name in drawn]
    first = next((key for key in keys if key == "copied/induction/raw"), keys[0] if keys else "")
    found = []
    for key in keys:
        prompts, metric, variant = key.split("/")
        without = ", sink excluded" if variant == "sink_excluded" else ""
        label = f"{METRICS[metric].label}{without}, on {KIND_WORDS[prompts]}"
        selected = " selected" if key == first else ""
        found.append(
            {
                "key": key,
                "label": label,
                "selected": selected,
                "definition": METRICS[metric].definition,
            }
        )
    return found


def _labels(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["metric"]: METRICS[row["metric"]].label for row in rows}


def largest(
    heads: Iterable[dict[str, Any]], value: str, low: str, high: str, most: int
) -> list[dict[str, Any]]:
    """Shares of attention that differ most, beyond their interval where there is one; those without it last."""
    rows = [
        row
        for row in heads
        if row[value] is not None
        and row["metric"] in SHARES
        and (row[low] is None or row[low] > 0 or row[high] < 0)
    ]
    rows.sort(key=lambda row: (row[low] is None, -abs(row[value])))
    return rows[:most]
