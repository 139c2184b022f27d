"""Lines of trace text into numbers: a compiled loop over blocks of whole lines.

What a line says is in arrays that Python reads between blocks: rows of faults, threads, and lines that are neither an event nor
blank ("odd": Python says what they are).
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from kernels.jit import jit, shared
from kernels.spec import KVM_MAX_VCPUS
from kernels.state import Bytes, Int64s
from sweep.replay.compiled import KeptProgram
from sweep.replay.text import (
    BEYOND,
    COLON,
    COMMA,
    EQUALS,
    HASH,
    LESS,
    NEWLINE,
    NONE,
    NOTHING,
    RETURN,
    SPACE,
    TAB,
    UNKNOWN,
    At,
    Layout,
    Numbers,
    Text,
    header_end,
    is_end,
    is_gap,
    line_end,
    number_at,
    packed,
    plain_header_end,
    skip_spaces,
    word_at,
    word_end,
)

MAX_LINE = 8192  # bytes; kvm's longest event has under 300
MAX_THREADS = 1 << 14
HASH_SLOTS = 1 << 16
MAX_ODDS = 1024
COMM_BYTES = 16  # TASK_COMM_LEN


class Status(IntEnum):
    """Why scan() came back."""

    DONE = 0
    ROWS_FULL = 1
    ODDS_FULL = 2
    THREADS_FULL = 3


class Odd(IntEnum):
    """What is known of a line that gave neither a row nor an event to pass over."""

    NO_EVENT = 0  # a comment, a marker, or nothing that is known
    FIELD_MISSING = 1
    NO_NUMBER = 2
    TOO_LARGE = 3
    NO_VCPU = 4
    NO_ACCESS = 5
    TOO_LONG = 6


class Role(IntEnum):
    """What a column of Layout.CSV holds."""

    IGNORED = 0
    NS = 1
    VCPU = 2
    GPA = 3
    ACCESS = 4
    PRESENT = 5


class Rows(NamedTuple):
    """Faults: a window over all of them."""

    ns: Int64s
    who: Int64s  # the vCPU, or -1 - index in Threads where the line does not say it
    address: Int64s
    code: Int64s
    line: Int64s
    taken: Int64s  # ns from kvm_exit to kvm_entry; -1: not known


class Threads(NamedTuple):
    """Threads of kvm's events, in order of appearance."""

    slot: Int64s  # (HASH_SLOTS,) index + 1 by tid
    wanted: Int64s  # tids that are to be taken; empty: all
    tid: Int64s
    comm: Bytes  # (MAX_THREADS, COMM_BYTES)
    vcpu: Int64s  # as its lines say; -1: none did
    faults: Int64s
    takes: Int64s  # 1: it is wanted
    exit_ns: Int64s  # of the exit it is in; -1: none
    row: Int64s  # number of that exit's fault; -1: none


class Odds(NamedTuple):
    """Lines for Python."""

    start: Int64s
    end: Int64s
    line: Int64s
    kind: Int64s


PAGE_FAULT_0, PAGE_FAULT_1 = packed("kvm_page_fault")
EXIT_0, ENTRY_0, ENTRY_1 = packed("kvm_exit")[0], *packed("kvm_entry")
VCPU_0, VCPU_ID_0, ADDRESS_0 = (packed(word)[0] for word in ("vcpu", "vcpu_id", "address"))
RIP_0 = packed("rip")[0]
FAULT_ADDRESS_0, FAULT_ADDRESS_1 = packed("fault_address")
ERROR_CODE_0, ERROR_CODE_1 = packed("error_code")
EPT_0, EPT_1 = packed("EPT_VIOLATION")
NPF_0, PF_0 = packed("npf")[0], packed("PF")[0]  # of AMD: nested page fault, and 'PF excp', the guest's own
EXCEPTION_0, EXCEPTION_1 = packed("EXCEPTION_NMI")
READ_0, R_0, NUMBER_0 = (packed(word)[0] for word in ("read", "r", "0"))
WRITE_0, W_0, NUMBER_1 = (packed(word)[0] for word in ("write", "w", "1"))
FETCH_0, X_0, NUMBER_2 = (packed(word)[0] for word in ("fetch", "x", "2"))
TRUE_0, TRUE_CAPITAL_0, FALSE_0, FALSE_CAPITAL_0 = (packed(word)[0] for word in ("true", "True", "false", "False"))

