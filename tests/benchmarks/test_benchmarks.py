"""The benchmark's gate, goals and files; no test here depends on how fast the machine is."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lens_kernels import attention

from tests.benchmarks import cases, goals, long_prompt, measure, profile_gpu, report, run

TINY = replace(cases.QUICK[0], name="tiny", queries=150, keys=150, heads=2, kv_heads=1, head_dim=24)
FIELD = {f"{one.name} {one.statistics}": one for one in cases.contenders(TINY)}


def silent(text: str) -> None:
    assert text


@pytest.fixture(autouse=True)
def no_subprocesses(monkeypatch):
    monkeypatch.setattr(measure, "peak_memory", lambda case, one: 1.5)


def test_every_case_has_a_name_of_its_own_and_flags_that_survive_shrinking():
    names = [(case.device, case.name) for case in cases.CASES]
    assert len(set(names)) == len(names)
    for case in cases.CASES:
        small = case.small()
        assert small.queries * small.keys <= 208**2
        kept = ("heads", "kv_heads", "head_dim", "dtype", "causal", "backward")
        assert [getattr(small, name) for name in kept] == [getattr(case, name) for name in kept]
        assert (small.window is None) == (case.window is None)
        assert (small.queries == 1) == (case.queries == 1)


@pytest.mark.parametrize(
    ("window", "pairs"), [(None, 150 * 151 / 2), (40, 150 * 151 / 2 - 110 * 111 / 2), (200, 11325)]
)
def test_flops_count_visible_pairs(window, pairs):
    case = replace(TINY, window=window)
    visible = torch.ones(150, 150).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    assert visible.sum() == pairs
    assert case.flops == 4 * pairs * 2 * 24


@pytest.mark.parametrize("window", [None, 41])
@pytest.mark.parametrize("name", ["SDPA ", "eager with weights ", "ours (cpu) lse"])
def test_contenders_compute_the_same(name, window):
    case = replace(TINY, window=window)
    inputs = case.inputs()
    expected = attention(*inputs, **case.options("lse"), backend="reference").output
    output = FIELD[name].prepare(case, inputs)()
    assert measure.error_to_stock(case, output, expected) < 1e-5


def test_rows_of_a_tiny_case():
    rows = list(measure.measure_case(TINY, 0.01, silent))
    assert [row.contender for row in rows] == [one.name for one in cases.contenders(TINY)]
    assert all(
        row.rounds >= 3 and row.min_ms <= row.median_ms and row.peak_mb == 1.5 for row in rows
    )
    assert (rows[0].contender, rows[0].ratio, rows[0].error) == ("SDPA", 1.0, 0.0)
    errors = {row.contender: row.error for row in rows[1:]}
    assert math.isnan(errors.pop("matrix products alone"))
    assert all(0 < error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("flops", [10**6, 7 * 10**9])
def test_the_products_alone_are_as_many_operations(monkeypatch, flops):
    monkeypatch.setattr(cases.Case, "flops", flops)
    made = []

    def counted(left, right, out):
        made.append(2 * left.shape[0] * left.shape[1] * right.shape[1])
        assert out.shape == (left.shape[0], right.shape[1])

    monkeypatch.setattr(cases.torch, "mm", counted)
    cases.PRODUCTS.prepare(TINY, TINY.inputs())()
    assert sum(made) == pytest.approx(flops, abs=2 * 1024 * 1024)


def test_slow_contenders_sit_out_and_are_held_against_their_own_rounds(monkeypatch):
    quick, slow = FIELD["ours (cpu) lse"], FIELD["eager with weights "]
    ran = {cases.SDPA: 0, quick: 0, slow: 0}

    def timer(call):
        ran[call] += 1
        return {cases.SDPA: 1.0, quick: 0.5, slow: 40.0}[call]

    monkeypatch.setattr(measure, "_milliseconds", timer)
    times = measure._alternate({one: one for one in ran}, TINY, 0.015)
    assert {one: count - 1 for one, count in ran.items()} == {cases.SDPA: 10, quick: 10, slow: 3}
    assert [i for i, spent in enumerate(times[slow]) if not math.isnan(spent)] == [0, 4, 7]
    times[cases.SDPA] = [10.0 if i in (0, 4, 7) else 1.0 for i in range(10)]
    peaks = errors = dict.fromkeys(ran, 1.0)
    assert measure._row(TINY, slow, times, peaks, errors).ratio == 4.0
    row = measure._row(TINY, quick, times, peaks, errors)
    assert (row.ratio, row.ratio_low, row.ratio_high, row.rounds) == (0.5, 0.05, 0.5, 10)
    row = measure._row(TINY, slow, times, peaks, errors)
    assert row.rounds == 3
    assert math.isnan(row.ratio_low)


@pytest.mark.parametrize("rounds", [3, 5, 6, 9, 20, 41])
def test_the_interval_of_a_median_is_scipys(rounds):
    from scipy import stats

    values = torch.rand(rounds, generator=torch.Generator().manual_seed(rounds)).tolist()
    own = measure.interval_of_median(values)
    median = sorted(values)[rounds // 2]
    found = stats.quantile_test(values, q=median)  # pyright: ignore[reportAttributeAccessIssue]
    expected = found.confidence_interval(0.95)
    assert own == pytest.approx(tuple(expected), nan_ok=True)


def test_a_wrong_output_is_never_reported(monkeypatch):
    wrong = replace(
        FIELD["ours (cpu) lse"],
        name="stock with an error",
        prepare=lambda case, inputs: lambda: 1.001 * cases.SDPA.prepare(case, inputs)(),
    )
    monkeypatch.setattr(measure, "contenders", lambda case: [cases.SDPA, wrong])
    right, found = measure.measure_case(TINY, 0.01, silent)
    assert not right.wrong
    assert found.wrong
    assert found.note.startswith("wrong: output differs from SDPA's by 1.0e-03")
    assert math.isnan(found.median_ms)


def test_a_wrong_statistic_is_never_reported(monkeypatch):
    honest = measure._results

    def broken(inputs, options, backend):
        found = honest(inputs, options, "reference")
        if backend == "cpu":
            found["block_mass"] = found["block_mass"].roll(1, -1)
        return found

    monkeypatch.setattr(measure, "_results", broken)
    with pytest.raises(measure.WrongResultError, match=r"ours \(cpu\) \[rows \+ blocks\].*block_m"):
        measure.check_small(TINY, FIELD["ours (cpu) rows + blocks"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_rows_say_so():
    case = next(case for case in cases.CASES if case.device == "cuda")
    rows = list(measure.measure_case(case, 1.0, silent))
    assert {row.note for row in rows} == {"not measured: no CUDA device"}
    page = report.to_markdown(report.records(rows), "command")
    assert "## CUDA: none" in page
    assert "not measured (no such device here): causal 8,192" in page


def test_what_refuses_a_case_is_noted(monkeypatch):
    big = replace(FIELD["eager with weights "], refuses=lambda case: "needs 99 GB")
    monkeypatch.setattr(measure, "contenders", lambda case: [cases.SDPA, big])
    rows = list(measure.measure_case(TINY, 0.01, silent))
    assert rows[1].note == "not measured: needs 99 GB"
    page = report.to_markdown(report.records(rows), "command")
    assert "| eager with weights | - | not measured: needs 99 GB |" in page


def test_eager_is_refused_where_it_does_not_fit():
    assert FIELD["eager with weights "].refuses(TINY) is None
    long = replace(TINY, queries=16384, keys=16384, heads=8)
    assert FIELD["eager with weights "].refuses(long) == "needs 26 GB"


def record(**changes):
    known = {
        "case": goals.CPU,
        "device": "cpu",
        "contender": "ours (cpu)",
        "statistics": "rows + blocks",
        "median_ms": "100",
        "ratio_to_sdpa": "0.9",
        "peak_mb": "10",
        "tflops": "",
    }
    return known | changes


OF_CPU, OF_GPU = goals.GOALS.values()


@pytest.mark.parametrize(
    ("ratio", "verdict"), [("0.6", "met, stretch too"), ("0.7", "met"), ("0.71", "**missed**")]
)
def test_goals_are_judged(ratio, verdict):
    text, figure, found = OF_CPU[0].line([record(ratio_to_sdpa=ratio)])
    assert "0.70 x SDPA (stretch 0.60)" in text
    assert (figure, found) == (f"{float(ratio):.2f} x", verdict)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        ("0.50", "0.60", "met, stretch too"),
        ("0.59", "0.61", "met"),
        ("0.50", "0.71", "undecided"),
        ("0.71", "0.90", "**missed**"),
    ],
)
def test_a_goal_is_judged_by_both_ends_of_its_interval(low, high, verdict):
    found = OF_CPU[0].line([record(ratio_to_sdpa="0.6", ratio_low=low, ratio_high=high)])
    assert found[1:] == (f"0.60 x [{low}, {high}]", verdict)


def test_goals_of_two_rows_and_of_none():
    faster, memory = (
        next(goal for goal in OF_CPU if words in goal.text) for words in ("eager with", "eager's")
    )
    rows = [
        record(),
        record(contender="eager with weights", statistics="", median_ms="790", peak_mb="1000"),
        record(statistics="rows + blocks + columns", peak_mb="20"),
    ]
    assert faster.line(rows)[1:] == ("7.90 x", "**missed**")
    assert memory.line(rows)[1:] == ("2.0%", "met")
    assert faster.line(rows[:1])[1:] == ("not measured", "-")


def test_every_goal_has_its_rows():
    """Of either device: what a goal reads is what the registry measures."""
    rows = [
        record(
            case=case.name,
            device=case.device,
            contender=one.name,
            statistics=one.statistics,
            tflops="1",
        )
        for case in cases.CASES
        for one in cases.contenders(case)
    ]
    rows.append(record(case=goals.CAPTURE, contender="lens.capture", statistics="all"))
    lines = [goal.line(rows) for goal in (*OF_CPU, *OF_GPU)]
    assert [line for line in lines if line[1] == "not measured"] == []


def test_the_page_is_that_of_its_rows():
    folder = Path(report.__file__).parent
    page = report.to_markdown(
        report.read_csv(folder / "results.csv"), "python tests/benchmarks/run.py"
    )
    assert (folder / "RESULTS.md").read_text() == page


def test_rows_of_an_absent_device_stay():
    cpu, gpu = record(), record(device="cuda", case="causal 8,192")
    absent = gpu | {"median_ms": ""}
    assert report.merge([cpu, gpu], [cpu | {"median_ms": "90"}, absent]) == [
        cpu | {"median_ms": "90"},
        gpu,
    ]
    assert report.merge([], [cpu, absent]) == [cpu, absent]


def test_csv_comes_back(tmp_path):
    rows = report.records(list(measure.measure_case(TINY, 0.01, silent)))
    path = tmp_path / "results.csv"
    path.write_text(report.to_csv(rows))
    assert report.read_csv(path) == rows
    assert report.read_csv(tmp_path / "none.csv") == []
    header = next(csv.reader(path.read_text().splitlines()))
    assert {"device_name", "torch", "commit", "peak_mb", "ratio_to_sdpa"} <= set(header)


def test_quick_prints_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(cases, "QUICK", (TINY,))
    monkeypatch.setattr(measure, "_alternate", lambda calls, *_: {one: [2.0, 3.0] for one in calls})
    assert run.main(["--quick"]) == 0
    assert "### tiny (2 heads x 24, float32)" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_full_run_writes_both_files(monkeypatch, tmp_path):
    captured = measure.Row(TINY, "lens.capture", "all", peak_mb=1000.0, median_ms=1.0)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(cases, "CASES", (TINY,))
    monkeypatch.setattr(measure, "_alternate", lambda calls, *_: {one: [2.0, 3.0] for one in calls})
    monkeypatch.setattr(measure, "measure_long_prompt", lambda progress: captured)
    assert run.main([]) == 0
    assert (
        "| lens.capture | all | 1.0 | - | - | - | 1000.0 |" in (tmp_path / "RESULTS.md").read_text()
    )
    assert len(report.read_csv(tmp_path / "results.csv")) == len(FIELD) + 1


def test_a_wrong_kernel_is_told_and_the_others_stay(monkeypatch, capsys, tmp_path):
    wrong = measure.Row(TINY, "ours (cpu)", "all", note="wrong: block_mass: 0.3", wrong=True)
    right = measure.Row(TINY, "SDPA", "", median_ms=2.0)
    monkeypatch.setattr(cases, "CASES", (TINY,))
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(measure, "measure_case", lambda *_: iter([wrong, right]))
    monkeypatch.setattr(measure, "measure_long_prompt", lambda progress: right)
    assert run.main([]) == 1
    assert "is not reported: wrong: block_mass: 0.3" in capsys.readouterr().err
    notes = [row["note"] for row in report.read_csv(tmp_path / "results.csv")]
    assert notes == ["wrong: block_mass: 0.3", "", ""]


def test_what_is_measured_stays_when_the_machine_is_taken_away(monkeypatch, tmp_path):
    def taken(case, *_):
        yield measure.Row(case, "SDPA", "", median_ms=2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "CASES", (TINY, replace(TINY, name="other", device="cuda")))
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(measure, "measure_case", taken)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--device", "cuda", "--out", str(tmp_path / "out")])
    rows = report.read_csv(tmp_path / "out" / "results.csv")
    assert [(row["case"], row["median_ms"]) for row in rows] == [("other", "2.00")]


class CompilationError(Exception):
    """Of no kind that torch raises, like Triton's."""


