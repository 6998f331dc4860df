"""The settings of the analyses that follow a profile, as pydantic models: the section `analysis` of a run."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, field_validator, model_validator

from lens.circuits.scores.methods import Method, named
from lens.common.files import shorten
from lens_analyses.config.listed import (
    EDITS,
    EXPLAIN_SECTIONS,
    GROUPS,
    POLICY_SECTIONS,
    STREAMS,
    check_amounts,
    check_edits,
    check_explained,
    check_groups,
    check_heads,
    check_loss,
    check_measures,
    check_noise,
    check_sections,
    check_sizes,
    check_spans,
    check_streams,
    check_temperature,
    listed,
)
from lens_analyses.config.paths import is_task_file
from lens_analyses.config.pictures import LABELS
from lens_analyses.config.settings import Section, Shown, setting
from lens_analyses.config.sizes import FEW_PROMPTS, LARGE, PROMPTS

Rule = Literal["transfer", "mask", "drop", "logit_bias", "learned_sink", "off_by_one", "act"]
"""Edits of the first token, by the names in the configuration, that need no more than a text."""
TASKS = ("induction", "ioi", "greater_than", "docstring", "colored_objects")
"""Tasks that `lens.tasks` makes from a model, a number of prompts and a seed."""
NOT_FROM_A_COMMAND = {
    "var": "it moves attention to an image, and the prompts here are text; `lens vision --image F --text Q` runs it, or "
    "use lens.edits.Var",
    "pasta": "it needs the positions to emphasise, which differ from prompt to prompt; `lens vision --emphasise` runs it "
    "on pictures with a question, or use lens.edits.Pasta",
}
_QUICK = "gradient,attribution,direct"
_BOUNDED = ("transfer", "mask", "drop", "off_by_one", "act")  # their amounts are fractions


def _known_task(name: str) -> str:
    if name not in (*TASKS, "text", LABELS) and not is_task_file(name):
        known = ", ".join((*TASKS, "text", LABELS))
        raise ValueError(f"unknown task {shorten(name)!r}; known: {known}, or a .jsonl file")
    return name


class AnalysisSettings(Section):
    """What is done beyond the profile."""

    n: int = setting(32, "Prompts of the task, or windows of text, at most.", ge=2)
    length: int | None = setting(
        None,
        "Tokens of each window, where text is predicted; 128 if not given, or fewer where texts are shorter.",
        shown=Shown(rare=True),
        ge=2,
    )

    @property
    def taken(self) -> int:
        """How many prompts of the task are read."""
        return self.n


def _task(of_labels: str = "") -> Any:
    return setting(
        "induction",
        f"{', '.join(TASKS)}, text (the run's own), a .jsonl file of prompts{of_labels}.",
        shown=Shown(suggestions=lambda: (*TASKS, "text")),
    )


class _OnTask(AnalysisSettings):
    task: Annotated[str, AfterValidator(_known_task)] = _task()


class _OnTaskOrLabels(_OnTask):
    task: Annotated[str, AfterValidator(_known_task)] = _task(
        f", or {LABELS} (of --images, --labelled)"
    )


class _WithRule(AnalysisSettings):
    rule: Rule = setting("transfer", "How attention is moved.")
    amounts: Annotated[str, AfterValidator(check_amounts)] = setting(
        "0,0.25,0.5,0.75,1", "Of the edit, with commas: the dose-response curve."
    )

    @field_validator("rule", mode="before")
    @classmethod
    def _runs_from_a_command(cls, rule: Any) -> Any:
        if isinstance(rule, str) and rule in NOT_FROM_A_COMMAND:
            raise ValueError(f"{rule!r} cannot be run from the command: {NOT_FROM_A_COMMAND[rule]}")
        return rule

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        least, most = self._range()
        for amount in self.doses:
            if not least <= amount <= most:
                bounds = "0..1" if most == 1 else "0 or more"
                raise ValueError(
                    f"analysis.amounts of {self.rule} must be {bounds}, got {amount:g}"
                )
        return self

    def _range(self) -> tuple[float, float]:
        if self.rule in _BOUNDED:
            return 0.0, 1.0
        return (0.0 if self.rule == "learned_sink" else -math.inf), math.inf

    @property
    def doses(self) -> tuple[float, ...]:
        """The amounts as numbers, in the given order."""
        return tuple(map(float, listed(self.amounts)))


class HeadsSettings(_OnTaskOrLabels):
    """Of `lens heads`; what is not given follows the size of the model (`fitted`)."""

    n: int | None = setting(  # pyright: ignore[reportIncompatibleVariableOverride]
        None,
        f"Prompts of the task, or windows of text, at most; {PROMPTS} if not given, {FEW_PROMPTS} with a large model.",
        ge=2,
    )
    measures: Annotated[str, AfterValidator(check_measures)] | None = setting(
        None,
        "Of importance, with commas, e.g. ablation/mean,gradient; if not given all six, with a model of more than "
        f"{LARGE // 1_000_000} million weights those without ablation, which takes a pass for every head.",
    )

    @property
    def taken(self) -> int:
        """How many prompts of the task are read."""
        return self.n or PROMPTS

    def fitted(self, parameters: int) -> Self:
        """With the defaults for a model of so many weights."""
        large = parameters > LARGE
        measures = _QUICK if large else f"ablation/mean,ablation/zero,ablation/resample,{_QUICK}"
        return self.model_copy(
            update={
                "n": self.n or (FEW_PROMPTS if large else PROMPTS),
                "measures": self.measures or measures,
            }
        )

    @property
    def of_labels(self) -> str | None:
        """The task, where it is that of labelled prompts."""
        return self.task if self.task == LABELS else None

    @property
    def measured(self) -> tuple[tuple[str, str], ...]:
        """`"ablation/mean,gradient"` as `(("ablation", "mean"), ("gradient", ""))`."""
        parts = (word.partition("/") for word in listed(self.measures or ""))
        return tuple((by, baseline) for by, _, baseline in parts)


class SinksSettings(_WithRule):
    """Of `lens sinks`."""

    edits: Annotated[str, AfterValidator(check_edits)] = setting(
        "mask,drop,mean_value", f"With commas, of {', '.join(EDITS)}."
    )

    def _range(self) -> tuple[float, float]:
        return 0.0, 1.0  # the edits of a sink share the amounts, and theirs are fractions

    @property
    def edited(self) -> tuple[str, ...]:
        """The edits one by one."""
        return tuple(listed(self.edits))


class RedistributeSettings(_OnTaskOrLabels, _WithRule):
    """Of `lens redistribute`."""


class PoliciesSettings(AnalysisSettings):
    """Of `lens policies`."""

    loss: Annotated[str, AfterValidator(check_loss)] = setting(
        "0.01", "What the mean next-token loss may grow by when heads run sparse, nats per token."
    )
    sections: Annotated[str, AfterValidator(check_sections)] = setting(
        ",".join(POLICY_SECTIONS),
        "Which analyses to make, with commas: policies measured, text and needles run, stability of patterns, search for each head.",
    )
    published: str | None = setting(
        None,
        "File of policies to lay beside the search: MInference's, or ours, or DuoAttention's folder.",
        shown=Shown(file=True),
        min_length=1,
    )
    levels: int = setting(
        0, "Most levels of density whose loss the search measures; 0: all of them.", ge=0
    )
    block: int = setting(
        0, "Tokens of a block of queries and keys; 0: a sixteenth of a window, 8 to 64.", ge=0
    )


class MixersSettings(AnalysisSettings):
    """Of `lens mixers`."""

    n: int = setting(4, "Prompts of the task, or windows of text, at most.", ge=2)
    block: int = setting(
        0, "Tokens of a block of queries and keys; 0: a sixteenth of a window, 8 to 64.", ge=0
    )


class ExplainSettings(_OnTask):
    """Of `lens explain`."""

    heads: Annotated[str, AfterValidator(check_heads)] | None = setting(
        None,
        "Heads to explain, with commas, e.g. L1H0,L1H2; the three that look most at such keys if not given.",
    )
    pairs: Literal["induction", "duplicate", "previous"] = setting(
        "induction",
        "Which keys: after earlier copies of the query's token, earlier copies, or the key before.",
    )
    by: Annotated[str, AfterValidator(check_groups)] = setting(
        ",".join(GROUPS),
        "What the section groups tells pairs apart by, with commas: offset (query less key), class of the two tokens.",
    )
    sizes: Annotated[str, AfterValidator(check_sizes)] = setting(
        "0.5,1,2",
        "Of the changes of attention logits in the section perturbation, L2 over those of a head, with commas.",
    )
    sections: Annotated[str, AfterValidator(check_explained)] = setting(
        ",".join(EXPLAIN_SECTIONS),
        "Which analyses to make, with commas: explain what wrote the logits, groups of pairs, removal of each part, subspace, "
        "retrieval_kinds, faithfulness of attention (of a large model the longest by far), mixing of tokens, adversary: other attention with the same "
        "answer, perturbation of attention logits.",
    )

    @property
    def sizes_of_changes(self) -> tuple[float, ...]:
        """The sizes as numbers, in the given order."""
        return tuple(map(float, listed(self.sizes)))


class ExamplesSettings(AnalysisSettings):
    """Of `lens examples`."""

    n: int = setting(256, "Windows of the corpus, at most.", ge=1)
    corpus: str | None = setting(
        None,
        "Text file to look through, or .jsonl of texts; the run's own text if not given.",
        shown=Shown(file=True),
        min_length=1,
    )
    top: int = setting(10, "Examples of each head and measure.", ge=1)
    chance: bool = setting(True, "The same with random weights, to compare with.")


class GenerateSettings(Section):
    """Of `lens generate`."""

    new: int = setting(32, "Tokens that the model writes after each text, at most.", ge=1)
    temperature: Annotated[str, AfterValidator(check_temperature)] = setting(
        "0", "Of the draws; 0 takes the likeliest token each time."
    )


class PatchSettings(_OnTask):
    """Of `lens patch`."""

    n: int = setting(8, "Prompts of the task, at most.", ge=2)
    streams: Annotated[str, AfterValidator(check_streams)] = setting(
        ",".join(STREAMS),
        "What is patched, with commas: the residual stream, attention, MLPs, single heads.",
    )
    direction: Literal["denoising", "noising"] = setting(
        "denoising", "From the clean run into the corrupt one, or the other way round."
    )
    corruption: Literal["counterfactual", "noise"] = setting(
        "counterfactual", "The task's paired prompts, or noise on the embeddings of its own."
    )
    noise: Annotated[str, AfterValidator(check_noise)] = setting(
        "3", "Of the noise, in standard deviations of the embeddings."
    )
    at: str | None = setting(
        None,
        "Mark of the task where the noise is, such as s2 of ioi; every token if not given.",
        min_length=1,
    )
    window: int = setting(
        1, "Layers whose attention or MLPs are patched together, the named one in the middle.", ge=1
    )

    @property
    def patched(self) -> tuple[str, ...]:
        """What is patched, one by one."""
        return tuple(listed(self.streams))

    @model_validator(mode="after")
    def _has_another_run(self) -> Self:
        if self.corruption == "counterfactual" and self.task in ("text", LABELS):
            raise ValueError(
                f"analysis.task {self.task} has no paired prompts to patch from; give analysis.corruption=noise, or a "
                "task that has them, e.g. induction"
            )
        if self.corruption == "counterfactual" and (self.at is not None or float(self.noise) != 3):
            name = "noise" if self.at is None else "at"
            raise ValueError(f"analysis.{name} goes with analysis.corruption=noise")
        return self


class CircuitSettings(_OnTaskOrLabels):
    """Of `lens circuit`."""

    method: Method = setting("eap-ig", "Of lens.circuits.score_edges.")
    steps: int = setting(5, "Of the integrated gradients.", ge=1, le=1_000)
    edges: int = setting(
        0, "Of the circuit; 0 takes the smallest one that is faithful enough.", ge=0
    )
    compare: str | None = setting(
        None,
        "Folder of another circuit run: what the two circuits share, beside chance.",
        min_length=1,
    )
    spans: Annotated[str | None, AfterValidator(check_spans)] = setting(
        None,
        "Places of the prompts, for edges at places and between them: marks (of the task's template, such as s2 of ioi), each "
        "(token), or first tokens and those past the last, e.g. first=1:26,second=26:51; not made if not given.",
        min_length=1,
    )

    @property
    def taken(self) -> int:
        """How many prompts of the task are read: `n` to make the circuit from, and as many to try it on."""
        return 2 * self.n

    @model_validator(mode="after")
    def _integrates(self) -> Self:
        if self.steps != type(self).model_fields["steps"].default and named(self.method)[1] is None:
            raise ValueError(
                f"analysis.steps is of integrated gradients, which {self.method} has none of; leave it out, or choose "
                "analysis.method=eap-ig"
            )
        return self

    @model_validator(mode="after")
    def _has_pairs(self) -> Self:
        if self.spans is not None and self.task in ("text", LABELS):
            raise ValueError(
                f"analysis.spans goes with a task that has paired prompts, such as ioi; {self.task} has none"
            )
        return self
