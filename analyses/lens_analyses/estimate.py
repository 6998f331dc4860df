"""`lens run --dry-run`: tokens, time, memory and disk of a run before it is made.

Disk follows from the sizes of the trace's variables. Time and memory are rough: time comes from one
matrix product that is timed here and from what each step computes (`steps.costs`), memory from the
weights and the largest layer.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lens_analyses.config import RunConfig
from lens_analyses.console import refused_as_usage
from lens_analyses.inputs import PlannedPrompt, load_model, plan, read_sources
from lens_analyses.steps import STEPS
from lens_analyses.steps.costs import COSTS, Load
from lens_analyses.steps.subject import analysed

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel

BASE_MEMORY = 600 << 20  # Python with torch and transformers
SLOWDOWN = 3.0  # of a whole model against one large matrix product, measured
PASS_OF_A_LAYER = 0.004  # seconds, where one prompt passes alone: Python and edited attention
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
        longest = sorted(self.steps, key=lambda step: -self.steps[step])[:3]
        parts = ", ".join(f"{step} {_time(self.steps[step])}" for step in longest)
        rest = "" if self.what == "profile" else f" (most for {parts})"
        return "\n".join(
            (
                f"model   {self.model}",
                f"prompts {self.prompts}, {self.tokens:,} tokens, the longest {self.longest:,}",
                f"time    about {_time(self.seconds)}{rest}",
                f"memory  about {_size(self.memory)}",
                f"disk    {_size(self.disk)}",
            )
        )

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def estimate(config: RunConfig) -> Estimate:
    """Check the input as a run does, and count; writes nothing.

    Raises:
        LensError: as the run itself would, for any input that makes no sense.
    """
    with refused_as_usage():
        config, sources = read_sources(config)
    model = load_model(config)
    with refused_as_usage():
        planned = plan(model, config, sources)
        task, windows = analysed(config, model, planned)
    lengths = [len(prompt.ids) for prompt in planned]
    rate = _rate(model)
    steps = {"profile": SLOWDOWN * sum(work(model, prompt) for prompt in planned) / rate}
    steps |= _analysis(config, model, planned, task, windows, rate)
    return Estimate(
        model=model.name,
        what=config.what,
        prompts=len(planned),
        tokens=sum(lengths),
        longest=max(lengths),
        seconds=sum(steps.values()),
        steps=steps,
        memory=_memory(model, config, max(lengths)),
        disk=sum(model.info.layers * layer_bytes(model, config, length) for length in lengths),
    )


def _analysis(
    config: RunConfig,
    model: "LoadedModel",
    planned: list[PlannedPrompt],
    task: list[list[int]],
    windows: list[list[int]],
    rate: float,
) -> dict[str, float]:
    """Seconds of each step after the profile."""
    settings, info, what = config.analysis, model.info, config.what
    load = Load(
        settings=settings,
        layers=info.layers,
        heads=info.layers * info.heads,
        vocab=info.vocab or 0,
        parameters=info.parameters,
        prompts=sum(len(prompt.ids) for prompt in planned),
        task=sum(map(len, task)),
        windows=sum(map(len, windows)),
    )
    found = {}
    for step in STEPS[what]:
        if step.is_wanted(settings):
            cost = COSTS[what][step.name](load)
            computing = SLOWDOWN * 2 * info.parameters * cost.tokens / rate
            alone = PASS_OF_A_LAYER * info.layers * cost.passes
            found[step.name] = computing + alone + cost.seconds
    return found


def work(model: "LoadedModel", prompt: PlannedPrompt) -> float:
    """Floating-point operations of one prompt: weights × tokens, and attention × tokens².

    Three passes over weights (capture, loss, random weights); attention runs once plainly, as a forward
    pass, an LSE pass and a sink-excluded pass under capture, and as two of these with random weights, each
    of 4 operations a pair and dimension, half of them masked.
    """
    tokens, info = len(prompt.ids), model.info
    return 6 * info.parameters * tokens + 12 * info.layers * info.heads * info.head_dim * tokens**2


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
    activations = 16 * 4 * tokens * hidden
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
    return f"{max(seconds, 1):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
