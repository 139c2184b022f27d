"""This process, one chunk after another: for debugging and for the smallest runs."""

from collections.abc import Sequence

from sweep.worker import Chunk, ChunkResult, Job, run_chunk


class InlinePool:
    """Runs a chunk when it is waited for."""

    slots = 1

    def __init__(self, job: Job) -> None:
        self._job = job
        self._chunks: dict[int, Chunk] = {}
        self._count = 0

    def submit(self, chunk: Chunk) -> int:
        self._count += 1
        self._chunks[self._count] = chunk
        return self._count

    def wait(self, handles: Sequence[int], seconds: float) -> list[tuple[int, ChunkResult | Exception]]:  # noqa: ARG002
        first = min(handles)
        try:
            return [(first, run_chunk(self._chunks.pop(first), self._job, "inline"))]
        except Exception as error:  # the driver's to judge, as that of any other worker
            return [(first, error)]

    def abandon(self, handle: int) -> None:
        """Nothing runs beside this process."""

    def close(self, now: bool) -> None:
        """Nothing is open."""
