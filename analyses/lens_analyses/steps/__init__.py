"""Analyses beyond the profile: each step turns a finished profile into one section of the run.

A step is a function `(Subject) -> Section`. The runner leaves out a step whose section is there, so
a run that was stopped goes on with the next one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from lens.common.errors import LensError
from lens_analyses.config.listed import listed

if TYPE_CHECKING:
    from lens.runs.sections import Section
    from lens_analyses.steps.subject import Subject


@dataclass(frozen=True)
class Step:
    """One analysis.

    Attributes:
        name: of its section.
        module: of this package that has the function of that name; none where there is a `why`.
        setting: of `analysis` without which the step is left out.
        given: of `prompts`, the same.
        needs: the section of an earlier step that it reads, if it cannot do without.
        why: there is no such section, where there is none.
    """

    name: str
    module: str = ""
    setting: str | None = None
    given: str | None = None
    needs: str | None = None
    why: str = ""

    def is_wanted(self, settings: object, prompts: object) -> bool:
        """Whether a run with these settings, those of `analysis` and of `prompts`, takes the step."""
        if self.given is not None and not getattr(prompts, self.given, None):
            return False
        some = getattr(settings, "sections", None)  # a list with commas, of commands that have it
        if some is not None and self.name not in listed(some):
            return False
        return self.setting is None or getattr(settings, self.setting) is not None

    def run(self, subject: "Subject") -> "Section":
        """Compute the section.

        Raises:
            LensError: there is none.
        """
        if self.why:
            raise LensError(self.why)
        module = import_module(f"lens_analyses.steps.{self.module}")
        compute: Callable[[Subject], Section] = getattr(module, self.name)
        return compute(subject)


STEPS: dict[str, tuple[Step, ...]] = {
    "profile": (),
    "heads": (
        Step("roles", "roles"),
        Step("importance", "importance"),
        Step("classes", "classes", setting="of_labels"),
        Step("patterns", "patterns"),
        Step("retrieval", "retrieval"),
        Step("similarity", "patterns"),
        Step("stability", "stability"),
        Step("pruning", "importance"),
        Step("layers", "layers"),
        Step("heads", "table"),
    ),
    "sinks": (
        Step("detection", "sinks"),
        Step("mechanism", "sinks"),
        Step("kinds", "sinks"),
        Step("effects", "sink_effects"),
        Step("first_token", "sink_effects"),
        Step("dose", "sink_effects"),
        Step("redistribution", "redistribute"),
        Step("streaming", "sink_effects"),
        Step("spectrum", "sinks"),
    ),
    "circuit": (
        Step("edges", "circuits"),
        Step("circuit", "circuits", needs="edges"),
        Step("joined", "circuit_heads", needs="edges"),
        Step("reading", "circuit_heads", needs="edges"),
        Step("positions", "circuit_positions", setting="spans"),
        Step("overlap", "circuit_overlap", setting="compare", needs="edges"),
    ),
    "patch": (Step("patching", "patching"),),
    "redistribute": (Step("dose", "redistribute"), Step("search", "redistribute")),
    "vision": (
        Step("overlays", "vision"),
        Step("grounding", "boxes", given="boxes"),
        Step("classes", "classes"),
        Step("rings", "vision"),
        Step("pattern_summary", "vision"),
        Step("structure", "vision"),
        Step("similarity", "patterns"),
        Step("chain", "vision_language"),
    ),
    "policies": (
        Step("policies", "policies"),
        Step("running", "policies"),
        Step("stability", "policies"),
        Step("search", "policies"),
    ),
    "mixers": (Step("mixers", "mixers"),),
    "examples": (Step("examples", "examples"),),
    "generate": (Step("generation", "generation"),),
    "explain": (
        Step("explain", "explain"),
        Step("groups", "explain"),
        Step("removal", "explain", needs="explain"),
        Step("subspace", "explain"),
        Step("retrieval_kinds", "explain_answers"),
        Step("faithfulness", "explain_answers"),
        Step("mixing", "explain_answers"),
        Step("adversary", "explain_answers"),
        Step("perturbation", "explain_answers"),
    ),
}
"""What a run does -> its steps, in order; later ones may read the sections of earlier ones."""

_ONE_ROW = "it is measured on one row of tokens that is read alone, and an encoder-decoder reads a source and a target"
_OF_PARTS: dict[str, dict[str, Step | str]] = {
    "heads": {
        "roles": f"roles: {_ONE_ROW}; the profile has the scores that a trace shows",
        "retrieval": f"retrieval of needles: {_ONE_ROW}",
        "stability": f"stability over lengths: {_ONE_ROW}",
        "pruning": f"orders of heads to prune: {_ONE_ROW}",
        "layers": "sub-layers are of one residual stream, and an encoder-decoder has two",
    },
    "generate": {"generation": Step("generation", "written")},
    "sinks": {
        "detection": Step("detection", "parts"),
        "mechanism": f"keys, values and massive activations: {_ONE_ROW}",
        "kinds": f"kinds of sinks: {_ONE_ROW}",
        "effects": Step("effects", "parts", needs="detection"),
        "first_token": f"BOS and other texts: {_ONE_ROW}",
        "dose": Step("dose", "parts"),
        "redistribution": f"redistribution: {_ONE_ROW}",
        "streaming": f"a cache of first and last keys: {_ONE_ROW}",
        "spectrum": "the unembedding's spectrum is of one residual stream, and an encoder-decoder has two",
    },
}
"""Of one attention of an encoder-decoder: what stands in the place of a step, or why there is no such section."""
_OF_ENCODER: dict[str, Step | str] = {
    "generation": "the encoder has read the source before anything is written"
}
_NO_TOKEN = "a classifier has one answer for a whole prompt, and predicts no token"
_OF_LABELS: dict[str, dict[str, Step | str]] = {
    "sinks": {
        "detection": Step("detection", "labelled"),
        "mechanism": f"keys, values and massive activations are looked at where tokens are predicted: {_NO_TOKEN}; of pictures "
        "lens.sinks.high_norm(model, pictures) finds the patches with large states",
        "kinds": f"kinds of sinks are told apart by the loss of tokens: {_NO_TOKEN}",
        "effects": Step("effects", "labelled", needs="detection"),
        "first_token": f"BOS and other texts are compared by the loss of tokens: {_NO_TOKEN}",
        "dose": Step("dose", "labelled"),
        "redistribution": Step("redistribution", "labelled"),
        "streaming": "a cache of first and last keys is that of a model that writes tokens, one after the other",
        "spectrum": f"bands are those of the unembedding of tokens: {_NO_TOKEN}",
    },
}
"""Of labelled prompts: the same."""
_CAUSAL_ALONE = "sparse patterns are those of causal heads; the decoder has such"


def steps_of(what: str, part: str, labelled: bool = False) -> tuple[Step, ...]:
    """The steps of a run, in order; `part` is that of an encoder-decoder, "" of other models; `labelled`: its prompts are."""
    if not part and not labelled:
        return STEPS[what]
    instead = _OF_LABELS.get(what, {}) if labelled else _OF_PARTS.get(what, {})
    instead = instead | (_OF_ENCODER if part == "encoder" else {})
    if part and part != "decoder":
        instead = instead | {"patterns": _CAUSAL_ALONE}
    found = []
    for step in STEPS[what]:
        other = instead.get(step.name, step)
        found.append(Step(step.name, why=other) if isinstance(other, str) else other)
    return (Step("alignment", "parts"), *found) if part == "cross" else tuple(found)
