"""What a head's effect is made of: where it looks (query and key) and what it moves (value).

The head's attention is recomputed from q, k and v of the clean and of the corrupt run, so each half is
exact and no pattern is stored.
"""

from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lens.circuits.patches.effects import measured
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.edits._keyed import KeyedEdit
from lens.edits.attention import Mask
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend
from lens.passes.head_outputs import edited_logits, read_calls
from lens.passes.logits import logits_of
from lens.tasks.task import Task

PARTS = ("full", "pattern", "value", "interaction", "without_sink")
_RUNS = 5


def split_effects(
    model: LoadedModel, task: Task, heads: tuple[HeadId, ...], *, progress: bool = True
) -> np.ndarray:
    """Effects [heads, parts, prompts] of each head alone, float64, in the order of `PARTS`.

    With m the metric turned so that more is better, P the pattern, v the values, ' the corrupt run:

        full          m(P v) - m(P' v')     the whole head from the corrupt run
        pattern       m(P v) - m(P' v)      only its queries and keys
        value         m(P v) - m(P v')      only its values
        interaction   full - pattern - value
        without_sink  m(S v) - m(S' v')     S the pattern with its first key taken out, renormalised

    The last takes the first key out on both sides: it is the full effect of the rest of the pattern. A
    row that sees or uses nothing else keeps it.

    Raises:
        LensError: no corrupt prompts, or a model whose heads cannot be edited.
    """
    corrupt = task.corrupt_or_refuse()
    task.check(model)
    found = np.empty((len(heads), len(PARTS), task.n))
    total = len(heads) * task.n
    with advancing(f"{model.name}: parts of heads", total, progress) as advance:
        for rows in task.chunks(max(1, task.rows_at_once(model) // _RUNS)):
            ids = task.clean[rows]
            calls = [
                {call.layer: call for call in read_calls(model, one)}
                for one in (ids, corrupt[rows])
            ]
            with torch.no_grad():
                clean = measured(task, logits_of(model, ids), rows)
            for layer, some in groupby(range(len(heads)), key=lambda number: heads[number].layer):
                outputs = _outputs(calls[0][layer], calls[1][layer])
                for number in some:
                    effects = _effects(model, task, rows, heads[number], outputs, clean)
                    found[number][:, rows.numpy()] = effects
                    advance(len(rows))
    return found


def _effects(
    model: LoadedModel, task: Task, rows: Tensor, head: HeadId, outputs: list[Tensor], clean: Tensor
) -> Tensor:
    """[parts, rows] of one head, whose outputs of each run are given."""
    sources = [lambda _, __, output=output: output for output in outputs]
    logits = edited_logits(model, task.clean[rows], [(head,)] * _RUNS, sources)
    full, pattern, value, kept, lost = (measured(task, run, rows) for run in logits)
    full, pattern, value = (clean - patched for patched in (full, pattern, value))
    return task.sign * torch.stack([full, pattern, value, full - pattern - value, kept - lost])


def _outputs(clean: LayerCall, corrupt: LayerCall) -> list[Tensor]:
    """z [rows, heads, queries, value_dim] of the five runs of a layer."""
    with torch.no_grad():
        mixed = (corrupt, replace(corrupt, value=clean.value), replace(clean, value=corrupt.value))
        plain = [attend(call, statistics=()).output for call in mixed]
        return [*plain, without_first_key(clean), without_first_key(corrupt)]


def without_first_key(call: LayerCall) -> Tensor:
    """z of a call with the first key taken out of each row and the rest renormalised."""
    heads = torch.ones(call.layer + 1, call.query.shape[1], dtype=torch.bool)
    return KeyedEdit(Mask("first").plan(), heads, "auto").on_layer(call)
