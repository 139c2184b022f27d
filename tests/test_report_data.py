"""The data behind each section of a report: what is compared with what, who wins, what moves it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import sweep
from kernels.cost import Cost
from sweep.configs import COST_NAMES, load_costs
from sweep.dataset.read import connection
from sweep.dataset.storage import LocalStorage
from sweep.parameters import Point
from sweep.report import profiles, sensitivity
from sweep.report.build import build_report
from sweep.report.facts import MEASURED, PARTS, QUANTILES, TIME, Facts, configurations, facts_of, gather, split_costs
from sweep.report.moves import AXES, HIGHLIGHTED, TOGETHER, Axis, families, moves, rates, thinned, winners
from sweep.report.roles import CONDITIONS, PARAMETER_COLUMNS, SETTINGS, chosen, given, rank, scenario_label, setting_label
from sweep.report.standings import Standings, answer, details, difference, standings
from sweep.report.tables import general_table
from sweep.study import Study, load_study
from tests import fabricate

VCPUS, MEMORY, READ_FIRST = AXES[0], AXES[1], AXES[2]
DEFAULTS = Point.model_validate({}).columns()
STUDY = """
[study]
name = "s"
[[block]]
grid = { workload = ["w0", "w50", "w100", "other"] }
[workload.w0]
steps = [{ op = "touch", read_first = 0.0 }, { op = "touch", access = "read" }]
[workload.w50]
steps = [{ op = "touch", read_first = 0.5 }, { op = "touch", access = "read" }]
[workload.w100]
steps = [{ op = "touch", read_first = 1.0 }, { op = "touch", access = "read" }]
[workload.other]
steps = [{ op = "touch", read_first = 1.0, order = "random" }]
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("study") / "s.toml"
    path.write_text(STUDY)
    return load_study(path)


def row(ns: float, replicate: int = 0, **values: Any) -> dict[str, Any]:
    """A row of table `points` that took so long."""
    point = {**DEFAULTS, "cores": values.get("vcpus", 1), **values}
    measured = {**dict.fromkeys(MEASURED, 1), "guest_ns": ns, "total_ns": ns, "touches": 1000}
    return {**measured, **point, "replicate": replicate}


def rows_frame(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{**values, "point_id": f"{number:032x}"} for number, values in enumerate(rows)])


def facts(study: Study, *rows: dict[str, Any], sampled: bool = False) -> Facts:
    with connection({"points": rows_frame(rows)}, threads=1) as database:
        frame = configurations(database)
    if sampled:
        study = replace(study, blocks=tuple(replace(block, sample=sweep_sample()) for block in study.blocks))
    return facts_of(frame, study, "", len(rows), pd.DataFrame(), {"model_digest": ""})


def sweep_sample() -> Any:
    from sweep.blocks import Sample

    return Sample("sobol", 4, 1)


def compared(given_facts: Facts) -> Standings:
    return standings(given_facts)


# --- roles


def test_every_parameter_is_a_setting_or_a_condition() -> None:
    assert sorted((*SETTINGS, *CONDITIONS)) == sorted(PARAMETER_COLUMNS)


def test_labels_say_the_backing_and_what_is_no_default() -> None:
    values = {"backing": "anonymous", "policy": "mainline", "use_zero_page": True, "prealloc": "populate"}
    assert setting_label(values) == "anonymous, populate"
    assert setting_label({"use_zero_page": True}) == "use_zero_page=True"
    assert setting_label({"use_zero_page": False, "backing": "shmem"}) == "use_zero_page=False, shmem"
    assert scenario_label({"kernel": "6.5", "vcpus": 8, "cores": 8, "memory_bytes": 1 << 30}) == "kernel 6.5, 8 vCPUs, 1GiB"
    assert scenario_label({"vcpus": 1, "cores": 4}) == "1 vCPU, 4 cores"


def test_kernels_sort_as_versions_and_settings_begin_with_their_default() -> None:
    assert sorted(["6.10", "6.5", "7.0", "<b>"], key=lambda value: rank("kernel", value)) == ["<b>", "6.5", "6.10", "7.0"]
    assert sorted(["always_writable", "mainline"], key=lambda value: rank("policy", value))[0] == "mainline"
    assert sorted([False, True], key=lambda value: rank("use_zero_page", value)) == [True, False]


