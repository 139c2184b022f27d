"""The initramfs of a booted kernel: busybox, KVM's modules, the litmus program and its cases, as one cpio archive."""

import lzma
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from sweep.errors import EnvironmentProblemError

DIRECTORY, REGULAR = 0o040755, 0o100000
MAX_MODULE_BYTES = 64 << 20
KVM_MODULES = ("kvm", "kvm_amd")

INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tracefs tracefs /sys/kernel/tracing
{insmod}
{settings}
/litmus /cases {seconds}
/bin/busybox poweroff -f
"""


@dataclass(frozen=True)
class Entry:
    """A file or (content None) a folder of the archive."""

    path: str
    content: bytes | None
    mode: int


def cpio(entries: Iterable[Entry]) -> bytes:
    """An archive in the format 'newc', entries in the order given, with fixed times and owners. Raises ValueError for a bad path."""
    parts = []
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", b"", 0)], 1):
        if entry.path.startswith("/") or ".." in entry.path.split("/") or "\0" in entry.path:
            raise ValueError(f"{entry.path!r} is no path inside an archive")
        name, content = entry.path.encode() + b"\0", entry.content or b""
        fields = (number, entry.mode, 0, 0, 2 if entry.content is None else 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + "".join(f"{value:08X}" for value in fields).encode()
        parts += [_padded(head + name), _padded(content)]
    return b"".join(parts)


def _padded(part: bytes) -> bytes:
    return part + bytes(-len(part) % 4)


def module_bytes(path: Path) -> bytes:
    """A kernel module, unpacked: .ko, .ko.xz, .ko.gz or .ko.zst."""
    raw = path.read_bytes()
    try:
        if path.suffix == ".xz":
            return lzma.LZMADecompressor().decompress(raw, MAX_MODULE_BYTES)
        if path.suffix in (".gz", ".zst"):
            codec = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
            return bytes(pa.CompressedInputStream(pa.BufferReader(raw), codec).read(MAX_MODULE_BYTES))
    except (lzma.LZMAError, OSError) as error:
        raise EnvironmentProblemError(f"{path} cannot be unpacked: {error}; fetch the package again") from None
    return raw


def _dependencies(module: bytes) -> list[str]:
    """What `depends=` in a module's .modinfo names."""
    found = re.search(rb"\0depends=([a-z0-9_,-]*)\0", module)
    return [name.replace("-", "_") for name in found[1].decode().split(",") if name] if found else []


def find_modules(folder: Path, wanted: Sequence[str] = KVM_MODULES) -> dict[str, bytes]:
    """The modules and what they need, unpacked, in the order of loading. What is not there is taken to be built in."""
    return {name: content for name, _, content in _loading_order(folder, wanted)}


def module_files(folder: Path, wanted: Sequence[str] = KVM_MODULES) -> list[Path]:
    """The files of `find_modules()`."""
    return [path for _, path, _ in _loading_order(folder, wanted)]


def _loading_order(folder: Path, wanted: Sequence[str]) -> list[tuple[str, Path, bytes]]:
    files = {path.name.partition(".ko")[0].replace("-", "_"): path for path in sorted(folder.rglob("*.ko*"))}
    loaded: dict[str, tuple[str, Path, bytes]] = {}
    _collect(wanted, files, loaded, ())
    return list(loaded.values())


def _collect(names: Iterable[str], files: Mapping[str, Path], loaded: dict[str, tuple[str, Path, bytes]], above: tuple[str, ...]) -> None:
    for name in names:
        if name in loaded or name in above or name not in files:
            continue
        content = module_bytes(files[name])
        _collect(_dependencies(content), files, loaded, (*above, name))
        loaded[name] = (name, files[name], content)


def entries_of(
    busybox: bytes,
    litmus: bytes,
    cases: str,
    modules: Mapping[str, bytes],
    parameters: Mapping[str, str],
    settings: Mapping[str, str],
    seconds: int,
) -> Iterator[Entry]:
    """Everything the kernel needs. `parameters`: module -> its words; `settings`: file under /sys or /proc -> value."""
    insmod = [f"/bin/busybox insmod /modules/{name}.ko {parameters.get(name, '')}".strip() for name in modules]
    script = INIT.format(
        insmod="\n".join(insmod), settings="\n".join(f"echo {value} > {path}" for path, value in settings.items()), seconds=seconds
    )
    for folder in ("bin", "dev", "proc", "sys", "modules"):
        yield Entry(folder, None, DIRECTORY)
    yield Entry("init", script.encode(), REGULAR | 0o755)
    yield Entry("bin/busybox", busybox, REGULAR | 0o755)
    yield Entry("litmus", litmus, REGULAR | 0o755)
    yield Entry("cases", cases.encode(), REGULAR | 0o644)
    for name, content in modules.items():
        yield Entry(f"modules/{name}.ko", content, REGULAR | 0o644)
