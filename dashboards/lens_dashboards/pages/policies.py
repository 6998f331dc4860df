"""Page `/run/<id>/policies`: which heads may be sparse, how far, and what it costs."""

from typing import Any

import numpy as np
import pandas as pd
from dash import html

from lens.common.errors import LensError
from lens.common.head_ids import head_id
from lens.figures.policies import kept_map, policy_heads
from lens.runs import Run
from lens.runs.sections import Section
from lens_dashboards.library import Library
from lens_dashboards.pages.parts import (
    Cell,
    card,
    choice,
    data_table,
    graph,
    number,
    section_figure,
    select,
)
from lens_dashboards.pages.section_page import section_page
from lens_dashboards.selection import Selection

_SHOWN = {
    "recall": "attention kept",
    "gap": "gap to the best choice",
    "layer_error": "error, as a share of the layer",
    "output_error": "error of the head's output",
    "density": "blocks kept",
}
_MOST_HEADS = 64  # in one grid
_RETRIEVES = 0.2  # induction score of a head that fetches what was said before
_DIFFUSE = 0.5  # share of the blocks that 95 % of the attention needs


def page(library: Library, view: Selection) -> list[Any]:
    """Every head under every policy, the frontier, kept blocks over the exact map, and a card for each head."""
    return section_page(
        library,
        view,
        _cards,
        title="Policies",
        names=("policies", "search", "running", "stability"),
        missed=("sparse policies", "policies"),
    )


def _cards(run: Run, view: Selection, known: dict[str, Section], notes: list[str]) -> list[Any]:
    measured = known["policies"]
    heads = measured.tables["heads"]
    names = list(dict.fromkeys(heads["name"]))
    offered = [str(one) for one in measured.configuration["policies"]]
    policy = choice(view, "policy", offered, offered[0], notes)
    head = choice(view, "head", names, _poorest(heads, policy), notes)
    shown = choice(view, "shown", _SHOWN, "recall", notes)
    layer = _layer(view, heads, head, notes)
    return [
        _grid_card(run, heads, shown, layer),
        html.Div(
            [card(section_figure(run, one, name), title) for one, name, title in _frontiers(known)],
            className="halves",
        ),
        card(
            html.Div(
                [
                    select("policy", "Policy", {name: name for name in offered}, policy),
                    select("head", "Head", {name: name for name in names}, head),
                ],
                className="controls",
            ),
            "One head",
        ),
        html.Div(
            [_map_card(run, measured, head, policy), _head_card(run, known, head, offered)],
            className="halves",
        ),
    ]


def _poorest(heads: pd.DataFrame, policy: str) -> str:
    rows = heads[heads["policy"] == policy]
    return str(rows["name"].iloc[int(rows["recall"].to_numpy(float).argmin())])


def _layer(view: Selection, heads: pd.DataFrame, head: str, notes: list[str]) -> str:
    """The layer whose heads the grid shows: all, where these are few."""
    layers = [str(one) for one in dict.fromkeys(heads["layer"])]
    few = heads["name"].nunique() <= _MOST_HEADS
    default = "all" if few else str(head_id(head).layer)
    return choice(view, "layer", (["all"] if few else []) + layers, default, notes)


def _grid_card(run: Run, heads: pd.DataFrame, shown: str, layer: str) -> html.Section:
    layers = [str(one) for one in dict.fromkeys(heads["layer"])]
    few = heads["name"].nunique() <= _MOST_HEADS
    rows = heads if layer == "all" else heads[heads["layer"] == int(layer)]
    code = (
        "from lens.figures.policies import policy_heads\nfrom lens.runs import open_run\n\n"
        f"heads = open_run({str(run.path)!r}).section('policies').tables['heads']\n"
        f"policy_heads(heads, {shown!r})"
    )
    options = {"all": "all"} if few else {}
    return card(
        [
            html.Div(
                [
                    select("shown", "Show", _SHOWN, shown),
                    select("layer", "Layer", options | {one: one for one in layers}, layer),
                ],
                className="controls",
            ),
            graph("policy-heads", policy_heads(rows, shown), "Heads by policies", code),
        ],
        "Every head under every policy",
    )


