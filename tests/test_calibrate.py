"""Fitting costs: known costs are found again, what the rows do not say is said, and no table of observations breaks the reader."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sweep
from kernels.cost import Cost
from sweep.calibrate import CalibrateOptions, calibrate, verdict
from sweep.configs import CostFile, config_root, load_costs
from sweep.cost_text import cost_toml
from sweep.dataset.store import Store
from sweep.errors import StudyError, UsageError
from sweep.fit import Bounds, Fit, Rates, fit
from sweep.observations import METRICS, OPTIONAL, REQUIRED, Observation, from_record, load_observations, read_observations
from sweep.parameters import Point
from sweep.record import read_study
from sweep.report.build import build_report
from sweep.runner import RunOptions
from sweep.schema import POINTS
from sweep.study import load_study
from tests.conftest import Command

ROW = {
    "case": "lab-1",
    "source": "a lab",
    "arch": "x86",
    "host_cpus": "8",
    "vcpus": "1",
    "memory_per_vcpu_mib": "2",
    "backing": "anonymous",
    "workload": "demand_paging",
    "lock": "read",
    "metric": "pages_per_s_per_vcpu",
    "value": "300000",
    "unit": "1/s",
    "note": "",
}
VMM = {"workload": "vmm_populate_2_threads", "lock": "none", "metric": "total_s", "unit": "s", "vcpus": "0"}
SHIPPED = {"houghton": "houghton-x86", "upton": "upton-arm64", "qemu": "qemu-prealloc"}


def table(*rows: dict[str, str], columns: tuple[str, ...] = (*REQUIRED, *OPTIONAL)) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "rates.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def base() -> CostFile:
    return load_costs("default", config_root())


def observation(case: str, metric: str = "pages_per_s_per_vcpu", **parameters: Any) -> Observation:
    point = Point(**{"memory": "4MiB", "workload": "demand_paging", "cores": 8, **parameters})
    return Observation(case, "made", "x86", "8", "", metric, 1.0, point)


def seen_under(values: dict[Cost, int], *rows: Observation) -> list[Observation]:
    """The rows with the figures that the model gives under these costs."""
    costs = {c: float(v) for c, v in (dict(base().values) | values).items()}
    return [replace(row, value=float(v)) for row, v in zip(rows, Rates(rows, base()).whole(costs), strict=True)]


def fitted(rows: list[Observation], *names: Cost) -> Fit:
    return fit(Rates(rows, base()), base(), {c: Bounds(*base().ranges[c]) for c in names})


# --- the fit


def test_known_costs_are_found_again_from_the_models_own_rates() -> None:
    true = {Cost.ANON_FAULT_NS: 1400, Cost.FILE_MAP_NS: 1100, Cost.KVM_FAULT_NS: 900}
    rows = seen_under(
        true,
        observation("anon"),
        observation("cached", backing="shmem", workload="demand_paging_cached"),
        observation("mapped", backing="shmem", prealloc="populate"),
    )
    found = fitted(rows, *true)
    for cost, value in true.items():
        assert found.values[cost] == pytest.approx(value, rel=0.01), cost
        assert verdict(found, frozenset(), cost).startswith("determined"), cost
    assert len(found.combinations) == 3
    np.testing.assert_allclose(found.after, [row.value for row in rows], rtol=0.005)  # the pull to the start


def test_costs_that_the_rows_see_as_a_sum_only_are_named_together() -> None:
    rows = seen_under({Cost.KVM_FAULT_NS: 900}, observation("mapped", backing="shmem", prealloc="populate"))
    found = fitted(rows, Cost.KVM_FAULT_NS, Cost.VM_EXIT_NS, Cost.COW_4K_NS)
    assert found.free == (Cost.VM_EXIT_NS, Cost.KVM_FAULT_NS)
    assert "only the sum vm_exit_ns + kvm_fault_ns" in verdict(found, frozenset(), Cost.VM_EXIT_NS)
    assert "determined" in verdict(found, frozenset(), Cost.VM_EXIT_NS)
    assert verdict(found, frozenset(), Cost.KVM_FAULT_NS) == "in the sum with vm_exit_ns only"
    assert sum(found.values[c] for c in found.free) == pytest.approx(1400, rel=0.01)


def test_a_cost_without_effect_stays_and_is_named() -> None:
    rows = seen_under({}, observation("anon"))
    found = fitted(rows, Cost.ANON_FAULT_NS, Cost.COW_4K_NS, Cost.SMT_NS)
    assert found.free == (Cost.ANON_FAULT_NS,)
    assert found.values[Cost.COW_4K_NS] == base().values[Cost.COW_4K_NS]
    assert verdict(found, frozenset(), Cost.COW_4K_NS) == "nothing: no effect"
    assert verdict(found, frozenset({Cost.SMT_NS}), Cost.SMT_NS) == "nothing: held"


def test_ranges_hold_whatever_the_rows_say() -> None:
    rows = [replace(observation("slow"), value=1000.0), replace(observation("fast", vcpus=2), value=9e9)]
    found = fitted(rows, *Cost)
    for cost, (low, high) in base().ranges.items():
        assert low <= found.values[cost] <= high, cost
    one = fitted(rows[:1], Cost.ANON_FAULT_NS)
    assert one.values[Cost.ANON_FAULT_NS] == base().ranges[Cost.ANON_FAULT_NS][1]
    assert "at the end of its range" in verdict(one, frozenset(), Cost.ANON_FAULT_NS)


def test_the_model_has_no_time_but_its_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting in ticks changes no figure by more than rounding does; it is what makes the fit smooth."""
    huge = {"backing": "anonymous_hugetlb_2mb", "memory": "64MiB", "prealloc": "populate", "prealloc_threads": 8}
    rows = [
        observation("slices", vcpus=12, cores=4),
        observation("smt", vcpus=12, smt=2),
        observation("vmm", "total_s", **{**huge, "workload": "nothing"}),
    ]
    costs = {c: float(v) for c, v in base().values.items()}
    in_ticks = Rates(rows, base()).whole(costs)
    monkeypatch.setattr("sweep.fit.TICKS", 1)
    np.testing.assert_allclose(in_ticks, Rates(rows, base()).whole(costs), rtol=2e-3)


