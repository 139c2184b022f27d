"""Studies that answer their question themselves: what they say of small versions of themselves, and of datasets that are not theirs."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import sweep
from sweep.configs import config_root
from sweep.report.build import build_report
from sweep.report.claims import Judged, Verdict, World, worlds_of
from sweep.report.contest import Contest, Stretch, alike, contest_table, flips, listed, one_of, percent, ratio, stretches, sure, together
from sweep.report.stories import STORIES
from sweep.report.stories.scaling import dominated_from
from sweep.report.tables import ReportTable
from sweep.study import load_study
from tests.conftest import SMALL_STUDY

STUDIES = sorted((config_root() / "studies").glob("*.toml"))
FILES = {path.stem: path for path in STUDIES}
SMALL = {"thp-or-not": "memory=128MiB", "dirty-log": "memory=16MiB", "snapshot": "memory=16MiB", "bloat": "memory=1GiB"}
OWN = {
    "hugetlb-boot": """
[study]
name = "hugetlb-boot"
[point]
kernel = "6.12"
vcpus = 8
memory = "16GiB"
backing = "anonymous_hugetlb_2mb"
[[block]]
where = "prealloc == 'populate' or (prealloc_threads == 1 and workload != 'nothing')"
grid = { workload = ["nothing", "boot_ovmf", "first_touch"], prealloc = ["none", "populate"], prealloc_threads = [1, 16, 64] }
""",
    "scaling": """
