"""The scores of `lens.heads.behaviour.role_metrics` on one prompt, layer by layer while the model runs.

Beside the pass that the model needs, each layer's attention runs once more with the sizes of the
values in place of the values: it gives what each key contributes, the mass on the query's own
sentence, and both without the first key. N×N is never built.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lens_kernels import AttentionResult
from torch import Tensor

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.replay import proved
from lens.passes.sessions import base, listening
from lens.traces.scores import Score, row_score, whole_score
from lens.traces.statistics import VARIABLES, make_settings, measure
from lens.traces.token_rows import is_delimiter

_SMALLEST_REST = 1e-6  # of a row without key 0, below which it says nothing
_SHORT = "the prompt is too short"
_NO_REST = "no row attends to keys from 1 on"
_NO_UNIFORM = "an output has no value that uniform attention alone would give"
_OF_OUTPUT = ("output_norm", "noop", "drain", "first_contribution")

STATISTICS = [name for name in VARIABLES if name not in ("block_mass", "block_max")]
"""What the scores of `lens.traces.metrics` need."""
_PROFILE = make_settings(statistics=STATISTICS, block_size=64, keep_qk=False, backend="auto")


def sentences(tokens: Sequence[str]) -> list[int]:
    """Number of the sentence of each token; a sentence ends with . ! ? or a line break.

    Example:
        >>> sentences(["One", ".", "Two", " and", "!", "?", " Three"])
        [0, 0, 1, 1, 1, 1, 2]
    """
    numbers, number, ended = [], 0, False
    for token in tokens:
        ends = is_delimiter(token) and any(mark in token for mark in ".!?\n")
        if ended and not ends:
            number += 1
        ended = ends
        numbers.append(number)
    return numbers


class RoleRecorder:
    """Takes the scores of each layer while the model runs as it is.

    Attributes:
        scores: per layer, those of `ROLE_METRICS`, raw before sink-excluded.
        uniform: the same of one head that looks at all keys that it sees alike.
        uniform_layers: per layer, what a trace of that head holds.
    """

    def __init__(
        self, segments: Sequence[int], output: Tensor | None, why: str, seed: int | None
    ) -> None:
        self.scores: list[list[Score]] = []
        self.uniform: list[list[Score]] = []
        self.uniform_layers: list[dict[str, np.ndarray]] = []
        self.residual: list[Tensor] = []
        self._segments = torch.tensor(segments)
        self._output, self._why = output, why
        self._seed = seed

    def on_layer(self, call: LayerCall) -> Tensor:
        """See `lens.passes.sessions.listening`."""
        layer = call.layer
        z = attend(call, statistics=()).output.to(call.value.dtype)
        value = of_heads(call, call.value)[0].double()  # [heads, keys, dim]
        weights = None if self._output is None else self._output[layer].to(value)
        written = None if weights is None else _norms(value, weights)
        probe = _probe(call, written, self._segments)
        rows = _Rows(probe, call, self._seed)
        scores = [*rows.scores()]
        if written is None or weights is None:
            nothing = np.full(len(value), np.nan)
            scores += [whole_score(name, "raw", nothing, self._why, 0) for name in _OF_OUTPUT]
        else:
            size = _norms(z[0].to(weights), weights)
            scores += rows.output_scores(size, self.residual[layer], written)
        scores.append(_drain("drain_value", value.norm(dim=-1)))
        self.scores.append(scores)
        self.uniform.append(self._uniform(call))
        return z

    def _uniform(self, call: LayerCall) -> list[Score]:
        zero = torch.zeros_like(call.query[:1, :1])
        flat = replace(
            call, query=zero, key=torch.zeros_like(call.key[:1, :1]), value=zero, sink_logits=None,
            position_bias=None,
        )  # fmt: skip
        rows = _Rows(_probe(flat, None, self._segments), flat, None)
        _, record = measure(flat, _PROFILE)
        found = {name: tensor[0].numpy() for name, tensor in record.variables.items()}
        self.uniform_layers.append(found)
        nothing = np.full(1, np.nan)
        return [*rows.scores()] + [
            whole_score(name, "raw", nothing, _NO_UNIFORM, 0)
            for name in (*_OF_OUTPUT, "drain_value")
        ]


def role_scores(
    model: LoadedModel, prompt: Any, tokens: Sequence[str], seed: int | None
) -> RoleRecorder:
    """The scores of one prompt, as `read_prompts` gives it; no intervals over rows for the seed None."""
    blocks, why = (), ""
    try:
        layout = proved(model)
        model, blocks = layout.model, () if layout.bends else layout.blocks
        why = f"{layout.kind} norms what its heads write before it reaches the stream"
    except LensError as error:
        why = str(error)
    output = torch.stack([block.output for block in blocks]) if blocks else None
    recorder = RoleRecorder(sentences(tokens), output, why, seed)
    with ExitStack() as stack, torch.no_grad(), listening(model, recorder.on_layer):
        for norm in (block.norm.module for block in blocks):
            assert norm is not None
            hook = norm.register_forward_pre_hook(
                lambda _, args: recorder.residual.append(args[0][0].double().norm(dim=-1))
            )
            stack.callback(hook.remove)
        base(model)(**prompt.inputs)
    return recorder


class _Rows:
    """Row by row numbers of one layer, float64 on the CPU."""

    def __init__(self, probe: AttentionResult, call: LayerCall, seed: int | None) -> None:
        statistics, groups = probe.statistics, probe.groups
        assert groups is not None
        lse = statistics.lse[0].double()
        rest = groups.lse[1][0].double() if len(groups.lse) > 1 else torch.full_like(lse, -np.inf)
        of_rest = groups.statistics["entropy"][-1][0]
        self._first = (groups.lse[0][0].double() - lse).exp().cpu().numpy()  # [heads, queries]
        self._rest = (rest - lse).exp().cpu().numpy()
        self._largest = (statistics.max_logit[0].double() - lse).exp().cpu().numpy()
        self._entropy = statistics.entropy[0].double().cpu().numpy()
        self._rest_entropy = of_rest.double().masked_fill(rest == -np.inf, np.nan).cpu().numpy()
        self._segment = statistics.match_mass[0].double().cpu().numpy()  # with key 0, without
        self._weighted = probe.output[0, ..., 0].double().cpu().numpy()
        self._seen = _keys_seen(call).cpu().numpy()  # [queries]
        self._with_first = _first_seen(call).cpu().numpy()  # [queries]
        viewers = call.mask.visible(1, call.query.shape[2], call.key.shape[2])
        self._sees_first = int(viewers[0, 0])
        self._later = np.arange(lse.shape[-1]) >= 1
        self._seed = seed

    def scores(self) -> Iterator[Score]:
        """Those that follow from the probabilities."""
        enough = self._rest > _SMALLEST_REST
        rest = np.where(enough, self._rest, 1)
        yield self._mean("segment", "raw", self._later, self._segment[..., 0], _SHORT)
        without = self._segment[..., 1] / rest
        yield self._mean("segment", "sink_excluded", self._later & enough, without, _NO_REST)
        yield self._mean("confidence", "raw", self._later, self._largest, _SHORT)
        for variant, entropy, count in (
            ("raw", self._entropy, self._seen),
            ("sink_excluded", self._rest_entropy, self._seen - self._with_first),
        ):
            rows = (count >= 2) & ~np.isnan(entropy)
            value = entropy / np.log(np.maximum(count, 2))
            yield self._mean("normalized_entropy", variant, rows, value, _SHORT)
        total = self._first.sum(-1, keepdims=True)
        share = self._first / np.where(total > 0, total, 1)
        spread = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
        value = np.where(total[:, 0] > 0, spread, np.nan) / np.log(max(self._sees_first, 2))
        yield whole_score("first_column_entropy", "raw", value, _NO_REST, self._sees_first)
        yield self._mean("activity", "raw", self._later, 1 - self._first, _SHORT)

    def output_scores(self, size: Tensor, residual: Tensor, written: Tensor) -> Iterator[Score]:
        """Those of what the head adds: `size` [heads, queries] of o W_O, `written` [heads, keys] of v W_O."""
        rows = size.cpu().numpy()
        everywhere = np.ones(rows.shape[-1], bool)
        yield self._mean("output_norm", "raw", everywhere, rows, _SHORT)
        ratio = rows / residual.mean().item()
        yield self._mean("noop", "raw", everywhere, ratio, _SHORT)
        yield _drain("drain", written)
        first = self._first * written[:, :1].cpu().numpy()
        known = self._later & (self._weighted > 0)
        share = first / np.where(self._weighted > 0, self._weighted, 1)
        yield self._mean("first_contribution", "raw", known, share, _SHORT)

    def _mean(
        self, metric: str, variant: str, rows: np.ndarray, values: np.ndarray, reason: str
    ) -> Score:
        return row_score(metric, variant, np.where(rows, values, np.nan), reason, self._seed)


def _drain(name: str, norms: Tensor) -> Score:
    """Norm [heads, keys] of the first key over the mean of the others."""
    others = norms[:, 1:].mean(-1)  # NaN for a prompt of one token
    return whole_score(name, "raw", (norms[:, 0] / others).cpu().numpy(), _SHORT, norms.shape[-1])


def _norms(vectors: Tensor, weights: Tensor) -> Tensor:
    """[heads, positions]: |x W| of vectors [heads, positions, dim] and W [heads, dim, d_model]."""
    gram = weights @ weights.transpose(-1, -2)
    return ((vectors @ gram) * vectors).sum(-1).clamp(min=0).sqrt()


def _probe(call: LayerCall, written: Tensor | None, segments: Tensor) -> AttentionResult:
    """Attention of the call with a size for each key as its value, and the first key apart."""
    heads, keys = call.query.shape[1], call.key.shape[2]
    key = of_heads(call, call.key)
    sizes = torch.ones(heads, keys, dtype=key.dtype) if written is None else written
    first = call.mask.first_key(1).to(key.device)
    is_first = torch.arange(keys, device=key.device) == first[:, None]
    labels = segments.to(key.device)
    return attend(
        replace(call, key=key, value=sizes.to(key)[None, ..., None]),
        statistics=("lse", "max_logit", "entropy", "match_mass"),
        match=[(labels, labels), (labels, labels.where(~is_first[0], -1))],
        groups=(~is_first).int(),
    )


def _keys_seen(call: LayerCall) -> Tensor:
    """[queries]: how many keys each query of a prompt without padding sees."""
    keys = call.key.shape[2]
    if call.mask.allowed is not None:
        return call.mask.allowed[0, 0].sum(-1)
    position = torch.arange(keys)
    reach = keys if call.mask.window is None else call.mask.window
    before = position.clamp(max=reach - 1)
    after = (0 * position) if call.mask.causal else (keys - 1 - position).clamp(max=reach - 1)
    return before + after + 1


def _first_seen(call: LayerCall) -> Tensor:
    """bool [queries]: which queries of a prompt without padding see its first key."""
    if call.mask.allowed is not None:
        return call.mask.allowed[0, 0, :, 0]
    reach = call.key.shape[2] if call.mask.window is None else call.mask.window
    return torch.arange(call.key.shape[2]) < reach
