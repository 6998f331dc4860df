"""House rules that a machine can check: import arrows, lazy imports, no package `kernels`."""

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import networkx as nx
import pytest

from docs.imports import arrows_of, imported, module_files
from docs.public import PACKAGES
from tests.analyses.started import forked

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "lens_kernels": {
        "lens",
        "lens_analyses",
        "lens_dashboards",
        "transformers",
        "xarray",
        "plotly",
        "dash",
    },
    "lens": {"lens_analyses", "lens_dashboards", "dash"},
    "lens_analyses": set(),
    "lens_dashboards": {"lens_analyses", "torch", "transformers"},
}


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    return {name.partition(".")[0] for name in imported("", ast.parse(path.read_text()))}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_goes_against_an_arrow(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    against = {
        str(file.relative_to(ROOT)): sorted(hit)
        for file in files
        if (hit := imported_packages(file) & FORBIDDEN[package])
    }
    assert against == {}


def test_the_arrow_check_sees_a_nested_import(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from lens_dashboards.app import make\n    import torch.nn\n")
    assert imported_packages(file) == {"lens_dashboards", "torch"}


ORDER = (
    ("lens_kernels",),
    ("lens.common",),
    ("lens.stats", "lens.models"),
    ("lens.passes",),
    ("lens.traces",),
    ("lens.tasks",),
    ("lens.edits",),
    ("lens.heads", "lens.circuits", "lens.sinks", "lens.policies", "lens.mixers", "lens.reading", "lens.vision"),
    ("lens.figures",),
    ("lens.runs",),
    ("lens_analyses", "lens_dashboards"),
)  # fmt: skip
"""Rooms from the lowest floor up: a file imports from its own floor or from one below."""


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Every group of modules that reach each other."""
    graph = nx.DiGraph([(name, one) for name, ones in arrows.items() for one in ones])
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def against_the_order(arrows: dict[str, set[str]]) -> list[str]:
    """Arrows that go up a floor."""
    floors = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}

    def floor(name: str) -> int:
        return floors[".".join(name.split(".")[: 2 if name.startswith("lens.") else 1])]

    return [
        f"{name} -> {one}"
        for name, ones in sorted(arrows.items())
        for one in sorted(ones)
        if "lens" not in (name, one) and floor(name) < floor(one)
    ]


@pytest.fixture(scope="module")
def arrows():
    """Module -> modules that it imports, over all four packages."""
    return arrows_of(module_files())


def test_no_files_import_each_other_in_a_circle(arrows):
    assert len(arrows) > 250
    assert circles(arrows) == []


def test_no_arrow_goes_up(arrows):
    assert against_the_order(arrows) == []


def test_a_circle_and_an_arrow_upwards_are_seen(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("def f():\n    from lens.figures.two import g\n")
    two.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lens.heads.one\n"
    )
    found = arrows_of({"lens.heads.one": [one], "lens.figures.two": [two]})
    assert circles(found) == [["lens.figures.two", "lens.heads.one"]]
    assert against_the_order(found) == ["lens.heads.one -> lens.figures.two"]


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_reads_a_pickle(package):
    """Only the error of one may be named; `allow_pickle` and `weights_only` are never the open way."""
    readers = re.compile(
        r"\b(import (pickle|dill|cloudpickle|joblib|shelve|marshal)\b|from (dill|cloudpickle|joblib|shelve|marshal) "
        r"|from pickle import (?!UnpicklingError\n)|allow_pickle=True|weights_only=False|torch\.load\(|read_pickle)"
    )
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in PACKAGES[package].rglob("*.py")
        for match in readers.finditer(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["kernels", "analyses", "dashboards"])
def test_source_roots_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_kernels_is_never_a_regular_package_of_ours():
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        assert ROOT not in Path(spec.origin).parents


def loaded_modules(code: str) -> set[str]:
    """Top-level modules in `sys.modules` of a fresh interpreter that ran `code`."""
    listing = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    probe = f"{code}\n{listing}"
    path = [str(ROOT), *(str(ROOT / folder) for folder in ("kernels", "analyses", "dashboards"))]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{probe}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


HEAVY = {"torch", "transformers", "transformer_lens", "triton", "dash"}


def test_import_lens_is_light():
    assert loaded_modules("import lens") & (HEAVY | {"pandas", "xarray", "plotly"}) == set()


def test_help_is_light():
    code = (
        "from lens_analyses.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    )
    light = HEAVY | {"pandas", "xarray", "plotly", "pydantic", "psutil", "rich"}
    assert loaded_modules(code) & light == set()


def test_what_the_dashboard_reads_needs_no_torch():
    code = "import lens.traces.trace, lens.runs.folders, lens.traces.metrics, lens.traces.findings, lens.figures.heads, lens.runs.comparison.two_runs"
    assert loaded_modules(code) & HEAVY == set()


def _load_and_build() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    import lens

    lens.load("induction-2l")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
    assert sum(p.numel() for p in GPT2LMHeadModel(config).parameters()) > 0
    assert "torch" in sys.modules
    assert "transformer_lens" not in sys.modules


def test_a_model_loads_and_another_builds_from_the_project_root_without_transformer_lens():
    """A regular package `kernels` there would break `transformers`."""
    process = forked(_load_and_build)
    process.join(100)
    assert process.exitcode == 0


def test_every_module_keeps_its_length():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for folder in PACKAGES.values()
        for ending in ("py", "c", "h")
        for file in folder.rglob(f"*.{ending}")
    }
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


MOST_NAMES = {"lens": 14}
WIDE: dict[str, int] = {}
"""Rooms that have more names than a user remembers, and how many: these numbers only fall."""


@pytest.mark.parametrize(
    "name", sorted(name for name, ones in module_files().items() if len(ones) > 1)
)
def test_a_room_has_few_names_and_shows_them_all(name):
    room = importlib.import_module(name)
    most = WIDE.get(name, MOST_NAMES.get(name, 15))
    assert len(room.__all__) <= most
    assert name not in WIDE or len(room.__all__) > 15, f"{name} is small enough: take it off WIDE"
    assert dir(room) == room.__all__
    for public in room.__all__:
        found = getattr(room, public)
        assert found is not None
        if isinstance(found, FunctionType):  # another process finds it by its name
            assert getattr(importlib.import_module(found.__module__), found.__name__) is found


def test_a_name_that_a_room_lacks_is_answered_with_those_it_has():
    lens = importlib.import_module("lens")
    with pytest.raises(AttributeError, match="no attribute 'captur'; it has capture"):
        lens.captur  # noqa: B018
    assert lens.stats.LEVEL  # not advertised, and there
