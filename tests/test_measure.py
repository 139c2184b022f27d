"""Measuring a machine: figures from runs, costs from figures, runs that count for nothing, and one small measurement of this machine."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import sweep
from kernels.cost import Cost
from kernels.jit import PYTHON_ONLY
from kernels.spec import PMD_BYTES
from sweep.calibrate import CalibrateOptions, calibrate
from sweep.configs import CostFile, config_root, load_costs
from sweep.cost_text import cost_toml
from sweep.errors import UsageError
from sweep.measure import sampling, small_process
from sweep.measure.costs import RECIPES, UNTOLD, Derivation, cost_file, whole
from sweep.measure.figures import Figure, Quantity, combined, figure_of
from sweep.measure.loops import PAGE
from sweep.measure.machine import cpus, pinned
from sweep.measure.memory import clearing_and_copying, memory_probes
from sweep.measure.processes import forks, guest_exits, guest_faults, process_probes
from sweep.measure.region import POPULATE_WRITE, Region, timed
from sweep.measure.run import NO_COSTS, MeasureOptions
from sweep.measure.sampling import MIN_RUNS, RUNS, DiscardedRunError, Probe, Sample, UnavailableError, sampled
from sweep.measure.small_process import run_script
from sweep.measure.threads import line_ns, thread_probes
from sweep.runner import RunOptions
from tests.conftest import Command

ABOUT = {"machine": "a machine", "method": "as told", "date": "2026-11-23", "source": "a test"}
SPREAD = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)  # quartiles: -3 and 3


def base() -> CostFile:
    return load_costs("default", config_root())


def sample(value: float) -> Sample:
    """Seven runs: quartiles 3 below and above `value`."""
    return Sample([value + part for part in SPREAD])


def derived(**given: float | Sample) -> Derivation:
    """Every quantity at 1000 ns, but those that are given by name."""
    samples = {quantity: sample(1000.0) for quantity in Quantity}
    for name, value in given.items():
        samples[Quantity[name]] = value if isinstance(value, Sample) else sample(value)
    return Derivation(base(), samples)


# --- figures


def test_a_figure_is_the_median_with_the_quartiles_whatever_outliers_do() -> None:
    assert figure_of([5, 1, 3, 2, 4]) == Figure(3, 2, 4)
    assert figure_of([100.0] * 21 + [1e9] * 6) == Figure(100, 100, 100)


def test_spreads_add_as_independent_errors_and_a_difference_swaps_their_ends() -> None:
    total, part = Figure(100, 96, 101), Figure(40, 38, 43)
    difference = combined([(1, total), (-1, part)])
    assert difference.value == 60
    assert difference.low == pytest.approx(60 - math.hypot(4, 3))
    assert difference.high == pytest.approx(60 + math.hypot(1, 2))
    assert combined([(512, part)]) == Figure(512 * 40, 512 * 38, 512 * 43)
    assert combined([(1, part)]) == part


def test_a_lock_line_is_found_again_from_the_times_that_the_model_would_give() -> None:
    for alone, move, threads in ((500, 100, 2), (500, 100, 5), (180, 250, 2), (180, 40, 16), (1, 1000, 64)):
        together = max(alone + move, threads * move)  # nobody waits, or all wait in turn
        assert line_ns(alone, together, threads) == pytest.approx(move), (alone, move, threads)


# --- runs


class Clock:
    """Goes on by what the probes say that they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def probe(clock: Clock, log: list[str], quantity: Quantity, seconds: float, *answers: float | Exception) -> Probe:
    """Gives the answers in turn, again and again, each after so many seconds."""

    def run() -> Mapping[Quantity, float]:
        answer = answers[log.count(quantity.name) % len(answers)]
        log.append(quantity.name)
        clock.now += seconds
        if isinstance(answer, Exception):
            raise answer
        return {quantity: answer}

    return Probe((quantity,), run)


