"""What is refused, and how: one line per fault with file:line, field, value and cure; all faults of a file at once; the
contract's exit status; no traceback; nothing half-made on disk.

A comment `FAILS:` marks a case that the product did not pass when it was written, and why.
"""

import contextlib
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sweep.configs import config_root
from sweep.dataset.read import open_dataset
from sweep.errors import FaultsweepError, StudyError, UsageError
from sweep.plan import Plan
from sweep.study import load_study
from tests.conftest import Command

HEAD = '[study]\nname = "s"\n'
POINT = HEAD + '[point]\nmemory = "2MiB"\n'  # what follows is line 5 of the file
BLOCK = POINT + "[[block]]\n"  # what follows is line 6
STEPS = HEAD + '[point]\nmemory = "2MiB"\nworkload = "w"\n[workload.w]\n'  # what follows is line 7
MAX_LINE = 600
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def write(tmp_path: Path, text: str | bytes, name: str = "s.toml") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """The faults of a study as lines, the path of the study cut to its name. Fails if it is taken."""
    with pytest.raises(StudyError) as caught:
        Plan(load_study(path, overrides)).points()
    lines = str(caught.value).split("\n")
    for line in lines:
        assert len(line) <= MAX_LINE, f"a line of {len(line)} characters: {line[:200]}"
        assert not CONTROL.search(line), f"control characters in {line!r}"
    return [line.replace(f"{path.parent}/", "") for line in lines]


def taken(path: Path) -> Plan:
    plan = Plan(load_study(path))
    plan.points()
    return plan


def one_fault(path: Path, where: str, *words: str) -> None:
    """Exactly one line, which starts with `where` ('s.toml:5: point.vcpus') and has all the words."""
    lines = refused(path)
    assert len(lines) == 1, lines
    assert lines[0].startswith(where + ": "), lines[0]
    for word in words:
        assert word in lines[0], lines[0]