[study]
name = "scaling"
replicates = 2
[point]
kernel = "6.12"
[[block]]
grid = { workload = ["demand_paging", "read_then_write"], backing = ["anonymous", "anonymous_hugetlb_2mb"] }
zip = { vcpus = [1, 16, 64], memory = ["2MiB", "32MiB", "128MiB"] }
[[block]]
grid = { backing = ["anonymous", "anonymous_hugetlb_2mb"], cores = [8, 16] }
point = { workload = "read_then_write", memory = "64MiB", vcpus = 16 }
""",
}
Told = tuple[list[ReportTable], list[Judged], str]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[World]]:
    """The worlds of a small version of a study; each is run once."""
    known: dict[str, list[World]] = {}

    def of(name: str) -> list[World]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            if name in OWN:
                (folder / "study.toml").write_text(OWN[name])
            study = load_study(folder / "study.toml") if name in OWN else load_study(FILES[name], [SMALL[name], "replicates=1"])
            sweep.run(study, folder / "data", sweep.RunOptions(executor="inline", quiet=True))
            dataset = sweep.open_dataset(folder / "data")
            known[name] = worlds_of(dataset.points(), dataset.steps())
        return known[name]

    return of


def verdicts(claims: Sequence[Judged]) -> dict[str, Verdict]:
    return {judged.claim.text: judged.verdict for judged in claims}


# --- every study


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_its_question_in_its_first_line(path: Path) -> None:
    head = path.read_text().split("[study]")[0]
    assert head.startswith("# Question: ")
    assert "?" in head
    assert load_study(path).name == path.stem


def test_every_study_answers_its_question_itself_or_is_answered_by_observations() -> None:
    others = set(FILES) - set(STORIES)
    assert set(STORIES) <= set(FILES)
    assert all(load_study(FILES[name]).observations for name in others), others


@pytest.mark.parametrize("name", [*SMALL, *OWN])
def test_a_study_has_an_answer_tables_and_judged_claims(worlds: Callable[[str], list[World]], name: str) -> None:
    tables, claims, answer = STORIES[name].told(worlds(name))
    assert answer.endswith(".")
    assert "nan" not in answer.lower()
    assert len(tables) > 1
    assert all(len(table.frame) and not table.frame.isna().any(axis=None) for table in tables)
    assert len(claims) == len(STORIES[name].claims)
    assert all(judged.figure for judged in claims)


@pytest.mark.parametrize("name", list(STORIES))
def test_a_dataset_that_only_has_the_name_is_reported_as_any_other(name: str, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(SMALL_STUDY.replace('name = "small"', f'name = "{name}"'))
    sweep.run(tmp_path / "study.toml", tmp_path / "data", sweep.RunOptions(executor="inline", quiet=True))
    dataset = sweep.open_dataset(tmp_path / "data")
    assert STORIES[name].told(worlds_of(dataset.points(), dataset.steps())) == ([], [], "")


@pytest.mark.parametrize("name", [*SMALL, *OWN])
def test_a_dataset_that_is_not_all_there_has_an_answer_or_none(worlds: Callable[[str], list[World]], name: str) -> None:
    """Any part of the points: what lacks its counterpart is left out, and nothing is said of nothing."""
    for every, first in [(2, 0), (2, 1), (3, 1), (5, 2), (7, 3), (50, 7)]:
        part = [World(w.costs, w.replicate, w.points.sort_values("point_id").iloc[first::every], w.steps) for w in worlds(name)]
        tables, _, answer = STORIES[name].told([world for world in part if len(world.points)])
        assert "nan" not in answer.lower()
        assert bool(tables) or answer == ""


def test_the_report_has_the_story(tmp_path: Path) -> None:
    study = load_study(FILES["bloat"], ["memory=1GiB", "replicates=1", "kernel=6.12"])
    sweep.run(study, tmp_path / "data", sweep.RunOptions(executor="inline", quiet=True))
    report = build_report(tmp_path / "data")
    text = report.as_text()
    assert report.answer in text
    assert "CLAIM   where one page in 64 is written, THP costs more memory and more time" in text
    assert "Memory held and time" in text


# --- what they say


def test_thp_wins_where_all_is_written_and_loses_where_little_is(worlds: Callable[[str], list[World]]) -> None:
    tables, claims, answer = STORIES["thp-or-not"].told(worlds("thp-or-not"))
    assert "4K pages win nowhere" in answer
    assert "THP begins to win between one page in 16 and one page in 4 written" in answer
    assert set(tables[1].frame["flips between"]) == {"one page in 16 and one page in 4", ""}
    found = verdicts(claims)
    assert found["THP takes no longer than 4K pages where all memory is written, whatever fails and is read first"] == Verdict.HOLDS


def test_thp_that_loses_where_allocations_fail_is_said_to_lose(worlds: Callable[[str], list[World]]) -> None:
    """The same dataset, but that a failing allocation takes long."""

    def slower(world: World) -> World:
        failing = world.points["thp_failure"] >= 0.6
        points = world.points.assign(total_ns=world.points["total_ns"].where(~failing, world.points["total_ns"] * 5))
        return World(world.costs, world.replicate, points, world.steps)

    tables, claims, answer = STORIES["thp-or-not"].told([slower(world) for world in worlds("thp-or-not")])
    assert re.search(r"4K pages win in \d+ of \d+ cases", answer)
    assert "30% and 60%" in set(tables[0].frame["flips between"])
    assert Verdict.FAILS in verdicts(claims).values()


def test_pml_spares_the_exits_of_a_round_and_eager_splitting_matters_before_6_2(worlds: Callable[[str], list[World]]) -> None:
    tables, claims, answer = STORIES["dirty-log"].told(worlds("dirty-log"))
    assert set(verdicts(claims).values()) == {Verdict.HOLDS, Verdict.DEPENDS}
    assert any("the kernel is not 6.1" in judged.text for judged in claims)
    assert "exits a page: 1) under write protection" in answer
    main = tables[0].frame
    assert set(main.loc[main["PML"] == "no", "exits a written page"]) == {"1"}


def test_a_child_doubles_hugetlb_and_leaves_split_huge_pages_behind(worlds: Callable[[str], list[World]]) -> None:
    tables, claims, answer = STORIES["snapshot"].told(worlds("snapshot"))
    assert "1 MiB more with 4K, THP and private memfd, 16 MiB more (2 MiB where the pages lie together) with hugetlb 2M" in answer
    assert any("the kernel is not 6.18" in judged.text for judged in claims)
    after = next(table for table in tables if table.title.startswith("THP against 4K: writes after")).frame.set_index("kernel")
    assert after.loc["6.18", "one page in 16"] == "0%"
    assert after.loc["6.12", "one page in 16"].startswith("x ")


def test_sparse_writes_hold_all_memory_with_thp(worlds: Callable[[str], list[World]]) -> None:
    _, claims, answer = STORIES["bloat"].told(worlds("bloat"))
    assert "makes the host hold 1 GiB with THP instead of 64 MiB" in answer
    assert "It begins to save time between one page in 16 and one page in 4" in answer
    assert "16 MiB on 6.12, 1 GiB on 6.18 with no khugepaged" in answer
    assert any("max_ptes_none=64" in judged.text for judged in claims)


def test_preallocation_pays_where_all_memory_is_touched(worlds: Callable[[str], list[World]]) -> None:
    tables, claims, answer = STORIES["hugetlb-boot"].told(worlds("hugetlb-boot"))
    assert set(tables[0].frame["no shorter beyond"]) == {"16 threads"}
    assert verdicts(claims)["preallocating a guest's memory does not pay for a boot"] == Verdict.HOLDS
    assert "at least 16 threads preallocate" in claims[1].text
    assert "with 16 or more" in answer


def test_storms_come_with_copies_and_a_crowd(worlds: Callable[[str], list[World]]) -> None:
    _, claims, answer = STORIES["scaling"].told(worlds("scaling"))
    assert "16 vCPUs on 8 cores run into retry storms" in answer
    assert "None in any crowd: hugetlb 2M on 6.12." in answer
    assert "Most is done in a second by 16 vCPUs (4K), 64 vCPUs (hugetlb 2M)" in answer
    assert set(verdicts(claims).values()) == {Verdict.HOLDS}


# --- contests


def cases(gains: dict[tuple[str, float], float], costs: str = "default", replicate: int = 0) -> list[dict[str, Any]]:
    """Two rows for each (kernel, condition): 4K takes 100, THP so much less."""
    rows = []
    for (kernel, x), gain in gains.items():
        point = {"kernel": kernel, "x": x, "costs": costs, "replicate": replicate, "workload": f"w{x}"}
        rows += [{**point, "backing": "4K", "total_ns": 100.0}, {**point, "backing": "THP", "total_ns": 100.0 * (1 - gain)}]
    return rows


CONTEST = Contest("THP", "4K", {"backing": "THP"}, {"backing": "4K"}, "x", ("kernel",))


def test_gains_are_of_pairs_that_agree_in_all_else_and_flips_are_found() -> None:
    rows = cases({("6.1", 0.0): 0.5, ("6.1", 1.0): 0.001, ("6.1", 2.0): -1.0, ("6.10", 0.0): 0.5, ("6.10", 1.0): 0.2})
    outcomes = CONTEST.outcomes(pd.DataFrame(rows))
    assert list(outcomes["gain"].round(3)) == [0.5, 0.001, -1.0, 0.5, 0.2]
    courses = dict(CONTEST.courses(outcomes))
    assert courses["6.1",] == [Stretch(1, 0, 0), Stretch(0, 1, 1), Stretch(-1, 2, 2)]
    assert (flips(courses["6.1",]), flips(courses["6.10",])) == ((0, 2), None)
    assert CONTEST.turning(outcomes, lambda x: f"{x:g}") == "between 0 and 2 on 6.1, nowhere on 6.10"
    frame = contest_table("t", CONTEST, outcomes, {"kernel": "kernel"}, lambda x: f"{x:g}").frame
    assert frame.to_dict("records")[0] == {"kernel": "6.1", "0": "50%", "1": "0.1%", "2": "x 2", "flips between": "0 and 2"}


def test_ranges_are_of_replicates_and_of_moved_costs() -> None:
    rows = cases({("6.1", 0.0): 0.4}) + cases({("6.1", 0.0): 0.6}, replicate=1) + cases({("6.1", 0.0): -0.2}, costs="default@a_ns=low")
    outcome = CONTEST.outcomes(pd.DataFrame(rows)).iloc[0]
    assert sure(outcome) == "50% less (replicates 40% ... 60%)"
    rows += cases({("6.1", 0.0): 0.7}, costs="default@a_ns=high")
    outcome = CONTEST.outcomes(pd.DataFrame(rows)).iloc[0]
    assert sure(outcome) == "50% less (replicates 40% ... 60%; each cost over its range 20% more ... 70% less)"


def test_what_one_side_fixes_is_free_on_the_other() -> None:
    rows = [{"backing": "4K", "thp_failure": 0.0, "replicate": 0, "costs": "default", "total_ns": 100.0}]
    rows += [{**rows[0], "backing": "THP", "thp_failure": part, "total_ns": 100 * part + 1} for part in (0.0, 0.5)]
    contest = Contest("THP", "4K", {"backing": "THP"}, {"backing": "4K", "thp_failure": 0.0}, "thp_failure", ())
    assert list(contest.gains(pd.DataFrame(rows))["gain"].round(2)) == [0.99, 0.49]


def test_stretches_end_where_the_winner_changes_by_as_much_as_matters() -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0], "gain": [-0.5, -0.005, 0.005, 0.5]})
    assert stretches(frame, "x") == [Stretch(-1, 1, 1), Stretch(0, 2, 3), Stretch(1, 4, 4)]


def test_words() -> None:
    assert [percent(part) for part in (0.8731, 0.0538, 0.00012, 0, -0.31)] == ["87%", "5.4%", "0%", "0%", "-31%"]
    assert [ratio(gain) for gain in (0.5, -0.4, -60.43)] == ["50%", "-40%", "x 61.4"]
    assert [one_of(part) for part in (1.0, 1 / 16, 1 / 512)] == ["all", "one page in 16", "one page in 512"]
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert alike([("6.1", "x"), ("6.5", "y"), ("6.6", "x")], "{1} on {0}") == "x on 6.1 and 6.6, y on 6.5"
    assert alike([("6.1", "x"), ("6.5", "x")], "{1} on {0}") == "x"
    frame = together(pd.DataFrame({"kernel": ["a", "b", "c"], "y": ["1", "2", "1"]}), ["kernel"])
    assert frame.to_dict("records") == [{"kernel": "a, c", "y": "1"}, {"kernel": "b", "y": "2"}]


def test_waiting_dominates_from_where_it_stays_above_a_half() -> None:
    frame = pd.DataFrame({"vcpus": [1, 2, 4, 8], "waiting": [0.6, 0.1, 0.6, 0.9]})
    assert dominated_from(frame) == 4
    assert dominated_from(frame.assign(waiting=0.1)) is None
