"""Which versions computed a run."""

import platform
from importlib.metadata import PackageNotFoundError, version

import lens

PACKAGES = ("torch", "transformers", "triton", "numpy", "pandas", "xarray", "plotly")


def versions() -> dict[str, str]:
    """Package -> version, of what is installed; attention-lens and Python first."""
    found = {"attention-lens": lens.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