def test_where_no_setting_varies_the_kernel_is_what_is_compared() -> None:
    assert chosen(["vcpus", "kernel"]) == ("kernel",)
    assert given(["vcpus", "kernel"]) == ("vcpus",)
    assert chosen(["vcpus", "kernel", "backing"]) == ("backing",)
    assert given(["vcpus", "kernel", "backing"]) == ("kernel", "vcpus")


# --- facts


def test_a_configuration_is_the_mean_over_its_replicates_with_their_range(study: Study) -> None:
    found = facts(study, row(100, 0), row(300, 1))
    only = found.frame.iloc[0]
    assert (only["replicates"], only[TIME], only["low"], only["high"]) == (2, 200, 100, 300)


def test_replicates_are_paired_inside_their_scenario(study: Study) -> None:
    """Both settings take twice as long in replicate 1: against the fastest, the slower one varies not at all."""
    rows = [row(ns * (r + 1), r, backing=backing) for r in (0, 1) for backing, ns in (("anonymous", 300), ("shmem", 100))]
    found = facts(study, *rows).frame.set_index("backing")
    assert list(found.loc["anonymous", ["low", "high"]]) == [300, 600]
    assert list(found.loc["anonymous", ["paired_low", "paired_high"]]) == [1, 1]


def test_moved_costs_belong_to_their_base_where_that_is_there() -> None:
    base, moved = split_costs(pd.Series(["default", "default@vm_exit_ns=low", "mine@vm_exit_ns=low"]))
    assert list(base) == ["default", "default", "mine@vm_exit_ns=low"]
    assert list(moved) == ["", "vm_exit_ns=low", ""]


def test_a_dataset_of_an_older_version_has_no_values_for_later_columns(study: Study) -> None:
    table = rows_frame([row(100), row(200, backing="shmem")]).drop_columns(["smt", "zone_lock_wait_ns"])
    with connection({"points": table}) as database:
        frame = configurations(database)
    assert "smt" not in frame
    assert list(frame["zone_lock_wait_ns"]) == [0, 0]


def test_question_is_that_of_the_study_file(study_file: Path, tmp_path: Path) -> None:
    study_file.write_text("# Question: does it\n# matter? Costs: guesses.\n" + study_file.read_text())
    sweep.run(study_file, tmp_path / "x", sweep.RunOptions(executor="inline", quiet=True, limit=2))
    assert gather(sweep.open_dataset(tmp_path / "x")).question == "Does it matter?"


def test_study_json_is_read_once(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.run(study_file, tmp_path / "x", sweep.RunOptions(executor="inline", quiet=True, limit=2))
    seen = []
    read = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, name: seen.append(name) or read(self, name))  # type: ignore[func-returns-value]
    build_report(tmp_path / "x")
    assert seen.count("study.json") == 1


# --- standings


def test_the_setting_that_wins_most_scenarios_comes_first(study: Study) -> None:
    found = facts(
        study,
        *[row(ns, vcpus=vcpus, backing="anonymous") for vcpus, ns in ((1, 100), (2, 300), (4, 300))],
        *[row(ns, vcpus=vcpus, backing="shmem") for vcpus, ns in ((1, 200), (2, 200), (4, 200))],
    )
    table = standings(found).table
    assert found.settings.label(int(table.index[0])) == "shmem"
    assert list(table["wins"]) == [2, 1]
    assert table["ratio"].iloc[0] == pytest.approx(2 ** (1 / 3))


def test_settings_that_give_the_same_wherever_they_meet_are_taken_together(study: Study) -> None:
    found = facts(
        study,
        *[row(100, vcpus=vcpus, backing="shmem") for vcpus in (1, 2)],
        row(100, vcpus=1, backing="shmem", prealloc="populate"),
        *[row(ns, vcpus=vcpus) for vcpus, ns in ((1, 100), (2, 150))],
    )
    same = {found.settings.label(number): found.settings.label(leader) for number, leader in standings(found).same.items()}
    assert same == {"shmem": "shmem", "shmem, populate": "shmem", "anonymous": "anonymous"}


def test_rivals_differ_by_as_much_as_matters(study: Study) -> None:
    times = {"shmem": 1000, "anonymous": 1001, "anonymous_thp": 1500}
    found = facts(study, *[row(ns, backing=backing) for backing, ns in times.items()])
    standing = standings(found)
    rivals = standing.rivals()
    assert rivals is not None
    assert [found.settings.label(number) for number in rivals] == ["shmem", "anonymous_thp"]
    near = facts(study, *[row(ns, backing=backing) for backing, ns in list(times.items())[:2]])
    close = standings(near).rivals()
    assert close is not None
    assert [near.settings.label(number) for number in close] == ["shmem", "anonymous"]


