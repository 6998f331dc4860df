"""How a sink works: small keys that point where all queries look, and values that say little."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import normalize

from lens import stats
from lens.common.choices import Seed
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, if_known
from lens.edits.losses import bos_policy
from lens.heads.weights import head_weights
from lens.models.loaded import LoadedModel
from lens.passes.calls import LayerCall, attend, evened, of_heads
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.keys import Keys, KeysAt, check_fixed_keys, members
from lens.passes.sessions import base, listening
from lens.sinks.detection.alphas import alpha_of, uniform_alpha
from lens.stats.intervals import columns
from lens.stats.verdicts import mean_told
from lens.traces.scores import SINK_EPSILON

_COLUMNS = (
    "alpha", "key_norm", "value_norm", "cosine", "cosine_others", "drain", "contribution", "alpha_baseline",
    "contribution_baseline",
)  # fmt: skip


@dataclass(frozen=True, repr=False, eq=False)
class SinkMechanism(Result):
    """Geometry of the sources' keys and values in every head.

    Attributes:
        values: [columns, heads, prompts], the columns of `rows`. `alpha`: mean over the sources. `key_norm`: mean norm of
            their keys over the median norm of the other keys; `value_norm` likewise (raw values, before
            the output projection). `cosine`: mean cosine between a source's key and the queries
            after it; `cosine_others` the same for all other keys. `drain`: mean `|W_O v|` of the
            sources over that of the other keys. `contribution`: `c = sum_S |A W_O v| / sum |A W_O v|`,
            mean over the rows behind the last source. Both are NaN where the architecture's output
            weights are not known. `alpha_baseline`, `contribution_baseline`: with even attention.
        heads: layer by layer.
        bos: "added", "absent" or "mixed".
        seed: of the bootstrap.
    """

    values: np.ndarray = field(repr=False)
    heads: tuple[HeadId, ...] = field(repr=False)
    bos: str
    seed: int

    @property
    def rows(self) -> pd.DataFrame:
        """One row per layer and head: means over prompts, those of the model with `_low`, `_high` (95 % over prompts)."""
        found = head_columns(self.heads)
        for name, values in zip(_COLUMNS, self.values, strict=True):
            more = columns(name, values, self.seed)
            found |= {name: more[name]} if name.endswith("_baseline") else more
        return pd.DataFrame(found)

    def table(self) -> pd.DataFrame:
        """The rows, with BOS policy and number of prompts."""
        return self.rows.assign(bos=self.bos, n=self.values.shape[-1])

    def findings(self) -> tuple[Sentence, ...]:
        """Medians over the heads that park on the sources, means over prompts: keys, directions, values, outputs."""
        every: dict[str, np.ndarray] = dict(zip(_COLUMNS, self.values, strict=True))
        parked = every["alpha"].mean(-1) > SINK_EPSILON
        even = f"{if_known(every['alpha_baseline'].mean(), '.2g')} with even attention"
        settings = f"{self.values.shape[-1]} prompts, BOS {self.bos}"
        if not parked.any():
            text = (
                f"No head gives the sources a mean α above {SINK_EPSILON} ({even}), so there is no mechanism "
                f"to explain ({settings})."
            )
            return (Sentence(text, kind="heads"),)

        def told(name: str, form: str = ".2f") -> str:
            return mean_told(np.median(every[name][parked], 0), self.seed, form)

        of = f"median of {parked.sum()} heads"
        found = {
            "heads": f"{parked.sum()} of {len(parked)} heads park on the sources (mean α above {SINK_EPSILON}, {even}; "
            f"{settings}).",
            "keys": f"The sources' keys are {told('key_norm')} times as long as the others ({of}).",
            "directions": f"Their cosine with the queries is {told('cosine')}, that of other keys "
            f"{told('cosine_others')} ({of}).",
            "values": f"Their values are {told('value_norm')} times as long as the others ({of}).",
        }
        if not np.isnan(every["drain"][parked]).any():
            found["outputs"] = (
                f"They write {told('drain')} times as much as another token with equal attention, and "
                f"{told('contribution', '.0%')} of the head's output, with even attention "
                f"{told('contribution_baseline', '.0%')} ({of})."
            )
        found["limit"] = "This describes the heads as they are; it proves no cause."
        return tuple(Sentence(text, kind=kind) for kind, text in found.items())


def mechanism(
    model: LoadedModel,
    prompts: Any,
    *,
    sources: Keys = "first",
    seed: Seed = 0,
    progress: bool = True,
) -> SinkMechanism:
    """Measure why heads look at `sources`: norm, direction or position, and what they get for it.

    A logit is `|q| |k| cos(q, k)` (times the scale): sinks are found to have small keys and large
    cosines, and small values (Gu et al., arXiv 2410.10781). Keys and queries are taken as they meet,
    after rotary position embedding.

    Args:
        model: as `lens.load` returns it; causal.
        prompts: as for `lens.capture`, token prompts.
        sources: "first", positions or a bool mask.
        seed: of the bootstrap.
        progress: show a bar.

    Raises:
        LensError: a source that is missing, the last token, or too near the end for an alpha; a model
            that looks ahead.

    Example:
        >>> lens.sinks.mechanism(model, texts).table().sort_values("alpha").tail()
    """
    check_fixed_keys("sources", sources, "mechanism")
    try:
        output = head_weights(model).output
    except LensError:  # an architecture whose weights are not known: its columns say so by NaN
        output = None
    asked = read_prompts(model, prompts)[0]
    if any(prompt.ids is None for prompt in asked):
        raise LensError("mechanism needs prompts of tokens")
    found = []
    with advancing("mechanism", len(asked), progress) as advance:
        for prompt in asked:
            found.append(_columns(model, prompt, sources, output))
            advance(1)
    bos = bos_policy(model, [prompt.ids or [] for prompt in asked])
    values = torch.stack(found, -1).flatten(1, 2).numpy()
    return SinkMechanism(values, tuple(model.info.every_head), bos, seed)


def _columns(
    model: LoadedModel, prompt: Prompt, sources: Keys, output: torch.Tensor | None
) -> torch.Tensor:
    """[columns, layers, heads] of one prompt."""
    from lens.traces.captures import capture

    assert prompt.ids is not None
    places = torch.arange(len(prompt.ids))
    source = members("sources", sources, KeysAt(0, 0, places[None], None))[0]
    trace = capture(model, prompt.ids, statistics=["received"], progress=False)
    assert not isinstance(trace, list)
    alpha = torch.from_numpy(alpha_of(trace))[..., source].mean(-1)
    if not bool(source.any()) or bool(source[-1]) or bool(alpha.isnan().any()):
        raise LensError(
            f"sources must be in the prompt of {len(places)} tokens and seen by 16 queries "
            f"(the first key by one more); got positions {source.nonzero()[:, 0].tolist()}"
        )
    geometry = _Geometry(source, output)
    with torch.no_grad(), listening(model, geometry.on_layer):
        base(model)(**prompt.inputs)
    *measured, contribution = torch.stack(geometry.layers, 1)
    even = torch.from_numpy(uniform_alpha(trace)[:, source]).mean(-1)[:, None].expand_as(alpha)
    return torch.stack([alpha, *measured, even, contribution])


class _Geometry:
    """Takes norms and cosines while the model runs as it is; `layers` are [7, heads] each."""

    def __init__(self, source: torch.Tensor, output: torch.Tensor | None) -> None:
        self.layers: list[torch.Tensor] = []
        self._source = source
        self._output = output  # [layers, heads, head_dim, d_model]

    def on_layer(self, call: LayerCall) -> torch.Tensor:
        """See `lens.passes.sessions.listening`.

        Raises:
            LensError: the layer looks ahead.
        """
        if not call.mask.causal:
            raise LensError(
                f"layer {call.layer} sees later tokens; mechanism is defined for causal models"
            )
        key, value = (of_heads(call, one)[0].double() for one in (call.key, call.value))
        source = self._source.to(key.device)
        norms = [tensor.norm(dim=-1) for tensor in (key, value)]
        medians = [stats.quantile(norm[:, ~source].cpu(), 0.5) for norm in norms]
        ratios = [
            norm[:, source].mean(-1) / torch.as_tensor(median, device=norm.device)
            for norm, median in zip(norms, medians, strict=True)
        ]
        cosines = _cosines(call.query[0].double(), key)
        self.layers.append(
            torch.stack(
                [
                    *ratios,
                    cosines[:, source].mean(-1),
                    cosines[:, ~source].nanmean(-1),
                    *self._drained(call, value, source),
                ]
            ).cpu()
        )
        return attend(call, statistics=()).output

    def _drained(
        self, call: LayerCall, value: torch.Tensor, source: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """[heads] each: drain and contribution of the sources, and this with even attention; `value` is [heads, keys,
        head_dim]."""
        if self._output is None:
            return (value.new_full((len(value),), torch.nan),) * 3
        norm = (value @ self._output[call.layer].to(value)).norm(dim=-1)  # [heads, keys]
        both = torch.stack([norm * source, norm], -1)[None].to(call.value.dtype)
        key = of_heads(call, call.key)
        after = slice(int(source.nonzero()[-1]) + 1, None)
        contributions = []
        for one in (call, evened(call)):
            weighed = attend(replace(one, key=key, value=both)).output[0].double()
            contributions.append((weighed[:, after, 0] / weighed[:, after, 1]).mean(-1))
        return norm[:, source].mean(-1) / norm[:, ~source].mean(-1), *contributions


def _cosines(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[heads, keys]: mean cosine between each key and the queries after it; NaN for the last key."""
    summed = normalize(query, dim=-1).flip(1).cumsum(1).flip(1)  # of this query and all later ones
    after = torch.nn.functional.pad(summed[:, 1:], (0, 0, 0, 1))
    count = torch.arange(key.shape[1] - 1, -1, -1, device=key.device)
    return (after * normalize(key, dim=-1)).sum(-1) / count.where(count > 0, torch.nan)
