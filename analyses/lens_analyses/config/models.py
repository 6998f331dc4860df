"""The configuration of each command as a pydantic model: types, defaults, bounds and what a setting means."""

import shlex
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, field_validator, model_validator

from lens.common.files import shorten
from lens.models.catalogue import DEFAULT_MODEL, KNOWN, is_hub_id, unknown_model
from lens_analyses.config.analyses import (
    AnalysisSettings,
    CircuitSettings,
    ExamplesSettings,
    ExplainSettings,
    GenerateSettings,
    HeadsSettings,
    MixersSettings,
    PatchSettings,
    PoliciesSettings,
    RedistributeSettings,
    SinksSettings,
)
from lens_analyses.config.paths import is_folder
from lens_analyses.config.pictures import LABELS, PictureConfig
from lens_analyses.config.prompts import (
    OF_LABELS,
    SOURCES,
    LabelledConfig,
    PromptConfig,
    labelled_by,
)
from lens_analyses.config.settings import Section, Setting, Shown, setting, settings_of
from lens_analyses.config.vision import VisionSettings

Backend = Literal["auto", "triton", "cpu", "torch", "reference"]
_LARGEST_SEED = 2**32 - 1


def _known_model(name: str) -> str:
    if name not in KNOWN and not is_hub_id(name) and not is_folder(name):
        raise ValueError(unknown_model(shorten(name)))
    return name


class ModelConfig(Section):
    """Which model."""

    name: Annotated[str, AfterValidator(_known_model)] = setting(
        DEFAULT_MODEL,
        "Embedded name, folder or hub id.",
        shown=Shown(flag="--model", start=DEFAULT_MODEL, suggestions=lambda: KNOWN),
        min_length=1,
    )
    revision: str | None = setting(None, "Of a hub model.", shown=Shown(rare=True), min_length=1)
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = setting(
        None, "Of the weights; float32 on a CPU if not given.", shown=Shown(rare=True)
    )
    device: str | None = setting(
        None,
        "Where it runs: cpu, cuda or cuda:1; the CPU if not given.",
        shown=Shown(rare=True),
        min_length=1,
    )
    part: str | None = setting(
        None,
        "Of an encoder-decoder the attention to profile: encoder, decoder or cross; of a model of pictures with several grids the "
        "stage: stage0, stage1 and so on; each in a run of its own if not given.",
        shown=Shown(rare=True),
        pattern=r"^(encoder|decoder|cross|stage\d+)$",
    )

    @model_validator(mode="after")
    def _of_the_hub(self) -> Self:
        if self.revision is not None and (
            self.name in KNOWN or not is_hub_id(self.name) or is_folder(self.name)
        ):
            raise ValueError(
                f"model.revision goes with a hub id such as owner/name, not with {self.name}"
            )
        return self


class CaptureConfig(Section):
    """How to look."""

    block_size: int = setting(
        64,
        "Positions per block of the attention maps.",
        shown=Shown(rare=True),
        ge=1,
        le=2**31 - 1,
    )
    chunk: int | None = setting(
        None,
        "Tokens of a piece in which longer prompts go through the model, a multiple of block_size.",
        shown=Shown(rare=True),
        ge=1,
    )
    keep_qk: bool = setting(
        True, "Store q and k, for exact zoom in the viewer.", shown=Shown(rare=True)
    )
    backend: Backend = setting("auto", "Of the attention kernel.", shown=Shown(rare=True))

    @model_validator(mode="after")
    def _pieces_end_where_blocks_do(self) -> Self:
        if self.chunk is not None and self.chunk % self.block_size:
            raise ValueError(
                f"capture.chunk must be a multiple of capture.block_size, got {self.chunk} and "
                f"{self.block_size}"
            )
        return self


def _what(what: str) -> Any:
    return setting(what, "A profile of every head, or a profile and then this analysis.")


class RunConfig(Section):
    """The exact input of a run, as in its `config.toml`; this one of a profile, `lens run`."""

    what: Literal["profile"] = _what("profile")
    seed: int = setting(
        0, "Of every draw; copied prompt number i uses seed + i.", ge=0, le=_LARGEST_SEED
    )
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    capture: CaptureConfig = CaptureConfig()
    analysis: AnalysisSettings | None = None

    @field_validator("analysis", mode="before")
    @classmethod
    def _has_an_analysis(cls, value: Any) -> Any:
        if value is not None and cls is RunConfig:
            *others, last = (f"`lens {what}`" for what in WHATS if what != "profile")
            raise ValueError(
                f"the section analysis belongs to {', '.join(others)} and {last}; a profile has none"
            )
        return value

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        task = getattr(self.analysis, "task", None)
        if task == LABELS and labelled_by(self.prompts) is None:
            raise ValueError(
                f"the task {LABELS!r} is that of labelled prompts, which `lens heads`, `lens redistribute` and `lens circuit` "
                "take: give --images FOLDER or --labelled TABLE with it"
            )
        reads_pictures = isinstance(self.prompts, PictureConfig) or getattr(
            self.prompts, "images", None
        )
        if reads_pictures and getattr(self.analysis, "length", None) is not None:
            raise ValueError("analysis.length is of texts, and pictures have none; leave it out")
        return self

    @classmethod
    def has_tasks(cls) -> bool:
        """Whether the command names a task; `lens sinks` looks at its prompts alone, and a profile has none."""
        return "task" in getattr(type(cls.model_fields["analysis"].default), "model_fields", {})

    @property
    def has_text(self) -> bool:
        """Whether a text is named, rather than copied prompts alone."""
        return any(getattr(self.prompts, name, None) is not None for name in SOURCES)

    def fitted(self, parameters: int) -> Self:
        """With the defaults that follow from the size of the model, for a run that keeps its own configuration."""
        fit = getattr(self.analysis, "fitted", None)
        return self if fit is None else self.model_copy(update={"analysis": fit(parameters)})

    def value(self, name: str) -> Any:
        """Of a setting by its dotted name."""
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def settings(self) -> dict[str, Setting]:
        """Dotted name -> setting, of this command."""
        return {one.name: one for one in settings_of(type(self))}

    def as_mapping(self) -> dict[str, Any]:
        """Nested mapping without the values that are None, as TOML has none."""
        return self.model_dump(exclude_none=True)

    def command(self) -> str:
        """The command line that makes this run: the settings that are not the defaults, as flags."""
        words = ["lens", "run" if self.what == "profile" else self.what]
        for name, one in self.settings().items():
            value = self.value(name)
            alone = name == "prompts.copied" and not self.has_text
            if one.shown.internal or name == "what":
                continue
            if value != one.default or alone or name == "model.name":
                words += _flag(one, value)
        return shlex.join(words)


