"""A dataset in an object store (S3, GCS, Azure), over obstore: its conditional put lets any number of writers publish a name once."""

from collections.abc import Iterator
from contextlib import contextmanager

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

from sweep.errors import EnvironmentProblemError, MissingFileError

MISSING = (NotFoundError, FileNotFoundError)


class ObjectStorage:
    """A prefix of a bucket. Credentials, region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL ...)."""

    def __init__(self, url: str) -> None:
        self.name = url
        with self._problems(""):
            self._store = from_url(url)

    @contextmanager
    def _problems(self, name: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            where = f"{self.name}/{name}" if name else self.name
            raise EnvironmentProblemError(f"{where}: {text}; check URL, credentials and network, then run again") from None

    def read(self, name: str) -> bytes:
        with self._problems(name):
            try:
                return bytes(obstore.get(self._store, name).bytes())
            except MISSING:
                raise MissingFileError(f"{self.name}/{name}: is missing; run again to compute it anew") from None

    def size(self, name: str) -> int | None:
        with self._problems(name):
            try:
                return int(obstore.head(self._store, name)["size"])
            except MISSING:
                return None

    def names(self, folder: str) -> list[str]:
        with self._problems(folder):
            found = [entry["path"] for batch in obstore.list(self._store, prefix=folder) for entry in batch]
        return sorted(path.removeprefix(f"{folder}/") for path in found if path.count("/") == 1)

    def create(self, name: str, content: bytes) -> bool:
        with self._problems(name):
            try:
                obstore.put(self._store, name, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def replace(self, name: str, content: bytes) -> None:
        with self._problems(name):
            obstore.put(self._store, name, content, use_multipart=False)

    def remove(self, name: str) -> None:
        with self._problems(name):
            try:
                obstore.delete(self._store, name)
            except MISSING:
                return
