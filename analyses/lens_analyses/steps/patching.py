"""Patching by position: what of a task each layer carries at each token, in the stream, by attention, by MLPs, by heads."""

from dataclasses import replace

import numpy as np
import pandas as pd

from lens import circuits
from lens.circuits.patches.effects import ROUNDING, PatchEffects
from lens.common.errors import LensError
from lens.common.head_ids import head_columns, head_of_node
from lens.common.results import ends
from lens.models.loaded import LoadedModel
from lens.runs.headlines import Headline, highest
from lens.runs.sections import Section
from lens.tasks import Task
from lens_analyses.config.analyses import PatchSettings
from lens_analyses.config.sizes import heads_by_position
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject


def patching(subject: Subject) -> Section:
    """Maps of layer by token for every stream that is asked for, and of heads."""
    settings, task = subject.settings, subject.task
    noisy = settings.corruption == "noise"
    writers = _writers(subject.model)
    lacking = set() if any(one.startswith("m") for one in writers) else {"mlp"}
    found = {
        name: _named(_patched(subject, name), subject.model, task)
        for name in settings.patched
        if name not in lacking
    }
    if not found:
        raise LensError(
            f"nothing of {', '.join(settings.patched)} can be patched here: {subject.model.name} has no MLPs"
        )
    tables = {"effects": pd.concat([_rows(name, one) for name, one in found.items()])}
    if "heads" in found:
        tables["heads"] = _of_heads(found["heads"])
    strongest = {
        name: told
        for name, one in found.items()
        if name != "residual" and (told := _strongest(name, one)) is not None
    }
    said = [f"{_STREAMS[name]}: {one}" for name, own in found.items() for one in own.findings()]
    if "residual" in found and (carried := _carried(found["residual"])):
        said.insert(0, carried)
    return Section(
        name="patching",
        title="Patching by position: where the answer is carried",
        summary=tuple(said),
        limits=_limits(settings, task, found, lacking),
        columns=defined(tables.values(), _COLUMNS),
        configuration={
            **{name: getattr(settings, name) for name in ("direction", "corruption", "window")},
            **({"noise": settings.noise, "at": settings.at or "every token"} if noisy else {}),
            "prompts": task.n,
            "sign": task.sign,
            "seed": subject.seed,
        },
        tables=tables,
        figures={name: one.plot() for name, one in found.items()},
        headlines=tuple(strongest.values()),
    )


def _patched(subject: Subject, name: str) -> PatchEffects:
    """The map of one stream, or of the heads."""
    settings, task = subject.settings, subject.task
    alike = {"direction": settings.direction, "seed": subject.seed, "progress": subject.progress}
    if settings.corruption == "noise":
        alike |= {"noise": float(settings.noise), "noise_at": settings.at or None}
    if name == "heads":
        heads = [one for one in _writers(subject.model) if ".h" in one]
        each = heads_by_position(len(heads), task.length)
        return circuits.patch(
            subject.model, task, heads, positions="each" if each else None, **alike
        )
    window = 1 if name == "residual" else settings.window
    return circuits.patch(subject.model, task, name, positions="each", window=window, **alike)


def _writers(model: LoadedModel) -> tuple[str, ...]:
    from lens.circuits.graph.nodes import find_nodes

    return find_nodes(model).graph.writers


def _named(found: PatchEffects, model: LoadedModel, task: Task) -> PatchEffects:
    """The same with the tokens of the first prompt behind the numbers of its positions."""
    if found.positions == ("all",):
        return found
    tokens = model.token_strings(task.prompts[0])
    return replace(found, positions=tuple(f"{at} {tokens[int(at)]!r}" for at in found.positions))


def _rows(name: str, found: PatchEffects) -> pd.DataFrame:
    table = _table(found)
    table.insert(0, "stream", name)
    return table


def _table(found: PatchEffects) -> pd.DataFrame:
    named = {"low": "change_low", "high": "change_high"}
    return found.table().drop(columns="relative").rename(columns=named)


def _of_heads(found: PatchEffects) -> pd.DataFrame:
    """The heads' rows with layer and head apart."""
    table = _table(found)
    heads = [head for node in table.pop("node") if (head := head_of_node(node)) is not None]
    return pd.concat([pd.DataFrame(head_columns(heads)), table], axis=1)


