"""About what each step takes, for `--dry-run`: tokens through the model, and seconds beside it.

Counted with hooks on the layers of text-lm-3l, induction-2l and smollm2-135m; a backward pass counts as
two. What depends on what is found (how many heads have a role, how large a circuit is) stands in as what
those models had, so an estimate is good to about a factor of two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lens_analyses.config.sizes import LARGE, MOST_REMOVED, heads_by_position, pruning_size


@dataclass(frozen=True)
class Load:
    """What there is to do.

    Attributes:
        settings: the section `analysis` of the configuration, of the model of its command.
        layers, heads, vocab, parameters: of the model; heads of all layers together.
        prompts: tokens of the run's own prompts.
        task: tokens of the prompts of the task.
        windows: tokens of the windows of text; 0 without text.
        length: tokens of one window.
    """

    settings: Any
    layers: int
    heads: int
    vocab: int
    parameters: int
    prompts: int
    task: int
    windows: int
    length: int


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        tokens: through the whole model.
        passes: of the model over one prompt alone, of which small models feel each.
        seconds: beside that, in tables, statistics and figures.
    """

    tokens: float
    passes: float = 0.0
    seconds: float = 1.0


def _chain(load: Load) -> Cost:
    if not load.vocab:  # a model that reads no text has none
        return Cost(0)
    return Cost((40 + 7 * load.layers) * load.prompts, 40 + 7 * load.layers)


def _importance(load: Load) -> Cost:
    passes = 6.0  # of heads of one role together, and the clean model
    for by, _ in load.settings.measured:
        passes += load.heads + 2 if by == "ablation" else 5
    if all(by != "ablation" for by, _ in load.settings.measured):
        passes += 7  # heads that estimates put first, and others at random, taken away
    both = load.task if load.settings.task == "text" else load.task + load.windows
    return Cost(passes * both)


def _pruning(load: Load) -> Cost:
    points, draws = pruning_size(load.heads)
    half = (load.windows or load.task) / 2  # orders are made on one and run on the other
    orders, ordering = (3, load.heads + 12) if points is None else (2, 12)
    return Cost(((orders + draws) * (points or load.heads) + ordering) * half)


def _layers(load: Load) -> Cost:
    """Each of two sub-layers a layer left out alone, the whole model, the stream, and half of them one after another."""
    sublayers = 2 * load.layers
    greedy = 1 + load.layers * (3 * load.layers + 1) // 2 if sublayers <= MOST_REMOVED else 0
    return Cost((sublayers + 2 + greedy) * load.task)


def _of_windows(load: Load, passes: float) -> Cost:
    """Prompt by prompt: so many passes over each window."""
    return Cost(passes * load.windows, passes * load.settings.n)


def _examples(load: Load) -> Cost:
    """A pass over each window of the corpus with its attention written out, and one with random weights."""
    passes = 3 * (1 + load.settings.chance) * load.settings.n
    return Cost(passes * load.length, passes)


def _amounts(load: Load) -> int:
    return len(load.settings.doses)


def _effects(load: Load) -> Cost:
    return _of_windows(load, 18 + 6 * len(load.settings.edited))


def _first_token(load: Load) -> Cost:
    fixed = 63  # prompts that do not depend on the windows
    tokens = fixed * load.length + 8 * load.windows
    return Cost(tokens, fixed + 8 * load.settings.n)


def _edges(load: Load) -> Cost:
    integrated = 3 * load.settings.steps if load.settings.method.startswith("eap-ig") else 3
    return Cost((34 + integrated) * load.task * _circuit_factor(load))


def _patching(load: Load) -> Cost:
    """A pass over every prompt for each layer and token of a stream, and for each head."""
    settings = load.settings
    length = load.task / settings.n
    streams = [name for name in settings.patched if name != "heads"]
    passes = load.layers * length * len(streams) + 4
    if "heads" in settings.patched:
        passes += load.heads * (length if heads_by_position(load.heads, length) else 1)
    return Cost(passes * load.task, passes * settings.n / 8)


def _positions(load: Load) -> Cost:
    """Gradients and kernel calls for each span, and 37 circuits whose parts read a sum for each."""
    words = load.settings.spans or ""
    named = words.count(",") + 2 if "=" in words else 6
    spans = load.task / load.settings.n if words == "each" else named
    circuits = 37 * (_circuit_factor(load) + 0.3 * spans)
    return Cost((circuits + (3 * load.settings.steps + 3 * spans)) * load.task)


