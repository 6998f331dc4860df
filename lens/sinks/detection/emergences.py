"""Where and when a sink emerges: over layers, over prompt length, and not at all on control prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from lens.common.errors import LensError
from lens.common.results import Result, Sentence, described
from lens.edits.losses import two_tokens
from lens.models.loaded import LoadedModel
from lens.passes.inputs import read_prompts
from lens.sinks.detection.alphas import Samples, alpha_at, as_list, samples_of
from lens.sinks.detection.rates import rate
from lens.stats import over_units
from lens.traces.scores import SINK_EPSILON


@dataclass(frozen=True, eq=False)
class SinkEmergence(Result):
    """Sink rate of one key by condition and layer.

    Attributes:
        rows: one per condition and layer, and one per condition with layer NaN for all layers: `rate`
            with `low` and `high` (95 % over prompts), `alpha` (mean), and what it depends on: `tokens`,
            `bos`, `dtype`, `n`.
        key, epsilon: as in `lens.sinks.rate`.
    """

    rows: pd.DataFrame = field(repr=False)
    key: int
    epsilon: float

    def table(self) -> pd.DataFrame:
        """The rows with key and epsilon."""
        return self.rows.assign(key=self.key, epsilon=self.epsilon)

    def first_layer(self, condition: str, threshold: float = 0.0) -> int | None:
        """The first layer whose rate exceeds `threshold`, or None."""
        rows = self.rows[(self.rows["condition"] == condition) & self.rows["layer"].notna()]
        found = rows.loc[rows["rate"] > threshold, "layer"]
        return None if found.empty else int(found.min())

    def __repr__(self) -> str:
        return described(self)

    def findings(self) -> tuple[Sentence, ...]:
        """The rate of each condition, its first layer, and what it depends on."""
        found = []
        for row in self.rows[self.rows["layer"].isna()].to_dict("records"):
            first = self.first_layer(row["condition"])
            where = "in no layer" if first is None else f"from layer {first} on"
            text = (
                f'Prompts "{row["condition"]}": key {self.key} is a sink (alpha > {self.epsilon:g}) in '
                f"{row['rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}] of layers × heads, {where} "
                f"(T = {row['tokens']}, BOS {row['bos']}, n = {row['n']})."
            )
            found.append(Sentence(text, kind="rate"))
        limit = "The rate is a share of heads, no mass, and does not compare between lengths or epsilons."
        return (*found, Sentence(limit, kind="limit"))


def bos_pair(model: LoadedModel, prompts: Any) -> dict[str, list[list[int]]]:
    """The same tokens with the model's BOS in front and without it, of one length each.

    The two differ in what is the first key; the sink depends on the first token, whatever it is. The
    last token is left out where the BOS comes in.

    Args:
        model: one with a BOS token.
        prompts: as for `lens.capture`, token prompts, with BOS or without.

    Raises:
        LensError: a model without BOS, prompts of fewer than three tokens.

    Example:
        >>> lens.sinks.emergence(model, lens.sinks.bos_pair(model, texts)).findings()
    """
    if model.bos_id is None:
        raise LensError(f"{model.name} has no BOS token, so there is no pair to compare")
    bodies = []
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        bodies.append(ids[1:] if ids[0] == model.bos_id else ids)
        if len(bodies[-1]) < 2:
            raise LensError("bos_pair needs prompts of at least two tokens behind the BOS")
    return {
        "with BOS": [[model.bos_id, *body[:-1]] for body in bodies],
        "without BOS": bodies,
    }


def emergence(
    model: LoadedModel,
    conditions: Mapping[str, Any],
    *,
    key: int = 0,
    epsilon: float = SINK_EPSILON,
    seed: int = 0,
) -> SinkEmergence:
    """The sink rate by layer on each kind of prompt, such as text, random tokens, repeated tokens.

    Args:
        model: a causal model, as `lens.load` returns it.
        conditions: name -> prompts of one length, as for `lens.capture`; `by_length` and
            `control_prompts` make some.
        key, epsilon, seed: as for `lens.sinks.rate`.

    Raises:
        LensError: no condition, and as `lens.sinks.rate`.

    Example:
        >>> prompts = {"text": texts} | lens.sinks.control_prompts(model, texts)
        >>> lens.sinks.emergence(model, prompts).findings()
    """
    from lens.traces.captures import capture

    if not conditions:
        raise LensError("emergence needs at least one kind of prompts: {'text': prompts}")
    rows: list[dict[str, Any]] = []
    for condition, prompts in conditions.items():
        traces = as_list(capture(model, prompts, statistics=["received"], progress=False))
        samples = samples_of(traces)
        whole = rate(traces, key=key, epsilon=epsilon, seed=seed)
        alpha = alpha_at(traces, key)
        rows.append(
            _row(condition, np.nan, whole.value, whole.low, whole.high, alpha.mean(), samples)
        )
        by_layer = (alpha > epsilon).mean(2)  # [prompts, layers]
        low, high = over_units(by_layer, np.ones_like(by_layer), seed)
        for place, layer in enumerate(whole.layers):
            values = (by_layer[:, place].mean(), low[place], high[place], alpha[:, place].mean())
            rows.append(_row(condition, layer, *values, samples))
    return SinkEmergence(pd.DataFrame(rows), key, epsilon)


def by_length(
    model: LoadedModel, prompts: Any, lengths: Sequence[int]
) -> dict[str, list[list[int]]]:
    """The prompts cut to each length: name -> prompts, for `emergence`.

    Raises:
        LensError: no length, or a prompt shorter than the longest.

    Example:
        >>> lens.sinks.emergence(model, lens.sinks.by_length(model, texts, (8, 16, 24)))
    """
    read = [two_tokens(prompt.ids) for prompt in read_prompts(model, prompts)[0]]
    shortest = min(len(ids) for ids in read)
    if not len(lengths) or not 2 <= min(lengths) <= max(lengths) <= shortest:
        raise LensError(f"lengths must be 2 to {shortest} (the shortest prompt), got {lengths}")
    return {f"T = {length}": [ids[:length] for ids in read] for length in sorted(set(lengths))}


def control_prompts(model: LoadedModel, prompts: Any, seed: int = 0) -> dict[str, list[list[int]]]:
    """Negative controls of the same number and lengths: "random" and "repeated" tokens.

    "random" keeps a prompt's BOS token, if it begins with it, and draws all others uniformly, special
    tokens excepted. "repeated" is one token of the prompt, again and again, without BOS: in a model
    with rotary positions, ALiBi or none all its states are equal, and no key can be a sink (Gu et al.,
    arXiv 2410.10781).

    Raises:
        LensError: prompts of one token, or a model without a vocabulary.
    """
    if model.info.vocab is None:
        raise LensError(f"{model.name} has no vocabulary, so no tokens can be drawn")
    special = set(getattr(model.tokenizer, "all_special_ids", ()))
    ordinary = torch.tensor([index for index in range(model.info.vocab) if index not in special])
    generator = torch.Generator().manual_seed(seed)
    random, repeated = [], []
    for prompt in read_prompts(model, prompts)[0]:
        ids = two_tokens(prompt.ids)
        kept = ids[:1] if model.bos_id is not None and ids[0] == model.bos_id else []
        drawn = torch.randint(len(ordinary), (len(ids) - len(kept),), generator=generator)
        random.append(kept + ordinary[drawn].tolist())
        repeated.append([ids[len(ids) // 2]] * len(ids))
    return {"random": random, "repeated": repeated}


def _row(
    condition: str,
    layer: float,
    value: float,
    low: float,
    high: float,
    alpha: float,
    samples: Samples,
) -> dict[str, Any]:
    return {
        "condition": condition,
        "layer": layer,
        "rate": value,
        "low": low,
        "high": high,
        "alpha": alpha,
        "tokens": samples.tokens,
        "bos": samples.bos,
        "dtype": samples.dtype,
        "n": samples.n,
    }
