"""Which vCPU a thread is: as its lines say, as its name says, else in order of appearance."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.spec import KVM_MAX_VCPUS
from kernels.state import Int64s
from sweep.errors import TraceError
from sweep.replay.parse import Thread, Trace
from sweep.replay.scan import MAX_THREADS

NAME = re.compile(r"cpu[ _-]?(\d{1,4})(?!\d)", re.IGNORECASE)  # CPU 5/KVM (QEMU), fc_vcpu 5 (Firecracker), vcpu5, VCPU-5
MAX_SHOWN = 6


@dataclass(frozen=True)
class Assignment:
    """vCPU of each thread (-1: it has no faults), and how many were numbered by appearance."""

    vcpu: Int64s  # (MAX_THREADS,)
    by_appearance: int


def assign(trace: Trace) -> Assignment:
    """Raises TraceError where two threads are one vCPU: two VMs in one trace."""
    owners: dict[int, Thread] = {}
    unnamed: list[Thread] = []
    vcpu = np.full(MAX_THREADS, -1, np.int64)
    for k, thread in enumerate(trace.threads):
        if not (thread.wanted and thread.faults):
            continue
        number = vcpu_of(thread)
        if number is None:
            unnamed.append(thread)
            continue
        if number in owners:
            raise TraceError(trace.name, _two_vms(trace.threads, number, owners[number], thread))
        owners[number] = thread
        vcpu[k] = number
    index = {thread.tid: k for k, thread in enumerate(trace.threads)}
    free = (number for number in range(KVM_MAX_VCPUS) if number not in owners)
    for thread in unnamed:
        number = next(free, None)
        if number is None:
            raise TraceError(trace.name, f"has faults of more than {KVM_MAX_VCPUS} threads; choose those of one VM with --threads")
        vcpu[index[thread.tid]] = number
    return Assignment(vcpu, len(unnamed))


def vcpu_of(thread: Thread) -> int | None:
    """As its lines say, else as its name does."""
    if thread.vcpu is not None:
        return thread.vcpu
    found = NAME.search(thread.comm)
    return int(found[1]) if found and int(found[1]) < KVM_MAX_VCPUS else None


def _two_vms(threads: Sequence[Thread], number: int, first: Thread, second: Thread) -> str:
    faulting = [thread for thread in threads if thread.faults]
    shown = ", ".join(f"{thread.comm or 'thread'} {thread.tid} ({thread.faults} faults)" for thread in faulting[:MAX_SHOWN])
    more = f" and {len(faulting) - MAX_SHOWN} more" if len(faulting) > MAX_SHOWN else ""
    return (
        f"vCPU {number} is thread {first.tid} and thread {second.tid}: more than one VM, or one that began again; "
        f"choose the threads of one with --threads, of {shown}{more}"
    )
