"""`lens run --dry-run`: tokens, time, memory and disk of a run before it is made.

Disk follows from the sizes of the trace's variables. Time and memory are rough: time comes from one
matrix product that is timed here and from what each step computes (`steps.costs`), memory from the
weights and the largest layer.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lens.common.errors import LensError
from lens_analyses.config import TASKS, RunConfig
from lens_analyses.config.pictures import PictureConfig
from lens_analyses.config.prompts import labelled_by
from lens_analyses.console import refused_as_usage
from lens_analyses.inputs import load_model, plan, read_sources
from lens_analyses.planned import PlannedPrompt, Source
from lens_analyses.steps import steps_of
from lens_analyses.steps.costs import ALIGNMENT, COSTS, Load
from lens_analyses.steps.subject import WINDOW, analysed

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel

BASE_MEMORY = 600 << 20  # Python with torch and transformers
SLOWDOWN = 3.0  # of a whole model against one large matrix product, measured
PASS_OF_A_LAYER = 0.004  # seconds, where one prompt passes alone: Python and edited attention
MOST_PROMPTS = 100_000  # that one run makes; more is a slip of the keyboard
MOST_TOKENS = 100_000_000  # of the copied prompts that it makes
_ENOUGH = 0.05  # of everything that was expected, from which on the speed is known
_WORTH_WORDS = 60.0  # seconds that are left
_TASK_TOKENS = 51  # of a prompt of a task that was not made yet
_ROW_VARIABLES = 10  # with the dimensions layer, head, query
_MATCH_RULES = 4


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        model: its name.
        what: kind of analysis.
        prompts: how many.
        tokens: of all prompts together.
        longest: tokens of the longest.
        seconds: about, of everything.
        steps: of these, the seconds of the profile and of each step of the analysis.
        memory: bytes of main memory at the peak, about.
        disk: bytes of the run folder.
    """

    model: str
    what: str
    prompts: int
    tokens: int
    longest: int
    seconds: float
    steps: dict[str, float]
    memory: int
    disk: int

    def text(self) -> str:
        """One line a figure."""
        captured = f"prompts {self.prompts}, {self.tokens:,} tokens, the longest {self.longest:,}"
        return "\n".join(
            (
                f"model   {self.model}",
                *([captured] if self.prompts else []),
                f"time    {self.duration()}",
                f"memory  about {_size(self.memory)}",
                f"disk    {_size(self.disk)}",
            )
        )

    def duration(self) -> str:
        """About how long, and for what."""
        longest = sorted(self.steps, key=lambda step: -self.steps[step])[:3]
        parts = ", ".join(f"{step} {_time(self.steps[step])}" for step in longest)
        rest = "" if self.what == "profile" else f" (most for {parts})"
        return f"about {_time(self.seconds)}{rest}"

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


class Pace:
    """What is left of a run while it goes on: what was expected, at the speed that was seen so far.

    Args:
        expected: seconds of each step, of `Estimate.steps`.
    """

    def __init__(self, expected: dict[str, float]) -> None:
        self._left = dict(expected)
        self._all = sum(expected.values())
        self._expected = self._taken = 0.0

    def took(self, step: str, seconds: float | None) -> None:
        """A step is over after so many seconds; None: it was finished before, or had no work to do."""
        expected = self._left.pop(step, 0.0)
        if seconds is not None:
            self._expected += expected
            self._taken += seconds

    def left(self, step: str = "", seconds: float = 0.0) -> float:
        """Seconds that everything still takes, with a step that has run for so many.

        The speed is known once a twentieth of everything is behind; a step that goes on longer than was expected
        slows down what comes after it.
        """
        now, before = self._left.get(step, 0.0), self._slower(0.0, 0.0)
        slower = max(before, self._slower(now, seconds))
        return slower * sum(self._left.values()) - min(seconds, slower * now)

    def words(self, step: str = "", seconds: float = 0.0) -> str:
        """The same to follow what is said of a step; nothing for less than a minute."""
        left = self.left(step, seconds)
        return f", about {_time(left)} of the run left" if left >= _WORTH_WORDS else ""

    def _slower(self, expected: float, seconds: float) -> float:
        """How many times longer than expected all took so far, with a step of which so much was expected."""
        expected += self._expected
        return (self._taken + seconds) / expected if expected > _ENOUGH * self._all else 1.0


