"""Numbers, words and headers of trace lines: compiled functions over a block of bytes that ends with a newline.

Every loop ends at the newline of its line at the latest, so no other bound is tested.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from kernels.jit import jit
from kernels.state import Bytes, Int64s

UNKNOWN = -1
NONE = -1
BEYOND = (1 << 63) - 1  # a number of more than 58 bits


class Layout(IntEnum):
    """What stands before an event's fields."""

    PERF = 0  # comm tid [cpu] sec.frac: sys:event:
    FTRACE = 1  # comm-tid [cpu] flags sec.frac: event:
    PLAIN = 2  # ns tid event:
    CSV = 3  # columns, in the order of Text.columns


class At(IntEnum):
    """Index of the numbers that a scan goes on with from block to block."""

    POS = 0
    LINE = 1  # lines done
    ROWS = 2  # rows in the window
    BASE = 3  # number of the window's first row
    ODDS = 4
    THREADS = 5
    FIRST_NS = 6
    LAST_NS = 7
    END_NS = 8
    BACKWARD = 9  # rows that are earlier than the one before
    BACK_NS = 10  # by how much at most
    FAULTS = 11  # with those of threads that are not wanted
    EXITS = 12
    ENTRIES = 13
    OTHERS = 14  # other events
    STACKS = 15  # lines of perf's call chains
    EPT = 16  # codes that are an exit qualification, and the first one's line
    EPT_LINE = 17
    NPT = 18  # codes with a bit that only NPT sets
    NPT_LINE = 19
    LOW = 20  # codes that could be either
    LOW_LINE = 21
    KERNEL = 22  # of those: without the user bit, which NPT always sets
    OLD = 23  # faults without a vCPU
    EPT_EXITS = 24  # exit reasons
    NPF_EXITS = 25
    EXCEPTION_EXITS = 26
    MOVED_LINE = 27  # a thread that was one vCPU was another one here
    TID = 28  # of the line at hand
    NS = 29
    COMM = 30
    COMM_END = 31


class Kind(IntEnum):
    """What a byte may be; the values are bits."""

    END = 1  # of a number
    GAP = 2  # between words


class Text(NamedTuple):
    """A block, and for Layout.CSV the Role of each column."""

    data: Bytes
    roles: Int64s
    kind: Bytes  # (256,) Kind of each byte
    digit: Bytes  # (256,) its value as a hexadecimal digit; NO_DIGIT


class Numbers(NamedTuple):
    at: Int64s  # (len(At),)


def packed(word: str) -> tuple[int, int]:
    """A word of at most 16 ASCII characters as two numbers, as word_at() gives it."""
    return _packed(word[:8]), _packed(word[8:])


def _packed(part: str) -> int:
    number = 1
    for c in part:
        number = number * 128 + ord(c)
    return number


TAB, NEWLINE, RETURN, SPACE, HASH, COMMA, MINUS, POINT, SLASH, ZERO, NINE, COLON, EQUALS = (ord(c) for c in "\t\n\r #,-./09:=")
OPEN, CLOSE, BRACKET, BRACKET_END, LESS, SMALL_X = (ord(c) for c in "()[]<x")
SMALL = 32  # the bit that makes an ASCII letter small
NOTHING = packed("")[1]
NO_DIGIT = 255
LAST_ASCII = 127
COMM_COLUMNS = 16  # perf and the kernel print comm with %16s


def tables() -> tuple[Bytes, Bytes]:
    """Text.kind and Text.digit."""
    kind, digit = np.zeros(256, np.uint8), np.full(256, NO_DIGIT, np.uint8)
    for c in (TAB, NEWLINE, RETURN, SPACE, COMMA):
        kind[c] = Kind.END | Kind.GAP
    kind[COLON] = kind[EQUALS] = Kind.GAP
    for value, letter in enumerate("0123456789abcdef"):
        digit[ord(letter)] = digit[ord(letter.upper())] = value
    return kind, digit


@jit
def is_digit(c: int) -> bool:
    return ZERO <= c <= NINE


@jit
def is_end(text: Text, i: int) -> bool:
    """A number may end before that byte."""
    return text.kind[text.data[i]] & Kind.END != 0


@jit
def is_gap(text: Text, i: int) -> bool:
    """The byte stands between words."""
    return text.kind[text.data[i]] != 0


@jit
def hexadecimal_at(text: Text, start: int) -> tuple[int, int]:
    """(value, end) of the digits there; end = start: there are none; BEYOND: over 58 bits."""
    value, large, i = np.int64(0), np.int64(0), start
    while True:
        digit = np.int64(text.digit[text.data[i]])
        if digit == NO_DIGIT:
            return (np.int64(BEYOND) if large >> 58 else value), i
        large |= value
        value = value << 4 | digit
        i += 1


@jit
def decimal_at(text: Text, start: int) -> tuple[int, int]:
    """The same of decimal digits."""
    value, i = np.int64(0), start
    while is_digit(text.data[i]):
        value = value * 10 + (text.data[i] - ZERO) if value < 1 << 58 else np.int64(BEYOND)
        i += 1
    return value, i


@jit
def number_at(text: Text, start: int, base: int) -> tuple[int, int]:
    """(value, end) of the number there, which 0x makes hexadecimal; end = start: there is none; BEYOND: over 58 bits."""
    if text.data[start] == ZERO and text.data[start + 1] | SMALL == SMALL_X:
        value, end = hexadecimal_at(text, start + 2)
        return value, (end if end > start + 2 else start)
    return hexadecimal_at(text, start) if base == 16 else decimal_at(text, start)