def _circuit_factor(load: Load) -> float:
    """A pass in which every edge can be cut, over a plain one: each part reads its own sum."""
    return 1 + 0.04 * load.layers


def _of_answers(load: Load, passes: int) -> Cost:
    """So many passes of each chosen head over the first six prompts, and one with gradients."""
    heads = load.settings.heads.count(",") + 1 if load.settings.heads else 3
    prompts = min(6, load.settings.n)
    count = heads * passes + 4
    return Cost(count * load.task * prompts / load.settings.n, count * prompts)


ALIGNMENT = Cost(0)
"""Of cross-attention, whatever else the run does: from its traces."""
COSTS: dict[str, dict[str, Callable[[Load], Cost]]] = {
    "heads": {
        "roles": lambda load: Cost(2 * load.prompts, seconds=2 + 0.08 * load.heads),
        "importance": _importance,
        "classes": lambda load: Cost((load.heads + 1) * load.task),
        "patterns": lambda load: Cost(0, seconds=1 + 0.03 * load.heads),
        "retrieval": lambda load: Cost(16_000 if load.parameters <= LARGE else 1_000, seconds=2),
        "similarity": lambda load: Cost(load.prompts, seconds=0.0016 * load.heads**2),
        "stability": lambda load: Cost(2 * load.prompts),
        "pruning": _pruning,
        "layers": _layers,
        "heads": lambda load: Cost(0, seconds=1 + 6e-6 * load.heads * load.vocab),
    },
    "sinks": {
        "detection": lambda load: _of_windows(load, 6),
        "mechanism": lambda load: _of_windows(load, 4),
        "kinds": lambda load: Cost(40 * min(3, load.windows) * load.length, 120),
        "effects": _effects,
        "first_token": _first_token,
        "dose": lambda load: _of_windows(load, 2 * _amounts(load) + 1),
        "redistribution": lambda load: _of_windows(load, _amounts(load) + 3),
        "streaming": lambda load: _of_windows(load, 7),
        "spectrum": lambda load: Cost(63 * load.length, 63),
    },
    "redistribute": {
        "dose": lambda load: Cost((_amounts(load) + 3) * (load.task + load.windows)),
        "search": lambda load: Cost((load.heads + 5) * load.task / 2),
    },
    "policies": {
        "policies": lambda load: _of_windows(load, 30),
        "running": lambda load: Cost(45 * load.windows + 20 * 8 * load.length),
        "stability": lambda load: Cost(4 * min(6, load.windows) * load.length),
        "search": lambda load: _of_windows(load, 45),
    },
    "mixers": {"mixers": lambda load: _of_windows(load, 12)},
    "explain": {
        "explain": lambda load: Cost(21 * load.task, 21 * load.settings.n),
        "groups": lambda load: Cost(12 * load.task, 12 * load.settings.n),
        "removal": lambda load: Cost(36 * load.task, 36 * load.settings.n),
        "subspace": lambda load: Cost(20 * load.task, 20 * load.settings.n),
        "retrieval_kinds": lambda load: Cost(6_000, 300),
        "faithfulness": lambda load: Cost(1200 * load.task * min(1, 6 / load.settings.n), 600),
        "mixing": lambda load: Cost(2 * load.task, 2 * load.settings.n),
        "adversary": lambda load: _of_answers(load, 2),
        "perturbation": lambda load: _of_answers(load, 8 * len(load.settings.sizes_of_changes)),
    },
    "vision": {
        "overlays": lambda load: Cost(0, seconds=3),
        "grounding": lambda load: Cost(0, seconds=1),
        "classes": lambda load: Cost((load.heads + 1) * load.task),
        "rings": lambda load: Cost(0, seconds=1 + 0.03 * load.heads),
        "pattern_summary": lambda load: Cost(0, seconds=15 + 0.02 * load.heads),
        "structure": lambda load: Cost(2 * load.prompts, seconds=3),
        "similarity": lambda load: Cost(load.prompts, seconds=1),
        "chain": _chain,
    },
    "examples": {"examples": _examples},
    "generate": {"generation": lambda load: Cost(0, load.settings.new)},
    "patch": {"patching": _patching},
    "circuit": {
        "edges": _edges,
        "circuit": lambda load: Cost(180 * load.task * _circuit_factor(load)),
        "joined": lambda load: Cost(50 * load.task),
        "reading": lambda load: Cost(90 * load.task * _circuit_factor(load)),
        "positions": _positions,
        "overlap": lambda load: Cost(0),
    },
}
"""Analysis -> step -> its cost."""
