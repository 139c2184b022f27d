"""Where a dataset lies: a local folder, or a bucket of an object store. Files are published whole, once, and never changed.

Names are relative, like 'points/part-1.parquet'. `create` is the one way in for data: the first to publish a name wins.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sweep.errors import DatasetError, EnvironmentProblemError, MissingFileError

TEMP_PREFIX = ".tmp-"
SCHEMES = ("s3://", "gs://", "az://", "memory://")


class Storage(Protocol):
    """What a dataset needs of the place where it lies."""

    name: str

    def read(self, name: str) -> bytes:
        """The file. Raises DatasetError if it is missing or cannot be read."""
        ...

    def size(self, name: str) -> int | None:
        """Its bytes; None if there is no such file."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; hidden ones left out."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Publish a file if there is none of that name; False: there is. Raises EnvironmentProblemError."""
        ...

    def replace(self, name: str, content: bytes) -> None:
        """Publish a file, in the place of an earlier one. Raises EnvironmentProblemError."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...


def sync_folder(folder: Path) -> None:
    """Make new names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """A temporary file beside `path` with the content, on disk; removed at the end. Raises EnvironmentProblemError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=TEMP_PREFIX, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                temporary.chmod(0o644)
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise EnvironmentProblemError(
            f"{path}: cannot be written: {error.strerror}; free space or change rights, then run again"
        ) from error


class LocalStorage:
    """A folder. A name appears with its whole content, durably, or not at all."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            raise MissingFileError(f"{self.root / name}: is missing; run again to compute it anew") from None
        except OSError as error:
            raise DatasetError(f"{self.root / name}: {error.strerror}; run again to compute it anew") from None

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in (self.root / folder).iterdir() if not entry.name.startswith("."))
        except FileNotFoundError:
            return []

    def create(self, name: str, content: bytes) -> bool:
        path = self.root / name
        with _written(path, content) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True

    def replace(self, name: str, content: bytes) -> None:
        path = self.root / name
        with _written(path, content) as temporary:
            temporary.replace(path)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Temporary files of runs that died; only while no other run writes here."""
        for pattern in (f"{TEMP_PREFIX}*", f"*/{TEMP_PREFIX}*"):
            for path in self.root.glob(pattern):
                path.unlink(missing_ok=True)


def open_storage(place: str | Path) -> Storage:
    """A folder, or a URL of an object store. Raises EnvironmentProblemError."""
    text = str(place)
    if text.startswith(SCHEMES):
        from sweep.dataset.objects import ObjectStorage

        return ObjectStorage(text)
    return LocalStorage(Path(text.removeprefix("file://")))