def failing(name, at):
    """A contender that cannot be made ("prepare"), fails when it is timed ("time"), or breaks the device ("device")."""

    def prepare(case, inputs):
        if at == "prepare":
            raise CompilationError(f"{name}:\nno registers")
        called = []

        def call():
            called.append(1)
            if at == "time" and len(called) > 1:
                raise CompilationError(name)
            broken.extend([name] if at == "device" else [])
            return cases.SDPA.prepare(case, inputs)()

        return call

    broken: list[str] = []
    return replace(FIELD["eager with weights "], name=name, prepare=prepare), broken


@pytest.fixture
def simulated(monkeypatch, tmp_path):
    """A GPU that is the CPU, with one case; what breaks it says so when it is waited for."""

    def of(*field):
        def wait():
            if any(broken for _, broken in field):
                raise torch.AcceleratorError("illegal memory access")

        case = replace(TINY, name="small", device="cuda")
        monkeypatch.setattr(cases, "CASES", (case,))
        monkeypatch.setattr(cases.Case, "inputs", lambda case: TINY_INPUTS)
        monkeypatch.setattr(
            measure, "contenders", lambda case: [cases.SDPA, *(one for one, _ in field)]
        )
        monkeypatch.setattr(measure, "_cuda_milliseconds", lambda call: (call(), 2.0)[1])
        monkeypatch.setattr(report, "_device_name", lambda device: "simulated")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", wait)
        monkeypatch.setattr(run, "HERE", tmp_path / "here")
        return tmp_path / "out"

    return of


