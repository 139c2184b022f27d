"""How the model's functions are compiled, in one place.

Numba's on-disk cache does not notice a changed constant or callee in another module, so the folder of the cache is
keyed by a digest of every source of this package, the numba version and the CPU. `FAULTSWEEP_CACHE_DIR` moves it.
"""

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import config

F = TypeVar("F", bound=Callable[..., Any])


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


def _cache_dir() -> Path:
    key = hashlib.sha256(f"{model_digest()} {numba.__version__} {platform.machine()}".encode()).hexdigest()[:16]
    return cache_root() / f"numba-{key}"


def compile_cache() -> Path | None:
    """The folder of compiled code of this very model, or None where it cannot be written (then each process compiles)."""
    path = _cache_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path, os.W_OK) else None


_CACHE = compile_cache()
if _CACHE is not None:
    config.CACHE_DIR = str(_CACHE)  # type: ignore[attr-defined]  # numba sets its options at run time

# No reference counting (nothing here allocates) and no C wrapper: both are most of a small function's compile time.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True, "_nrt": False}


def jit(function: F) -> F:
    """Compile for callers that are compiled themselves, always inlined: a call would pass every array of the machine."""
    compile_with: Any = numba.njit
    compiled: F = compile_with(**_OPTIONS, no_cpython_wrapper=True, forceinline=True)(function)
    return compiled


def entry(function: F) -> F:
    """Compile for callers in Python, lazily, cached on disk with all that it calls, where that is possible."""
    compile_with: Any = numba.njit
    compiled: F = compile_with(**_OPTIONS, cache=_CACHE is not None)(function)
    return compiled