@jit
def word_at(text: Text, start: int) -> tuple[int, int, int]:
    """(its first 8 characters, the 8 behind them, end) of the word there; packed() makes the same of a known word."""
    first, second, every, i = np.int64(1), np.int64(1), np.int64(0), start
    while i < start + 8 and not is_gap(text, i):
        every |= text.data[i]
        first = first << 7 | text.data[i]
        i += 1
    while i < start + 16 and not is_gap(text, i):
        every |= text.data[i]
        second = second << 7 | text.data[i]
        i += 1
    if every > LAST_ASCII or not is_gap(text, i):
        return first, np.int64(0), word_end(text, i)
    return first, second, i


@jit
def word_end(text: Text, i: int) -> int:
    while not is_gap(text, i):
        i += 1
    return i


@jit
def skip_spaces(text: Text, i: int) -> int:
    while text.data[i] == SPACE or text.data[i] == TAB:
        i += 1
    return i


@jit
def line_end(text: Text, i: int) -> int:
    """Where the line's newline is."""
    while text.data[i] != NEWLINE:
        i += 1
    return i


@jit
def thread_before(text: Text, start: int, bracket: int, layout: int, n: Numbers) -> bool:
    """Read backwards from a '[': spaces, perhaps a (tgid), the thread's id, what parts it from comm. False: it is none."""
    j = bracket - 1
    while j > start and text.data[j] == SPACE:
        j -= 1
    if j > start and text.data[j] == CLOSE:
        while j > start and text.data[j] != OPEN:
            j -= 1
        j -= 1
        while j > start and text.data[j] == SPACE:
            j -= 1
    last, tid, scale = j, np.int64(0), np.int64(1)
    while j > start and is_digit(text.data[j]) and last - j < 10:
        tid += (text.data[j] - ZERO) * scale
        scale *= 10
        j -= 1
    if j == last or last == bracket - 1 or j <= start:
        return False
    if layout == Layout.FTRACE and text.data[j] != MINUS:
        return False
    if layout == Layout.PERF and text.data[j] == SLASH:  # pid/tid
        j -= 1
        while j > start and is_digit(text.data[j]):
            j -= 1
    if layout == Layout.PERF and text.data[j] == MINUS:  # a thread that perf did not learn of: -1
        tid, j = np.int64(UNKNOWN), j - 1
    if layout == Layout.PERF and text.data[j] != SPACE:
        return False
    n.at[At.TID] = tid
    n.at[At.COMM_END] = j
    return True


@jit
def time_at(text: Text, start: int, n: Numbers) -> int:
    """End of 'seconds.fraction:', whose ns go into n; NONE: there is no such thing."""
    seconds, i = number_at(text, start, 10)
    if i == start or i - start > 10 or text.data[i] != POINT:
        return NONE
    i += 1
    first, fraction = i, np.int64(0)
    while is_digit(text.data[i]) and i - first < 9:
        fraction = fraction * 10 + (text.data[i] - ZERO)
        i += 1
    if i == first or text.data[i] != COLON or seconds >= 1 << 33:
        return NONE
    for _ in range(9 - (i - first)):
        fraction *= 10
    n.at[At.NS] = seconds * 1_000_000_000 + fraction
    return i + 1


@jit
def behind_bracket(text: Text, bracket: int, n: Numbers) -> int:
    """Read on from a '[': the CPU, ']', perhaps flags, the time. Where the event's name begins; NONE: it is something else."""
    i = bracket + 1
    while is_digit(text.data[i]):
        i += 1
    if i == bracket + 1 or text.data[i] != BRACKET_END:
        return NONE
    i = skip_spaces(text, i + 1)
    if not is_digit(text.data[i]):  # irqs-off, need-resched, hardirq/softirq, preempt-depth
        while not is_end(text, i):
            i += 1
        i = skip_spaces(text, i)
    end = time_at(text, i, n)
    return end if end == NONE else skip_spaces(text, end)


@jit
def header_end(text: Text, start: int, i: int, layout: int, n: Numbers) -> int:
    """Where the event's name begins, its thread and time in n; NONE: the line is no event.

    `i`: its first byte that is no space. comm may hold anything, brackets too: of an untouched line it ends before column 16, so a
    '[' behind that is tried first."""
    early = np.int64(NONE)
    while text.data[i] != NEWLINE:
        if text.data[i] == BRACKET:
            if i - start <= COMM_COLUMNS:
                early = i if early == NONE else early
            elif thread_before(text, start, i, layout, n):
                found = behind_bracket(text, i, n)
                if found != NONE:
                    return found
        i += 1
    if early != NONE and thread_before(text, start, early, layout, n):  # the spaces before comm were taken off
        return behind_bracket(text, early, n)
    return np.int64(NONE)


@jit
def plain_header_end(text: Text, start: int, n: Numbers) -> int:
    """The same for 'ns tid event:'."""
    ns, i = number_at(text, start, 10)
    if i == start or text.data[i] != SPACE or ns == BEYOND:
        return NONE
    tid, end = number_at(text, i + 1, 10)
    if end == i + 1 or text.data[end] != SPACE or end - i > 11:
        return NONE
    n.at[At.NS], n.at[At.TID] = ns, tid
    n.at[At.COMM_END] = start
    return skip_spaces(text, end)
