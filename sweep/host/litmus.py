"""The litmus program (litmus.c): how it is built, the lines it reads, the lines it prints."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernels.spec import PAGE_BYTES
from sweep.errors import EnvironmentProblemError, UsageError
from sweep.host.case import MAX_CASE_BYTES, AccessList, Case, units_of
from sweep.steps import (
    ChildExitStep,
    CollapseStep,
    DirtyLogStep,
    DontNeedStep,
    ForkStep,
    HostTouchStep,
    PopulateStep,
    PreFaultStep,
    TouchStep,
)

SOURCE = Path(__file__).with_name("litmus.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-static")
BUILD_SECONDS = 120
MAX_VCPUS = 16
MAX_OUTPUT_BYTES = 64 << 20
AS_DEFAULT = ("order", "read_first", "touches", "repeat", "window")  # of a touch step that the program takes
KINDS = {"read": "r", "write": "w", "pairs": "p"}


def cache_root() -> Path:
    """Where what is built or fetched is kept for this user."""
    base = os.environ.get("FAULTSWEEP_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faultsweep"
    return Path(base) / "validate"


def compiler() -> str:
    """A C compiler: $CC, or the first of cc, gcc, clang on the PATH. Raises EnvironmentProblemError."""
    found = next((path for name in (os.environ.get("CC", ""), *COMPILERS) if name and (path := shutil.which(name))), None)
    if found is None:
        raise EnvironmentProblemError(
            "no C compiler found (cc, gcc, clang, or $CC): the litmus program cannot be built; Debian: apt-get install gcc libc6-dev"
        )
    return found


def build(folder: Path | None = None) -> Path:
    """The static program, compiled once per source and compiler. Raises EnvironmentProblemError."""
    command = [compiler(), *FLAGS]
    key = hashlib.sha256(SOURCE.read_bytes() + "\0".join(command).encode()).hexdigest()[:16]
    target = (folder or cache_root()) / f"litmus-{key}"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            [*command, "-o", made, SOURCE, "-lpthread"], capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentProblemError(f"{command[0]} took more than {BUILD_SECONDS} s for {SOURCE.name}; see what slows it") from None
    if done.returncode:
        first = next((row for row in done.stderr.splitlines() if "error" in row or "cannot find" in row), done.stderr.strip()[:200])
        raise EnvironmentProblemError(f"{command[0]} cannot build {SOURCE}: {first}; a static libc is needed (Debian: libc6-dev)")
    made.replace(target)  # whole or not at all
    return target


def _runs(pages: range, kind: str) -> str:
    if not pages:
        return ""
    count, stride = len(pages), pages.step
    return f"{kind}{pages.start}" + (f"+{count}" if count > 1 else "") + (f"*{stride}" if count > 1 and stride != 1 else "")


def _touch(step: TouchStep, case: Case) -> str:
    other = [name for name in AS_DEFAULT if getattr(step, name) != TouchStep.model_fields[name].default]
    if other or step.access not in KINDS or step.every % PAGE_BYTES:
        raise UsageError(f"{case.name}: touch: the litmus program takes read, write and pairs, in order, by whole pages; use a list else")
    pages = units_of(step, case.pages)
    actors = min(case.point.vcpus, step.vcpus or case.point.vcpus)
    n = len(pages)
    parts = [pages if step.spread == "all" else pages[n * v // actors : n * (v + 1) // actors] for v in range(actors)]
    return "touch " + " ".join(f"{v} {_runs(part, KINDS[step.access])}" for v, part in enumerate(parts) if part)


def _list(step: AccessList, _case: Case) -> str:
    by_vcpu: dict[int, list[str]] = {}
    for access in step.accesses:
        by_vcpu.setdefault(access.vcpu, []).append(f"{'w' if access.write else 'r'}{access.page}")
    return "touch " + " ".join(f"{vcpu} {','.join(by_vcpu[vcpu])}" for vcpu in sorted(by_vcpu))


def _part(step: Any, case: Case) -> tuple[int, int]:
    return int(step.range[0] * case.pages), int(step.range[1] * case.pages)


def _host(step: HostTouchStep, case: Case) -> str:
    first, end = _part(step, case)
    if step.every % PAGE_BYTES:
        raise UsageError(f"{case.name}: host_touch: every = {step.every} is no multiple of {PAGE_BYTES}")
    return "host " + _runs(range(first, end, step.every // PAGE_BYTES), KINDS[step.access])


def dontneed_calls(step: DontNeedStep, pages: int) -> list[tuple[int, int]]:
    """(first page, pages) of each MADV_DONTNEED of the step."""
    first, end = int(step.range[0] * pages), int(step.range[1] * pages)
    if step.every is None:
        return [(first, end - first)] if end > first else []
    starts = range(first + step.at // PAGE_BYTES, end, step.every // PAGE_BYTES)
    return [(start, min(step.size // PAGE_BYTES, end - start)) for start in starts]


def _dontneed(step: DontNeedStep, case: Case) -> str:
    calls = dontneed_calls(step, case.pages)
    if len({size for _, size in calls}) > 1:
        raise UsageError(f"{case.name}: dontneed: its last call is shorter than the others; choose a range of whole calls")
    if not calls:
        return "dontneed 0 0 0 0"
    return f"dontneed {calls[0][0]} {calls[0][1]} {calls[1][0] - calls[0][0] if len(calls) > 1 else 0} {len(calls)}"


def _collapse(step: CollapseStep, case: Case) -> str:
    first, end = _part(step, case)
    return f"collapse {first} {end - first}"


ENCODERS: Mapping[type, Callable[[Any, Case], str]] = {
    TouchStep: _touch,
    AccessList: _list,
    HostTouchStep: _host,
    PopulateStep: lambda step, _case: f"populate {KINDS[step.access]}",
    PreFaultStep: lambda _step, _case: "pre_fault",
    DontNeedStep: _dontneed,
    CollapseStep: _collapse,
    ForkStep: lambda _step, _case: "fork",
    ChildExitStep: lambda _step, _case: "child_exit",
    DirtyLogStep: lambda step, _case: f"log {step.state}",
}


def encode(number: int, case: Case) -> str:
    """The line of a case. Raises UsageError for what the program cannot do."""
    p = case.point
    if p.memory > MAX_CASE_BYTES or p.vcpus > MAX_VCPUS:
        raise UsageError(f"{case.name}: at most {MAX_CASE_BYTES} bytes and {MAX_VCPUS} vCPUs can be run on a real kernel")
    steps = []
    for step in case.steps:
        if type(step) not in ENCODERS:
            raise UsageError(f"{case.name}: {step.op} is not run on a real kernel")
        steps.append(ENCODERS[type(step)](step, case))
    head = f"case {number} {p.backing} {case.pages} {p.offset // PAGE_BYTES} {'4k' if p.guest_page == PAGE_BYTES else '2m'} {p.vcpus}"
    return " ; ".join([head, *steps])


@dataclass
class Measured:
    """What came back of one case."""

    base: Mapping[str, int] = field(default_factory=dict)
    steps: dict[int, Mapping[str, int]] = field(default_factory=dict)
    ended: int | None = None  # steps, once the program said that it is through
    failure: str = ""
    late: bool = False


@dataclass
class Output:
    """What a run of the program printed."""

    kernel: Mapping[str, str] = field(default_factory=dict)
    cases: dict[int, Measured] = field(default_factory=dict)
    trouble: list[str] = field(default_factory=list)
    done: bool = False
    torn: int = 0  # lines that began as ours and do not carry their checksum


LINE = re.compile(r"fs1 (?P<kind>[a-z]+)(?: (?P<rest>.*))? \*(?P<crc>[0-9a-f]{8})")


def read_line(text: str) -> tuple[str, str] | None:
    """(kind, rest) of a line that is whole; None for any other."""
    found = LINE.fullmatch(text)
    if found is None or zlib.crc32(text[: found.start("crc") - 2].encode()) != int(found["crc"], 16):
        return None
    return found["kind"], found["rest"] or ""


def _counts(words: Iterable[str]) -> dict[str, int]:
    pairs = (word.partition("=") for word in words)
    return {name: int(value) for name, _, value in pairs}


def _number(words: Sequence[str], at: int) -> int:
    return int(words[at])


def _take(output: Output, kind: str, rest: str) -> None:
    """Raises ValueError, IndexError for a whole line that says nothing sensible."""
    words = rest.split()
    if kind == "kernel":
        output.kernel = dict(word.partition("=")[::2] for word in words)
    elif kind == "trouble":
        output.trouble.append(rest)
    elif kind == "done":
        output.done = True
    elif kind in ("base", "step", "end", "fail", "late"):
        case = output.cases.setdefault(_number(words, 0), Measured())
        _take_case(case, kind, words, rest)


def _take_case(case: Measured, kind: str, words: Sequence[str], rest: str) -> None:
    if kind == "base":
        case.base = _counts(words[1:])
    elif kind == "step":
        case.steps[_number(words, 1)] = _counts(words[2:])
    elif kind == "end":
        case.ended = _number(words, 1)
    elif kind == "late":
        case.late = True
    else:
        case.failure = rest.partition(" ")[2] or "failed"


def parse(text: str) -> Output:
    """Everything whole that the program printed; a torn line counts as torn and its case will lack a step."""
    output = Output()
    for row in text.replace("\r", "\n").split("\n"):
        at = row.find("fs1 ")
        if at < 0:
            continue
        line = read_line(row[at:])
        try:
            if line is None:
                output.torn += 1
            else:
                _take(output, *line)
        except (ValueError, IndexError):
            output.torn += 1
    return output


GUEST_OPS = frozenset({"touch", "touch_list"})
HELD = ("private_hugetlb", "shared_hugetlb")
PER_RUN = ("pf_taken", "pf_fixed", "pf_spurious", "pf_fast", "pf_emulate", "exits")
GAUGES = ("pages_4k", "pages_2m", "pages_1g")


def clean(case: Case, measured: Measured) -> list[dict[str, int]]:
    """The counts of each step under the model's names, less what an empty step costs. Raises ValueError that says what is missing."""
    if measured.failure:
        raise ValueError(measured.failure)
    missing = [n for n in range(len(case.steps)) if n not in measured.steps]
    if missing or measured.ended != len(case.steps) or not measured.base:
        raise ValueError(f"lines are missing: steps {missing}" if missing else "lines are missing: its end")
    return [_clean_step(step.op in GUEST_OPS, measured.base, measured.steps[n]) for n, step in enumerate(case.steps)]


def _clean_step(guest: bool, base: Mapping[str, int], raw: Mapping[str, int]) -> dict[str, int]:
    counts = dict(raw)
    for name in PER_RUN if guest else ():
        if name in counts:
            counts[name] -= base.get(name, 0)
    for name in GAUGES:
        if name in counts:
            counts[name] -= base.get(name, 0)
    if "rss" in counts:
        counts["rss_bytes"] = counts.pop("rss")
        counts["anon_huge_bytes"] = counts.pop("anon_huge", 0)
        counts["held_bytes"] = counts["rss_bytes"] + sum(counts.pop(name, 0) for name in HELD)
    return counts


def main() -> None:
    """What `make setup` calls: compile the program, or say why not."""
    try:
        print(f"litmus program: {build()}")
    except EnvironmentProblemError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