def test_kinds_of_runs_alternate_until_each_has_enough() -> None:
    clock, log = Clock(), list[str]()
    samples = sampled([probe(clock, log, Quantity.CLEAR, 1, 1, 2, 3), probe(clock, log, Quantity.COPY, 1, 7)], clock, 1e9)
    assert log == ["CLEAR", "COPY"] * RUNS
    assert samples[Quantity.CLEAR].runs[:4] == [1, 2, 3, 1]
    assert samples[Quantity.COPY].figure() == Figure(7, 7, 7)


def test_no_run_begins_after_the_time_and_too_few_runs_give_no_figure() -> None:
    clock, log = Clock(), list[str]()
    samples = sampled([probe(clock, log, Quantity.CLEAR, 1, 5), probe(clock, log, Quantity.COPY, 9, 5)], clock, 61)
    assert clock.now == 61
    assert log == ["CLEAR", "COPY"] * 6 + ["CLEAR"]
    assert samples[Quantity.CLEAR].figure() == Figure(5, 5, 5)
    assert samples[Quantity.COPY].figure() is None
    assert samples[Quantity.COPY].reason() == "6 of 7 runs in the time there was"


def test_a_discarded_run_is_tried_again_and_told_and_what_cannot_be_is_tried_once() -> None:
    clock, log = Clock(), list[str]()
    samples = sampled(
        [
            probe(clock, log, Quantity.CLEAR, 1, 5, DiscardedRunError("3 minor faults where 2 were meant")),
            probe(clock, log, Quantity.COPY, 1, DiscardedRunError("never well")),
            probe(clock, log, Quantity.SPLIT, 1, UnavailableError("huge pages are off")),
        ],
        clock,
        1e9,
    )
    assert samples[Quantity.CLEAR].runs == [5] * RUNS
    assert samples[Quantity.CLEAR].discarded == {"3 minor faults where 2 were meant": RUNS - 1}
    assert log.count("COPY") == sampling.MAX_TRIES
    assert samples[Quantity.COPY].figure() is None
    assert samples[Quantity.COPY].reason() == f"{sampling.MAX_TRIES} of {sampling.MAX_TRIES} runs discarded: never well"
    assert log.count("SPLIT") == 1
    assert samples[Quantity.SPLIT].reason() == "huge pages are off"


# --- costs


def test_every_cost_is_made_of_something_timed_or_says_why_it_cannot_be() -> None:
    assert set(RECIPES) | set(UNTOLD) == set(Cost)
    assert not set(RECIPES) & set(UNTOLD)
    used = {term.of for recipes in RECIPES.values() for terms in recipes for term in terms if isinstance(term.of, Quantity)}
    assert used | set(NO_COSTS) == set(Quantity)
    probed = [q for p in (*memory_probes(PMD_BYTES), *thread_probes([0]), *process_probes(PMD_BYTES)) for q in p.quantities]
    assert sorted(q.name for q in probed) == sorted(q.name for q in Quantity)


def test_the_page_names_every_cost_that_is_measured() -> None:
    text = (config_root().parent / "docs" / "calibrate.md").read_text()
    assert not [cost.name for cost in RECIPES if f"`{cost.name.lower()}`" not in text]


def test_a_fault_that_clears_is_its_time_less_clearing_with_both_spreads() -> None:
    told = derived(COW_FAULT=2000.0, CLEAR=350.0).outcome(Cost.COW_4K_NS)
    assert told.figure == pytest.approx((1650, 1650 - math.hypot(3, 3), 1650 + math.hypot(3, 3)))
    assert told.runs == 7
    assert told.how.startswith("median of 7 runs: ")
    assert told.how.endswith("; less clear_4k_ns")