def test_reference_scenario_has_moved_costs_if_any_has(study: Study) -> None:
    rows = [row(ns, vcpus=vcpus, backing=backing) for vcpus in (1, 2, 4) for backing, ns in (("anonymous", 300), ("shmem", 100))]
    rows.append(row(150, vcpus=2, backing="shmem", costs="default@vm_exit_ns=high"))
    found = facts(study, *rows)
    assert found.scenarios.label(standings(found).reference) == "2 vCPUs"


def in_details(found: Facts, rows: Sequence[dict[str, Any]]) -> tuple[Standings, pd.DataFrame]:
    standing = standings(found)
    with connection({"points": rows_frame(rows)}) as database:
        return standing, details(database, found, standing.reference)


def test_difference_is_paired_over_replicates_and_costs(study: Study) -> None:
    rows = [row(ns * (r + 1), r, backing=backing) for r in (0, 1) for backing, ns in (("anonymous", 200), ("shmem", 100))]
    rows += [row(ns, backing=backing, costs="default@vm_exit_ns=high") for backing, ns in (("anonymous", 400), ("shmem", 100))]
    found = facts(study, *rows)
    standing, detail = in_details(found, rows)
    rivals = standing.rivals()
    assert rivals is not None
    less = difference(detail, *rivals)
    assert (less.mean, less.over_replicates, less.over_costs) == (0.5, (0.5, 0.5), (0.5, 0.75))
    text = answer(found, standing, detail)
    assert text.startswith("shmem takes the least time in 1 of the 1 scenarios with a choice. In the only scenario it takes ")
    assert "50.00% (replicates 50.00% ... 50.00%; each cost over its range 50.00% ... 75.00%) less than anonymous" in text


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([row(1_000_000)], "1 ms, 1 exits, 1 B held."),
        ([row(1_000_000), row(3_000_000, vcpus=2)], "From 1 ms (1 vCPU) to 3 ms (2 vCPUs)."),
        ([row(0)], "0 us, 1 exits, 1 B held."),
    ],
)
def test_answer_without_a_choice_is_the_range(study: Study, rows: list[dict[str, Any]], text: str) -> None:
    found = facts(study, *rows)
    standing, detail = in_details(found, rows)
    assert answer(found, standing, detail) == text


# --- moves


def along(found: Facts, axis: Axis) -> pd.DataFrame:
    moved = moves(found, axis, standings(found))
    assert moved is not None
    return moved.rows


def test_lines_hold_all_other_conditions(study: Study) -> None:
    of = {"shmem": 1e6, "anonymous": 3e6}
    found = facts(study, *[row(ns * n, vcpus=n, backing=b, kernel=k) for n in (1, 2) for b, ns in of.items() for k in ("6.1", "6.5")])
    rows = along(found, VCPUS)
    assert set(rows["panel"]) == {"kernel 6.1", "kernel 6.5"}
    one = rows[(rows["panel"] == "kernel 6.1") & (rows["label"] == "shmem")]
    assert list(zip(one["x"], one["y"], one["last"], strict=True)) == [(1, 1, False), (2, 2, True)]


def test_memory_that_grows_with_vcpus_is_held_per_vcpu(study: Study) -> None:
    found = facts(study, *[row(1e6, vcpus=n, memory_bytes=n << 30, backing=b) for n in (1, 2, 4) for b in ("shmem", "anonymous")])
    assert set(along(found, VCPUS)["panel"]) == {"everywhere"}
    both = facts(
        study,
        *[row(1e6, vcpus=n, memory_bytes=n << 30) for n in (1, 2, 4)],
        *[row(1e6, vcpus=n, memory_bytes=1 << 30) for n in (2, 4)],
    )
    assert set(along(both, VCPUS)["panel"]) == {"1GiB", "1 GiB a vCPU"}


