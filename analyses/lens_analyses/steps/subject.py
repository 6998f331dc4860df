"""`Subject`: what a step works on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens.common.errors import LensError
from lens.common.results import few
from lens.models.vocabulary import around, windows
from lens.runs import Run
from lens_analyses.config import CircuitSettings, RunConfig
from lens_analyses.config.analyses import (
    AnalysisSettings,
    GenerateSettings,
    PatchSettings,
    PoliciesSettings,
)
from lens_analyses.config.listed import layer_of, listed, spans_of
from lens_analyses.config.paths import is_task_file
from lens_analyses.config.prompts import PromptConfig, labelled_by
from lens_analyses.console import Output
from lens_analyses.inputs import read_sources
from lens_analyses.pictured import pictures_of, reads_pictures
from lens_analyses.planned import PlannedPrompt, Source
from lens_analyses.steps.run_circuits import other_run

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel
    from lens.policies import PerHead
    from lens.tasks import Task

_SHOWN = 10  # prompts that were left out, by line
Around = tuple[list[int], list[int]]
WINDOW = 128  # tokens of a window, where nothing else is asked for


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the run that profiled it.

    Attributes:
        model: loaded.
        run: with its prompts, head metrics and traces.
        config: of the run.
        output: whether to show progress.
        given: the run's prompts, as `lens.capture` takes them.
    """

    model: "LoadedModel"
    run: Run
    config: RunConfig
    output: Output
    given: tuple[Any, ...] = ()

    @property
    def settings(self) -> Any:
        """The section `analysis` of the configuration, of the model of its command."""
        return self.config.analysis

    @property
    def seed(self) -> int:
        """Of every draw."""
        return self.config.seed

    @property
    def progress(self) -> bool:
        """Whether a bar is shown."""
        return not self.output.quiet

    @property
    def work(self) -> Path:
        """Folder for half-done work, which a resumed step takes up; removed when the run is done."""
        folder = self.run.path / "work"
        folder.mkdir(exist_ok=True)
        return folder

    def prompts(self, kind: str) -> list[list[int]]:
        """Token ids of the run's prompts of a kind: `text` or `copied`."""
        table = self.run.prompts
        return [list(map(int, ids)) for ids in table.loc[table["kind"] == kind, "token_ids"]]

    @property
    def pictures(self) -> list[Any]:
        """The run's pictures as `lens.capture` takes them: paths, or pairs of a path and the question."""
        return pictures_of(self.config)

    @property
    def labelled(self) -> bool:
        """Whether the run has labelled prompts, which make its task."""
        return labelled_by(self.config.prompts) is not None

    def prompt_ids(self, kind: str) -> list[str]:
        """Names of the run's prompts of a kind, as its traces are called."""
        table = self.run.prompts
        return table.loc[table["kind"] == kind, "prompt_id"].tolist()

    @cached_property
    def length(self) -> int:
        """Tokens of a window of text."""
        return window_length(self.prompts("text"), around(self.model), self.settings)

    @cached_property
    def windows(self) -> "Task":
        """Predicting the run's own text, in windows of `length` tokens, at most `analysis.n`.

        Each window stands between the special tokens that the tokenizer puts round the whole text.

        Raises:
            LensError: no text, or one that is too short for two windows.
        """
        from lens.tasks import language_modelling

        found = windows_of(self.prompts("text"), around(self.model), self.settings)
        return language_modelling(self.model, found)

    @property
    def text_windows(self) -> list[list[int]]:
        """Token ids of `windows`."""
        return windows_of(self.prompts("text"), around(self.model), self.settings)

    @cached_property
    def task(self) -> "Task":
        """The task that the configuration names.

        Raises:
            LensError: an unknown task, or as that task for this model.
        """
        if self.labelled:
            return labelled_task(self.model, self.config)
        if self.settings.task == "text":
            return self.windows
        return named_task(self.model, self.settings.task, self.settings.n, self.seed)

    def left_out(self) -> list[str]:
        """What was left out of a file of prompts, in one sentence; nothing where all of it is used."""
        name = getattr(self.settings, "task", "text")
        if not (self.labelled or is_task_file(name)) or not self.task.dropped:
            return []
        shown = few(dropped := self.task.dropped, _SHOWN, "; ")
        if self.labelled:
            return [f"Of the labelled prompts some are left out: {shown}."]
        total = self.task.n + len(dropped)
        return [f"{len(dropped)} of {total} prompts of {Path(name).name} are left out: {shown}."]


