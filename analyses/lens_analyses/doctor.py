"""What this machine has, what is missing, and what that means: `lens doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lens
from lens_analyses.console import ERROR, OK, one_line

_MARKS = {"ok": "ok", "fallback": "--", "problem": "!!"}
_OPTIONAL = {
    "dash": ("dashboard", "`lens view` and `lens demo` cannot serve the dashboard"),
    "transformer_lens": ("circuits", "a TransformerBridge cannot be captured"),
    "gguf": ("gguf", "GGUF files cannot be loaded, smollm2-135m among them"),
    "peft": ("peft", "folders with an adapter cannot be loaded"),
    "bitsandbytes": ("bitsandbytes", "models in 4 and 8 bit cannot be loaded"),
    "ray": ("ray", "`lens sweep --engine ray` cannot run"),
    "diffusers": ("diffusers", "`lens diffusion` cannot run"),
    "pillow": ("vision", "files of pictures cannot be read"),
    "onnx": ("onnx", "dinov2-small cannot be made from its package"),
    "kaleido": ("export", "figures are saved as HTML, not as PNG or SVG files"),
}
_MODULES = {"pillow": "PIL"}  # of packages that are imported by another name
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        state: `ok`, `fallback` (works, slower or with less) or `problem` (does not work).
        found: what there is.
        consequence: what that means and what to do, "" if nothing.
    """

    name: str
    state: str
    found: str
    consequence: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks."""

    checks: list[Check]

    @property
    def exit_code(self) -> int:
        """1 if something does not work, else 0; a fallback works."""
        return ERROR if any(check.state == "problem" for check in self.checks) else OK

    def text(self) -> str:
        """A table for people."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{_MARKS[check.state]}  {check.name:<{width}}  {check.found}")
            if check.consequence:
                lines.append(f"    {'':<{width}}  {check.consequence}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"checks": [asdict(check) for check in self.checks]}


def examine() -> Diagnosis:
    """Look at everything that the project can use."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("attention-lens", _own),
        ("torch", _torch),
        ("transformers", _transformers),
        ("GPU", _gpu),
        ("triton kernels", _triton),
        ("CPU kernel", _compiler),
        ("models", _models),
        *((name, partial(_optional, name)) for name in _OPTIONAL),
        ("browser", _browser),
        ("machine", _machine),
        ("model cache", _model_cache),
        ("kernel cache", _kernel_cache),
    ]
    return Diagnosis([_safely(name, check) for name, check in checks])


def _safely(name: str, check: Callable[[], Check]) -> Check:
    """A check that fails is a finding too: `lens doctor` is for broken installations."""
    try:
        return check()
    except Exception as error:
        found = one_line(f"{type(error).__name__}: {error}")
        return Check(
            name, "problem", found, "install again: pip install --force-reinstall attention-lens"
        )


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")


def _own() -> Check:
    try:
        return Check("attention-lens", "ok", importlib.metadata.version("attention-lens"))
    except importlib.metadata.PackageNotFoundError:
        found = f"{lens.__version__}, run from {Path(lens.__file__).parents[1]}"
        return Check("attention-lens", "ok", found)


def _torch() -> Check:
    import torch

    return Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _transformers() -> Check:
    import transformers

    return Check("transformers", "ok", transformers.__version__)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", "fallback", "none that torch can use", "everything runs on the CPU")
    count = torch.cuda.device_count()
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return Check(
        "GPU", "ok", f"{count} × {torch.cuda.get_device_name(0)}, compute capability {capability}"
    )


def _triton() -> Check:
    import torch

    if importlib.util.find_spec("triton") is None:
        found = "not installed"
    elif not torch.cuda.is_available():
        found = f"{importlib.metadata.version('triton')}, no GPU to use it on"
    else:
        return Check("triton kernels", "ok", importlib.metadata.version("triton"))
    if torch.cuda.is_available():
        return Check(
            "triton kernels", "fallback", found, "attention on the GPU runs in plain torch, slowly"
        )
    return Check("triton kernels", "fallback", found, "only needed on a GPU")


def _compiler() -> Check:
    from lens_kernels.cpu import build

    try:
        path = build.library_path()
    except build.BuildError as error:
        return Check(
            "CPU kernel", "fallback", str(error), "attention on the CPU runs in plain torch, slower"
        )
    return Check("CPU kernel", "ok", f"compiled: {path}")


def _models() -> Check:
    from lens.models import dinov2, smollm2, whisper
    from lens.models.catalogue import KNOWN

    packaged = {one.name: one.available() for one in (smollm2.MODEL, dinov2.MODEL, whisper.MODEL)}
    here = ", ".join(name for name, model in KNOWN.items() if model.embedded or packaged[name])
    lacking = [
        f"{name}: get it with {KNOWN[name].remedy}" for name in packaged if not packaged[name]
    ]
    return Check("models", "fallback" if lacking else "ok", here, "; ".join(lacking))


def _optional(name: str) -> Check:
    extra, consequence = _OPTIONAL[name]
    if importlib.util.find_spec(_MODULES.get(name, name)) is None:
        remedy = f"pip install 'attention-lens[{extra}]'"
        return Check(name, "fallback", "not installed", f"{consequence}; {remedy}")
    return Check(name, "ok", importlib.metadata.version(name))


def _browser() -> Check:
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        return Check(
            "browser",
            "fallback",
            "no Chromium or Chrome",
            "figures cannot be saved as PNG or SVG from here",
        )
    return Check("browser", "ok", path)


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Check("machine", "ok", f"{cores} cores; {free:.0f} GiB free in {Path.cwd()}")


def _model_cache() -> Check:
    from lens.models.converted import cache_folder

    return _folder("model cache", cache_folder())


def _kernel_cache() -> Check:
    from lens_kernels.cpu import build

    try:
        return _folder("kernel cache", build.cache_folder())
    except build.BuildError as error:
        return Check("kernel cache", "fallback", str(error))


def _folder(name: str, path: Path) -> Check:
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if os.access(nearest, os.W_OK):
        return Check(name, "ok", str(path))
    return Check(
        name, "problem", f"{path} cannot be written", "set XDG_CACHE_HOME to a folder of your own"
    )
