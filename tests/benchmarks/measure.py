"""Times contenders in turn, measures their memory in processes of their own, and checks them first."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lens_kernels import attention
from torch import Tensor

from tests.benchmarks.cases import SDPA, Case, Contender, contenders

clock = time.perf_counter
"""What CPU rows are timed with; `--cpu-time` sets another."""


class WrongResultError(AssertionError):
    """A contender's numbers are wrong: no figure of it is reported."""


class LostDeviceError(RuntimeError):
    """The device answers nothing any more in this process: the row that was yielded last broke it."""


@dataclass(frozen=True)
class Row:
    """One contender on one case. NaN: not measured, `note` says why."""

    case: Case
    contender: str
    statistics: str
    rounds: int = 0
    median_ms: float = float("nan")
    min_ms: float = float("nan")
    ratio: float = float("nan")  # median over rounds of the time against SDPA in the same round
    ratio_low: float = float("nan")  # 95 % interval of that median, of six rounds and more
    ratio_high: float = float("nan")
    min_ratio: float = float("nan")  # of the fastest rounds
    tflops: float = float("nan")
    peak_mb: float = float("nan")
    error: float = float("nan")  # RMS error ratio of the output against SDPA
    note: str = ""
    wrong: bool = False
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # of the machine, with our own


def check_small(case: Case, contender: Contender) -> None:
    """Every statistic of ours against the float64 reference, with the case's flags at small sizes.

    Raises:
        WrongResultError: naming what is wrong.
    """
    from tests.kernels.helpers import rms_ratio

    if not contender.name.startswith("ours"):
        return
    small, backend = case.small(), contender.name.split("(")[1].rstrip(")")
    inputs, options = small.inputs(), small.options(contender.statistics)
    got = _results(inputs, options, backend)
    rounding, exact = _tolerance(case), 1e-5 if case.dtype == "float32" else 5e-5
    errors = {}
    for name, tensor in _results(inputs, options, "reference").items():
        rounded = "norm" in name or "attribution" in name or name.startswith("output")
        errors[name] = (rms_ratio(got[name], tensor), rounding if rounded else exact)
    wrong = {name: error for name, (error, limit) in errors.items() if not error <= limit}
    if wrong:
        raise WrongResultError(
            f"{contender.name} [{contender.statistics}] on {small.name}: {wrong}"
        )


def _results(
    inputs: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], backend: str
) -> dict[str, Tensor]:
    """Output, statistics and, where the inputs ask for them, gradients."""
    result = attention(*inputs, **options, backend=backend)
    found = {"output": result.output}
    if inputs[0].requires_grad:
        upstream = torch.sin(torch.arange(result.output.numel(), device=inputs[0].device))
        upstream = upstream.view(result.output.shape).to(result.output.dtype)
        gradients = torch.autograd.grad(result.output, inputs, upstream)
        names = ("query", "key", "value")
        found |= {f"output to {name}": x for name, x in zip(names, gradients, strict=True)}
    return found | {name: x for name, x in result.statistics.items() if name != "top_keys"}


def _tolerance(case: Case) -> float:
    return 1e-5 if case.dtype == "float32" else 2.0 * torch.finfo(getattr(torch, case.dtype)).eps


def error_to_stock(case: Case, output: Tensor, stock: Tensor) -> float:
    """RMS error ratio of an output at full size to stock attention's.

    Raises:
        WrongResultError: when it is above what rounding explains.
    """
    difference = (output.float() - stock.float()).square().mean().sqrt()
    ratio = float(difference / stock.float().square().mean().sqrt())
    if not ratio <= _tolerance(case):
        raise WrongResultError(f"output differs from SDPA's by {ratio:.1e} on {case.name}")
    return ratio


