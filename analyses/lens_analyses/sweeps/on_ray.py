"""`lens sweep --engine ray`: every run is a task of Ray, here or on a cluster, tried again when its worker dies.

A task makes its run as the built-in engine does, in the same folder, which the machines of a cluster have to
share: a second try goes on where the first was killed.
"""

import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.runs import open_run
from lens_analyses.config import make_config
from lens_analyses.console import Output, log, one_line, stoppable, told_each_minute
from lens_analyses.sweeps.making import Item, folder_of, make

RETRIES = 3
"""How often a run is tried again whose worker died; what a run says itself is its answer."""
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def on_ray(
    items: Sequence[Item], runs: Path, output: Output, *, again: bool
) -> Iterator[tuple[int, Item]]:
    """Number and item of each run as it ends, as many at once as there are cores; Ctrl-C stops all in order.

    The cluster is that of `RAY_ADDRESS`, or one on this machine that ends with the sweep.

    Raises:
        LensError: Ray is not installed, or cannot be reached.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _QUIET.items()})
    try:
        import ray
    except ModuleNotFoundError as error:
        raise LensError(
            "--engine ray needs Ray; install it with pip install 'attention-lens[ray]'"
        ) from error
    address = os.environ.get("RAY_ADDRESS", "local")
    log.info("starting Ray (%s)", address)
    words = io.StringIO() if output.quiet else sys.stderr
    with redirect_stdout(words):  # where Ray says what died; ours is for the answer alone
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = one_line(str(error))
            raise LensError(f"Ray cannot be reached at {address}: {reason}") from error
        try:
            with stoppable(), told_each_minute(output, "sweep"):
                yield from _follow(ray, items, runs.resolve(), again)
        finally:
            ray.shutdown()


def _follow(ray: Any, items: Sequence[Item], runs: Path, again: bool) -> Iterator[tuple[int, Item]]:
    """Start every task, and give each item once its task has ended."""
    task = ray.remote(max_retries=RETRIES)(_task)
    graphics = bool(ray.cluster_resources().get("GPU"))
    waiting: dict[Any, int] = {}
    for number, item in enumerate(items):
        wanted = graphics and (item.config.model.device or "cpu").startswith("cuda")
        started = task.options(num_gpus=int(wanted)).remote(
            item.config.as_mapping(), str(runs), os.getcwd(), again
        )
        waiting[started] = number
    stopped = False
    while waiting:
        try:
            (done, *_), _ = ray.wait(list(waiting))
            number = waiting.pop(done)
        except KeyboardInterrupt:
            stopped = True
            for one in waiting:
                ray.cancel(one)  # raises KeyboardInterrupt in the task, which closes its run
            continue
        item = _ended(ray, done, items[number], runs, stopped)
        log.info("run %d of %d %s: %s", number + 1, len(items), item.status, item.config.command())
        yield number, item


def _ended(ray: Any, done: Any, item: Item, runs: Path, stopped: bool) -> Item:
    """The item with what its task answered, or why it has no answer."""
    try:
        answer = dict(ray.get(done))
    except ray.exceptions.RayError as error:
        left = folder_of(item.config, runs)
        if stopped:
            return replace(item, status="pending" if left is None else left.status, run=left)
        reason = f"its worker died {RETRIES + 1} times: {one_line(str(error))}"
        return replace(item, status="error", error=reason, run=left)
    run = answer.pop("run")
    return replace(item, run=run and open_run(runs / run), **answer)


def _task(mapping: Mapping[str, Any], runs: str, folder: str, again: bool) -> dict[str, Any]:
    """One run, in a worker: what changes in its item."""
    output = Output(quiet=True)
    with output.session(), chdir(folder):
        item = make(Item(make_config(mapping)), Path(runs), output, again=again)
    return {
        "status": item.status,
        "run": item.run and item.run.id,
        "computed": item.computed,
        "seconds": item.seconds,
        "error": item.error,
    }