def test_overcommit_is_a_condition_of_its_own(study: Study) -> None:
    found = facts(study, *[row(1e6, vcpus=n, cores=n // part) for n in (2, 4) for part in (1, 2)])
    assert {"a core for each vCPU", "2 vCPUs a core"} <= set(along(found, VCPUS)["panel"])


def test_workloads_that_differ_in_read_first_alone_are_an_axis(study: Study) -> None:
    found = families(study.workloads, "read_first")
    assert {name: value for name, (_, value) in found.items()} == {"w0": 0.0, "w50": 0.5, "w100": 1.0}
    assert {family for family, _ in found.values()} == {"w0 ... w100"}
    rows = [row(1e6 * n, workload=w, backing=b) for n, w in enumerate(("w0", "w50", "w100"), 1) for b in ("shmem", "anonymous")]
    lines = along(facts(study, *rows), READ_FIRST)
    assert sorted(set(lines["x"])) == [0.0, 0.5, 1.0]


def test_an_axis_that_does_not_move_has_no_lines(study: Study) -> None:
    found = facts(study, row(1), row(2, backing="shmem"), row(3, workload="other"))
    assert [moves(found, axis, standings(found)) for axis in AXES] == [None] * len(AXES)


def test_bands_are_those_of_replicates_and_bars_those_of_costs(study: Study) -> None:
    rows = [row(ns * 1e6 * (r + 1), r, vcpus=n, backing=b) for n in (1, 2) for r in (0, 1) for b, ns in (("shmem", 1), ("anonymous", 3))]
    rows += [row(ns * 1e6, vcpus=2, backing=b, costs="default@vm_exit_ns=high") for b, ns in (("shmem", 2), ("anonymous", 12))]
    lines = along(facts(study, *rows), VCPUS).set_index(["label", "x"])
    slow = lines.loc["anonymous", 2]
    assert (slow["y"], slow["y_low"], slow["y_high"], slow["y_cost_low"], slow["y_cost_high"]) == (4.5, 3, 6, 12, 12)
    assert (slow["more"], slow["more_low"], slow["more_high"]) == pytest.approx((200, 200, 200))
    assert (slow["more_cost_low"], slow["more_cost_high"]) == pytest.approx((500, 500))
    assert np.isnan(lines.loc["anonymous", 1]["y_cost_low"])


def test_winners_change_where_another_line_is_clearly_faster() -> None:
    lines = {"a": (10, 10, 20), "b": (20, 9.95, 10)}
    rows = pd.DataFrame([{"panel": "p", "label": name, "x": x, "y": y} for name, ys in lines.items() for x, y in enumerate(ys)])
    assert winners(rows).to_numpy().tolist() == [["p", 0, 1, "a"], ["p", 2, 2, "b"]]


def test_lines_that_win_somewhere_are_among_the_coloured_ones(study: Study) -> None:
    """Of 24 settings that hold 8 different times, the one that is fastest with 2 vCPUs alone has a colour."""
    rows = [row(1e6 * (5 + threads), vcpus=n, prealloc="populate", prealloc_threads=threads) for n in (1, 2) for threads in range(2, 26)]
    rows += [row(1e6 * (40 if n == 1 else 1), vcpus=n, backing="shmem") for n in (1, 2)]
    lines = along(facts(study, *rows), VCPUS)
    ranks = lines.groupby("label")["rank"].first()
    assert ranks["shmem"] >= 0
    assert (ranks >= 0).sum() == HIGHLIGHTED


def test_rates_are_accesses_of_all_vcpus(study: Study) -> None:
    found = facts(study, *[row(1e9 / n, vcpus=n) for n in (1, 2, 4)])
    moved = moves(found, VCPUS, standings(found), rates)
    assert moved is not None
    assert list(moved.rows["y"]) == [1000, 2000, 4000]


def test_a_sample_gives_medians_and_quartiles(study: Study) -> None:
    rows = [row(1e6 * ns, vcpus=n, thp_failure=ns / 10) for n in (1, 2) for ns in (1, 2, 3, 4, 5)]
    moved = moves(found := facts(study, *rows, sampled=True), VCPUS, standings(found))
    assert moved is not None
    assert moved.sampled
    assert set(moved.rows["panel"]) == {TOGETHER}
    assert moved.rows[["y", "y_low", "y_high"]].to_numpy().tolist() == [[3, 2, 4]] * 2


def test_neighbouring_values_are_taken_together() -> None:
    x = thinned(pd.Series(np.arange(1000.0)), 64)
    assert x.nunique() == 64
    assert (x <= np.arange(1000.0)).all() and (np.arange(1000.0) - x).max() < 17
    assert thinned(pd.Series([1.0, 2.0]), 64).tolist() == [1.0, 2.0]


# --- profiles


def test_parts_of_the_time_add_up_and_what_is_left_is_the_rest(study: Study) -> None:
    measured = {**dict.fromkeys(PARTS, 0), "clear_ns": 30, "flush_ns": 20, "core_wait_ns": 50, "fault_ns": 100}
    found = facts(study, {**row(1000), **measured})
    parts = profiles.time_parts(found, standings(found)).set_index("part")
    assert parts["share"].sum() == pytest.approx(100)
    assert parts["x"].to_dict() == pytest.approx(
        {"clearing memory": 30e-6, "TLB shootdowns": 20e-6, "waiting for a CPU": 50e-6, profiles.REST: 50e-6}
    )


def test_latencies_have_every_quantile_of_what_faults(study: Study) -> None:
    measured = {column: 1000 * place for place, column in enumerate(QUANTILES, 1)}
    silent = {**row(2, backing="shmem"), **dict.fromkeys(QUANTILES, 0)}
    found = facts(study, {**row(1), **measured}, silent)
    rows = profiles.latencies(found, standings(found))
    assert list(zip(rows["label"], rows["quantile"], rows["y"], strict=True)) == [
        ("anonymous", name, place) for place, name in enumerate(QUANTILES.values(), 1)
    ]


def test_settings_that_nothing_beats_in_time_and_memory_have_letters(study: Study) -> None:
    of = {"shmem": (10, 8), "anonymous": (20, 4), "anonymous_thp": (20, 8), "anonymous_hugetlb_2mb": (30, 2)}
    found = facts(study, *[{**row(ns, backing=backing), "held_bytes": held << 20} for backing, (ns, held) in of.items()])
    rows = profiles.memory_and_time(found, standings(found)).set_index("label")
    assert rows["rank"].to_dict() == {"shmem": 0, "anonymous": 1, "anonymous_thp": -1, "anonymous_hugetlb_2mb": 2}
    assert rows.loc["shmem", "x"] == 8


# --- sensitivity


def test_break_even_is_where_the_sign_changes() -> None:
    found = sensitivity.break_even(lambda ns: ns - 777.0, (0, -777.0), (10_000, 9_223.0))
    assert abs(found - 777) <= 100
    assert np.isnan(sensitivity.break_even(lambda ns: 1.0, (0, 1.0), (10, 1.0)))


SMALL = """
[study]
name = "duel"
seed = 3
[point]
memory = "2MiB"
workload = "first_touch"
vcpus = {vcpus}
[[block]]
grid = {{ backing = ["anonymous", "anonymous_thp"], costs = {costs} }}
"""


def run(folder: Path, costs: str = '["default"]', vcpus: int = 1) -> Path:
    path = folder / "duel.toml"
    path.write_text(SMALL.format(costs=costs, vcpus=vcpus))
    sweep.run(path, folder / "duel", sweep.RunOptions(executor="inline", quiet=True))
    return folder / "duel"


def felt(place: Path) -> sensitivity.Sensitivity | None:
    dataset = sweep.open_dataset(place)
    found = gather(dataset)
    standing = standings(found)
    with connection({"points": dataset.scanned("points")}) as database:
        return sensitivity.sensitivity(found, standing, details(database, found, standing.reference))


def test_screening_finds_the_costs_that_move_the_difference(tmp_path: Path) -> None:
    """First touch of 2 MiB: 512 faults against one, which clears 2 MiB."""
    found = felt(run(tmp_path))
    assert found is not None
    assert (found.best, found.rival) == ("anonymous_thp", "anonymous")
    strongest = list(found.effects["cost"])
    assert "clear_2m_ns" in strongest[:3]
    assert not {"cow_4k_ns", "tlb_flush_ns", "split_pmd_ns"} & set(strongest)
    clear = found.effects.set_index("cost").loc["clear_2m_ns"]
    assert clear["low"] > found.mean > clear["high"]
    assert found.flipped == 0
    assert "Morris" in found.note


def test_screening_is_the_same_each_time(tmp_path: Path) -> None:
    place = run(tmp_path)
    first, second = felt(place), felt(place)
    assert first is not None and second is not None
    pd.testing.assert_frame_equal(first.effects, second.effects)


def test_where_the_model_gives_something_else_the_studys_own_points_speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = '["default", "default@clear_2m_ns=4000000", "default@clear_2m_ns=low", "default@vm_exit_ns=low"]'
    place = run(tmp_path, costs)
    monkeypatch.setattr(sensitivity.Duel, "agrees", lambda *_: False)
    found = felt(place)
    assert found is not None
    assert (found.flipped, found.note) == (None, "from the study's own points with moved costs")
    clear = found.effects.set_index("cost").loc["clear_2m_ns"]
    assert clear["low"] > 0 > clear["high"]
    assert 190_000 < clear["flips"] < 4_000_000
    assert found.effects["mu_star"].isna().all()


def test_a_row_that_the_model_does_not_give_is_no_base_for_more_runs(tmp_path: Path) -> None:
    dataset = sweep.open_dataset(run(tmp_path))
    found = gather(dataset)
    standing = standings(found)
    with connection({"points": dataset.scanned("points")}) as database:
        rows = details(database, found, standing.reference)
    rivals = standing.rivals()
    assert rivals is not None
    duel = sensitivity.duel_of(found, standing, rivals)
    assert duel is not None
    assert duel.agrees(rows, rivals)
    assert not duel.agrees(rows.assign(total_ns=rows[TIME] + 1), rivals)


def test_ranges_come_from_the_file_or_the_shared_one_or_from_the_studys_own_moves(tmp_path: Path, study: Study) -> None:
    shared = load_costs("default", tmp_path)
    assert sensitivity.with_ranges(study, "default") == shared
    mine = replace(shared, values={**shared.values, Cost.VM_EXIT_NS: 501})
    assert sensitivity.with_ranges(replace(study, costs={"default": mine}), "default") == mine, "read from its file, with its ranges"
    changed = replace(mine, ranges={})
    moved = replace(changed, values={**changed.values, Cost.VM_EXIT_NS: 900})
    other = replace(study, costs={"default": changed, "default@vm_exit_ns=high": moved})
    assert sensitivity.with_ranges(other, "default") is None
    own = replace(study, costs={"mine.toml": changed, "mine.toml@vm_exit_ns=high": moved})
    found = sensitivity.with_ranges(own, "mine.toml")
    assert found is not None
    assert dict(found.ranges) == {Cost.VM_EXIT_NS: (501, 900)}
    assert set(COST_NAMES.values()) == set(found.values)


def test_points_come_back_from_their_rows() -> None:
    point = Point.model_validate({"memory": "3MiB", "khugepaged": {"scan_sleep_ms": 5}, "ksm": {"fraction": 0.5}, "vcpus": 3})
    assert sensitivity.point_of(point.columns()).columns() == point.columns()


# --- tables


def test_a_table_of_too_many_points_is_an_even_sample_and_always_the_same(tmp_path: Path) -> None:
    place = fabricate.dataset(tmp_path, 12_000, {"vcpus": list(range(1, 4001)), "backing": ["anonymous", "shmem", "anonymous_thp"]}, 2)
    found = gather(sweep.open_dataset(place))
    table = general_table(found)
    assert len(table.frame) == 5000
    few = pd.Series(1, index=table.frame.index)
    assert table.within(few, 9999).note == "5,000 of 6,000 configurations, an even sample by their ids"
    assert len(table.within(few, 70).frame) == 70
    again = general_table(gather(sweep.open_dataset(place)))
    pd.testing.assert_frame_equal(table.frame, again.frame)
    assert 0.63 < (table.frame["vcpus"].astype(int) <= 2000).mean() < 0.70  # 4,000 of the 6,000


def test_configurations_stand_in_the_order_of_their_parameters(study: Study) -> None:
    found = facts(study, *[row(1, kernel=k, vcpus=n, backing=b) for b in ("shmem", "anonymous") for n in (8, 1) for k in ("6.10", "6.5")])
    table = general_table(found).frame
    assert table[["kernel", "vcpus", "backing"]].to_numpy().tolist()[:4] == [
        ["6.5", "1", "anonymous"],
        ["6.5", "1", "shmem"],
        ["6.5", "8", "anonymous"],
        ["6.5", "8", "shmem"],
    ]


def test_duckdb_sees_the_tables_it_is_given_only(tmp_path: Path) -> None:
    secret = tmp_path / "x.csv"
    secret.write_text("a\n1\n")
    with connection({"points": pa.table({"a": [1]})}) as database:
        assert database.sql("select * from points").fetchall() == [(1,)]
        with pytest.raises(duckdb.Error):
            database.sql(f"select * from '{secret}'").fetchall()
