"""The site of `make docs`: it has every public name, and it opens from the disk without a request."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.public import rooms

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
]  # what the site is made of is looked at by test_docs.py


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; strict, so a link that leads nowhere or a name that is not found fails."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.timeout(600)
def test_the_reference_has_every_public_name(site):
    for room, names in rooms().items():
        page = (site / "reference" / f"{room}.html").read_text()
        places = set(re.findall(r'id="([^"]+)"', page)) | set(re.findall(r'href="([^"]+)"', page))
        for name in names:
            assert {f"{room}.{name}", f"{room}.{name}.html"} & places, f"{room} lacks {name}"


def test_an_example_is_shown_as_code(site):
    for page in ("lens", "lens.heads", "lens_kernels"):
        text = (site / "reference" / f"{page}.html").read_text()
        assert '<span class="gp">&gt;&gt;&gt; </span>' in text
        assert "<blockquote>" not in text


def test_the_pages_link_among_themselves(site):
    home = (site / "index.html").read_text()
    assert 'href="examples.html"' in home
    assert 'href="benchmarks/RESULTS.html"' in home
    assert 'analyses/notebooks"' not in home, "the site has no such page"


def test_no_page_loads_anything_from_elsewhere(site):
    loads = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//"
        r"|url\([\"']?(?:https?:)?//|@import [\"']?(?:https?:)?//"
    )
    files = [file for kind in ("html", "css") for file in site.rglob(f"*.{kind}")]
    assert len(files) > len(rooms())
    assert [str(file) for file in files if loads.search(file.read_text())] == []


@pytest.mark.browser
def test_it_opens_and_searches_from_the_disk(site, browser):
    page = browser.new_page()
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto((site / "reference" / "lens.heads.html").as_uri())
    assert page.locator("h1").inner_text().startswith("lens.heads")
    page.locator("input[name=query]").fill("importance", force=True)
    page.locator(".md-search-result__item").first.wait_for()
    assert "importance" in page.locator(".md-search-result__list").inner_text()
    page.close()
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert wrong == []
