"""What a run is asked to do, as one frozen value: from flags and TOML, to TOML, and to a hash.

The configuration names the run: two runs with the same configuration are the same run, so a command that
was killed finds its own folder again. Needs no torch.
"""

import dataclasses
import difflib
import shlex
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lens.common.errors import LensError
from lens.models.catalogue import DEFAULT_MODEL

WHATS = ("profile", "heads", "sinks", "redistribute", "circuit")
_SOURCES = ("text", "text_name", "batch")
RULES = ("transfer", "mask", "drop", "logit_bias", "learned_sink", "off_by_one", "act")
"""Rules of `lens.redistribute` that need no more than a text."""
NOT_FROM_A_COMMAND = {
    "var": "it moves attention to an image, and the prompts here are text; use lens.edits.var",
    "pasta": "it needs the positions to emphasise, which differ from prompt to prompt; use "
    "lens.edits.pasta",
}
_SHARED = (
    "model.name",
    "prompts.text",
    "prompts.text_name",
    "prompts.tokens",
    "prompts.windows",
    "seed",
    "analysis.n",
)
SETTINGS_OF = {
    "run": (
        "model.name",
        "prompts.text",
        "prompts.text_name",
        "prompts.batch",
        "prompts.tokens",
        "prompts.windows",
        "prompts.copied",
        "prompts.copied_length",
        "capture.block_size",
        "seed",
        "model.dtype",
        "model.device",
        "model.revision",
        "capture.keep_qk",
    ),
    "heads": (*_SHARED, "prompts.copied", "analysis.task", "analysis.measures"),
    "sinks": (*_SHARED, "analysis.edits", "analysis.amounts"),
    "redistribute": (*_SHARED, "analysis.task", "analysis.rule", "analysis.amounts"),
    "circuit": (
        *_SHARED,
        "prompts.copied",
        "analysis.task",
        "analysis.method",
        "analysis.steps",
        "analysis.edges",
        "analysis.compare",
    ),
}
"""Command -> the settings that it has a flag for; --set takes the others."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    Attributes:
        name: embedded name, folder or hub id, as for `lens.load`.
        revision: of a hub model.
        dtype: of the weights; float32 on a CPU if None.
        device: where it runs; the CPU if None.
    """

    name: str = DEFAULT_MODEL
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class PromptConfig:
    """Which prompts; at most one of `text`, `text_name` and `batch`.

    Attributes:
        text: path of a text file.
        text_name: name of an embedded text.
        batch: path of a file of prompts, one a line (.txt), or JSON objects with "text" (.jsonl).
        sha256: of the file that was read, so that a rerun notices another one; set by the run.
        tokens: length of each text prompt; without it, all of the text is one prompt.
        windows: how many consecutive prompts of that length are cut from the text.
        copied: number of copied prompts (BOS + r + r, the probe for induction heads).
        copied_length: tokens of r.
    """

    text: str | None = None
    text_name: str | None = None
    batch: str | None = None
    sha256: str | None = None
    tokens: int | None = None
    windows: int | None = None
    copied: int = 4
    copied_length: int = 25


@dataclass(frozen=True)
class CaptureConfig:
    """How to look.

    Attributes:
        block_size: positions per block of the maps.
        keep_qk: store q and k, so that the viewer recomputes exact probabilities at any zoom.
        backend: of `lens_kernels`.
    """

    block_size: int = 64
    keep_qk: bool = True
    backend: str = "auto"


@dataclass(frozen=True)
class AnalysisConfig:
    """What is done beyond the profile; every kind of analysis reads the settings that concern it.

    Attributes:
        task: `induction`, `text` (predicting the run's own text), another task of `lens.tasks`, or
            the path of a JSONL file of prompts (`lens.tasks.from_jsonl`).
        n: prompts of the task.
        length: tokens of each window when the task is `text`.
        measures: of importance, with commas: `ablation/mean`, `gradient`, `attribution/counterfactual`.
        edits: of sinks, with commas.
        rule: of redistribution, one of `RULES`.
        amounts: of redistribution, with commas; the dose-response curve.
        method: of `lens.circuits.score_edges`.
        steps: of its integrated gradients.
        edges: of the circuit; 0 takes the smallest one that is faithful enough.
        compare: folder of another run of `lens circuit`, whose circuit is compared with this one's.
    """

    task: str = "induction"
    n: int = 32
    length: int = 128
    measures: str = "ablation/mean,ablation/zero,ablation/resample,gradient,attribution,direct"
    edits: str = "mask,drop,mean_value"
    rule: str = "transfer"
    amounts: str = "0,0.25,0.5,0.75,1"
    method: str = "eap-ig"
    steps: int = 5
    edges: int = 0
    compare: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "length"):
            if getattr(self, name) < 2:
                raise LensError(f"analysis.{name} must be at least 2, got {getattr(self, name)}")
        if self.rule in NOT_FROM_A_COMMAND:
            raise LensError(
                f"analysis.rule {self.rule!r} cannot be run from the command: "
                f"{NOT_FROM_A_COMMAND[self.rule]}"
            )
        if self.rule not in RULES:
            rules = ", ".join(RULES)
            raise LensError(f"analysis.rule must be one of {rules}; got {self.rule!r}")
        if self.steps < 1 or self.edges < 0:
            raise LensError(
                f"analysis.steps must be at least 1 and analysis.edges 0 or more, got {self.steps} and "
                f"{self.edges}"
            )


