"""`make mutants`: how many mutants of the model the tests kill; fails below 95 %.

The compiled sources run here as plain Python (NUMBA_DISABLE_JIT), so that a change is another code object in a function's place. First
the unchanged model goes through everything once: lives of a VM against the reference, litmus tests, counts of real kernels; how long each
took is noted, and at which mutants it would have gone another way. Then each mutant, in a process of its own, goes through those, the
quickest first, until something fails or it had time enough. The table of policies is the reference's as well, so its mutants meet the
tests alone. Survivors are printed, and written to results/mutants.txt.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"
os.environ["CI"] = "1"

import pytest

from tests.mutation.mutants import KERNELS, Instrumented, Mutant, all_mutants

TESTS = KERNELS.parent / "tests"
FILES = (
    "test_oracle",
    "test_policy",
    "test_subtle_cases",
    "test_host_calls",
    "test_levels",
    "test_daemons",
    "test_rare_states",
    "test_rare_meetings",
    "test_many_vcpus",
    "test_contention",
    "test_kernel_cases",
)
CASES = "measured-6.1-tdp and (seqR_seqW or sparseR_Wmid or zap1 or fork or dirtylog or collapse or hostcow)"
SELECTED = f"not 1024_vcpus and not a_fraction_fails and (not counts_equal or {CASES})"  # what plain Python can do
LIVES = 4000  # of a VM, of which those are taken that the reference lives through quickly
QUICK_S = 0.015
LONGEST_S = 3.0  # of a life; the few that take longer are left out
LONGEST_TEST_S = 6.0
PATIENCE_S = 5.0  # of CPU, and ten times what the unchanged model took; a mutant that takes longer hangs, and is dead
LIVES_S = 60.0  # of CPU for all lives of a mutant: one that makes each life slow (a scan that never ran before) goes on to the tests
TESTS_S = 300.0  # for all its tests; one that is still alive then counts as a survivor
COLLECTION_S = 20.0  # until pytest has found the tests
AIM = 0.95
VERDICTS = ("", "lives", "tests")
CRASHED = 99


@dataclass(frozen=True)
class Probe:
    """What can kill a mutant, its CPU seconds with the unchanged model, the numbers of the mutants that would go another way in it."""

    what: Any
    seconds: float
    meets: frozenset[int]


@dataclass
class Noted:
    seconds: float = 0.0
    meets: frozenset[int] = frozenset()


@contextmanager
def noting(model: Instrumented) -> Iterator[Noted]:
    """CPU seconds, and which mutants would have made a difference."""
    noted, start = Noted(), time.process_time()
    model.met.clear()
    try:
        yield noted
    finally:
        noted.seconds = time.process_time() - start
        noted.meets = frozenset(model.met)


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


Life = tuple[dict[str, Any], Any]  # a configuration, and what the reference says of it


def lives() -> list[Life]:
    from tests.test_differential import expect

    found = []
    for configuration in drawn_lives():
        start = time.process_time()
        life = configuration, expect(configuration)
        if time.process_time() - start < QUICK_S:
            found.append(life)
    return found


@dataclass
class Recorder:
    """A pytest plugin: what each test takes and meets."""

    model: Instrumented
    found: dict[str, Noted] = field(default_factory=dict)

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, LONGEST_TEST_S)
        try:
            with noting(self.model) as noted:
                done = yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        if noted.seconds < LONGEST_TEST_S:
            self.found[pyfuncitem.nodeid] = noted
        return done


def leave_out(_number: int, _frame: object) -> None:
    pytest.skip("too long in plain Python")


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


def record_tests(names: Sequence[str], first: int, out: Path) -> int:
    signal.signal(signal.SIGPROF, leave_out)
    recorder = Recorder(Instrumented(first))
    good = run_tests([str(TESTS / f"{name}.py") for name in names], "-k", SELECTED, plugins=[recorder])
    out.write_text(json.dumps([(test, noted.seconds, sorted(noted.meets)) for test, noted in recorder.found.items()]))
    return 0 if good else 1


def record_lives(lives: Sequence[Life], first: int, out: Path) -> int:
    from tests.test_differential import check

    model, found = Instrumented(first), []
    for number, life in enumerate(lives):
        with noting(model) as noted:
            check(*life)
        if noted.seconds < LONGEST_S:
            found.append((number, noted.seconds, sorted(noted.meets)))
    out.write_text(json.dumps(found))
    return 0


def probes(first: int) -> tuple[list[Probe], list[Probe]]:
    """Lives and tests, the quickest first, gone through beside each other. Exits where the unchanged model fails."""
    drawn = lives()
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{number}.json" for number in range(3)]
        acts = [
            partial(record_lives, drawn, first, outs[0]),
            partial(record_tests, FILES[::2], first, outs[1]),
            partial(record_tests, FILES[1::2], first, outs[2]),
        ]
        for pid in [apart(act) for act in acts]:
            if os.waitpid(pid, 0)[1]:
                sys.exit("the tests fail without a change: run pytest")
        found = [[Probe(what, seconds, frozenset(meets)) for what, seconds, meets in json.loads(out.read_text())] for out in outs]
    mine = [Probe(drawn[probe.what], probe.seconds, probe.meets) for probe in found[0]]
    return sorted(mine, key=lambda p: p.seconds), sorted([*found[1], *found[2]], key=lambda p: p.seconds)


def a_life_differs(probes: Iterable[Probe]) -> bool:
    from tests.test_differential import check

    end = time.process_time() + LIVES_S
    try:
        for probe in probes:
            if time.process_time() > end:
                break
            be_patient(probe.seconds)
            check(*probe.what)
    except BaseException:  # whatever it is, the mutant did it
        return True
    return False


def be_patient(seconds: float) -> None:
    """From now on so much longer than that; then the process ends."""
    signal.setitimer(signal.ITIMER_PROF, PATIENCE_S + 10 * seconds)


@dataclass
class Patient:
    """A pytest plugin: patience with each test anew, and an end with all of them."""

    seconds: dict[str, float]
    end: float = field(default_factory=lambda: time.process_time() + COLLECTION_S + TESTS_S)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.process_time() > self.end:
            pytest.skip("long enough")
        be_patient(self.seconds[item.nodeid])


def judge(number: int, mutant: Mutant, lives: Sequence[Probe], tests: Sequence[Probe]) -> int:
    """Index of the verdict. Changes the model of this process."""
    warnings.simplefilter("ignore")
    mutant.apply()
    if a_life_differs(life for life in lives if number in life.meets):
        return VERDICTS.index("lives")
    chosen = [test for test in tests if number in test.meets or not mutant.function]
    be_patient(COLLECTION_S)
    patient = Patient({test.what: test.seconds for test in chosen})
    return VERDICTS.index("tests" if chosen and not run_tests([test.what for test in chosen], plugins=[patient]) else "")


def verdict(status: int) -> str:
    """What a finished process says; one that a signal ended has hung (SIGPROF) or crashed."""
    code = os.waitstatus_to_exitcode(status)
    return VERDICTS[code] if 0 <= code < len(VERDICTS) else "hang or crash"


def judge_all(mutants: Sequence[tuple[int, Mutant]], lives: Sequence[Probe], tests: Sequence[Probe]) -> Iterator[tuple[Mutant, str]]:
    """(mutant, what killed it) as they finish, as many at a time as there are processors."""
    waiting, running = list(reversed(mutants)), dict[int, Mutant]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 2):
            number, mutant = waiting.pop()
            running[apart(partial(judge, number, mutant, lives, tests))] = mutant
        pid, status = os.wait()
        yield running.pop(pid), verdict(status)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="each so-manieth mutant")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    whole = all_mutants()
    mutants = [(number, mutant) for number, mutant in enumerate(whole) if options.only in mutant.name][:: options.every]
    if options.list:
        print("\n".join(mutant.name for _, mutant in mutants))
        return 0
    return report(mutants, first=sum(not mutant.function for mutant in whole))


def report(mutants: Sequence[tuple[int, Mutant]], first: int) -> int:
    start = time.monotonic()
    lives, tests = probes(first)
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