def test_a_part_that_is_kept_counts_with_its_range_and_once() -> None:
    values, ranges = base().values, base().ranges
    derivation = derived(THP_FAULT=200_000.0, HUGETLB_FAULT=203_000.0)
    cleared = derivation.outcome(Cost.CLEAR_2M_NS)
    assert cleared.figure is not None
    assert cleared.figure.value == 200_000 - values[Cost.THP_FAULT_NS]
    low, high = ranges[Cost.THP_FAULT_NS]
    assert cleared.figure.low == pytest.approx(195_000 - math.hypot(3, high - 5000))
    assert cleared.figure.high == pytest.approx(195_000 + math.hypot(3, 5000 - low))
    assert f"less thp_fault_ns = {values[Cost.THP_FAULT_NS]} (default)" in cleared.how
    hugetlb = derivation.outcome(Cost.HUGETLB_FAULT_NS).figure  # its own time less that of a THP, plus thp_fault_ns
    assert hugetlb is not None
    assert hugetlb.value == 3000 + values[Cost.THP_FAULT_NS]
    assert hugetlb.high == pytest.approx(8000 + math.hypot(3, 3, high - 5000))


def test_without_huge_pages_clearing_2m_is_clearing_512_pages() -> None:
    off = Sample(unavailable="transparent huge pages are off")
    derivation = derived(THP_FAULT=off, CLEAR=400.0, HUGE_ZERO_FAULT=off)
    assert derivation.outcome(Cost.CLEAR_2M_NS).figure == Figure(512 * 400, 512 * 397, 512 * 403)
    assert derivation.outcome(Cost.HUGE_ZERO_MAP_NS) == (None, 0, "transparent huge pages are off")


def test_what_is_no_time_keeps_the_default_and_a_range_does_not_go_below_zero() -> None:
    nothing = derived(ANON_FAULT=340.0, CLEAR=350.0).outcome(Cost.ANON_FAULT_NS)
    assert nothing.figure is None
    assert nothing.how == "its parts make -10 ns (-14 ... -6), which is no time"
    noise = derived(CLEAR=350.0, COW_FAULT=Sample([0.0, 0, 0, 349, 9000, 9000, 9000])).outcome(Cost.COW_4K_NS)
    assert noise.figure is None  # the default is as likely
    below = derived(HUGE_ZERO_WRITE=-5003.0).outcome(Cost.HUGE_ZERO_THP_NS)  # and 5000 ns of thp_fault_ns, 20000 at most: never 40000
    assert below.figure is not None
    assert whole(below.figure) == (1, 0, 14_998)
    assert below.how.endswith("too little to tell, but less than the default range")
    little = derived(ANON_FAULT=353.0, CLEAR=350.0).outcome(Cost.ANON_FAULT_NS)
    assert little.figure is not None
    assert whole(little.figure) == (3, 0, 8)


def test_the_file_is_accepted_says_of_each_cost_which_it_is_and_has_the_same_bytes_again(tmp_path: Path) -> None:
    derivation = derived(ANON_FAULT=2000.0, MORE_TARGETS=Sample(unavailable="it takes 3 CPUs, and there are 2"))
    file = cost_file("mine", derivation, ABOUT)
    text = cost_toml(file)
    assert text == cost_toml(cost_file("mine", derived(ANON_FAULT=2000.0, MORE_TARGETS=derivation.samples[Quantity.MORE_TARGETS]), ABOUT))
    path = tmp_path / "mine.toml"
    path.write_text(text)
    read = load_costs(str(path), tmp_path)
    assert (read.values, read.ranges, read.about, read.notes) == (file.values, file.ranges, ABOUT, ())
    assert cost_toml(replace(read, name="mine")) == text
    anon = read.texts[Cost.ANON_FAULT_NS]
    assert (read.values[Cost.ANON_FAULT_NS], anon["basis"], anon["machine"], anon["date"]) == (1000, "measured", "a machine", "2026-11-23")
    kept = read.texts[Cost.TLB_FLUSH_TARGET_NS]
    assert kept["method"] == "default, not measured: it takes 3 CPUs, and there are 2"
    assert kept["basis"] == base().texts[Cost.TLB_FLUSH_TARGET_NS]["basis"]
    assert read.values[Cost.TLB_FLUSH_TARGET_NS] == base().values[Cost.TLB_FLUSH_TARGET_NS]
    for cost in Cost:
        low, high = read.ranges[cost]
        assert low <= read.values[cost] <= high, cost
        assert ("machine" in read.texts[cost]) == (derivation.outcome(cost).figure is not None), cost
    again = cost_file("more", Derivation(read, derivation.samples), ABOUT)  # a measured file as the one to start from
    assert again.texts[Cost.NOTIFIER_NS]["method"].startswith("mine, not measured")