EXIT_QUALIFICATION = 0x80  # bit 7, guest linear address valid: no page-fault error code has it
NPT_BITS = 0x1F  # of code >> 32: PFERR_GUEST_FINAL, _PAGE, _ENC, _SIZEM, _VMPL
USER_BIT = 0x4  # PFERR_USER: NPT sets it for every guest access
READ, WRITE, FETCH = 0, 1, 2  # codes of Layout.CSV, with PRESENT or ABSENT where a column says so
PRESENT, ABSENT = 4, 8


@jit
def add_odd(odds: Odds, n: Numbers, start: int, end: int, kind: int) -> None:
    k = n.at[At.ODDS]
    odds.start[k], odds.end[k] = start, end
    odds.line[k], odds.kind[k] = n.at[At.LINE], Odd.TOO_LONG if end - start > MAX_LINE else kind
    n.at[At.ODDS] = k + 1


@jit
def is_wanted(t: Threads, tid: int) -> bool:
    for i in range(len(t.wanted)):
        if t.wanted[i] == tid:
            return True
    return len(t.wanted) == 0


@jit
def thread_of(text: Text, t: Threads, n: Numbers) -> int:
    """Index of the line's thread, a new one if need be. There is room: scan() looks before each line."""
    tid = n.at[At.TID]
    place = (tid * 0x9E3779B1 & 0xFFFFFFFF) * HASH_SLOTS >> 32
    while t.slot[place] and t.tid[t.slot[place] - 1] != tid:
        place = (place + 1) % HASH_SLOTS
    if t.slot[place]:
        known = t.slot[place] - 1
        if t.comm[known, 0] == LESS:  # <...>: the kernel did not know it then
            copy_comm(text, t, n, known)
        return known
    k = n.at[At.THREADS]
    n.at[At.THREADS] = k + 1
    t.slot[place] = k + 1
    t.tid[k], t.vcpu[k], t.faults[k], t.takes[k] = tid, UNKNOWN, 0, is_wanted(t, tid)
    t.exit_ns[k], t.row[k] = UNKNOWN, UNKNOWN
    copy_comm(text, t, n, k)
    return k


@jit
def copy_comm(text: Text, t: Threads, n: Numbers, k: int) -> None:
    """comm without the spaces before it; of a longer one (an instance's name stands before it) the end."""
    end = n.at[At.COMM_END]
    first = max(n.at[At.COMM], end - COMM_BYTES)
    while first < end and text.data[first] == SPACE:
        first += 1
    for i in range(COMM_BYTES):
        t.comm[k, i] = text.data[first + i] if first + i < end else 0


@jit
def learn_vcpu(t: Threads, k: int, vcpu: int, n: Numbers) -> None:
    if t.vcpu[k] != UNKNOWN and t.vcpu[k] != vcpu and not n.at[At.MOVED_LINE]:
        n.at[At.MOVED_LINE] = n.at[At.LINE]
    t.vcpu[k] = vcpu


@jit
def add_row(rows: Rows, n: Numbers, who: int, address: int, code: int) -> None:
    k, ns = n.at[At.ROWS], n.at[At.NS]
    rows.ns[k], rows.who[k], rows.address[k] = ns, who, address
    rows.code[k], rows.line[k], rows.taken[k] = code, n.at[At.LINE], UNKNOWN
    if k + n.at[At.BASE] == 0:
        n.at[At.FIRST_NS], n.at[At.END_NS] = ns, ns
    elif ns < n.at[At.LAST_NS]:
        n.at[At.BACKWARD] += 1
        n.at[At.BACK_NS] = max(n.at[At.BACK_NS], n.at[At.LAST_NS] - ns)
    n.at[At.FIRST_NS] = min(n.at[At.FIRST_NS], ns)
    n.at[At.END_NS] = max(n.at[At.END_NS], ns)
    n.at[At.LAST_NS] = ns
    n.at[At.ROWS] = k + 1


