"""Processes of this machine, without Ray."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from sweep.worker import Chunk, ChunkResult, Job, run_chunk

_job: Job | None = None


def _start(job: Job) -> None:
    """In a new worker: keep the job; leave Ctrl-C to the driver."""
    global _job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    _job = job


def _end_with_driver() -> None:
    """A driver that was killed leaves no workers behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run(chunk: Chunk) -> ChunkResult:
    if _job is None:
        raise RuntimeError("the worker was started without its job")
    return run_chunk(chunk, _job, f"local-{os.getpid()}")


class LocalPool:
    """A pool of worker processes; a pool that broke because a worker was killed is replaced by a new one."""

    def __init__(self, job: Job, workers: int) -> None:
        self.slots = workers
        self._job = job
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.slots, multiprocessing.get_context("spawn"), _start, (self._job,))

    def submit(self, chunk: Chunk) -> Future[ChunkResult]:
        try:
            return self._pool.submit(_run, chunk)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = self._new()
            return self._pool.submit(_run, chunk)

    def wait(self, handles: Sequence[Future[ChunkResult]], seconds: float) -> list[tuple[Future[ChunkResult], ChunkResult | Exception]]:
        ready, _ = wait(handles, seconds, FIRST_COMPLETED)
        return [(future, _outcome(future)) for future in ready]

    def abandon(self, handle: Future[ChunkResult]) -> None:
        """Kills every worker: which of them has the chunk is not known. The others' chunks fail with it, and are tried again."""
        handle.cancel()
        for process in list((self._pool._processes or {}).values()):
            process.kill()

    def close(self, now: bool) -> None:
        workers = list((self._pool._processes or {}).values()) if now else []
        self._pool.shutdown(wait=not now, cancel_futures=True)
        for process in workers:
            process.kill()


def _outcome(future: Future[ChunkResult]) -> ChunkResult | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    return error if isinstance(error, Exception) else RuntimeError(str(error))
