"""`make mutants`: how many mutants of the model the tests kill; fails below 95 %.

The compiled sources run here as plain Python (NUMBA_DISABLE_JIT), so that a change is another code object in a function's
place. First the unchanged model goes through everything once: lives of a VM against the reference, litmus tests, counts of
real kernels; how long each took is noted, and which functions of the model it called. Then each mutant, in a process of its
own, meets what calls its function, the quickest first, until something fails. The table of policies is the reference's as
well, so its mutants meet the tests alone. Survivors are printed, and written to results/mutants.txt.
"""

import argparse
import cProfile
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"
os.environ["CI"] = "1"

import pytest

from tests.mutation.mutants import KERNELS, Mutant, all_mutants

TESTS = KERNELS.parent / "tests"
FILES = (
    "test_oracle",
    "test_policy",
    "test_subtle_cases",
    "test_host_calls",
    "test_levels",
    "test_daemons",
    "test_many_vcpus",
    "test_contention",
    "test_kernel_cases",
)
CASES = "measured-6.1-tdp and (seqR_seqW or sparseR_Wmid or zap1 or fork or dirtylog or collapse or hostcow)"
SELECTED = f"not 1024_vcpus and not a_fraction_fails and (not counts_equal or {CASES})"  # what plain Python can do
LIVES = 1000  # of a VM
LONGEST_S = 1.5  # of a life; the few that take longer are left out
LONGEST_TEST_S = 10.0
LIMIT_CPU_S = 1200  # of one mutant; one that hangs is a dead one
AIM = 0.95
VERDICTS = ("", "lives", "tests")
CRASHED = 99


@dataclass(frozen=True)
class Probe:
    """What can kill a mutant, its CPU seconds with the unchanged model, the functions ("module.function") that it calls."""

    what: Any
    seconds: float
    calls: frozenset[str]


@dataclass
class Noted:
    seconds: float = 0.0
    calls: frozenset[str] = frozenset()


@contextmanager
def noting() -> Iterator[Noted]:
    """CPU seconds, and the functions of the model that ran."""
    noted, profile, start = Noted(), cProfile.Profile(builtins=False), time.process_time()
    profile.enable()
    try:
        yield noted
    finally:
        profile.disable()
        noted.seconds = time.process_time() - start
        files = ((Path(entry.code.co_filename), entry.code.co_name) for entry in profile.getstats() if not isinstance(entry.code, str))
        noted.calls = frozenset(f"{file.stem}.{name}" for file, name in files if file.parent == KERNELS)


def drawn_lives() -> list[dict[str, Any]]:
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.strategies import configurations

    drawn: list[dict[str, Any]] = []

    @settings(
        max_examples=LIVES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations(max_vcpus=6))
    def draw(configuration: dict[str, Any]) -> None:
        drawn.append(configuration)

    draw()
    return drawn


def lives() -> list[Probe]:
    """(configuration, what the reference says of it) each. Raises AssertionError where the unchanged model differs."""
    from tests.test_differential import check, expect

    found = []
    for configuration in drawn_lives():
        expected = expect(configuration)
        with noting() as noted:
            check(configuration, expected)
        if noted.seconds < LONGEST_S:
            found.append(Probe((configuration, expected), noted.seconds, noted.calls))
    return found


@dataclass
class Recorder:
    """A pytest plugin: what each test takes and calls."""

    found: dict[str, Noted] = field(default_factory=dict)

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Iterator[None]:
        with noting() as self.found[pyfuncitem.nodeid]:
            return (yield)


def run_tests(tests: Sequence[str], *options: str, plugins: Sequence[object] = ()) -> bool:
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "--no-header", "--tb=no", f"--rootdir={TESTS.parent}"]
    return pytest.main([*tests, *quiet, *options], plugins=plugins) == 0


def silence() -> None:
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)


def apart(act: Callable[[], int]) -> int:
    """Start act() in a process of its own, which exits with what it returns; the process's id."""
    pid = os.fork()
    if pid:
        return pid
    code = CRASHED
    try:
        silence()
        code = act()
    finally:
        os._exit(code)


