"""Whatever a process leaves behind: it becomes a child of this one, which waits for it."""

import ctypes
import os
import signal

PR_SET_CHILD_SUBREAPER = 36
ORPHAN_SECONDS = 120  # until one that does not end is a failure


class OrphanError(RuntimeError):
    """A process that nobody needs any more goes on."""


def adopt_orphans() -> None:
    """From now on, of all that comes out of this process."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _expire(number: int, frame: object) -> None:
    raise OrphanError(f"a process is still there after {ORPHAN_SECONDS} s")


def wait_for_all() -> None:
    """Until there is no child any more. Raises OrphanError."""
    before = signal.signal(signal.SIGALRM, _expire)
    signal.alarm(ORPHAN_SECONDS)
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
