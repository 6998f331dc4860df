"""The logits of a head as a sum of what content says and what position says, where the model adds them.

DeBERTa (He et al. 2021, arXiv 2006.03654) adds three terms: content to content, content to position, position to content,

    s_ij = (q_i·k_j + q_i·k^r_{d(i,j)} + k_j·q^r_{d(j,i)}) / sqrt(3 d),

with keys and queries of the relative place. T5, BLOOM, MPT, Swin, SAM and BEiT add one term of position to q_i·k_j. Each
term is measured by what the attention would be without it, and by how far it lifts the keys that are attended to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.head_ids import AnyHead
from lens.common.progress import advancing
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.check import relative_error, tolerance_of
from lens.passes.masks import refuse_large
from lens.passes.noted import spelled_out_of
from lens.passes.sessions import listening, run
from lens.passes.sources import read_any
from lens.reading.logit_terms import LogitTerms

_OF_DEBERTA = ("disentangled_attention_bias", "disentangled_att_bias")
_KINDS = ("c2p", "p2c")


def disentangle(
    model: LoadedModel,
    prompts: Any,
    head: AnyHead | None = None,
    *,
    seed: Seed = 0,
    progress: bool = True,
) -> LogitTerms:
    """What content and position do to the attention of every head, of a model that adds them.

    Args:
        model: one whose attention adds a term of position to its logits; of a model in parts one of them.
        prompts: as for `lens.capture`; intervals are over them.
        head: whose logits of the first prompt are kept, term by term.
        seed: of the bootstrap.
        progress: show a bar, on stderr, if that is a terminal.

    Raises:
        LensError: a model that adds no term (rotary embeddings turn queries and keys: `lens.reading.explain` tells
            position from content there), or that caps the sum.

    Example:
        >>> config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=32)
        >>> tiny = lens.load(transformers.BloomModel(config).eval())
        >>> lens.reading.disentangle(tiny, [[1, 5, 9, 2], [3, 3, 7, 8, 4]]).terms
        ('content', 'position')
    """
    model.check_part()
    asked = None if head is None else model.info.head(head)
    read, _ = read_any(model, prompts)
    measured: list[dict[int, Tensor]] = []
    kept: list[tuple[Tensor, LayerCall]] = []
    names: set[tuple[str, ...]] = set()
    pending: list[dict[str, Tensor]] = []

    def on_layer(call: LayerCall) -> Tensor:
        terms, seen = _terms(call, pending, model)
        names.add(tuple(terms))
        logits = torch.stack(list(terms.values()))
        if len(measured) == 1 and asked is not None and call.layer == asked.layer:
            kept.append((logits[:, asked.head].masked_fill(~seen, torch.nan), call))
        measured[-1][call.layer] = _measured(logits, seen)
        return attend(call, statistics=()).output

    with (
        advancing(f"{model.name}: terms", len(read), progress) as advance,
        torch.no_grad(),
        _apart(model, pending),
        listening(model, on_layer),
    ):
        for prompt in read:
            measured.append({})
            run(model, prompt.inputs)
            advance(1)
    if len(names) != 1:
        raise LensError(f"layers of {model.info.class_name} add other terms to their logits")
    layers = tuple(sorted(measured[0]))
    values = torch.stack([torch.stack([one[layer] for layer in layers]) for one in measured], -1)
    found = values.cpu().numpy()  # [layers, lift or change, heads, terms, prompts]
    tokens: tuple[str, ...] = ()
    if kept:
        places, ids = kept[0][1].key_places, read[0].ids
        length = kept[0][0].shape[-1]
        own = map(str, range(length)) if ids is None else model.token_strings(ids)
        tokens = tuple(own if places is None else places.names)
    return LogitTerms(
        terms=next(iter(names)),
        layers=layers,
        lift=found[:, 0],
        change=found[:, 1],
        head=asked,
        logits=kept[0][0].cpu().numpy() if kept else None,
        tokens=tokens,
        seed=seed,
        model=model.name,
    )


def _terms(
    call: LayerCall, pending: list[dict[str, Tensor]], model: LoadedModel
) -> tuple[dict[str, Tensor], Tensor]:
    """Each term [heads, queries, keys] in float64, and bool [queries, keys]: what is seen."""
    name, bias = model.info.class_name, call.position_bias
    if bias is None:
        raise LensError(
            f"layer {call.layer} of {name} adds no term of position to its logits (rotary embeddings turn queries and "
            "keys instead: lens.reading.explain tells position from content there)"
        )
    if call.softcap is not None:
        raise LensError(f"{name} caps its logits, so that they are no sum of terms")
    queries, keys = call.query.shape[2], call.key.shape[2]
    refuse_large(queries, keys, "the terms of its logits")
    key = of_heads(call, call.key)[0].double()
    shape = (call.query.shape[1], queries, keys)
    content = call.query[0].double() @ key.transpose(-1, -2) * call.scale
    position = bias[0].double().expand(shape)
    seen = call.mask.seen_by(torch.arange(queries, device=bias.device), keys)
    if not pending:
        return {"content": content, "position": position}, seen
    apart = {kind: one.double().reshape(shape) for kind, one in pending.pop().items()}
    whole = torch.stack(list(apart.values())).sum(0)
    if not relative_error(whole[:, seen], position[:, seen]) <= tolerance_of(model.precision):
        raise LensError(f"the terms of layer {call.layer} of {name} do not sum to what it adds")
    return {"c2c": content, **apart}, seen


def _measured(logits: Tensor, seen: Tensor) -> Tensor:
    """[2, heads, terms]: lift and change, over the rows that see several keys."""
    rows = seen.sum(-1) > 1
    if not bool(rows.any()):
        raise LensError(
            "every row sees one key alone, so no term changes anything; take longer prompts"
        )
    logits, seen = logits[:, :, rows], seen[rows]
    whole = logits.sum(0)
    attention = whole.masked_fill(~seen, -torch.inf).softmax(-1)  # [heads, rows, keys]
    alike = seen.double() / seen.sum(-1, keepdim=True)
    lift = ((attention - alike) * logits).sum(-1).mean(-1)
    without = (whole - logits).masked_fill(~seen, -torch.inf).softmax(-1)
    change = (without - attention).abs().sum(-1).mean(-1) / 2
    return torch.stack([lift, change]).transpose(1, 2)


@contextmanager
def _apart(model: LoadedModel, pending: list[dict[str, Tensor]]) -> Iterator[None]:
    """Inside the block the terms of position that DeBERTa adds are put into `pending`, one by one."""
    with ExitStack() as stack:
        for module in model.transformer.modules():
            name = next((one for one in _OF_DEBERTA if hasattr(module, one)), None)
            if name is not None:
                _split(stack, module, name, pending)
        yield


def _split(stack: ExitStack, module: Any, name: str, pending: list[dict[str, Tensor]]) -> None:
    own = getattr(module, name)

    def apart(*args: Any, **kwargs: Any) -> Tensor:
        kinds, terms = module.pos_att_type, {}
        try:
            for kind in _KINDS:
                if kind in kinds:
                    module.pos_att_type = [kind]
                    terms[kind] = spelled_out_of(own(*args, **kwargs))
        finally:
            module.pos_att_type = kinds
        pending[:] = [terms]
        return torch.stack(list(terms.values())).sum(0)

    object.__setattr__(module, name, apart)
    stack.callback(object.__delattr__, module, name)
