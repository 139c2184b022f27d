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
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic

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


class _Ingredient(JITCodeLibrary):
    """The code of a function that only compiled functions call. It is optimised and made machine code with its entry, not by itself."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


class _Inlined(Compiler):
    """Numba's pipeline, without machine code at its end: every function would be compiled once more for each caller's caller."""

    attribute = "alwaysinline"

    def _compile_core(self) -> Any:
        state = self.state
        state.flags.no_compile = True
        state.library = _Ingredient(state.targetctx.codegen(), state.func_id.func_qualname)  # type: ignore[no-untyped-call]
        result = super()._compile_core()  # type: ignore[no-untyped-call]
        state.library.get_function(result.fndesc.llvm_func_name).add_function_attribute(self.attribute)
        result = result._replace(entry_point=[].append)  # by this callers find it: any builtin of its own, for it is never called
        state.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
        return result


class _Called(_Inlined):
    attribute = "noinline"


def jit(function: F) -> F:
    """Compile for callers that are compiled themselves, always inlined: a call would pass every array of the machine."""
    compile_with: Any = numba.njit
    compiled: F = compile_with(**_OPTIONS, no_cpython_wrapper=True, pipeline_class=_Inlined)(function)
    return compiled


def shared(function: F) -> F:
    """Compile for callers that are compiled themselves, as a call: for what is large and not in an inner loop."""
    compile_with: Any = numba.njit
    compiled: F = compile_with(**_OPTIONS, no_cpython_wrapper=True, pipeline_class=_Called)(function)
    return compiled


def _prefetch(_typing: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        builder.call(function, [address, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


prefetch: Any = intrinsic(_prefetch)  # asks for the cache line of array[index], for writing; any index will do


def entry(function: F) -> F:
    """Compile for callers in Python, lazily, cached on disk with all that it calls, where that is possible."""
    compile_with: Any = numba.njit
    compiled: F = compile_with(**_OPTIONS, cache=_CACHE is not None)(function)
    return compiled
