"""How the model's functions are compiled: the decorators, and where machine code is kept.

Numba is imported when something has to be compiled, not before: machine code that is kept needs LLVM's loader only.
It is kept in a folder of the user's own, keyed by a digest of every source of this package, the versions of numba and LLVM, numba's
settings and the CPU. `FAULTSWEEP_CACHE_DIR` moves it. With `NUMBA_DISABLE_JIT` nothing is compiled: all is what was written.
"""

import hashlib
import os
import platform
import stat
from collections.abc import Callable
from functools import cache, cached_property, update_wrapper
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite
import llvmlite.binding as llvm

F = TypeVar("F", bound=Callable[..., Any])
PYTHON_ONLY = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")  # the mutation check


def model_digest() -> str:
    """SHA-256 (hex) over the sources that make a number (the reference makes none): which model it was."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name.startswith("reference"):
            continue
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_root() -> Path:
    """Folder that holds all compile caches; created on first use."""
    base = os.environ.get("FAULTSWEEP_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "faultsweep"


def _cpu() -> str:
    """What the code is made for."""
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know them here; numba does without them then
        features = ""
    return f"{platform.machine()} {llvm.get_host_cpu_name()} {features}"


def _cache_dir() -> Path:
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    key = f"{model_digest()} {version('numba')} {llvmlite.__version__} {settings} {_cpu()}"
    return cache_root() / f"numba-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def is_private(found: os.stat_result) -> bool:
    """Nobody but this user can write there: what is kept is run as it is found."""
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@cache
def compile_cache() -> Path | None:
    """The folder of compiled code of this very model; None where it cannot be written, or by others too (then each process compiles)."""
    path = _cache_dir()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path if is_private(path.stat()) and os.access(path, os.W_OK) else None
    except OSError:
        return None


class Ingredient:
    """A function that compiled functions call. Python calls what was written."""

    def __init__(self, function: Callable[..., Any], inline: bool) -> None:
        self.function, self.inline = function, inline
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    @cached_property
    def _numba_type_(self) -> Any:
        """By this numba finds what a name stands for."""
        from kernels.pipeline import Compiled

        return Compiled(self.function, self.inline)


def jit(function: F) -> F:
    """Compile for callers that are compiled themselves, always inlined."""
    return function if PYTHON_ONLY else cast(F, Ingredient(function, inline=True))


def shared(function: F) -> F:
    """Compile for callers that are compiled themselves, as a call: for what is large or rare, and not in an inner loop."""
    return function if PYTHON_ONLY else cast(F, Ingredient(function, inline=False))


def prefetch(_array: Any, _index: Any) -> None:
    """Ask for the cache line of array[index], for writing; any index will do."""


class Entry:
    """A function that Python calls with whatever numba understands, compiled when it is first called, by each process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self._compiler(*arguments)

    @cached_property
    def _compiler(self) -> Any:
        from kernels.pipeline import entry_point

        return entry_point(self.function)


def entry(function: F) -> F:
    """Compile for callers in Python."""
    return function if PYTHON_ONLY else cast(F, Entry(function))
