"""Settings of the host that a case takes for granted: read, compared, and changed only by who puts them back."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sweep.errors import EnvironmentProblemError
from sweep.host import guardian
from sweep.host.case import Case

THP = "/sys/kernel/mm/transparent_hugepage"
NR_HUGEPAGES = "/proc/sys/vm/nr_hugepages"
FREE_HUGEPAGES = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"
HUGETLB_PAGES = 24
RESTORE_SECONDS = 30


def settings_of(case: Case) -> dict[str, str]:
    """File -> value: what the case's prediction takes for granted. Huge zero page and THP only where they can matter."""
    point = case.point
    found = {}
    if point.backing in ("anonymous_thp", "anonymous_default"):
        found = {f"{THP}/enabled": point.thp_enabled, f"{THP}/use_zero_page": str(int(point.use_zero_page))}
    if point.backing in ("shmem", "shmem_thp"):
        found = {f"{THP}/shmem_enabled": "advise" if point.backing == "shmem_thp" else "never"}
    return found


def needs_hugetlb(case: Case) -> bool:
    """2 MiB pages of the pool; a fork copies some of them."""
    return case.point.backing.endswith("hugetlb_2mb")


def read_setting(path: Path) -> str:
    """The value; the one in brackets where a file lists all. Raises OSError."""
    text = path.read_text().strip()
    chosen = re.search(r"\[([^\]]*)\]", text)
    return chosen[1] if chosen else text


class Settings:
    """The host's settings below `root`. Without `may_change` none is touched."""

    def __init__(self, root: Path = Path("/"), may_change: bool = False, journal: Path | None = None) -> None:
        self.root = root
        self.may_change = may_change
        self.journal = journal
        self.originals: dict[str, str] = {}
        self.keeper: subprocess.Popen[bytes] | None = None

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")

    def lacking(self, wanted: Mapping[str, str]) -> list[str]:
        """Of the wanted values those that do not hold, after changing what may be changed: 'use_zero_page = 1, 0 is needed'."""
        found = []
        for name, value in wanted.items():
            try:
                current = read_setting(self.path(name))
                if current != value and self.may_change:
                    self._change(name, current, value)
                    current = read_setting(self.path(name))
            except OSError as error:
                found.append(f"{name} cannot be set to {value}: {error.strerror}")
                continue
            if current != value:
                cure = "the kernel refused" if self.may_change else "--change-settings, as root, sets it and puts it back"
                found.append(f"{Path(name).name} is {current}, {value} is needed ({cure})")
        return found

    def lacks_hugetlb(self) -> str:
        """Why there is no pool of huge pages, if there is none; asked for where that is allowed."""
        try:
            free = int(read_setting(self.path(FREE_HUGEPAGES)))
            if free < HUGETLB_PAGES and self.may_change:
                total = read_setting(self.path(NR_HUGEPAGES))
                self._change(NR_HUGEPAGES, total, str(int(total) + HUGETLB_PAGES - free))
                free = int(read_setting(self.path(FREE_HUGEPAGES)))
        except (OSError, ValueError) as error:
            return f"the pool of huge pages cannot be read or set: {error}"
        return "" if free >= HUGETLB_PAGES else f"{free} free 2 MiB pages, {HUGETLB_PAGES} are needed (vm.nr_hugepages)"

    def _change(self, name: str, original: str, value: str) -> None:
        """The journal first: whoever dies after this line leaves behind what to put back."""
        if self.journal is None:
            raise EnvironmentProblemError(f"{name}: no journal to put it back from")
        path = str(self.path(name))
        if path not in self.originals:
            self.originals[path] = original
            scratch = self.journal.with_suffix(".new")
            with scratch.open("w") as file:
                json.dump(self.originals, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(self.journal)
        if self.keeper is None:
            self.keeper = _start_keeper(self.journal)
        Path(path).write_text(value)

    def put_back(self) -> None:
        """Let the keeper do its work now, and see that it did. Raises EnvironmentProblemError that names what is not as it was."""
        if self.keeper is None:
            return
        keeper, self.keeper = self.keeper, None
        _, complaints = keeper.communicate(timeout=RESTORE_SECONDS)
        different = [path for path, value in self.originals.items() if read_setting(Path(path)) != value]
        if keeper.returncode or different:
            told = complaints.decode(errors="replace").strip().replace("\n", "; ")
            raise EnvironmentProblemError(f"not put back: {told or ', '.join(different)}; the values are in {self.journal}")


def _start_keeper(journal: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", guardian.__file__, journal], stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


@contextmanager
def changed_settings(cache: Path, may_change: bool, root: Path = Path("/")) -> Iterator[Settings]:
    """Settings that are put back at the end, whatever that is; what a run before left changed is put back first.

    Raises EnvironmentProblemError if another process changes settings just now."""
    if not may_change:
        yield Settings(root)
        return
    cache.mkdir(parents=True, exist_ok=True)
    journal = cache / "settings.json"
    with (cache / "settings.lock").open("w") as lock:
        _only_one(lock)
        left = guardian.restore(journal)
        if left:
            raise EnvironmentProblemError(f"a run before left settings changed, and they cannot be put back: {'; '.join(left)}")
        settings = Settings(root, True, journal)
        try:
            yield settings
        finally:
            settings.put_back()


def _only_one(lock: IO[str]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise EnvironmentProblemError("another faultsweep validate --change-settings runs; wait for its end") from None


def why_not(settings: Settings, case: Case) -> str:
    """Why the case cannot run under the host's settings; '' if it can."""
    lacking: Sequence[str] = settings.lacking(settings_of(case))
    if not lacking and needs_hugetlb(case):
        lacking = [text for text in [settings.lacks_hugetlb()] if text]
    return "; ".join(lacking)