# --- the shipped files


@pytest.mark.parametrize(("host", "name"), SHIPPED.items())
def test_shipped_costs_reproduce_the_rows_they_were_fitted_to(host: str, name: str) -> None:
    file = load_costs(name, config_root())
    assert file.notes == ()
    assert set(file.about) >= {"machine", "method", "date", "source", "note"}
    for cost, (low, high) in file.ranges.items():
        assert low <= file.values[cost] <= high, cost
        assert file.texts[cost]["unit"] == "ns"
    rows = [row for row in load_observations("published-rates", config_root()) if row.case.startswith(host)]
    predicted = Rates(rows, file).whole({c: float(v) for c, v in file.values.items()})
    for row, value in zip(rows, predicted, strict=True):
        assert value == pytest.approx(row.value, rel=0.15), row.case


def test_shipped_rows_are_whole() -> None:
    rows = {row.case: row for row in load_observations("published-rates", config_root())}
    assert len(rows) == 7
    assert rows["houghton-anon-64"].point.columns()["memory_bytes"] == 4 << 30
    assert rows["houghton-shmem-2"].source == rows["houghton-anon-2"].source
    assert (rows["upton-write-8"].point.mmu, rows["upton-write-8"].point.cores) == ("legacy", 48)
    assert rows["qemu-prealloc-256g-8"].point.prealloc_threads == 8
    assert all(from_record(json.loads(json.dumps(row.record()))) == row for row in rows.values())


# --- observations that cannot be


