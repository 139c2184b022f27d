"""A real kernel booted by QEMU in pure emulation: AMD's nested virtualisation is emulated, so that KVM's own MMU runs anywhere."""

import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sweep.errors import EnvironmentProblemError
from sweep.host import packages
from sweep.host.case import Case
from sweep.host.initramfs import cpio, entries_of, find_modules, module_files
from sweep.host.litmus import MAX_OUTPUT_BYTES, Output, build, cache_root, encode, parse
from sweep.host.mapping import die_with_parent
from sweep.host.settings import HUGETLB_PAGES, NR_HUGEPAGES, THP, settings_of

BOOT_VERSIONS = ("6.1", "6.12", "6.18", "7.3")
GUEST_MIB, LEAST_GUEST_MIB = 1536, 512
START_SECONDS = 60  # firmware, kernel and the last case, on top of the time for cases
KILL_SECONDS = 5
BOOT_TRIES = 3  # emulated on a busy machine, a kernel's early timer checks fail now and then, before it does anything of ours
QEMU = "qemu-system-x86_64"
MMU_PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "tdp": {"kvm": "tdp_mmu=Y", "kvm_amd": "npt=1"},
    "legacy": {"kvm": "tdp_mmu=N", "kvm_amd": "npt=1"},
    "shadow": {"kvm": "tdp_mmu=N", "kvm_amd": "npt=0"},
}
ASLEEP_MS = "4000000000"
AT_BOOT = {
    f"{THP}/defrag": "madvise",
    f"{THP}/khugepaged/scan_sleep_millisecs": ASLEEP_MS,
    f"{THP}/khugepaged/alloc_sleep_millisecs": ASLEEP_MS,
    NR_HUGEPAGES: str(HUGETLB_PAGES),
}


COMMAND_LINE = (
    *("console=ttyS0", "quiet", "loglevel=1", "panic=-1", "mitigations=off", "kvm.nx_huge_pages=off"),
    *("nowatchdog", "rcupdate.rcu_cpu_stall_suppress=1"),  # a busy machine may stop the emulated one for seconds
)
USUAL = {f"{THP}/enabled": "madvise", f"{THP}/use_zero_page": "1", f"{THP}/shmem_enabled": "never"}


@dataclass(frozen=True)
class Kernel:
    """An image to boot, and its modules (None: KVM is built in)."""

    image: Path
    modules: Path | None


@dataclass(frozen=True)
class Tools:
    """QEMU's command and environment, and a static busybox."""

    qemu: tuple[str, ...]
    environment: Mapping[str, str]
    busybox: Path


def kernel_in(folder: Path) -> Kernel:
    """Image and modules of an unpacked package. Raises EnvironmentProblemError."""
    images = sorted([*folder.glob("boot/vmlinuz-*"), *folder.glob("usr/lib/modules/*/vmlinuz"), *folder.glob("lib/modules/*/vmlinuz")])
    modules = sorted([*folder.glob("lib/modules/*/kernel"), *folder.glob("usr/lib/modules/*/kernel")])
    if not images or not modules:
        raise EnvironmentProblemError(f"{folder} holds no kernel image with modules; remove the folder to fetch it again")
    return Kernel(images[0], modules[0])


def kernel_for(version: str, cache: Path | None = None) -> Kernel:
    """The kernel of a version out of Debian's packages. Raises EnvironmentProblemError."""
    return kernel_in(packages.fetch_kernel(version, cache or cache_root(), _needed))


def _needed(folder: Path) -> list[Path]:
    """Of a kernel's packages: the image, and KVM's modules with what they need."""
    kernel = kernel_in(folder)
    return [kernel.image, *(module_files(kernel.modules) if kernel.modules else ())]


def _is_static(path: Path) -> bool:
    """An ELF program without an interpreter."""
    with path.open("rb") as file:
        head = file.read(4096)
    return head.startswith(b"\x7fELF") and b"/ld-linux" not in head


def _installed_busybox() -> Path | None:
    found = [path for name in ("busybox", "busybox-static") if (path := shutil.which(name))]
    return next((Path(path) for path in found if _is_static(Path(path))), None)


