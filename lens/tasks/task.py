"""`Task`: prompts, where to read the logits, and what counts as right there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.common.given import given_as
from lens.models.loaded import LoadedModel, check_loaded
from lens.models.sizes import reads_picture_first
from lens.passes.logits import Given, check_predicts_tokens, labels_of, logits_of
from lens.passes.sources import paired
from lens.tasks import metrics
from lens.tasks._checks import check_same_shape, check_targets, range_of, rows_of, whole
from lens.tasks.metrics import METRICS, AnswerSets

_WHOLE = ("clean", "corrupt", "positions", "correct", "wrong", "lengths", "targets")
_LOGITS = 1 << 25  # numbers that one forward pass may return
_REFERENCE = 1 << 28  # numbers of the distributions that "kl" compares with


@dataclass(frozen=True, repr=False, eq=False)
class Task:
    """Prompts and a metric of each of them.

    Attributes:
        name: for people and tables.
        clean: [prompts, tokens] token ids; shorter prompts are filled up behind their own tokens.
        positions: [prompts, answers] queries whose logits are read.
        correct: [prompts, answers] token that should follow there.
        metric: the mean over the answers of a prompt of "loss" (cross-entropy in nats), "accuracy"
            (share of answers whose most likely token is the correct one), "logit_difference"
            (logit[correct] - logit[wrong]), "max_logit_difference" (largest logit of the right set -
            largest of the wrong set), "probability_difference" (summed probability of the right set -
            that of the wrong set) or "kl" (to the distribution in `reference`).
        corrupt: [prompts, tokens] prompt for prompt the same without what decides the answer, or None.
        wrong: [prompts, answers] token of the wrong answer; "logit_difference" alone has it.
        sets: right and wrong sets of answers; the metrics of sets need them, and "loss" and "accuracy"
            then mean the right set.
        reference: [prompts, answers, vocab] log-probabilities; "kl" alone has it (`with_kl`).
        marks: positions with a name, [prompts] each, such as where the subject stands.
        lengths: [prompts] tokens of each prompt that are its own, where these differ; what follows them
            no answer sees. None: all have one length, so that positions can be compared.
        dropped: what was left out when the task was made, and why, one sentence each.
        targets: of an encoder-decoder [prompts, tokens] that its decoder reads; `clean` are the sources then (ids,
            or [prompts, ...] of a sound or picture), and positions, answers and marks are in the targets.
        labels: how many a classifier chooses from, where the answers are labels of whole prompts
            (`positions` are 0) or of pictures (`clean` is [pictures, channels, height, width]); None:
            answers are tokens.

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
    sets: AnswerSets | None = None
    reference: Tensor | None = None
    marks: Mapping[str, Tensor] = field(default_factory=dict)
    lengths: Tensor | None = None
    labels: int | None = None
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE:
            if name in ("clean", "positions", "correct") or getattr(self, name) is not None:
                given_as("Tensor", **{name: getattr(self, name)})
        pictures = self.labels is not None and self.clean.is_floating_point()
        if self.targets is not None:
            check_targets(self.clean, self.targets)
        elif self.clean.dim() != (4 if pictures else 2) or not self.clean.numel():
            raise LensError(
                f"clean must be token ids [prompts, tokens], got the shape {list(self.clean.shape)}"
            )
        check_same_shape("corrupt", self.corrupt, "clean", self.clean)
        check_same_shape("correct", self.correct, "positions", self.positions)
        check_same_shape("wrong", self.wrong, "positions", self.positions)
        if self.targets is not None and self.lengths is not None:
            raise LensError("targets have one length; leave lengths out")
        if self.positions.dim() != 2 or len(self.positions) != len(self.clean):
            raise LensError(
                f"positions must be [prompts, answers] for {len(self.clean)} prompts, got the shape "
                f"{list(self.positions.shape)}"
            )
        if not self.positions.numel():
            raise LensError("positions has no answers; give at least one per prompt")
        if not 0 <= int(self.positions.min()) <= int(self.positions.max()) < self.length:
            raise LensError(
                f"positions must be 0 to {self.length - 1}; got {range_of(self.positions)}"
            )
        if self.lengths is not None and (
            self.lengths.shape != (self.n,)
            or int(self.lengths.max()) > self.length
            or bool((self.positions >= self.lengths[:, None]).any())
        ):
            raise LensError(
                f"lengths must be one number of at most {self.length} for each of {self.n} prompts, and "
                "answers are read within them"
            )
        if not isinstance(self.metric, str) or self.metric not in METRICS:
            raise LensError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if (self.metric == "logit_difference") != (self.wrong is not None):
            raise LensError(
                "wrong answers belong to the metric 'logit_difference' and to no other; got "
                f"{self.metric!r} {'without' if self.wrong is None else 'with'} them"
            )
        if self.sets is None and self.metric in metrics.OF_SETS:
            raise LensError(f"the metric {self.metric!r} compares sets of answers; give sets")
        if self.sets is not None and self.sets.right.shape[:2] != self.positions.shape:
            raise LensError(
                f"sets must be of the {list(self.positions.shape)} prompts and answers; got "
                f"{list(self.sets.right.shape[:2])}"
            )
        if (self.metric == "kl") != (self.reference is not None):
            raise LensError(
                "a distribution to compare with belongs to the metric 'kl' and to no other; make such "
                "a task with task.with_kl(model)"
            )
        for name, places in self.marks.items():
            if (
                places.shape != (self.n,)
                or not 0 <= int(places.min()) <= int(places.max()) < self.length
            ):
                raise LensError(
                    f"the mark {name!r} must be one position of 0 to {self.length - 1} for each of "
                    f"{self.n} prompts"
                )
        continuous = self.clean.is_floating_point() and (pictures or self.targets is not None)
        for name in _WHOLE[2 * continuous :]:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole(name, given))

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.clean.shape[0]

    @property
    def length(self) -> int:
        """Tokens of each prompt; of an encoder-decoder of each target."""
        return (self.clean if self.targets is None else self.targets).shape[1]

    def given(self, model: LoadedModel, rows: Tensor, *, corrupt: bool = False) -> Given:
        """What the model reads of these prompts: ids or pixel values, of an encoder-decoder all its inputs.

        Raises:
            LensError: no corrupt prompts.
        """
        clean = (self.corrupt_or_refuse() if corrupt else self.clean)[rows]
        return clean if self.targets is None else paired(model, clean, self.targets[rows])

    @property
    def sign(self) -> int:
        """1 where a larger metric is better, -1 where a smaller one is."""
        return METRICS[self.metric]

    def evaluate(self, model: LoadedModel, *, corrupt: bool = False) -> Tensor:
        """The metric of every prompt: [prompts] on the CPU, float32 (float64 of a float64 model).

        Args:
            model: as `lens.load` returns it.
            corrupt: run the corrupt prompts; answers stay those of the clean ones.

        Raises:
            LensError: no corrupt prompts, or prompts that the model does not take.
        """
        self.check(model)
        found = []
        with torch.no_grad():
            for rows in self.chunks(self.rows_at_once(model)):
                logits = logits_of(model, self.given(model, rows, corrupt=corrupt))
                found.append(self.measure(logits, rows).cpu())
        return torch.cat(found)

    def measure(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The metric [len(rows)] from the logits [len(rows), tokens, vocab] of those prompts.

        It can be differentiated, except for "accuracy"; float64 logits are kept as they are.

        Raises:
            LensError: logits of another vocabulary than the distribution of "kl".
        """
        rows = rows.cpu()
        device = logits.device
        read = self._read(logits, rows)
        correct = self.correct[rows].to(device)
        sets = None if self.sets is None else self.sets.rows(rows)
        if self.wrong is not None:
            return metrics.logit_difference(read, correct, self.wrong[rows].to(device))
        if self.reference is not None:
            if self.reference.shape[-1] != read.shape[-1]:
                raise LensError(
                    f"the logits are of {read.shape[-1]} tokens and the distribution to compare with "
                    f"is of {self.reference.shape[-1]}; make it anew: task.with_kl(model)"
                )
            return metrics.kl(read, self.reference[rows].to(device, read.dtype))
        if self.metric == "accuracy":
            return metrics.accuracy(read, correct, sets)
        if self.metric == "loss":
            return metrics.loss(read, correct, sets)
        assert sets is not None
        if self.metric == "max_logit_difference":
            return metrics.max_logit_difference(read, sets)
        return metrics.probability_difference(read, sets)

    def _read(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits [rows, answers, vocab] where the answers are read, at least float32."""
        at = torch.arange(len(rows), device=logits.device)[:, None]
        read = logits[at, self.positions[rows].to(logits.device)]
        return read if read.dtype == torch.float64 else read.float()

    @property
    def is_flat(self) -> bool:
        """Whether the metric has no gradient where the model is as it is, being at its best there."""
        return self.metric in metrics.FLAT

    def take(self, rows: Tensor | Sequence[int]) -> "Task":
        """These of the prompts (numbers), in this order; some may come twice.

        Raises:
            LensError: none, or a number that there is not.
        """
        rows = rows_of(rows, self.n)

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return replace(
            self,
            clean=self.clean[rows],
            positions=self.positions[rows],
            correct=self.correct[rows],
            corrupt=some(self.corrupt),
            wrong=some(self.wrong),
            sets=None if self.sets is None else self.sets.rows(rows),
            reference=some(self.reference),
            lengths=some(self.lengths),
            targets=some(self.targets),
            marks={name: places[rows] for name, places in self.marks.items()},
        )

    @property
    def own(self) -> Tensor:
        """[prompts, tokens] which positions are the prompts' own tokens."""
        ends = torch.full((self.n,), self.length) if self.lengths is None else self.lengths
        return torch.arange(self.length) < ends[:, None]

    @property
    def prompts(self) -> list[list[int]]:
        """The clean prompts' own tokens."""
        return [ids[own].tolist() for ids, own in zip(self.clean, self.own, strict=True)]

    @property
    def as_prompts(self) -> Any:
        """The clean prompts as `lens.capture` takes them; of an encoder-decoder pairs (source, target)."""
        continuous = self.clean.is_floating_point()  # pictures or sounds
        if self.targets is None:
            return {"pixel_values": self.clean} if continuous else self.clean
        return [*zip(self.clean.split(1) if continuous else self.clean, self.targets, strict=True)]

    def refuse_lengths(self, what: str, does: str = "compares prompts by their positions") -> None:
        """Refuse prompts of several lengths, for what needs one.

        Raises:
            LensError: the prompts have several lengths.
        """
        if self.lengths is not None:
            raise LensError(
                f"{what} {does}, and those of {self.name!r} have "
                f"{range_of(self.lengths)} tokens; give prompts of one length"
            )

    def with_metric(self, metric: str) -> "Task":
        """The same prompts by another metric; wrong answers are dropped where it has none.

        Raises:
            LensError: one that needs what the task does not have.
        """
        return replace(
            self,
            metric=metric,
            wrong=self.wrong if metric == "logit_difference" else None,
            reference=self.reference if metric == "kl" else None,
        )

    def with_kl(self, model: LoadedModel) -> "Task":
        """The same prompts by how far the answers' distribution moves from that of `model`, in nats.

        `KL(P_clean || P)` at every answer, both over the whole vocabulary. It is 0 and flat for
        `model` itself (`is_flat`), so a gradient taken there says nothing; ablation does.

        Raises:
            LensError: prompts that the model does not take, or more than 1 GiB of distributions.
        """
        self.check(model)
        size = self.positions.numel() * (model.info.vocab or 1)
        if size > _REFERENCE:
            raise LensError(
                f"{self.positions.numel():,} answers over {model.info.vocab:,} tokens are too many "
                f"distributions to keep; take at most {_REFERENCE // (model.info.vocab or 1):,} answers"
            )
        found = []
        with torch.no_grad():
            for rows in self.chunks(self.rows_at_once(model)):
                read = self._read(logits_of(model, self.given(model, rows)), rows)
                found.append(read.log_softmax(-1).cpu())
        return replace(self, metric="kl", wrong=None, reference=torch.cat(found))

    def corrupt_or_refuse(self) -> Tensor:
        """The corrupt prompts.

        Raises:
            LensError: the task has none, or they are the clean ones.
        """
        same = self.corrupt is not None and torch.equal(self.corrupt, self.clean)
        if self.corrupt is None or same:
            raise LensError(
                f"the task {self.name!r} has {'its clean prompts as' if same else 'no'} corrupt prompts, so there "
                "is no counterfactual; use another baseline: zero, mean, pooled_mean or resample"
            )
        return self.corrupt

    def check(self, model: LoadedModel) -> None:
        """All prompts fit the model.

        Raises:
            LensError: they do not, or it reads no tokens.
        """
        check_loaded(model)
        if self.labels is None:
            own = self.clean, self.positions, self.correct  # with targets positions are in these
            check_predicts_tokens(model, next_tokens=self.targets is None and metrics.follow(*own))
        elif self.labels != labels_of(model):
            raise LensError(
                f"the task {self.name!r} has {self.labels} labels and {model.info.class_name} chooses from "
                f"{labels_of(model) or 'none'}; make it with the model that it is for"
            )
        if model.is_encoder_decoder != (self.targets is not None):
            raise LensError(
                f"the task {self.name!r} has {'no ' * (self.targets is None)}targets, and {model.info.class_name} is "
                f"{'an' if model.is_encoder_decoder else 'no'} encoder-decoder; lens.tasks.language_modelling(model, pairs) makes one"
            )
        for row in () if self.targets is None else self.targets.tolist():
            model.check_ids(row)
        if self.clean.is_floating_point():
            return
        pictured = not model.is_bridge and reads_picture_first(model.model)
        if model.info.vocab is None or pictured:
            made = f"{'text without a picture' if pictured else 'tokens'}, and the task {self.name!r} is made of "
            raise LensError(f"{model.name} reads no {made}{'tokens' if pictured else 'them'}")
        if model.info.sees_later:
            self.refuse_lengths(model.info.class_name, "lets prompts see what fills them up")
        both = [self.clean] if self.corrupt is None else [self.clean, self.corrupt]
        for row in torch.cat(both).tolist():
            model.check_ids(row)
        answers = (self.correct, self.wrong, self.sets)
        metrics.check_answers(answers, self.name, model.info.vocab, model.name)

    def rows_at_once(self, model: LoadedModel) -> int:
        """Prompts in one forward pass, so that its logits, and what an MLP makes of them, stay below 128 MiB in float32."""
        if self.labels is not None and self.clean.is_floating_point():
            return max(1, _LOGITS // self.clean[0].numel())
        inside = 32 * model.info.heads * model.info.head_dim  # of an MLP, in several copies
        return max(1, _LOGITS // (self.length * max(model.info.vocab or 1, inside, 1024)))

    def chunks(self, size: int) -> Iterator[Tensor]:
        """Numbers of the prompts, at most `size` at a time."""
        yield from torch.arange(self.n).split(size)

    def __repr__(self) -> str:
        better, corrupt = ("less", "more")[self.sign > 0], ("with", "without")[self.corrupt is None]
        dropped = f", {len(self.dropped)} dropped" if self.dropped else ""
        length = self.length if self.lengths is None else range_of(self.lengths)
        if self.targets is not None:
            what = f"{self.n} targets of {self.length} tokens"
        elif self.clean.is_floating_point():
            what = f"{self.n} pictures of {self.clean.shape[2]} x {self.clean.shape[3]}"
        else:
            what = f"{self.n} prompts of {length} tokens"
        return f"Task({self.name}: {what}, {corrupt} corrupt ones{dropped}; {self.metric}, {better} is better)"
