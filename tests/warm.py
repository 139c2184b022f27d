"""Drivers of sweeps forked from one process that has imported everything: a start costs milliseconds, and a SIGKILL is a real one.

Orders and answers are lines of JSON. Before an answer is given, every process that came out of a driver has ended by itself: what a
killed driver leaves behind becomes a child of this process, which waits for it (and ends with an error where it has to wait too long).
"""

import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import IO, Any, Self

from sweep.executors import local
from sweep.executors.local import LocalPool
from sweep.worker import ChunkResult
from tests.orphans import adopt_orphans, wait_for_all

CRASHED = 99
PAUSE_SECONDS = 0.03  # between two looks for a worker to kill, at most


@dataclass(frozen=True)
class Order:
    """A run; SIGKILL of its driver after `seconds`, or of so many of its workers."""

    study: str
    out: str
    executor: str = "inline"
    seconds: float | None = None
    worker_kills: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """How a driver ended: `status` as waitpid gives it, -9 where it was killed."""

    status: int
    seconds: float
    worker_kills: int = 0

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL


class KillingPool(LocalPool):
    """Now and then kills a worker that has a chunk, at a time of its own choice; a chunk's second attempt alone is spared, since a
    chunk whose workers die each time is to blame."""

    kills = 0
    most = 0
    random = Random()

    def wait(self, handles: Any, seconds: float) -> list[tuple[int, ChunkResult | Exception]]:
        found = super().wait(handles, self.random.uniform(0, PAUSE_SECONDS))
        busy = [worker for worker in self._workers if worker.started and worker.handle is not None]
        victims = [worker for worker in busy if self._chunks[worker.handle].attempt == 1]  # type: ignore[index]
        if not found and victims and self.kills < self.most:
            os.kill(self.random.choice(victims).process.pid or 0, signal.SIGKILL)
            KillingPool.kills += 1
        return found


def drive(order: Order) -> int:
    """In the forked process: the run, and its exit status."""
    from sweep.runner import RunOptions, run

    if order.worker_kills:
        KillingPool.most, KillingPool.random = order.worker_kills, Random(order.seed)
        local.LocalPool, local.CONTEXT = KillingPool, multiprocessing.get_context("fork")  # type: ignore[misc]
    return run(order.study, order.out, RunOptions(executor=order.executor, workers=2, quiet=True)).exit_status


def forked(order: Order, report: int) -> None:
    """Never returns."""
    status = CRASHED
    try:
        status = drive(order)
    except Exception as error:
        print(f"{order}: {error!r}", file=sys.stderr, flush=True)
    finally:
        os.write(report, str(KillingPool.kills).encode())
        os._exit(status)


def obey(order: Order) -> Answer:
    """Fork, perhaps kill, and wait for all that came out of it."""
    begin = time.monotonic()
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        forked(order, writing)
    os.close(writing)
    handle = os.pidfd_open(process)
    if order.seconds is not None and not select.select([handle], [], [], order.seconds)[0]:
        os.kill(process, signal.SIGKILL)
    os.close(handle)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    seconds = time.monotonic() - begin
    wait_for_all()
    with os.fdopen(reading) as file:
        return Answer(status, seconds, int(file.read() or 0))


def main() -> None:
    adopt_orphans()
    import duckdb  # noqa: F401 - all that a run imports
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401

    import sweep.runner  # noqa: F401
    from sweep.point import compile_kernels

    compile_kernels()
    for line in sys.stdin:
        print(json.dumps(asdict(obey(Order(**json.loads(line))))), flush=True)


class WarmDrivers:
    """The process, from the test's side."""

    def __init__(self, messages: Path) -> None:
        self.messages = messages

    def __enter__(self) -> Self:
        with self.messages.open("w") as stderr:
            command = [sys.executable, "-m", "tests.warm"]
            root = Path(__file__).resolve().parent.parent
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=root)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, order: Order) -> Answer:
        stdin: IO[str] | None = self._process.stdin
        stdout: IO[str] | None = self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asdict(order)) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, self.messages.read_text()
        answer = Answer(**json.loads(line))
        assert answer.killed or answer.status == 0, f"{order}: {answer} {self.messages.read_text()}"
        return answer


if __name__ == "__main__":
    main()