TINY_INPUTS = TINY.inputs()
ON_GPU = ("--device", "cuda", "--go-on", "--out")


def notes(folder):
    found = report.read_csv(folder / "results.csv")
    return [(row["contender"], row["median_ms"], row["note"]) for row in found]


def test_whatever_one_raises_the_others_are_measured(simulated):
    field = [failing("a", "prepare"), failing("b", "time"), failing("c", "never")]
    out = simulated(*field)
    assert run.main([*ON_GPU, str(out)]) == 0
    assert notes(out) == [
        ("SDPA", "2.00", ""),
        ("a", "", "not measured: CompilationError: a:"),
        ("b", "", "not measured: CompilationError: b"),
        ("c", "2.00", ""),
    ]


def test_a_run_goes_on_where_it_was_cut_off(simulated, monkeypatch):
    out = simulated(failing("a", "never"), failing("b", "prepare"), failing("c", "never"))
    whole = measure.measure_case

    def taken(*given):
        for number, row in enumerate(whole(*given)):
            yield row
            if number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_case", taken)
    with pytest.raises(KeyboardInterrupt):
        run.main([*ON_GPU, str(out)])
    monkeypatch.setattr(measure, "measure_case", whole)
    said = []
    monkeypatch.setattr(
        measure,
        "_prepared",
        lambda case, one, *_, real=measure._prepared: (said.append(one.name), real(case, one, *_))[
            1
        ],
    )
    assert run.main([*ON_GPU, str(out)]) == 0
    assert said == ["b", "c"]
    assert [name for name, *_ in notes(out)] == ["SDPA", "a", "b", "c"]
    monkeypatch.setattr(report, "_commit", lambda: "another")
    assert run.main([*ON_GPU, str(out)]) == 0
    assert said == ["b", "c", "SDPA", "a", "b", "c"]


