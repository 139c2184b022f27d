"""Lines to and from the litmus program: cases in, counts out, and what a bad console does to them."""

import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.errors import EnvironmentProblemError, UsageError
from sweep.host import litmus
from sweep.host.case import Access, AccessList, Case
from sweep.host.litmus import build, clean, encode, parse
from sweep.host.live import expand
from sweep.parameters import Point
from sweep.steps import STEP


def case_of(*steps: Any, **point: Any) -> Case:
    specs = tuple(step if isinstance(step, AccessList) else STEP.validate_python(step) for step in steps)
    return Case("t", Point.model_validate({"memory": "4MiB", **point}), specs)


def line(text: str) -> str:
    return f"{text} *{zlib.crc32(text.encode()):08x}"


def output(*texts: str) -> str:
    return "\r\n".join(line(text) for text in texts)


WHOLE = output(
    "fs1 kernel release=6.12.1 npt=Y",
    "fs1 base 0 pf_taken=1 pages_4k=20",
    "fs1 step 0 0 pf_taken=513 pages_4k=532 rss=2097152 anon_huge=0 private_hugetlb=0",
    "fs1 end 0 1",
    "fs1 done 1",
)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"op": "touch"}, "touch 0 w0+1024"),
        ({"op": "touch", "access": "read", "every": "2MiB", "at": "1MiB"}, "touch 0 r256+2*512"),
        ({"op": "touch", "access": "pairs", "range": [0.5, 1.0]}, "touch 0 p512+512"),
        ({"op": "host_touch", "access": "read", "every": "12KiB"}, "host r0+342*3"),
        ({"op": "populate", "access": "read"}, "populate r"),
        ({"op": "dontneed", "every": "2MiB", "at": "28KiB", "size": "4KiB"}, "dontneed 7 1 512 2"),
        ({"op": "dontneed"}, "dontneed 0 1024 0 1"),
        ({"op": "dontneed", "range": [0.5, 0.5]}, "dontneed 0 0 0 0"),
        ({"op": "collapse", "range": [0.5, 1.0]}, "collapse 512 512"),
        ({"op": "dirty_log", "state": "get"}, "log get"),
        (AccessList((Access(0, 3, False), Access(0, 3, True), Access(0, 9, True))), "touch 0 r3,w3,w9"),
    ],
)
def test_a_step_is_one_part_of_the_line(step: Any, text: str) -> None:
    assert encode(7, case_of(step)) == f"case 7 anonymous 1024 0 2m 1 ; {text}"


def test_vcpus_get_their_slices_and_their_own_lists() -> None:
    assert encode(0, case_of({"op": "touch"}, vcpus=3)).endswith("touch 0 w0+341 1 w341+341 2 w682+342")
    shared = case_of(AccessList((Access(1, 5, True), Access(0, 6, False), Access(1, 7, False))), vcpus=2)
    assert encode(0, shared).endswith("touch 0 r6 1 w5,r7")


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        ({"op": "touch", "order": "random"}, "use a list"),
        ({"op": "touch", "access": "mixed"}, "use a list"),
        ({"op": "touch", "every": "100B"}, "whole pages"),
        ({"op": "ksm_merge"}, "not run on a real kernel"),
        ({"op": "dontneed", "every": "3MiB", "size": "2MiB"}, "shorter than the others"),
    ],
)
def test_what_the_program_cannot_do_is_refused_with_the_cause(step: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        encode(0, case_of(step))


@given(st.lists(st.tuples(st.sampled_from("rwp"), st.integers(0, 50), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_both_programs_read_a_list_alike(parts: list[tuple[str, int, int, int]]) -> None:
    text = ",".join(f"{kind}{first}+{count}*{stride}" for kind, first, count, stride in parts)
    wanted = []
    for kind, first, count, stride in parts:
        for page in range(first, first + count * stride, stride):
            wanted += [(page, write) for write in {"r": [False], "w": [True], "p": [False, True]}[kind]]
    assert expand(text) == wanted


def test_counts_come_back_less_what_an_empty_step_costs() -> None:
    found = parse(WHOLE)
    assert found.done
    assert found.kernel["release"] == "6.12.1"
    assert found.torn == 0
    counts = clean(case_of({"op": "touch"}), found.cases[0])
    assert counts == [{"pf_taken": 512, "pages_4k": 512, "rss_bytes": 2 << 20, "anon_huge_bytes": 0, "held_bytes": 2 << 20}]


def test_a_call_of_the_vmm_costs_no_way_out_of_the_guest() -> None:
    text = output("fs1 base 0 pf_taken=1 pages_4k=20", "fs1 step 0 0 pf_taken=0 pages_4k=20", "fs1 end 0 1")
    assert clean(case_of({"op": "fork"}), parse(text).cases[0]) == [{"pf_taken": 0, "pages_4k": 0}]


@given(st.data())
def test_no_damage_to_the_console_changes_a_count(data: st.DataObject) -> None:
    """Bytes changed, cut out or put in between: what is read is what was sent, or nothing."""
    at = data.draw(st.integers(0, len(WHOLE)))
    length = data.draw(st.integers(0, 12))
    noise = data.draw(st.text(alphabet="0123456789 =*fs\r\nx[]", max_size=12))
    whole, found = parse(WHOLE), parse(WHOLE[:at] + noise + WHOLE[at + length :])
    for number, case in found.cases.items():
        assert number in whole.cases
        assert case.base in ({}, whole.cases[0].base)
        assert all(whole.cases[0].steps.get(n) == step for n, step in case.steps.items())
        assert case.ended in (None, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fs1",
        "fs1 step",
        "fs1 step 0 0 pf_taken=1 *deadbeef",
        line("fs1 step x y pf_taken=1"),
        line("fs1 step 0 0 pf_taken=one"),
        line("fs1 step 0"),
        line("fs1 end 0 "),
        line("fs1 unheard of"),
        "[    1.0] BUG: fs1 in a kernel's message",
        "\0\x1b[2Jfs1 end 0 1",
    ],
)
def test_hostile_lines_are_no_results(text: str) -> None:
    found = parse(f"{text}\n{WHOLE}")
    assert found.cases[0].steps == parse(WHOLE).cases[0].steps
    assert set(found.cases) == {0}


@pytest.mark.parametrize("lost", ["fs1 base", "fs1 step", "fs1 end"])
def test_a_lost_line_fails_the_case(lost: str) -> None:
    text = "\n".join(row for row in WHOLE.split("\r\n") if not row.startswith(lost))
    with pytest.raises(ValueError, match="lines are missing"):
        clean(case_of({"op": "touch"}), parse(text).cases[0])


def test_what_the_program_says_of_a_failure_is_passed_on() -> None:
    found = parse(output("fs1 fail 3 mapping anonymous_hugetlb_2mb: Cannot allocate memory", "fs1 late 4", "fs1 trouble BUG: bad page"))
    with pytest.raises(ValueError, match="Cannot allocate memory"):
        clean(case_of({"op": "touch"}), found.cases[3])
    assert found.cases[4].late
    assert found.trouble == ["BUG: bad page"]


def test_without_a_compiler_the_message_names_the_cure(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(EnvironmentProblemError, match="apt-get install gcc libc6-dev"):
        build(tmp_path)


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'litmus.c:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setattr(litmus, "COMPILERS", ())
    with pytest.raises(EnvironmentProblemError, match="no such thing"):
        build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
