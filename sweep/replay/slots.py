"""Guest-physical addresses to pages of the model's one slot: --slots, or what the trace itself shows.

A PC has a hole below 4 GiB (devices) and the rest of its memory above. The model's slot has none, so the ranges are put one behind
the other, each in its own alignment: at a place that equals its address modulo 2 MiB, and modulo 1 GiB if it is that large.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.spec import MAX_MEMORY_BYTES, PAGE_BYTES, PAGE_SHIFT, PMD_BYTES, PUD_BYTES
from kernels.state import Int64s
from sweep.errors import TraceError, UsageError
from sweep.quantity import format_size, parse_size

MAX_SLOTS = 512
GIB_SHIFT = 30
MAX_GPA_BITS = 52
NOTHING = "holds no fault on the guest's memory: nothing to replay"
DEVICES = range(0xFE000000, 1 << 32)  # of a PC: IO-APIC, HPET, local APICs, firmware; no memory of the guest
_SLOT = re.compile(r"(0x[0-9a-fA-F]{1,16}|[0-9][0-9.]* ?[A-Za-z]*)\+(0x[0-9a-fA-F]{1,16}|[0-9][0-9.]* ?[A-Za-z]+)")


@dataclass(frozen=True)
class Slot:
    """Bytes [gpa, gpa + size) of the guest are [base, base + size) of the model's slot."""

    gpa: int
    size: int
    base: int

    def __str__(self) -> str:
        return f"{format_size(self.gpa)}+{format_size(self.size)}"


class SlotMap(NamedTuple):
    """The same for compiled code, in pages."""

    first: Int64s
    end: Int64s
    base: Int64s


@dataclass(frozen=True)
class Slots:
    """All ranges; `derived`: from the trace's own addresses."""

    slots: tuple[Slot, ...]
    derived: bool

    @property
    def memory(self) -> int:
        """Bytes of the model's slot."""
        return max(slot.base + slot.size for slot in self.slots)

    def as_map(self) -> SlotMap:
        columns = zip(*((s.gpa >> PAGE_SHIFT, (s.gpa + s.size) >> PAGE_SHIFT, s.base >> PAGE_SHIFT) for s in self.slots), strict=True)
        return SlotMap(*(np.array(column, np.int64) for column in columns))

    def gpa_of(self, offset: int) -> int:
        """Guest-physical address of a byte of the model's slot; of one between two ranges, that of the next one's beginning."""
        for slot in self.slots:
            if offset < slot.base + slot.size:
                return slot.gpa + max(0, offset - slot.base)
        raise ValueError(f"{offset} lies behind the slot's {self.memory} bytes")

    def __str__(self) -> str:
        return ",".join(str(slot) for slot in self.slots)


def placed(ranges: Sequence[tuple[int, int]], derived: bool) -> Slots:
    """(gpa, size) in ascending order, one behind the other. Raises TraceError for more memory than the model has."""
    slots: list[Slot] = []
    end = 0
    for gpa, size in ranges:
        alignment = PUD_BYTES if size >= PUD_BYTES else PMD_BYTES
        base = end + (gpa - end) % alignment
        slots.append(Slot(gpa, size, base))
        end = base + size
    if end > MAX_MEMORY_BYTES:
        raise TraceError("--slots", f"{format_size(end)} of memory; the model has at most {format_size(MAX_MEMORY_BYTES)}")
    return Slots(tuple(slots), derived)


def parse_slots(text: str) -> Slots:
    """'0+3GiB,4GiB+13GiB': START+SIZE of each range, sizes with a unit or hexadecimal. Raises UsageError."""
    parts = text.split(",")
    if len(parts) > MAX_SLOTS:
        raise UsageError(f"--slots: {len(parts)} ranges; at most {MAX_SLOTS}")
    ranges = sorted(_range(part.strip()) for part in parts)
    for (gpa, size), (following, _) in pairwise(ranges):
        if gpa + size > following:
            raise UsageError(f"--slots: {format_size(gpa)}+{format_size(size)} reaches into the range at {format_size(following)}")
    return placed(ranges, derived=False)


def _range(text: str) -> tuple[int, int]:
    found = _SLOT.fullmatch(text)
    if found is None:
        raise UsageError(f"--slots {text[:60]!a}: START+SIZE is needed, like 0+3GiB,4GiB+13GiB or 0x100000000+1GiB")
    try:
        gpa, size = (int(part, 16) if part.startswith("0x") else parse_size(part) for part in found.groups())
    except ValueError as error:
        raise UsageError(f"--slots {text[:60]!a}: {error}") from None
    if gpa % PAGE_BYTES or size % PAGE_BYTES or not size or gpa + size > 1 << MAX_GPA_BITS:
        raise UsageError(f"--slots {text[:60]!a}: multiples of 4KiB below 4PiB are needed, and a size above 0")
    return gpa, size


def derive(name: str, tops: NDArray[np.uint16]) -> Slots:
    """From where a trace's faults lie: tops[g] = 2 MiB pages of GiB g up to the last touched one, 0: nothing there. Shape (2**22,).

    GiBs without a fault are left out: memory that nobody touches changes no count. Raises TraceError."""
    touched = np.flatnonzero(tops)
    if not len(touched):
        raise TraceError(name, NOTHING)
    runs = np.split(touched, np.flatnonzero(np.diff(touched) > 1) + 1)
    if len(runs) > MAX_SLOTS:
        raise TraceError(name, f"touches {len(runs)} ranges far apart; say which are memory, like --slots 0+3GiB,4GiB+13GiB")
    ranges = [(int(run[0]) << GIB_SHIFT, (len(run) - 1) * PUD_BYTES + int(tops[run[-1]]) * PMD_BYTES) for run in runs]
    return placed(ranges, derived=True)
