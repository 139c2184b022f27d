"""Where cases run: this host's memory, its /dev/kvm, a booted kernel. Each turns cases into results."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from kernels.policy import NEWEST, OLDEST, UnknownKernelError, Version, parse_kernel
from sweep.errors import EnvironmentProblemError
from sweep.host.boot import MMU_PARAMETERS, Kernel, run_booted
from sweep.host.case import Case, predict
from sweep.host.compare import CaseResult, Counts, Verdict, compare
from sweep.host.litmus import Measured, Output, clean, encode, parse
from sweep.host.settings import Settings, settings_of, why_not

REPETITIONS = 3  # on a live host: what others do meanwhile only adds
GRACE_SECONDS = 90
Predict = Callable[[Case], list[dict[str, int]]]


class Layer(StrEnum):
    """The three ways to ask a real kernel."""

    MEMORY = "memory"
    KVM = "kvm"
    BOOT = "boot"


class Target(Protocol):
    """A kernel that runs cases."""

    layer: Layer
    kernel: str  # as the model calls it
    mmu: str

    def run(self, cases: Sequence[Case], predict_case: Predict = predict) -> list[CaseResult]: ...

    def description(self) -> Mapping[str, str]: ...


def model_kernel(release: str) -> tuple[str, str]:
    """'6.18.44-x' -> ('6.18', ''), and a note where the model knows another version best. Raises EnvironmentProblemError."""
    found = re.match(r"([0-9]{1,3})\.([0-9]{1,3})", release)
    if found is None:
        raise EnvironmentProblemError(f"kernel release {release[:60]!r} has no version")
    version = Version(int(found[1]), int(found[2]))
    try:
        return str(parse_kernel(str(version))), ""
    except UnknownKernelError:
        if version < OLDEST:
            raise EnvironmentProblemError(f"kernel {version} is older than {OLDEST}, the first that the model knows") from None
        return str(NEWEST), f"kernel {version} is newer than the model's newest; predicted as {NEWEST}"


def judge(case: Case, measured: Measured | None, predict_case: Predict, alone: bool = True) -> CaseResult:
    """What became of a case, from what came back of it; `alone` as for `compare()`."""
    if measured is None:
        return CaseResult(case, Verdict.FAILED, (), "nothing came back")
    if measured.late:
        return CaseResult(case, Verdict.LEFT_OUT, (), "the time was up; --seconds gives more")
    try:
        real = clean(case, measured)
    except ValueError as error:
        return CaseResult(case, Verdict.FAILED, (), str(error))
    found = compare(case, real, predict_case(case), alone)
    if found.is_bad and any(counts.get("thp_fault_fallback") for counts in real):
        return CaseResult(case, Verdict.LEFT_OUT, (), "the host had no huge page free (thp_fault_fallback)")
    return found


def least(case: Case, runs: Sequence[Measured]) -> Measured:
    """The smallest value of each counter over repetitions that came back whole; the first of them if none did."""
    whole = [run for run in runs if not run.failure and run.ended == len(case.steps)]
    if not whole:
        return runs[0]
    shared = [n for n in whole[0].steps if all(n in run.steps for run in whole)]
    steps: dict[int, Counts] = {n: _least([run.steps[n] for run in whole]) for n in shared}
    return Measured(base=_least([run.base for run in whole]), steps=steps, ended=whole[0].ended)


def _least(counts: Sequence[Counts]) -> dict[str, int]:
    return {name: min(other.get(name, value) for other in counts) for name, value in counts[0].items()}


def _by_settings(cases: Sequence[Case]) -> list[list[int]]:
    """Numbers of the cases that need the same settings, in the order in which each set of settings comes first."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for number, case in enumerate(cases):
        groups.setdefault(tuple(sorted(settings_of(case).items())), []).append(number)
    return list(groups.values())