@jit
def weigh(n: Numbers, code: int) -> None:
    """What an error code says of who made it."""
    if code >> 32 & NPT_BITS:
        n.at[At.NPT] += 1
        if n.at[At.NPT] == 1:
            n.at[At.NPT_LINE] = n.at[At.LINE]
    elif code & EXIT_QUALIFICATION:
        n.at[At.EPT] += 1
        if n.at[At.EPT] == 1:
            n.at[At.EPT_LINE] = n.at[At.LINE]
    else:
        n.at[At.LOW] += 1
        n.at[At.KERNEL] += not code & USER_BIT
        if n.at[At.LOW] == 1:
            n.at[At.LOW_LINE] = n.at[At.LINE]


@jit
def fault_fields(text: Text, start: int) -> tuple[int, int, int, int, int]:
    """(Odd or NONE, vcpu, address, code, newline) of 'vcpu 5 rip 0x.. address 0x.. error_code 0x..', in any order; also name=value."""
    vcpu, address, code, i, wrong = np.int64(UNKNOWN), np.int64(NONE), np.int64(NONE), start, np.int64(NONE)
    while True:
        while text.data[i] != NEWLINE and is_gap(text, i):
            i += 1
        if text.data[i] == NEWLINE:
            break
        first, second, i = word_at(text, i)
        is_vcpu = ((first == VCPU_0) | (first == VCPU_ID_0)) & (second == NOTHING)
        is_code = (first == ERROR_CODE_0) & (second == ERROR_CODE_1)
        is_address = (first == ADDRESS_0) & (second == NOTHING) | (first == FAULT_ADDRESS_0) & (second == FAULT_ADDRESS_1)
        if not (is_vcpu or is_code or is_address):
            if first == RIP_0:  # its value needs no look
                i = word_end(text, skip_spaces(text, i))
            continue
        plain = is_vcpu or text.data[i] == EQUALS  # fields that trace-cmd failed to format are decimal
        i = i + 1 if text.data[i] == EQUALS else skip_spaces(text, i)
        value, end = number_at(text, i, 10 if plain else 16)
        if end == i or not is_end(text, end):
            wrong = np.int64(Odd.NO_NUMBER)
        elif is_vcpu:
            vcpu = value
            wrong = np.int64(Odd.NO_VCPU) if value >= KVM_MAX_VCPUS else wrong
        elif is_code:
            code = value
            wrong = np.int64(Odd.TOO_LARGE) if value == BEYOND else wrong
        else:
            address = value
        i = end
    if wrong == NONE and (address == NONE or code == NONE):
        wrong = np.int64(Odd.FIELD_MISSING)
    return wrong, vcpu, address, code, i


@jit
def take_fault(text: Text, start: int, event: int, rows: Rows, t: Threads, odds: Odds, n: Numbers) -> int:
    """A kvm_page_fault: its row, or an odd line. Returns the newline's place."""
    wrong, vcpu, address, code, end = fault_fields(text, event)
    if wrong != NONE or end - start > MAX_LINE:
        add_odd(odds, n, start, end, wrong)
        return end
    k = thread_of(text, t, n)
    n.at[At.FAULTS] += 1
    t.faults[k] += 1
    if vcpu == UNKNOWN:
        n.at[At.OLD] += 1
    else:
        learn_vcpu(t, k, vcpu, n)
    if t.takes[k]:
        weigh(n, code)
        t.row[k] = n.at[At.ROWS] + n.at[At.BASE] if t.exit_ns[k] != UNKNOWN else UNKNOWN
        add_row(rows, n, vcpu if vcpu != UNKNOWN else -1 - k, address, code)
    return end


