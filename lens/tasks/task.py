"""`Task`: prompts of one length, where to read the logits, and what counts as right there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lens.captures.inputs import check_ids
from lens.errors import LensError
from lens.models.loaded import LoadedModel

METRICS = {"loss": -1, "accuracy": 1, "logit_difference": 1}
"""Each metric and its sign: -1 where less is better."""

_LOGITS = 1 << 25  # numbers that one forward pass may return


@dataclass(frozen=True, repr=False, eq=False)
class Task:
    """Prompts and a metric of each of them.

    Attributes:
        name: for people and tables.
        clean: [prompts, tokens] token ids; all prompts have one length, so positions can be compared.
        positions: [prompts, answers] queries whose logits are read.
        correct: [prompts, answers] token that should follow there.
        metric: "loss" (cross-entropy in nats), "accuracy" (share of answers whose most likely token
            is the correct one) or "logit_difference" (logit[correct] - logit[wrong]); each is the
            mean over the answers of a prompt.
        corrupt: [prompts, tokens] prompt for prompt the same without what decides the answer, or None.
        wrong: [prompts, answers] token of the wrong answer; "logit_difference" alone has it.
        dropped: what was left out when the task was made, and why, one sentence each.

    Raises:
        LensError: shapes that do not fit together, an unknown metric, or no wrong answers for one
            that needs them.
    """

    name: str
    clean: Tensor
    positions: Tensor
    correct: Tensor
    metric: str
    corrupt: Tensor | None = None
    wrong: Tensor | None = None
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.clean.dim() != 2 or not self.clean.numel():
            raise LensError(
                f"clean must be token ids [prompts, tokens], got the shape {list(self.clean.shape)}"
            )
        _same_shape("corrupt", self.corrupt, "clean", self.clean)
        _same_shape("correct", self.correct, "positions", self.positions)
        _same_shape("wrong", self.wrong, "positions", self.positions)
        if self.positions.dim() != 2 or len(self.positions) != len(self.clean):
            raise LensError(
                f"positions must be [prompts, answers] for {len(self.clean)} prompts, got the shape "
                f"{list(self.positions.shape)}"
            )
        if not self.positions.numel():
            raise LensError("positions has no answers; give at least one per prompt")
        if not 0 <= int(self.positions.min()) <= int(self.positions.max()) < self.length:
            raise LensError(
                f"positions must be 0 to {self.length - 1}; got {_range(self.positions)}"
            )
        if self.metric not in METRICS:
            raise LensError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if (self.metric == "logit_difference") != (self.wrong is not None):
            raise LensError(
                "wrong answers belong to the metric 'logit_difference' and to no other; got "
                f"{self.metric!r} {'without' if self.wrong is None else 'with'} them"
            )

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.clean.shape[0]

    @property
    def length(self) -> int:
        """Tokens of each prompt."""
        return self.clean.shape[1]

    @property
    def sign(self) -> int:
        """1 where a larger metric is better, -1 where a smaller one is."""
        return METRICS[self.metric]

    def evaluate(self, model: LoadedModel, *, corrupt: bool = False) -> Tensor:
        """The metric of every prompt: [prompts], float32, on the CPU.

        Args:
            model: as `lens.load` returns it.
            corrupt: run the corrupt prompts; answers stay those of the clean ones.

        Raises:
            LensError: no corrupt prompts, or prompts that the model does not take.
        """
        ids = self.corrupt_or_refuse() if corrupt else self.clean
        self.check(model)
        found = []
        with torch.no_grad():
            for rows in self.chunks(self.rows_at_once(model)):
                found.append(self.measure(logits_of(model, ids[rows]), rows).cpu())
        return torch.cat(found)

    def measure(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The metric [len(rows)] from the logits [len(rows), tokens, vocab] of those prompts."""
        rows = rows.cpu()
        device = logits.device
        positions, correct = self.positions[rows].to(device), self.correct[rows].to(device)
        at = torch.arange(len(rows), device=device)[:, None]
        read = logits[at, positions].float()  # [rows, answers, vocab]
        if self.metric == "accuracy":
            return (read.argmax(-1) == correct).float().mean(1)
        if self.metric == "loss":
            return cross_entropy(read.transpose(1, 2), correct, reduction="none").mean(1)
        assert self.wrong is not None
        answers = torch.stack([correct, self.wrong[rows].to(device)], -1)
        right, wrong = read.gather(-1, answers).unbind(-1)
        return (right - wrong).mean(1)

    def with_metric(self, metric: str) -> "Task":
        """The same prompts by another metric; wrong answers are dropped where it has none."""
        return replace(
            self, metric=metric, wrong=self.wrong if metric == "logit_difference" else None
        )

    def corrupt_or_refuse(self) -> Tensor:
        """The corrupt prompts.

        Raises:
            LensError: the task has none.
        """
        if self.corrupt is None:
            raise LensError(
                f"the task {self.name!r} has no corrupt prompts, so there is no counterfactual; "
                "use another baseline: zero, mean, pooled_mean or resample"
            )
        return self.corrupt

    def check(self, model: LoadedModel) -> None:
        """All prompts fit the model.

        Raises:
            LensError: they do not, or it reads no tokens.
        """
        if model.info.vocab is None:
            raise LensError(
                f"{model.name} reads no tokens, and the task {self.name!r} is made of them"
            )
        for ids in (self.clean, self.corrupt):
            if ids is not None:
                for row in ids.tolist():
                    check_ids(model, row)

    def rows_at_once(self, model: LoadedModel) -> int:
        """Prompts in one forward pass, so that its logits stay below 128 MiB in float32."""
        return max(1, _LOGITS // (self.length * max(model.info.vocab or 1, 1024)))

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Numbers of the prompts, at most `size` at a time."""
        yield from torch.arange(self.n).split(size)

    def __repr__(self) -> str:
        better = "more" if self.sign > 0 else "less"
        corrupt = "with" if self.corrupt is not None else "without"
        dropped = f", {len(self.dropped)} dropped" if self.dropped else ""
        return (
            f"Task({self.name}: {self.n} prompts of {self.length} tokens, {corrupt} corrupt ones"
            f"{dropped}; {self.metric}, {better} is better)"
        )


def logits_of(model: LoadedModel, ids: Tensor) -> Tensor:
    """Logits [prompts, tokens, vocab] of token ids [prompts, tokens].

    Raises:
        LensError: the model returns none.
    """
    result: Any = model.model(ids.to(model.device))
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise LensError(f"{model.info.class_name} returns no logits [prompts, tokens, vocab]")
    return logits


def _same_shape(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    if tensor is not None and tensor.shape != other.shape:
        raise LensError(
            f"{name} must have the shape of {other_name}, {list(other.shape)}; got "
            f"{list(tensor.shape)}"
        )


def _range(tensor: Tensor) -> str:
    return f"{int(tensor.min())} to {int(tensor.max())}"
