"""Raw rows into accesses, and what can be counted on the way: compiled loops over batches.

An access that KVM had to retry faults again, at once, on the same vCPU: a fault of the same kind on the page of the vCPU's fault
before it is taken for that, and is no access of its own.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.jit import jit
from kernels.spec import PAGE_SHIFT, PMD_BYTES, PMD_ORDER
from kernels.state import Bytes, Int64s, latency_bucket
from sweep.replay.compiled import KeptProgram
from sweep.replay.decode import Encoding
from sweep.replay.scan import ABSENT, FETCH, PRESENT, READ, WRITE, Rows
from sweep.replay.slots import DEVICES, GIB_SHIFT, MAX_GPA_BITS, SlotMap

UNKNOWN = -1
DEVICE_FIRST, DEVICE_END = DEVICES.start >> PAGE_SHIFT, DEVICES.stop >> PAGE_SHIFT
PMD_SHIFT = PMD_BYTES.bit_length() - 1
RIGHTS = 0x38  # of an exit qualification: EPT_VIOLATION_RWX_MASK
PFERR_PRESENT, PFERR_WRITE, PFERR_RSVD, PFERR_FETCH = 0x1, 0x2, 0x8, 0x10


class Counted(IntEnum):
    """What is counted, per 2 MiB region and in time."""

    FAULTS = 0
    READS = 1
    WRITES = 2
    FETCHES = 3
    READ_WRITE_WRITE = 4  # double faults: the page was read, its write found it read-only, and again not present
    WRITE_WRITE = 5  # the same on a page that no fault had read: it was read under a huge mapping
    ABSENT_TWICE = 6  # a write found it not present, and again: copied at once, or retried
    FURTHER = 7  # after a double fault, the same write again
    AGAIN = 8  # re-executions of any kind, those of double faults among them
    REFAULTS = 9  # not present, though a fault had mapped it: somebody took it away
    PAGES = 10  # that fault for the first time


class Last(IntEnum):
    """A page's last fault; Seen.READ may stand beside it."""

    NOTHING = 0
    READ = 1
    WRITE_PRESENT = 2
    WRITE_ABSENT = 3
    DOUBLE = 4


SEEN_READ = 8
LAST = 7


class Go(IntEnum):
    """Index of the numbers that fold() goes on with from batch to batch."""

    ROWS = 0  # in the window
    BASE = 1
    SLOT = 2  # that the last address was in
    BUCKET = 3
    EDGE_NS = 4  # where it ends
    MMIO = 5  # faults on entries with a reserved bit
    DEVICES = 6
    OUTSIDE = 7
    OUTSIDE_LINE = 8
    OUTSIDE_LOW = 9
    OUTSIDE_HIGH = 10
    TIMED = 11  # faults whose time in KVM is known
    TIMED_NS = 12
    AGAIN_TIMED = 13
    AGAIN_NS = 14


class Found(IntEnum):
    """Index of what survey() finds."""

    VCPUS = 0
    OUTSIDE = 1
    OUTSIDE_LINE = 2


class Accesses(NamedTuple):
    """Accesses: a window over all of them."""

    ns: Int64s  # of its first fault
    vcpu: Int64s
    gfn: Int64s  # of the model's slot
    write: Bytes
    fetch: Bytes
    present: Int64s  # 1: an entry was there, 0: none, -1: not known
    faults: Int64s
    kvm_ns: Int64s  # in all of its faults, from exit to entry; -1: not known


class Memory(NamedTuple):
    """What is known of pages, vCPUs, regions and time."""

    page: Bytes  # (pages,) Last | SEEN_READ
    vcpu: Int64s  # of each thread
    last_gfn: Int64s  # (vCPUs,) of its last fault, -1: none
    last_access: Int64s
    last_row: Int64s
    region: Int64s  # (regions, len(Counted))
    time: Int64s  # (buckets, len(Counted))
    hist: Int64s  # of ns in KVM


class Numbers(NamedTuple):
    go: Int64s  # (len(Go),)


class Survey(NamedTuple):
    tops: NDArray[np.uint16]  # (2**22,) 2 MiB pages of each GiB up to the last touched one
    vcpu: Int64s
    found: Int64s  # (len(Found),)