def estimate(config: RunConfig) -> Estimate:
    """Check the input as a run does, and count; writes nothing.

    Raises:
        LensError: as the run itself would, for any input that makes no sense.
    """
    with refused_as_usage():
        config, sources = read_sources(config)
    model = load_model(config)
    if model.parts and config.model.part is None:
        return _together([_estimate(config, model.part(part), sources) for part in model.parts])
    return _estimate(config, model, sources)


def _estimate(config: RunConfig, model: "LoadedModel", sources: list[Source]) -> Estimate:
    """Of one run, whose sources were read."""
    config = config.fitted(model.info.parameters)
    with refused_as_usage():
        refuse_excess(config, model)
        planned = plan(model, config, sources)
        if (
            not model.info.attending
        ):  # of mixers alone, which have no profile; `lens mixers` reads texts
            planned = [one for one in planned if one.kind == "text" and config.what == "mixers"]
        asked = analysed(config, model, planned)
    return expect(config, model, planned, *asked)


def _together(runs: list[Estimate]) -> Estimate:
    """Of runs that are made one after the other: of each attention of an encoder-decoder, or of each stage."""
    steps: dict[str, float] = {}
    for one in runs:
        for step, seconds in one.steps.items():
            steps[step] = steps.get(step, 0.0) + seconds
    return replace(
        runs[-1],
        prompts=sum(one.prompts for one in runs),
        tokens=sum(one.tokens for one in runs),
        longest=max(one.longest for one in runs),
        seconds=sum(one.seconds for one in runs),
        steps=steps,
        memory=max(one.memory for one in runs),
        disk=sum(one.disk for one in runs),
    )


def expect(
    config: RunConfig,
    model: "LoadedModel",
    planned: list[PlannedPrompt],
    task: list[list[int]],
    windows: list[list[int]],
) -> Estimate:
    """What a run takes on this machine.

    Args:
        config: fitted to the model.
        model: loaded.
        planned: prompts of the profile.
        task, windows: of `analysed`.
    """
    lengths = [len(prompt.ids) for prompt in planned]
    rate, steps = _rate(model), {}
    if model.info.attending:
        steps["profile"] = SLOWDOWN * sum(work(model, length) for length in lengths) / rate
    load = _load(config, model, sum(lengths), sum(map(len, task)), sum(map(len, windows)))
    steps |= _analysis(config, model, load, rate)
    return Estimate(
        model=model.name,
        what=config.what,
        prompts=len(planned),
        tokens=sum(lengths),
        longest=max(lengths, default=0),
        seconds=sum(steps.values()),
        steps=steps,
        memory=_memory(model, config, max(lengths, default=0)),
        disk=sum(
            len(model.info.attending) * layer_bytes(model, config, length) for length in lengths
        ),
    )


def refuse_excess(config: RunConfig, model: "LoadedModel") -> None:
    """More prompts than a run makes are refused before any is made, with what they would take.

    Raises:
        LensError: more than `MOST_PROMPTS` of the task or copied ones, or `MOST_TOKENS` of these.
    """
    prompts, settings = config.prompts, config.analysis
    if isinstance(prompts, PictureConfig) or labelled_by(prompts) is not None:
        return
    length = 2 * prompts.copied_length + 1
    made = settings is not None and getattr(settings, "task", "text") in TASKS
    n = settings.n if settings is not None and made else 0
    copied = prompts.copied
    if max(copied, n) <= MOST_PROMPTS and copied * length <= MOST_TOKENS:
        return
    rate = _rate(model)
    load = _load(config, model, copied * length, n * _TASK_TOKENS, 0)
    seconds = SLOWDOWN * copied * work(model, length) / rate
    seconds += sum(_analysis(config, model, load, rate).values())
    disk = copied * len(model.info.attending) * layer_bytes(model, config, length)
    asked = [f"{copied:,} copied prompts of {length:,} tokens"] if copied else []
    asked += [f"{n:,} prompts of the task"] if n else []
    raise LensError(
        f"{' and '.join(asked)} would take about {_time(seconds)} and {_size(disk)} of disk; a run makes at "
        f"most {MOST_PROMPTS:,} of each and {MOST_TOKENS:,} copied tokens: ask for fewer (--copied, "
        "--copied-length, --n)"
    )


