"""`lens run`: from a configuration to a finished run folder, completing what an earlier try left.

Prompts are captured one by one, the longest first, each into its own trace folder; after each the table of
prompts says that it is done. The head metrics are computed at the end from the traces on disk, so a run
that was interrupted ends with the same numbers as one that was not.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import lens
from lens.common.errors import LensError
from lens.figures.style import untemplated
from lens.runs import Run, open_run
from lens.runs.commands import again
from lens.runs.schema import PROMPT_KINDS
from lens.runs.writer import find_by_config
from lens.traces.store import remove_trace, trace_files
from lens_analyses import recurrent
from lens_analyses.analysing import analyse
from lens_analyses.config import RunConfig
from lens_analyses.config.analyses import GenerateSettings
from lens_analyses.console import Output, log, progress_bar, refused_as_usage
from lens_analyses.estimate import Estimate, Pace, expect, refuse_excess, work
from lens_analyses.inputs import load_model, plan, read_sources
from lens_analyses.making import Making, check_place, check_writable, making, prompt_row
from lens_analyses.planned import PlannedPrompt
from lens_analyses.provenance import versions
from lens_analyses.report import render, stored_headline
from lens_analyses.steps.subject import Subject, analysed

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel

_WORTH_AN_ESTIMATE = 60.0  # seconds of a run
_WORTH_A_LINE = 5.0  # seconds of a prompt; quicker ones are in log.txt only


@dataclass(frozen=True)
class Finished:
    """What `lens run` leaves.

    Attributes:
        run: the run folder.
        headline: the findings in words.
        computed: False if it was finished before.
        beside: of an encoder-decoder the runs of its other attentions, of stages of the earlier ones.
    """

    run: Run
    headline: list[str]
    computed: bool = True
    beside: tuple[Run, ...] = ()

    @property
    def status(self) -> str:
        """Of the first run that is not whole; "success" if all are."""
        return self._worst.status

    @property
    def was_stopped(self) -> bool:
        """Whether it ended before its time, by no error."""
        return self.status == "partial" and not self.error

    @property
    def error(self) -> dict[str, Any] | None:
        """Why that run is not whole; None where all are, or it was stopped."""
        return self._worst.meta["error"]

    @property
    def _worst(self) -> Run:
        return next((one for one in (self.run, *self.beside) if one.status != "success"), self.run)

    def text(self) -> str:
        """A few lines for people."""
        worst = self._worst
        prompts = worst.meta["prompts"]
        goes_on = f"the same command, or `{again(worst.path, worst.meta)}`,"
        failed = (self.error or {}).get("message")
        if self.was_stopped:
            sections = "".join(f", {name}" for name in worst.sections)
            return (
                f"stopped after {prompts['done']} of {prompts['total']} prompts{sections}; {goes_on} "
                f"completes {worst.path}"
            )
        lines = [] if self.computed else ["finished before (--again computes it anew)"]
        lines += [f"not whole: {failed}; {goes_on} tries it again"] if failed else []
        lines += self.headline
        lines += [f"run:    {self.run.path}", f"report: {self.run.path / 'report.html'}"]
        lines += [f"beside: {one.path}" for one in self.beside]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        report = self.run.path / "report.html"
        return {
            "id": self.run.id,
            "path": str(self.run.path),
            "status": self.status,
            "computed": self.computed,
            "prompts": self.run.meta["prompts"],
            "seconds": self.run.meta["seconds"],
            "findings": self.headline,
            "error": self.error,
            "report": str(report) if report.exists() else None,
            "beside": [str(one.path) for one in self.beside],
        }


@untemplated()
def execute(
    config: RunConfig,
    runs: Path,
    output: Output,
    *,
    again: bool = False,
    model: "LoadedModel | None" = None,
) -> Finished:
    """Make the run, or complete it, or find it finished; the model is loaded where it is not given.

    Raises:
        UsageError: the input makes no sense; then no folder is left.
        LensError: the model cannot be loaded, or another process is at this run.
    """
    check_place(runs)
    with refused_as_usage():
        config, sources = read_sources(config)
    mapping = config.as_mapping()
    run = readable(find_by_config(runs, mapping))
    if run and not again and run.status == "success" and (run.path / "report.html").exists():
        return Finished(run, stored_headline(run), computed=False)
    check_writable(runs)
    if model is None:
        log.info("loading %s", config.model.name)
        model = load_model(config)
    if not model.info.attending:
        with refused_as_usage():
            refuse_excess(config, model)
        alone = recurrent.execute(config, model, sources, runs, output, again)
        return Finished(alone.run, alone.headline)
    if model.parts and config.model.part is None:
        return _every_part(config, model, runs, output, again)
    config = config.fitted(model.info.parameters)
    with refused_as_usage():  # what cannot be done is refused now, not after the profile
        refuse_excess(config, model)
        planned = plan(model, config, sources)
        asked = analysed(config, model, planned)
    expected = expect(config, model, planned, *asked)
    if expected.seconds > _WORTH_AN_ESTIMATE:
        log.info("%s on this machine", expected.duration())
    with making(runs, mapping, _meta(config, model, planned), again=again) as made:
        _Execution(config, model, planned, made, output, expected).run()
    return Finished(made.run, made.headline)


def _every_part(
    config: RunConfig, model: "LoadedModel", runs: Path, output: Output, again: bool
) -> Finished:
    """A run for each attention of an encoder-decoder, or stage; the last one (cross-attention) with the others beside it.

    Where one was stopped the others are not begun.
    """
    done: list[Finished] = []
    for part in model.parts:
        one = config.model_copy(update={"model": config.model.model_copy(update={"part": part})})
        done.append(execute(one, runs, output, again=again, model=model.part(part)))
        if done[-1].was_stopped:
            break
    return replace(done[-1], beside=tuple(one.run for one in done[:-1]))


def readable(folder: Path | None) -> Run | None:
    """The run in a folder; None where there is none that can be read."""
    try:
        return None if folder is None else open_run(folder)
    except LensError:
        return None


class _Execution:
    """The steps of one run, between its first and its last line in `run.json`."""

    def __init__(
        self,
        config: RunConfig,
        model: "LoadedModel",
        planned: list[PlannedPrompt],
        made: Making,
        output: Output,
        expected: Estimate,
    ) -> None:
        self._config = config
        self._model = model
        self._planned = planned
        self._made = made
        self._writer = made.writer
        self._output = output
        self._expected = expected
        self._rows = [
            prompt_row(
                number,
                one.kind,
                one.title,
                one.text,
                one.ids,
                one.strings or model.token_strings(one.ids),
            )
            for number, one in enumerate(planned)
        ]

    def run(self) -> None:
        """All steps."""
        pace, start = Pace(self._expected.steps), time.monotonic()
        self._reuse()
        begun = self._writer.meta["prompts"]["done"]
        self._capture_all()
        self._score()
        pace.took("profile", None if begun else time.monotonic() - start)
        run, given = open_run(self._writer.path), tuple(one.prompt for one in self._planned)
        subject = Subject(self._model, run, self._config, self._output, given)
        self._made.error = analyse(subject, self._writer, pace)
        status = "success" if self._made.error is None else "partial"
        report = render(open_run(self._writer.path), status=status)
        report.write(self._writer)
        self._made.headline = report.headline

    def _reuse(self) -> None:
        """Take over the prompts that an earlier try finished."""
        try:
            run = open_run(self._writer.path)
            earlier = {record["prompt_id"]: record for record in run.prompts.to_dict("records")}
        except LensError:
            return
        for row, prompt in zip(self._rows, self._planned, strict=True):
            known = earlier.get(row["prompt_id"])
            ids = [*map(int, known["token_ids"])] if known else []
            if not known or known["status"] != "done" or ids[: len(prompt.ids)] != prompt.ids:
                continue
            try:
                run.trace(row["prompt_id"])
            except LensError as problem:
                log.info("%s is captured again: %s", row["prompt_id"], problem)
                continue
            names = ("loss", "loss_repeat", "status", "seconds", "tokens")
            row.update({name: known[name] for name in names} | {"token_ids": ids})
            row["token_strings"] = [*known["token_strings"]]
        self._save_prompts()
        done = self._writer.meta["prompts"]["done"]
        if done:
            log.info("%d of %d prompts were finished before", done, len(self._planned))

    def _capture_all(self) -> None:
        pending = [index for index, row in enumerate(self._rows) if row["status"] != "done"]
        pending.sort(key=lambda index: -len(self._planned[index].ids))
        costs = [work(self._model, len(self._planned[index].ids)) for index in pending]
        current = Path()
        finished = cost = 0.0

        def completed() -> float:
            """Each layer's file counts as soon as it is there."""
            return finished + cost * len(list(current.glob("layer-*"))) / len(
                self._model.info.attending
            )

        started = time.monotonic()
        with progress_bar(self._output, self._model.name, sum(costs), completed):
            for count, (index, cost) in enumerate(zip(pending, costs, strict=True), 1):
                row = self._rows[index]
                current = self._writer.path / "trace" / row["prompt_id"]
                remove_trace(current)
                self._capture(row, self._planned[index], current)
                finished, current = finished + cost, Path()
                log.log(
                    logging.INFO if row["seconds"] > _WORTH_A_LINE else logging.DEBUG,
                    "%s: %s tokens in %.1f s (%d of %d prompts, about %.0f s left)",
                    row["prompt_id"],
                    f"{row['tokens']:,}",
                    row["seconds"],
                    count,
                    len(pending),
                    (time.monotonic() - started) * (sum(costs) / finished - 1),
                )

    def _capture(self, row: dict[str, Any], prompt: PlannedPrompt, folder: Path) -> None:
        start = time.monotonic()
        how = {}
        asked, written = self._config.analysis, self._model.is_encoder_decoder  # as it was planned
        if isinstance(asked, GenerateSettings) and prompt.kind == "text" and not written:
            how = {"new": asked.new, "temperature": float(asked.temperature)}
        trace = lens.capture(
            self._model,
            prompt.prompt,
            block_size=self._config.capture.block_size,
            chunk=self._config.capture.chunk,
            keep_qk=self._config.capture.keep_qk,
            backend=self._config.capture.backend,
            out=folder,
            progress=False,
            seed=self._config.seed if how else prompt.seed,
            **how,
        )
        if how:  # what was written is part of the prompt from here on
            ids = trace.dataset["token_id"].values.tolist()
            row.update(tokens=len(ids), token_ids=ids, token_strings=trace.tokens)
        row["loss"], row["loss_repeat"] = self._losses(prompt, row["token_ids"])
        row.update(status="done", seconds=round(time.monotonic() - start, 3))
        self._writer.record(*(f"trace/{folder.name}/{name}" for name in trace_files(folder)))
        self._save_prompts()

    def _losses(self, prompt: PlannedPrompt, ids: list[int]) -> tuple[float, float]:
        """Mean loss of the prompt, and of the second copy from its second token on.

        The second copy's first token cannot be known from the first copy, so it does not count.
        """
        from lens.tasks.prompts import token_losses

        if len(ids) < 2 or (prompt.kind == "picture" and not self._model.is_encoder_decoder):
            return float("nan"), float("nan")
        try:
            if self._model.is_encoder_decoder:
                task = lens.tasks.language_modelling(self._model, [prompt.prompt])
                return float(task.evaluate(self._model)[0]), float("nan")
            losses = token_losses(self._model, ids)
        except LensError as error:
            self._writer.warn(f"no loss: {error}")
            return float("nan"), float("nan")
        repeated = self._config.prompts.copied_length - 1
        if prompt.kind != "copied" or not repeated:
            return float(losses.mean()), float("nan")
        return float(losses.mean()), float(losses[-repeated:].mean())

    def _save_prompts(self) -> None:
        done = sum(row["status"] == "done" for row in self._rows)
        tokens = sum(int(row["tokens"]) for row in self._rows)
        self._writer.meta["prompts"] = {"total": len(self._planned), "done": done, "tokens": tokens}
        self._writer.table("prompts", pd.DataFrame(self._rows))

    def _score(self) -> None:
        """Head metrics of each prompt and of each kind of prompt, from the traces on disk."""
        from lens_analyses.scoring import head_table

        run = open_run(self._writer.path)
        self._writer.update(backend=run.trace(run.traces[0]).attrs["backend"])
        pairs = zip(self._planned, self._rows, strict=True)
        given = [
            row["token_ids"] if prompt.given is None else prompt.given for prompt, row in pairs
        ]
        table = head_table(self._model, run, self._rows, given, self._config, self._writer.warn)
        self._writer.table("heads", table)


def _meta(config: RunConfig, model: "LoadedModel", planned: list[PlannedPrompt]) -> dict[str, Any]:
    starts_with_bos = model.bos_id is not None and planned[0].ids[0] == model.bos_id
    kinds = [prompt.kind for prompt in planned]
    counts = [
        f"{kinds.count(kind)} {kind} prompt{'s' if kinds.count(kind) > 1 else ''}"
        for kind in PROMPT_KINDS
        if kind in kinds
    ]
    return {
        "title": f"{model.describe()['name']} on {' and '.join(counts)}",
        "what": config.what,
        "task": getattr(config.analysis, "task", None),
        "command": config.command(),
        "model": model.describe(),
        "device": str(model.device),
        "backend": config.capture.backend,
        "block_size": config.capture.block_size,
        "seed": config.seed,
        "bos": "added" if starts_with_bos else "absent",
        "prompts": {"total": len(planned), "done": 0},
        "versions": versions(),
    }
