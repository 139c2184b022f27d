"""How compiled code is kept, trusted and called; that the same runs as plain Python."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from kernels import Touch, simulate
from kernels.alone import new_scratch
from kernels.arena import Arena
from kernels.jit import compile_cache
from kernels.loops import bind_run
from kernels.program import Program, as_passed, keep, kept
from kernels.spec import PMD_BYTES, PMD_ORDER, PMD_PAGES
from kernels.state import Geometry, Int64s, new_machine

STEPS = """
import json, sys
from kernels import Access, Call, Collapse, DirtyLog, Fork, Khugepaged, Ksm, Order, Populate, Touch, simulate
touches = Touch(access=Access.MIXED, order=Order.ZIPF, repeat=True, touches=3000)
points = (
    {"steps": [Touch(access=Access.READ), Fork(), Touch(order=Order.RANDOM), DirtyLog(Call.LOG_ON), touches, DirtyLog(Call.LOG_GET)]},
    {"steps": [Populate(threads=2), Touch(access=Access.PAIRS)], "vcpus": 3, "mmu": "shadow", "cores": 2},
    {"steps": [Touch(), Collapse()], "ksm": Ksm(), "khugepaged": Khugepaged(), "backing": "anonymous_thp", "vcpus": 2},
    {"steps": [Touch(access=Access.MIXED, order=Order.RANDOM, repeat=True, touches=10**9, skip_hits=True)], "offset": 4096},
)
runs = [simulate(memory=4 << 20, kernel="6.1", **point) for point in points]
print(json.dumps([[run.counters, run.gauges, run.total_ns, run.latency, "numba" in sys.modules] for run in runs]))
"""

INDEXES = """
import numpy as np
from kernels import loops, program

def check(index):
    for each in index if isinstance(index, tuple) else (index,):
        assert each == slice(None) if isinstance(each, slice) else each >= 0, index

class Checked(np.ndarray):
    def __getitem__(self, index):
        check(index)
        return super().__getitem__(index)

    def __setitem__(self, index, value):
        check(index)
        super().__setitem__(index, value)

def with_checks(given):
    passed = as_passed(given)
    return passed._replace(given=type(given)(*(array.view(Checked) for array in given))) if isinstance(given, tuple) else passed

as_passed, program.as_passed, loops.as_passed = program.as_passed, with_checks, with_checks
"""


def run(program: str, **environment: str) -> str:
    ran = subprocess.run([sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=True)
    return ran.stdout


def test_what_is_kept_needs_no_numba() -> None:
    if compile_cache() is None:
        pytest.skip("nothing can be kept here")
    simulate(memory=PMD_BYTES, steps=[Touch()])
    assert [with_numba for *_, with_numba in json.loads(run(STEPS))] == [False] * 4


def test_plain_python_does_the_same_and_counts_cells_from_the_front() -> None:
    """Compiled code adds no length to a negative index, and checks none: here both would fail."""
    compiled, plain = json.loads(run(STEPS)), json.loads(run(INDEXES + STEPS, NUMBA_DISABLE_JIT="1"))
    assert [result[:-1] for result in compiled] == [result[:-1] for result in plain]


def test_decorators_leave_plain_python_alone() -> None:
    program = "from kernels import fault, jit\nprint(fault.on_map.__code__.co_name, jit.shared(len) is len, jit.prefetch([], 7))"
    assert run(program, NUMBA_DISABLE_JIT="1") == "on_map True None\n"


def test_a_bound_call_keeps_its_arrays() -> None:
    """Compiled code knows addresses alone."""
    given = Sum(np.arange(5), np.zeros(1, np.int64))
    alive = weakref.ref(given.found)
    call = Program(add_up).bind(given, None)
    del given
    gc.collect()
    assert alive() is not None
    call(1)
    assert alive()[0] == 10  # type: ignore[index]
    del call
    gc.collect()
    assert alive() is None


def test_arrays_that_compiled_code_would_misread_are_refused() -> None:
    m = new_machine(Geometry(PMD_PAGES, 0, PMD_ORDER), 1)
    with pytest.raises(TypeError, match="not contiguous"):
        as_passed(m._replace(pte=np.zeros(2 * len(m.pte), np.uint8)[::2]))
    with pytest.raises(TypeError, match="not aligned"):
        as_passed(m._replace(vm=np.zeros(8 * len(m.vm) + 1, np.uint8)[1:].view(np.int64)))
    with pytest.raises(OverflowError, match="64 bits"):
        Program(add_up)(Sum(np.arange(5), np.zeros(1, np.int64)), 1 << 63)
    simulate(memory=PMD_BYTES, steps=[Touch()])
    arena = Arena()
    arena.make_room(1, 1, 1, 1)
    wrong = m._replace(pte=m.pte.astype(np.int64))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="was compiled for"):
        bind_run(wrong, new_scratch(m), arena.env, arena.tasks, arena.chances, arena.results)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [truncate, flip_a_bit, lambda path: path.write_bytes(b""), lambda path: path.chmod(0o620), lambda path: path.chmod(0o602), Path.unlink],
)
def test_code_that_is_damaged_or_others_can_write_is_not_run(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = tmp_path / "some.code"
    keep(path, b"code of a function")
    assert kept(path) == b"code of a function"
    assert [each.name for each in tmp_path.iterdir()] == ["some.code"]
    change(path)
    assert kept(path) is None


def test_code_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    keep(tmp_path / "missing" / "some.code", b"code")
    assert kept(tmp_path / "missing" / "some.code") is None


@pytest.mark.parametrize(("mode", "trusted"), [(0o700, True), (0o755, True), (0o775, False), (0o777, False)])
def test_a_folder_that_others_can_write_holds_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, trusted: bool) -> None:
    monkeypatch.setenv("FAULTSWEEP_CACHE_DIR", str(tmp_path))
    path = compile_cache.__wrapped__()
    assert path is not None and path.stat().st_mode & 0o777 == 0o700
    path.chmod(mode)
    assert compile_cache.__wrapped__() == (path if trusted else None)


def test_a_folder_of_somebody_else_holds_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTSWEEP_CACHE_DIR", str(tmp_path))
    somebody = os.geteuid() + 1
    monkeypatch.setattr("os.geteuid", lambda: somebody)
    assert compile_cache.__wrapped__() is None


class Sum(NamedTuple):
    parts: Int64s
    found: Int64s


def add_up(what: Sum, times: int) -> int:
    for i in range(len(what.parts)):
        what.found[0] += times * what.parts[i]
    return what.found[0]


def test_a_damaged_file_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.program.compile_cache", lambda: tmp_path)
    for damage in (None, truncate, None):
        program = Program(add_up)
        what = Sum(np.arange(5), np.zeros(1, np.int64))
        assert program(what, 3) == what.found[0] == 30
        (path,) = tmp_path.iterdir()
        assert kept(path) is not None
        if damage:
            damage(path)
