"""A storage that fails as disks, kernels and object stores do, at chosen operations, from a seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from random import Random

import pytest

from sweep.dataset.storage import Storage, open_storage
from sweep.errors import EnvironmentProblemError, MissingFileError


class Crash(BaseException):
    """The process is gone: nothing of it runs any more."""


class Trouble(Enum):
    """What can go wrong with one operation."""

    CRASH_BEFORE = 1  # before it took effect (a rename that was not synced is lost)
    CRASH_AFTER = 2
    NO_SPACE = 3
    IO_ERROR = 4
    SHORT_WRITE = 5  # half of the file is there, and the machine is gone
    TWICE = 6  # the operation is made twice: a retry of a request whose answer was lost
    STALE_LISTING = 7  # what was published last is not listed yet


class MemoryStorage:
    """Files in a dict."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        if name not in self.files:
            raise MissingFileError(f"{self.name}/{name}: is missing")
        return self.files[name]

    def size(self, name: str) -> int | None:
        return len(self.files[name]) if name in self.files else None

    def names(self, folder: str) -> list[str]:
        return sorted(name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/"))

    def create(self, name: str, content: bytes) -> bool:
        if name in self.files:
            return False
        self.files[name] = content
        return True

    def replace(self, name: str, content: bytes) -> None:
        self.files[name] = content

    def remove(self, name: str) -> None:
        self.files.pop(name, None)


class FaultyStorage:
    """Passes on to a MemoryStorage; the n-th operation from now has one trouble."""

    def __init__(self, inner: MemoryStorage, random: Random) -> None:
        self.inner, self.name, self.random = inner, inner.name, random
        self.countdown = 0
        self.trouble: Trouble | None = None
        self.hidden = ""
        self.injected = 0

    def arm(self, trouble: Trouble | None, operations: int) -> None:
        self.trouble, self.countdown, self.hidden = trouble, operations, ""

    def _struck(self, *kinds: Trouble) -> Trouble | None:
        """The trouble, if it is due and of one of these kinds."""
        self.countdown -= 1
        if self.trouble is None or self.countdown > 0 or self.trouble not in kinds:
            return None
        trouble, self.trouble = self.trouble, None
        self.injected += 1
        return trouble

    def _change(self, name: str, content: bytes | None, act: Callable[[], object]) -> object:
        match self._struck(*(kind for kind in Trouble if kind is not Trouble.STALE_LISTING)):
            case Trouble.CRASH_BEFORE:
                raise Crash
            case Trouble.CRASH_AFTER:
                act()
                raise Crash
            case Trouble.NO_SPACE:
                raise EnvironmentProblemError(f"{name}: cannot be written: No space left on device")
            case Trouble.IO_ERROR:
                raise EnvironmentProblemError(f"{name}: cannot be written: Input/output error")
            case Trouble.SHORT_WRITE:
                if content is not None and name not in self.inner.files:
                    self.inner.files[name] = content[: len(content) // 2]
                raise Crash
            case Trouble.TWICE:
                act()
        self.hidden = name
        return act()

    def read(self, name: str) -> bytes:
        if self._struck(Trouble.CRASH_BEFORE, Trouble.IO_ERROR):
            raise Crash
        return self.inner.read(name)

    def size(self, name: str) -> int | None:
        return self.inner.size(name)

    def names(self, folder: str) -> list[str]:
        stale = self._struck(Trouble.STALE_LISTING)
        return [name for name in self.inner.names(folder) if not (stale and f"{folder}/{name}" == self.hidden)]

    def create(self, name: str, content: bytes) -> bool:
        return bool(self._change(name, content, lambda: self.inner.create(name, content)))

    def replace(self, name: str, content: bytes) -> None:
        self._change(name, content, lambda: self.inner.replace(name, content))

    def remove(self, name: str) -> None:
        self._change(name, None, lambda: self.inner.remove(name))


@contextmanager
def opened_as(storage: Storage) -> Iterator[None]:
    """Whoever opens the storage's name gets it."""

    def opens(place: object) -> Storage:
        return storage if str(place) == storage.name else open_storage(str(place))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweep.dataset.store.open_storage", opens)
        yield
