"""The Triton kernels compile for GPUs that are not here: few spill, the tensor cores are kept busy.

A few are compiled here, by the environment's Triton and by the older one of GPU machines. What most
models run stands in tests/benchmarks/compiled.csv, which must be of today's kernels and of the tiles that
triton_configs.py chooses today; `python tests/benchmarks/compiled.py` compiles what changed.
"""

import csv
import hashlib
import os
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.tiers import first, later

pytest.importorskip("triton")

from tests.kernels import triton_offline

SHARED = {90: 227 * 1024, 80: 163 * 1024}
JOBS = (90, "bfloat16-128-causal")
PLAIN = ["bfloat16-64-causal", "bfloat16-128-causal", "bfloat16-256-causal", "bfloat16-128-none"]
"""Jobs whose loops of matrix products are split into one with and one without a mask."""
SPILLED = 64
"""Bytes of a thread that may be spilled, where a larger tile saves more instructions than that costs."""
TABLE = Path(__file__).parents[1] / "benchmarks" / "compiled.csv"
KERNELS = Path(__file__).parents[2] / "kernels" / "lens_kernels"
NUMBERS = (
    *("arch", "head_dim", "warps", "stages", "registers", "stack", "local", "shared"),
    *("instructions", "matrix_instructions", "waits"),
)


def table():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {name: int(row[name]) for name in NUMBERS} for row in rows]


@pytest.fixture(scope="module")
def kept(pytestconfig):
    """Rows of a process of `triton_offline`, from the last time if it would read the same: minutes where kernels rest."""

    def rows(*words, triton=None):
        files = (Path(triton_offline.__file__), *sorted(KERNELS.glob("*.py")))
        version = sorted(path.name for path in triton.glob("*.dist-info")) if triton else None
        version = version or metadata.version("triton")
        read = [path.read_bytes() for path in files]
        state = hashlib.sha256(repr((read, words, version, torch.__version__)).encode()).hexdigest()
        place = "compiled/" + hashlib.sha256(repr((words, triton)).encode()).hexdigest()[:16]
        last = pytestconfig.cache.get(place, {})
        if last.get("state") != state:
            found = triton_offline.rows(triton_offline.start(*words, triton=triton))
            last = {"state": state, "rows": found}
            pytestconfig.cache.set(place, last)
        return last["rows"]

    return rows


@pytest.fixture(scope="module", params=first(["compiled here", "table"], "table"))
def compiled(request, kept):
    return table() if request.param == "table" else kept(*JOBS)


@pytest.fixture(
    scope="module",
    params=[
        "that of GPU machines",
        "the environment's Triton",
        later("that of GPU machines, every width"),
        later("the environment's Triton, every width"),
    ],
)
def pipelines(request, kept):
    """The loops of plain attention for sm_90: one kernel by each Triton at one width of a tile, or both at each."""
    other = None
    if request.param.startswith("that of GPU machines"):
        other = triton_offline.other_triton()
        if not (other / "triton").is_dir():
            reason = f"no Triton {triton_offline.OTHER} in {other}; `make test` puts it there"
            if os.environ.get("CI") == "true":
                pytest.fail(reason)
            pytest.skip(reason)
    one = {"that of GPU machines": "query_gradients", "the environment's Triton": "forward"}
    kernels = one.get(request.param, "forward,query_gradients")
    jobs = PLAIN if request.param.endswith("every width") else PLAIN[:1]
    rows = kept(90, *jobs, "--kernels", kernels, triton=other)
    assert {row["kernel"] for row in rows} == {*kernels.split(",")}
    if other is not None:
        assert {row["triton"].rpartition(".")[0] for row in rows} == {triton_offline.OTHER}
    return rows


def test_the_assembler_does_not_wait_for_each_product(pipelines):
    """It says so (C7510, C7515, ...) where accumulators are touched while products are under way."""
    assert [row for row in pipelines if row["serialised"]] == []
    # in each of two loops a wait for q k' and one for p v or its like, and the prefix's one
    most = {"forward": 5, "query_gradients": 6}
    waits = [(most[row["kernel"]], row) for row in pipelines if row["products"] == "wgmma"]
    assert [row for limit, row in waits if not 0 < row["waits"] <= limit] == []


def test_few_registers_of_the_plain_loops_spill(pipelines):
    assert [row for row in pipelines if row["stack"] > SPILLED or row["local"]] == []


def test_no_product_is_serialised(compiled):
    rows = [row for row in compiled if row["arch"] == 90]
    assert {row["kernel"] for row in rows} >= {"forward", "query_gradients"}
    assert [row for row in (*rows, *table()) if row["serialised"]] == []


def test_every_kernel_is_there(compiled, request):
    wanted = set(SHARED) if request.node.callspec.params["compiled"] == "table" else {JOBS[0]}
    assert {row["arch"] for row in compiled} == wanted
    for arch in wanted:
        names = {row["kernel"] for row in compiled if row["arch"] == arch}
        passes = {"forward", "columns_pass", "diagonals_pass"}
        names -= {"merge_pieces"}  # of decoding
        assert names == passes | {"levels", "key_gradients", "query_gradients"}


def test_the_table_is_of_todays_kernels(kept):
    """What would be compiled, its tile and its source stand in it, and nothing else."""
    shipped, found = (
        {tuple(row[name] for name in triton_offline.CHOSEN) for row in rows}
        for rows in (kept(*SHARED, "--list"), table())
    )
    assert sorted(shipped - found) == []
    assert sorted(found - shipped) == []


def test_little_spills(compiled):
    """Nothing but where a forward pass has a larger tile for it."""
    assert [row for row in compiled if row["stack"] > SPILLED or row["local"]] == []
    rest = [row for row in compiled if row["kernel"] != "forward"]
    assert [row for row in rest if row["stack"]] == []


def test_tensor_cores_are_used(compiled):
    """wgmma takes tiles of 64 rows or more, where a program has a warp group for each 64."""
    without = ("levels", "merge_pieces")
    half = [row for row in compiled if row["dtype"] != "float32" and row["kernel"] not in without]
    assert [row for row in half if row["products"] == "fma"] == []
    large = [row for row in half if row["arch"] == 90 and height(row) >= 64]
    assert [row for row in large if row["products"] != "wgmma"] == []


def height(row):
    """Lanes of the tile along the rows of the matrix product."""
    rows, columns = map(int, row["tile"].split("x"))
    return columns if row["kernel"] in ("columns_pass", "key_gradients") else rows


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED[row["arch"]]] == []
