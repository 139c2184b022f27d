"""`make mutants`: how many mutants of the model the tests kill; fails below 95 %.

The compiled sources run here as plain Python (NUMBA_DISABLE_JIT), so that a mutant costs seconds. Each runs in a process
of its own: lives of a VM against the reference, litmus tests, more lives, counts of real kernels.
Survivors are printed, and written to results/mutants.txt.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"
os.environ["CI"] = "1"

ROOT = Path(__file__).resolve().parents[2]
LITMUS = ("test_oracle", "test_policy", "test_subtle_cases", "test_host_calls", "test_levels", "test_daemons", "test_many_vcpus")
SLOW = "not 1024_vcpus and not a_fraction_fails"  # in plain Python, 20 s each
SHORT, LONG = 60, 200  # lives of a VM
CASES = "measured-6.1-tdp and (seqR_seqW or sparseR_Wmid or zap1 or fork or dirtylog or collapse or hostcow)"
LIMIT_CPU_S = 1500  # of one process; the unchanged model needs a fraction of it
AIM = 0.95
VERDICTS = ("", "lives", "litmus", "long lives", "kernel cases")
CRASHED = 99


class MutantFinder(MetaPathFinder, Loader):
    """Imports one module of kernels from the mutant's source."""

    def __init__(self, module: str, source: str) -> None:
        self.name = f"kernels.{module}"
        self.source = source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, origin=str(ROOT / "kernels")) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, f"{self.name} (mutant)", "exec"), module.__dict__)


def lives_differ(examples: int) -> bool:
    """Some life of a VM differs between the mutant and the reference."""
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.strategies import configurations
    from tests.test_differential import compare

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(configurations(max_vcpus=6, gigantic=examples == LONG))
    def all_equal(configuration: dict[str, Any]) -> None:
        compare(configuration)

    try:
        all_equal()
    except BaseException:  # whatever it is, the mutant did it
        return True
    return False


def judge(mutant: Any) -> str:
    """Which stage kills the mutant; '' if none does. Runs in a fresh process."""
    import resource
    import warnings

    import pytest

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_S, LIMIT_CPU_S))  # a mutant that hangs is a dead one
    for name in [name for name in sys.modules if name.split(".")[0] in ("kernels", "sweep") or name.startswith("tests.test_")]:
        del sys.modules[name]
    sys.meta_path.insert(0, MutantFinder(mutant.module, mutant.source))
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "--no-header", "--tb=no"]
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    files = [str(ROOT / "tests" / f"{name}.py") for name in LITMUS]
    compiled = mutant.module != "policy"  # the reference shares the policy table
    stages: dict[str, Callable[[], bool]] = {
        "lives": lambda: compiled and lives_differ(SHORT),
        "litmus": lambda: pytest.main([*files, "-k", SLOW, *quiet]) != 0,
        "long lives": lambda: compiled and lives_differ(LONG),
        "kernel cases": lambda: pytest.main([str(ROOT / "tests" / "test_kernel_cases.py"), "-k", CASES, *quiet]) != 0,
    }
    return next((name for name, kills in stages.items() if kills()), "")


def judge_apart(mutant: Any) -> int:
    """Start judge() in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = CRASHED
    try:
        code = VERDICTS.index(judge(mutant))
    finally:
        os._exit(code)


def verdict(status: int) -> str:
    """What a finished process says; one that a signal ended has hung (SIGXCPU) or crashed."""
    code = os.waitstatus_to_exitcode(status)
    return VERDICTS[code] if 0 <= code < len(VERDICTS) else "hang or crash"


def judge_all(mutants: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """(mutant, what killed it) as they finish, as many at a time as there are processors."""
    waiting, running = list(reversed(mutants)), {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 2):
            mutant = waiting.pop()
            running[judge_apart(mutant)] = mutant
        pid, status = os.wait()
        yield running.pop(pid), verdict(status)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="each so-manieth mutant")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(None if arguments is None else list(arguments))
    sys.path.insert(0, str(ROOT))
    import hypothesis.stateful  # noqa: F401 - imported once here, not in every process
    import numba  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pytest  # noqa: F401

    from tests.mutation.mutants import all_mutants

    mutants = [m for m in all_mutants() if options.only in m.name][:: options.every]
    if options.list:
        print("\n".join(m.name for m in mutants))
        return 0
    return report(mutants)


def report(mutants: list[Any]) -> int:
    from tests.mutation.mutants import Mutant

    survivors, start = [], time.monotonic()
    control = Mutant("mmu", "control: nothing changed", (ROOT / "kernels" / "mmu.py").read_text())
    for mutant, killer in judge_all([control]):
        print(f"{mutant.name}: {killer or 'survives, as it must'}, {time.monotonic() - start:.0f} s", flush=True)
        if killer:
            return 1
    for number, (mutant, killer) in enumerate(judge_all(mutants), 1):
        print(f"{number}/{len(mutants)} {killer or 'SURVIVES'}: {mutant.name}", flush=True)
        if not killer:
            survivors.append(mutant.name)
    killed = len(mutants) - len(survivors)
    share = killed / len(mutants) if mutants else 1.0
    print(f"{killed} of {len(mutants)} mutants killed: {share:.1%} (aim {AIM:.0%}), {time.monotonic() - start:.0f} s")
    (ROOT / "results" / "mutants.txt").write_text("\n".join([f"{killed} of {len(mutants)} killed", *sorted(survivors)]) + "\n")
    return 0 if share >= AIM else 1


if __name__ == "__main__":
    sys.exit(main())