@jit
def read_vcpu(text: Text, i: int, t: Threads, k: int, n: Numbers) -> None:
    """The number behind 'vcpu', if it is one."""
    i = skip_spaces(text, i)
    vcpu, end = number_at(text, i, 10)
    if end > i and vcpu < KVM_MAX_VCPUS:
        learn_vcpu(t, k, vcpu, n)


@jit
def take_exit(text: Text, event: int, t: Threads, n: Numbers) -> None:
    """A kvm_exit: its time, and the vCPU and reason among its first words."""
    k = thread_of(text, t, n)
    n.at[At.EXITS] += 1
    t.exit_ns[k], t.row[k] = n.at[At.NS], UNKNOWN
    i = event
    for _ in range(4):
        while text.data[i] != NEWLINE and is_gap(text, i):
            i += 1
        first, second, i = word_at(text, i)
        if first == VCPU_0 and second == NOTHING:
            read_vcpu(text, i, t, k, n)
        elif first == EPT_0 and second == EPT_1:
            n.at[At.EPT_EXITS] += 1
        elif first == NPF_0 and second == NOTHING:
            n.at[At.NPF_EXITS] += 1
        elif (first == EXCEPTION_0 and second == EXCEPTION_1) or (first == PF_0 and second == NOTHING):
            n.at[At.EXCEPTION_EXITS] += 1


@jit
def take_entry(text: Text, event: int, rows: Rows, t: Threads, n: Numbers) -> None:
    """A kvm_entry: ends the exit that its thread was in, which gives the exit's fault its duration while it is in the window."""
    k = thread_of(text, t, n)
    n.at[At.ENTRIES] += 1
    i = skip_spaces(text, event)
    first, second, i = word_at(text, i)
    if first == VCPU_0 and second == NOTHING:
        read_vcpu(text, i, t, k, n)
    if t.row[k] >= n.at[At.BASE] and n.at[At.NS] >= t.exit_ns[k]:
        rows.taken[t.row[k] - n.at[At.BASE]] = n.at[At.NS] - t.exit_ns[k]
    t.exit_ns[k], t.row[k] = UNKNOWN, UNKNOWN


@shared
def take_event(text: Text, start: int, printed: int, layout: int, rows: Rows, t: Threads, odds: Odds, n: Numbers) -> int:
    """A line that may be an event; `printed`: its first byte that is no space. Returns the newline's place."""
    n.at[At.COMM] = start
    i = plain_header_end(text, start, n) if layout == Layout.PLAIN else header_end(text, start, printed, layout, n)
    first, second, event = word_at(text, max(i, start))
    if text.data[event] == COLON and not is_gap(text, event + 1):  # sys:event:
        first, second, event = word_at(text, event + 1)
    if i != NONE and text.data[event] == COLON and first == PAGE_FAULT_0 and second == PAGE_FAULT_1:
        return take_fault(text, start, event + 1, rows, t, odds, n)
    end = line_end(text, event)
    if i == NONE or text.data[event] != COLON or end - start > MAX_LINE:  # perf's PERF_RECORD_LOST has no colon
        add_odd(odds, n, start, end, Odd.NO_EVENT)
    elif first == EXIT_0 and second == NOTHING:
        take_exit(text, event + 1, t, n)
    elif first == ENTRY_0 and second == ENTRY_1:
        take_entry(text, event + 1, rows, t, n)
    else:
        n.at[At.OTHERS] += 1
    return end


@jit
def access_at(text: Text, i: int) -> tuple[int, int]:
    """(READ, WRITE or FETCH, or NONE; end) of the word there."""
    word, rest, end = word_at(text, i)
    if rest != NOTHING:
        return np.int64(NONE), end
    if (word == READ_0) | (word == R_0) | (word == NUMBER_0):
        return np.int64(READ), end
    if (word == WRITE_0) | (word == W_0) | (word == NUMBER_1):
        return np.int64(WRITE), end
    if (word == FETCH_0) | (word == X_0) | (word == NUMBER_2):
        return np.int64(FETCH), end
    return np.int64(NONE), end


