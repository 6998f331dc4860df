"""Make the README's picture: a real head of a real model, in the real dashboard (`make picture`)."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

from lens_dashboards.server import create_app
from playwright.sync_api import sync_playwright
from waitress.server import create_server

from lens.runs.folders import list_runs

OUT = Path(__file__).parent / "head.png"
VIEW = "head/1/3?prompt=p012&query=75"


def main() -> None:
    """Run the demo without its dashboard, then take the picture of L1H3 on copied text."""
    with TemporaryDirectory() as folder:
        lens = [sys.executable, "-m", "lens_analyses", "demo", "--no-view", "--out", folder]
        subprocess.run(lens, check=True)
        run = next(run for run in list_runs(folder) if "text-lm-3l" in run.id)
        server = create_server(create_app(folder).server, host="127.0.0.1", port=0)
        threading.Thread(target=server.run, daemon=True).start()
        with sync_playwright() as playwright:
            path = shutil.which("chromium") or os.environ["CHROMIUM"]
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 1080})
            page.goto(f"http://127.0.0.1:{server.effective_port}/run/{run.id}/{VIEW}")
            page.wait_for_selector("#strip[data-query]")
            page.screenshot(path=OUT)
            browser.close()
    print(OUT)


if __name__ == "__main__":
    main()