def process(*arguments: object, cwd: Path, seconds: float = 60, memory: int | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m sweep` in a process of its own, with a bound on time and, if asked for, on memory."""

    def limit() -> None:
        if memory is not None:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    return subprocess.run(
        [sys.executable, "-m", "sweep", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=limit,
        check=False,
    )


def no_traceback(text: str) -> None:
    assert "Traceback" not in text, text
    assert 'File "' not in text, text


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset of two points, its title full of markup."""
    from sweep.runner import RunOptions, run

    folder = tmp_path_factory.mktemp("done")
    study = write(
        folder,
        '[study]\nname = "s"\ntitle = "<script>alert(1)</script> & \\"quoted\\" \'single\'"\n[point]\nmemory = "2MiB"\n'
        "[[block]]\ngrid = { vcpus = [1, 2] }\n",
    )
    run(study, folder / "d", RunOptions(executor="inline", quiet=True))
    return folder / "d"


# --- Values of parameters: bad-inputs.md rows 1, 2, 4-8, 11, 12, 21 ---------------------------------------------------------

MEMORY_WORDS = ("KiB", "MiB", "GiB")


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ("vcpuss = 2", "vcpuss", ["vcpuss", "did you mean 'vcpus'"]),
        ("Vcpus = 2", "Vcpus", ["did you mean 'vcpus'"]),
        ("policy = 'mainlin'", "policy", ["'mainlin'", "mainline", "no_change_pte", "always_writable"]),
        ("thp_enabled = 'sometimes'", "thp_enabled", ["'sometimes'", "always", "madvise", "never"]),
        ("thp_enabled = true", "thp_enabled", ["True", "madvise"]),
        ("backing = 'anonymous_hugetlb_3mb'", "backing", ["anonymous_hugetlb_3mb", "anonymous_hugetlb_2mb"]),
        ("mmu = 'nested'", "mmu", ["nested", "tdp", "legacy", "shadow"]),
        ("vcpus = 0", "vcpus", ["0", "1"]),
        ("vcpus = -1", "vcpus", ["-1", "1"]),
        ("vcpus = 1.5", "vcpus", ["1.5", "integer"]),
        ("vcpus = true", "vcpus", ["True", "integer"]),
        ("vcpus = '4'", "vcpus", ["'4'", "integer"]),
        ("vcpus = nan", "vcpus", ["nan", "integer"]),
        ("vcpus = 4097", "vcpus", ["4097", "4096"]),
        ("vcpus = 1000000", "vcpus", ["1000000", "4096"]),
        ("vcpus = " + "9" * 4000, "vcpus", ["4096"]),
        ("vcpus = []", "vcpus", ["[]", "integer"]),
        ("vcpus = {}", "vcpus", ["{}", "integer"]),
        ("vcpus = 2020-01-01", "vcpus", ["2020", "integer"]),
        ("kernel = 6.12", "kernel", ["6.12", "quotes"]),
        ("kernel = '6.12-rc1'", "kernel", ["6.12-rc1", "5.15", "7.3"]),
        ("kernel = '6.12.3'", "kernel", ["6.12.3", "5.15", "7.3"]),
        ("kernel = '6.99'", "kernel", ["6.99", "5.15", "7.3"]),
        ("kernel = '6.012'", "kernel", ["6.012", "5.15"]),
        ("kernel = '\u0666.\u0661'", "kernel", ["5.15", "7.3"]),
        ("kernel = ''", "kernel", ["''", "5.15"]),
        ("kernel = '6." + "9" * 5000 + "'", "kernel", ["5.15", "7.3"]),
        ("use_zero_page = 1", "use_zero_page", ["1", "boolean"]),
        ("use_zero_page = 'true'", "use_zero_page", ["'true'", "boolean"]),
        ("nx_huge_pages = 0", "nx_huge_pages", ["0", "boolean"]),
        ("eager_page_split = 0", "eager_page_split", ["0", "boolean"]),
        ("khugepaged = { pages_to_scan = 0 }", "khugepaged", ["pages_to_scan"]),
        ("khugepaged = { pages_to_scam = 1 }", "khugepaged", ["pages_to_scam"]),
        ("khugepaged = true", "khugepaged", ["True", "false", "table"]),
        ("khugepaged = { max_ptes_none = 512 }", "khugepaged", ["max_ptes_none", "511"]),
        ("ksm = { fraction = 1.5 }", "ksm", ["fraction", "1.5"]),
        ("thp_failure = 1.5", "thp_failure", ["1.5", "0 ... 1"]),
        ("thp_failure = -0.1", "thp_failure", ["-0.1", "0 ... 1"]),
        ("thp_failure = nan", "thp_failure", ["nan"]),
        ("thp_failure = inf", "thp_failure", ["inf"]),
        ("thp_failure = 1e400", "thp_failure", ["inf"]),
        ("offset = '4KB'", "offset", ["'4KB'", "KiB"]),
        ("offset = '17TiB'", "offset", ["17TiB", "16TiB"]),
        ("offset = -1", "offset", ["-1"]),
        ("guest_page = '8KiB'", "guest_page", ["8KiB", "4KiB", "2MiB"]),
        ("prealloc = 'pre_fault+populate'", "prealloc", ["populate+pre_fault"]),
        ("prealloc_threads = 0", "prealloc_threads", ["0", "1"]),
        ("workload = 'read_then_writ'", "workload", ["read_then_writ", "did you mean 'read_then_write'"]),
        ("workload = '../x'", "workload", ["../x"]),
        ("workload = 'x\\ny'", "workload", ["x"]),
        ("costs = ''", "costs", ["''"]),
        ("costs = '" + "a" * 300 + "'", "costs", ["200"]),
        ("policy = '" + "x" * 100_000 + "'", "policy", ["mainline"]),
        ("x" * 1000 + " = 1", "x" * 20, ["known: "]),
        ('"\\u001b[31mvcpus" = 1', None, ["did you mean 'vcpus'"]),
        ('"vc\\npus" = 1', None, ["did you mean 'vcpus'"]),
        ("thp_failure = false", "thp_failure", ["False"]),
        ("thp_failure = '0'", "thp_failure", ["'0'"]),
        ("khugepaged = 0", "khugepaged", ["0", "false"]),
        ("kernel = '6.25'", "kernel", ["6.25", "did you mean", "6.19"]),
        ("vcpus = 0", "vcpus", ["1", "4096"]),
        ("backing = 'anonymous_hugetlb_3mb'", "backing", ["anonymous_hugetlb_2mb", "anonymous_hugetlb_1gb"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_a_bad_parameter_is_named_with_line_value_and_cure(tmp_path: Path, line: str, field: str | None, words: list[str]) -> None:
    where = "s.toml:5: point" + f".{field}" if field is not None else "s.toml:3: point"  # an escaped key: its table
    lines = refused(write(tmp_path, POINT + line + "\n"))
    assert len(lines) == 1, lines
    assert lines[0].startswith(where), lines[0][:200]
    for word in words:
        assert word in lines[0], lines[0][:400]


@pytest.mark.parametrize("value", ["4294967296", "1.5", "true", "nan", "inf", "[1]", "{}", "1000000000000000000000000000000"])
def test_memory_without_a_unit_is_refused(tmp_path: Path, value: str) -> None:
    one_fault(write(tmp_path, HEAD + f"[point]\nmemory = {value}\n"), "s.toml:4: point.memory", "unit", "GiB")


@pytest.mark.parametrize("value", ["16G", "-1GiB", "", "1e3GiB", "\uff14KiB", "4 K", "GiB", "0x10KiB", "4KiB4KiB", "1.5.5GiB", "4gib"])
def test_memory_that_is_no_size_is_refused(tmp_path: Path, value: str) -> None:
    one_fault(write(tmp_path, HEAD + f"[point]\nmemory = '{value}'\n"), "s.toml:4: point.memory", f"'{value}'", *MEMORY_WORDS)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("'0'", ["4KiB"]),
        ("0", ["4KiB"]),
        ("'6KiB'", ["6144 bytes", "4KiB", "8KiB"]),
        ("'5000B'", ["5000 bytes", "4KiB", "8KiB"]),
        ("'4GB'", ["4000000000 bytes", "3906248KiB", "3906252KiB"]),
        ("'17TiB'", ["16TiB"]),
        ("'999999999999999999TiB'", ["16TiB"]),
    ],
)
def test_memory_that_is_no_count_of_pages_names_the_nearest_two(tmp_path: Path, value: str, words: list[str]) -> None:
    one_fault(write(tmp_path, HEAD + f"[point]\nmemory = {value}\n"), "s.toml:4: point.memory", "multiple of 4KiB", *words)


def test_a_long_size_is_echoed_short(tmp_path: Path) -> None:
    one_fault(write(tmp_path, HEAD + f"[point]\nmemory = '{'1' * 100_000}'\n"), "s.toml:4: point.memory", "GiB")


def test_gib_and_gb_are_both_legal_and_differ(tmp_path: Path) -> None:
    sizes = []
    for unit in ("4096MB", "4096MiB"):
        sizes.append(taken(write(tmp_path, HEAD + f"[point]\nmemory = '{unit}'\n")).points()[0].point.memory)
    assert sizes == [4096 * 10**6, 4096 << 20]


# --- Combinations: rows 7, 20 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("memory = '3MiB'\nbacking = 'anonymous_hugetlb_2mb'", ["3MiB", "2MiB"]),
        ("kernel = '6.12'\npolicy = 'change_pte_prefetch'", ["change_pte_prefetch", "6.12", "6.10"]),
        ("kernel = '6.12'\npolicy = 'no_change_pte'", ["no_change_pte", "6.12"]),
        ("kernel = '6.5'\nprealloc = 'pre_fault'", ["pre_fault", "6.5", "6.11"]),
        ("mmu = 'shadow'\nprealloc = 'pre_fault'", ["pre_fault", "EPT", "shadow"]),
        ("mmu = 'legacy'\nkernel = '6.5'\npolicy = 'change_pte_prefetch'", ["change_pte_prefetch", "TDP MMU", "legacy"]),
        ("memory = '1536MiB'\nbacking = 'anonymous_hugetlb_1gb'", ["1536MiB", "1GiB"]),
        ("backing = 'anonymous_thp'\nuse_zero_page = false\npolicy = 'huge_zero_thp'", ["use_zero_page", "huge_zero_thp"]),
        ("vcpus = 4\nsmt = 2", ["smt = 2", "give cores"]),
    ],
)
def test_a_combination_that_makes_no_sense_names_rule_and_line(tmp_path: Path, lines: str, words: list[str]) -> None:
    found = refused(write(tmp_path, HEAD + "[point]\n" + lines + "\n"))
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]
    assert re.match(r"s\.toml:[3-6]: ", found[0]), found[0]


def test_a_combination_in_a_block_names_the_block(tmp_path: Path) -> None:
    text = BLOCK + "grid = { vcpus = [1] }\n[[block]]\ngrid = { kernel = ['6.5', '6.12'] }\npoint = { policy = 'no_change_pte' }\n"
    one_fault(write(tmp_path, text), "s.toml:7: block.1", "no_change_pte", "6.12", "where")


def test_hardware_threads_of_no_cores_are_refused_where_they_stand(tmp_path: Path) -> None:
    text = BLOCK + "grid = { vcpus = [1], smt = [1, 2], cores = [1] }\n[[block]]\ngrid = { vcpus = [1], smt = [1, 2] }\n"
    one_fault(write(tmp_path, text), "s.toml:7: block.1", "smt = 2", "give cores")


def test_combinations_and_other_faults_are_told_at_once(tmp_path: Path) -> None:
    found = refused(write(tmp_path, POINT + "vcpuss = 1\nkernel = '6.12'\npolicy = 'no_change_pte'\n"))
    assert len(found) == 2, found


# --- Structure: rows 3, 15, 17, 18, 22, 26-28 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (POINT + "vcpus = 1\nvcpus = 2\n", "s.toml:6", ["vcpus", "line 5"]),
        (POINT + "[study]\nseed = 1\n", "s.toml:5", ["[study]", "line 1"]),
        (POINT + "vcpus = 1\n[[block]]\n[block.point]\nvcpus = 1\nvcpus = 2\n", "s.toml:9", ["vcpus", "line 8"]),
        (BLOCK + "grid = { vcpus = [1], vcpus = [2] }\n", "s.toml:6", ["vcpus", "twice"]),
        (HEAD + "x = \n", "s.toml:3", ["TOML"]),
        (HEAD.replace("\n", "\r"), "s.toml:1", ["TOML"]),
    ],
)
def test_broken_toml_names_the_line(tmp_path: Path, text: str, where: str, words: list[str]) -> None:
    one_fault(write(tmp_path, text), where, *words)


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        (HEAD + "sed = 1\n", "s.toml:3: study.sed", ["did you mean 'seed'"]),
        (HEAD + "[pointt]\nvcpus = 1\n", "s.toml:3: pointt", ["did you mean 'point'"]),
        (BLOCK + "gird = { vcpus = [1] }\n", "s.toml:6: block.0.gird", ["did you mean 'grid'"]),
        ("point = 1\n" + HEAD, "s.toml:1: point", ["table"]),
        (HEAD + "[block]\ngrid = { vcpus = [1] }\n", "s.toml:3: block", ["[[block]]"]),
        ("block = []\n" + HEAD, "s.toml:1: block", ["[[block]]"]),
        ("block = [1]\n" + HEAD, "s.toml:1: block.0", ["table"]),
        (BLOCK + "grid = { vcpus = [] }\n", "s.toml:6: block.0.grid.vcpus", ["empty", "0 points"]),
        (BLOCK + "grid = { vcpus = { range = [5, 5, 1] } }\n", "s.toml:6: block.0.grid.vcpus", ["empty"]),
        (BLOCK + "grid = [1]\n", "s.toml:6: block.0.grid", ["table"]),
        (BLOCK + "grid = { vcpus = [1] }\nzip = { vcpus = [1] }\n", "s.toml:7: block.0.zip.vcpus", ["grid", "zip"]),
        (BLOCK + "zip = { vcpus = [1, 2], kernel = ['6.1'] }\n", "s.toml:6: block.0.zip", ["vcpus has 2", "kernel has 1"]),
        (BLOCK + "sample = { method = 'sobol', n = 4 }\n", "s.toml:6: block.0.sample", ["grid"]),
        (BLOCK + "where = 3\n", "s.toml:6: block.0.where", ["text"]),
        ("study = 1\n", "s.toml:1: study", ["table"]),
        (BLOCK + "grid = { vcpuss = [1, 2] }\n", "s.toml:6: block.0.grid.vcpuss", ["did you mean 'vcpus'"]),
        (BLOCK + "grid = { vcpus = 4 }\n", "s.toml:6: block.0.grid.vcpus", ["list"]),
        (BLOCK + "grid = { vcpus = { range = [1, 5, 0] } }\n", "s.toml:6: block.0.grid.vcpus", ["range", "0"]),
        (BLOCK + "grid = { vcpus = { range = [1, 9999999999999999999999] } }\n", "s.toml:6: block.0.grid.vcpus", ["range"]),
        (BLOCK + "grid = { vcpus = { pow2 = [0, 5] } }\n", "s.toml:6: block.0.grid.vcpus", ["pow2"]),
        (BLOCK + "grid = { vcpus = { pow2 = [nan, inf] } }\n", "s.toml:6: block.0.grid.vcpus", ["pow2"]),
        (BLOCK + "grid = { thp_failure = { linspace = [0, 1, 1000000000] } }\n", "s.toml:6: block.0.grid.thp_failure", ["linspace"]),
        (BLOCK + "grid = { vcpus = { pow2 = [1, 2, 3] } }\n", "s.toml:6: block.0.grid.vcpus", ["low", "high"]),
        ("workload = 3\n" + HEAD, "s.toml:1: workload", ["table"]),
        (HEAD + "[workload.unused]\nsteps = 3\n", "s.toml:4: workload.unused.steps", ["list"]),
        ("include = 'x.toml'\n" + HEAD, "s.toml:1: include", ["list"]),
    ],
)
def test_a_bad_structure_is_named_with_line_and_cure(tmp_path: Path, text: str, where: str, words: list[str]) -> None:
    one_fault(write(tmp_path, text), where, *words)


def test_a_study_without_a_name_says_so(tmp_path: Path) -> None:
    one_fault(write(tmp_path, "[point]\nvcpus = 1\n"), "s.toml: study.name", "missing")


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "/etc",
        "a/b",
        "CON",
        "con",
        "con.txt",
        "nul",
        "com1",
        "a" * 65,
        "a" * 300,
        "<b>x</b>",
        "a b",
        "",
        ".hidden",
        "-x",
        "\\uff41",
        "na\\u00efve",
        "a\\u0000b",
        "a\\nb",
        "a\\u200bb",
        "\\u202eabc",
        "\\u001b[31m",
        "a\\n",
    ],
)
def test_a_name_that_is_no_name_is_refused_by_pattern(tmp_path: Path, name: str) -> None:
    one_fault(write(tmp_path, f'[study]\nname = "{name}"\n'), "s.toml:2: study.name", "a-z", "64")


@pytest.mark.parametrize(
    "title",
    [
        "\\u0000",
        "a\\u001b[31mb",
        "a\\nb",
        "a" * 501,
        "a\\u0085b",
        "a\\u009b31mb",
        "a\\u2028b",
        "a\\u202eb",
    ],
)
def test_a_title_with_control_characters_is_refused(tmp_path: Path, title: str) -> None:
    one_fault(write(tmp_path, f'[study]\nname = "s"\ntitle = "{title}"\n'), "s.toml:3: study.title", "500")


@pytest.mark.parametrize("value", ["-1", str(1 << 64), "1.0", "true", "nan", "'7'", "9" * 4000])
def test_a_seed_beyond_64_bits_is_refused(tmp_path: Path, value: str) -> None:
    one_fault(write(tmp_path, HEAD + f"seed = {value}\n"), "s.toml:3: study.seed", str((1 << 64) - 1))


def test_a_missing_seed_is_deterministic(tmp_path: Path) -> None:
    seeds = {taken(write(tmp_path, HEAD, f"{i}.toml")).points()[0].seed for i in range(2)}
    assert seeds == {0}


@pytest.mark.parametrize("value", ["0", "-1", "10001", "1.5", "true"])
def test_replicates_out_of_range_are_refused(tmp_path: Path, value: str) -> None:
    one_fault(write(tmp_path, HEAD + f"replicates = {value}\n"), "s.toml:3: study.replicates", "1 to 10000")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf", "true", "'1'"])
def test_a_budget_that_is_no_number_of_hours_is_refused(tmp_path: Path, value: str) -> None:
    one_fault(write(tmp_path, HEAD + f"budget_cpu_hours = {value}\n"), "s.toml:3: study.budget_cpu_hours", "hours")


def test_a_trillion_points_are_counted_without_expanding(tmp_path: Path) -> None:
    axes = ", ".join(f"{name} = {{ range = [1, 4097] }}" for name in ("vcpus", "prealloc_threads", "cores"))
    path = write(tmp_path, BLOCK + f"grid = {{ {axes} }}\n")
    start = time.process_time()
    one_fault(path, "s.toml:5: block", f"{4096**3:,}", f"{1 << 32:,}")
    assert time.process_time() - start < 0.5


def test_all_faults_of_a_file_are_told_at_once_in_order(tmp_path: Path) -> None:
    text = (
        HEAD
        + "sed = 1\n[point]\nvcpus = 0\nmemory = '6KiB'\nkernel = '9.9'\npolicy = 'x'\nworkload = 'nope'\n"
        + "[[block]]\ngrid = { thp_enabled = ['x'] }\nwhere = 'foo'\n[[block]]\ngrid = { vcpus = [] }\n"
    )
    found = refused(write(tmp_path, text))
    fields = [line.split(": ")[1] for line in found]
    expected = ["study.sed", "point.vcpus", "point.memory", "point.kernel", "point.policy", "block.0.grid.thp_enabled", "block.0.where"]
    assert set(fields) == {*expected, "block.1.grid.vcpus", "point.workload"}
    assert len(fields) == len(set(fields))
    numbers = [int(line.split(": ")[0].split(":")[1]) for line in found]
    assert numbers == sorted(numbers)


def test_thousands_of_bad_values_do_not_flood(tmp_path: Path) -> None:
    found = refused(write(tmp_path, BLOCK + "grid = { vcpus = { range = [-20000, 0] } }\n"))
    assert len(found) <= 50, len(found)


def test_equal_points_written_differently_are_one_point(tmp_path: Path) -> None:
    for grid in ("vcpus = [1, 1]", "memory = ['2MiB', '2048KiB']", "thp_failure = [0, 0.0]"):
        assert len(taken(write(tmp_path, BLOCK + f"grid = {{ {grid} }}\n")).points()) == 1
    assert len(taken(write(tmp_path, BLOCK + "grid = { thp_failure = [0.0, -0.0] }\n")).points()) == 1


# --- The text of a file: rows 24, 25, 30, 31, 34 ----------------------------------------------------------------------------


def test_what_is_no_utf8_names_the_byte(tmp_path: Path) -> None:
    one_fault(write(tmp_path, HEAD.encode() + b"title = '\xff'\n"), "s.toml", "byte 28", "UTF-8")
    one_fault(write(tmp_path, HEAD.encode("utf-16")), "s.toml", "byte 0", "UTF-8")


def test_a_bom_is_stripped_with_a_note_and_crlf_is_fine(tmp_path: Path) -> None:
    assert len(taken(write(tmp_path, POINT.replace("\n", "\r\n"))).points()) == 1
    plan = taken(write(tmp_path, b"\xef\xbb\xbf" + HEAD.encode()))
    assert any("BOM" in note for note in plan.study.notes), plan.study.notes


@pytest.mark.parametrize("name", ["s.yaml", "s.yml", "s.json", "S.YAML"])
def test_yaml_is_refused(tmp_path: Path, name: str) -> None:
    one_fault(write(tmp_path, "a: &a [x, x]\nb: [*a, *a]\n", name), name, "TOML only")


def test_a_missing_file_names_path_and_reason(tmp_path: Path) -> None:
    one_fault(tmp_path / "none.toml", "none.toml", "No such file", "ENOENT")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_names_path_and_reason(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD)
    path.chmod(0)
    one_fault(path, "s.toml", "Permission denied", "EACCES")


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(2 << 30)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(tmp_path / "socket.toml"))
        for name in ("fifo", "folder", "zero", "socket"):
            one_fault(tmp_path / f"{name}.toml", f"{name}.toml", "regular file")
    one_fault(tmp_path / "large.toml", "large.toml", str(2 << 30), str(1 << 20))
    one_fault(tmp_path / "loop.toml", "loop.toml", "ELOOP")
    assert "ENAMETOOLONG" in refused(tmp_path / ("x" * 300 + ".toml"))[0]


@pytest.mark.parametrize("text", ["x = " + "[" * 5000 + "]" * 5000, "x = " + "{a=" * 5000 + "1" + "}" * 5000])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    one_fault(write(tmp_path, HEAD + text + "\n"), "s.toml", "nested")


def test_a_number_of_thousands_of_digits_is_refused_with_its_line(tmp_path: Path) -> None:
    one_fault(write(tmp_path, POINT + "vcpus = " + "9" * 5000 + "\n"), "s.toml:5", "number")


def test_a_key_of_many_dots_does_not_take_the_machine_down(tmp_path: Path) -> None:
    path = write(tmp_path, POINT + ".".join(["a"] * 100_000) + " = 1\n")
    done = process("plan", path, cwd=tmp_path, seconds=60, memory=3 << 30)
    no_traceback(done.stderr)
    assert done.returncode == 2
    assert "s.toml:5" in done.stderr


# --- include ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("none.toml", ["none.toml", "No such file"]),
        ("s.toml", ["s.toml", "includes itself"]),
        (".", ["regular file"]),
        ("", ["regular file"]),
        ("/dev/zero", ["/dev/zero", "regular file"]),
        ("other.yaml", ["TOML only"]),
    ],
)
def test_an_include_that_cannot_be_is_named(tmp_path: Path, entry: str, words: list[str]) -> None:
    lines = refused(write(tmp_path, f"include = ['{entry}']\n{HEAD}"))
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]


def test_includes_that_loop_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "include = ['b.toml']\n", "a.toml")
    assert "includes itself" in refused(write(tmp_path, "include = ['a.toml']\n" + HEAD, "b.toml"))[0]


def test_an_include_that_is_no_study_does_not_print_its_content(tmp_path: Path) -> None:
    secret = write(tmp_path, "root:secret:0\n", "secret")
    assert "secret:0" not in "\n".join(refused(write(tmp_path, f"include = ['{secret}']\n{HEAD}")))


def test_a_fault_of_an_included_file_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, "[point]\nvcpus = 2\nthp_enabled = 'x'\n", "base.toml")
    one_fault(write(tmp_path, "include = ['base.toml']\n" + HEAD), "base.toml:3: point.thp_enabled", "madvise")


def test_a_long_chain_of_includes_is_no_loop(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path, f"include = ['c{i + 1}.toml']\n", f"c{i}.toml")
    write(tmp_path, HEAD, "c20.toml")
    assert taken(tmp_path / "c0.toml").study.name == "s"


def test_includes_that_fan_out_end_soon(tmp_path: Path) -> None:
    for i in range(14):
        write(tmp_path, f"include = ['e{i + 1}.toml', 'e{i + 1}.toml', 'e{i + 1}.toml']\n", f"e{i}.toml")
    write(tmp_path, HEAD, "e14.toml")
    assert process("plan", tmp_path / "e0.toml", cwd=tmp_path, seconds=15).returncode in (0, 2)


def test_a_dataset_of_a_study_with_includes_relative_costs_and_overrides_stands_alone(tmp_path: Path, faultsweep: Command) -> None:
    """What `verify` and `explain` read again must be the study that ran, wherever its parts were."""
    write(tmp_path, "[point]\nmemory = '2MiB'\ncosts = 'mine.toml'\n", "base.toml")
    write(tmp_path, (config_root() / "costs" / "default.toml").read_text(), "mine.toml")
    study = write(tmp_path, "include = ['base.toml']\n" + HEAD)
    out = tmp_path / "d"
    status, _, err = faultsweep("run", study, "--executor", "inline", "--out", out, "-q", "--set", "vcpus=2")
    assert status == 0, err
    status, said, err = faultsweep("verify", out, "--recompute", "1")
    assert (status, err) == (0, ""), said


# --- where ------------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "__import__('os')",
    "__import__('os').system('id')",
    "lambda: 1",
    "vcpus.__class__",
    "''.__class__.__mro__",
    "10**10**10",
    "vcpus << 100000000000",
    "[x for x in [1]]",
    "(1 if vcpus else 2)",
    "f'{vcpus}'",
    "(vcpus := 3)",
    "vcpus[0]",
    "{1: 2}",
    "{1}",
    "b'x' == b'x'",
    "None == None",
    "...",
    "1j == 1",
    "*vcpus",
    "open('/etc/passwd')",
    "exec('1')",
    "vcpus = 1",
    "import os",
    "vcpus == 1; vcpus == 2",
    "os == 1",
    "",
    "   ",
    "\\u0000 == 1",
    "1 in [1,",
    "yield vcpus",
    "await vcpus",
    "vcpus @ vcpus",
    "~vcpus",
    "vcpus | 1 == 1",
    "print",
    "__builtins__",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_where_allows_nothing_but_its_list(tmp_path: Path, text: str) -> None:
    one_fault(write(tmp_path, BLOCK + f'where = """{text}"""\n'), "s.toml:6: block.0.where")


@pytest.mark.parametrize("text", ["vcpus is 1", "'\\\\d' == 'x'"])
def test_where_gives_no_python_warnings(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, BLOCK + f'where = """{text}"""\n')
    done = process("plan", path, cwd=tmp_path)
    assert "SyntaxWarning" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "not " * 500 + "True",
        "(" * 900 + "1" + ")" * 900,
        "1" + "+1" * 900,
        "1" * 2001,
        "-" * 1900 + "1",
        "[" * 900 + "]" * 900,
        "a" * 10**6,
    ],
)
def test_long_and_deep_expressions_are_refused_at_once(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, BLOCK + f'where = "{text}"\n')
    start = time.process_time()
    one_fault(path, "s.toml:6: block.0.where")
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text",
    [
        "vcpus < 'a'",
        "1 / 0 == 1",
        "1 % 0 == 1",
        "kernel < 5",
        "kernel == '9.9'",
        "memory >= '1G'",
        "'a' * 3 == 'aaa'",
        "-kernel == 1",
        "vcpus in 3",
        "vcpus in 'abc'",
        "kernel + 1 == 2",
        "memory == 2 * '1MiB'",
        "False",
    ],
)
def test_a_where_that_does_not_fit_its_types_names_the_line(tmp_path: Path, text: str) -> None:
    lines = refused(write(tmp_path, BLOCK + f'where = "{text}"\n'))
    assert len(lines) == 1
    assert lines[0].startswith("s.toml:6: "), lines


@pytest.mark.parametrize("text", ["backing == 'anonymus'", "policy in ['mainlin']", "vcpus == 'a'", "backing in 'anonymous_thp'"])
def test_a_where_that_compares_with_no_value_of_the_parameter_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, BLOCK + f'where = "{text} or vcpus == 1"\n')
    one_fault(path, "s.toml:6: block.0.where")


def test_the_block_whose_where_keeps_nothing_is_named(tmp_path: Path) -> None:
    text = BLOCK + "[[block]]\nwhere = 'vcpus > 4'\n"
    plan = taken(write(tmp_path, text))
    assert any("block.1" in note or "where" in note for note in plan.study.notes), plan.study.notes


# --- Workloads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "field", "words"),
    [
        ("{ op = 'tuch' }", "", ["'tuch'", "did you mean 'touch'"]),
        ("{}", "", ["op", "touch"]),
        ("{ op = 3 }", "", ["3", "touch"]),
        ("3", "", ["3"]),
        ("{ op = 'touch', access = 'wirte' }", ".access", ["'wirte'", "write", "pairs"]),
        ("{ op = 'touch', acess = 'read' }", ".acess", ["did you mean 'access'"]),
        ("{ op = 'touch', range = [0.5, 0.1] }", "", ["range", "0.5", "0.1"]),
        ("{ op = 'touch', range = [0, 2] }", ".range", ["2", "1"]),
        ("{ op = 'touch', range = [nan, 1] }", ".range", ["nan"]),
        ("{ op = 'touch', range = [0] }", ".range", ["missing"]),
        ("{ op = 'touch', every = '0' }", ".every", ["'0'"]),
        ("{ op = 'touch', every = '-4KiB' }", ".every", ["'-4KiB'", "KiB"]),
        ("{ op = 'touch', every = 4096 }", ".every", ["4096", "unit"]),
        ("{ op = 'touch', touches = -1 }", ".touches", ["-1", "0"]),
        ("{ op = 'touch', touches = 1.5 }", ".touches", ["1.5", "integer"]),
        ("{ op = 'touch', theta = nan, order = 'zipf' }", ".theta", ["nan"]),
        ("{ op = 'touch', theta = 9 }", ".theta", ["9", "8"]),
        ("{ op = 'touch', window = 2 }", "", ["window", "pairs"]),
        ("{ op = 'touch', write_percent = 40 }", "", ["write_percent", "mixed"]),
        ("{ op = 'touch', write_percent = 101, access = 'mixed' }", ".write_percent", ["101", "100"]),
        ("{ op = 'touch', read_first = nan }", ".read_first", ["nan"]),
        ("{ op = 'touch', think_ns = -1 }", ".think_ns", ["-1", "0"]),
        ("{ op = 'touch', vcpus = 0 }", ".vcpus", ["0", "1"]),
        ("{ op = 'touch', stride = 0 }", ".stride", ["0", "1"]),
        ("{ op = 'touch_list' }", ".path", ["missing"]),
        ("{ op = 'populate', threads = 0 }", ".threads", ["0", "1"]),
        ("{ op = 'pre_fault', x = 1 }", ".x", ["unknown"]),
        ("{ op = 'vmm_cow', pages = -1 }", ".pages", ["-1", "0"]),
        ("{ op = 'vmm_cow', pages = 99999999999 }", ".pages", ["99999999999", "4294967296"]),
        ("{ op = 'touch', touches = 1000000000000000000000, repeat = true, order = 'random' }", ".touches", []),
        ("{ op = 'touch', stride = 99999999999999999999999, order = 'strided' }", ".stride", []),
        ("{ op = 'touch', every = '999999999999999999TiB' }", ".every", ["16TiB"]),
        ("{ op = 'touch', at = '999999999999999999TiB' }", ".at", ["16TiB"]),
        ("{ op = 'touch', touches = 99999 }", "", ["99999", "512", "repeat"]),
        ("{ op = 'touch', at = '8KiB' }", "", ["at", "every"]),
        ("{ op = 'touch_list', path = 'bad.csv' }", "", ["bad.csv", "gfn"]),
        ("{ op = 'touch_list', path = 'far.csv' }", "", ["far.csv", "99999", "511"]),
        ("{ op = 'forc' }", "", ["forc", "did you mean 'fork'"]),
        ("{ op = 'fork', x = 1 }", ".x", ["unknown"]),
        ("{ op = 'dirty_log', state = 'off_' }", ".state", ["'on'", "'off'", "'get'"]),
        ("{ op = 'dontneed', size = '4KiB' }", "", ["every"]),
        ("{ op = 'dontneed', range = [1.0, 0.5] }", "", ["range"]),
        ("{ op = 'ksm_merge', fraction = 1.1 }", ".fraction", ["1.1"]),
        ("{ op = 'idle', ns = -1 }", ".ns", ["-1"]),
        ("{ op = 'host_touch', access = 'mixed' }", ".access", ["'write'", "'read'"]),
        ("{ op = 'host_touch', every = 0 }", ".every", ["1"]),
        ("{ op = 'touch', theta = 0.5 }", "", ["theta", "zipf"]),
        ("{ op = 'touch', stride = 2 }", "", ["stride", "strided"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else None,
)
def test_a_bad_step_is_named_with_line_and_number(tmp_path: Path, step: str, field: str, words: list[str]) -> None:
    write(tmp_path, "vcpu,gfn,write\n0,x,1\n", "bad.csv")
    write(tmp_path, "vcpu,gfn,write\n0,99999,1\n", "far.csv")
    lines = refused(write(tmp_path, STEPS + f"steps = [{{ op = 'touch' }},\n{step}]\n"))
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"s.toml:8: workload.w.steps.1{field}"), lines[0]
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("text", ["about = 'x'", "steps = []", "steps = 3", "steps = {}"])
def test_a_workload_without_steps_is_refused(tmp_path: Path, text: str) -> None:
    lines = refused(write(tmp_path, STEPS + text + "\n"))
    assert len(lines) == 1
    assert "workload.w.steps: must be a list" in lines[0]


def test_a_pre_fault_step_on_a_kernel_without_it_is_refused(tmp_path: Path) -> None:
    text = STEPS.replace("memory", "kernel = '6.5'\nmemory", 1) + "steps = [{ op = 'pre_fault' }]\n"
    assert "6.11" in refused(write(tmp_path, text))[0]


@pytest.mark.parametrize(
    ("point", "steps", "words"),
    [
        ("backing = 'anonymous_thp'", "{ op = 'child_exit' }", ["child_exit", "fork before"]),
        ("backing = 'anonymous_thp'", "{ op = 'fork' }, { op = 'fork' }", ["fork", "child_exit"]),
        ("backing = 'anonymous_thp'", "{ op = 'dirty_log', state = 'get' }", ["dirty_log", "on"]),
        ("backing = 'anonymous'", "{ op = 'collapse' }", ["collapse", "anonymous_thp"]),
        ("kernel = '6.0'\nbacking = 'anonymous_thp'", "{ op = 'collapse' }", ["collapse", "6.1"]),
        ("backing = 'shmem'", "{ op = 'ksm_merge' }", ["ksm_merge", "private anonymous"]),
        ("mmu = 'shadow'", "{ op = 'pre_fault' }", ["pre_fault", "shadow"]),
        ("backing = 'anonymous_hugetlb_2mb'", "{ op = 'dontneed', every = '2MiB', size = '4KiB' }", ["dontneed", "whole pages"]),
        ("kernel = '5.17'\nbacking = 'anonymous_hugetlb_2mb'", "{ op = 'dontneed' }", ["dontneed", "5.18"]),
        ("memory = '4MiB'", "{ op = 'dontneed', every = '8KiB', size = '16KiB' }", ["size", "every"]),
    ],
)
def test_a_step_that_the_host_would_refuse_is_refused(tmp_path: Path, point: str, steps: str, words: list[str]) -> None:
    text = STEPS.replace("memory", point + "\nmemory", 1) if "memory" not in point else STEPS
    found = refused(write(tmp_path, text + f"steps = [{steps}]\n"))
    assert len(found) == 1, found
    assert "workload.w.steps" in found[0]
    for word in words:
        assert word in found[0], found[0]


@pytest.mark.parametrize(
    "name",
    [
        "none.csv",
        ".",
        "a\\u0000b",
    ],
)
def test_a_touch_list_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    lines = refused(write(tmp_path, STEPS + f'steps = [{{ op = "touch_list", path = "{name}" }}]\n'))
    assert len(lines) == 1
    assert "touch_list" in lines[0]
    assert "cannot be read" in lines[0]


@pytest.mark.parametrize("name", ["/dev/zero", "fifo"])
def test_a_touch_list_that_never_ends_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = write(tmp_path, STEPS + f"steps = [{{ op = 'touch_list', path = '{name}' }}]\n")
    done = process("plan", path, cwd=tmp_path, seconds=15)
    assert done.returncode == 2
    assert "regular file" in done.stderr


# --- Costs: rows 13, 14 -----------------------------------------------------------------------------------------------------


def costs_study(tmp_path: Path, change: Callable[[str], str]) -> Path:
    before = (config_root() / "costs" / "default.toml").read_text()
    after = change(before)
    assert after != before
    write(tmp_path, after, "c.toml")
    return write(tmp_path, POINT + "costs = 'c.toml'\n")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1.5", "true", "'20'", "99999999999999999999", "1000000000001"])
def test_a_cost_that_is_no_count_of_ns_is_refused(tmp_path: Path, value: str) -> None:
    path = costs_study(tmp_path, lambda text: text.replace("value = 20\n", f"value = {value}\n"))
    one_fault(path, "c.toml:7: cost.touch_ns", "ns", "0", "1000000000000")


def test_costs_of_zero_and_out_of_range_warn(tmp_path: Path) -> None:
    path = costs_study(tmp_path, lambda text: text.replace("value = 20\n", "value = 0\n").replace("value = 500\n", "value = 500000\n"))
    notes = "\n".join(taken(path).study.notes)
    assert "cost.touch_ns is 0" in notes
    assert "cost.vm_exit_ns = 500000" in notes
    assert "300 ... 1000" in notes


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("[2, 100]", "[100, 2]", "c.toml:7: cost.touch_ns", ["[100, 2]"]),
        ("[2, 100]", "[2]", "c.toml:7: cost.touch_ns", ["ns"]),
        ("[2, 100]", "[nan, inf]", "c.toml:7: cost.touch_ns", ["nan"]),
        ("value = 20\n", "value = 20\nvalue = 30\n", "c.toml:9", ["twice", "line 8"]),
        ('basis = "guess"', 'bassis = "guess"', "c.toml:7: cost.touch_ns", ["did you mean 'basis'"]),
        ("value = 20\n", "", "c.toml:7: cost.touch_ns", ["value"]),
        ("[2, 100]", "3", "c.toml:7: cost.touch_ns", ["range"]),
        ("[2, 100]", "true", "c.toml:7: cost.touch_ns", ["range"]),
        ('basis = "guess"', "basis = 3", "c.toml:7: cost.touch_ns", ["basis"]),
    ],
)
def test_a_bad_cost_entry_is_named(tmp_path: Path, old: str, new: str, where: str, words: list[str]) -> None:
    one_fault(costs_study(tmp_path, lambda text: text.replace(old, new, 1)), where, *words)


def test_a_cost_without_its_unit_names_the_unit(tmp_path: Path) -> None:
    lines = refused(costs_study(tmp_path, lambda text: text.replace("cost.touch_ns", "cost.touch")))
    assert lines[0].startswith("c.toml:7: cost.touch: ")
    assert "touch_ns" in lines[0]
    lines = refused(costs_study(tmp_path, lambda text: text.replace("cost.touch_ns", "cost.touch_ms")))
    assert "did you mean 'touch_ns'" in lines[0]


def test_a_cost_table_that_is_no_table_is_refused(tmp_path: Path) -> None:
    one_fault(costs_study(tmp_path, lambda _: "cost = 3\n"), "c.toml:1: cost", "table")


def test_all_faults_of_a_cost_file_are_told_at_once(tmp_path: Path) -> None:
    path = costs_study(tmp_path, lambda text: text.replace("value = 20\n", "value = nan\n").replace("[300, 1000]", "[1000, 300]", 1))
    assert [line.split(": ")[1] for line in refused(path)] == ["cost.touch_ns", "cost.vm_exit_ns"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Default", ["'Default'", ".toml"]),
        ("/etc/passwd", ["/etc/passwd", ".toml"]),
        ("/dev/zero", ["/dev/zero", ".toml"]),
        ("../../x", ["../../x"]),
        ("@touch_ns=3", ["''"]),
        ("defualt", ["defualt", "did you mean 'default'"]),
        ("../../x.toml", ["x.toml", "No such file"]),
        ("default@touch=low", ["touch", "did you mean 'touch_ns'"]),
        ("default@touch_ns=99999999999999", ["touch_ns", "low, high"]),
        ("default@touch_ns=3@vm_exit_ns=4", ["low, high"]),
        ("default@", ["default@"]),
    ],
)
def test_costs_that_cannot_be_found_name_the_study_s_line(tmp_path: Path, name: str, words: list[str]) -> None:
    lines = refused(write(tmp_path, POINT + f"costs = '{name}'\n"))
    assert len(lines) == 1
    assert lines[0].startswith("s.toml:5: "), lines[0]
    for word in words:
        assert word in lines[0]


def test_a_cost_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = costs_study(tmp_path, lambda text: text.replace("value = 20\n", "value = 21\n"))
    before = load_study(path).identity()
    write(tmp_path, (tmp_path / "c.toml").read_text().replace("value = 21\n", "value = 22\n"), "c.toml")
    assert load_study(path).identity() != before


# --- The command line -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--executor", "nope"], ["'nope'", "inline", "local", "ray"]),
        (["--workers", "0"], ["--workers", "1"]),
        (["--workers", "x"], ["--workers", "integer"]),
        (["--limit", "-1"], ["--limit", "1"]),
        (["--shard", "0/0"], ["--shard", "i/n"]),
        (["--shard", "4/4"], ["--shard", "4/4"]),
        (["--shard", "1"], ["--shard", "'1'"]),
        (["--shard", "a/b"], ["--shard", "'a/b'"]),
        (["--shard", "\u00b2/3"], ["--shard"]),
        (["--shard", "-1/2"], ["--shard", "-1/2"]),
        (["--on-error", "ignore"], ["--on-error", "continue", "stop"]),
        (["--max-failures", "-1"], ["--max-failures", "0"]),
        (["--set", "vcpus"], ["--set", "PARAMETER=VALUE"]),
        (["--set", "vcpuss=3"], ["vcpuss", "did you mean 'vcpus'"]),
        (["--set", "vcpus=0"], ["point.vcpus", "0"]),
        (["--set", "memory=6KiB"], ["point.memory", "4KiB", "8KiB"]),
        (["--set", "study.name=../x"], ["study.name", "../x"]),
        (["--set", "study.seed=-1"], ["study.seed", "-1"]),
        (["--bogus"], ["--bogus"]),
        (["--limit", "0"], ["--limit"]),
        (["--set", "vcpus.x=3"], ["vcpus.x"]),
        (["--set", "vcpus="], ["--set", "vcpus"]),
        (["--address", "nowhere:1"], ["--address", "ray"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_that_cannot_be_is_refused_and_nothing_is_made(
    tmp_path: Path, faultsweep: Command, flags: list[str], words: list[str]
) -> None:
    study, out = write(tmp_path, POINT), tmp_path / "out"
    status, _, err = faultsweep("run", study, "--executor", "inline", "--out", out, "-q", *flags)
    assert status == 2, err
    no_traceback(err)
    assert len(err.strip().split("\n")) == 1, err
    for word in words:
        assert word in err
    assert not out.exists()


def test_set_takes_any_study_key(tmp_path: Path) -> None:
    assert load_study(write(tmp_path, POINT), ("replicates=3",)).replicates == 3


def test_a_fault_of_an_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert refused(write(tmp_path, POINT + "vcpus = 1\n"), ("vcpus=0",))[0].startswith("--set: ")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["plan", "none.toml"], 2),
        (["run", "none.toml"], 2),
        (["plan"], 2),
        (["nonsense"], 2),
        (["status", "none"], 3),
        (["verify", "none"], 3),
        (["report", "none"], 3),
        (["query", "none", "select 1"], 3),
        (["explain", "none", "00"], 3),
        (["status", "file"], 3),
        (["verify", "x" * 300], 3),
        (["verify", "\n"], 3),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_path_that_is_nothing_ends_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faultsweep: Command, arguments: list[str], status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "", "file")
    found, out, err = faultsweep(*arguments)
    assert found == status, err
    assert not out
    no_traceback(err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("out", "status"),
    [
        ("file", 5),
        ("file/x", 5),
        ("/dev/null", 5),
        ("/proc/none", 5),
        ("holds", 3),
        ("x" * 300, 5),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faultsweep: Command, out: str, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    study = write(tmp_path, POINT)
    write(tmp_path, "", "file")
    (tmp_path / "holds").mkdir()
    write(tmp_path / "holds", "precious", "letter.txt")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    found, _, err = faultsweep("run", study, "--executor", "inline", "--out", out, "-q")
    assert found == status, err
    assert out[:40] in err
    assert "--out" in err
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused_before_any_work(tmp_path: Path, faultsweep: Command) -> None:
    folder = tmp_path / "ro"
    folder.mkdir()
    folder.chmod(0o555)
    status, _, err = faultsweep("run", write(tmp_path, POINT), "--executor", "inline", "--out", folder / "d", "-q")
    assert status == 5
    assert "Permission denied" in err


def test_more_work_than_the_budget_ends_with_4_and_makes_nothing(tmp_path: Path, faultsweep: Command) -> None:
    study = write(tmp_path, HEAD + "budget_cpu_hours = 1e-9\n[point]\nmemory = '2MiB'\n")
    status, _, err = faultsweep("run", study, "--executor", "inline", "--out", tmp_path / "out", "-q")
    assert status == 4
    assert "budget" in err
    assert "--yes" in err
    assert len(err.strip().split("\n")) == 1
    assert not (tmp_path / "out").exists()


def test_more_memory_than_there_is_ends_with_5_and_both_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faultsweep: Command
) -> None:
    monkeypatch.setattr("sweep.runner.available_bytes", lambda: 1000)
    status, _, err = faultsweep("run", write(tmp_path, POINT), "--executor", "inline", "--out", tmp_path / "out", "-q")
    assert status == 5
    assert "1000 B" in err
    assert "memory" in err
    assert not (tmp_path / "out").exists()


def test_a_disk_too_small_ends_with_5_and_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faultsweep: Command) -> None:
    monkeypatch.setattr("sweep.runner.shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 10})())
    status, _, err = faultsweep("run", write(tmp_path, POINT), "--executor", "inline", "--out", tmp_path / "out", "-q")
    assert status == 5
    assert "10 B" in err
    assert "--out" in err
    assert not (tmp_path / "out").exists()


def test_the_process_says_every_fault_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    study = write(tmp_path, POINT + "vcpus = 0\nthp_enabled = 'x'\n")
    for arguments in (["plan", "s.toml"], ["run", "s.toml", "--executor", "inline"]):
        done = process(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        lines = done.stderr.strip().split("\n")
        assert [line.split(": ")[0] for line in lines] == ["s.toml:5", "s.toml:6"]
        no_traceback(done.stderr)
    assert list(tmp_path.iterdir()) == [study]


def test_a_flag_is_refused_by_the_process_in_one_line(tmp_path: Path) -> None:
    done = process("run", "none.toml", "--workers", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().split("\n")) == 1


def test_a_full_standard_output_is_no_traceback(dataset: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sweep", "query", str(dataset), "select 1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    no_traceback(done.stderr)
    assert done.returncode == 5


# --- Datasets: rows 28, 39, 43; SQL -----------------------------------------------------------------------------------------


def test_markup_in_a_title_comes_out_escaped(dataset: Path, faultsweep: Command) -> None:
    status, _, err = faultsweep("report", dataset)
    assert status == 0, err
    page = (dataset / "report" / "index.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in page


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('/etc/passwd')",
        "select * from '/etc/passwd'",
        "select content from read_text('/etc/passwd')",
        "select * from glob('/etc/*')",
        "select * from read_parquet('points/*.parquet')",
        "copy points to 'evil.csv'",
        "copy (select 1) to '/dev/stdout'",
        "export database 'evil'",
        "attach 'evil.db'",
        "attach ':memory:' as m; copy points to 'evil.csv'",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "create persistent secret s (type s3, key_id 'a')",
        "import database '/etc'",
        "insert into points select * from points",
        "delete from points",
        "update points set exits = 0",
        "selec 1",
        "select * from nope",
        "",
        ";",
        "-- nothing",
        "select 1; select 2",
    ],
)
def test_sql_that_is_no_query_over_the_tables_is_refused(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        open_dataset(dataset).sql(sql)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_query_json_is_json(dataset: Path, faultsweep: Command) -> None:
    import json

    def strict(text: str) -> object:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    assert strict(faultsweep("query", dataset, "select 1 a", "--format", "json")[1]) == [{"a": 1}]
    strict(faultsweep("query", dataset, "select 'nan'::double a", "--format", "json")[1])


def test_an_unknown_format_is_refused(dataset: Path, faultsweep: Command) -> None:
    status, out, err = faultsweep("query", dataset, "select 1", "--format", "xml")
    assert (status, out) == (2, "")
    assert "table, csv, json or parquet" in err or "table, csv, json, parquet" in err


@pytest.mark.parametrize("point", ["", "zz", "0" * 33, "%", "../x"])
def test_a_point_that_is_not_there_is_refused(dataset: Path, faultsweep: Command, point: str) -> None:
    status, out, err = faultsweep("explain", dataset, point)
    assert (status, out) == (2, "")
    assert repr(point) in err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("study.json", "{"),
        ("sealed.json", "{"),
        ("commits/x.json", "{"),
        ("commits/x.json", '{"parts": [{"table": "points", "name": "../../x.parquet", "rows": 1, "bytes": 1, "sha256": "x"}]}'),
        ("commits/x.json", '{"parts": [{}]}'),
        ("study.json", "\x00\x00"),
        ("study.json", "[]"),
        ("study.json", "{}"),
        ("sealed.json", '{"parts": 3}'),
        ("commits/x.json", "{}"),
        ("commits/x.json", "[1]"),
        ("sealed.json", "[]"),
    ],
)
def test_a_damaged_record_ends_with_3_and_its_name(dataset: Path, tmp_path: Path, faultsweep: Command, file: str, content: str) -> None:
    import shutil

    copy = tmp_path / "d"
    shutil.copytree(dataset, copy)
    (copy / file).write_text(content)
    for command_name in ("status", "verify"):
        try:
            status, _, err = faultsweep(command_name, copy)
        except (TypeError, KeyError, AttributeError) as error:
            pytest.fail(f"{command_name}: {type(error).__name__}: {error}")
        if file == "study.json" and command_name == "verify":
            continue
        assert status == 3, err
        assert file.partition("/")[0].removesuffix("s") in err or "commit" in err


@pytest.mark.parametrize("table", ["points", "steps"])
@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_a_damaged_part_is_named_and_the_next_run_makes_it_anew(
    dataset: Path, tmp_path: Path, faultsweep: Command, table: str, how: str
) -> None:
    import shutil

    copy = tmp_path / "d"
    shutil.copytree(dataset, copy)
    digest = (copy / "sealed.json").read_text()
    part = next((copy / table).glob("*.parquet"))
    content = bytearray(part.read_bytes())
    if how == "flip":
        content[len(content) // 3] ^= 0xFF
        part.write_bytes(content)
    elif how == "cut":
        part.write_bytes(content[: len(content) // 2])
    else:
        part.unlink()
    status, out, _ = faultsweep("verify", copy)
    assert status == 3
    assert part.name in out
    status, _, err = faultsweep("run", copy / "study.toml", "--executor", "inline", "--out", copy, "-q")
    assert status == 0, err
    assert faultsweep("verify", copy)[0] == 0
    assert (copy / "sealed.json").read_text() == digest


def test_verify_names_parts_that_no_commit_knows_and_wrong_digests(dataset: Path, tmp_path: Path, faultsweep: Command) -> None:
    import shutil

    copy = tmp_path / "d"
    shutil.copytree(dataset, copy)
    text = (copy / "sealed.json").read_text()
    (copy / "sealed.json").write_text(re.sub(r'("root_digest": ")....', r"\1xxxx", text))
    assert faultsweep("verify", copy)[0] == 3
    (copy / "sealed.json").write_text(text)
    part = next((copy / "points").glob("*.parquet"))
    shutil.copy(part, part.with_name("part-extra.parquet"))
    assert faultsweep("verify", copy)[0] == 3


def test_another_study_in_the_same_folder_is_refused_with_both_digests(dataset: Path, tmp_path: Path, faultsweep: Command) -> None:
    for text, words in (
        (POINT.replace('"s"', '"other"'), ["name", "other"]),
        (POINT.replace("[point]", "seed = 9\n[point]"), ["seed", "9"]),
    ):
        status, _, err = faultsweep("run", write(tmp_path, text), "--executor", "inline", "--out", dataset, "-q")
        assert status == 3
        assert len(err.strip().split("\n")) == 1
        for word in [*words, "--new-version", "--out"]:
            assert word in err


def test_errors_know_their_status() -> None:
    statuses = {kind.__name__: kind.exit_status for kind in FaultsweepError.__subclasses__()}
    assert statuses["StudyError"] == statuses["UsageError"] == 2
    assert statuses["DatasetError"] == 3
    assert statuses["BudgetExceededError"] == 4
    assert statuses["EnvironmentProblemError"] == 5
