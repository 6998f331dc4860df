"""The Triton kernels compile for GPUs that are not here: nothing spills, the tensor cores are used.

A few are compiled here. All that ship stand in tests/benchmarks/compiled.csv, which must list
exactly the kernels and tiles that triton_configs.py chooses today; `python
tests/benchmarks/compiled.py` makes it anew, in an hour.
"""

import csv
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels import triton_offline

SHARED = {90: 227 * 1024, 80: 163 * 1024}
JOBS = {90: ["bfloat16-128-causal", "float16-64-causal"], 80: ["bfloat16-128-causal"]}
TABLE = Path(__file__).parents[1] / "benchmarks" / "compiled.csv"
NUMBERS = ("arch", "head_dim", "warps", "stages", "registers", "stack", "local", "shared")
CHOSEN = (
    *("arch", "dtype", "head_dim", "mask", "statistics", "kernel"),
    *("tile", "warps", "stages"),
)


def table():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {name: int(row[name]) for name in NUMBERS} for row in rows]


@pytest.fixture(scope="module", params=["compiled here", "table"])
def compiled(request):
    if request.param == "table":
        return table()
    started = [triton_offline.start(arch, *names) for arch, names in JOBS.items()]
    return [row for process in started for row in triton_offline.rows(process)]


def key(row):
    return tuple(row[name] for name in CHOSEN)


def test_every_kernel_is_there(compiled):
    for arch in SHARED:
        names = {row["kernel"] for row in compiled if row["arch"] == arch}
        passes = {"forward", "columns_pass", "diagonals_pass"}
        assert names == passes | {"levels", "key_gradients", "query_gradients"}


def test_the_table_lists_what_ships():
    shipped = [triton_offline.start(arch, "--list") for arch in SHARED]
    expected = {key(row) for process in shipped for row in triton_offline.rows(process)}
    found = {key(row) for row in table()}
    assert sorted(expected - found) == []
    assert sorted(found - expected) == []


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["stack"] or row["local"]] == []


def test_every_mask_is_there():
    for arch in SHARED:
        shipped = {(job.mask, job.dtype, job.dim) for job in triton_offline.JOBS}
        rows = [row for row in table() if row["arch"] == arch]
        assert {(row["mask"], row["dtype"], row["head_dim"]) for row in rows} == shipped


def test_tensor_cores_are_used(compiled):
    """wgmma takes tiles of 64 rows or more, where a program has a warp group for each 64."""
    half = [row for row in compiled if row["dtype"] != "float32" and row["kernel"] != "levels"]
    assert [row for row in half if row["products"] == "fma"] == []
    large = [row for row in half if row["arch"] == 90 and height(row) >= 64]
    assert [row for row in large if row["products"] != "wgmma"] == []


def height(row):
    """Lanes of the tile along the rows of the matrix product."""
    rows, columns = map(int, row["tile"].split("x"))
    return columns if row["kernel"] in ("columns_pass", "key_gradients") else rows


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED[row["arch"]]] == []
