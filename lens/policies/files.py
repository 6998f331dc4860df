"""Policies of heads as files: our own JSON, and those of MInference and DuoAttention."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lens.common.errors import LensError
from lens.common.files import as_path, plain, read_text, write_json, write_text
from lens.common.head_ids import HeadId, head_id
from lens.models.loaded import LoadedModel
from lens.policies.a_shape import AShape
from lens.policies.base import Full, Policy
from lens.policies.block_sparse import BlockSparse
from lens.policies.chunks import Hierarchical, Landmark, LongHeads
from lens.policies.duo import by_gates, most_open
from lens.policies.flex_prefill import FlexPrefill
from lens.policies.native import NativeSparse
from lens.policies.per_head import PerHead
from lens.policies.policy_search import PolicySearch
from lens.policies.quest import Quest
from lens.policies.sparge import Sparge
from lens.policies.strided import Strided
from lens.policies.vertical_slash import VerticalSlash
from lens.policies.xattention import XAttention

Format = Literal["lens", "minference", "duo"]
KINDS: dict[str, type[Policy]] = {
    kind.__name__: kind
    for kind in (
        AShape, BlockSparse, FlexPrefill, Full, Hierarchical, Landmark, LongHeads, NativeSparse, Quest, Sparge,
        Strided, VerticalSlash, XAttention,
    )
}  # fmt: skip
"""What a file may name: policies that are numbers and nothing else."""
_AS_SEARCHED: dict[Policy, Policy] = {
    VerticalSlash(100, 800): AShape(100, 800),
    VerticalSlash(1000, 6096): BlockSparse(share=1 / 8),
}  # what the search of MInference writes for what it found


def write(
    policy: PerHead | PolicySearch, path: str | Path, model: LoadedModel, *, format: Format = "lens"
) -> None:
    """Write the policy of every head of a model.

    Args:
        policy: `PerHead`, or what `search` found (its promise is written too).
        path: of the file; of "duo", a folder with `full_attention_heads.tsv` and `config.json`.
        model: whose heads they are.
        format: "lens"; "minference", a list of layers of `{head: [pattern, a, b, score]}`, which knows
            A-shape, vertical-slash and block-sparse by count (the score is the recall where `search` knows
            it, else 1; full heads are vertical-slash lines of the whole context, and layers without attention have no
            heads); "duo", 1 for a full and 0
            for a streaming KV head, one row a layer.

    Raises:
        LensError: a policy or a number of one that the format has no words for; in "duo" streaming heads of several sizes.

    Reference: microsoft/MInference, minference/configs; mit-han-lab/duo-attention, attn_patterns.

    Example:
        >>> found = lens.policies.PerHead({"L0H1": lens.policies.AShape(4, 16)})
        >>> lens.policies.write(found, "heads.json", model)
    """
    heads = policy.policy if isinstance(policy, PolicySearch) else policy
    if not isinstance(heads, PerHead):
        raise LensError(f"policy must be PerHead or what search found, got {type(policy).__name__}")
    recall = _recalls(policy) if isinstance(policy, PolicySearch) else {}
    if format == "duo":
        _write_duo(heads, as_path("path", path), model)
    elif format == "minference":
        layers = [
            {
                str(head): _minference(
                    heads.of(HeadId(layer, head)), model, recall.get((layer, head), 1.0)
                )
                for head in range(model.info.heads if layer in model.info.attending else 0)
            }
            for layer in range(model.info.layers)
        ]
        write_text(as_path("path", path), json.dumps(layers, default=plain))
    else:
        write_json(as_path("path", path), as_json(policy, model))


def read(
    path: str | Path,
    *,
    format: Format = "lens",
    heads: int | None = None,
    full: float | None = None,
    as_searched: bool = False,
) -> PerHead:
    """The policy of every head from a file.

    Args:
        path, format: as of `write`, or the `section.json` of the search of a run ("lens"); the score of a
            MInference file is not read: it means recall in most files and a number of errors in some.
        heads: query heads of a layer, for "duo", which knows KV heads alone.
        full: for "duo", the share of the KV heads with the most open gates that stay full, as in `from_gates`; None:
            those whose gate is above 0.5.
        as_searched: for "minference". Its search writes a head that streams best as vertical-slash (100, 800), and a
            block-sparse one as (1000, 6096), which is what it runs; True: read them as what was found. The second
            version of the search may find (100, 800) as vertical-slash too, which a file does not tell apart.

    Raises:
        LensError: no such file, a larger one than 32 MiB, or one that is not of this format; an argument of
            another format.

    Reference: microsoft/MInference, minference/modules/minference_forward.py; mit-han-lab/duo-attention, duo_attn/utils.py.

    Example:
        >>> lens.policies.write(lens.policies.PerHead({"L0H1": lens.policies.AShape(4, 16)}), "heads.json", model)
        >>> str(lens.policies.read("heads.json").of((0, 1)))
        'AShape(first=4, last=16)'
    """
    for name, value in (("heads", heads), ("full", full)):
        if value is not None and format != "duo":
            raise LensError(f"{name}= is of the format 'duo', got format={format!r}")
    if as_searched and format != "minference":
        raise LensError(f"as_searched= is of the format 'minference', got format={format!r}")
    try:
        if format == "duo":
            return _read_duo(as_path("path", path), heads, full)
        data = json.loads(read_text(as_path("path", path)))
        found = _read_minference(data, as_searched) if format == "minference" else _read_ours(data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise LensError(f"{path} is no file of policies in the format {format!r}: {why}") from None
    if not found.policies:
        raise LensError(f"{path} names no head")
    return found


def format_of(path: str | Path) -> Format:
    """In which format a file of policies is, by how it begins; a folder is DuoAttention's.

    Raises:
        LensError: no such file.

    Example:
        >>> lens.policies.write(lens.policies.PerHead({"L0H1": lens.policies.AShape(4, 16)}), "heads.json", model)
        >>> lens.policies.files.format_of("heads.json")
        'lens'
    """
    if as_path("path", path).is_dir():
        return "duo"
    return "minference" if read_text(as_path("path", path)).lstrip().startswith("[") else "lens"


def _recalls(found: PolicySearch) -> dict[tuple[int, int], float]:
    table = found.table()
    return {
        (int(a), int(b)): float(c)
        for a, b, c in zip(table["layer"], table["head"], table["recall"], strict=True)
    }


def as_json(found: PerHead | PolicySearch, model: LoadedModel) -> dict[str, Any]:
    """What a file of the format "lens" holds.

    Raises:
        LensError: a policy that is more than numbers.
    """
    heads = found.policy if isinstance(found, PolicySearch) else found
    entries = []
    for head in model.info.every_head:
        policy = heads.of(head)
        if type(policy).__name__ not in KINDS:
            raise LensError(f"{policy} of {head} is more than numbers and has no place in a file")
        numbers = {one.name: getattr(policy, one.name) for one in fields(policy)}  # type: ignore[arg-type]
        entries.append({"name": str(head), "policy": type(policy).__name__, **numbers})
    promise = {}
    if isinstance(found, PolicySearch):
        low, high = found.promise()
        promise = {
            "block_size": list(found.block_size),
            "loss_change": found.row("chosen")["loss_change"],
            "promise_low": None if math.isnan(low) else low,
            "promise_high": None if math.isnan(high) else high,
            "prompts": len(found.tokens),
            "tokens": max(found.tokens),
        }
    return {"format": "attention-lens policies 1", "model": model.name, **promise, "heads": entries}


def _read_ours(data: Any) -> PerHead:
    if "configuration" in data:  # the section of a run
        data = data["configuration"]["policies"]
    if data["format"] != "attention-lens policies 1":
        raise ValueError(f"unknown format {data['format']!r}")
    found = {}
    for entry in data["heads"]:
        entry = dict(entry)
        name, kind = head_id(entry.pop("name")), entry.pop("policy")
        found[name] = KINDS[kind](**entry)
    return PerHead(found)


def _minference(policy: Policy, model: LoadedModel, score: float) -> list[Any]:
    score = round(score, 3)
    if isinstance(policy, AShape):
        return ["stream_llm", policy.first, policy.last, score]
    if isinstance(policy, VerticalSlash):
        if policy != (run := VerticalSlash(policy.verticals, policy.slashes)):
            raise LensError(
                f"MInference's files have no words for first, last and probe of {policy}: it runs with {run.first}, "
                f"{run.last} and {run.probe}; search with these"
            )
        return ["vertical_and_slash", policy.verticals, policy.slashes, score]
    if isinstance(policy, BlockSparse) and policy.share is None:
        return ["block_sparse", policy.top or 100, 0, score]
    if isinstance(policy, Full):
        whole = model.info.context or 1 << 20
        return ["vertical_and_slash", whole, whole, score]
    raise LensError(
        f"MInference's files have no words for {policy}; they know AShape, VerticalSlash, BlockSparse(top) "
        "and full heads: search with these candidates"
    )


def _read_minference(data: Any, as_searched: bool) -> PerHead:
    kinds = {
        "stream_llm": AShape,
        "vertical_and_slash": VerticalSlash,
        "block_sparse": lambda top, _: BlockSparse(top),
    }
    renamed = _AS_SEARCHED if as_searched else {}
    found: dict[HeadId, Policy] = {}
    for layer, heads in enumerate(data):
        for head, (pattern, a, b, _) in heads.items():
            policy: Policy = kinds[pattern](int(a), int(b))
            found[HeadId(layer, int(head))] = renamed.get(policy, policy)
    return PerHead(found)


def _write_duo(heads: PerHead, folder: Path, model: LoadedModel) -> None:
    info = model.info
    share = info.heads // info.kv_heads
    sizes: set[tuple[int, int]] = set()
    rows = []
    for layer in range(info.layers):
        row = []
        for kv_head in range(info.kv_heads):
            group = [heads.of(HeadId(layer, kv_head * share + at)) for at in range(share)]
            others = [one for one in group if not isinstance(one, AShape | Full)]
            if others:
                raise LensError(
                    f"DuoAttention's files know streaming and full heads alone, got {others[0]} in layer {layer}"
                )
            streams = [one for one in group if isinstance(one, AShape)]
            if len(streams) == share:  # one full query head keeps the keys of all
                sizes |= {(one.first, one.last) for one in streams}
            row.append("0.0" if len(streams) == share else "1.0")
        rows.append("\t".join(row))
    if len(sizes) > 1:
        raise LensError(
            f"DuoAttention's files have one size of streaming heads, got {sorted(sizes)}"
        )
    first, last = sizes.pop() if sizes else (64, 256)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "full_attention_heads.tsv", "\n".join(rows) + "\n")
    write_json(folder / "config.json", {"sink_size": first, "recent_size": last})


def _read_duo(folder: Path, heads: int | None, full: float | None) -> PerHead:
    rows = [
        [float(gate) for gate in line.split("\t")]
        for line in read_text(folder / "full_attention_heads.tsv").splitlines()
        if line.strip()
    ]
    numbers = json.loads(read_text(folder / "config.json"))
    streaming = AShape(int(numbers["sink_size"]), int(numbers["recent_size"]))
    if heads is None or heads < 1 or any(heads % len(row) for row in rows):
        raise LensError(
            f"DuoAttention's files know KV heads alone ({len(rows[0])} here): give heads=, the number of query "
            "heads of a layer, a multiple of it"
        )
    alpha = np.array(rows)
    found = by_gates(alpha > 0.5 if full is None else most_open(alpha, full), heads, streaming)
    # full is what heads are that are not named: so are those of layers without attention
    return PerHead({head: one for head, one in found.policies.items() if one != Full()})