@jit
def access_of(code: int, encoding: int) -> int:
    """READ, WRITE or FETCH."""
    if encoding == Encoding.QUALIFICATION:
        return WRITE if code & 2 else FETCH if code & 4 else READ
    if encoding == Encoding.PFERR:
        return WRITE if code & PFERR_WRITE else FETCH if code & PFERR_FETCH else READ
    return code & 3


@jit
def presence_of(code: int, encoding: int) -> int:
    """1: an entry was there, 0: none, UNKNOWN."""
    if encoding == Encoding.QUALIFICATION:
        return np.int64(code & RIGHTS != 0)
    if encoding == Encoding.PFERR:
        return np.int64(code & PFERR_PRESENT)
    return np.int64(1) if code & PRESENT else np.int64(0) if code & ABSENT else np.int64(UNKNOWN)


@jit
def is_device(page: int) -> bool:
    return DEVICE_FIRST <= page < DEVICE_END


@jit
def is_mmio(code: int, encoding: int) -> bool:
    return encoding == Encoding.PFERR and code & PFERR_RSVD != 0


@jit
def vcpu_of_row(rows: Rows, row: int, vcpus: Int64s) -> int:
    return rows.who[row] if rows.who[row] >= 0 else vcpus[-1 - rows.who[row]]


@KeptProgram
def survey(encoding: int, count: int, rows: Rows, s: Survey) -> int:
    """Where the batch's faults lie and how many vCPUs there are. Returns 0."""
    for row in range(count):
        address = rows.address[row]
        s.found[Found.VCPUS] = max(s.found[Found.VCPUS], vcpu_of_row(rows, row, s.vcpu) + 1)
        if is_device(address >> PAGE_SHIFT) or is_mmio(rows.code[row], encoding):
            continue
        if address >> MAX_GPA_BITS:
            s.found[Found.OUTSIDE] += 1
            if s.found[Found.OUTSIDE] == 1:
                s.found[Found.OUTSIDE_LINE] = rows.line[row]
            continue
        top = (address >> PMD_SHIFT & 511) + 1
        s.tops[address >> GIB_SHIFT] = max(np.int64(s.tops[address >> GIB_SHIFT]), top)
    return np.int64(0)


@jit
def slot_of(page: int, slots: SlotMap, n: Numbers) -> int:
    """Index of the range with that page; UNKNOWN: none."""
    known = n.go[Go.SLOT]
    if slots.first[known] <= page < slots.end[known]:
        return known
    for k in range(len(slots.first)):
        if slots.first[k] <= page < slots.end[k]:
            n.go[Go.SLOT] = k
            return np.int64(k)
    return np.int64(UNKNOWN)


@jit
def note_outside(rows: Rows, row: int, derived: int, page: int, n: Numbers) -> None:
    """A fault on no memory of the guest."""
    if derived and is_device(page):
        n.go[Go.DEVICES] += 1
        return
    if not n.go[Go.OUTSIDE]:
        n.go[Go.OUTSIDE_LINE] = rows.line[row]
        n.go[Go.OUTSIDE_LOW] = n.go[Go.OUTSIDE_HIGH] = rows.address[row]
    n.go[Go.OUTSIDE] += 1
    n.go[Go.OUTSIDE_LOW] = min(n.go[Go.OUTSIDE_LOW], rows.address[row])
    n.go[Go.OUTSIDE_HIGH] = max(n.go[Go.OUTSIDE_HIGH], rows.address[row])


@jit
def add(m: Memory, gfn: int, bucket: int, what: int) -> None:
    m.region[gfn >> PMD_ORDER, what] += 1
    m.time[bucket, what] += 1


@jit
def double_of(before: int, present: int, again: bool) -> int:
    """Which Counted a write is the second fault of; UNKNOWN: of none."""
    if present == 1:
        return np.int64(UNKNOWN)
    last = before & LAST
    if last == Last.WRITE_PRESENT:
        return np.int64(Counted.READ_WRITE_WRITE if before & SEEN_READ else Counted.WRITE_WRITE)
    if not again:
        return np.int64(UNKNOWN)
    if last == Last.WRITE_ABSENT:
        return np.int64(Counted.ABSENT_TWICE)
    return np.int64(Counted.FURTHER) if last == Last.DOUBLE else np.int64(UNKNOWN)