class _Labelled(RunConfig):
    """Of a command whose task may be labelled prompts: these bring their task with them."""

    prompts: LabelledConfig = LabelledConfig()  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="before")
    @classmethod
    def _takes_the_task(cls, given: Any) -> Any:
        prompts, analysis = (given.get(name) or {} for name in ("prompts", "analysis"))
        is_mapping = isinstance(prompts, dict) and isinstance(analysis, dict)
        if cls.has_tasks() and is_mapping and any(prompts.get(name) for name in OF_LABELS):
            return {**given, "analysis": {"task": LABELS, **analysis}}
        return given

    @model_validator(mode="after")
    def _takes_no_other_task(self) -> Self:
        task = getattr(self.analysis, "task", None)
        if self.has_tasks() and labelled_by(self.prompts) is not None and task != LABELS:
            raise ValueError(f"labelled prompts are a task of their own, {LABELS!r}; got {task!r}")
        return self


class HeadsConfig(_Labelled):
    """Of `lens heads`."""

    what: Literal["heads"] = _what("heads")
    analysis: HeadsSettings = HeadsSettings()


class SinksConfig(_Labelled):
    """Of `lens sinks`."""

    what: Literal["sinks"] = _what("sinks")
    analysis: SinksSettings = SinksSettings()


class RedistributeConfig(_Labelled):
    """Of `lens redistribute`."""

    what: Literal["redistribute"] = _what("redistribute")
    analysis: RedistributeSettings = RedistributeSettings()


class PoliciesConfig(RunConfig):
    """Of `lens policies`."""

    what: Literal["policies"] = _what("policies")
    analysis: PoliciesSettings = PoliciesSettings()


class MixersConfig(RunConfig):
    """Of `lens mixers`."""

    what: Literal["mixers"] = _what("mixers")
    analysis: MixersSettings = MixersSettings()


class VisionConfig(RunConfig):
    """Of `lens vision`."""

    what: Literal["vision"] = _what("vision")
    prompts: PictureConfig = PictureConfig()  # pyright: ignore[reportIncompatibleVariableOverride]
    analysis: VisionSettings = VisionSettings()

    @model_validator(mode="after")
    def _emphasises_a_question(self) -> Self:
        if self.analysis.emphasise is not None and self.prompts.question is None:
            raise ValueError("analysis.emphasise names words of a question; give it with --text")
        return self

    @model_validator(mode="after")
    def _has_all_that_are_named(self) -> Self:
        if self.prompts.images is None and self.analysis.n != VisionSettings().n:
            raise ValueError(
                "analysis.n takes some of the pictures of --images; each one of --image is taken"
            )
        return self


class ExplainConfig(RunConfig):
    """Of `lens explain`."""

    what: Literal["explain"] = _what("explain")
    analysis: ExplainSettings = ExplainSettings()


class ExamplesConfig(RunConfig):
    """Of `lens examples`."""

    what: Literal["examples"] = _what("examples")
    analysis: ExamplesSettings = ExamplesSettings()


class GenerateConfig(RunConfig):
    """Of `lens generate`."""

    what: Literal["generate"] = _what("generate")
    analysis: GenerateSettings = GenerateSettings()  # pyright: ignore[reportIncompatibleVariableOverride]


class PatchConfig(RunConfig):
    """Of `lens patch`."""

    what: Literal["patch"] = _what("patch")
    analysis: PatchSettings = PatchSettings()


class CircuitConfig(_Labelled):
    """Of `lens circuit`."""

    what: Literal["circuit"] = _what("circuit")
    analysis: CircuitSettings = CircuitSettings()


CONFIGS: dict[str, type[RunConfig]] = {
    "profile": RunConfig,
    "heads": HeadsConfig,
    "sinks": SinksConfig,
    "redistribute": RedistributeConfig,
    "policies": PoliciesConfig,
    "mixers": MixersConfig,
    "explain": ExplainConfig,
    "vision": VisionConfig,
    "examples": ExamplesConfig,
    "generate": GenerateConfig,
    "patch": PatchConfig,
    "circuit": CircuitConfig,
}
"""What a run does -> its configuration."""
WHATS = tuple(CONFIGS)


def _flag(one: Setting, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [one.flag if value else f"--no-{one.flag[2:]}"]
    return [one.flag, str(value)]
