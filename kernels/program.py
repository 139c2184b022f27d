"""A compiled function whose machine code is kept on disk, and called without numba: its import is half of a warm start."""

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial, update_wrapper
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm

from kernels.jit import PYTHON_ONLY, compile_cache, is_private

Kind = tuple[tuple[Any, int], ...]  # of an argument: dtype and dimensions of each array
DIGEST_BYTES = 32
SUFFIX = ".code"


@cache
def _linker() -> Any:
    """LLVM's engine, which machine code is added to."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


class Passed(NamedTuple):
    """An argument as compiled code takes it."""

    given: Any  # keeps the arrays as long as their addresses
    kind: Kind
    words: Any  # what is at an Address: of each array its data and its lengths


def as_passed(given: Any) -> Passed:
    """A NamedTuple of arrays. Raises TypeError for an array with gaps: compiled code goes by its data and lengths alone."""
    words: list[int] = []
    for array in given:
        flags = array.flags
        if not (flags.c_contiguous and flags.aligned):
            raise TypeError(f"{type(given).__name__}: an array is not contiguous, or not aligned")
        simple = flags.writeable and array.size  # then this takes a third of the time
        words.append(ctypes.addressof(ctypes.c_char.from_buffer(array)) if simple else array.ctypes.data)
        words.extend(array.shape)
    return Passed(given, tuple([(array.dtype, array.ndim) for array in given]), (ctypes.c_int64 * len(words))(*words))


class Call:
    """A call of compiled code whose NamedTuples are known, so that they are looked at once; its whole numbers are given each time."""

    def __init__(self, symbol: str, call: Callable[..., int], arguments: Sequence[Passed | None]) -> None:
        """`arguments`: None where a number will be."""
        self.symbol, self.call = symbol, call
        self.arguments = arguments  # addresses hold no array: this does
        self.result, self.failure = ctypes.c_int64(), ctypes.c_void_p()  # numba's convention: these two come first
        self.numbers = [ctypes.c_int64() for each in arguments if each is None]
        left = iter(self.numbers)
        given = [next(left) if each is None else each.words for each in arguments]
        self.words = [ctypes.byref(self.result), ctypes.byref(self.failure), *given]

    def __call__(self, *numbers: int) -> int:
        """Raises OverflowError for a number of more than 64 bits."""
        for word, number in zip(self.numbers, numbers, strict=True):
            word.value = number
            if word.value != number:
                raise OverflowError(f"{number} has more than 64 bits")
        if self.call(*self.words):
            raise RuntimeError(f"{self.symbol}() raised an exception, which nothing in it should")
        return self.result.value


class Program:
    """A function of whole numbers and NamedTuples of arrays, always of the same kinds, that returns a whole number."""

    def __init__(self, function: Callable[..., int]) -> None:
        self.function = function
        self.symbol = f"{function.__module__}.{function.__qualname__}"
        self.kinds: list[Kind | None] = []  # None: a whole number
        self.loaded: Any = None
        self.loading = threading.Lock()
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> int:
        """Arguments are numbers, NamedTuples, or what as_passed() made of them."""
        call = self.bind(*[None if isinstance(each, int) else each for each in arguments])
        return call(*[each for each in arguments if isinstance(each, int)])

    def bind(self, *arguments: Any) -> Callable[..., int]:
        """The function of its whole numbers alone, which are None here. Raises TypeError for arguments of other kinds than before."""
        passed = [each if each is None or isinstance(each, Passed) else as_passed(each) for each in arguments]
        if PYTHON_ONLY:
            return partial(self._in_python, [each and each.given for each in passed])
        kinds = [each and each.kind for each in passed]
        if self.loaded is None:
            with self.loading:
                if self.loaded is None:
                    self.kinds, self.loaded = kinds, self._load(kinds, [each.given if each else 0 for each in passed])
        if kinds != self.kinds:
            raise TypeError(f"{self.symbol}() was compiled for {self.kinds}, not for {kinds}")
        return Call(self.symbol, self.loaded, passed)

    def _in_python(self, given: Sequence[Any], *numbers: int) -> int:
        left = iter(numbers)
        return int(self.function(*[next(left) if each is None else each for each in given]))

    def _load(self, kinds: Sequence[Kind | None], arguments: Sequence[Any]) -> Any:
        folder = compile_cache()
        digest = hashlib.sha256(repr(kinds).encode()).hexdigest()[:16]
        path = folder / f"{self.symbol}-{digest}{SUFFIX}" if folder else None
        code = kept(path) if path else None
        if code is None:
            code = self._compile(arguments)
            if path:
                keep(path, code)
        engine = _linker()
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        address = engine.get_function_address(self.symbol)
        if not address:
            raise RuntimeError(f"{path}: no {self.symbol}() in it")
        return ctypes.PYFUNCTYPE(ctypes.c_int32)(address)  # which holds Python's lock: calls share what as_passed() made beforehand

    def _compile(self, arguments: Sequence[Any]) -> bytes:
        from kernels.pipeline import machine_code

        return machine_code(self.function, arguments, self.symbol)


def kept(path: Path) -> bytes | None:
    """The code that keep() wrote; None where there is none, it is damaged, or somebody else can write there."""
    try:
        with path.open("rb") as file:
            found = file.read() if is_private(os.fstat(file.fileno())) else b""
    except OSError:
        return None
    code = found[DIGEST_BYTES:]
    return code if found[:DIGEST_BYTES] == hashlib.sha256(code).digest() else None


def keep(path: Path, code: bytes) -> None:
    """Write the file whole or not at all: other processes may do the same. Where it cannot be written, the next one compiles."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