def _carried(found: PatchEffects) -> str:
    """At which token the residual stream moves most towards the other run, layer by layer; "" where there is nothing to move."""
    if not found.whole:
        return ""
    effects, done = found.effects, _DONE[found.direction]
    best, most = effects.argmax(1), effects.max(1)
    rows = found.table().set_index(["node", "position"])

    def told(layer: int) -> str:
        place = found.positions[best[layer]]
        row = rows.loc[[(found.nodes[layer], place)]].iloc[0]
        low, high = sorted(row[end] / found.whole for end in ("low", "high"))
        return f"{most[layer]:.2f}{ends(low, high, '.2f')}"

    shown = np.flatnonzero(most >= _WORTH).tolist()
    if not shown:
        return (
            f"No single token of the residual stream {done} {_WORTH} of the answer or more (at most {told(int(most.argmax()))}): "
            "it hangs on several tokens at once."
        )
    starts = [
        at for number, at in enumerate(shown) if not number or best[at] != best[shown[number - 1]]
    ]
    parts = [f"{found.positions[best[at]]} from {found.nodes[at]} on ({told(at)})" for at in starts]
    return (
        f"Of single tokens of the residual stream most {done} {', then '.join(parts)}; 1 is all of the answer, less than "
        f"{_WORTH} is not named."
    )


def _strongest(name: str, found: PatchEffects) -> Headline | None:
    """The place that moves most towards the other run, beside the median place; None where none moves more than rounding."""
    table = found.table()
    whole = found.whole
    sign = -1 if whole < 0 else 1
    low, high = ("low", "high") if sign > 0 else ("high", "low")
    largest = max(np.abs(found.base).max(), np.abs(found.source).max())
    if not whole or len(table) < 2 or (sign * table["change"]).max() <= ROUNDING * largest:
        return None
    best, fields = highest(
        *(sign * table[end] for end in ("change", low, high)), units=len(found.base)
    )
    row = {str(column): value for column, value in table.iloc[best].items()}
    place = "" if row["position"] == "all" else f" at token {row['position']}"
    return Headline(
        f"{row['node']}{place} alone changes the {found.metric} by {row['change']:+z.3g}"
        f"{ends(row['low'], row['high'], '+z.3g')} of the {whole:+.3g} between both runs; the median of "
        f"{_WORDS[name]} by {sign * fields['baseline']:+z.3g}.",
        **fields,
        against=f"the median of {_WORDS[name]}",
        unit=found.metric,
        figure=name,
    )


def _limits(
    settings: PatchSettings, task: Task, found: dict[str, PatchEffects], lacking: set[str]
) -> tuple[str, ...]:
    """What the maps do not say."""
    said = [
        "Denoising finds what is enough and noising what is needed; where either of two is enough, noising shows neither.",
        "The residual stream at the last token of the last layers carries everything, whatever the model does before.",
        "Tokens are named after the first prompt; the others have theirs at the same positions.",
    ]
    if settings.corruption == "noise":
        said.append(
            f"Noise of {settings.noise} standard deviations takes a prompt out of what the model has seen, and maps by "
            "noise and by counterfactual prompts differ (arXiv 2309.16042)."
        )
    said += ["The model has no MLPs."] if lacking & set(settings.patched) else []
    if "heads" in found and found["heads"].positions == ("all",):
        heads = len(found["heads"].nodes)
        said.append(
            f"Each of {heads} heads is patched at all {task.length} tokens at once; token by token they are too many."
        )
    return tuple(said)


_WORTH = 0.1  # share of the answer from which on a place of the stream is named
_DONE = {"denoising": "brings back", "noising": "takes away"}
_STREAMS = {
    "residual": "Residual stream",
    "attention": "Attention",
    "mlp": "MLPs",
    "heads": "Heads",
}
_WORDS = {"attention": "attention layers", "mlp": "MLPs", "heads": "heads"}
_COLUMNS = {
    "stream": "residual: what enters a layer; attention: all that its heads write; mlp: what its MLP writes; heads: one head.",
    "node": "r3 is the residual stream that enters layer 3, a3 its attention, m3 its MLP, a3.h5 a head.",
    "name": "Layer and head.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "position": "Where it is patched: number of the token, and the token in the first prompt; all: everywhere.",
    "change": "Metric with the patch minus without it, mean over prompts, in units of the metric: of a loss, up is worse.",
    "effect": "change / (metric of the other run - metric of this one): 1 moves all of it.",
    "n": "Prompts.",
}
