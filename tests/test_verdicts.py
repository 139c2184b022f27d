"""Verdicts: which counters must be equal, why some need not be, and what the command ends with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweep.errors import DatasetError, UsageError
from sweep.host.case import Case, predict
from sweep.host.compare import RULES, Verdict, compare, value_of, within
from sweep.host.litmus import Measured
from sweep.host.result import LayerResult, agreement, dataset_of, read_dataset, write_dataset
from sweep.host.suite import SHORT, host_suite, short_suite, suite
from sweep.host.target import judge, least, model_kernel
from sweep.host.validate import ValidateOptions, Validation, ask, validate
from tests.fake_kernel import FakeKernel, measured_like


def named(name: str, kernel: str = "6.12", mmu: str = "tdp") -> Case:
    return next(case for case in suite(kernel, mmu) if case.name == name)


def changed(case: Case, step: int, **more: int) -> Any:
    counts = [dict(found) for found in predict(case)]
    for name, value in more.items():
        counts[step][name] += value
    return compare(case, counts, predict(case))


def test_a_kernel_that_counts_as_the_model_is_equal_in_every_counter() -> None:
    case = named("thp/log_after")
    found = compare(case, predict(case), predict(case))
    assert found.verdict == Verdict.EQUAL
    assert {row.verdict for row in found.rows} == {Verdict.EQUAL}
    assert {row.counter for row in found.rows} == set(RULES) - {"pagemap_rss_bytes", "pagemap_huge_bytes"}


@pytest.mark.parametrize("counter", ["pf_fixed", "pgfault", "invalidate_range_start", "thp_split_pmd", "pages_4k", "rss_bytes"])
def test_one_count_too_many_differs(counter: str) -> None:
    found = changed(named("thp/read_then_write"), 1, **{counter: 1})
    assert found.verdict == Verdict.DIFFERS
    assert [(row.step, row.counter, row.real - row.predicted) for row in found.wrong] == [(1, counter, 1)]


def test_spurious_faults_are_taken_off_before_faults_are_compared() -> None:
    case = named("anonymous/write")
    assert changed(case, 0, pf_spurious=2, pf_taken=2).verdict == Verdict.EQUAL
    assert changed(case, 0, pf_taken=2).verdict == Verdict.DIFFERS


def test_retries_of_two_vcpus_are_free_with_a_reason_and_everything_else_is_not() -> None:
    case = named("anonymous_two_vcpus/read_then_write")
    found = changed(case, 1, pf_taken=900)
    assert found.verdict == Verdict.EQUAL
    assert [row.reason for row in found.rows if row.verdict == Verdict.FREE] == ["retries of several vCPUs depend on time"]
    assert changed(case, 1, pf_fixed=1).verdict == Verdict.DIFFERS


@pytest.mark.parametrize(("more", "verdict"), [(3, Verdict.EQUAL), (4, Verdict.DIFFERS), (-1, Verdict.DIFFERS)])
def test_a_zap_may_flush_three_times_more_and_never_less(more: int, verdict: Verdict) -> None:
    assert changed(named("anonymous/dontneed"), 1, remote_tlb_flush_requests=more).verdict == verdict
    assert changed(named("anonymous/write"), 0, remote_tlb_flush_requests=1).verdict == Verdict.DIFFERS


@pytest.mark.parametrize(
    ("more", "alone", "verdict"), [(1, True, Verdict.DIFFERS), (7, False, Verdict.EQUAL), (-1, False, Verdict.DIFFERS)]
)
def test_machine_wide_counters_may_be_more_on_a_host_with_others(more: int, alone: bool, verdict: Verdict) -> None:
    case = named("thp/write")
    counts = [dict(step) for step in predict(case)]
    counts[0]["thp_fault_alloc"] += more
    assert compare(case, counts, predict(case), alone).verdict == verdict


def test_what_a_child_or_the_page_cache_holds_is_free_only_after_it_could() -> None:
    case = named("shmem/dontneed")
    assert changed(case, 0, held_bytes=4096).verdict == Verdict.DIFFERS
    assert changed(case, 2, held_bytes=4096).verdict == Verdict.EQUAL


def test_values_of_case_files() -> None:
    assert value_of({"pf_taken": 7, "pf_spurious": 2}, "pf_taken_less_spurious") == 5
    assert within(3, 3)
    assert within(3, [2, 3])
    assert not within(4, [2, 3])


def test_a_case_without_all_its_steps_fails() -> None:
    case = named("thp/read_then_write")
    assert compare(case, predict(case)[:1], predict(case)).verdict == Verdict.FAILED
    assert judge(case, None, predict).verdict == Verdict.FAILED
    assert judge(case, Measured(failure="ended by signal 9"), predict).reason == "ended by signal 9"
    assert judge(case, Measured(late=True), predict).verdict == Verdict.LEFT_OUT


def test_a_host_without_huge_pages_is_no_difference() -> None:
    case = named("thp/write")
    measured = measured_like(case, predict(case))
    measured.steps[0] = {**measured.steps[0], "thp_fault_fallback": 1, "thp_fault_alloc": 3}
    found = judge(case, measured, predict)
    assert (found.verdict, "no huge page free" in found.reason) == (Verdict.LEFT_OUT, True)


def test_repetitions_on_a_live_host_count_the_least() -> None:
    case = named("thp/write")
    runs = []
    for extra in (5, 0, 2):
        measured = measured_like(case, predict(case))
        measured.steps[0] = {**measured.steps[0], "thp_fault_alloc": measured.steps[0]["thp_fault_alloc"] + extra}
        runs.append(measured)
    runs.append(Measured(failure="ended by signal 9"))
    assert judge(case, least(case, runs), predict).verdict == Verdict.EQUAL
    assert judge(case, least(case, runs[-1:]), predict).verdict == Verdict.FAILED


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.18", "7.3"])
@pytest.mark.parametrize("mmu", ["tdp", "legacy", "shadow"])
def test_the_short_form_has_its_twenty_cases_everywhere(kernel: str, mmu: str) -> None:
    assert tuple(case.name for case in short_suite(kernel, mmu)) == SHORT
    assert len(SHORT) == 20
    assert len(list(suite(kernel, mmu))) >= 280
    assert len(list(host_suite(kernel))) >= 140


def test_a_wrong_prediction_ends_with_1_and_names_counter_and_case() -> None:
    def wrong(case: Case) -> list[dict[str, int]]:
        counts = predict(case)
        if case.name == "thp/fork":
            counts[3]["pf_fixed"] += 1
        return counts

    layer = ask(FakeKernel(), ValidateOptions(), wrong)
    found = Validation([layer])
    assert found.exit_status == 1
    assert layer.count(Verdict.DIFFERS) == 1
    assert layer.count(Verdict.EQUAL) == 19
    text = found.as_text()
    assert "thp/fork: differs" in text
    assert "pf_fixed" in text
    assert "20 cases, 19 exact" in text
    assert found.as_json()["layers"][0]["bad"][0]["rows"][0]["counter"] == "pf_fixed"


def test_a_right_prediction_ends_with_0() -> None:
    assert Validation([ask(FakeKernel(), ValidateOptions(), predict)]).exit_status == 0


def test_a_layer_that_was_named_must_run_and_another_need_not() -> None:
    ran = ask(FakeKernel(), ValidateOptions(everything=True, only="^thp/write$"), predict)
    skipped = LayerResult("kvm", "", "none", {}, skipped="no /dev/kvm on this machine", asked=False)
    assert Validation([ran, skipped]).exit_status == 0
    assert Validation([ran, LayerResult("boot", "6.1", "tdp", {}, skipped="no mirror")]).exit_status == 5
    assert Validation([skipped]).exit_status == 5
    assert "skipped: no /dev/kvm on this machine" in Validation([skipped]).as_text()


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"layers": ["kvmm"]}, "memory, kvm, boot are there"),
        ({"mmus": ["ept"]}, "tdp, legacy, shadow"),
        ({"boot": ["6.12; rm"]}, "a version like 6.1"),
        ({"random": -1}, "--random"),
        ({"memory": "2G"}, "--memory"),
        ({"only": "("}, "--only"),
        ({"image": Path("/nowhere/vmlinuz")}, "no such file"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        validate(ValidateOptions(**options))


@pytest.mark.parametrize(
    ("release", "kernel"), [("6.18.44-fc-v669", "6.18"), ("6.1.0-56-cloud-amd64", "6.1"), ("5.15.0-91-generic", "5.15"), ("99.1.0", "7.3")]
)
def test_a_release_chooses_the_regime(release: str, kernel: str) -> None:
    found, note = model_kernel(release)
    assert found == kernel
    assert bool(note) == (release == "99.1.0")


def test_the_dataset_holds_host_counts_and_verdicts_and_notices_damage(tmp_path: Path) -> None:
    def wrong(case: Case) -> list[dict[str, int]]:
        counts = predict(case)
        counts[0]["pgfault"] += case.name == "thp/fork"
        return counts

    layer = ask(FakeKernel(), ValidateOptions(), wrong)
    folder = tmp_path / "made"
    write_dataset(dataset_of([layer], {"date": "2026-01-01"}), folder)
    tables = read_dataset(folder).tables
    cases = tables["cases"].to_pandas()
    counts = tables["counts"].to_pandas()
    assert len(cases) == 20
    assert set(cases.verdict) == {"equal", "differs"}
    assert counts[counts.verdict == "differs"][["case", "step", "counter"]].to_numpy().tolist() == [["thp/fork", 0, "pgfault"]]
    assert len(counts) == sum(len(result.rows) for result in layer.results)
    assert "| 6.12.0-fake | booted | TDP MMU | 20 | 19 |" in agreement(tables["cases"])
    right = ask(FakeKernel(), ValidateOptions(only="^thp/fork$"), predict)
    other = replace(right, mmu="legacy")
    skipped = replace(right, mmu="legacy", host={}, results=(), skipped="no mirror")
    write_dataset(dataset_of([skipped], {"date": "2026-01-01"}), folder)
    assert [host["skipped"] for host in read_dataset(folder).hosts] == ["", "no mirror"]
    write_dataset(dataset_of([right, other], {"date": "2026-01-02"}), folder)  # the same kernel: replaced; another: added
    again = read_dataset(folder)
    assert [(host["mmu"], host["about"]["date"]) for host in again.hosts] == [("tdp", "2026-01-02"), ("legacy", "2026-01-02")]
    assert again.tables["cases"]["verdict"].to_pylist() == ["equal", "equal"]
    damaged = folder / "counts.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"x" + damaged.read_bytes()[-8:])
    with pytest.raises(DatasetError, match=r"counts\.parquet: does not match"):
        read_dataset(folder)
    with pytest.raises(DatasetError, match="no validation dataset"):
        read_dataset(tmp_path / "none")
