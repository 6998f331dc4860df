"""Quantiles, and with them the level of an interval, are in `lens.stats` alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("lens", "analyses/lens_analyses", "dashboards/lens_dashboards", "kernels/lens_kernels")
CALLS = {"percentile", "nanpercentile", "quantile", "nanquantile"}
ENDS = {0.025, 0.975, 2.5, 97.5, 1.96, 1.645}


def own_quantiles(source):
    """What computes a quantile without `lens.stats`, or writes down an end of an interval."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in CALLS:
            if ast.unparse(node) != "stats.quantile":
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Tuple | ast.List) and any(
            isinstance(item, ast.Constant) and item.value in ENDS for item in node.elts
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_room_has_a_quantile_of_its_own(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    rooms = [file for file in files if "stats" not in file.relative_to(ROOT).parts]
    found = [
        f"{file.relative_to(ROOT)}, {line}"
        for file in rooms
        for line in own_quantiles(file.read_text(encoding="utf-8"))
    ]
    assert not found, "take lens.stats.interval or lens.stats.quantile:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    ["np.percentile(x, 5)", "norm.quantile(0.5)", "_ENDS = (2.5, 97.5)", "f(x, [0.025, 0.975])"],
)
def test_a_quantile_is_seen(source):
    assert len(own_quantiles(source)) == 1
    assert not own_quantiles("stats.quantile(x, 0.99) + stats.interval(x)[0]; size = 2.5")
