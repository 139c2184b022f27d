"""Probes that need a process of their own: fork() and the faults after it, and a guest."""

from collections.abc import Mapping
from functools import partial

from sweep.measure.figures import Quantity
from sweep.measure.loops import PAGE
from sweep.measure.region import expect
from sweep.measure.sampling import DiscardedRunError, Probe, UnavailableError
from sweep.measure.small_process import run_script

OWN_FAULTS = 8  # pages of its own that the interpreter may write first after a fork while the faults are timed

Found = Mapping[Quantity, float]


def forks(size: int) -> Found:
    """fork() of a small process with and without memory, and writes to what it shared."""
    found = run_script("forking", size)
    for count in ("copies", "reuses"):
        own = int(found[count]) - size // PAGE
        if not 0 <= own <= OWN_FAULTS:
            raise DiscardedRunError(f"{own} minor faults beside those of memory that was shared")
    return {
        Quantity.FORK: found["fork_ns"],
        Quantity.FORK_ENTRY: found["fork_entry_ns"],
        Quantity.COPY_FAULT: found["copy_ns"],
        Quantity.REUSE_FAULT: found["reuse_ns"],
    }


def guest_faults(size: int) -> Found:
    """KVM's part of a fault, for a page that the host has mapped."""
    found = run_script("guest", size)
    expect(int(found["faults"]), int(found["loads"]), "faults of the guest")
    expect(int(found["faults_again"]), 0, "faults of the guest on memory that it has mapped")
    return {Quantity.GUEST_FAULT: found["fault_ns"], Quantity.GUEST_TOUCH: found["touch_ns"]}


def guest_exits(size: int) -> Found:
    """An exit that KVM answers by itself."""
    found = run_script("guest", size)
    if found["exits"] < found["exits_meant"]:
        raise UnavailableError("CPUID does not leave the guest here")
    if found["exit_ns"] >= found["fault_ns"]:
        raise UnavailableError("CPUID takes longer than a whole fault here, so that it is no bare exit")
    return {Quantity.GUEST_EXIT: found["exit_ns"]}


def process_probes(size: int) -> list[Probe]:
    """All of them; each process maps `size` bytes, and a copy of them after a fork."""
    return [
        Probe((Quantity.FORK, Quantity.FORK_ENTRY, Quantity.COPY_FAULT, Quantity.REUSE_FAULT), partial(forks, size)),
        Probe((Quantity.GUEST_FAULT, Quantity.GUEST_TOUCH), partial(guest_faults, size)),
        Probe((Quantity.GUEST_EXIT,), partial(guest_exits, size)),
    ]
