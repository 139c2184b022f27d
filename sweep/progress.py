"""Progress on standard error: a bar on a terminal, plain lines elsewhere, nothing when quiet.

How long it still takes is the driver's forecast, not points done over points left: the longest come first.
"""

import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sweep.quantity import human_time

PLAIN_SECONDS = 5.0


class Reporter(Protocol):
    """What the run tells: notes, and how far it is."""

    def note(self, text: str) -> None: ...

    def advance(self, points: int, failed: int, left: float, workers: int) -> None: ...


class Quiet:
    """Says nothing."""

    def note(self, text: str) -> None:
        pass

    def advance(self, points: int, failed: int, left: float, workers: int) -> None:
        pass


class Plain:
    """A line every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._failed = total, 0, 0
        self._start = self._last = time.monotonic()

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def advance(self, points: int, failed: int, left: float, workers: int) -> None:
        """So many more, and `left` seconds to go."""
        self._done += points
        self._failed += failed
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and self._done + self._failed < self._total:
            return
        self._last = now
        rate = (self._done + self._failed) / max(1e-9, now - self._start)
        failures = f", {self._failed} failed" if self._failed else ""
        self.note(f"{self._done}/{self._total} points{failures}, {rate:.0f}/s, {_workers(workers)}, {human_time(left)} left")


class Bar:
    """rich's bar, with rate and time left."""

    def __init__(self, total: int) -> None:
        self._failed, self._start = 0, time.monotonic()
        self._progress = Progress(
            TextColumn("points"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[workers]}"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[failed]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("points", total=total, rate="", workers="", left="", failed="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def advance(self, points: int, failed: int, left: float, workers: int) -> None:
        self._failed += failed
        done = self._progress.tasks[0].completed + points + failed
        rate = done / max(1e-9, time.monotonic() - self._start)
        text = f"{self._failed} failed" if self._failed else ""
        told: dict[str, Any] = {"rate": f"{rate:.0f}/s", "workers": _workers(workers), "left": f"{human_time(left)} left", "failed": text}
        self._progress.update(self._task, advance=points + failed, **told)


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


def on_terminal() -> bool:
    return sys.stderr.isatty()
