"""Random cases and how one that differs is made shorter, with kernels that have a bug on purpose."""

import pytest

from sweep.host.case import Access, AccessList, Case, faults_of, predict
from sweep.host.draw import random_case, random_cases
from sweep.host.litmus import encode
from sweep.host.shrink import shrink, size_of, smaller
from sweep.host.suite import suite
from sweep.host.validate import ValidateOptions, ask
from sweep.parameters import Point
from sweep.steps import STEP
from tests.fake_kernel import Counts, FakeKernel


def writes_after_reads(case: Case, counts: Counts) -> None:
    """A kernel that counts one fault more where a page of 512 ... 519 is written after page 3 was read, in any step."""
    seen = False
    for step, found in zip(case.steps, counts, strict=True):
        for access in step.accesses if isinstance(step, AccessList) else ():
            seen = seen or (access.page == 3 and not access.write)
            if seen and access.write and 512 <= access.page < 520:
                found["pf_fixed"] += 1


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.3"])
def test_random_cases_can_all_be_run_and_are_the_same_for_a_seed(kernel: str) -> None:
    cases = list(random_cases(60, 5, kernel, "tdp"))
    assert [str(case) for case in cases] == [str(case) for case in random_cases(60, 5, kernel, "tdp")]
    assert [str(case) for case in cases] != [str(case) for case in random_cases(60, 6, kernel, "tdp")]
    for case in cases:
        assert not faults_of(case), str(case)
        assert encode(0, case).startswith("case 0 ")
        assert len(predict(case)) == len(case.steps) >= 1
    assert {step.op for case in cases for step in case.steps} >= {"touch", "touch_list", "fork", "dontneed", "populate", "dirty_log"}


def test_without_a_guest_no_step_needs_one() -> None:
    guest = {"touch", "touch_list", "dirty_log", "pre_fault"}
    assert not guest & {step.op for case in random_cases(60, 1, "6.12", "tdp", with_guest=False) for step in case.steps}


def test_every_cut_is_smaller_and_can_be_run() -> None:
    for number in range(20):
        case = random_case(3, number, "6.12", "tdp")
        for cut in smaller(case):
            assert size_of(cut) < size_of(case), (str(cut), str(case))
            assert not faults_of(cut)
            assert encode(0, cut)


def test_a_bug_of_two_accesses_is_shrunk_to_these_two() -> None:
    noise = tuple(Access(0, page, page % 3 == 0) for page in range(20, 60))
    long = (*noise, Access(0, 3, False), *noise, Access(0, 515, True), *noise)
    steps = (STEP.validate_python({"op": "populate"}), AccessList(long), STEP.validate_python({"op": "touch"}))
    kernel = FakeKernel(writes_after_reads)
    case = Case("random/0/0", Point.model_validate({"memory": "8MiB", "backing": "anonymous", "offset": "4KiB"}), steps)
    found = shrink(kernel.run([case])[0], kernel.run)
    assert [str(step) for step in found.case.steps] == ["0:r3 0:w515"]
    assert (found.case.pages, found.case.point.offset) == (1024, 0)
    assert [(row.counter, row.real - row.predicted) for row in found.wrong] == [("pf_fixed", 1)]
    assert len(kernel.batches) <= 25


def test_a_step_that_touches_everything_is_shrunk_to_the_page_that_matters() -> None:
    def bug(case: Case, counts: Counts) -> None:
        for step, found in zip(case.steps, counts, strict=True):
            pages = (
                {a.page for a in step.accesses} if isinstance(step, AccessList) else set(range(case.pages)) if step.op == "touch" else ()
            )
            found["pgfault"] += 77 in pages

    kernel = FakeKernel(bug)
    case = next(case for case in suite("6.12") if case.name == "anonymous/log_before")
    found = shrink(kernel.run([case])[0], kernel.run)
    assert [str(step) for step in found.case.steps] in (["0:r77"], ["0:w77"])


def test_the_command_runs_random_cases_and_shows_the_shortest() -> None:
    def bug(case: Case, counts: Counts) -> None:
        for step, found in zip(case.steps, counts, strict=True):
            found["pf_fixed"] += step.op == "fork"

    layer = ask(FakeKernel(bug), ValidateOptions(random=40, seed=2), predict)
    differing = [result for result in layer.results if result.wrong]
    assert len(layer.results) == 40
    assert differing
    assert [step.op for step in differing[0].case.steps] == ["fork"]
    assert any("more random cases differ" in note for note in layer.notes)