@dataclass(frozen=True)
class RunConfig:
    """The exact input of a run, as in its `config.toml`.

    Attributes:
        what: kind of analysis: `profile`, or a profile and then `heads`, `sinks`, `redistribute`
            or `circuit`.
        seed: of the copied prompts; prompt number i uses `seed + i`.
        model, prompts, capture, analysis: see there.
    """

    what: str = "profile"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)

    def __post_init__(self) -> None:
        prompts = self.prompts
        given = [name for name in _SOURCES if getattr(prompts, name) is not None]
        if len(given) > 1:
            raise LensError(
                f"only one source of text at a time, got prompts.{' and prompts.'.join(given)}"
            )
        if self.what not in WHATS:
            raise LensError(f"what must be one of {', '.join(WHATS)}, got {self.what!r}")
        if self.what == "profile" and self.analysis != AnalysisConfig():
            raise LensError(
                "the section analysis belongs to `lens heads`, `lens sinks`, `lens redistribute` and "
                "`lens circuit`; a profile has none"
            )
        for name in ("tokens", "windows", "copied_length"):
            value = getattr(prompts, name)
            if value is not None and value < 1:
                raise LensError(f"prompts.{name} must be at least 1, got {value}")
        if prompts.copied < 0:
            raise LensError(f"prompts.copied must be 0 or more, got {prompts.copied}")
        if self.capture.block_size < 1:
            raise LensError(
                f"capture.block_size must be at least 1, got {self.capture.block_size}; e.g. 64"
            )
        if prompts.windows is not None and (prompts.tokens is None or prompts.batch is not None):
            raise LensError(
                "prompts.windows cuts one text into pieces of prompts.tokens tokens: it needs "
                "prompts.tokens, and does not go with prompts.batch"
            )
        if not given and not prompts.copied:
            raise LensError("no prompt: give a text, or prompts.copied of at least 1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with `values` (nested, as in TOML) in place of the defaults.

        Raises:
            LensError: unknown name, wrong type, or a combination that makes no sense.
        """
        return _build(cls, values, "")

    @classmethod
    def load(cls, path: Path | None, overrides: Mapping[str, Any]) -> Self:
        """From a TOML file with dotted overrides (`{"prompts.tokens": 128}`) on top.

        Raises:
            LensError: the file is missing or no TOML, and as `from_mapping`.
        """
        values: dict[str, Any] = {} if path is None else _read_toml(path)
        if any(f"prompts.{name}" in overrides for name in _SOURCES):
            for name in (*_SOURCES, "sha256"):  # another text replaces the file's
                values.get("prompts", {}).pop(name, None)
        for dotted, value in overrides.items():
            *sections, last = dotted.split(".")
            table = values
            for section in sections:
                table = table.setdefault(section, {})
                if not isinstance(table, dict):
                    raise LensError(f"{dotted}: {section} is a value, not a section")
            table[last] = value
        return cls.from_mapping(values)

    @property
    def has_text(self) -> bool:
        """Whether a text is named, rather than copied prompts alone."""
        return any(getattr(self.prompts, name) is not None for name in _SOURCES)

    def as_mapping(self) -> dict[str, Any]:
        """Nested mapping without the values that are None, as TOML has none."""
        values = _without_none(dataclasses.asdict(self))
        if self.what == "profile":
            del values["analysis"]
        return values

    def command(self) -> str:
        """The command line that makes this run: the settings that are not the defaults, as flags."""
        verb = "run" if self.what == "profile" else self.what
        words = ["lens", verb, "--model", self.model.name]
        default = _without_none(dataclasses.asdict(RunConfig(what=self.what)))
        for section, values in self.as_mapping().items():
            if not isinstance(values, dict):
                values, section = {section: values}, ""
            for name, value in values.items():
                dotted = f"{section}.{name}".lstrip(".")
                known = default.get(section, default).get(name)
                alone = dotted == "prompts.copied" and not self.has_text
                skipped = dotted in ("model.name", "prompts.sha256")
                if (value != known or alone) and not skipped:
                    words += _flag(dotted, value, verb)
        return shlex.join(words)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["prompts.tokens=128"]` to `{"prompts.tokens": 128}`; values are TOML, bare words are strings.

    Raises:
        LensError: no `=`, or no name before it.
    """
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise LensError(
                f"--set takes name=value, got {assignment!r}; e.g. --set prompts.tokens=128"
            )
        try:
            found[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name.strip()] = value
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LensError(
            f"no configuration file {path}; each run folder has one, config.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise LensError(f"cannot read the configuration {path}: {error}") from None


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if name not in hints:
            raise LensError(_unknown(prefix, name, list(hints)))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise LensError(f"{dotted} is a section, got the value {value!r}")
            value = _build(hint, value, f"{dotted}.")
        elif not _fits(value, hint):
            raise LensError(f"{dotted} must be {_words(hint)}, got {value!r}")
        arguments[name] = value
    return cls(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return type(value) in allowed


def _words(hint: Any) -> str:
    names = {str: "a string", int: "an integer", bool: "true or false"}
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(names[one] for one in allowed if one in names)


def _unknown(prefix: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
    return f"unknown setting {prefix}{name}; {hint}"


def flag_name(dotted: str) -> str:
    """What a setting is called on the command line, without the dashes before it."""
    if dotted == "prompts.batch":
        return "prompts"
    return dotted.rpartition(".")[2].replace("_", "-")


def _flag(dotted: str, value: Any, verb: str) -> list[str]:
    """As `lens run`, or another command, takes it."""
    name = flag_name(dotted)
    if dotted not in SETTINGS_OF[verb]:
        return ["--set", f"{dotted}={value}"]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _without_none(mapping: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in mapping.items()
        if value is not None
    }
