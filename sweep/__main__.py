"""The command: `faultsweep`, or `python -m sweep`. Ctrl-C ends it with one line from the first moment on."""

import os
import signal
from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C where no run has a better answer. In the middle of an import the process ends here: an exception would come out of
    the half-made module as another one. Raises InterruptedRunError."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted: while starting; run the same command again to go on\n")
            os._exit(128 + number)
        frame = frame.f_back
    from sweep.errors import InterruptedRunError

    raise InterruptedRunError(number, "before it was through")


def main() -> None:
    """Entry of the command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, interrupt)
    from sweep.cli import main as command

    command()


if __name__ == "__main__":
    main()