@jit
def count_fault(m: Memory, gfn: int, access: int, present: int, again: bool, bucket: int) -> None:
    """One fault in the tables, and in what is known of its page."""
    before = np.int64(m.page[gfn])
    last = before & LAST
    add(m, gfn, bucket, Counted.FAULTS)
    if last == Last.NOTHING:
        add(m, gfn, bucket, Counted.PAGES)
    if again:
        add(m, gfn, bucket, Counted.AGAIN)
    if access != WRITE:
        add(m, gfn, bucket, Counted.READS if access == READ else Counted.FETCHES)
        if last != Last.NOTHING and present == 0 and not again:
            add(m, gfn, bucket, Counted.REFAULTS)
        m.page[gfn] = Last.READ | SEEN_READ
        return
    add(m, gfn, bucket, Counted.WRITES)
    if present == UNKNOWN:  # a page that was read is read-only, unless it is there already
        present = np.int64(last == Last.READ)
    double = double_of(before, present, again)
    if double != UNKNOWN:
        add(m, gfn, bucket, double)
        m.page[gfn] = Last.DOUBLE | (before & SEEN_READ)
        return
    if last != Last.NOTHING and present == 0 and not again:
        add(m, gfn, bucket, Counted.REFAULTS)
    m.page[gfn] = (Last.WRITE_PRESENT if present else Last.WRITE_ABSENT) | (before & SEEN_READ)


@jit
def time_fault(m: Memory, n: Numbers, taken: int, again: bool) -> None:
    if taken == UNKNOWN:
        return
    n.go[Go.TIMED] += 1
    n.go[Go.TIMED_NS] += taken
    m.hist[latency_bucket(taken)] += 1
    if again:
        n.go[Go.AGAIN_TIMED] += 1
        n.go[Go.AGAIN_NS] += taken


@jit
def add_access(rows: Rows, row: int, vcpu: int, gfn: int, access: int, present: int, out: Accesses, n: Numbers) -> None:
    k = n.go[Go.ROWS]
    out.ns[k], out.vcpu[k], out.gfn[k] = rows.ns[row], vcpu, gfn
    out.write[k], out.fetch[k] = access == WRITE, access == FETCH
    out.present[k], out.faults[k], out.kvm_ns[k] = present, 1, rows.taken[row]
    n.go[Go.ROWS] = k + 1


@jit
def add_again(rows: Rows, row: int, first: int, out: Accesses, n: Numbers) -> None:
    """A re-execution, to the row of its access while that is in the window."""
    k = first - n.go[Go.BASE]
    if k < 0:
        return
    out.faults[k] += 1
    out.kvm_ns[k] = out.kvm_ns[k] + rows.taken[row] if out.kvm_ns[k] != UNKNOWN and rows.taken[row] != UNKNOWN else UNKNOWN


@KeptProgram
def fold(encoding: int, derived: int, width: int, count: int, rows: Rows, slots: SlotMap, m: Memory, out: Accesses, n: Numbers) -> int:
    """Take a batch in order of time; `width`: ns of a bucket. The window has room for as many accesses. Returns 0."""
    for row in range(count):
        page = rows.address[row] >> PAGE_SHIFT
        if is_mmio(rows.code[row], encoding):
            n.go[Go.MMIO] += 1
            continue
        slot = slot_of(page, slots, n)
        if slot == UNKNOWN:
            note_outside(rows, row, derived, page, n)
            continue
        gfn = page - slots.first[slot] + slots.base[slot]
        vcpu = vcpu_of_row(rows, row, m.vcpu)
        access, present = access_of(rows.code[row], encoding), presence_of(rows.code[row], encoding)
        while rows.ns[row] >= n.go[Go.EDGE_NS]:
            n.go[Go.EDGE_NS] += width
            n.go[Go.BUCKET] += 1
        again = m.last_gfn[vcpu] == gfn and m.last_access[vcpu] == access
        count_fault(m, gfn, access, present, again, n.go[Go.BUCKET])
        time_fault(m, n, rows.taken[row], again)
        if again:
            add_again(rows, row, m.last_row[vcpu], out, n)
            continue
        m.last_gfn[vcpu], m.last_access[vcpu] = gfn, access
        m.last_row[vcpu] = n.go[Go.ROWS] + n.go[Go.BASE]
        add_access(rows, row, vcpu, gfn, access, present, out, n)
    return np.int64(0)
