"""Recorded faults, whole: traces of real kernels and of the model, imported, counted, and simulated again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.traces import make
from kernels import simulate
from kernels.simulate import Run
from sweep.errors import DatasetError, EnvironmentProblemError, StudyError, TraceError, UsageError
from sweep.replay import run as replaying
from sweep.replay.accesses import Folded, fold_trace, raw_batches
from sweep.replay.decode import Decision, Vendor, decide
from sweep.replay.doubles import by_region, in_time, totals
from sweep.replay.parse import ReadOptions, Trace, read_trace
from sweep.replay.render import FIRST_TID, Fault, Style, csv_of, faults_of, text_of
from sweep.replay.run import ReplayOptions, study_name
from sweep.replay.run import replay as replay_trace
from sweep.replay.scan import FETCH, READ, WRITE, Rows
from sweep.replay.slots import Slots, derive, parse_slots
from sweep.replay.vcpus import assign
from sweep.replay.whatif import kernel_of
from sweep.report.build import build_report
from sweep.runner import RunOptions
from sweep.runner import run as run_study
from sweep.steps import read_touch_list
from sweep.study import load_study

HERE = Path(__file__).parent
REAL = HERE / "traces"
EXAMPLES = HERE.parent / "examples" / "traces"
PAGE, PMD, GIB = 1 << 12, 1 << 21, 1 << 30


def imported(
    path: Path | str, folder: Path, slots: str | None = None, vendor: str | None = None, **options: Any
) -> tuple[Trace, Folded, Decision]:
    trace = read_trace(str(path), ReadOptions(**options), folder / "raw.arrow")
    decision = decide(trace, vendor)
    given = parse_slots(slots) if slots else None
    return trace, fold_trace(trace, folder / "raw.arrow", decision, assign(trace), given, folder / "accesses.parquet"), decision


def of_text(folder: Path, text: str, **options: Any) -> tuple[Trace, Folded, Decision]:
    path = folder / "trace.txt"
    path.write_text(text)
    return imported(path, folder, **options)


def of_faults(folder: Path, faults: list[Fault], style: Style | None = None, **options: Any) -> Folded:
    return of_text(folder, text_of(faults, style or Style("perf")), **options)[1]


def again(folder: Path, **host: Any) -> Run:
    return simulate(steps=[read_touch_list(folder / "accesses.parquet")], **host)


# --- real kernels


@pytest.mark.parametrize(
    ("name", "faults", "doubles", "host"),
    [
        ("6.12-tdp-4k", 1032, {"read_write_write": 260}, {"kernel": "6.12", "backing": "anonymous"}),
        ("6.12-tdp-thp", 1025, {"read_write_write": 1, "absent_twice": 511}, {"kernel": "6.12", "backing": "anonymous_thp"}),
        ("6.1-tdp-thp", 1025, {"read_write_write": 1, "absent_twice": 511}, {"kernel": "6.1", "backing": "anonymous_thp"}),
        ("6.12-shadow-4k", 1032, {"read_write_write": 260}, {"kernel": "6.12", "backing": "anonymous", "mmu": "shadow"}),
    ],
)
def test_the_model_gives_a_real_kernels_faults_again(
    tmp_path: Path, name: str, faults: int, doubles: dict[str, int], host: dict[str, Any]
) -> None:
    trace, folded, decision = imported(REAL / f"{name}.txt.gz", tmp_path, slots="1GiB+2MiB", skip_bad=8)
    assert decision.vendor == ("shadow" if "shadow" in name else "amd")
    found = totals(folded)
    assert found["faults"] == faults
    assert {key: found[key] for key in ("read_write_write", "write_write", "absent_twice", "further") if found[key]} == doubles
    assert found["again"] == sum(doubles.values())
    assert folded.durations["faults"] == faults
    run = again(tmp_path, memory=PMD, **host)
    assert run.counters["pf_taken"] == faults
    assert run.counters["pf_retry"] == sum(doubles.values())
    assert run.counters["hits"] == 0
    assert trace.lost.markers == 0


def test_a_real_retry_storm_is_counted_apart(tmp_path: Path) -> None:
    """Two vCPUs on one CPU: 512 copies took 2,256 faults instead of 1,536; the accesses among them are 1,024."""
    _, folded, _ = imported(REAL / "6.12-tdp-4k-two-vcpus.txt.gz", tmp_path, slots="1GiB+2MiB", skip_bad=8)
    found = totals(folded)
    assert (found["faults"], found["read_write_write"], found["further"], found["pages"]) == (2256, 512, 715, 512)
    assert (folded.accesses, folded.vcpus, folded.durations) == (1024, 2, {})
    run = again(tmp_path, memory=PMD, vcpus=2, kernel="6.12")
    assert run.counters["cow_4k"] == 512
    assert run.counters["touches"] == 1024


# --- simulate, write, import, simulate


@pytest.mark.parametrize("name", [*make.STYLES, *make.OTHERS])
def test_an_example_gives_the_run_that_it_was_made_from(tmp_path: Path, name: str) -> None:
    was = make.run()
    assert was.counters["hits"] == 0
    trace, folded, decision = imported(EXAMPLES / name, tmp_path)
    assert decision.vendor == (make.STYLES[name].vendor if name in make.STYLES else "intel" if name.endswith("gz") else "none")
    assert (folded.vcpus, str(folded.slots), trace.backward) == (2, "0+6MiB", 0)
    run = again(tmp_path, **make.HOST)
    assert run.counters == was.counters
    assert (run.guest_ns, run.gauges) == (was.guest_ns, was.gauges)
    found = totals(folded)
    assert found["faults"] == was.counters["pf_taken"] == 148
    assert found["doubles"] == was.counters["cow_4k"] == 48
    assert folded.accesses == was.counters["touches"]


def test_the_examples_are_what_their_script_makes(tmp_path: Path) -> None:
    names = make.make(tmp_path)
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {*names, "make.py"}
    for name in names:
        if name.endswith(".parquet"):
            assert pq.read_table(EXAMPLES / name).equals(pq.read_table(tmp_path / name))
        elif not name.endswith(".gz"):
            assert (EXAMPLES / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("kernel", ["6.5", "6.12", "6.13"])
@pytest.mark.parametrize("backing", ["anonymous", "anonymous_thp", "shmem"])
@pytest.mark.parametrize("vcpus", [1, 3])
def test_faults_of_a_list_written_and_imported_are_that_list(tmp_path: Path, kernel: str, backing: str, vcpus: int) -> None:
    """A list of random accesses without hits becomes itself; what hits is not in a trace, and changes no fault of one vCPU."""
    from kernels import Access, Order, Touch

    host: dict[str, Any] = {"kernel": kernel, "backing": backing, "memory": 4 << 20, "vcpus": vcpus, "seed": 3}
    steps = [Touch(access=Access.MIXED, write_percent=40.0, order=Order.RANDOM, repeat=vcpus == 1, touches=1500 if vcpus == 1 else None)]
    was = simulate(**host, steps=steps, trace_rows=1 << 20)
    folded = of_faults(tmp_path, faults_of(was.trace), Style("trace-cmd", Vendor.AMD))
    assert totals(folded)["faults"] == was.counters["pf_taken"]
    run = again(tmp_path, **host)
    faults = (
        "pf_taken",
        "pf_fixed",
        "pf_retry",
        "pf_spurious",
        "cow_4k",
        "thp_split_pmd",
        "invalidate_range_start",
        "mmu_lock_write",
        "pgfault",
    )
    if vcpus == 1:
        assert {name: run.counters[name] for name in faults} == {name: was.counters[name] for name in faults}
    listed = pq.read_table(tmp_path / "accesses.parquet")
    assert folded.accesses == listed.num_rows == was.counters["touches"] - was.counters["hits"]


# --- whose codes


def text(code: int, old: bool = False, exits: str = "", head: str = "") -> str:
    fields = f"address 1000 error_code {code:x}" if old else f"vcpu 0 rip 0x0 address 0x1000 error_code {code:#x}"
    left = f"           qemu-7       [000] ....     1.000001: kvm_exit: {exits}\n" if exits else ""
    return f"{head}{left}           qemu-7       [000] ....     1.000002: kvm_page_fault: {fields}\n"


@pytest.mark.parametrize(
    ("trace", "vendor", "access", "present"),
    [
        (text(0x181), "intel", READ, False),
        (text(0x182), "intel", WRITE, False),
        (text(0x184), "intel", FETCH, False),
        (text(0x1AA), "intel", WRITE, True),
        (text(0x18A), "intel", WRITE, True),
        (text(0x83), "intel", WRITE, False),  # a page walk of the guest, with A/D bits
        (text(0x781), "intel", READ, False),
        (text(0x181, old=True), "intel", READ, False),
        (text(0x2, exits="vcpu 0 reason EPT_VIOLATION rip 0x0 info1 0x2"), "intel", WRITE, False),
        (text(0x100000004), "amd", READ, False),
        (text(0x100000006), "amd", WRITE, False),
        (text(0x100000007), "amd", WRITE, True),
        (text(0x100000014), "amd", FETCH, False),
        (text(0x200000006), "amd", WRITE, False),
        (text(0x500000004), "amd", READ, False),
        (text(0x6, old=True, exits="reason npf rip 0x0 info 100000006 1000"), "amd", WRITE, False),
        (text(0x7, old=True), "amd", WRITE, True),
        (text(0x2, old=True), "shadow", WRITE, False),
        (text(0x6, old=True, exits="reason EXCEPTION_NMI rip 0x0 info 1000 80000b0e"), "shadow", WRITE, False),
        (text(0x6, exits="vcpu 0 reason PF excp rip 0x0 info1 0x6"), "shadow", WRITE, False),
        (text(0x6), "shadow", WRITE, False),
        (text(0x6, old=True, head="# cpuid : GenuineIntel,6,1,1\n"), "shadow", WRITE, False),
        (text(0x14, old=True, head="# cpuid : AuthenticAMD,25,1,1\n"), "amd", FETCH, False),
    ],
)
def test_codes_say_whose_they_are_and_what_was_done(tmp_path: Path, trace: str, vendor: str, access: int, present: bool) -> None:
    _, folded, decision = of_text(tmp_path, trace)
    assert decision.vendor == vendor
    row = pq.read_table(tmp_path / "accesses.parquet").to_pylist()[0]
    assert (row["write"], row["fetch"], row["present"]) == (access == WRITE, access == FETCH, present)
    assert folded.accesses == 1


@pytest.mark.parametrize(
    ("trace", "vendor", "words"),
    [
        (text(0x181), "amd", ["trace.txt:1", "exit qualification", "--vendor amd is wrong"]),
        (text(0x181), "shadow", ["trace.txt:1", "--vendor shadow is wrong"]),
        (text(0x100000006), "intel", ["trace.txt:1", "nested paging", "--vendor intel is wrong"]),
        (text(0x6), "intel", ["trace.txt:1", "bit 7", "amd or shadow"]),
        (text(0x181) + text(0x100000006), None, ["trace.txt:2", "line 1", "two hosts"]),
        (text(0x100000006) + text(0x181), None, ["trace.txt:2", "line 1", "two hosts"]),
        (text(0x181, head="# cpuid : AuthenticAMD,25,1,1\n"), None, ["trace.txt:2", "AuthenticAMD", "--vendor"]),
    ],
)
def test_a_wrong_vendor_is_told(tmp_path: Path, trace: str, vendor: str | None, words: list[str]) -> None:
    with pytest.raises(TraceError) as caught:
        of_text(tmp_path, trace, vendor=vendor)
    for word in words:
        assert word in str(caught.value)


def test_vendor_decides_where_the_vendor_line_lies(tmp_path: Path) -> None:
    _, _, decision = of_text(tmp_path, text(0x181, head="# cpuid : AuthenticAMD,25,1,1\n"), vendor="intel")
    assert (decision.vendor, decision.guess) == ("intel", False)
    assert of_text(tmp_path, text(0x7, old=True))[2].guess
    (tmp_path / "a.csv").write_text(csv_of([Fault(0, 0, 0, 0, False, 0)]))
    with pytest.raises(UsageError, match="no error codes"):
        imported(tmp_path / "a.csv", tmp_path, vendor="intel")


# --- which vCPU


def old_line(comm: str, tid: int, n: int = 1) -> str:
    return f"{comm:>16}-{tid:<7} [000] ....     1.{n:06d}: kvm_page_fault: address {n:x}000 error_code 6\n"


@pytest.mark.parametrize(
    ("threads", "vcpus"),
    [
        ([("CPU 3/KVM", 10), ("CPU 0/KVM", 11)], [3, 0]),
        ([("fc_vcpu 1", 10), ("fc_vcpu 0", 11)], [1, 0]),
        ([("VCPU-1", 10), ("vcpu0", 11)], [1, 0]),
        ([("qemu-kvm", 20), ("qemu-kvm", 10)], [0, 1]),
        ([("qemu-kvm", 20), ("CPU 0/KVM", 10), ("<...>", 5)], [1, 0, 2]),
    ],
)
def test_threads_become_vcpus_by_name_else_by_appearance(tmp_path: Path, threads: list[tuple[str, int]], vcpus: list[int]) -> None:
    trace, folded, _ = of_text(tmp_path, "".join(old_line(comm, tid, n + 1) for n, (comm, tid) in enumerate(threads)))
    assert pq.read_table(tmp_path / "accesses.parquet")["vcpu"].to_pylist() == vcpus
    assert folded.vcpus == max(vcpus) + 1
    assert assign(trace).by_appearance == sum(comm in ("qemu-kvm", "<...>") for comm, _ in threads)


def test_two_vms_in_one_trace_are_told_and_one_can_be_chosen(tmp_path: Path) -> None:
    both = old_line("CPU 0/KVM", 10) + old_line("CPU 1/KVM", 11) + old_line("CPU 0/KVM", 20)
    with pytest.raises(TraceError, match=r"vCPU 0 is thread 10 and thread 20.*--threads.*CPU 1/KVM 11 \(1 faults\)"):
        of_text(tmp_path, both)
    _, folded, _ = of_text(tmp_path, both, threads=[10, 11])
    assert (folded.vcpus, folded.accesses) == (2, 2)
    with pytest.raises(TraceError, match="none of a thread that --threads names"):
        of_text(tmp_path, both, threads=[30])


# --- where memory is


@pytest.mark.parametrize(
    ("given", "bases", "memory"),
    [
        ("0+3GiB,4GiB+13GiB", [0, 3 * GIB], 16 * GIB),
        ("4GiB+1GiB, 0+2GiB", [0, 2 * GIB], 3 * GIB),
        ("0x40000000+4MiB", [0], 4 << 20),
        ("0+640KiB,1MiB+7MiB", [0, 1 << 20], 8 << 20),  # in its place modulo 2 MiB
        ("3MiB+1MiB,1GiB+2GiB", [1 << 20, GIB], 3 * GIB),
        ("0+2MiB,0x100000000+0x200000", [0, 2 << 20], 4 << 20),
    ],
)
def test_slots_are_put_one_behind_the_other(given: str, bases: list[int], memory: int) -> None:
    slots = parse_slots(given)
    assert [slot.base for slot in slots.slots] == bases
    assert slots.memory == memory
    for slot in slots.slots:
        assert (slot.base - slot.gpa) % (GIB if slot.size >= GIB else PMD) == 0
        assert slots.gpa_of(slot.base) == slot.gpa
        assert slots.gpa_of(slot.base + slot.size - PAGE) == slot.gpa + slot.size - PAGE


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("", "START+SIZE"),
        ("3GiB", "START+SIZE"),
        ("0+3", "START+SIZE"),
        ("0+3G", "3G"),
        ("1KiB+4KiB", "multiples of 4KiB"),
        ("0+5KiB", "multiples of 4KiB"),
        ("0+0KiB", "above 0"),
        ("0+2GiB,1GiB+1GiB", "reaches into"),
        ("0x10000000000000+1GiB", "4PiB"),
        (",".join(f"{i}GiB+4KiB" for i in range(600)), "at most 512"),
    ],
)
def test_slots_that_cannot_be_are_refused(given: str, word: str) -> None:
    with pytest.raises(UsageError, match=word.replace("+", r"\+")):
        parse_slots(given)


def test_more_memory_than_the_model_has_is_refused() -> None:
    with pytest.raises(TraceError, match="16TiB"):
        parse_slots("0+20TiB")


def test_memory_of_a_pc_is_found_below_and_above_its_hole(tmp_path: Path) -> None:
    touched = [0x1000, 3 * GIB - PAGE, 4 * GIB, 6 * GIB + 5 * PMD]
    devices = [0xFEC00000, 0xFEE00300, 0xFFFFF000]
    folded = of_faults(tmp_path, [Fault(i, 0, gpa, WRITE, False, 0) for i, gpa in enumerate(touched + devices)])
    assert str(folded.slots) == f"0+1GiB,2GiB+1GiB,4GiB+1GiB,6GiB+{6 * PMD >> 20}MiB".replace("0+1GiB", "0+2MiB").replace(
        "4GiB+1GiB", "4GiB+2MiB"
    )
    assert (folded.devices, folded.outside, folded.accesses) == (3, 0, 4)
    gfns = pq.read_table(tmp_path / "accesses.parquet")["gfn"].to_pylist()
    assert [folded.slots.gpa_of(gfn * PAGE) for gfn in gfns] == touched


def test_gibs_beside_one_another_are_one_range() -> None:
    tops = np.zeros(1 << 22, np.uint16)
    tops[[0, 1, 2, 4, 5]] = [1, 512, 7, 512, 3]
    slots = derive("t", tops)
    assert [(slot.gpa, slot.size, slot.base) for slot in slots.slots] == [(0, 2 * GIB + 7 * PMD, 0), (4 * GIB, GIB + 3 * PMD, 3 * GIB)]
    assert slots.derived


def test_faults_beyond_the_slots_are_told_or_left_out(tmp_path: Path) -> None:
    faults = [Fault(i, 0, gpa, WRITE, False, 0) for i, gpa in enumerate([0, 0x40000000, 0x1000, 0x50000000])]
    with pytest.raises(TraceError) as caught:
        of_faults(tmp_path, faults, slots="0+2MiB")
    for word in ("trace.txt:7: ", "none of the slots 0+2MiB", "2 such faults", "0x40000000 to 0x50000000", "--skip-bad 2"):
        assert word in str(caught.value)
    with pytest.raises(TraceError, match="2 such faults"):
        of_faults(tmp_path, faults, slots="0+2MiB", skip_bad=1)
    folded = of_faults(tmp_path, faults, slots="0+2MiB", skip_bad=2)
    assert (folded.outside, folded.accesses) == (2, 2)


def test_mmio_entries_are_no_memory(tmp_path: Path) -> None:
    _, folded, _ = of_text(tmp_path, text(0x10000000F) + text(0x10000000D) + text(0x100000006))
    assert (folded.mmio, folded.accesses) == (2, 1)


@pytest.mark.parametrize("gpa", [1 << 52, 0xFFFF888000000000, (1 << 64) - 1])
def test_a_virtual_address_is_no_physical_one(tmp_path: Path, gpa: int) -> None:
    line = text(0x6).replace("0x1000", hex(gpa))
    with pytest.raises(TraceError, match=r"more than 52 bits.*guest-virtual"):
        of_text(tmp_path, line)
    with pytest.raises(TraceError, match="none of the slots"):
        of_text(tmp_path, line, slots="0+2MiB")


def test_a_trace_without_faults_on_memory_is_told(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="nothing to replay"):
        of_faults(tmp_path, [Fault(0, 0, 0xFEE00000, WRITE, False, 0)])
    with pytest.raises(TraceError, match=r"no kvm_page_fault.*1 kvm_exit"):
        of_text(tmp_path, "           qemu-7       [000] ....     1.000001: kvm_exit: reason HLT\n")


# --- double faults


def kinds(folder: Path, faults: list[tuple[int, int, int, bool]]) -> dict[str, int]:
    """What is counted of (vcpu, page, access, present)."""
    found = of_faults(folder, [Fault(1000 * i, v, p * PAGE, a, there, 0) for i, (v, p, a, there) in enumerate(faults)])
    return {name: count for name, count in totals(found).items() if count}


R, W, RO = (READ, False), (WRITE, False), (WRITE, True)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([(0, 1, *R), (0, 1, *RO), (0, 1, *W)], {"read_write_write": 1, "again": 1}),
        ([(0, 1, *RO), (0, 1, *W)], {"write_write": 1, "again": 1}),
        ([(0, 1, *W), (0, 1, *W)], {"absent_twice": 1, "again": 1}),
        ([(0, 1, *W), (0, 1, *W), (0, 1, *W), (0, 1, *W)], {"absent_twice": 1, "further": 2, "again": 3}),
        ([(0, 1, *R), (0, 1, *RO), (1, 9, *W), (0, 1, *W), (0, 1, *W)], {"read_write_write": 1, "further": 1, "again": 2}),
        ([(0, 1, *R), (1, 1, *RO), (0, 1, *W)], {"read_write_write": 1}),  # another vCPU's second fault
        ([(0, 1, *R), (0, 1, *R)], {"again": 1}),
        ([(0, 1, *R), (0, 2, *R), (0, 1, *R)], {"refaults": 1}),
        ([(0, 1, *W), (0, 2, *W), (0, 1, *W)], {"refaults": 1}),
        ([(0, 1, *W), (1, 1, *W)], {"refaults": 1}),
        ([(0, 1, *R), (0, 1, *W)], {"refaults": 1}),  # it was taken away in between
        ([(0, 1, *W), (0, 1, *R)], {"refaults": 1}),
        ([(0, 1, *R), (0, 1, *RO)], {}),
        ([(0, 1, FETCH, False), (0, 1, *RO), (0, 1, *W)], {"read_write_write": 1, "again": 1}),
    ],
)
def test_what_counts_as_a_double_fault(tmp_path: Path, faults: list[tuple[int, int, int, bool]], expected: dict[str, int]) -> None:
    found = kinds(tmp_path, faults)
    names = ("read_write_write", "write_write", "absent_twice", "further", "again", "refaults")
    assert {name: found[name] for name in names if name in found} == expected
    assert found["faults"] == len(faults)
    assert found["pages"] == len({page for _, page, _, _ in faults})


def test_without_knowing_what_was_present_a_read_page_is_taken_for_read_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(csv_of([Fault(i, 0, 0, access, False, 0) for i, access in enumerate([READ, WRITE, WRITE])]))
    _, folded, _ = imported(tmp_path / "a.csv", tmp_path)
    assert totals(folded)["read_write_write"] == 1
    assert pq.read_table(tmp_path / "accesses.parquet").to_pylist() == [
        {"ns": 0, "vcpu": 0, "gfn": 0, "write": False, "fetch": False, "present": None, "faults": 1, "kvm_ns": None},
        {"ns": 1, "vcpu": 0, "gfn": 0, "write": True, "fetch": False, "present": None, "faults": 2, "kvm_ns": None},
    ]


def test_counts_lie_in_their_regions_and_their_time(tmp_path: Path) -> None:
    double = [(WRITE, True), (WRITE, False)]
    faults = [Fault(600 * i, 0, region * PMD, *kind, 0) for region in (0, 5) for i, kind in enumerate(double, 1 if region else 0)]
    faults += [Fault(600 * 59, 0, 7 * PMD, READ, False, 0)]
    folded = of_faults(tmp_path, sorted(faults, key=lambda f: f.ns))
    regions, times = by_region(folded), in_time(folded)
    assert regions[["gpa", "faults", "doubles"]].to_numpy().tolist() == [[0, 2, 1], [5 * PMD, 2, 1], [7 * PMD, 1, 0]]
    assert int(times["faults"].sum()) == 5
    assert times[times["doubles"] > 0]["from_ns"].tolist() == [
        folded.width_ns * (600 // folded.width_ns),
        folded.width_ns * (1200 // folded.width_ns),
    ]


def test_durations_are_those_of_all_faults_of_an_access(tmp_path: Path) -> None:
    faults = [Fault(1000 * i, 0, PAGE, *kind, 1000 * i + ns) for i, (kind, ns) in enumerate([(R, 100), (RO, 200), (W, 300)])]
    folded = of_faults(tmp_path, faults, Style("perf", pairs=True))
    assert pq.read_table(tmp_path / "accesses.parquet")["kvm_ns"].to_pylist() == [100, 500]
    assert folded.durations["sum_ns"] == 600
    assert folded.durations["again_sum_ns"] == 300
    assert folded.durations["p50_ns"] == 200


def test_rows_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    faults = [Fault(1000 * i, i % 2, i * PAGE, WRITE, False, 0) for i in range(100)]
    lines = text_of(faults, Style("bpftrace")).splitlines(keepends=True)
    (tmp_path / "b.txt").write_text("".join([lines[0], *sorted(lines[1:], key=lambda line: int(line.split()[0]) // 1000 % 7)]))
    trace, _, _ = imported(tmp_path / "b.txt", tmp_path)
    assert trace.backward > 0
    assert pq.read_table(tmp_path / "accesses.parquet")["gfn"].to_pylist() == list(range(100))


# --- the command


def options(trace: Path, place: Path, **changes: Any) -> ReplayOptions:
    return ReplayOptions(**{"trace": str(trace), "out": str(place), "run": RunOptions(executor="inline", quiet=True), **changes})


def process(*arguments: object, cwd: Path, given: bytes | None = None) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, with these sources."""
    command = [sys.executable, "-m", "sweep", "replay", *map(str, arguments)]
    done = subprocess.run(
        command, input=given, cwd=cwd, capture_output=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(HERE.parent)}
    )
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_replay_answers_and_leaves_a_dataset(tmp_path: Path) -> None:
    out = tmp_path / "out"
    replayed = replay_trace(options(EXAMPLES / "perf.txt", out))
    host = {"kernel": "6.5", "policy": "mainline", "backing": "anonymous_thp", "use_zero_page": True, "prealloc": "none"}
    frame = replayed.what_if
    same = frame[(frame[list(host)] == pd.Series(host)).all(axis=1)]
    assert same[["pf_taken", "of_recorded"]].to_numpy().tolist() == [[148.0, 1.0]]
    assert frame["pf_taken"].min() < 10
    said = replayed.as_text()
    for word in ("148", "double", "What this trace cannot show", "kernel", "recorded"):
        assert word in said
    assert (out / "sealed.json").exists()
    assert sorted(path.name for path in (out / "replay").iterdir()) == [
        ".lock",
        "accesses.parquet",
        "regions.parquet",
        "study.toml",
        "tables.json",
        "time.parquet",
        "trace.json",
    ]
    built = build_report(out)
    assert "cannot show" in built.as_text()
    assert "Double faults" in built.path.read_text()
    before = (out / "sealed.json").read_bytes()
    resumed = replay_trace(options(EXAMPLES / "perf.txt", out))
    assert resumed.summary is not None
    assert resumed.summary.done_before == resumed.summary.total
    assert (out / "sealed.json").read_bytes() == before
    assert run_study(load_study(out / "replay" / "study.toml"), out, RunOptions(executor="inline")).done == 0


