"""The built-in cases: kinds of memory times what guest and VMM do with it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sweep.host.case import Case, faults_of, shuffled
from sweep.parameters import Point
from sweep.steps import STEP

MEMORY, HOST_MEMORY = "8MiB", "4MiB"
PAGES = (8 << 20) // 4096


def _step(op: str, **fields: Any) -> Any:
    return STEP.validate_python({"op": op, **fields})


R, W = _step("touch", access="read"), _step("touch", access="write")
PAIRS = _step("touch", access="pairs")
R_FIRST, W_FIRST = _step("touch", access="read", every="2MiB"), _step("touch", access="write", every="2MiB")
R_MID, W_MID = (_step("touch", access=access, every="2MiB", at="1MiB") for access in ("read", "write"))
HOST_R, HOST_W = _step("host_touch", access="read"), _step("host_touch", access="write")
POPULATE_R, POPULATE_W = _step("populate", access="read"), _step("populate", access="write")
PRE_FAULT = _step("pre_fault")
FORK, CHILD_EXIT = _step("fork"), _step("child_exit")
DONTNEED, DONTNEED_ONE = _step("dontneed"), _step("dontneed", every="2MiB", at="28KiB", size="4KiB")
DONTNEED_HALF = _step("dontneed", every="2MiB", size="1MiB")
DONTNEED_REGIONS = _step("dontneed", every="4MiB", size="2MiB")
COLLAPSE = _step("collapse")
LOG_ON, LOG_GET, LOG_OFF = (_step("dirty_log", state=state) for state in ("on", "get", "off"))
R_RANDOM, W_RANDOM = shuffled("read", PAGES, "read"), shuffled("write", PAGES, "write")

SEQUENCES: Mapping[str, Sequence[Any]] = {
    "write": (W,),
    "read": (R,),
    "read_then_write": (R, W),
    "pairs": (PAIRS,),
    "random": (R_RANDOM, W_RANDOM),
    "random_write": (W_RANDOM,),
    "first_then_middle": (R_FIRST, W_MID, W, W_FIRST),
    "middle_then_first": (W_MID, R_FIRST, R, W),
    "populated": (POPULATE_W, R, W),
    "populated_by_reads": (POPULATE_R, R, W),
    "host_reads": (HOST_R, W, R),
    "host_writes": (HOST_W, R, W),
    "host_writes_under_reads": (R, HOST_W, R, W),
    "pre_fault": (PRE_FAULT, R, W),
    "populated_pre_fault": (POPULATE_W, PRE_FAULT, R, W),
    "dontneed": (W, DONTNEED, R, W),
    "dontneed_of_reads": (R, DONTNEED, W),
    "dontneed_one": (W, DONTNEED_ONE, R, W),
    "dontneed_half": (R, W, DONTNEED_HALF, R, W),
    "dontneed_regions": (W, DONTNEED_REGIONS, W, R),
    "fork": (W, FORK, R, W, CHILD_EXIT, W),
    "fork_of_reads": (R, FORK, R, W, CHILD_EXIT),
    "fork_of_host_memory": (HOST_W, FORK, W_FIRST, CHILD_EXIT, R, W),
    "fork_ended": (HOST_W, FORK, CHILD_EXIT, R, W),
    "fork_twice": (W, FORK, CHILD_EXIT, FORK, W, CHILD_EXIT, W),
    "fork_and_host": (W, FORK, HOST_W, R, W, CHILD_EXIT),
    "log_before": (LOG_ON, R, W, LOG_GET, W, LOG_GET, LOG_OFF, W),
    "log_after": (W, LOG_ON, W_FIRST, W, LOG_GET, W, LOG_GET, LOG_OFF, R, W),
    "log_sparse": (POPULATE_W, LOG_ON, R_FIRST, W_MID, LOG_GET, R, LOG_OFF, R, W),
    "log_for_nothing": (W, LOG_ON, LOG_OFF, R, W),
    "log_and_dontneed": (W, LOG_ON, W_FIRST, DONTNEED, LOG_GET, W, LOG_OFF, W),
    "log_and_fork": (W, LOG_ON, FORK, W, CHILD_EXIT, LOG_GET, LOG_OFF, W),
    "collapse": (W, COLLAPSE, R, W),
    "collapse_sparse": (R, W_FIRST, COLLAPSE, R, W),
    "collapse_split": (W, DONTNEED_ONE, COLLAPSE, W),
    "collapse_logged": (W, LOG_ON, W_FIRST, COLLAPSE, W, LOG_GET, LOG_OFF, W),
}
"""Name -> steps. What a kernel or a kind of memory cannot do is left out where it cannot."""


HOST_R_FIRST, HOST_W_FIRST = _step("host_touch", access="read", every="2MiB"), _step("host_touch", access="write", every="2MiB")
HOST_SEQUENCES: Mapping[str, Sequence[Any]] = {
    "host_write": (HOST_W,),
    "host_read": (HOST_R,),
    "host_read_then_write": (HOST_R, HOST_W),
    "host_first": (HOST_R_FIRST, HOST_W_FIRST, HOST_R, HOST_W),
    "host_populated": (POPULATE_W, HOST_R, HOST_W),
    "host_populated_by_reads": (POPULATE_R, HOST_W),
    "host_dontneed": (HOST_W, DONTNEED, HOST_R, HOST_W),
    "host_dontneed_one": (HOST_W, DONTNEED_ONE, HOST_R, HOST_W),
    "host_dontneed_half": (HOST_R, HOST_W, DONTNEED_HALF, HOST_R, HOST_W),
    "host_fork": (HOST_W, FORK, HOST_W_FIRST, HOST_W, CHILD_EXIT, HOST_W),
    "host_fork_ended": (HOST_W, FORK, CHILD_EXIT, HOST_R, HOST_W),
    "host_fork_of_reads": (HOST_R, FORK, HOST_W, CHILD_EXIT),
    "host_collapse": (HOST_W, DONTNEED_ONE, COLLAPSE, HOST_W),
    "host_collapse_sparse": (HOST_R, HOST_W_FIRST, COLLAPSE, HOST_W),
}
"""Name -> steps without a guest."""


@dataclass(frozen=True)
class Memory:
    """A kind of memory: parameters of the point, and which sequences it runs (none named: all)."""

    parameters: Mapping[str, Any]
    sequences: Sequence[str] = ()


BRIEF = ("write", "read_then_write", "pairs", "first_then_middle", "dontneed", "fork", "log_after")
KINDS: Mapping[str, Memory] = {
    "anonymous": Memory({"backing": "anonymous"}),
    "thp": Memory({"backing": "anonymous_thp"}),
    "thp_no_zero_page": Memory({"backing": "anonymous_thp", "use_zero_page": False}, (*BRIEF, "fork_of_reads", "collapse_split")),
    "thp_shifted_4k": Memory({"backing": "anonymous_thp", "offset": "4KiB"}, (*BRIEF, "dontneed_one", "collapse", "log_before")),
    "thp_shifted_1m": Memory({"backing": "anonymous_thp", "offset": "1MiB"}, (*BRIEF, "dontneed_one", "collapse", "log_before")),
    "default": Memory({"backing": "anonymous_default"}, (*BRIEF, "collapse", "collapse_sparse")),
    "default_always": Memory({"backing": "anonymous_default", "thp_enabled": "always"}, BRIEF),
    "thp_never": Memory({"backing": "anonymous_thp", "thp_enabled": "never"}, (*BRIEF, "collapse")),
    "hugetlb": Memory({"backing": "anonymous_hugetlb_2mb"}),
    "shared_hugetlb": Memory({"backing": "shared_hugetlb_2mb"}),
    "shmem": Memory({"backing": "shmem"}),
    "shmem_thp": Memory({"backing": "shmem_thp"}),
    "memfd": Memory({"backing": "private_memfd"}),
    "thp_4k_guest": Memory({"backing": "anonymous_thp", "guest_page": "4KiB"}, BRIEF),
    "anonymous_two_vcpus": Memory({"backing": "anonymous", "vcpus": 2}, ("write", "read_then_write", "pairs", "fork")),
    "thp_two_vcpus": Memory({"backing": "anonymous_thp", "vcpus": 2}, ("write", "read_then_write", "log_after")),
}

SHORT = (
    "anonymous/read_then_write",
    "anonymous/pairs",
    "anonymous/fork",
    "anonymous/log_after",
    "anonymous/dontneed_half",
    "thp/read_then_write",
    "thp/random",
    "thp/first_then_middle",
    "thp/fork",
    "thp/log_after",
    "thp/dontneed_one",
    "thp/collapse_sparse",
    "thp/populated",
    "thp_no_zero_page/read_then_write",
    "thp_shifted_4k/read_then_write",
    "hugetlb/fork",
    "shared_hugetlb/read_then_write",
    "shmem/dontneed",
    "shmem_thp/dontneed_one",
    "memfd/read_then_write",
)


def _case(kernel: str, mmu: str, name: str, kind: str, steps: Sequence[Any], memory: str = MEMORY) -> Case | None:
    """The case, or None where the model's rules say that it cannot be on that kernel."""
    try:
        point = Point.model_validate({"kernel": kernel, "mmu": mmu, "memory": memory, **KINDS[kind].parameters})
    except ValidationError:
        return None
    case = Case(name, point, tuple(steps))
    return None if faults_of(case) else case


def suite(kernel: str, mmu: str = "tdp") -> Iterator[Case]:
    """Every case that this kernel and MMU can run. Raises UnknownKernelError."""
    for kind, memory in KINDS.items():
        for sequence in memory.sequences or SEQUENCES:
            case = _case(kernel, mmu, f"{kind}/{sequence}", kind, SEQUENCES[sequence])
            if case is not None:
                yield case


def host_suite(kernel: str) -> Iterator[Case]:
    """Cases without a guest: every access is the VMM's own. Raises UnknownKernelError."""
    for kind, memory in KINDS.items():
        if "vcpus" in memory.parameters or "guest_page" in memory.parameters:
            continue
        for sequence, steps in HOST_SEQUENCES.items():
            case = _case(kernel, "tdp", f"{kind}/{sequence}", kind, steps, HOST_MEMORY)
            if case is not None:
                yield case


def short_suite(kernel: str, mmu: str = "tdp") -> list[Case]:
    """The 20 cases of the short form, on every kernel from 6.1 on."""
    wanted = {name: number for number, name in enumerate(SHORT)}
    return sorted((case for case in suite(kernel, mmu) if case.name in wanted), key=lambda case: wanted[case.name])