@jit
def presence_at(text: Text, i: int) -> tuple[int, int]:
    """(PRESENT, ABSENT, or 0 where the field is empty, or NONE; end) of the word there."""
    word, rest, end = word_at(text, i)
    if end == i:
        return np.int64(0), end
    if rest == NOTHING and ((word == TRUE_0) | (word == TRUE_CAPITAL_0) | (word == NUMBER_1)):
        return np.int64(PRESENT), end
    if rest == NOTHING and ((word == FALSE_0) | (word == FALSE_CAPITAL_0) | (word == NUMBER_0)):
        return np.int64(ABSENT), end
    return np.int64(NONE), end


@shared
def take_record(text: Text, start: int, rows: Rows, odds: Odds, n: Numbers) -> int:
    """A line of columns, commas between them. Returns the newline's place."""
    ns, vcpu, address, code, present = np.int64(0), np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    wrong, column, i = np.int64(NONE), np.int64(0), start
    while True:
        i = skip_spaces(text, i)
        role = text.roles[column] if column < len(text.roles) else np.int64(Role.IGNORED)
        if role == Role.IGNORED:
            while text.data[i] != COMMA and text.data[i] != NEWLINE:
                i += 1
        elif role == Role.ACCESS:
            code, i = access_at(text, i)
            wrong = np.int64(Odd.NO_ACCESS) if code == NONE else wrong
        elif role == Role.PRESENT:
            present, i = presence_at(text, i)
            wrong = np.int64(Odd.NO_NUMBER) if present == NONE else wrong
        else:
            value, end = number_at(text, i, 10)
            wrong = np.int64(Odd.NO_NUMBER) if end == i else wrong
            i = end
            if role == Role.NS:
                ns = value
                wrong = np.int64(Odd.TOO_LARGE) if value == BEYOND else wrong
            elif role == Role.VCPU:
                vcpu = value
                wrong = np.int64(Odd.NO_VCPU) if value >= KVM_MAX_VCPUS else wrong
            else:
                address = value
        i = skip_spaces(text, i)
        if text.data[i] == NEWLINE or text.data[i] == RETURN:
            break
        wrong = np.int64(Odd.NO_NUMBER) if text.data[i] != COMMA else wrong
        i += 1
        column += text.data[i - 1] == COMMA
    end = line_end(text, i)
    wrong = np.int64(Odd.FIELD_MISSING) if column + 1 != len(text.roles) else wrong
    if wrong != NONE or end - start > MAX_LINE:
        add_odd(odds, n, start, end, wrong)
        return end
    n.at[At.NS] = ns
    n.at[At.FAULTS] += 1
    add_row(rows, n, vcpu, address, code | present)
    return end


@KeptProgram
def scan(layout: int, end: int, text: Text, rows: Rows, t: Threads, odds: Odds, n: Numbers) -> int:
    """Take lines from POS on to `end`, where a newline stands before. Returns a Status; called again, it goes on."""
    while n.at[At.POS] < end:
        if n.at[At.ROWS] == len(rows.ns):
            return np.int64(Status.ROWS_FULL)
        if n.at[At.ODDS] == len(odds.start):
            return np.int64(Status.ODDS_FULL)
        if n.at[At.THREADS] == len(t.tid):
            return np.int64(Status.THREADS_FULL)
        start = n.at[At.POS]
        n.at[At.LINE] += 1
        c, printed = text.data[start], skip_spaces(text, start)
        if c == HASH:
            newline = line_end(text, start)
            add_odd(odds, n, start, newline, Odd.NO_EVENT)
        elif (
            text.data[printed] == NEWLINE or text.data[printed] == RETURN or (c == TAB and layout == Layout.PERF)
        ):  # a line of perf's call chains
            newline = line_end(text, start)
            n.at[At.STACKS] += c == TAB
        elif layout == Layout.CSV:
            newline = take_record(text, start, rows, odds, n)
        else:
            newline = take_event(text, start, printed, layout, rows, t, odds, n)
        n.at[At.POS] = newline + 1
    return np.int64(Status.DONE)
