"""Whether a run says one thing of its model, prompts and numbers, wherever it says it: what a reader does not need, and
`lens validate` looks for.

Each function gives one sentence a problem, which names the file and the column or entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lens.common.choices import is_number, is_whole
from lens.traces.tiles import gives_back, notes_mask

if TYPE_CHECKING:
    from lens.runs.folders import Run
    from lens.runs.sections import Section
    from lens.traces.trace import AttentionTrace

LARGEST_LOSS = float(-np.log(np.finfo(np.float64).smallest_subnormal))
"""Nats a token, 744: a larger one says that the model gave its tokens a probability that no float64 can hold."""
_OF_TOKENS = ("text", "copied")
_NO_MEANS = ("tau", "overlap", "faithfulness", "chance")
"""Columns that are no means of what is drawn again, so that they may lie beside the interval of the draws."""
_ALIKE = ("model_class", "revision", "scale", "softcap", "learned_sinks", "processes")
_LARGEST_CHECK = 0.1
"""Relative error of a captured output from the model's own, above which no model is loaded in any number type."""
_SLACK = 1e-3  # of an interval's width, or of the value


def model_problems(run: Run) -> Iterator[str]:
    """Sizes of the model in `run.json` that contradict each other."""
    model = run.meta["model"]
    heads, shared = model["heads"], model.get("kv_heads")
    if shared and heads % shared:
        yield f"run.json: model.kv_heads is {shared}, which does not divide the {heads} of model.heads"
    attending = model.get("attending")
    if attending and (attending != sorted(set(attending)) or attending[-1] >= model["layers"]):
        yield f"run.json: model.attending {attending} are no layers of {model['layers']}, in order"


def prompt_number_problems(run: Run) -> Iterator[str]:
    """Token ids that the model does not have, and losses that are missing or cannot be."""
    table, vocab = run.prompts, run.meta["model"].get("vocab")
    of_tokens = table[table["kind"].isin(_OF_TOKENS)]
    for prompt_id, ids in of_tokens[["prompt_id", "token_ids"]].itertuples(index=False):
        if vocab and len(ids) and not 0 <= min(ids) <= max(ids) < vocab:
            wrong = next(one for one in ids if not 0 <= one < vocab)
            yield f"prompts.parquet: column token_ids: {prompt_id} has {wrong}, the model knows 0 to {vocab - 1}"
    for name in ("loss", "loss_repeat"):
        for row in table[table[name] > LARGEST_LOSS].to_dict("records"):
            yield f"prompts.parquet: column {name}: {row['prompt_id']} has {row[name]:.4g} nats, which no model has"
    if (
        any(text.startswith("no loss") for text in run.meta["warnings"])
        or of_tokens["loss"].isna().all()
    ):
        return  # traces that were opened without their model have none
    for row in of_tokens[of_tokens["status"] == "done"].to_dict("records"):
        if row["tokens"] > 1 and np.isnan(row["loss"]):
            yield f"prompts.parquet: column loss: {row['prompt_id']} has none, and no warning says why"
        elif row["kind"] == "copied" and row["tokens"] > 3 and np.isnan(row["loss_repeat"]):
            yield f"prompts.parquet: column loss_repeat: {row['prompt_id']} is copied and has none"


def interval_problems(table: pd.DataFrame, name: str) -> Iterator[str]:
    """Means that lie outside of their own interval, or are missing beside it; `name` is of the file."""
    for value, low, high in _intervals(table):
        mean, least, most = (table[column].to_numpy(float) for column in (value, low, high))
        slack = _SLACK * np.maximum(most - least, np.abs(mean)) + 1e-9
        off = np.isfinite(least) & np.isfinite(most)
        off &= np.isnan(mean) | (mean < least - slack) | (mean > most + slack)
        if off.any():
            row = int(off.argmax())
            yield (
                f"{name}: column {value}: {mean[row]:.4g} in row {row} lies outside of its own interval, "
                f"{least[row]:.4g} to {most[row]:.4g}"
            )


