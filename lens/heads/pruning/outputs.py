"""What the outputs of a classifier lose when one head is pruned, by six metrics (images, texts, next tokens).

With p the distribution of the whole model, q that without the head, y the label and e the vector that
the classifier reads ([CLS] of a vision transformer):

    accuracy      [argmax p = y] - [argmax q = y]
    probability   p_y - q_y
    loss          log p_y - log q_y, nats
    js            Jensen-Shannon divergence of p and q, nats, at most log 2
    cosine        1 - cos(e, e')
    distance      |e - e'|

Positive = the head was needed (the first three) or does something (the others, which take no label).
Spec after Li et al., How Does Attention Work in Vision Transformers?, 2023, arXiv 2303.13731.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lens import stats
from lens.common.choices import check_choice, check_counts, words
from lens.common.errors import LensError
from lens.common.head_ids import HeadId, head_columns
from lens.common.progress import advancing
from lens.common.results import Result, Sentence, ends
from lens.heads.measures.baselines import task_means
from lens.heads.pruning.distances import jensen_shannon
from lens.models.loaded import LoadedModel
from lens.passes.head_outputs import Source, edited_outputs, mean_outputs
from lens.passes.logits import labels_of
from lens.stats.intervals import columns, of_share
from lens.stats.verdicts import of_many, of_many_told
from lens.tasks.task import Task

Metric = Literal["accuracy", "probability", "loss", "js", "cosine", "distance"]
Baseline = Literal["zero", "mean"]
METRICS = words(Metric)
_ROWS = 512  # examples, copies included, in one forward pass


@dataclass(frozen=True, repr=False, eq=False)
class PruningMetrics(Result):
    """What each head is worth to the outputs, by each metric.

    Attributes:
        per_example: metric -> [layer, head, example], float64; sign and units as in the module.
        labels: [example], class of each, or None where examples have several answers (a task), whose
            mean is taken.
        accuracy: of the whole model.
        baseline: "zero" or "mean", what was put in place of the head's output.
        model: its name.
    """

    per_example: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    accuracy: float
    baseline: str
    model: str

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.per_example["loss"].shape[-1]

    def values(self, metric: str) -> np.ndarray:
        """[layer, head] mean over the examples.

        Raises:
            LensError: an unknown metric.
        """
        return self._of(metric).mean(-1)

    def table(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head and metric: `name`, `layer`, `head`, `metric`, `value`, `low`, `high`
        (95 % bootstrap interval over examples) and `n`."""
        parts = []
        for metric, values in self.per_example.items():
            part = head_columns(list(np.ndindex(values.shape[:2]))) | {"metric": metric}
            parts.append(pd.DataFrame(part | columns("value", values, seed, plain=True)))
        return pd.concat(parts, ignore_index=True).assign(n=self.n)

    def by_class(self, metric: str) -> dict[int, np.ndarray]:
        """[layer, head] mean over the examples of each class.

        Raises:
            LensError: an unknown metric, or examples without one class each.
        """
        values = self._of(metric)
        if self.labels is None:
            raise LensError("these examples have several answers each, so there are no classes")
        return {
            int(label): values[..., self.labels == label].mean(-1)
            for label in np.unique(self.labels)
        }

    def classes(self, *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
        """One row per metric, class and head: `metric`, `class`, `layer`, `head`, `name`, `value` with `low` and `high`
        (95 % bootstrap interval over the examples of the class), `n` of them; `all`, the mean over all classes; and
        `chance_low`, `chance_high`, between which 95 % of means of as many examples of any class lie: outside of it the
        head is more, or less, to this class than to the others.

        Args:
            draws: of examples without regard to their class; seed: of these and of the intervals.

        Raises:
            LensError: examples without one class each.
        """
        check_counts(draws=draws)
        parts, random = [], np.random.default_rng(seed)
        orders = np.stack([random.permutation(self.n) for _ in range(draws)])
        for metric, values in self.per_example.items():
            heads = head_columns(list(np.ndindex(values.shape[:2])))
            flat = values.reshape(-1, self.n)
            for label in self.by_class(metric):
                own = flat[:, self.labels == label]
                low, high = stats.interval(flat[:, orders[:, : own.shape[1]]].mean(-1), axis=1)
                part = {"metric": metric, "class": label, **heads}
                part |= columns("value", own, seed, plain=True) | {"n": own.shape[1]}
                part |= {"all": flat.mean(-1), "chance_low": low, "chance_high": high}
                parts.append(pd.DataFrame(part))
        return pd.concat(parts, ignore_index=True)

    def agreement(self) -> pd.DataFrame:
        """Kendall's tau-b over the heads of each pair of metrics: `first`, `second`, `tau`."""
        names = list(self.per_example)
        tau = stats.kendall(np.stack([self.values(name).ravel() for name in names]))
        rows = [
            (names[a], names[b], float(tau[a, b])) for a, b in combinations(range(len(names)), 2)
        ]
        return pd.DataFrame(rows, columns=["first", "second", "tau"])

    def _of(self, metric: str) -> np.ndarray:
        return self.per_example[check_choice("metric", metric, METRICS)]

    def findings(self, *, seed: int = 0) -> tuple[Sentence, ...]:
        """How often the whole model is right ("accuracy"), without which head the right answer loses most ("most", "none"),
        and whether the metrics order heads alike ("agreement")."""
        said = []
        if self.labels is not None:
            counts = np.unique(self.labels, return_counts=True)[1]
            said.append(
                Sentence(
                    f"The whole model names {self.accuracy:.1%}{ends(*of_share(self.accuracy, self.n), '.1%')} of {self.n} "
                    f"examples rightly; always naming the most frequent of {len(counts)} classes would "
                    f"{counts.max() / self.n:.1%}.",
                    kind="accuracy",
                )
            )
        table = self.table(seed=seed)
        rows = table[(table["metric"] == "probability").to_numpy()]
        best, many = rows.iloc[int(rows["value"].to_numpy().argmax())], len(rows)
        apart = of_many(best["value"], best["low"], best["high"], many, self.n)[0] > 0
        none = "" if apart else f"No head is told apart from none as the worst of {many}. "
        said.append(
            Sentence(
                f"{none}The right answer loses most probability without {best['name']}: "
                f"{of_many_told(best, 'value', '.3g', many, self.n, plain=True, least=-1, most=1)}, without the median head "
                f"{rows['value'].median():.3g} (n = {self.n}).",
                kind="most" if apart else "none",
            )
        )
        return (*said, self._alike())

    def _alike(self) -> Sentence:
        """Whether the metrics order heads alike."""
        known = self.agreement().dropna(subset="tau")  # a metric that no head changes orders none
        if known.empty:
            text = "No two of the metrics tell heads apart, so that they order none alike."
            return Sentence(text, kind="agreement")
        least = known.iloc[int(known["tau"].to_numpy().argmin())]
        return Sentence(
            f"The metrics order the heads alike to a Kendall tau of {known['tau'].median():.2f} (median of {len(known)} pairs; "
            f"0 is chance), least {least['first']} and {least['second']}: {least['tau']:.2f}.",
            kind="agreement",
        )

    def __repr__(self) -> str:
        drop = self.values("probability")
        layer, number = np.unravel_index(drop.argmax(), drop.shape)
        return (
            f"PruningMetrics({self.baseline} on {self.n} examples, {self.model}: accuracy "
            f"{self.accuracy:.3g}; probability falls most by L{layer}H{number}, {drop.max():.3g})"
        )


def metrics(
    model: LoadedModel,
    inputs: Mapping[str, Tensor] | Task,
    labels: Any = None,
    *,
    baseline: Baseline = "zero",
    progress: bool = True,
) -> PruningMetrics:
    """Prune each head alone and compare the outputs with those of the whole model.

    Args:
        model: a classifier of images or texts, or, with a task, a language model.
        inputs: what the model takes, tensors [examples, ...] such as `pixel_values` or `input_ids`;
            or a task, whose answers are the labels of the next-token distributions.
        labels: [examples] classes; a task has its own.
        baseline: "zero", or "mean", the head's mean at each position over the examples whose own token it is.
        progress: show a bar with the time left, on stderr, if that is a terminal.

    Example:
        >>> found = lens.heads.pruning.metrics(small, lens.tasks.induction(small, n=4))
        >>> found.values("js").shape
        (2, 4)

    Raises:
        LensError: labels that do not fit, an unknown baseline, or a model whose outputs cannot be read.
    """
    model.info.check_all_attend("pruning.metrics")
    task = inputs if isinstance(inputs, Task) else None
    capacity = _ROWS if task is None else min(_ROWS, task.rows_at_once(model))
    inputs, positions, correct = _examples(model, inputs, labels)
    info, n = model.info, len(correct)
    heads = info.every_head
    means: dict[int, Tensor] = {}
    if baseline == "mean" and task is not None:
        means = task_means(model, task, keep_positions=True)
    elif baseline == "mean":
        chunks = torch.arange(n).split(capacity)
        some = ({name: tensor[rows] for name, tensor in inputs.items()} for rows in chunks)
        parts = (
            (one, own if (own := one.get("attention_mask")) is None else own != 0) for one in some
        )
        means = mean_outputs(model, parts, keep_positions=True)

    def instead(layer: int, z: Tensor) -> Tensor:
        return means[layer] if means else torch.zeros_like(z[:1])

    (whole,) = _outputs(model, inputs, positions, [heads], lambda _, z: z, capacity)
    found = {metric: np.empty((info.layers, info.heads, n)) for metric in METRICS}
    stack = max(1, capacity // n)
    with advancing(f"{model.name}: heads pruned", len(heads), progress) as advance:
        for start in range(0, len(heads), stack):
            some = heads[start : start + stack]
            groups = [[head] for head in some]
            pruned = _outputs(model, inputs, positions, groups, instead, capacity)
            for head, outputs in zip(some, pruned, strict=True):
                for metric, values in _compared(whole, outputs, correct).items():
                    found[metric][head] = values.mean(1).numpy()
            advance(len(some))
    right = (whole.log_probabilities.argmax(-1) == correct).double().mean()
    classes = correct[:, 0].numpy() if positions is None else None
    return PruningMetrics(found, classes, float(right), baseline, model.name)


class _Outputs(NamedTuple):
    """Of one model: [examples, answers, ...], float64."""

    log_probabilities: Tensor
    embeddings: Tensor


def _examples(
    model: LoadedModel, inputs: Mapping[str, Tensor] | Task, labels: Any
) -> tuple[Mapping[str, Tensor], Tensor | None, Tensor]:
    """What the model takes, positions of the answers or None, and labels [examples, answers]."""
    if isinstance(inputs, Task):
        if labels is not None:
            raise LensError("a task has its own answers; leave out the labels")
        inputs.check(model)
        name = "pixel_values" if inputs.clean.is_floating_point() else "input_ids"
        of_tokens = inputs.labels is None
        return {name: inputs.clean}, inputs.positions if of_tokens else None, inputs.correct
    lengths = {len(tensor) for tensor in inputs.values()}
    try:
        correct = torch.as_tensor([] if labels is None else labels)
    except (ValueError, TypeError) as error:
        raise LensError(f"labels must be one number for each example, got {labels!r}") from error
    if len(lengths) != 1 or correct.dim() != 1 or lengths != {len(correct)}:
        raise LensError(
            f"labels must be one class for each example; got {list(correct.shape)} for "
            f"{', '.join(map(str, sorted(lengths))) or 'no'} examples"
        )
    if not len(correct):
        raise LensError("no examples were given; pass at least one with its label")
    classes = labels_of(model)
    if classes is not None and not set(correct.tolist()) <= set(range(classes)):
        raise LensError(
            f"labels must be whole numbers of 0 to {classes - 1}, the classes of {model.info.class_name}; got "
            f"{sorted(set(correct.tolist()) - set(range(classes)))}"
        )
    correct = correct.long()
    return inputs, None, correct[:, None]


def _outputs(
    model: LoadedModel,
    inputs: Mapping[str, Tensor],
    positions: Tensor | None,
    groups: list[list[HeadId]],
    source: Source,
    capacity: int,
) -> list[_Outputs]:
    """What the model gives with each group replaced."""
    parts: list[tuple[Tensor, Tensor]] = []
    n = len(next(iter(inputs.values())))
    for rows in torch.arange(n).split(max(1, capacity // len(groups))):
        read: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Tensor, ...], to: list[Tensor] = read) -> None:
            to.append(given[0])

        some = {name: tensor[rows] for name, tensor in inputs.items()}
        with _classifier(model).register_forward_pre_hook(keep):
            result = edited_outputs(model, some, groups, [source] * len(groups))
        at = None if positions is None else positions[rows]
        shape = (len(groups), len(rows))
        parts.append((_read(result.logits, shape, at), _read(read[0], shape, at)))
    logits, embeddings = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return [_Outputs(*both) for both in zip(logits.log_softmax(-1), embeddings, strict=True)]


def _read(values: Tensor, shape: tuple[int, int], positions: Tensor | None) -> Tensor:
    """[groups, rows, answers, ...], float64 on the CPU."""
    values = values.double().cpu().unflatten(0, shape)
    if positions is None:
        if values.dim() != 3:
            raise LensError(
                "the model gives an output for each token, not one for each example; pass a task"
            )
        return values[:, :, None]
    return values[:, torch.arange(shape[1])[:, None], positions]


def _classifier(model: LoadedModel) -> nn.Module:
    """The module that makes logits."""
    root: Any = model.transformer
    for module in (
        root.get_output_embeddings(),
        getattr(root, "classifier", None),
        getattr(root, "score", None),
    ):
        if isinstance(module, nn.Module):
            return module
    raise LensError(
        f"{model.info.class_name} has no classifier or unembedding, so there are no outputs to "
        "compare; load a model with its head"
    )


def _compared(whole: _Outputs, pruned: _Outputs, correct: Tensor) -> dict[str, Tensor]:
    """metric -> [examples, answers]."""
    p, q = whole.log_probabilities, pruned.log_probabilities
    p_right, q_right = (x.gather(-1, correct[..., None])[..., 0] for x in (p, q))
    e, f = whole.embeddings, pruned.embeddings
    cosine = torch.cosine_similarity(e, f, dim=-1)
    return {
        "accuracy": (p.argmax(-1) == correct).double() - (q.argmax(-1) == correct).double(),
        "probability": p_right.exp() - q_right.exp(),
        "loss": p_right - q_right,
        "js": jensen_shannon(p, q),
        "cosine": (1 - cosine).masked_fill((e == f).all(-1), 0),
        "distance": (e - f).norm(dim=-1),
    }