def _frontiers(known: dict[str, Section]) -> list[tuple[Section, str, str]]:
    """The figures that set density against what is kept or lost."""
    wanted = (
        ("search", "curve", "Loss against density, a policy for each head"),
        ("policies", "recall", "Attention kept against density"),
        ("running", "runs", "Text and needles"),
        ("stability", "conditions", "Does a pattern serve elsewhere"),
    )
    return [
        (known[name], figure, title)
        for name, figure, title in wanted
        if name in known and figure in known[name].figures
    ]


def _map_card(run: Run, measured: Section, head: str, policy: str) -> html.Section:
    title = "Kept blocks over the exact map"
    if "maps" not in measured.tables:
        return card(html.P("This run holds no maps: its prompts have too many blocks."), title)
    table = measured.tables["maps"]
    rows = table[table["name"] == head]
    size = int(measured.configuration["block_size"])
    bit = list(map(str, measured.configuration["policies"])).index(policy)
    shape = (int(rows["query_block"].max()) + 1, int(rows["key_block"].max()) + 1)
    masses, kept = np.full(shape, np.nan), np.zeros(shape, bool)
    at = (rows["query_block"].to_numpy(int), rows["key_block"].to_numpy(int))
    masses[at] = rows["mass"].to_numpy(float)
    kept[at] = (rows["kept"].to_numpy(np.int64) >> bit) & 1 == 1
    code = (
        "from lens.runs import open_run\n\n"
        f"maps = open_run({str(run.path)!r}).section('policies').tables['maps']\n"
        f"maps[maps['name'] == {head!r}]  # bit {bit} of kept: {policy}"
    )
    figure = kept_map(masses, kept, (size, size), f"{head} under {policy}", height=430)
    return card(
        [
            graph("kept-map", figure, f"Kept blocks of {head} under {policy}", code),
            html.P("First window of the text. Veiled blocks are dropped.", className="small"),
        ],
        title,
    )


def _head_card(run: Run, known: dict[str, Section], head: str, offered: list[str]) -> html.Section:
    heads = known["policies"].tables["heads"]
    rows = heads[heads["name"] == head].set_index("policy")
    chosen = None
    if "search" in known:
        table = known["search"].tables["heads"]
        chosen = table[table["name"] == head].iloc[0].to_dict()
    columns = ("density", "recall", "oracle_recall", "layer_error")
    body: list[list[Cell]] = [
        [policy, *(number(float(rows.loc[policy, column])) for column in columns)]  # pyright: ignore[reportArgumentType]
        for policy in offered
    ]
    return card(
        [
            html.P(advice(run, rows, chosen), className="definition", id="advice"),
            data_table(
                f"{head} under every policy",
                [
                    "policy",
                    "blocks kept",
                    "attention kept",
                    "at best",
                    "share of the layer's error",
                ],
                body,
                row_heads=True,
                className="scroll",
            ),
        ],
        f"{head}: what to do with it",
    )


def advice(run: Run, rows: pd.DataFrame, chosen: dict[Any, Any] | None) -> str:
    """Keep it full, and why, or which policy serves it.

    Args:
        rows: of the head, one per policy.
        chosen: its row of the search, or None where there was none.
    """
    first = rows.iloc[0]
    name = str(first["name"])
    needs = f"95 % of its attention needs {first['budget_95']:.0%} of the blocks, chosen at best"
    if chosen is None:
        return f"{needs}; the search of this run is missing, so nothing was chosen for it."
    if chosen["policy"] != "Full()":
        return (
            f"Sparse: {chosen['policy']} keeps {chosen['density']:.0%} of the blocks and "
            f"{chosen['recall']:.1%} of the attention; its output is off by {chosen['layer_error']:.2%} of what the "
            f"layer writes. {needs}."
        )
    induction = _induction(run, name)
    if induction is not None and induction >= _RETRIEVES:
        why = f"retrieval (induction score {induction:.2f} on copied prompts)"
    elif first["budget_95"] > _DIFFUSE:
        why = "spread over the context"
    else:
        why = "every cheaper candidate is off by more than the search allowed"
    return f"Keep full: {why}. {needs}."


def _induction(run: Run, name: str) -> float | None:
    """Of the head on copied prompts, from the profile; None where there were none."""
    try:
        table = run.heads
    except LensError:
        return None
    layer, head = head_id(name)
    rows = table[
        (table["prompt_id"] == "copied")
        & (table["metric"] == "induction")
        & (table["variant"] == "raw")
        & (table["layer"] == layer)
        & (table["head"] == head)
    ]
    return None if rows.empty else float(rows["value"].iloc[0])