def record_tests(out: Path) -> int:
    recorder = Recorder()
    good = run_tests([str(TESTS / f"{name}.py") for name in FILES], "-k", SELECTED, plugins=[recorder])
    out.write_text(json.dumps([(test, noted.seconds, sorted(noted.calls)) for test, noted in recorder.found.items()]))
    return 0 if good else 1


def probes() -> tuple[list[Probe], list[Probe]]:
    """Lives and tests, the quickest first; the two are made beside each other. Exits where the unchanged model fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tests.json"
        pid = apart(lambda: record_tests(out))
        mine = lives()
        if os.waitpid(pid, 0)[1]:
            sys.exit("the tests fail without a change: run pytest")
        recorded = json.loads(out.read_text())
        tests = [Probe(test, seconds, frozenset(calls)) for test, seconds, calls in recorded if seconds < LONGEST_TEST_S]
    return sorted(mine, key=lambda p: p.seconds), sorted(tests, key=lambda p: p.seconds)


def a_life_differs(probes: Iterable[Probe]) -> bool:
    from tests.test_differential import check

    try:
        for probe in probes:
            check(*probe.what)
    except BaseException:  # whatever it is, the mutant did it
        return True
    return False


def judge(mutant: Mutant, lives: Sequence[Probe], tests: Sequence[Probe]) -> int:
    """Index of the verdict. Changes the model of this process."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S))
    mutant.apply()
    function = f"{mutant.module}.{mutant.function}"
    if a_life_differs(life for life in lives if function in life.calls):
        return VERDICTS.index("lives")
    chosen = [test.what for test in tests if function in test.calls or not mutant.function]
    return VERDICTS.index("tests" if chosen and not run_tests(chosen) else "")


def verdict(status: int) -> str:
    """What a finished process says; one that a signal ended has hung (SIGXCPU) or crashed."""
    code = os.waitstatus_to_exitcode(status)
    return VERDICTS[code] if 0 <= code < len(VERDICTS) else "hang or crash"


def judge_all(mutants: Sequence[Mutant], lives: Sequence[Probe], tests: Sequence[Probe]) -> Iterator[tuple[Mutant, str]]:
    """(mutant, what killed it) as they finish, as many at a time as there are processors."""
    waiting, running = list(reversed(mutants)), dict[int, Mutant]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 2):
            mutant = waiting.pop()
            running[apart(lambda mutant=mutant: judge(mutant, lives, tests))] = mutant  # type: ignore[misc]
        pid, status = os.wait()
        yield running.pop(pid), verdict(status)


def leave_out_prefetch() -> None:
    """An intrinsic: it has no plain Python, and changes no result."""
    import kernels.alone

    kernels.alone.prefetch = lambda *_: None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="each so-manieth mutant")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    mutants = [m for m in all_mutants() if options.only in m.name][:: options.every]
    if options.list:
        print("\n".join(m.name for m in mutants))
        return 0
    leave_out_prefetch()
    return report(mutants)


def report(mutants: Sequence[Mutant]) -> int:
    start = time.monotonic()
    lives, tests = probes()
    for name, found in (("lives", lives), ("tests", tests)):
        print(f"{len(found)} {name}, {sum(p.seconds for p in found):.0f} s, the longest {found[-1].seconds:.1f} s", flush=True)
    survivors = []
    for number, (mutant, killer) in enumerate(judge_all(mutants, lives, tests), 1):
        print(f"{number}/{len(mutants)} {killer or 'SURVIVES'}: {mutant.name}", flush=True)
        if not killer:
            survivors.append(mutant.name)
    killed = len(mutants) - len(survivors)
    share = killed / len(mutants) if mutants else 1.0
    print(f"{killed} of {len(mutants)} mutants killed: {share:.1%} (aim {AIM:.0%}), {time.monotonic() - start:.0f} s")
    (TESTS.parent / "results" / "mutants.txt").write_text("\n".join([f"{killed} of {len(mutants)} killed", *sorted(survivors)]) + "\n")
    return 0 if share >= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