# --- the command


def fake_probes(monkeypatch: pytest.MonkeyPatch, run: Callable[[Quantity], float]) -> None:
    """The command with probes that ask `run`."""

    def probes(size: int, allowed: object) -> list[Probe]:
        return [Probe((quantity,), lambda quantity=quantity: {quantity: run(quantity)}) for quantity in Quantity]

    monkeypatch.setattr("sweep.measure.run.all_probes", probes)
    monkeypatch.setattr("sweep.measure.run.compile_loops", lambda: None)


def test_the_command_writes_a_file_that_a_study_runs_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faultsweep: Command) -> None:
    fake_probes(monkeypatch, lambda quantity: 5000.0 if quantity is Quantity.ANON_FAULT else 1000.0)
    out = tmp_path / "mine.toml"
    status, text, errors = faultsweep("calibrate", "-o", out, "--memory", "16MiB", "--note", "a quiet day")
    assert (status, errors) == (0, "measuring this machine: at most 60 s and 16MiB\n")
    for words in ("anon_fault_ns", "4000 ... 4000", "default, not measured: it is a setting of the scheduler", f"wrote {out}"):
        assert words in text, text
    file = load_costs(str(out), tmp_path)
    assert file.values[Cost.ANON_FAULT_NS] == 4000
    assert file.texts[Cost.ANON_FAULT_NS]["method"].startswith(f"median of {RUNS} runs")
    assert list(file.about) == ["machine", "method", "date", "source", "minor_fault", "note"]
    assert "Linux" in file.about["machine"]
    assert str(tmp_path) not in out.read_text()
    study = tmp_path / "s.toml"
    study.write_text('[study]\nname = "s"\n[point]\nmemory = "2MiB"\ncosts = "mine.toml"\n[[block]]\ngrid = { vcpus = [1] }\n')
    sweep.run(study, tmp_path / "d", RunOptions(executor="inline", quiet=True))
    assert set(sweep.open_dataset(tmp_path / "d").points()["costs_digest"]) == {file.digest()}


def test_json_tells_every_cost_and_quantity_and_without_a_place_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faultsweep: Command
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(quantity: Quantity) -> float:
        if quantity is Quantity.SPLIT:
            raise DiscardedRunError("0 splits of a PMD where 1 were meant")
        return 1000.0

    fake_probes(monkeypatch, run)
    status, text, _ = faultsweep("calibrate", "--json")
    told = json.loads(text)
    assert (status, told["out"], list(tmp_path.iterdir())) == (0, None, [])
    assert [entry["cost"] for entry in told["costs"]] == [cost.name.lower() for cost in Cost]
    split = next(entry for entry in told["quantities"] if entry["quantity"] == "split")
    assert (split["runs"], split["value"]) == (0, None)
    assert split["discarded"] == {"0 splits of a PMD where 1 were meant": sampling.MAX_TRIES}


