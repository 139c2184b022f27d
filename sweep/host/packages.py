"""Debian packages, fetched and unpacked into the user's cache, never installed: kernels, QEMU, busybox.

apt does the fetching: from the mirrors that this machine's own sources name, with the checksums of their signed indexes. What
was unpacked is kept with its digests, and checked again before each use."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sweep.errors import EnvironmentProblemError

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
CODENAMES = ("bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable", "oldstable")
SUITES = ("bookworm", "trixie-backports")
SECURITY_SUITES = ("bookworm-security",)
FETCH_SECONDS = 600
MAX_PACKAGES = 200
TOOLS = ("qemu-system-x86", "busybox-static")
NAME = re.compile(r"linux-(?P<part>image|binary|modules)-(?P<version>[0-9]+\.[0-9]+[\w.+~-]*)-cloud-amd64")


DIGESTS = "digests.json"
Keep = Callable[[Path], Iterable[Path]]


@dataclass(frozen=True)
class Mirror:
    """A repository of a configured source: where, and by which key it is signed."""

    uri: str
    suites: tuple[str, ...]
    signed_by: str


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """Stanzas of a deb822 file: field (lower case) -> value."""
    for block in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for row in block.splitlines():
            if row.startswith("#") or not row.strip():
                continue
            if row[0].isspace():
                fields[key] = f"{fields.get(key, '')} {row.strip()}".strip()
            else:
                key, _, value = row.partition(":")
                key = key.lower()
                fields[key] = value.strip()
        if fields:
            yield fields


def _from_deb822(text: str) -> Iterator[Mirror]:
    for fields in _stanzas(text):
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") != "no":
            for uri in fields.get("uris", "").split():
                yield Mirror(uri, tuple(fields.get("suites", "").split()), fields.get("signed-by", KEYRING))


def _from_list(text: str) -> Iterator[Mirror]:
    for row in text.splitlines():
        found = re.fullmatch(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?:\s+.*)?", row.strip())
        if found:
            key = re.search(r"signed-by=(\S+)", found["options"] or "")
            yield Mirror(found["uri"], (found["suite"],), key[1] if key else KEYRING)


def configured_mirrors(etc: Path = Path("/etc/apt")) -> list[Mirror]:
    """Every repository that apt's sources name."""
    found: list[Mirror] = []
    for path in sorted([*etc.glob("sources.list"), *etc.glob("sources.list.d/*")]):
        text = path.read_text(errors="replace") if path.is_file() else ""
        found += _from_deb822(text) if path.suffix == ".sources" else _from_list(text) if path.suffix == ".list" else ()
    return found


def kernel_sources(mirrors: Sequence[Mirror]) -> str:
    """The lines of a sources.list for the suites that have the kernels. Raises EnvironmentProblemError."""
    main = next(
        (m for m in mirrors if any(suite.split("-")[0] in CODENAMES and not suite.endswith("-security") for suite in m.suites)), None
    )
    if main is None:
        raise EnvironmentProblemError(
            "apt's sources name no Debian mirror to fetch a kernel from; give one with --kernel-image FILE --modules DIR"
        )
    security = next((m for m in mirrors if any(suite.endswith("-security") for suite in m.suites)), None)
    rows = [f"deb [signed-by={main.signed_by}] {main.uri} {suite} main" for suite in SUITES]
    rows += [f"deb [signed-by={security.signed_by}] {security.uri} {suite} main" for suite in SECURITY_SUITES] if security else []
    return "\n".join(rows) + "\n"


def _run(command: Sequence[str | Path], what: str, cwd: Path | None = None) -> str:
    """Output of a command. Raises EnvironmentProblemError with its last line of complaint."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=FETCH_SECONDS, check=False, cwd=cwd, env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise EnvironmentProblemError(f"{what}: {command[0]} is not there; fetching needs Debian's apt") from None
    except subprocess.TimeoutExpired:
        raise EnvironmentProblemError(f"{what}: more than {FETCH_SECONDS} s; is the mirror reachable?") from None
    if done.returncode:
        rows = [row.removeprefix("E: ") for row in done.stderr.splitlines() if row.startswith("E:")] or done.stderr.strip().splitlines()[
            -1:
        ]
        raise EnvironmentProblemError(f"{what}: {' '.join((rows or ['failed'])[0].split())[:300]}")
    return done.stdout


class Apt:
    """A private apt: own sources, lists and cache under one folder, nothing of the machine's is touched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("lists/partial", "cache/archives/partial"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        self.options = [
            f"-oDir::Etc::sourcelist={root / 'sources.list'}",
            "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::State={root}",
            f"-oDir::State::lists={root / 'lists'}",
            f"-oDir::State::status={root / 'status'}",
            f"-oDir::Cache={root / 'cache'}",
            "-oAPT::Architecture=amd64",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=2",
        ]

    def update(self, sources: str) -> None:
        """Fetch the indexes of these sources. Raises EnvironmentProblemError."""
        (self.root / "sources.list").write_text(sources)
        _run(["apt-get", *self.options, "update", "-q", "--error-on=any"], "fetching package indexes")

    def names(self, prefix: str) -> list[str]:
        """Names of packages that begin so."""
        return _run(["apt-cache", *self.options, "pkgnames", prefix], "reading package indexes").split()

    def download(self, names: Sequence[str], into: Path) -> list[Path]:
        """The packages' files, their checksums verified by apt. Raises EnvironmentProblemError."""
        _run(["apt-get", *self.options, "download", "-q", *names], f"fetching {' '.join(names)}", cwd=into)
        return sorted(into.glob("*.deb"))