def test_a_lost_device_is_left_to_a_process_that_starts_anew(simulated, monkeypatch):
    field = [failing("a", "never"), failing("b", "device"), failing("c", "never")]
    out, started = simulated(*field), []
    monkeypatch.setattr(run.os, "execv", lambda path, words: started.append(words[1:]))
    run.main([*ON_GPU, str(out)])
    assert started == [[run.__file__, *ON_GPU, str(out)]]
    found = notes(out)
    assert [name for name, *_ in found] == ["SDPA", "a", "b"]
    assert found[2][2] == "broke the device: illegal memory access"
    assert (
        run.main(["--only", "small", *ON_GPU, str(out)]) == 1
    )  # it keeps no rows: it would start anew for ever
    assert len(started) == 1
    field[1][1].clear()
    assert run.main([*ON_GPU, str(out)]) == 0
    assert [name for name, *_ in notes(out)] == ["SDPA", "a", "b", "c"]


def test_rows_of_a_device_that_was_not_asked_for_stay():
    cpu, gpu = record(), record(device="cuda", median_ms="")
    assert report.merge([gpu], [cpu]) == [cpu, gpu]


def test_half_types_have_their_own_tolerance(monkeypatch):
    case = replace(TINY, dtype="bfloat16")
    contender = next(one for one in cases.contenders(case) if one.name == "ours (cpu)")
    honest = measure._results

    def off_by(share):
        def results(inputs, options, backend):
            found = honest(inputs, options, backend)
            if backend == "cpu":
                found["lse"] = found["lse"] * (1 + share)
            return found

        return results

    monkeypatch.setattr(measure, "_results", off_by(3e-5))
    measure.check_small(case, contender)
    monkeypatch.setattr(measure, "_results", off_by(1e-4))
    with pytest.raises(measure.WrongResultError, match="lse"):
        measure.check_small(case, contender)


