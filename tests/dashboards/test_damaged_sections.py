"""Sections whose tables are not what a page needs, in old folders that nothing can be held against: told, never failing."""

import json
import shutil

import pandas as pd
import pytest
from lens_dashboards.library import Library
from lens_dashboards.views import render

from lens.runs.schema import SECTIONS
from tests.tiers import first

CHANGES = {
    "gone": lambda table, name: table.drop(columns=name),
    "text": lambda table, name: table.assign(**{name: "x"}),
    "nothing": lambda table, name: table.assign(**{name: None}),
    "no rows": lambda table, name: table.iloc[:0],
    "rows twice": lambda table, name: pd.concat([table, table]),
}


@pytest.fixture
def old_folder(tmp_path):
    """Copies a run into a folder of runs, as an older version would have written it."""

    def copied(run):
        path = tmp_path / run.id
        shutil.copytree(run.path, path)
        (path / "manifest.json").unlink(missing_ok=True)
        edited(path / "run.json", lambda found: found.pop("manifest", None))
        for index in path.glob("sections/*/section.json"):
            edited(index, lambda found: found.pop("shapes", None))
        return path

    return copied


def edited(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def shown(path, page):
    return str(render(Library(path.parent), f"/run/{path.name}{page}", ""))


@pytest.mark.parametrize(
    ("fixture", "section", "page"),
    [
        ("sinks_run", "detection", "/sinks"),
        ("circuit_run", "circuit", "/circuits"),
        ("heads_run", "importance", "/head/0/1"),
        ("redistribute_run", "dose", "/redistribution"),
    ],
)
@pytest.mark.parametrize("every", first([False, True], False), ids=["each column", "every change"])
def test_no_page_fails_on_a_damaged_table(request, old_folder, fixture, section, page, every):
    """Each column has one of the changes in turn, or every one."""
    path = old_folder(request.getfixturevalue(fixture))
    before = shown(path, page)
    assert "This cannot be shown" not in before
    failed, told = [], 0
    needed = SECTIONS.get(section, {"side_effects": dict.fromkeys(("amount", "kl", "kl_low", "n"))})
    for part, columns in needed.items():
        file = path / f"sections/{section}/{part}.parquet"
        table = pd.read_parquet(file)
        for number, (words, change) in enumerate(CHANGES.items()):
            some = slice(1) if "row" in words else slice(None) if every else slice(number, None, 3)
            for name in [*columns][some]:
                change(table, name).to_parquet(file, index=False)
                found = shown(path, page)
                told += found != before
                if "This page failed" in found:
                    failed.append(f"{part}: {name}: {words}")
        table.to_parquet(file, index=False)
    assert failed == []
    assert told


@pytest.mark.parametrize("entry", ["tables", "figures", "configuration"])
@pytest.mark.parametrize(
    ("fixture", "section", "page"),
    [("sinks_run", "detection", "/sinks"), ("circuit_run", "circuit", "/circuits")],
)
def test_a_section_that_lacks_what_its_page_needs_is_told(
    request, old_folder, fixture, section, page, entry
):
    path = old_folder(request.getfixturevalue(fixture))
    edited(path / f"sections/{section}/section.json", lambda found: found[entry].clear())
    text = shown(path, page)
    assert "This page failed" not in text
    assert (f"sections/{section}" in text) == (entry != "configuration" or section == "detection")
