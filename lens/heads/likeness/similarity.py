"""How alike the heads of a model are: by what they attend to, or by what they write.

>>> similar = lens.heads.similarity(model, texts, method="cka")
>>> similar.neighbours("L1H0")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import entr

from lens.common.errors import LensError
from lens.heads.likeness.head_similarity import HeadSimilarity, Likeness, cosine, ratio
from lens.traces.arrays import block_rows

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel
    from lens.traces.trace import AttentionTrace


def similarity(
    model: LoadedModel | AttentionTrace | Sequence[AttentionTrace],
    prompts: Any = None,
    *,
    method: Likeness = "js",
    sink_excluded: bool = False,
    floor: bool = False,
    progress: bool = True,
) -> HeadSimilarity:
    """Compare every head with every other one on the same prompts; exact, rows in chunks.

        js         mean over queries of JS(A_i, B_i) = H((A_i + B_i) / 2) - (H(A_i) + H(B_i)) / 2
        log_odds   cosine of log(A / uniform), each row smoothed with 0.1 % of the uniform one
        cka        unbiased HSIC of the outputs z, summed over prompts, as a cosine; it does not
                   change when an output is rotated or scaled. It can be a little below 0.

    Queries that see a single key are left out: all heads agree there. Time grows with
    `heads^2 * tokens^2` for "js", with `heads * tokens^2` for the others; memory is that of one chunk
    of rows, never [heads, tokens, tokens].

    Of traces alone, only their block maps are compared, by "js": a lower bound. Merging keys into blocks
    and rows into their mean can only bring two heads closer (data processing, joint convexity), so heads
    that are far apart there are at least that far apart.

    Args:
        model: as `lens.load` returns it; or a trace or several of one model, with `block_mass`.
        prompts: as in `lens.capture`; none for traces.
        method: "js", "log_odds" or "cka".
        sink_excluded: leave out the first key (and a learned sink) and renormalise, in the attention
            and in the outputs.
        floor: also compare heads across prompts (each with the next), which must be equally long.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Reference: Clark et al., What Does BERT Look At?, 2019, arXiv 1906.04341; Kornblith et al., 2019,
        arXiv 1905.00414; Nguyen et al. (CKA from parts), 2021, arXiv 2010.15327.

    Raises:
        LensError: an unknown `method`, prompts that are too short, a floor of one prompt or of prompts
            that differ in length, or traces of differing models, without `block_mass`, with learned sinks.

    Example:
        >>> prompts = [lens.tasks.copied(small, 25, seed=seed) for seed in range(4)]
        >>> similar = lens.heads.similarity(small, prompts)
        >>> similar.redundancy()["name"].nunique(), similar.clusters(count=2).members[0][0]
        (8, 'L0H0')
    """
    from lens.common.progress import advancing
    from lens.heads.likeness.states import read_states
    from lens.models.loaded import LoadedModel
    from lens.passes.inputs import read_prompts
    from lens.traces.trace import AttentionTrace

    if not isinstance(model, LoadedModel):
        given: Any = model
        several = isinstance(given, Iterable) and not isinstance(given, str)
        traces: list[Any] = list(given) if several else [given]
        if not traces or not all(isinstance(trace, AttentionTrace) for trace in traces):
            raise LensError("similarity takes a loaded model and prompts, or traces; got neither")
        if prompts is not None or method != "js" or sink_excluded or floor:
            raise LensError(
                "of traces only the block maps are compared, by method='js'; give the model and prompts for "
                "other methods, a floor or sink_excluded"
            )
        return _of_traces(traces)
    read, _ = read_prompts(model, prompts)
    parts, across = [], []
    first = before = None
    with advancing(f"{model.name}: similarity", len(read), progress) as advance:
        for prompt in read:
            states = read_states(model, prompt, sink_excluded=sink_excluded)
            if states.length - states.first_row < 1:
                raise LensError(
                    f"a prompt of {states.length} tokens has no query that sees two of the keys "
                    "compared; take longer prompts"
                )
            parts.append(_sums(method, states, states))
            if floor and before is not None:
                across.append(_across(method, before, states))
            first, before = first or states, states
            advance(1)
        if floor:
            if len(read) < 2 or first is None or before is None:
                raise LensError("a floor compares each prompt with the next; give at least two")
            across.append(_across(method, before, first))
    found = HeadSimilarity(
        sums=np.stack([sums for sums, _ in parts]),
        counts=np.stack([counts for _, counts in parts]),
        method=method,
        sink_excluded=sink_excluded,
        exactness="exact",
        heads=tuple(model.info.every_head),
        model=model.name,
    )
    return _with_floor(found, across) if floor else found


def _of_traces(several: list[AttentionTrace]) -> HeadSimilarity:
    sizes = {(trace.model, trace.layers, trace.heads) for trace in several}
    if len(sizes) > 1:
        raise LensError(f"traces must come from one model; got {sorted(sizes)}")
    parts = [_block_sums(trace) for trace in several]
    return HeadSimilarity(
        sums=np.stack([sums for sums, _ in parts]),
        counts=np.stack([counts for _, counts in parts]),
        method="js",
        sink_excluded=False,
        exactness="lower bound",
        heads=tuple(several[0].every_head),
        model=several[0].model,
    )


def _sums(method: str, left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
    from lens.heads.likeness.pairs import dependence, divergence, log_odds

    if method == "js":
        sums, counts = divergence(left, right)
        return sums.numpy(), counts.numpy()
    sums = (log_odds if method == "log_odds" else dependence)(left, right).numpy()
    return sums, np.ones_like(sums)


def _across(method: str, left: Any, right: Any) -> tuple[np.ndarray, np.ndarray]:
    if left.length != right.length:
        raise LensError(
            f"a floor needs prompts of one length, got {left.length} and {right.length} tokens; cut "
            "them: lens.tasks.take(model, text, tokens)"
        )
    return _sums(method, left, right)


def _with_floor(
    found: HeadSimilarity, across: list[tuple[np.ndarray, np.ndarray]]
) -> HeadSimilarity:
    sums = np.sum([part for part, _ in across], axis=0)
    if found.method == "js":
        return replace(found, floor=ratio(sums, np.sum([part for _, part in across], axis=0)))
    own = np.diagonal(found.sums.sum(0))
    return replace(found, floor=cosine(sums, own, own))


def _block_sums(trace: AttentionTrace) -> tuple[np.ndarray, np.ndarray]:
    if "block_mass" not in trace.dataset:
        raise LensError(
            "the trace has no block_mass; capture it with statistics including 'block_mass'"
        )
    if trace.attrs.get("learned_sinks", False):
        raise LensError(
            f"{trace.model} has learned sinks, whose share the block maps leave out; use "
            "lens.heads.similarity(model, texts)"
        )
    maps = trace.dataset["block_mass"].values.astype(float)
    if maps.shape[-1] < 2:
        raise LensError(
            f"all keys of a trace of {trace.length} tokens lie in one block, in which heads cannot differ; capture it with a "
            f"block_size below {trace.attrs['block_size']}"
        )
    maps = maps.reshape(-1, *maps.shape[2:])  # [heads, query_blocks, key_blocks]
    rows = block_rows(trace.dataset, trace.queries).astype(float)
    own = entr(maps).sum(-1)
    sums = np.stack(
        [
            ((entr((head + maps) / 2).sum(-1) - (own[index] + own) / 2).clip(0) * rows).sum(-1)
            for index, head in enumerate(maps)
        ]
    )
    return sums, np.full_like(sums, trace.queries - int(trace.attrs["causal"]))