def _intervals(table: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Columns of means with those of the ends of their intervals; `low` and `high` are of the column before them, but for
    the standard error."""
    names = [name for name in map(str, table) if name != "stderr"]
    triples = [(name, f"{name}_low", f"{name}_high") for name in names]
    if "low" in names[1:]:
        at = names.index("low")
        triples.append((names[at - 1], "low", "high"))
    for three in triples:
        if three[0] not in _NO_MEANS and all(
            name in table and pd.api.types.is_numeric_dtype(table[name]) for name in three
        ):
            yield three


def section_number_problems(section: Section) -> Iterator[str]:
    """Of the tables of a section: intervals, and losses that no model has."""
    for part, table in section.tables.items():
        name = f"sections/{section.name}/{part}.parquet"
        yield from interval_problems(table, name)
        for column in (one for one in map(str, table) if one.rpartition("_")[2] == "loss"):
            if pd.api.types.is_numeric_dtype(table[column]):
                most = np.nanmax(np.abs(table[column].to_numpy(float)), initial=0)
                if most > LARGEST_LOSS:
                    yield f"{name}: column {column} has {most:.4g} nats, which no model has"


def disagreements(
    run: Run, prompt_id: str, trace: AttentionTrace, known: dict[str, Mapping[str, Any]]
) -> Iterator[str]:
    """What a trace says of its model, prompt and settings otherwise than the run, or than the first trace that was read,
    whose attributes are in `known` from then on."""
    said, attrs, model = f"trace/{prompt_id}/trace.json", trace.attrs, run.meta["model"]
    part = attrs.get("part")
    of_run = {
        "model": model["name"].removesuffix(f" ({part})" if part else ""),
        "dtype": model.get("dtype"),
        "block_size": run.meta.get("block_size"),
    }
    if "processes" in attrs and not part:
        of_run["model_class"] = model.get("class")
    names = (model.get("class"),) if run.meta["what"] == "diffusion" else ()
    for name, expected in of_run.items():
        if expected is not None and attrs.get(name) not in (expected, *names):
            yield f"{said}: {name} is {attrs[name]!r}, run.json says {expected!r}"
    first, of_first = next(iter(known.items()), (prompt_id, attrs))
    known.setdefault(first, of_first)
    for name in _ALIKE:
        if attrs.get(name) != of_first.get(name):
            yield f"{said}: {name} is {attrs.get(name)!r}, in {first} {of_first.get(name)!r}"
    if "without_attention" in attrs and run.meta["what"] != "diffusion":  # modules, not all numbers
        numbers = sorted({*trace.layers, *trace.without_attention})
        if numbers != list(range(model["layers"])):
            yield f"{said}: its layers are {len(numbers)}, run.json says {model['layers']} (model.layers)"
    all_layers = None if "without_attention" in attrs else [*range(model["layers"])]
    attending = model.get("attending") or all_layers  # of older folders
    if attending and [*trace.layers] != attending:
        yield f"{said}: layers with softmax attention are {[*trace.layers]}, run.json says {attending}"
    if "processes" in attrs:  # captured here
        yield from (f"{said}: {problem}" for problem in _captured(trace))
    kv_heads = attrs.get("kv_heads")
    if kv_heads and (
        trace.heads % kv_heads or trace.dataset.sizes.get("kv_head", kv_heads) != kv_heads
    ):
        yield f"{said}: kv_heads is {kv_heads}, of {trace.heads} heads"
    yield from _tokens(run, prompt_id, trace, said)


def _captured(trace: AttentionTrace) -> Iterator[str]:
    """How a prompt was captured: counts that cannot be."""
    attrs, positions = trace.attrs, trace.length
    processes, chunk, check = attrs["processes"], attrs.get("chunk"), attrs.get("check")
    if not is_whole(processes) or not 1 <= processes <= positions:
        yield f"processes is {processes!r}, of a prompt of {positions} tokens"
    elif processes > 1 and chunk is not None:
        yield f"processes is {processes} and chunk {chunk!r}: a prompt is split in one of these ways"
    if chunk is not None and (not is_whole(chunk) or not 1 <= chunk < positions):
        yield f"chunk is {chunk!r}, of a prompt of {positions} tokens"
    if check is not None and not (is_number(check) and 0 <= check <= _LARGEST_CHECK):
        yield f"check is {check!r}; a model whose output differs by more than {_LARGEST_CHECK} is not loaded"
    if attrs.get("tokens") not in (None, positions):
        yield f"tokens is {attrs['tokens']!r}, its layers have {positions} keys"
    if twice := sorted({*attrs.get("twice", ())} - {*trace.layers}):
        yield f"twice is {attrs['twice']}, and {twice} are no layers of it"


def _tokens(run: Run, prompt_id: str, trace: AttentionTrace, said: str) -> Iterator[str]:
    """Token ids, and whether the first is BOS, which is one token in all prompts."""
    rows = run.prompts
    own = rows[rows["prompt_id"] == prompt_id]
    if own.empty or own["kind"].iloc[0] not in _OF_TOKENS:
        return
    ids = trace.dataset["token_id"].values.tolist()
    if ids != [*map(int, own["token_ids"].iloc[0])]:
        yield f"{said}: token_id is not what prompts.parquet has in token_ids"
    if (
        trace.part or rows["kind"].iloc[0] not in _OF_TOKENS
    ):  # positions are keys, BOS is a source's
        return
    is_alike, of_run = ids[0] == rows["token_ids"].iloc[0][0], run.meta.get("bos")
    expected = of_run if is_alike else "absent" if of_run == "added" else None
    if expected and trace.attrs["bos"] != expected:
        yield f"{said}: bos is {trace.attrs['bos']!r}, run.json and its first token say {expected!r}"


def kept_problems(trace: AttentionTrace, layer: int) -> Iterator[str]:
    """Heads whose kept q and k do not give back what was measured of two rows."""
    at = trace.layers.index(layer)
    if not {"q", "k", "lse"} <= set(trace.dataset) or trace.attrs.get("biased", True):
        return
    if not (notes_mask(trace.attrs, at) or trace.has_plain_mask(layer)):
        return
    for head in range(trace.heads):
        if not gives_back(trace.dataset, trace.head_id((layer, head))):
            yield f"q and k of head {head} do not give back its lse"
            return