def test_a_machine_that_tells_nothing_gets_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faultsweep: Command) -> None:
    def run(quantity: Quantity) -> float:
        raise UnavailableError("the kernel refuses it: Invalid argument")

    fake_probes(monkeypatch, run)
    status, text, errors = faultsweep("calibrate", "-o", tmp_path / "mine.toml")
    assert (status, text) == (5, "")
    assert "nothing could be measured here: the kernel refuses it" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CalibrateOptions(seconds=0.5), "--seconds 0.5: 1 ... 3600"),
        (CalibrateOptions(seconds=math.nan), "--seconds nan"),
        (CalibrateOptions(memory="12MiB"), "--memory 12MiB: 16 MiB ..."),
        (CalibrateOptions(memory="900TiB"), "what is free"),
        (CalibrateOptions(memory="1G"), "GiB"),
        (CalibrateOptions(hosts=["lab"]), "--host is of no use without --from"),
        (CalibrateOptions(leave_one_out=True), "--leave-one-out is of no use without --from"),
        (CalibrateOptions("published-rates", memory="1GiB"), "--memory is of no use with --from"),
        (CalibrateOptions(out=Path("x.json")), ".toml"),
    ],
)
def test_what_measuring_refuses(options: CalibrateOptions, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        calibrate(options)
    assert words in str(caught.value)


def test_regions_are_an_eighth_of_the_memory_in_whole_huge_pages() -> None:
    assert MeasureOptions(memory="16MiB").region_bytes() == PMD_BYTES
    assert MeasureOptions(memory="47MiB").region_bytes() == 2 * PMD_BYTES


# --- this machine

SMALL = 2 * PMD_BYTES


def samples_of(probe: Probe) -> Mapping[Quantity, Sample]:
    """Runs of one probe of this machine, for some seconds at most."""
    return sampled([probe], time.monotonic, 20)


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "RUNS", MIN_RUNS)
    monkeypatch.setattr(sampling, "MAX_TRIES", 3 * MIN_RUNS)


@pytest.mark.skipif(PYTHON_ONLY, reason="the loops are compiled")
def test_a_small_measurement_of_this_machine(tmp_path: Path, few_runs: None, faultsweep: Command) -> None:
    """Every run of 512 pages counts its own faults, or it is discarded: what is left had those that were meant."""
    out = tmp_path / "here.toml"
    status, text, _ = faultsweep("calibrate", "-o", out, "--memory", "16MiB", "--seconds", "60", "--json")
    assert status == 0
    told = json.loads(text)
    quantities = {entry["quantity"]: entry for entry in told["quantities"]}
    assert quantities["zero_fault"]["runs"] >= MIN_RUNS, quantities["zero_fault"]
    assert all(quantities[name]["value"] > 0 for name in ("anon_fault", "cow_fault", "user_fault", "clear"))
    for entry in quantities.values():
        assert entry["runs"] or entry["unavailable"] or entry["discarded"], entry
    file = load_costs(str(out), tmp_path)
    assert file.notes == ()
    measured = [cost for cost in Cost if file.texts[cost].get("basis") == "measured" and "machine" in file.texts[cost]]
    assert Cost.ZERO_MAP_NS in measured
    assert all(file.values[cost] > 0 for cost in measured)


