"""The pages of the site that no file in `docs/` holds: README, benchmarks, and the reference of each room.

A hook of MkDocs, see `mkdocs.yml`. The reference follows the rooms' `__all__`; links of the guides to
files that the site does not have become plain text.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.public import ROOT, rooms

EXAMPLE = re.compile(r"^( *)>>>.*(?:\n\1.*\S.*)*", re.MULTILINE)
LINK = re.compile(r"(?<=\])\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is written elsewhere or made from the rooms, and lay out the navigation."""
    places = _places(files)
    for source, place in places.items():
        if not files.get_file_from_path(place):
            files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    reference = {f"reference/{room}.md": _reference(room, names) for room, names in rooms().items()}
    reference["reference/index.md"] = _examples()
    for place, text in reference.items():
        files.append(File.generated(config, place, content=text))
    guides = sorted(file.src_uri for file in files.documentation_pages() if "/" not in file.src_uri)
    config.nav = [
        {"Home": "index.md"},
        {"Guides": [page for page in guides if page != "index.md"]},
        {"Reference": ["reference/index.md", *sorted(set(reference) - {"reference/index.md"})]},
        {"Files": sorted(place for place in places.values() if place.startswith("schema/"))},
        {"Measured": sorted(place for place in places.values() if place.startswith("benchmarks/"))},
    ]
    return files


def on_page_markdown(markdown: str, page, files: Files, **_) -> str:
    """Point the links of a page at the places that its targets have in the site."""
    places = _places(files)
    source = {place: source for source, place in places.items()}.get(page.file.src_uri)
    if source is None:
        return markdown
    depth = page.file.src_uri.count("/")

    def link(match: re.Match) -> str:
        target = ((ROOT / source).parent / match[1]).resolve().relative_to(ROOT).as_posix()
        place = places.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            return f"<!-- {target} -->"
        return f"({'../' * depth}{place}{match[2] or ''})"

    linked = LINK.sub(link, markdown)
    return re.sub(r"\[([^\]]+)\]<!-- .*? -->", r"\1", linked)


class Fences(griffe.Extension):
    """Prompts `>>>` and what follows them, up to an empty line, become a block of code."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Once for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(_fence, obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Once for the package itself, which `on_object` leaves out."""
        self.on_object(obj=pkg)


def _fence(match: re.Match) -> str:
    indent = match[1]
    return f"{indent}```pycon\n{match[0]}\n{indent}```"


def _places(files: Files) -> dict[str, str]:
    """File of the repository -> its page in the site."""
    outside = {
        "README.md": "index.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
    }
    measured = (file.relative_to(ROOT).as_posix() for file in ROOT.glob("tests/benchmarks/*.md"))
    return {
        **outside,
        **{file: file.removeprefix("tests/") for file in measured},
        **{
            f"docs/{f.src_uri}": f.src_uri
            for f in files.documentation_pages()
            if not f.generated_by
        },
    }


def _reference(room: str, names: list[str]) -> str:
    """The page of a room: what its module says, then each public name; a room in it is a link."""
    options = {"members": False, "show_root_heading": False, "show_root_toc_entry": False}
    head = f"# {room}\n\n::: {room}\n    options: {json.dumps(options)}\n"
    inner = [name for name in names if f"{room}.{name}" in rooms()]
    links = [f"* [{room}.{name}]({room}.{name}.md)" for name in inner]
    blocks = [f"::: {room}.{name}\n" for name in names if name not in inner]
    return "\n".join([head, *links, "", *blocks])


def _examples() -> str:
    listing = "\n".join(f"* [{room}]({room}.md)" for room in rooms())
    code = (ROOT / "docs/given.py").read_text()
    return (
        f"# Reference\n\n{listing}\n\n## The names in the examples\n\n"
        f"Every example is run by the tests, after these lines:\n\n```python\n{code}```\n"
    )
