"""Which kind of sink each head has: one that says nothing, or one whose value every row gets.

With `O = O_S + O_rest` what a head writes (through W_O) from the sources and from other keys, over the rows
behind the last source:

    share       c = mean |O_S| / (mean |O_S| + mean |O_rest|)
    variation   Var(v_S) / E |v_S|² over prompts, through W_O
    rank        |O|_F² / |O|_2², and the same about the mean row

    nop                c < 0.1: the head does nothing there
    fixed broadcast    c > 0.5, variation < 0.05: a bias that all rows of all prompts get
    input broadcast    c > 0.5, variation >= 0.05: all rows get what the prompt put there
    mixed              between
    learned, gate      the model's own sink logit, or a gate on the output, takes more than the sources do

A rank cannot tell them apart: a value of 0 leaves it as it is, and one a tenth as long as the others still makes
it 2. The shares say what is there; the tests run the model without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lens.common.choices import Count, Seed
from lens.common.errors import LensError
from lens.common.head_ids import head_columns
from lens.common.progress import advancing
from lens.edits.losses import bos_policy, two_tokens
from lens.heads.weights import head_weights
from lens.models.layout import is_known
from lens.models.loaded import LoadedModel
from lens.models.weights import matrix
from lens.passes.calls import LayerCall, attend, evened
from lens.passes.inputs import read_prompts
from lens.passes.keys import Keys, KeysAt, check_fixed_keys, members
from lens.passes.logits import check_predicts_tokens
from lens.passes.sessions import base, listening
from lens.sinks.causes.gates import Outputs
from lens.sinks.causes.kind_results import SinkKinds, is_sure, kind_of
from lens.sinks.causes.kind_tests import tests_of
from lens.sinks.causes.moves import moves_of
from lens.sinks.causes.origins import origins_of
from lens.stats.intervals import columns

_MEASURES = ("mass", "share", "learned", "uniform_mass", "uniform_share", "rank", "rank_centred")
_INTERVALS = ("mass", "share")


def kinds(
    model: LoadedModel,
    prompts: Any,
    *,
    sources: Keys = "first",
    targets: Sequence[int] | None = None,
    draws: Count = 2,
    seed: Seed = 0,
    progress: bool = True,
) -> SinkKinds:
    """Tell the sinks of all heads apart, test each kind in the model, and say where they come from.

    Args:
        model: as `lens.load` returns it; causal, predicting next tokens.
        prompts: as for `lens.capture`, token prompts; from two on a fixed value is told from one of the prompt.
        sources: "first", positions or a bool mask.
        targets: positions that the sink is moved to; None: 20, or the last one before that 16 queries see.
        draws: of random keys with as much attention, for the tests.
        seed: of these and of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Reference: kinds of sinks, arXiv 2606.08105; moved by variance, arXiv 2605.06611; gradient, arXiv 2603.17771.

    Raises:
        LensError: sources that are not in a prompt or leave no row behind them, targets too near the end, a
            model that looks ahead or whose output weights are not known.

    Example:
        >>> found = lens.sinks.kinds(model, texts)
        >>> found.counts, found.tests[["kind", "test", "delta_loss"]], found.moves
    """
    check_fixed_keys("sources", sources, "kinds")
    check_predicts_tokens(model)
    asked = read_prompts(model, prompts)[0]
    ids = [two_tokens(prompt.ids) for prompt in asked]
    found = [_source(sources, len(one)) for one in ids]
    factors = _factors(_projected(model, asked[0].inputs))
    measured, values, gates = [], [], []
    with advancing("kinds of sinks", len(asked), progress) as advance:
        for prompt, source in zip(asked, found, strict=True):
            run = _Measuring(source, factors)
            outputs = Outputs(model)
            with torch.no_grad(), listening(model, outputs.of(run.on_layer)), outputs.hooked():
                base(model)(**prompt.inputs)
            measured.append(torch.stack(run.layers))  # [layers, measure, heads]
            values.append(run.values)
            gates.append(torch.stack(outputs.kept or [one[0] * torch.nan for one in run.layers]))
            advance(1)
    rows = _rows(
        model, torch.stack(measured), torch.stack(gates), _variation(values, factors), seed
    )
    same = {"sources": sources, "seed": seed, "progress": progress}
    return SinkKinds(
        rows=rows,
        tests=tests_of(model, asked, found, values, rows, draws=draws, **same),
        origin=origins_of(model, asked, found, rows, seed=seed, progress=progress),
        moves=moves_of(model, asked, found, rows, targets=targets, seed=seed, progress=progress),
        bos=bos_policy(model, ids),
        tokens=tuple(map(len, ids)),
    )


def _source(sources: Keys, tokens: int) -> Tensor:
    """bool [tokens].

    Raises:
        LensError: none is there, or no row is behind them.
    """
    found = members("sources", sources, KeysAt(0, 0, torch.arange(tokens)[None], None))[0]
    if not bool(found.any()) or bool(found[-1]):
        raise LensError(
            f"sources must be in the prompt of {tokens} tokens and leave rows behind them; got positions "
            f"{found.nonzero()[:, 0].tolist()}"
        )
    return found


def _projected(model: LoadedModel, inputs: Mapping[str, Any]) -> Tensor:
    """[layers, heads, dim, d_model], what each head's output is multiplied by.

    Of an architecture whose parts are not in the table (those with gates) the weights of the projections that take the heads'
    outputs in, without norms behind them.

    Raises:
        LensError: neither is known.
    """
    if is_known(model):
        return head_weights(model).output
    outputs = Outputs(model)
    with torch.no_grad(), listening(model, outputs.of(_plain)), outputs.hooked():
        base(model)(**inputs)
    found = outputs.projections
    if len(found) != model.info.layers:
        raise LensError(
            f"what the heads of {model.info.class_name} write through is not known: a projection was found behind "
            f"{len(found)} of {model.info.layers} layers"
        )
    weights = [matrix(part, model)[0].float().cpu() for part in found]
    return torch.stack(weights).unflatten(1, (model.info.heads, -1))


def _plain(call: LayerCall) -> Tensor:
    return attend(call, statistics=()).output


def _factors(output: Tensor) -> Tensor:
    """[layers, heads, dim, dim] F with `|z F| = |z W_O|` for every z."""
    weight = output.double()
    values, vectors = torch.linalg.eigh(weight @ weight.transpose(-1, -2))
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


class _Measuring:
    """Takes the measures while the model runs as it is; `layers` are [measure, heads] each."""

    def __init__(self, source: Tensor, factors: Tensor) -> None:
        self.layers: list[Tensor] = []
        self.values: dict[int, Tensor] = {}  # layer -> [groups, sources, dim], of the sources
        self._source, self._factors = source, factors

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`.

        Raises:
            LensError: the layer looks ahead.
        """
        if not call.mask.causal:
            raise LensError(f"layer {call.layer} sees later tokens; kinds is for causal models")
        factor = self._factors[call.layer].to(call.value.device)
        source = self._source.to(call.value.device)
        own = self._of(call, source, factor)
        flat = self._of(replace(evened(call), sink_logits=None), source, factor)
        none = torch.full_like(own[0], torch.nan)
        learned = none if call.sink_logits is None else own[2]
        self.layers.append(torch.stack([*own[:2], learned, *flat[:2], *own[3:]]).cpu())
        self.values[call.layer] = call.value[0, :, source].double().cpu()
        return attend(call, statistics=()).output

    def _of(self, call: LayerCall, source: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        """[heads] each: mass, share, what a learned sink takes, and the two ranks."""
        dim, value = call.value.shape[-1], call.value
        marks = source.to(value)[:, None].expand(*value.shape[:-1], 1)
        both = torch.cat([value * marks, value * (1 - marks), marks, 1 - marks], -1)
        after = slice(int(source.nonzero()[-1]) + 1, None)
        weighed = attend(replace(call, value=both), statistics=()).output[0, :, after].double()
        sinks, rest = weighed[..., :dim] @ factor, weighed[..., dim : 2 * dim] @ factor
        from_sinks, from_rest = (part.norm(dim=-1).mean(-1) for part in (sinks, rest))
        mass = weighed[..., 2 * dim].mean(-1)
        learned = 1 - mass - weighed[..., 2 * dim + 1].mean(-1)
        written = sinks + rest
        ranks = (_rank(written), _rank(written - written.mean(1, keepdim=True)))
        return mass, from_sinks / (from_sinks + from_rest), learned, *ranks


def _rank(written: Tensor) -> Tensor:
    """[heads], stable rank of [heads, rows, dim]; NaN of nothing."""
    sizes = torch.linalg.svdvals(written).square()
    return sizes.sum(-1) / sizes[..., 0].where(sizes[..., 0] > 0, torch.nan)


def _variation(values: Sequence[Mapping[int, Tensor]], factors: Tensor) -> Tensor:
    """[attending layers, heads], of layer -> [groups, sources, dim] of each prompt; NaN for one prompt."""
    found = []
    for layer in values[0]:
        factor = factors[layer].cpu()
        if len(values) < 2:
            found.append(factor.new_full(factor.shape[:1], torch.nan))
            continue
        several = torch.stack([one[layer] for one in values])
        several = several.repeat_interleave(len(factor) // several.shape[1], 1) @ factor
        spread = several.var(0).sum((1, 2))
        size = several.square().sum(-1).mean(0).sum(1)
        found.append(spread / size.where(size > 0, torch.nan))
    return torch.stack(found)


def _rows(
    model: LoadedModel, measured: Tensor, gates: Tensor, variation: Tensor, seed: int
) -> pd.DataFrame:
    """One row per head; `measured` [prompts, layers, measure, heads], `gates` [prompts, layers, heads]."""
    found: dict[str, Any] = {}
    for place, name in enumerate(_MEASURES):
        values = measured[:, :, place].flatten(1).numpy().T  # [heads of all layers, prompts]
        found |= columns(name, values, seed) if name in _INTERVALS else {name: values.mean(1)}
    found["variation"] = variation.flatten().numpy()
    found["gate"] = gates.flatten(1).mean(0).numpy()
    table = pd.DataFrame(head_columns(model.info.every_head) | found)
    records = table.to_dict("records")
    table.insert(3, "kind", [kind_of(row) for row in records])
    table.insert(4, "sure", [is_sure(row) for row in records])
    return table
