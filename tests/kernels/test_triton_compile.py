"""The Triton kernels compile for GPUs that are not here: nothing spills, the tensor cores are used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {90: 227 * 1024, 80: 163 * 1024}
NAMES = {
    90: ["plain", "rows", "maps", "maps-64", "maps-80", "window-softcap", "wide"],
    80: ["plain", "maps-64"],
}


@pytest.fixture(scope="module", params=sorted(SHARED, reverse=True))
def compiled(request):
    arch = request.param
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = Path(__file__).with_name("triton_offline.py")
    result = subprocess.run(
        [sys.executable, str(script), str(arch), *NAMES[arch]],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return arch, [json.loads(line) for line in result.stdout.splitlines()]


def test_every_case_compiles(compiled):
    arch, rows = compiled
    assert {row["case"] for row in rows} == set(NAMES[arch])
    assert len(rows) > len(NAMES[arch])


def test_nothing_spills(compiled):
    """On sm_80 only the forward pass and the LSE pass are held to it: its gradients spill a little."""
    arch, rows = compiled
    held = [row for row in rows if arch >= 90 or "gradients" not in row["kernel"]]
    assert [row for row in held if row["stack"] or row["local"]] == []


def test_tensor_cores_are_used(compiled):
    arch, rows = compiled
    instruction = "wgmma" if arch >= 90 else "mma"
    products = [row for row in rows if row["kernel"] != "levels"]  # that one is sums alone
    assert [row for row in products if not row[instruction]] == []


def test_shared_memory_fits(compiled):
    arch, rows = compiled
    assert [row for row in rows if row["shared"] > SHARED[arch]] == []