@pytest.mark.parametrize(
    ("change", "where", "words"),
    [
        ({"value": "nan"}, ":2: value", ["finite number above 0"]),
        ({"value": "inf"}, ":2: value", ["finite number above 0"]),
        ({"value": "1e999"}, ":2: value", ["finite number above 0"]),
        ({"value": "-3"}, ":2: value", ["finite number above 0"]),
        ({"value": "0"}, ":2: value", ["finite number above 0"]),
        ({"value": ""}, ":2: value", ["finite number above 0"]),
        ({"value": "1_000"}, ":2: value", ["finite number above 0"]),
        ({"value": "9" * 900}, ":2: value", ["finite number above 0"]),
        ({"backing": "anonymos"}, ":2: backing", ["did you mean 'anonymous'"]),
        ({"workload": "demand_pagin"}, ":2: workload", ["did you mean 'demand_paging'"]),
        ({"workload": "vmm_populate_N_threads"}, ":2: workload", ["unknown"]),
        ({**VMM, "workload": "vmm_populate_0_threads"}, ":2: workload", ["1 ... 4096"]),
        ({**VMM, "workload": "vmm_populate_9999_threads"}, ":2: workload", ["1 ... 4096"]),
        ({**VMM, "lock": "read"}, ":2: lock", ["known: none"]),
        ({**VMM, "metric": "pages_per_s_per_vcpu", "unit": "1/s"}, ":2: metric", ["total_s"]),
        ({"metric": "pages"}, ":2: metric", ["pages_per_s_per_vcpu"]),
        ({"unit": "s"}, ":2: unit", ["1/s"]),
        ({"lock": "none"}, ":2: lock", ["read"]),
        ({"vcpus": "0"}, ":2: vcpus", ["from 1 to 4096"]),
        ({"vcpus": "-1"}, ":2: vcpus", ["whole number"]),
        ({"vcpus": "1.5"}, ":2: vcpus", ["whole number"]),
        ({"vcpus": "9" * 40}, ":2: vcpus", ["whole number"]),
        ({"memory_per_vcpu_mib": "0"}, ":2: memory_per_vcpu_mib", ["from 1"]),
        ({"vcpus": "4096", "memory_per_vcpu_mib": "16777216"}, ":2: memory", ["16TiB"]),
        ({"backing": "anonymous_hugetlb_1gb"}, ":2", ["multiple"]),
        ({"host_cpus": "many"}, ":2: host_cpus", ["'>= 48'"]),
        ({"host_cpus": "0"}, ":2: host_cpus", ["'>= 48'"]),
        ({"host_cpus": "48 cores, 100 threads"}, ":2: host_cpus", ["threads"]),
        ({"host_cpus": ""}, ":2: host_cpus", ["is empty"]),
        ({"source": "same"}, ":2: source", ["first row"]),
        ({"case": ""}, ":2: case", ["is empty"]),
        ({"kernel": "4.2"}, ":2: kernel", ["change the row"]),
        ({"preallocated": "yes"}, ":2: preallocated", ["page_cache"]),
        ({"workload": "populate", "preallocated": "page_cache"}, ":2: preallocated", ["does not go with"]),
        ({"note": "a\x1b[31mb"}, ":2: note", ["control characters"]),
        ({"note": "x" * 2000}, ":2: note", ["1000 characters"]),
    ],
)
def test_a_row_that_cannot_be_is_named_with_its_line_and_the_cure(
    tmp_path: Path, change: dict[str, str], where: str, words: list[str]
) -> None:
    path = write(tmp_path, table({**ROW, **change}))
    with pytest.raises(StudyError) as caught:
        read_observations(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{path}{where}"), lines[0]
    assert all(word in lines[0] for word in words), lines[0]
    assert len(lines[0]) < 900
    assert lines[0].isprintable()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty", "case,source"]),
        ("\n\n", ["is empty"]),
        (table(), ["has no rows"]),
        (table(ROW).replace("lock", "loc"), ["rates.csv:1", "did you mean 'lock'", "lock are missing"]),
        (table(ROW).replace("note", "arch"), ["rates.csv:1", "arch", "twice"]),
        ("case,value\na,1\n", ["rates.csv:1", "are missing"]),
        (table(ROW) + "a,b\n", ["rates.csv:3", "has 2 cells", "15"]),
        (table(ROW) + '"open\n', ["rates.csv:3", "no CSV"]),
        (table(ROW, ROW), ["rates.csv:3", "on line 2 already"]),
        (table(ROW).encode() + b"\0", ["rates.csv:3", "NUL"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (b"x" * ((1 << 20) + 1), ["at most 1048576"]),
        ("case," + "x" * 200_000, ["rates.csv:1"]),
        (table(ROW) + "\n" * 3 + ",".join(["x"] * 15) + "\n", ["rates.csv:6"]),
    ],
)
def test_a_file_that_cannot_be_is_named_with_the_cure(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    with pytest.raises(StudyError) as caught:
        read_observations(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value), str(caught.value)[:2000]
    assert all(len(line) < 900 for line in str(caught.value).splitlines())


def test_all_faults_are_told_at_once_and_a_missing_file_too(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        read_observations(write(tmp_path, table({**ROW, "value": "x", "lock": "x"}, {**ROW, "case": "b", "vcpus": "x"})))
    assert len(caught.value.faults) == 3
    for name, word in (("none.csv", "cannot be read"), ("no-such", "known: published-rates"), ("../x", "neither")):
        with pytest.raises(StudyError, match=word):
            load_observations(name, tmp_path)
    with pytest.raises(StudyError, match="no regular file; give the path of a CSV file"):
        read_observations(tmp_path)


def test_a_bom_crlf_and_quotes_are_taken(tmp_path: Path) -> None:
    text = table({**ROW, "note": 'say "hello", twice'}).replace("\n", "\r\n")
    rows = read_observations(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert rows[0].note == 'say "hello", twice'


def test_every_metric_is_a_column_of_the_points() -> None:
    assert {metric.column for metric in METRICS.values()} <= {column.name for column in POINTS}


# --- the command


HELD = [word for c in Cost if c not in (Cost.CLEAR_2M_NS, Cost.THP_FAULT_NS) for word in ("--hold", c.name.lower())]


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    thp = {**ROW, "backing": "anonymous_thp", "metric": "total_s", "unit": "s", "memory_per_vcpu_mib": "8"}
    return write(tmp_path, table({**thp, "value": "0.0031", "source": 'a "lab"'}, {**thp, "case": "else", "host_cpus": "9"}))


def test_the_command_prints_rows_and_costs_and_writes_a_file_that_loads(tmp_path: Path, rates: Path, faultsweep: Command) -> None:
    out = tmp_path / "mine.toml"
    status, text, errors = faultsweep(
        "calibrate", "--from", rates, "--host", "lab", "-o", out, "--widen", "clear_2m_ns=60000:2000000", "--note", "nothing left", *HELD
    )
    assert (status, errors) == (0, "")
    for word in ("lab-1", "fitted/observed", "clear_2m_ns", "nothing: held", "determines 1 combinations", f"wrote {out}"):
        assert word in text, text
    file = load_costs(str(out), tmp_path)
    assert file.values[Cost.CLEAR_2M_NS] > 600_000
    assert file.ranges[Cost.CLEAR_2M_NS] == (60_000, 2_000_000)
    assert file.texts[Cost.CLEAR_2M_NS]["basis"] == "fitted"
    assert "range widened from [60000, 250000]" in file.texts[Cost.CLEAR_2M_NS]["source"]
    assert file.texts[Cost.COW_4K_NS]["basis"] == "measured"
    assert file.about["note"] == "nothing left"
    assert 'a "lab"' in file.about["source"]
    assert str(tmp_path) not in out.read_text()
    status, text, _ = faultsweep("calibrate", "--from", rates, "--case", "lab-*", "--json", *HELD)
    assert (status, json.loads(text)["out"]) == (0, None)


def test_what_the_command_refuses(tmp_path: Path, rates: Path, faultsweep: Command) -> None:
    ready = ("calibrate", "--from", rates, "--host", "lab")
    wrong: list[tuple[tuple[object, ...], str]] = [
        ((*ready, "--seconds", "5"), "--seconds is of no use with --from"),
        (("calibrate", "--from", rates), "several hosts"),
        (("calibrate", "--from", rates, "--host", "none"), "no row's case matches none*"),
        ((*ready, "--costs", "nosuch"), "nosuch"),
        ((*ready, "--widen", "clear_2m_ns"), "NAME=LOW:HIGH"),
        ((*ready, "--widen", "clear_2m_ns=70000:200000"), "must take in the range"),
        ((*ready, "--widen", "clear_2m_ns=0:9999999999999"), "must take in the range"),
        ((*ready, "--widen", "clear_2m=1:2"), "did you mean 'clear_2m_ns'"),
        ((*ready, "--hold", "x\x1b"), "unknown cost"),
        ((*ready, "--widen", "touch_ns=1:200", "--hold", "touch_ns"), "give one of the two"),
        ((*ready, "-o", tmp_path / "x.json"), ".toml"),
        ((*ready, "-o", tmp_path / "no" / "x.toml"), "make the folder first"),
        ((*ready, "--leave-one-out", *HELD), "two rows"),
        (("calibrate", "--from", tmp_path / "no.csv"), "cannot be read"),
    ]
    for arguments, word in wrong:
        status, text, errors = faultsweep(*arguments)
        assert (status, text) == (2, ""), arguments
        assert word in errors, errors
        assert len(errors.splitlines()) == 1
        assert errors.strip().isprintable()
    assert list(tmp_path.glob("*.toml")) == []


def test_the_file_it_starts_from_is_not_overwritten(tmp_path: Path, rates: Path) -> None:
    start = tmp_path / "start.toml"
    start.write_text(cost_toml(base()))
    assert load_costs(str(start), tmp_path).values == base().values
    with pytest.raises(UsageError, match="starts from"):
        calibrate(CalibrateOptions(str(rates), start, str(start), hosts=["lab"]))


# --- a study with observations

STUDY = """
[study]
name = "seen"
observations = "rates.csv"
[point]
memory = "2MiB"
workload = "demand_paging"
cores = 8
[[block]]
grid = { vcpus = [1, 2] }
"""


def test_the_report_shows_predictions_beside_observations(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "case": "other", "backing": "shmem", "note": "<script>"}]
    write(tmp_path, table(*rows))
    study = tmp_path / "s.toml"
    study.write_text(STUDY)
    sweep.run(study, tmp_path / "d", RunOptions(executor="inline", quiet=True))
    (tmp_path / "rates.csv").unlink()  # the dataset stands alone
    report = build_report(tmp_path / "d")
    shown = report.tables[-1]
    assert shown.title == "Prediction beside observation"
    assert list(shown.frame["observation"]) == ["lab-1"]
    points = sweep.open_dataset(tmp_path / "d").points()
    predicted = points[points["vcpus"] == 1]["pages_per_s_per_vcpu"].iloc[0]
    assert shown.frame["predicted/observed"].iloc[0] == f"{predicted / 300000:.3f}"
    assert "other" in shown.note
    assert "Prediction beside observation" in report.path.read_text()
    assert [row.case for row in read_study(Store(tmp_path / "d")).observations] == ["lab-1", "other"]
    assert set(points["costs_digest"]) == {base().digest()}


@pytest.mark.parametrize(
    ("value", "where", "word"),
    [
        ("'no.csv'", "no.csv", "cannot be read"),
        ("'nosuch'", "s.toml:4: study.observations", "known: published-rates"),
        ("3", "s.toml:4: study.observations", "must be the name"),
        ("''", "s.toml:4: study.observations", "must be the name"),
        ("'rates.csv'", "rates.csv:2: value", "finite"),
    ],
)
def test_observations_that_cannot_be_are_faults_of_the_study(tmp_path: Path, value: str, where: str, word: str) -> None:
    write(tmp_path, table({**ROW, "value": "x"}))
    study = tmp_path / "s.toml"
    study.write_text(STUDY.replace('"rates.csv"', value))
    with pytest.raises(StudyError) as caught:
        load_study(study)
    assert f"{tmp_path}/{where}" in str(caught.value)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "word"),
    [('unit = "us"', "unit must be 'ns'"), ("machine = 3", "machine must be text"), ('metod = "x"', "did you mean 'method'")],
)
def test_what_a_cost_says_of_itself_is_checked(tmp_path: Path, entry: str, word: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(cost_toml(base()).replace("[cost.touch_ns]", f"[cost.touch_ns]\n{entry}"))
    with pytest.raises(StudyError, match=word):
        load_costs(str(path), tmp_path)
