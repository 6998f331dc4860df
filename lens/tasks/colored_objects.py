"""Colored objects: which color does the thing have that is asked for, after one solved example."""

from dataclasses import dataclass
from random import Random

from lens.common.choices import Seed
from lens.models.loaded import LoadedModel
from lens.passes.logits import check_predicts_tokens
from lens.tasks.candidates import Candidate, make_task, usable
from lens.tasks.task import Task
from lens.tasks.words import COLORED, COLORS

SURFACES = ("table", "desk", "floor")
STARTS = ("there is", "you see", "I see")
_THINGS = 3


def colored_objects(model: LoadedModel, n: int = 32, seed: Seed = 0) -> Task:
    """Colored objects; the metric is `logit[color asked for] - logit[color of the corrupt question]`.

    Three colored things are named and the color of one is asked, twice: the first time with its answer.
    The corrupt prompt asks the second question about another of its three things. Asserted for the
    tokenizer in use: each color is one token after "A:", and clean and corrupt prompts have one length.

    Args:
        model: whose tokenizer reads the texts.
        n: number of prompts, all different.
        seed: of the draws of surface, opening, colors and things; the example shares none of its colors
            and things with the question.

    `task.marks` has the positions of the answer's color (`right`) and of the two others (`wrong`,
    `other`) in the scene that is asked about, and of the `end`.

    Reference: Merullo, Eickhoff, Pavlick, Circuit Component Reuse Across Tasks in Transformer Language
        Models, 2023, arXiv 2310.08744; grammar of jmerullo/circuit_reuse (MIT).

    Raises:
        LensError: a tokenizer that splits the colors, or too few prompts that fit.

    Example:
        >>> task = colored_objects(lens.load("smollm2-135m"), n=8)
    """
    check_predicts_tokens(model)
    answers, dropped = usable(
        model, "colors", [color.capitalize() for color in COLORS], "A:", 2 * _THINGS
    )
    colors = [answer.lower() for answer in answers]

    def draw(random: Random) -> Candidate:
        palette, things = random.sample(colors, 2 * _THINGS), random.sample(COLORED, 2 * _THINGS)
        example = _scene(random, palette[:_THINGS], things[:_THINGS])
        scene = _scene(random, palette[_THINGS:], things[_THINGS:])
        shown, asked, other, third = (
            random.randrange(_THINGS),
            *random.sample(range(_THINGS), _THINGS),
        )
        before = f"{example.question(shown)} {example.colors[shown].capitalize()}\n"
        marked = {
            name: before + scene.upto_color(thing)
            for name, thing in (("right", asked), ("wrong", other), ("other", third))
        }
        clean = before + scene.question(asked)
        return Candidate(
            clean=clean,
            corrupt=before + scene.question(other),
            right=(f" {scene.colors[asked].capitalize()}",),
            wrong=(f" {scene.colors[other].capitalize()}",),
            marked=marked | {"end": clean},
        )

    return make_task(
        model, "colored objects", n, seed, draw, metric="logit_difference", dropped=dropped
    )


@dataclass(frozen=True)
class _Scene:
    opening: str
    colors: list[str]
    things: list[str]

    def items(self) -> list[str]:
        return [
            f"{'an' if color[0] in 'aeiou' else 'a'} {color} {thing}"
            for color, thing in zip(self.colors, self.things, strict=True)
        ]

    def question(self, thing: int) -> str:
        *first, last = self.items()
        return (
            f"{self.opening} {', '.join(first)}, and {last}. "
            f"What color is the {self.things[thing]}?\nA:"
        )

    def upto_color(self, thing: int) -> str:
        """The scene up to and with the color of a thing."""
        text = self.question(thing)
        color = f" {self.colors[thing]}"
        return text[: text.index(f"{color} {self.things[thing]}") + len(color)]


def _scene(random: Random, colors: list[str], things: list[str]) -> _Scene:
    surface, start = random.choice(SURFACES), random.choice(STARTS)
    return _Scene(f"Q: On the {surface}, {start}", colors, things)
