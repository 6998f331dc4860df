"""Top activating examples of heads: the prompts of a corpus, and the pairs of tokens, on which each head attends most.

Prompts come one at a time, are run once and are let go of; what is kept is the best of them. By three measures:

    attention      A_ij, over rows that see at least two keys
    sink_excluded  A_ij / (1 - A_i0) without the first key 0, over rows that see two others
    written        A_ij |v_j W_O|, the size of what the pair adds to the residual stream (Kobayashi et al. 2020)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens.common.choices import Count, Seed, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import HeadId
from lens.common.progress import advancing
from lens.models.layout import layout
from lens.models.loaded import LoadedModel
from lens.models.random_weights import random_weights
from lens.passes.calls import LayerCall, attend, of_heads
from lens.passes.inputs import Prompt, read_prompts
from lens.passes.sessions import listening, run
from lens.reading._rows import row_at
from lens.reading.top_examples import BY, Example, TopExamples

_NUMBERS = 1 << 22  # of attention in memory at a time
_MOST_TYPICAL = 1000  # prompts of which the strongest pair is remembered, drawn by the seed where there are more


def examples(
    model: LoadedModel,
    prompts: Iterable[Any],
    *,
    n: Count = 10,
    context: Count = 24,
    chance: bool = True,
    seed: Seed = 0,
    progress: bool = True,
) -> TopExamples:
    """The prompts on which each head attends most, and where, by three measures.

    Args:
        model: as `lens.load` returns it.
        prompts: texts or token ids, a list or anything that gives one after the other; one is in memory at a time.
        n: examples of each head and measure, one a prompt.
        context: tokens around the pair that are kept with their weights: half up to the query, half round the key.
        chance: run the same through random weights too, which takes as long again.
        seed: of the random weights, and of the prompts that the intervals are over where there are more than 1,000.
        progress: show a bar.

    Raises:
        LensError: no prompt, or none that has two tokens; an encoder-decoder.

    Example:
        >>> found = examples(small, [[5, 6, 5, 6, 5], [7, 8, 8, 7]], n=1, progress=False)
        >>> found.of(found.heads[0])[0].prompt in (0, 1)
        True
    """
    if isinstance(prompts, str):
        raise LensError("prompts is one text; give a list of them: [text]")
    check_lists(prompts=prompts)
    outputs, refused = _outputs(model)
    search = _Search(model, outputs, n, context, seed)
    drawn = random_weights(model, seed) if chance else None
    beside = None if drawn is None else _Search(drawn, _outputs(drawn)[0], 0, context, seed)
    total = len(prompts) if hasattr(prompts, "__len__") else 0  # pyright: ignore[reportArgumentType]
    with advancing(f"{model.name}: prompts", total, progress) as advance:
        for number, given in enumerate(prompts):
            (prompt, *more), _ = read_prompts(model, given)
            if more:
                raise LensError(
                    "each of prompts must be one prompt, a text or token ids; got several"
                )
            search.take(prompt, number)
            if beside is not None:
                beside.take(prompt, number)
            advance(1)
    if not search.count:
        raise LensError("no prompt was given, or none has two tokens")
    return TopExamples(
        found=search.found,
        typical=search.typical(),
        random={} if beside is None else beside.typical(),
        layers=tuple(model.info.attending),
        prompts=search.count,
        refused=refused,
        seed=seed,
        model=model.name,
    )


def _outputs(model: LoadedModel) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Layer -> `W_O W_O^T` of each head; or why the third measure cannot be had."""
    try:
        found = [block.output.float() for block in layout(model).blocks]
    except LensError as problem:
        return {}, {"written": f"What pairs write cannot be had: {problem}"}
    return {layer: one @ one.transpose(-1, -2) for layer, one in enumerate(found)}, {}


