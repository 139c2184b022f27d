"""A trace's bytes, block by block: plain or gz, a file or standard input, never more than one block of them."""

import gzip
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kernels.state import Bytes
from sweep.errors import TraceError
from sweep.replay.formats import GZ_MAGIC, HEAD_BYTES
from sweep.replay.scan import MAX_LINE

BLOCK_BYTES = 1 << 19
STDIN = "-"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Source:
    """An open trace. Raises TraceError for what is no regular file, cannot be read or is damaged."""

    def __init__(self, place: str) -> None:
        self.name = "standard input" if place == STDIN else place
        self.path = None if place == STDIN else Path(place)
        self._raw = _opened(place)
        self.packed = self._raw.peek(2)[:2] == GZ_MAGIC
        self._file: Any = gzip.GzipFile(fileobj=self._raw) if self.packed else self._raw
        self.head = b""  # the first bytes, at most HEAD_BYTES; they come again from read()

    def __enter__(self) -> "Source":
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _begin(self) -> None:
        head, have = memoryview(bytearray(HEAD_BYTES)), 0
        while got := self._guarded(head[have:], 0):
            have += got
        self.head = bytes(head[:have]).removeprefix(BYTE_ORDER_MARK)
        if not self.head:
            raise TraceError(self.name, "is empty; record some faults first")

    def __exit__(self, *_: object) -> None:
        if self._raw is not sys.stdin.buffer:
            self._raw.close()

    def _guarded(self, into: memoryview, lines: int) -> int:
        """Fills the beginning of `into`. Raises TraceError for what cannot be unpacked."""
        try:
            return int(self._file.readinto(into)) if into else 0
        except EOFError:
            text = f"the gz file is cut short, after {lines} whole lines; fetch it again, or unpack what is there: zcat FILE"
            raise TraceError(self.name, text) from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise TraceError(self.name, f"the gz file is damaged after {lines} whole lines ({error}); fetch it again") from None
        except OSError as error:
            raise TraceError(self.name, f"cannot be read: {error.strerror or error}") from None

    def read(self, into: memoryview, lines: int) -> int:
        """Fill the beginning of `into`; how many bytes that are, 0: it is over. `lines`: how many were read, for messages."""
        if self.head:
            part, self.head = self.head[: len(into)], self.head[len(into) :]
            into[: len(part)] = part
            return len(part)
        return self._guarded(into, lines)


def _opened(place: str) -> Any:
    if place == STDIN:
        return sys.stdin.buffer
    path = Path(place)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TraceError(place, "is no regular file; give the path of a trace, or - and a pipe")
        return path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(place, f"cannot be read: {reason}; check the path and its rights") from None


class Blocks:
    """Whole lines of a source: `data` holds them up to the end that the iterator gives, each time.

    Of a line that is longer than MAX_LINE its first MAX_LINE + 1 bytes are left, so that it is refused for its length. `cut`: the
    last line has no newline."""

    def __init__(self, source: Source, block_bytes: int = BLOCK_BYTES) -> None:
        self.source, self.block_bytes = source, block_bytes
        self._buffer = bytearray(block_bytes + MAX_LINE + 2)
        self.data: Bytes = np.frombuffer(self._buffer, np.uint8)
        self.lines = 0  # done by who reads, for messages
        self.cut = b""

    def __iter__(self) -> Iterator[int]:
        view, have, dropping = memoryview(self._buffer), 0, False
        while got := self.source.read(view[have : have + self.block_bytes], self.lines):
            total = have + got
            if dropping:
                rest = self._buffer.find(b"\n", have, total)
                if rest < 0:
                    continue
                self._move(rest, total, have)
                total, dropping = total - (rest - have), False
            end = self._buffer.rfind(b"\n", 0, total) + 1
            if end:
                yield end
            dropping = total - end > MAX_LINE
            have = min(total - end, MAX_LINE + 1)
            self._move(end, end + have, 0)
        self.cut = bytes(self._buffer[:have])

    def _move(self, start: int, end: int, to: int) -> None:
        """Bytes of the buffer to a place before them."""
        self.data[to : to + end - start] = self.data[start:end].copy()