@dataclass
class LiveTarget:
    """This machine's own kernel, with or without /dev/kvm."""

    layer: Layer
    kernel: str
    mmu: str
    settings: Settings
    seconds: float
    memory: int
    release: str = field(default_factory=lambda: os.uname().release)

    def __post_init__(self) -> None:
        self.ends = time.monotonic() + self.seconds

    def run(self, cases: Sequence[Case], predict_case: Predict = predict) -> list[CaseResult]:
        """Cases with the same settings run together; one that differs runs again, because others on this host count, too.

        Raises EnvironmentProblemError if the child prints nothing of ours."""
        found: dict[int, CaseResult] = {}
        for numbers in _by_settings(cases):
            left_out = {n: CaseResult(cases[n], Verdict.LEFT_OUT, (), text) for n in numbers if (text := self._why_not(cases[n]))}
            found |= left_out | self._run_alike({n: cases[n] for n in numbers if n not in left_out}, predict_case)
        return [found[n] for n in range(len(cases))]

    def _run_alike(self, cases: Mapping[int, Case], predict_case: Predict) -> dict[int, CaseResult]:
        results: dict[int, CaseResult] = {}
        runs: dict[int, list[Measured]] = {n: [] for n in cases}
        again = list(cases)
        for _ in range(REPETITIONS):
            output = self._measure({n: cases[n] for n in again}) if again else Output()
            for n in again:
                measured = output.cases.get(n) or Measured(failure="nothing came back")
                runs[n] += [measured] if not (measured.late and runs[n]) else []
                results[n] = judge(cases[n], least(cases[n], runs[n]), predict_case, alone=False)
            again = [n for n in again if results[n].is_bad]
        return results

    def _why_not(self, case: Case) -> str:
        if time.monotonic() >= self.ends:
            return "the time was up; --seconds gives more"
        if 2 * case.point.memory > self.memory:
            return f"{case.point.memory} bytes, with copies twice that, are over the limit of {self.memory}; --memory gives more"
        return why_not(self.settings, case)

    def _measure(self, cases: Mapping[int, Case]) -> Output:
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        left = max(1.0, self.ends - time.monotonic())
        with tempfile.NamedTemporaryFile("w", suffix=".cases") as file:
            file.write("".join(f"{encode(n, case)}\n" for n, case in cases.items()))
            file.flush()
            command = [sys.executable, "-m", "sweep.host.live", self.layer.value, file.name, f"{left:.1f}"]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", env=environment, timeout=left + GRACE_SECONDS, check=False
                )
            except subprocess.TimeoutExpired as error:
                return parse(error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode(errors="replace"))
        output = parse(done.stdout)
        if not output.kernel:
            raise EnvironmentProblemError(f"layer {self.layer}: the child ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        return output

    def description(self) -> Mapping[str, str]:
        return {"release": self.release}


@dataclass
class BootTarget:
    """A kernel image, booted anew for every batch of cases."""

    image: Kernel
    kernel: str
    mmu: str
    seconds: int
    guest_mib: int
    layer: Layer = Layer.BOOT
    output: Output = field(default_factory=Output)
    boots: int = 0

    def run(self, cases: Sequence[Case], predict_case: Predict = predict) -> list[CaseResult]:
        """A case that broke off (a torn line, a kernel that died) is run once more in a boot of its own; one that differs is not.

        Raises EnvironmentProblemError where nothing can be booted."""
        results = self._boot(cases, predict_case)
        broken = [n for n, result in enumerate(results) if result.verdict == Verdict.FAILED]
        again = dict(zip(broken, self._boot([cases[n] for n in broken], predict_case), strict=True))
        return [again.get(n, result) for n, result in enumerate(results)]

    def _boot(self, cases: Sequence[Case], predict_case: Predict) -> list[CaseResult]:
        if not cases:
            return []
        self.boots += 1
        self.output = run_booted(self.image, cases, self.mmu, self.seconds, self.guest_mib)
        results = [judge(case, self.output.cases.get(n), predict_case) for n, case in enumerate(cases)]
        if self.output.trouble:
            text = f"the booted kernel complained: {self.output.trouble[0][:200]}"
            results = [CaseResult(result.case, Verdict.FAILED, result.rows, text) for result in results]
        return results

    def description(self) -> Mapping[str, str]:
        return {**self.output.kernel, "image": self.image.image.name, "parameters": " ".join(MMU_PARAMETERS[self.mmu].values())}
