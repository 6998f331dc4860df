"""From a sweep file to the list of its runs: every model with every analysis, on every task it has.

models = ["text-lm-3l", { name = "induction-2l", prompts = { copied = 8 } }]
analyses = ["profile", { what = "heads", tasks = ["induction", "text"], analysis = { n = 16 } }]

[settings]                     # of every run, as in its config.toml
prompts = { text_name = "moby-dick", tokens = 128, windows = 4, copied = 2 }

Settings of an analysis go on top of those of all runs; the prompts of a model take their place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.runs.writer import config_hash
from lens_analyses.config import CONFIGS, WHATS, RunConfig, make_config, settings_of
from lens_analyses.config.reading import read_toml
from lens_analyses.console import UsageError

_KEYS = ("title", "models", "analyses", "settings")
_WITH_TASK = [what for what, config in CONFIGS.items() if config.has_tasks()]
_EXAMPLE = 'e.g. models = ["text-lm-3l"] and analyses = ["profile", "heads"]'


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep file asks for.

    Attributes:
        title: for people.
        name: of the sweep's folder: the file's stem and a hash of the runs.
        runs: in the order in which they are made, one model after the other.
    """

    title: str
    name: str
    runs: tuple[RunConfig, ...]


def read_plan(path: Path) -> SweepPlan:
    """The plan of a TOML file.

    Raises:
        UsageError: no such file, no TOML, unknown or missing keys, or a run that makes no sense.
    """
    values = read_toml(path, "sweep file", _EXAMPLE)
    runs = make_runs(values)
    title = values.get("title", path.stem)
    if not isinstance(title, str):
        raise UsageError(f"title must be a string, got {title!r}")
    mappings = {"runs": [run.as_mapping() for run in runs]}
    return SweepPlan(title, f"{path.stem}-{config_hash(mappings)}", runs)


def make_runs(values: Mapping[str, Any]) -> tuple[RunConfig, ...]:
    """The runs of a sweep file's contents.

    Raises:
        UsageError: as `read_plan`.
    """
    if unknown := [key for key in values if key not in _KEYS]:
        raise UsageError(
            f"unknown in a sweep file: {', '.join(unknown)}; known: {', '.join(_KEYS)}"
        )
    settings = values.get("settings", {})
    if not isinstance(settings, Mapping):
        raise UsageError(f"settings is a section, got {settings!r}")
    models = [_named(one, "name", "models") for one in _listed(values, "models")]
    analyses = [_named(one, "what", "analyses") for one in _listed(values, "analyses")]
    found: dict[str, RunConfig] = {}
    for model in models:
        for analysis in analyses:
            for run in _runs(model, analysis, settings):
                twice = config_hash(run.as_mapping())
                if twice in found:
                    raise UsageError(f"the sweep has a run twice: {run.command()}")
                found[twice] = run
    return tuple(found.values())


def _listed(values: Mapping[str, Any], key: str) -> list[Any]:
    listed = values.get(key)
    if not isinstance(listed, list) or not listed:
        raise UsageError(f"a sweep file needs a list {key}, got {listed!r}; {_EXAMPLE}")
    return listed


def _named(one: Any, key: str, where: str) -> dict[str, Any]:
    table = {key: one} if isinstance(one, str) else one
    if not isinstance(table, dict) or not isinstance(table.get(key), str):
        raise UsageError(f"{where} holds names or tables with {key}, got {one!r}")
    return table


def _runs(
    model: dict[str, Any], analysis: dict[str, Any], settings: Mapping[str, Any]
) -> list[RunConfig]:
    """One run for each task of the analysis, or a single one."""
    own = {name: value for name, value in analysis.items() if name != "tasks"}
    what, tasks = own["what"], analysis.get("tasks")
    if what not in WHATS:
        raise UsageError(f"what must be one of {', '.join(WHATS)}, got {what!r}")
    shared = {name: value for name, value in settings.items() if name != "analysis"}
    if what != "profile":
        shared["analysis"] = _of_this(what, settings.get("analysis", {}))
    if "prompts" in model:
        shared["prompts"] = model["prompts"]
    named = {name: value for name, value in model.items() if name != "prompts"}
    base = _merged(_merged(shared, own), {"model": named})
    if tasks is None:
        return [make_config(base)]
    if what not in _WITH_TASK:
        raise UsageError(f"{what} has no task; tasks go with {', '.join(_WITH_TASK)}")
    if not isinstance(tasks, list) or not tasks:
        raise UsageError(f'tasks must be a list such as ["induction"], got {tasks!r}')
    return [make_config(_merged(base, {"analysis": {"task": task}})) for task in tasks]


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, section by section."""
    result = dict(base)
    for name, value in over.items():
        before = result.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            value = _merged(before, value)
        result[name] = value
    return result


def _of_this(what: str, shared: Any) -> Any:
    """The shared settings of analyses without those that only other analyses have."""
    if not isinstance(shared, Mapping):
        return shared
    names = {one: {setting.name for setting in settings_of(CONFIGS[one])} for one in WHATS}
    others = set().union(*names.values()) - names[what]
    return {name: value for name, value in shared.items() if f"analysis.{name}" not in others}