def test_nobody_measures_the_slow_path_on_a_gpu():
    gpu = [case for case in cases.CASES if case.device == "cuda"]
    assert {one.name for case in gpu for one in cases.contenders(case)} == {
        "SDPA",
        "SDPA (flash)",
        "SDPA (cudnn)",
        "ours (triton)",
        "eager with weights",
        "FlexAttention (compiled)",
    }


def test_cpu_time_is_not_for_the_tables(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--cpu-time"])
    assert "the tables hold wall-clock times" in capsys.readouterr().err


def test_an_unknown_case_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--only", "nonsense"])
    assert "no case contains 'nonsense'; there are: causal 1,024" in capsys.readouterr().err


def test_a_pair_of_a_long_prompt_is_taken_apart_in_small():
    figures = long_prompt.explained(300)
    assert figures["tokens"] == 300
    assert figures["parts"] == 10  # embedding, eight heads, an MLP
    assert figures["error"] < 1e-5
    assert figures["peak_mb"] >= figures["plain_pass_mb"] > 0


def test_the_long_prompt_is_measured_in_small():
    assert long_prompt.measure(300, chunk=128)["chunk"] == 128
    figures = long_prompt.measure(300)
    assert figures["tokens"] == 300
    assert figures["peak_mb"] > 100


def test_gradients_are_held_against_the_reference(monkeypatch):
    case = replace(TINY, backward=True)
    contender = next(one for one in cases.contenders(case) if one.name == "ours (cpu)")
    measure.check_small(case, contender)
    honest = measure._results

    def broken(inputs, options, backend):
        found = honest(inputs, options, backend)
        if backend == "cpu":
            found["output to key"] = 1.01 * found["output to key"]
        return found

    monkeypatch.setattr(measure, "_results", broken)
    with pytest.raises(measure.WrongResultError, match="output to key"):
        measure.check_small(case, contender)


def test_small_kernels_share_a_line_of_the_profile():
    found = [("forward", 1, 3.0), ("columns", 2, 0.96), ("copy", 3, 0.02), ("fill", 1, 0.02)]
    assert list(profile_gpu.shares("all", found)) == [
        ("all", "forward", "1", "3.000", "75.0%"),
        ("all", "columns", "2", "0.960", "24.0%"),
        ("all", "others", "4", "0.040", "1.0%"),
    ]


def test_every_set_of_the_profile_has_one_contender():
    for statistics in profile_gpu.SETS:
        case = replace(TINY, device="cuda", quick=False, backward="attribution" in statistics)
        names = [one.name for one in cases.contenders(case) if one.statistics == statistics]
        assert names == ["ours (triton)"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_profile_says_so(capsys):
    assert profile_gpu.main([]) == 1
    assert capsys.readouterr().err == "there is no CUDA GPU here\n"


def test_the_backward_pass_is_our_own():
    case = replace(TINY, backward=True, quick=False)
    rows = {
        (row.contender, row.statistics): row for row in measure.measure_case(case, 0.01, silent)
    }
    assert rows["ours (cpu)", "lse + attribution"].rounds >= 3