def choose_kernel(version: str, names: Iterable[str]) -> list[str]:
    """The packages of the newest small kernel of a version, like '6.12': one, or binary and modules. Raises EnvironmentProblemError."""
    by_version: dict[str, dict[str, str]] = {}
    for name in names:
        found = NAME.fullmatch(name)
        if found and re.match(rf"{re.escape(version)}\.[0-9]", found["version"]):
            by_version.setdefault(found["version"], {})[found["part"]] = name
    complete = {v: parts for v, parts in by_version.items() if "image" in parts or {"binary", "modules"} <= set(parts)}
    if not complete:
        raise EnvironmentProblemError(
            f"no linux-image-{version}.*-cloud-amd64 in {', '.join((*SUITES, *SECURITY_SUITES))}; --kernel-image takes your own"
        )
    parts = complete[max(complete, key=lambda v: [int(n) for n in re.findall(r"[0-9]+", v)])]
    return [parts["binary"], parts["modules"]] if {"binary", "modules"} <= set(parts) else [parts["image"]]


def unpack(archives: Iterable[Path], into: Path, keep: Keep | None = None) -> None:
    """dpkg-deb -x of each; of the files, those that `keep` chooses. `into` appears whole or not at all."""
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
        folder = Path(scratch) / "x"
        folder.mkdir()
        for archive in archives:
            _run(["dpkg-deb", "-x", archive, folder], f"unpacking {archive.name}")
        if keep is not None:
            _keep_only(folder, set(keep(folder)))
        (folder / DIGESTS).write_text(json.dumps(_digests(folder), indent=0))
        try:
            folder.rename(into)
        except OSError:  # somebody else was faster
            if not into.is_dir():
                raise


def _keep_only(folder: Path, kept: set[Path]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):  # what is inside a folder comes before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink() and path.name != DIGESTS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def intact(folder: Path) -> bool:
    """Whether an unpacked folder is there and still what was unpacked; a damaged one is removed."""
    if not folder.is_dir():
        return False
    try:
        if json.loads((folder / DIGESTS).read_text()) == _digests(folder):
            return True
    except (OSError, ValueError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False


@contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    """Of several processes with this cache, one fetches and the others wait; apt would refuse them."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch_kernel(version: str, cache: Path, keep: Keep) -> Path:
    """The folder of an unpacked kernel of a version; fetched once. Raises EnvironmentProblemError."""
    folder = cache / "kernels" / version
    with _one_at_a_time(cache):
        if not intact(folder):
            apt = Apt(cache / "apt")
            apt.update(kernel_sources(configured_mirrors()))
            names = choose_kernel(version, apt.names("linux-"))
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                unpack(apt.download(names, Path(scratch)), folder, keep)
    return folder


def fetch_tools(cache: Path, names: Sequence[str] = TOOLS, options: Sequence[str] = ()) -> Path:
    """A folder with programs of packages and the libraries that this machine lacks. Raises EnvironmentProblemError."""
    folder = cache / "tools"
    with _one_at_a_time(cache):
        if not intact(folder):
            _download_tools(cache, names, options, folder)
    return folder


def _download_tools(cache: Path, names: Sequence[str], options: Sequence[str], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        (Path(scratch) / "partial").mkdir()
        own = [f"-oDir::Cache::archives={scratch}", "-oDir::Cache::pkgcache=", "-oDir::Cache::srcpkgcache=", "-oDebug::NoLocking=1"]
        command = ["apt-get", *own, *options, "install", "-q", "-y", "--no-install-recommends", "--download-only", *names]
        _run(command, f"fetching {' '.join(names)} (its lists may be old: apt-get update)")
        archives = sorted(Path(scratch).glob("*.deb"))[:MAX_PACKAGES]
        if not archives:
            raise EnvironmentProblemError(f"apt fetched nothing for {' '.join(names)}; install them: apt-get install {' '.join(names)}")
        unpack(archives, folder)
