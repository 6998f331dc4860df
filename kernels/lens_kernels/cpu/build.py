"""Compiles the C sources once per machine and keeps the library in the user's cache folder.

The file name carries a hash of everything that the result depends on: source, compiler with
version, flags, processor. A library is compiled under a temporary name and renamed when complete,
so that processes that start together, or are killed, never leave half a file. The folder must
belong to the user and be writable by nobody else, because what lies in it is executed.

Environment: `LENS_KERNELS_CACHE` is the folder (default: `attention-lens/kernels` in the user's
cache folder), `CC` the compiler (default: the first of cc, gcc, clang).
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
"""Folder of the sources: every .c file is compiled, every .h file counts for the hash."""

_COMMON = ("-std=gnu11", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
_TARGETS = ("-march=native", "-mcpu=native", None)
"""Tried in this order: x86 and recent arm, older arm and Apple, any compiler."""
_SECONDS = 120


class BuildError(RuntimeError):
    """The library cannot be made on this machine; the message is the reason, in one line."""


def cache_folder() -> Path:
    """Folder of compiled libraries, made private to the user; it need not exist before.

    Raises:
        BuildError: when it cannot be made, or others may write in it.
    """
    given = os.environ.get("LENS_KERNELS_CACHE")
    if given:
        folder = Path(given)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library/Caches/attention-lens/kernels"
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "attention-lens/kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise BuildError(
            f"the cache folder {folder} cannot be made ({error.strerror}); "
            "set LENS_KERNELS_CACHE to a folder of your own"
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(
            f"the cache folder {folder} belongs to another user or others may write in it; "
            "set LENS_KERNELS_CACHE to a folder of your own"
        )
    return folder


def find_compiler() -> str:
    """Path of the C compiler: `CC`, else the first of cc, gcc, clang.

    Raises:
        BuildError: when there is none.
    """
    given = os.environ.get("CC")
    for name in (given,) if given else ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path is not None:
            return path
    if given:
        raise BuildError(f"the C compiler CC={given} was not found; unset CC or correct it")
    raise BuildError("no C compiler was found (cc, gcc, clang); install one or set CC")


def library_path(target: str | None = None) -> Path:
    """Path of the compiled library; compiles it when this machine has not yet.

    Args:
        target: one machine flag (as `-mavx2`) instead of those of this machine; "" for none.

    Raises:
        BuildError: with the reason in one line.
    """
    if os.name != "posix":
        raise BuildError(f"the compiled path needs Linux or macOS, not {platform.system()}")
    compiler, folder = find_compiler(), cache_folder()
    targets = _TARGETS if target is None else (target or None,)
    failure = ""
    for flag in targets:
        flags = _COMMON if flag is None else (*_COMMON, flag)
        path = folder / f"kernels-{_key(compiler, flags)}.so"
        if path.exists():
            return path
        failure = _compile(compiler, flags, path)
        if not failure:
            return path
    raise BuildError(f"{compiler} could not compile the kernels: {failure}")


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    sources = (path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    parts = (*sources, _version(compiler), " ".join(flags).encode(), _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _version(compiler: str) -> bytes:
    return compiler.encode() + b" " + _run([compiler, "--version"]).stdout


def _processor() -> bytes:
    """What `native` means here: the instruction sets, as far as the system tells."""
    lines = [platform.machine().encode()]
    try:
        lines += [
            line
            for line in Path("/proc/cpuinfo").read_bytes().splitlines()
            if line.startswith((b"flags", b"Features", b"CPU part"))
        ]
    except OSError:
        lines.append(platform.processor().encode())
    return b"\n".join(dict.fromkeys(lines))


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> str:
    """Compiles to `path`; returns "" or the reason why not."""
    handle, name = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        sources = map(str, sorted(SOURCES.glob("*.c")))
        result = _run([compiler, *flags, *sources, "-o", name, "-lm", "-lpthread"])
        if result.returncode:
            lines = result.stderr.decode(errors="replace").splitlines()
            errors = [line for line in lines if "error" in line] or lines
            return errors[0].strip() if errors else f"exit status {result.returncode}"
        os.replace(name, path)
        return ""
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