def find_tools(cache: Path | None = None) -> Tools:
    """Installed ones, or those of Debian's packages, unpacked. Raises EnvironmentProblemError."""
    if platform.machine() != "x86_64":
        raise EnvironmentProblemError(f"booted kernels need an x86_64 machine, not {platform.machine()}: the litmus program is built here")
    qemu, busybox = shutil.which(QEMU), _installed_busybox()
    if qemu and busybox:
        return Tools((qemu,), {}, busybox)
    folder = packages.fetch_tools(cache or cache_root())
    libraries = sorted({str(path.parent) for path in folder.rglob("*.so*")})
    unpacked = (str(folder / "usr/bin" / QEMU), "-L", str(folder / "usr/share/qemu"), "-L", str(folder / "usr/share/seabios"))
    boxes = [*folder.glob("bin/busybox"), *folder.glob("usr/bin/busybox")]
    if busybox is None and not boxes:
        raise EnvironmentProblemError("no static busybox; install it: apt-get install busybox-static")
    return Tools((qemu,) if qemu else unpacked, {} if qemu else {"LD_LIBRARY_PATH": ":".join(libraries)}, busybox or boxes[0])


def case_lines(cases: Sequence[Case]) -> str:
    """The program's input: each case, and before it the settings that it needs and that the one before did not."""
    rows: list[str] = []
    current: dict[str, str] = {}
    for number, case in enumerate(cases):
        wanted = USUAL | settings_of(case)
        rows += [f"set {path} {value}" for path, value in wanted.items() if current.get(path) != value]
        current |= wanted
        rows.append(encode(number, case))
    return "\n".join(rows) + "\n"


def command_of(tools: Tools, kernel: Kernel, initramfs: Path, mmu: str, seconds: int, guest_mib: int) -> list[str]:
    """`timeout` ends QEMU even if this process is killed; no network, no display, no monitor."""
    words = [f"{module}.{word}" for module, words in MMU_PARAMETERS[mmu].items() for word in words.split()]
    append = " ".join([*COMMAND_LINE, *words])
    return [
        "timeout", f"--kill-after={KILL_SECONDS}", str(seconds), *tools.qemu,
        "-accel", "tcg,thread=single",  # several threads of it crash kernels that patch their code
        "-cpu", "max,+svm,+npt", "-smp", "1", "-m", f"{guest_mib}M",
        "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-monitor", "none", "-nic", "none", "-no-reboot",
        "-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", append,
    ]  # fmt: skip


def run_booted(
    kernel: Kernel, cases: Sequence[Case], mmu: str, seconds: int, guest_mib: int = GUEST_MIB, tools: Tools | None = None
) -> Output:
    """Boot the kernel, run the cases, return what was printed. `seconds` bounds the cases; the boot has START_SECONDS more.

    Raises EnvironmentProblemError where QEMU, busybox or a compiler is missing, or nothing at all came back."""
    tools = tools or find_tools()
    modules = find_modules(kernel.modules) if kernel.modules else {}
    parameters = {**MMU_PARAMETERS[mmu], "kvm": f"{MMU_PARAMETERS[mmu]['kvm']} nx_huge_pages=off"}
    entries = entries_of(tools.busybox.read_bytes(), build().read_bytes(), case_lines(cases), modules, parameters, AT_BOOT, seconds)
    with tempfile.TemporaryDirectory() as scratch:
        initramfs, console = Path(scratch) / "initramfs", Path(scratch) / "console"
        initramfs.write_bytes(cpio(entries))
        command = command_of(tools, kernel, initramfs, mmu, seconds + START_SECONDS, guest_mib)
        ends = time.monotonic() + seconds + START_SECONDS
        for _ in range(BOOT_TRIES):
            text = _console_of(command, console, {**os.environ, **tools.environment}, seconds + START_SECONDS + 2 * KILL_SECONDS)
            output = parse(text)
            if output.kernel:
                return output
            if time.monotonic() > ends:
                break
    last = " / ".join(text.strip().splitlines()[-3:])[-300:]
    raise EnvironmentProblemError(f"{kernel.image.name}: the booted kernel printed nothing of ours; its last lines: {last or 'none'}")


def _console_of(command: Sequence[str], console: Path, environment: Mapping[str, str], seconds: int) -> str:
    """What the machine printed until it ended. It ends with this process, too."""
    with console.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=partial(die_with_parent, signal.SIGTERM),  # noqa: PLW1509 (one prctl, no lock; `timeout` passes it on)
        )
        try:
            with suppress(subprocess.TimeoutExpired):  # `timeout` has ended it before
                process.wait(seconds)
        finally:
            process.terminate()
            process.wait()
    with console.open("rb") as file:
        return file.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")