def measure_case(
    case: Case,
    seconds: float,
    progress: Callable[[str], None],
    known: Set[tuple[str, str]] = frozenset(),
) -> Iterator[Row]:
    """A row of each contender, as soon as it is there; about `seconds` of timing for the whole case.

    On the CPU all contenders run in turn, so that whatever else the machine does meets them alike; on a
    GPU each with the stock attention alone. What is wrong has a note and no figures (`Row.wrong`); what fails has a note.

    Args:
        known: names and statistics of contenders that are left out.

    Raises:
        LostDeviceError: behind the row of a contender that broke the device.
    """
    if case.device == "cuda" and not torch.cuda.is_available():
        note = "not measured: no CUDA device"
        yield from (Row(case, one.name, one.statistics, note=note) for one in contenders(case))
        return
    field = [one for one in contenders(case) if (one.name, one.statistics) not in known]
    if not field:
        return
    try:
        inputs = case.inputs()
        own = SDPA.prepare(case, inputs)
        stock = own().detach()
    except Exception as error:
        yield from (_failed(case, one, error) for one in field)
        _look_at_device(case)
        return
    calls: dict[Contender, Callable[[], object]] = {
        SDPA: functools.partial(_forward_backward, own, inputs) if case.backward else own
    }
    errors: dict[Contender, float] = {}
    rows: dict[Contender, Row] = {}
    together = case.device == "cpu"
    for one in field:
        progress(f"{case.name}: {one.name} {one.statistics}")
        found = _prepared(case, one, inputs, stock)
        if isinstance(found, Row):
            rows[one] = found
        else:
            call, errors[one] = found
            calls[one] = (
                functools.partial(_forward_backward, call, inputs) if case.backward else call
            )
        if not together:
            yield rows[one] if one in rows else _alone(case, one, calls, seconds, errors)
            calls = {SDPA: calls[SDPA]}
            _look_at_device(case)
    if together:
        times = _alternate(calls, case, seconds)
        peaks = {one: peak_memory(case, one) for one in calls}
        for one in field:
            yield rows[one] if one in rows else _row(case, one, times, peaks, errors)


def _prepared(
    case: Case, one: Contender, inputs: tuple[Tensor, Tensor, Tensor], stock: Tensor
) -> tuple[Callable[[], Tensor], float] | Row:
    """What computes the case and its error against the stock output, or a row that says why not."""
    refusal = one.refuses(case)
    if refusal is not None:
        return Row(case, one.name, one.statistics, note=f"not measured: {refusal}")
    try:
        check_small(case, one)
        call = one.prepare(case, inputs)
        output = call().detach()
        return call, error_to_stock(case, output, stock) if one.is_attention else math.nan
    except WrongResultError as error:
        return Row(case, one.name, one.statistics, note=f"wrong: {error}"[:200], wrong=True)
    except Exception as error:
        return _failed(case, one, error)


def _failed(case: Case, one: Contender, error: Exception) -> Row:
    said = (str(error).splitlines() or [""])[0][:100]
    note = f"not measured: {type(error).__name__}: {said}"
    return Row(case, one.name, one.statistics, note=note)


def _look_at_device(case: Case) -> None:
    """Raises LostDeviceError: an earlier kernel read or wrote where it must not, and everything fails from then on."""
    if case.device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise LostDeviceError(str(error)[:200]) from error


def _alone(
    case: Case,
    one: Contender,
    calls: dict[Contender, Callable[[], object]],
    seconds: float,
    errors: dict[Contender, float],
) -> Row:
    """One contender in turn with the stock attention."""
    share = seconds / 5
    try:
        times = _alternate({SDPA: calls[SDPA], one: calls[one]}, case, share)
        return _row(case, one, times, {one: peak_memory(case, one)}, errors)
    except Exception as error:
        return _failed(case, one, error)


