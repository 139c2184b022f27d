"""Workers with too little memory, and others that die: what LocalPool starts in the place of its own."""

import os
import resource
import signal
import struct
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kernels.simulate import Prepared
from sweep import point
from sweep.executors.local import serve
from sweep.worker import ChunkResult

ROOM = 1 << 30  # bytes for a worker beside what it has when it begins
GREEDY = 16 << 40  # memory of a guest whose state needs more
real = point.Runner.prepare


def address_space() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def serve_in_little_memory(connection: Connection) -> None:
    """The limit is real, and so is what the guest's state asks for."""
    point.compile_kernels()
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + ROOM, resource.RLIM_INFINITY))
    serve(connection)


def killed_if_greedy(runner: point.Runner, values: Mapping[str, Any]) -> Prepared:
    if values["memory"] >= GREEDY:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(runner, values)


def serve_under_the_oom_killer(connection: Connection) -> None:
    """As the kernel would: the worker is gone."""
    point.Runner.prepare = killed_if_greedy  # type: ignore[method-assign]
    serve(connection)


def killed_at_its_start(connection: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_first() -> bool:
    """Of all that ask, the first that comes to the file FIRST."""
    try:
        os.close(os.open(os.environ["FIRST"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def killed_at_its_first_start(connection: Connection) -> None:
    if is_first():
        killed_at_its_start(connection)
    serve(connection)


class HalfAnAnswer:
    """A pipe whose writer is killed inside its first answer."""

    def __init__(self, connection: Connection) -> None:
        self.recv, self.connection = connection.recv, connection

    def send(self, message: object) -> None:
        if isinstance(message, ChunkResult) and is_first():
            os.write(self.connection.fileno(), struct.pack("!i", 100_000) + b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        self.connection.send(message)


def killed_inside_its_answer(connection: Connection) -> None:
    serve(HalfAnAnswer(connection))  # type: ignore[arg-type]
