"""The picture of the house: what counts as an import, which arrows are drawn, and that it is of today."""

import xml.etree.ElementTree as ET

import pytest

from docs.architecture import PICTURE, arrows, drawn, heights, needed
from docs.imports import module_files

FILES = {
    "lens/__init__.py": "",
    "lens/__init__.pyi": "from . import heads as heads",
    "lens/heads/__init__.py": "def f():\n    from lens.stats import rank\n",
    "lens/heads/inner/deep.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lens.traces.trace import Trace",
    "lens/stats/__init__.py": "import numpy",
    "lens/stats/__init__.pyi": "from .ranks import rank as rank",
    "lens/stats/ranks.py": "",
    "lens/traces/trace.py": "import lens.stats.ranks\nfrom lens_kernels import tile",
    "lens/traces/__init__.py": "",
    "lens_kernels/__init__.py": "",
}


@pytest.fixture
def house(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return arrows(module_files({name: tmp_path / name for name in ("lens", "lens_kernels")}))


def test_every_way_to_import_is_an_arrow(house):
    assert house == {
        "lens": {"heads"},
        "heads": {"stats", "traces"},
        "traces": {"stats", "lens_kernels"},
        "stats": set(),
        "lens_kernels": set(),
    }


def test_what_a_longer_way_implies_is_not_drawn(house):
    assert needed(house) == {**house, "heads": {"traces"}}
    assert heights(house) == {"lens": 3, "heads": 2, "traces": 1, "stats": 0, "lens_kernels": 0}


def test_a_circle_is_drawn_whole_and_marked(house):
    house["stats"] = {"heads"}
    assert needed(house)["heads"] == {"stats", "traces"}
    assert heights(house)["heads"] == heights(house)["traces"] == heights(house)["stats"] == 1
    assert drawn(house).count('class="circle"') == 4


def test_boxes_do_not_overlap_and_arrows_point_down(house):
    picture = ET.fromstring(drawn(house))
    space = "{http://www.w3.org/2000/svg}"
    boxes = {}
    for group in picture.iter(f"{space}g"):
        rect = group.find(f"{space}rect")
        boxes[group.find(f"{space}text").text] = tuple(
            float(rect.get(key)) for key in ("x", "y", "width")
        )
    assert set(boxes) == set(house)
    for one, (left, top, width) in boxes.items():
        for other, (x, y, _) in boxes.items():
            assert one == other or top != y or abs(left - x) >= width
        assert all(boxes[target][1] > top for target in house[one])
    assert len(picture.findall(f"{space}path")) == sum(map(len, needed(house).values()))


@pytest.fixture(scope="module")
def today():
    return arrows(module_files())


def test_the_page_explains_every_room_of_the_picture(today):
    page = PICTURE.with_name("architecture.md").read_text()
    rooms = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    packages = {"lens", "lens_kernels", "lens_analyses", "lens_dashboards"}
    assert sorted(rooms) == sorted(today.keys() - packages)


def test_the_picture_is_of_today(today):
    current = PICTURE.read_text() == drawn(today)
    assert current, "an import between rooms has come or gone: make architecture"
