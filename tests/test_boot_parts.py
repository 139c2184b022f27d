"""What a booted kernel is made of: archive, modules, packages, command line. Nothing is booted or fetched here."""

import gzip
import json
import lzma
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from sweep.errors import EnvironmentProblemError
from sweep.host import packages
from sweep.host.boot import Kernel, Tools, case_lines, command_of, kernel_in
from sweep.host.case import Case, predict
from sweep.host.initramfs import Entry, cpio, entries_of, find_modules, module_bytes, module_files
from sweep.host.litmus import Measured, Output
from sweep.host.packages import Mirror, choose_kernel, configured_mirrors, intact, kernel_sources, unpack
from sweep.host.suite import short_suite, suite
from sweep.host.target import BootTarget
from tests.fake_kernel import measured_like


def read_cpio(raw: bytes) -> dict[str, tuple[int, bytes]]:
    """Name -> (mode, content), by the format's own description: 13 hexadecimal fields of 8 digits, parts padded to 4 bytes."""
    found, at = {}, 0
    while True:
        assert raw[at : at + 6] == b"070701"
        fields = [int(raw[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name_at = at + 110
        name = raw[name_at : name_at + fields[11] - 1].decode()
        content_at = (name_at + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert len(raw) == content_at
            return found
        found[name] = (fields[1], raw[content_at : content_at + fields[6]])
        at = (content_at + fields[6] + 3) // 4 * 4


def test_the_archive_holds_what_was_put_in() -> None:
    entries = [Entry("bin", None, 0o040755), Entry("bin/x", b"12345", 0o100755), Entry("empty", b"", 0o100644)]
    assert read_cpio(cpio(entries)) == {"bin": (0o040755, b""), "bin/x": (0o100755, b"12345"), "empty": (0o100644, b"")}


def test_the_archive_is_read_by_cpio_itself(tmp_path: Path) -> None:
    if not shutil.which("cpio"):
        pytest.skip("no cpio here")
    raw = cpio([Entry("d", None, 0o040755), Entry("d/file", b"content\n", 0o100644)])
    subprocess.run(["cpio", "-idm", "--quiet"], input=raw, cwd=tmp_path, check=True)
    assert (tmp_path / "d" / "file").read_bytes() == b"content\n"


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../b", "a\0b"])
def test_a_path_outside_of_the_archive_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="no path inside"):
        cpio([Entry(path, b"", 0o100644)])


def module(*depends: str) -> bytes:
    return b"\x7fELF\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0name=x\0"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    for name, content in {
        "arch/kvm.ko.xz": lzma.compress(module("irqbypass")),
        "arch/kvm-amd.ko.gz": gzip.compress(module("kvm", "ccp-x")),
        "virt/irqbypass.ko": module(),
        "crypto/ccp-x.ko": module("kvm_amd"),  # a circle, which no kernel has
        "net/e1000.ko": module(),
    }.items():
        path = tmp_path / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "kernel"


def test_modules_come_unpacked_after_what_they_need_and_nothing_else(modules: Path) -> None:
    found = find_modules(modules)
    assert list(found) == ["irqbypass", "kvm", "ccp_x", "kvm_amd"]
    assert found["kvm"] == module("irqbypass")
    assert {path.name for path in module_files(modules)} == {"irqbypass.ko", "kvm.ko.xz", "ccp-x.ko", "kvm-amd.ko.gz"}
    assert find_modules(modules, ("not_there",)) == {}


def test_a_damaged_module_is_named(tmp_path: Path) -> None:
    for name in ("kvm.ko.xz", "kvm.ko.gz", "kvm.ko.zst"):
        (tmp_path / name).write_bytes(b"rubbish")
        with pytest.raises(EnvironmentProblemError, match=name.replace(".", r"\.")):
            module_bytes(tmp_path / name)


def test_the_init_script_loads_modules_with_their_parameters(modules: Path) -> None:
    loaded = find_modules(modules)
    entries = entries_of(b"box", b"program", "case 0\n", loaded, {"kvm": "tdp_mmu=N"}, {"/sys/x": "7"}, 42)
    found = read_cpio(cpio(entries))
    script = found["init"][1].decode()
    assert script.index("insmod /modules/irqbypass.ko") < script.index("insmod /modules/kvm.ko tdp_mmu=N")
    assert "echo 7 > /sys/x" in script
    assert "/litmus /cases 42" in script
    assert found["init"][0] & 0o111
    assert found["cases"][1] == b"case 0\n"


def test_a_setting_is_written_only_where_it_changes() -> None:
    rows = case_lines([case for case in suite("6.12") if case.name in ("thp/write", "thp/read", "thp_no_zero_page/write")]).splitlines()
    assert [row for row in rows if "use_zero_page" in row] == [
        "set /sys/kernel/mm/transparent_hugepage/use_zero_page 1",
        "set /sys/kernel/mm/transparent_hugepage/use_zero_page 0",
    ]
    assert len([row for row in rows if row.startswith("case ")]) == 3


@pytest.mark.parametrize(
    ("output", "verdicts", "reason"),
    [
        (Output(), {"failed"}, "nothing came back"),
        (Output(trouble=["WARNING: CPU: 0 at mm/x.c"]), {"failed"}, "the booted kernel complained: WARNING: CPU: 0 at mm/x.c"),
        (Output(cases={n: Measured(late=True) for n in range(20)}), {"left out"}, "the time was up; --seconds gives more"),
    ],
)
def test_a_kernel_that_breaks_off_or_complains_has_proven_nothing(
    output: Output, verdicts: set[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.host.target.run_booted", lambda *_: output)
    target = BootTarget(Kernel(tmp_path / "vmlinuz", None), "6.12", "tdp", 60, 1024)
    found = target.run(short_suite("6.12"))
    assert {result.verdict for result in found} == verdicts
    assert {result.reason for result in found} == {reason}
    assert target.boots == (2 if verdicts == {"failed"} else 1)  # once more, and no oftener
    assert target.run([]) == []


def test_a_case_that_broke_off_is_run_once_more_and_one_that_differs_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def boot(_kernel: Kernel, cases: list[Case], *_: object) -> Output:
        asked.append([case.name for case in cases])
        measured = {n: measured_like(case, predict(case)) for n, case in enumerate(cases)}
        if len(asked) == 1:
            measured[3] = Measured(steps=measured[3].steps, base=measured[3].base)  # its last line was torn
            measured[5].steps[0] = {**measured[5].steps[0], "pf_fixed": 1}
        return Output(cases=measured)

    asked: list[list[str]] = []
    monkeypatch.setattr("sweep.host.target.run_booted", boot)
    cases = short_suite("6.12")
    found = BootTarget(Kernel(tmp_path / "vmlinuz", None), "6.12", "tdp", 60, 1024).run(cases)
    assert asked == [[case.name for case in cases], [cases[3].name]]
    assert [n for n, result in enumerate(found) if result.verdict != "equal"] == [5]


def test_qemu_runs_alone_with_an_end(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path / "vmlinuz", None)
    command = command_of(Tools(("qemu-system-x86_64",), {}, tmp_path), kernel, tmp_path / "i", "legacy", 90, 1024)
    assert command[:3] == ["timeout", "--kill-after=5", "90"]
    pairs = set(pairwise(command))
    assert {("-display", "none"), ("-monitor", "none"), ("-nic", "none"), ("-serial", "stdio"), ("-m", "1024M")} <= pairs
    assert ("-accel", "tcg,thread=single") in pairs
    assert "kvm.tdp_mmu=N" in command[-1]


RUN_AND_HANG = """
import sys
from pathlib import Path
from sweep.host.boot import _console_of
_console_of(["timeout", "600", "sh", "-c", "echo $$ > " + sys.argv[1] + "; exec sleep 600"], Path(sys.argv[2]), {}, 600)
"""


def test_no_machine_outlives_a_killed_process(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", RUN_AND_HANG, str(pid_file), str(tmp_path / "console")]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    wait_for(lambda: pid_file.is_file() and pid_file.read_text().strip())
    machine = Path("/proc") / pid_file.read_text().strip()
    assert machine.exists()
    process.kill()
    process.wait()
    wait_for(lambda: not is_alive(machine))


def is_alive(process: Path) -> bool:
    """Of a folder of /proc: neither gone nor a zombie."""
    try:
        return "State:\tZ" not in (process / "status").read_text()
    except OSError:
        return False


def wait_for(condition: Callable[[], object]) -> None:
    """Poll until it holds; the deadline only ends a test that would hang."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen within 30 s")


DEB822 = """
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: trixie trixie-updates
Components: main
 contrib
Signed-By: /usr/share/keyrings/own.gpg

Types: deb
URIs: http://security.example/debian-security
Suites: trixie-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example
Suites: sid
"""
LIST = """
# deb http://commented.example bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://one.example/debian bookworm main
deb-src http://src.example bookworm main
deb http://other.example/apt nodistro main
"""


def test_mirrors_are_those_of_the_machines_own_sources(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(DEB822)
    (tmp_path / "sources.list").write_text(LIST)
    (tmp_path / "sources.list.d" / "junk.bin").write_bytes(b"\0\xff")
    found = configured_mirrors(tmp_path)
    assert Mirror("http://one.example/debian", ("bookworm",), "/k.gpg") in found
    assert Mirror("http://mirror.example/debian", ("trixie", "trixie-updates"), "/usr/share/keyrings/own.gpg") in found
    assert not [mirror for mirror in found if "off" in mirror.uri or "commented" in mirror.uri or "src" in mirror.uri]
    lines = kernel_sources([mirror for mirror in found if "one.example" not in mirror.uri])
    assert "deb [signed-by=/usr/share/keyrings/own.gpg] http://mirror.example/debian bookworm main" in lines
    assert "http://security.example/debian-security bookworm-security main" in lines


def test_a_machine_without_a_debian_mirror_says_so(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblemError, match="--kernel-image"):
        kernel_sources([Mirror("http://x.example/ubuntu", ("noble",), "k")])
    assert configured_mirrors(tmp_path / "none") == []


NAMES = (
    "linux-image-6.12.9+deb12-cloud-amd64",
    "linux-image-6.12.100+deb12-cloud-amd64",
    "linux-image-6.12.100+deb12-cloud-amd64-dbg",
    "linux-image-6.12.200+deb12-cloud-amd64-unsigned",
    "linux-image-6.12.300+deb12-amd64",
    "linux-image-6.1.0-56-cloud-amd64",
    "linux-binary-7.3.4+deb13-cloud-amd64",
    "linux-modules-7.3.4+deb13-cloud-amd64",
    "linux-modules-7.3.9+deb13-cloud-amd64",
    "linux-headers-7.3.4+deb13-cloud-amd64",
)


@pytest.mark.parametrize(
    ("version", "chosen"),
    [
        ("6.12", ["linux-image-6.12.100+deb12-cloud-amd64"]),
        ("6.1", ["linux-image-6.1.0-56-cloud-amd64"]),
        ("7.3", ["linux-binary-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"]),
    ],
)
def test_the_newest_small_kernel_is_chosen(version: str, chosen: list[str]) -> None:
    assert choose_kernel(version, NAMES) == chosen


def test_a_version_that_nobody_packages_is_named() -> None:
    with pytest.raises(EnvironmentProblemError, match=r"linux-image-6\.2\.\*"):
        choose_kernel("6.2", NAMES)


def make_package(folder: Path) -> Path:
    """A Debian package with an image and modules, as a kernel's is laid out."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb here")
    tree = folder / "tree"
    for name, content in {
        "DEBIAN/control": b"Package: linux-image-x\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@example>\nDescription: x\n",
        "boot/vmlinuz-6.12.9": b"image",
        "boot/config-6.12.9": b"config",
        "lib/modules/6.12.9/kernel/kvm.ko": module(),
        "lib/modules/6.12.9/kernel/e1000.ko": module(),
    }.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, folder / "x.deb"], check=True, capture_output=True)
    return folder / "x.deb"


def test_a_kernel_is_unpacked_whole_and_damage_is_noticed(tmp_path: Path) -> None:
    into = tmp_path / "cache" / "6.12"

    def keep(folder: Path) -> list[Path]:
        kernel = kernel_in(folder)
        assert kernel.modules
        return [kernel.image, *module_files(kernel.modules)]

    unpack([make_package(tmp_path)], into, keep)
    assert intact(into)
    kernel = kernel_in(into)
    assert kernel.image.read_bytes() == b"image"
    assert sorted(path.name for path in into.rglob("*") if path.is_file()) == ["digests.json", "kvm.ko", "vmlinuz-6.12.9"]
    assert set(json.loads((into / "digests.json").read_text())) == {"boot/vmlinuz-6.12.9", "lib/modules/6.12.9/kernel/kvm.ko"}
    kernel.image.write_bytes(b"imagf")
    assert not intact(into)
    assert not into.exists()


def test_a_kept_kernel_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack([make_package(tmp_path)], tmp_path / "kernels" / "6.12")
    monkeypatch.setattr(packages, "Apt", None)
    assert packages.fetch_kernel("6.12", tmp_path, lambda folder: []) == tmp_path / "kernels" / "6.12"


def test_a_package_that_cannot_be_unpacked_leaves_nothing(tmp_path: Path) -> None:
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb here")
    bad = tmp_path / "bad.deb"
    bad.write_bytes(b"!<arch>\nrubbish")
    with pytest.raises(EnvironmentProblemError, match=r"unpacking bad\.deb"):
        unpack([bad], tmp_path / "cache" / "x")
    assert not list((tmp_path / "cache").iterdir())


def test_the_short_form_fits_into_a_line_each() -> None:
    rows = case_lines(short_suite("7.3")).splitlines()
    assert max(map(len, rows)) < 1 << 16