@pytest.mark.skipif(PYTHON_ONLY, reason="the loops are compiled")
def test_faults_that_were_not_meant_are_noticed() -> None:
    with Region(SMALL) as region, pytest.raises(DiscardedRunError, match="minor faults where 7 were meant"):
        region.ns_per_fault(POPULATE_WRITE, 7)
    with Region(SMALL) as region:
        region.advise(POPULATE_WRITE)
        with pytest.raises(DiscardedRunError, match=f"0 minor faults where {SMALL // PAGE} were meant"):
            region.ns_per_fault(POPULATE_WRITE, SMALL // PAGE)
        with pytest.raises(DiscardedRunError, match="bytes of THPs"):
            region.expect_huge(SMALL * 512)


@pytest.mark.skipif(PYTHON_ONLY, reason="the loops are compiled")
def test_without_huge_pages_their_faults_are_unavailable_and_clearing_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.measure.memory.thp_enabled", lambda: "never")
    monkeypatch.setattr("sweep.measure.memory.free_hugetlb_pages", lambda: 0)
    for probe_ in memory_probes(PMD_BYTES):
        huge = {Quantity.THP_FAULT, Quantity.SPLIT, Quantity.HUGE_ZERO_WRITE, Quantity.HUGETLB_FAULT} & set(probe_.quantities)
        if huge:
            with pytest.raises(UnavailableError, match=r"huge pages are off|no free 2 MiB page"):
                probe_.run()
    assert clearing_and_copying(PMD_BYTES)[Quantity.CLEAR] > 0


def test_what_the_kernel_refuses_is_unavailable_or_comes_again() -> None:
    def refused(number: int) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(UnavailableError, match="Invalid argument"):
        timed(refused, 22)
    with pytest.raises(DiscardedRunError, match="temporarily unavailable"):
        timed(refused, 11)
    with pytest.raises(UnavailableError):
        timed(lambda: -1)


def test_a_process_of_its_own_forks_and_counts_its_faults(few_runs: None) -> None:
    samples = samples_of(process_probes(PMD_BYTES)[0])
    for quantity in (Quantity.COPY_FAULT, Quantity.REUSE_FAULT):
        figure = samples[quantity].figure()
        assert figure is not None, samples[quantity].reason()
        assert figure.value > 0


def test_a_guest_takes_a_fault_for_each_load_where_there_is_kvm() -> None:
    try:
        found = guest_faults(SMALL)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert found[Quantity.GUEST_FAULT] > 0


def test_after_a_fork_the_interpreters_few_faults_are_let_pass_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = SMALL // PAGE
    answer = {"copies": pages + 1, "reuses": pages, "fork_ns": 2e5, "fork_entry_ns": 25.0, "copy_ns": 1900.0, "reuse_ns": 140.0}
    monkeypatch.setattr("sweep.measure.processes.run_script", lambda *_: answer)
    assert forks(SMALL)[Quantity.COPY_FAULT] == 1900
    for wrong in (pages - 1, pages + 9):
        answer["copies"] = wrong
        with pytest.raises(DiscardedRunError, match="beside those of memory that was shared"):
            forks(SMALL)


def test_an_exit_counts_only_if_kvm_counted_it_and_it_is_cheaper_than_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"exits": 501, "exits_meant": 500, "exit_ns": 900.0, "fault_ns": 2000.0}
    monkeypatch.setattr("sweep.measure.processes.run_script", lambda *_: answer)
    assert guest_exits(SMALL) == {Quantity.GUEST_EXIT: 900.0}
    answer["exit_ns"] = 3000.0
    with pytest.raises(UnavailableError, match="longer than a whole fault"):
        guest_exits(SMALL)
    answer["exits"] = 0
    with pytest.raises(UnavailableError, match="does not leave the guest"):
        guest_exits(SMALL)


@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("sys.exit('no such thing')", UnavailableError, "no such thing"),
        ('print(\'{"unavailable": "no /dev/kvm"}\')', UnavailableError, "no /dev/kvm"),
        ("while True: pass", DiscardedRunError, "took more than"),
    ],
)
def test_a_process_that_fails_or_hangs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], words: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "script.py").write_text(f"import sys\ndef main():\n    {script}\n")
    monkeypatch.setattr(small_process, "ROOT", tmp_path)
    monkeypatch.setattr(small_process, "PACKAGE", "mine")
    monkeypatch.setattr(small_process, "SECONDS", 5.0 if error is UnavailableError else 0.2)
    with pytest.raises(error, match=words):
        run_script("script")


def test_with_one_cpu_what_takes_threads_is_unavailable() -> None:
    for probe_ in thread_probes([0]):
        with pytest.raises(UnavailableError, match="CPUs, and there are 1"):
            probe_.run()


def test_pinning_ends_where_it_began() -> None:
    before = os.sched_getaffinity(0)
    assert sorted(cpus()) == sorted(before)
    with pinned(cpus()[0]) as allowed:
        assert not allowed or os.sched_getaffinity(0) == {cpus()[0]}
    assert os.sched_getaffinity(0) == before