def test_the_json_of_a_replay_holds_its_numbers(tmp_path: Path) -> None:
    done = process(EXAMPLES / "ftrace.txt.gz", "--out", "out", "--import-only", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["trace"]["vendor"] == "intel"
    assert found["double_faults"]["doubles"] == 48
    assert sum(row["doubles"] for row in found["time"]) == sum(row["doubles"] for row in found["regions"]) == 48
    assert found["what_if"] == []
    assert len(found["cannot_show"]) >= 4
    assert found == json.loads((tmp_path / "out" / "replay" / "trace.json").read_text()) | {
        key: found[key] for key in ("out", "accesses", "what_if")
    }


def test_a_study_of_the_users_own_is_asked(tmp_path: Path) -> None:
    study = tmp_path / "asked.toml"
    study.write_text(
        '[study]\nname = "mine"\n[point]\nbacking = "anonymous_thp"\n[[block]]\ngrid = { kernel = ["6.5", "6.13"], cores = [1, 2] }\n'
    )
    replayed = replay_trace(options(EXAMPLES / "accesses.csv", tmp_path / "out", study=study))
    assert replayed.summary is not None
    assert replayed.summary.study == "mine"
    assert sorted(map(tuple, replayed.what_if[["kernel", "cores"]].to_numpy().tolist())) == [
        ("6.13", 1),
        ("6.13", 2),
        ("6.5", 1),
        ("6.5", 2),
    ]
    faults = replayed.what_if.set_index(["kernel", "cores"])["pf_taken"]
    assert (faults["6.5", 2], faults["6.13", 2]) == (148, 9)


def test_a_study_that_does_not_ask_of_the_trace_is_refused(tmp_path: Path) -> None:
    study = tmp_path / "other.toml"
    study.write_text('[study]\nname = "other"\n[point]\nworkload = "first_touch"\n')
    with pytest.raises(UsageError, match="no point has workload = 'trace'"):
        replay_trace(options(EXAMPLES / "accesses.csv", tmp_path / "out", study=study))


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"format": "perff"}, UsageError, "perf"),
        ({"vendor": "via"}, UsageError, "intel, amd, shadow"),
        ({"vendor": "none"}, UsageError, "intel, amd, shadow"),
        ({"slots": "1"}, UsageError, "--slots"),
        ({"threads": "a"}, UsageError, "--threads"),
        ({"threads": "9-1"}, UsageError, "--threads"),
        ({"threads": "1-99999999"}, UsageError, "--threads"),
        ({"kernel": "9.9"}, UsageError, "--kernel"),
        ({"study": Path("missing.toml")}, StudyError, "missing.toml"),
        ({"out": "s3://bucket/name"}, UsageError, "directory"),
        ({"vendor": "amd"}, TraceError, "--vendor amd is wrong"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_stays(tmp_path: Path, changes: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        replay_trace(options(EXAMPLES / "perf.txt", tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_holds_something_else_is_kept(tmp_path: Path, study_file: Path) -> None:
    run_study(load_study(study_file), tmp_path / "study", RunOptions(executor="inline", quiet=True))
    with pytest.raises(DatasetError, match="another study"):
        replay_trace(options(EXAMPLES / "perf.txt", tmp_path / "study"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    with pytest.raises(DatasetError, match=r"letter\.txt"):
        replay_trace(options(EXAMPLES / "perf.txt", tmp_path / "foreign"))
    first = options(EXAMPLES / "perf.txt", tmp_path / "out", import_only=True)
    replay_trace(first)
    before = (tmp_path / "out" / "replay" / "accesses.parquet").read_bytes()
    with pytest.raises(DatasetError, match="another trace"):
        replay_trace(options(EXAMPLES / "accesses.csv", tmp_path / "out", import_only=True))
    assert (tmp_path / "out" / "replay" / "accesses.parquet").read_bytes() == before
    with replaying._folder(tmp_path / "out"), pytest.raises(EnvironmentProblemError, match="another replay"):
        replay_trace(first)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["missing.txt"], 2, ["missing.txt", "cannot be read"]),
        ([EXAMPLES / "perf.txt", "--vendor", "amd"], 2, ["perf.txt:7", "--vendor amd is wrong"]),
        ([EXAMPLES / "perf.txt", "--slots", "0+2MiB"], 2, ["none of the slots", "--skip-bad"]),
        ([EXAMPLES / "make.py"], 2, ["no format"]),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, arguments: list[Any], status: int, words: list[str]) -> None:
    done = process(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_read(tmp_path: Path) -> None:
    done = process("-", "--out", "out", "--import-only", "--json", cwd=tmp_path, given=(EXAMPLES / "bpftrace.txt").read_bytes())
    assert json.loads(done.stdout)["trace"]["accesses"] == 96


@pytest.mark.parametrize(
    ("trace", "name"), [("/a/Boot of VM 3.txt.gz", "replay-boot-of-vm-3"), ("-", "replay-stdin"), ("ÄÖ", "replay-trace")]
)
def test_a_trace_names_its_study(trace: str, name: str) -> None:
    assert study_name(trace) == name


@pytest.mark.parametrize(
    ("release", "kernel"), [("6.1.0-18-amd64", "6.1"), ("6.18.44", "6.18"), ("4.19.0", "6.12"), ("", "6.12"), ("x", "6.12")]
)
def test_a_release_says_the_kernel_if_the_model_has_it(release: str, kernel: str) -> None:
    assert kernel_of(release) == kernel


def test_slots_know_no_page_behind_their_end() -> None:
    with pytest.raises(ValueError, match="behind"):
        Slots(parse_slots("0+2MiB").slots, derived=False).gpa_of(PMD)


def test_a_list_counts_in_what_is_predicted(tmp_path: Path) -> None:
    from sweep.configs import Workload
    from sweep.parameters import Point
    from sweep.predict import predict_bytes, predict_seconds
    from sweep.steps import TouchListStep, check_steps, list_rows

    def listed(rows: int) -> Workload:
        path = tmp_path / f"{rows}.parquet"
        columns = {"gfn": np.arange(rows) % 100, "vcpu": np.zeros(rows, np.int64), "write": np.ones(rows, bool), "ns": np.arange(rows)}
        pq.write_table(pa.table(columns), path)
        return Workload("list", (TouchListStep(op="touch_list", path=path.name),), tmp_path)

    point = Point.model_validate({"memory": "400KiB"})
    few, many = listed(1000), listed(1_000_000)
    assert list_rows(tmp_path / "1000.parquet") == 1000
    assert predict_seconds(point, many) - predict_seconds(point, few) > 0.05
    assert predict_bytes(point, many) - predict_bytes(point, few) > 90_000_000
    assert check_steps(few.specs, tmp_path, point) == []
    assert check_steps(few.specs, tmp_path, Point.model_validate({"memory": "396KiB"}))[0][1].endswith("gfn = 99 is outside 0 ... 98")


def test_raw_rows_come_in_batches_that_a_window_can_take(tmp_path: Path) -> None:
    from sweep.replay.parse import BATCH_ROWS, RawFile

    with RawFile(tmp_path / "raw") as raw:
        raw.add([np.arange(2 * BATCH_ROWS + 5)] * len(Rows._fields))
    assert [len(rows.ns) for rows in raw_batches(tmp_path / "raw")] == [BATCH_ROWS, BATCH_ROWS, 5]


def test_thread_ids_of_the_examples_begin_where_the_writer_says() -> None:
    assert f" {FIRST_TID} " in (EXAMPLES / "perf.txt").read_text()
