"""Processes of this machine, without Ray.

Each worker has a pipe of its own to the driver: when it dies, the driver reads the end of that pipe, knows which chunk died with it
and how, and the other workers go on.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from sweep.errors import EnvironmentProblemError, FaultsweepError
from sweep.executors.base import WorkerDiedError
from sweep.worker import Chunk, ChunkResult, Job, run_chunk

CONTEXT = multiprocessing.get_context("spawn")  # a fork would take over locks of threads that it has not
STARTED = "started"
FAILED_STARTS = 3  # of workers, one after the other, until the run is given up
ENDING_SECONDS = 10.0
TERMINAL = (signal.SIGINT, signal.SIGHUP)  # what a terminal sends to all processes is the driver's business
OUT_OF_MEMORY = ", as the kernel does when memory runs out"


@contextmanager
def _held_back(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Signals that come meanwhile come afterwards; processes that are started meanwhile never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_driver() -> None:
    """A driver that was killed leaves no workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def serve(connection: Connection) -> None:
    """A worker's life: the job, then chunk after chunk, until the driver closes the pipe or is gone."""
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        job: Job = connection.recv()
        connection.send(STARTED)
        while True:
            connection.send(_answer(connection.recv(), job))
    except (EOFError, ConnectionError):
        os._exit(0)  # there is nothing to tidy up


def _answer(chunk: Chunk, job: Job) -> ChunkResult | Exception:
    """What comes of a chunk; exceptions as ones that can be sent."""
    try:
        return run_chunk(chunk, job, f"local-{os.getpid()}")
    except FaultsweepError as error:
        return error
    except MemoryError as error:
        return MemoryError(str(error))
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    started: bool = False
    handle: int | None = None  # of the chunk it has

    def end(self) -> WorkerDiedError:
        """Wait until it is gone, and say how it went."""
        self.connection.close()
        self.process.join(ENDING_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return WorkerDiedError(_how_it_ended(self.process.exitcode or 0))


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"the worker process ended with status {status}"
    name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
    return f"the worker process was killed by {name}{OUT_OF_MEMORY if -status == signal.SIGKILL else ''}"


class LocalPool:
    """Worker processes, started when there is work for them; one that dies is replaced, and only its chunk fails."""

    def __init__(self, job: Job, workers: int) -> None:
        self.slots = workers
        self._job = job
        self._workers: list[_Worker] = []
        self._waiting: deque[tuple[int, Chunk]] = deque()
        self._chunks: dict[int, Chunk] = {}  # with the workers
        self._count = 0
        self._failed_starts = 0
        resource_tracker.ensure_running()  # here, since it lets signals through that are held back

    def _new(self) -> _Worker:
        mine, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=serve, args=(theirs,), daemon=True)
        with _held_back(TERMINAL):
            process.start()
        theirs.close()
        with suppress(OSError):  # it died: its first chunk will find out
            mine.send(self._job)
        self._workers.append(_Worker(process, mine))
        return self._workers[-1]

    def _idle(self) -> _Worker | None:
        found = next((worker for worker in self._workers if worker.handle is None), None)
        return found or (self._new() if len(self._workers) < self.slots else None)

    def _hand_out(self) -> None:
        """Give waiting chunks to workers that have none. A pipe takes a chunk whether its worker reads or not."""
        while self._waiting and (worker := self._idle()) is not None:
            worker.handle, chunk = self._waiting.popleft()
            self._chunks[worker.handle] = chunk
            try:
                worker.connection.send(chunk)
            except OSError:  # it died while it had nothing to do
                self._take_back(worker)

    def _take_back(self, worker: _Worker) -> None:
        """The chunk of a worker that died before it began with it. Raises EnvironmentProblemError where no worker comes to work."""
        died = self._removed(worker)
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            raise EnvironmentProblemError(
                f"--executor local: {died} before it came to work, {FAILED_STARTS} times; its own message is above; free memory, or, in a "
                f"script, call sweep.run() under if __name__ == '__main__'; --executor inline needs no processes"
            )
        if worker.handle is not None:
            self._waiting.appendleft((worker.handle, self._chunks.pop(worker.handle)))

    def _removed(self, worker: _Worker) -> WorkerDiedError:
        self._workers.remove(worker)
        return worker.end()

    def submit(self, chunk: Chunk) -> int:
        self._count += 1
        self._waiting.append((self._count, chunk))
        self._hand_out()
        return self._count

    def wait(self, handles: Sequence[int], seconds: float) -> list[tuple[int, ChunkResult | Exception]]:  # noqa: ARG002
        by_pipe = {worker.connection: worker for worker in self._workers if worker.handle is not None}
        ready = multiprocessing.connection.wait(list(by_pipe), seconds)
        found = [self._receive(worker) for pipe, worker in by_pipe.items() if pipe in ready]
        self._hand_out()
        return [outcome for outcome in found if outcome is not None]

    def _receive(self, worker: _Worker) -> tuple[int, ChunkResult | Exception] | None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            if not worker.started:
                self._take_back(worker)
                return None
            message = self._removed(worker)
        if message == STARTED:
            worker.started, self._failed_starts = True, 0
            return None
        handle, worker.handle = worker.handle, None
        if handle is None:
            raise RuntimeError("a worker answered that had nothing to do")
        del self._chunks[handle]
        return handle, message

    def abandon(self, handle: int) -> None:
        """Kills the worker that has the chunk."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != handle)
        self._chunks.pop(handle, None)
        for worker in [worker for worker in self._workers if worker.handle == handle]:
            worker.process.kill()
            self._removed(worker)
        self._hand_out()

    def close(self, now: bool) -> None:
        for worker in self._workers:
            worker.connection.close()
            if now:
                worker.process.kill()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