class _Search:
    """The best prompts so far."""

    def __init__(
        self, model: LoadedModel, outputs: dict[int, Tensor], n: int, context: int, seed: int
    ) -> None:
        self._model, self._outputs, self._n, self._context = model, outputs, n, context
        self.by = BY if outputs else BY[:2]
        self.found: dict[str, dict[HeadId, tuple[Example, ...]]] = {
            by: dict.fromkeys(model.info.every_head, ()) for by in self.by
        }
        self._typical: list[np.ndarray] = []  # [measures, layers, heads] of each prompt
        self._random = np.random.default_rng(seed)
        self.count = 0

    def take(self, prompt: Prompt, number: int) -> None:
        """Run one prompt, the given one of this number; one of a single token has no pair and does not count."""
        if prompt.ids is None:
            raise LensError("examples are of tokens, and this prompt has no token ids")
        if len(prompt.ids) < 2:
            return
        tokens = self._model.token_strings(prompt.ids)
        best: dict[int, np.ndarray] = {}

        def on_layer(call: LayerCall) -> Tensor:
            if not call.part:
                best[call.layer] = self._of_layer(call, tokens, number)
            return attend(call, statistics=()).output

        with torch.no_grad(), listening(self._model, on_layer, parts=True):
            run(self._model, prompt.inputs)
        self._remember(np.stack([best[layer] for layer in sorted(best)], 1))
        self.count += 1

    def typical(self) -> dict[str, np.ndarray]:
        """Measure -> [layer, head, prompt]; NaN where no row of a prompt has a choice."""
        whole = np.stack(self._typical, -1)
        return dict(zip(self.by, whole, strict=True))

    def _remember(self, values: np.ndarray) -> None:
        """Each prompt is as likely as another to be among those that are kept."""
        if len(self._typical) < _MOST_TYPICAL:
            self._typical.append(values)
        elif (place := int(self._random.integers(self.count + 1))) < _MOST_TYPICAL:
            self._typical[place] = values

    def _of_layer(self, call: LayerCall, tokens: list[str], prompt: int) -> np.ndarray:
        """[measures, heads]: the strongest pair of one layer by each measure; those among the best are kept."""
        heads, queries, keys = call.query.shape[1], call.query.shape[2], call.key.shape[2]
        written = self._written(call)
        best = torch.full((len(self.by), heads), -torch.inf)
        place = torch.zeros(len(self.by), heads, dtype=torch.long)
        step = max(1, _NUMBERS // (heads * keys))
        for first in range(0, queries, step):
            rows = torch.arange(first, min(queries, first + step), device=call.query.device)
            for number, weights in enumerate(self._weights(call, rows, written)):
                found, at = weights.flatten(1).max(-1)
                better = found.cpu() > best[number]
                best[number][better] = found.cpu()[better]
                place[number][better] = (first * keys + at.cpu())[better]
        for by, values, at in zip(self.by, best, place, strict=True):
            self._keep(call, by, prompt, values, at, tokens, written)
        return best.where(best > -torch.inf, torch.nan).numpy()

    def _written(self, call: LayerCall) -> Tensor | None:
        """[heads, 1, keys]: size of what each key's value writes."""
        if call.layer not in self._outputs:
            return None
        gram = self._outputs[call.layer].to(call.value.device)
        value = of_heads(call, call.value)[0].float()
        return ((value @ gram) * value).sum(-1).clamp(min=0).sqrt()[:, None]

    def _weights(self, call: LayerCall, rows: Tensor, written: Tensor | None) -> list[Tensor]:
        """[heads, rows, keys] by each measure; -inf in rows that have no choice."""
        attention = row_at(call, rows).nan_to_num(0.0)
        seen = call.mask.seen_by(rows, attention.shape[-1])
        rest = attention.clone()
        rest[..., 0] = 0
        rest = rest / rest.sum(-1, keepdim=True).clamp(min=1e-30)
        alone, lonely = seen.sum(-1) < 2, seen[:, 1:].sum(-1) < 2
        found = [
            attention.masked_fill(alone[:, None], -torch.inf),
            rest.masked_fill(lonely[:, None], -torch.inf),
        ]
        if written is not None:
            found.append((attention * written).masked_fill(alone[:, None], -torch.inf))
        return found

    def _keep(
        self,
        call: LayerCall,
        by: str,
        prompt: int,
        values: Tensor,
        place: Tensor,
        tokens: list[str],
        written: Tensor | None,
    ) -> None:
        keys = call.key.shape[2]
        for head, value in enumerate(values.tolist()):
            mine = self.found[by].get(HeadId(call.layer, head), ())
            if not np.isfinite(value) or not self._n:
                continue
            if len(mine) == self._n and mine[-1].value >= value:
                continue
            query, key = divmod(int(place[head]), keys)
            row = torch.tensor([query], device=call.query.device)
            weights = self._weights(call, row, written)[self.by.index(by)][head, 0]
            seen = call.mask.seen_by(row, keys)[0]
            size = (
                torch.ones(keys) if by != "written" or written is None else written[head, 0].cpu()
            )
            counted = seen.cpu().clone()
            counted[0] &= by != "sink_excluded"
            places = self._places(query, key, keys)
            one = Example(
                value=value,
                uniform=float(size[counted].mean() / (1 if by == "written" else counted.sum())),
                prompt=prompt,
                query=query,
                key=key,
                places=tuple(places),
                tokens=tuple(tokens[at] for at in places),
                weights=tuple(float(weights[at]) if seen[at] else float("nan") for at in places),
            )
            ordered = sorted((*mine, one), key=lambda each: -each.value)
            self.found[by][HeadId(call.layer, head)] = tuple(ordered[: self._n])

    def _places(self, query: int, key: int, length: int) -> list[int]:
        half, quarter = max(1, self._context // 2), self._context // 4
        near = {*range(query - half + 1, query + 1), *range(key - quarter, key + quarter + 1)}
        return sorted(at for at in near | {query, key} if 0 <= at < length)
