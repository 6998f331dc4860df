"""One real browser for every test that needs one, and Triton's interpreter where there is no GPU.

Triton reads TRITON_INTERPRET when a kernel is decorated, its own ones when it is imported, so the
variable is set before any test module brings triton in.
"""

import gc
import os
import shutil

import pytest
import torch

gc.disable()  # of what is imported nothing is garbage: looking took a fifth of the collection

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def pytest_collection_modifyitems(items):
    """What is of the whole project comes first: it takes longest, and last it would keep one worker alone."""
    items.sort(key=lambda item: len(item.path.parts))


def pytest_collection_finish():
    """What is there by now stays, and is not looked at again with each new tensor."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


def pytest_unconfigure():
    """What has to be gone at the end may go: Triton's parts would complain."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files go to the workers whole, and the dashboard's together: each worker would make their runs anew."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tests/dashboards" if file.startswith("tests/dashboards/") else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def chromium():
    """Debian's, or whichever is there."""
    path = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if path is None:
        reason = "no Chromium on this machine; `make browser` installs one where apt is"
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs a browser: {reason}")
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def browser(chromium):
    """The browser, whose pages end with the test: those that a failed one left took the time of all that follow."""
    yield chromium
    for context in chromium.contexts:
        context.close()