def _forward_backward(call: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> None:
    output = call()
    torch.autograd.grad(output, inputs, output)


SLOW = 3.0
"""A contender that takes this many times as long as the stock attention runs in FEW rounds alone."""

FEW = 3


def _alternate(
    calls: dict[Contender, Callable[[], object]], case: Case, seconds: float
) -> dict[Contender, list[float]]:
    """Milliseconds of each round; NaN where a slow contender sat out, that the others have more rounds."""
    timer = _cuda_milliseconds if case.device == "cuda" else _milliseconds
    times: dict[Contender, list[float]] = {one: [] for one in calls}
    if case.device == "cuda":  # kernels are compiled at their first call
        for call in calls.values():
            call()
    first = {one: timer(call) for one, call in calls.items()}
    slow = {one for one, spent in first.items() if spent > SLOW * first[SDPA]}
    each = sum(spent for one, spent in first.items() if one not in slow)
    rounds = max(FEW, min(20, int(1000 * seconds / each)))
    for i in range(rounds):
        takes_part = i * FEW // rounds != (i - 1) * FEW // rounds
        for one, call in calls.items():
            times[one].append(timer(call) if takes_part or one not in slow else math.nan)
    return times


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval by order statistics, which asks nothing of the distribution; NaN of fewer than six values.

    Example:
        >>> interval_of_median([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
        (2.0, 8.0)
    """
    n, below, chance = len(values), 0, 0.0
    while (chance := chance + math.comb(n, below) / 2**n) <= 0.025:
        below += 1
    ordered = sorted(values)
    return (ordered[below - 1], ordered[n - below]) if below else (math.nan, math.nan)


def _milliseconds(call: Callable[[], object]) -> float:
    start = clock()
    call()
    return 1000 * (clock() - start)


def _cuda_milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _row(
    case: Case,
    one: Contender,
    times: dict[Contender, list[float]],
    peaks: dict[Contender, float],
    errors: dict[Contender, float],
) -> Row:
    both = [pair for pair in zip(times[one], times[SDPA], strict=True) if not math.isnan(pair[0])]
    mine, ratios = [pair[0] for pair in both], [spent / stock for spent, stock in both]
    median = statistics.median(mine)
    low, high = interval_of_median(ratios)
    return Row(
        case,
        one.name,
        one.statistics,
        rounds=len(mine),
        median_ms=median,
        min_ms=min(mine),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
        min_ratio=min(mine) / min(times[SDPA]),
        tflops=case.flops / median / 1e9,
        peak_mb=peaks[one],
        error=errors[one],
    )


def measure_long_prompt(progress: Callable[[str], None]) -> Row:
    """`lens.capture` at 16,384 tokens; the memory is that of its whole process.

    Raises:
        WrongResultError: when the capture fails.
    """
    case = Case("capture of 16,384 tokens, 2-layer Llama", 16384, 16384)
    progress(case.name)
    script = str(Path(__file__).with_name("long_prompt.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WrongResultError(f"{case.name}: {done.stderr.strip().splitlines()[-1]}")
    figures = json.loads(done.stdout)
    return Row(
        case,
        "lens.capture",
        "all",
        rounds=1,
        median_ms=1000 * figures["seconds"],
        min_ms=1000 * figures["seconds"],
        peak_mb=figures["peak_mb"],
    )


# --- memory ---


def peak_memory(case: Case, one: Contender) -> float:
    """Megabytes beyond the inputs at the highest point of one call, outputs included."""
    if case.device == "cuda":
        return _cuda_peak(case, one)
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    with ProcessPoolExecutor(1, mp_context=_server()) as pool:
        threads = torch.get_num_threads()
        return pool.submit(_cpu_peak, case, one.name, one.statistics, threads).result()


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """Fresh processes in which torch is loaded and no thread has started yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.benchmarks.cases", "lens_kernels.cpu", "lens_kernels.tiled"]
    )
    return context


def _cpu_peak(case: Case, name: str, statistics_set: str, threads: int) -> float:
    torch.set_num_threads(threads)
    (one,) = (x for x in contenders(case) if (x.name, x.statistics) == (name, statistics_set))
    small, inputs = case.small(), case.inputs()
    _whole(small, one, small.inputs())()  # loads libraries, starts threads
    call = _whole(case, one, inputs)
    if "Flex" in name:
        call()  # compiles
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _whole(
    case: Case, one: Contender, inputs: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], object]:
    call = one.prepare(case, inputs)
    return functools.partial(_forward_backward, call, inputs) if case.backward else call


def _status(field: str) -> int:
    """Kilobytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _cuda_peak(case: Case, one: Contender) -> float:
    inputs = case.inputs()
    call = _whole(case, one, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