def _load(config: RunConfig, model: "LoadedModel", prompts: int, task: int, windows: int) -> Load:
    info = model.info
    return Load(
        settings=config.analysis,
        layers=info.layers,
        heads=len(info.every_head),
        vocab=info.vocab or 0,
        parameters=info.parameters,
        prompts=prompts,
        task=task,
        windows=windows,
        length=getattr(config.analysis, "length", None) or WINDOW,
    )


def _analysis(config: RunConfig, model: "LoadedModel", load: Load, rate: float) -> dict[str, float]:
    """Seconds of each step after the profile."""
    info, what = model.info, config.what
    found = {}
    for step in steps_of(what, model.chosen, labelled_by(config.prompts) is not None):
        if step.is_wanted(config.analysis, config.prompts) and not step.why:
            cost = ALIGNMENT if step.name == "alignment" else COSTS[what][step.name](load)
            computing = SLOWDOWN * 2 * info.parameters * cost.tokens / rate
            alone = PASS_OF_A_LAYER * info.layers * cost.passes
            found[step.name] = computing + alone + cost.seconds
    return found


def work(model: "LoadedModel", tokens: int) -> float:
    """Floating-point operations of one prompt: weights × tokens, and attention × tokens².

    Three passes over weights (capture, loss, random weights); attention runs once plainly, as a forward
    pass, an LSE pass and a sink-excluded pass under capture, and as two of these with random weights, each
    of 4 operations a pair and dimension, half of them masked.
    """
    info = model.info
    return 6 * info.parameters * tokens + 12 * len(info.every_head) * info.head_dim * tokens**2


def layer_bytes(model: "LoadedModel", config: RunConfig, tokens: int) -> int:
    """Size of one layer's file (docs/schema/trace.md)."""
    info, capture = model.info, config.capture
    blocks = math.ceil(tokens / capture.block_size)
    per_head = tokens * (_ROW_VARIABLES + _MATCH_RULES + 2) + 2 * blocks**2
    numbers = info.heads * per_head
    width = 2 if "float16" in str(model.dtype) and "bfloat16" not in str(model.dtype) else 4
    kept = tokens * info.head_dim * (info.heads + info.kv_heads) if capture.keep_qk else 0
    return 4 * numbers + width * kept


def _memory(model: "LoadedModel", config: RunConfig, tokens: int) -> int:
    weights = sum(weight.numel() * weight.element_size() for weight in model.model.parameters())
    weights *= 2  # those of random weights beside them
    hidden = model.info.heads * model.info.head_dim
    piece = min(tokens, config.capture.chunk or tokens)
    activations = 16 * 4 * piece * hidden
    if piece < tokens:  # keys and values of all layers stay for the next piece
        activations += 8 * tokens * model.info.layers * model.info.kv_heads * model.info.head_dim
    logits = 3 * 4 * min(tokens * (model.info.vocab or 1), 1 << 25)
    return BASE_MEMORY + weights + activations + logits + 3 * layer_bytes(model, config, tokens)


def _rate(model: "LoadedModel", size: int = 768) -> float:
    """Operations a second of a matrix product in the model's type on its device."""
    import torch

    matrix = torch.ones(size, size, dtype=model.dtype, device=model.device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _time(seconds: float) -> str:
    """In the largest unit of which there are two."""
    units = {"years": 31_557_600, "days": 86_400, "hours": 3600, "min": 60}
    for name, size in units.items():
        if seconds >= 2 * size or (name == "min" and seconds >= 100):
            return f"{seconds / size:,.0f} {name}"
    return f"{max(seconds, 1):.0f} s"


def _size(count: int) -> str:
    for name, size in {"TB": 1e12, "GB": 1e9}.items():
        if count >= size:
            return f"{count / size:,.1f} {name}"
    return f"{count / 1e6:.0f} MB"
