"""This process, one chunk after another: for debugging and for the smallest runs."""

from collections.abc import Sequence

from sweep.executors.base import Chunk, ChunkResult, run_chunk
from sweep.point import Context


class InlinePool:
    """Runs a chunk when it is waited for."""

    slots = 1

    def __init__(self, context: Context) -> None:
        self._context = context
        self._chunks: dict[int, Chunk] = {}
        self._count = 0

    def submit(self, chunk: Chunk) -> int:
        self._count += 1
        self._chunks[self._count] = chunk
        return self._count

    def wait(self, handles: Sequence[int], seconds: float) -> list[tuple[int, ChunkResult | Exception]]:  # noqa: ARG002
        first = min(handles)
        return [(first, run_chunk(self._chunks.pop(first).points, self._context, "inline"))]

    def close(self, now: bool) -> None:
        pass
