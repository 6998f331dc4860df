"""Compiles the C sources once per machine and keeps the library in the user's cache folder.

The file is called `kernels-SOURCES-COMPILER-CONTENT.so`, three hashes: of the source, flags and
processor; of the compiler with its version; of the file itself. So a file that is not whole is
never loaded, another compiler makes another file, and where there is no compiler any more, one that
was made before still serves. A library is compiled under a temporary name and renamed when
complete, so that processes that start together, or are killed, never leave half a file. The folder
must belong to the user and be writable by nobody else, because what lies in it is executed.

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
        target: flags (as `-mavx2`) instead of those of this machine; "" for none.

    Raises:
        BuildError: with the reason in one line.
    """
    if os.name != "posix":
        raise BuildError(f"the compiled path needs Linux or macOS, not {platform.system()}")
    folder = cache_folder()
    targets = _TARGETS if target is None else (target or None,)
    settings = [(*_COMMON, *(flags or "").split()) for flags in targets]
    try:
        compiler = find_compiler()
    except BuildError:
        if os.environ.get("CC"):
            raise
        for flags in settings:
            if found := _made(folder, _key(flags), "*"):
                return found
        raise
    failure, made_by = "", _hash(_version(compiler))
    for flags in settings:
        key = _key(flags)
        if found := _made(folder, key, made_by):
            return found
        path, failure = _compile(compiler, flags, folder, f"kernels-{key}-{made_by}")
        if path is not None:
            return path
    raise BuildError(f"{compiler} could not compile the kernels: {failure}")


def _made(folder: Path, key: str, compiler: str) -> Path | None:
    """A whole library of that key in the folder; what is not whole is removed."""
    for path in sorted(folder.glob(f"kernels-{key}-{compiler}-*.so")):
        try:
            if path.stem.rpartition("-")[2] == _hash(path.read_bytes()):
                return path
            path.unlink()
        except OSError:
            continue
    return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


def _key(flags: tuple[str, ...]) -> str:
    sources = (path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    return _hash(b"\0".join((*sources, " ".join(flags).encode(), _processor())))


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


def _compile(
    compiler: str, flags: tuple[str, ...], folder: Path, stem: str
) -> tuple[Path | None, str]:
    """The library in the folder, its name beginning with `stem`; or None and the reason why not.

    Raises:
        BuildError: when the folder cannot be written or the compiler not be run.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=folder)
        os.close(handle)
    except OSError as error:
        raise BuildError(_unwritable(folder, error)) from error
    try:
        sources = map(str, sorted(SOURCES.glob("*.c")))
        result = _run([compiler, *flags, *sources, "-o", name, "-lm", "-lpthread"])
        if result.returncode:
            lines = result.stderr.decode(errors="replace").splitlines()
            errors = [line for line in lines if "error" in line] or lines
            return None, errors[0].strip() if errors else f"exit status {result.returncode}"
        path = folder / f"{stem}-{_hash(Path(name).read_bytes())}.so"
        os.replace(name, path)
        return path, ""
    except OSError as error:
        raise BuildError(_unwritable(folder, error)) from error
    finally:
        Path(name).unlink(missing_ok=True)


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"the cache folder {folder} cannot be written ({error.strerror}); "
        "set LENS_KERNELS_CACHE to a folder of your own"
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