def analysed(
    config: RunConfig, model: "LoadedModel", planned: list[PlannedPrompt]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts of the task and of the windows of text that an analysis will run on.

    Raises:
        LensError: as `corpus_of`, `windows_of`, `named_task`, `other_run`, `check_edges`, `find_spans` and `check_writes`, so that a
            run is refused before its profile.
    """
    settings, what = config.analysis, config.what
    _check_backend(model, config.capture.backend)
    if model.is_encoder_decoder:
        return [prompt.ids for prompt in planned], [prompt.ids for prompt in planned]
    _check_heads(model, getattr(settings, "heads", None) or getattr(settings, "overlays", None))
    if getattr(settings, "rule", None) == "act" and model.info.sees_later:
        raise LensError(
            f"{model.name} sees later tokens, and ACT is defined for causal models; choose another --rule, such as transfer"
        )
    if settings is not None and labelled_by(config.prompts) is not None:
        task = labelled_task(model, config)
        length = len(planned[0].ids) if reads_pictures(config) else task.length
        found = [[0] * length] * task.n
        return found, found if what == "sinks" else []
    if what == "examples":
        corpus_of(config)
    texts = [prompt.ids for prompt in planned if prompt.kind == "text"]
    if isinstance(settings, GenerateSettings):
        _check_writes(model, texts, settings)
    if settings is None or what in ("vision", "examples", "generate"):
        return [], []
    if isinstance(settings, CircuitSettings):
        if settings.task == "text" and not model.info.attending:
            raise LensError(
                f"the run of {model.name} has no profile, whose text --task text is; name a task, or a file of pairs"
            )
        if settings.compare is not None:
            other_run(settings.compare, model.name)
        if settings.edges:
            _check_edges(model, settings.edges)
    if isinstance(settings, PoliciesSettings) and settings.published is not None:
        published_heads(settings.published, model)
    task = getattr(settings, "task", "text")  # a sink is looked for in the text itself
    reads_text = task == "text" or (texts and what not in ("circuit", "patch"))
    found = windows_of(texts, around(model), settings) if reads_text else []
    if task == "text":
        return found, found
    made = named_task(model, task, settings.n, config.seed)
    if isinstance(settings, PatchSettings):
        _check_patch(made, settings)
    if isinstance(settings, CircuitSettings) and settings.spans is not None:
        _check_spans(made, settings.spans)
    return made.prompts, found


def _check_patch(task: "Task", settings: PatchSettings) -> None:
    """Raises LensError: prompts without pairs or of several lengths, or a mark that the task has not."""
    task.refuse_lengths("patching")
    if settings.corruption == "counterfactual":
        task.corrupt_or_refuse()
    elif settings.at is not None and settings.at not in task.marks:
        raise LensError(
            f"analysis.at must be a mark of the task ({', '.join(task.marks) or 'it has none'}), got {settings.at!r}"
        )


def _check_spans(task: "Task", words: str) -> None:
    """Raises LensError: places that the task's prompts have not, or prompts without pairs."""
    from lens.circuits.graph.spans import find_spans

    task.corrupt_or_refuse()
    find_spans(task, spans_of(words))


def corpus_of(config: RunConfig) -> list[Source]:
    """The texts in which examples are looked for: a corpus of its own, or what the run's prompts were cut from.

    Raises:
        LensError: no text, or as `read_sources`.
    """
    own = getattr(config.analysis, "corpus", None)
    if own is not None:
        name = "batch" if Path(own).suffix in (".jsonl", ".ndjson") else "text"
        prompts = PromptConfig.model_validate({name: own})
        config = config.model_copy(update={"prompts": prompts})
    _, sources = read_sources(config)
    if not sources:
        raise LensError(
            "examples are looked for in text, and the run has copied prompts alone; give --text FILE, "
            '--prompt "words", --text-name moby-dick or --corpus FILE'
        )
    return sources


def _check_backend(model: "LoadedModel", backend: str) -> None:
    """Raises LensError: a backend that this device or type of number has not got."""
    import torch
    from lens_kernels import explain

    probe = torch.zeros(1, 1, 1, model.info.head_dim, device=model.device, dtype=model.dtype)
    try:
        explain(probe, probe, probe, backend=backend)
    except ValueError as error:
        raise LensError(str(error)) from None


def _check_text(texts: list[list[int]]) -> None:
    if not texts:
        raise LensError(
            "this analysis needs text, and the run has copied prompts alone; give --prompt WORDS, --text FILE or "
            "--text-name moby-dick"
        )


def _check_writes(model: "LoadedModel", texts: list[list[int]], settings: GenerateSettings) -> None:
    from lens.passes.inputs import read_prompts
    from lens.traces.generated import check_writes

    _check_text(texts)
    for prompt in read_prompts(model, texts)[0]:
        check_writes(model, prompt, settings.new, float(settings.temperature))


def _check_heads(model: "LoadedModel", words: str | None) -> None:
    """Raises LensError: a head or layer that the model has not got, in words as `check_overlays` takes them."""
    for word in listed(words) if words else []:
        layer = layer_of(word)
        if layer is not None:
            model.info.check_layer(layer, f"layer {layer}")
        elif word != "mean":
            model.info.head(word)


def _check_edges(model: "LoadedModel", edges: int) -> None:
    """As `check_edges`; of a model without a graph the section says that it has none."""
    from lens.circuits.graph.mixed import check_edges

    try:
        check_edges(model, 0)
    except LensError:
        return
    check_edges(model, edges)


def published_heads(path: str, model: "LoadedModel") -> "PerHead":
    """The policies of a file of somebody else.

    Raises:
        LensError: no such file, none of policies, or of other heads.
    """
    from lens.policies.files import format_of, read

    format = format_of(path)
    heads = model.info.heads if format == "duo" else None
    found = read(path, format=format, heads=heads, as_searched=format == "minference")
    found.check(model)
    return found


def windows_of(texts: list[list[int]], pair: Around, settings: AnalysisSettings) -> list[list[int]]:
    """Token ids of at most `n` windows of `length` tokens, each between the texts' own special
    tokens (`pair`, as `lens.models.vocabulary.around` gives it).

    Raises:
        LensError: no text, or one that is too short for two windows.
    """
    _check_text(texts)
    length = window_length(texts, pair, settings)
    found = _cut(texts, pair, length)
    if len(found) < 2:
        raise LensError(
            f"the text gives {len(found)} window{'' if len(found) == 1 else 's'} of {length} tokens, at least 2 are needed; give "
            "more text (--tokens, --windows), or ask for shorter windows (--length)"
        )
    return found[: settings.n]


def window_length(texts: list[list[int]], pair: Around, settings: AnalysisSettings) -> int:
    """`settings.length`, or 128, or where texts are shorter the longest length that keeps half of them, if need be half a text.

    Half of all tokens must be in whole windows, and there must be two, if any length does that.
    """
    if settings.length is not None or not texts:
        return settings.length or WINDOW
    enough = sum(map(len, texts)) / 2
    tried = {min(WINDOW, size) for ids in texts for size in (len(ids), len(ids) // 2)}
    for length in sorted(tried, reverse=True):
        found = _cut(texts, pair, length) if length > 2 else []
        if len(found) > 1 and len(found) * length >= enough:
            return length
    return min(WINDOW, max(map(len, texts)))


def block_of(length: int, asked: int = 0) -> int:
    """Tokens of a block: so many as are asked for, or a power of two of which a window has about sixteen, 8 to 64.

    Example:
        >>> [block_of(length) for length in (32, 512, 9000)], block_of(512, 16)
        ([8, 32, 64], 16)
    """
    return asked or max(8, min(64, 2 ** ((length // 16).bit_length() - 1)))


def _cut(texts: list[list[int]], pair: Around, length: int) -> list[list[int]]:
    """Consecutive windows of each text, each between the text's own special tokens."""
    return [window for ids in texts for window in windows(ids, length, pair)]


def labelled_task(model: "LoadedModel", config: RunConfig) -> "Task":
    """The task of the labelled prompts of a run.

    Raises:
        LensError: as `lens.tasks.classification`.
    """
    from lens import tasks

    name, settings = labelled_by(config.prompts), config.analysis
    assert name is not None
    assert settings is not None
    path = getattr(config.prompts, name)
    return tasks.classification(model, path, n=settings.n, length=settings.length)


def named_task(model: "LoadedModel", name: str, n: int, seed: int) -> "Task":
    """A task of `lens.tasks`, or of a file, that is not the run's own text.

    Raises:
        LensError: as that task for this model, or a file that cannot be used.
    """
    from lens import tasks

    if is_task_file(name):
        if not Path(name).is_file():
            raise LensError(f"no file {name}; give a task, or a .jsonl file of prompts")
        return tasks.from_jsonl(model, name)
    return getattr(tasks, name)(model, n, seed)
