"""Verdict rules, and the report of the released thread dataset."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import sweep
from sweep.configs import config_root
from sweep.report import overcommit
from sweep.report.build import Report
from sweep.report.claims import Claim, Verdict, World, judge, worlds_of
from sweep.report.thread import CLAIMS, REPORTED, SWITCHES, boot, saved_exits, switch_as_expected, switch_row, switch_table
from sweep.report.thread import World as ThreadWorld

PUBLISHED = config_root().parent / "results" / "published" / "thread"


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    dataset = sweep.open_dataset(PUBLISHED)
    return worlds_of(dataset.points(), dataset.steps())


def a_claim(**changes: object) -> Claim:
    base = Claim("t", "w", "m", "r", "u", lambda world: float(world.points["x"].iloc[0]), lambda v: v > 1, lambda world: "figure")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def made(values: dict[tuple[str, int], float]) -> list[World]:
    return [World(costs, replicate, pd.DataFrame({"x": [value]}), pd.DataFrame()) for (costs, replicate), value in values.items()]


def test_a_claim_that_is_true_everywhere_holds() -> None:
    judged = judge(a_claim(), made({("default", 0): 2, ("default", 1): 3, ("default@a_ns=low", 0): 9}))
    assert judged is not None
    assert (judged.verdict, judged.spread, judged.cost_spread, judged.flips) == (Verdict.HOLDS, (2, 3), (2, 9), ())


def test_a_claim_that_is_false_does_not_hold_and_says_where_it_flips() -> None:
    judged = judge(a_claim(), made({("default", 0): 0, ("default@a_ns=low", 0): 9}))
    assert judged is not None
    assert judged.verdict == Verdict.FAILS
    assert "flips at a_ns=low" in judged.text


def test_a_verdict_that_flips_inside_a_costs_range_says_so() -> None:
    judged = judge(a_claim(), made({("default", 0): 2, ("default@a_ns=low", 0): 0.5, ("default@b_ns=high", 0): 3}))
    assert judged is not None
    assert judged.verdict == Verdict.DEPENDS
    assert "not a_ns=low" in judged.text


def test_replicates_that_disagree_are_not_a_verdict() -> None:
    judged = judge(a_claim(), made({("default", 0): 2, ("default", 1): 0}))
    assert judged is not None
    assert (judged.verdict, "1 of 2" in judged.text) == (Verdict.DEPENDS, True)


def test_a_claim_without_rows_is_left_out() -> None:
    assert judge(a_claim(measure=lambda world: None), made({("default", 0): 2})) is None


def test_every_claim_of_the_thread_is_judged_with_figures_over_costs(worlds: list[World]) -> None:
    judged = {claim.text: judge(claim, worlds) for claim in CLAIMS}
    assert all(judged.values())
    verdicts = {text: result.verdict for text, result in judged.items() if result}
    assert verdicts["a write to a CoW page takes two TDP faults"] == Verdict.HOLDS
    assert verdicts["mmu_lock is taken for write three times per CoW, two once change_pte is gone"] == Verdict.HOLDS
    split = judged["a huge zero page is mapped read-only, split, then copied page by page"]
    assert split is not None
    assert split.verdict == Verdict.DEPENDS
    assert "older than 6.13" in split.text


@pytest.mark.parametrize("workload", REPORTED)
def test_patch_2_saves_what_was_reported_up_to_three_percent_more(worlds: list[World], workload: str) -> None:
    for world in worlds:
        saved = saved_exits(world, workload)
        if saved is not None:
            assert REPORTED[workload] <= saved <= 1.03 * REPORTED[workload], (world.costs, world.replicate)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: s.name)
def test_each_switch_of_the_thread_does_what_was_said(worlds: list[World], switch: object) -> None:
    default: list[ThreadWorld] = [world for world in worlds if world.costs == "default"]
    assert len(default) == 3
    for world in default:
        row, base = switch_row(world, switch), boot(world)  # type: ignore[arg-type]
        assert row is not None
        assert base is not None
        assert base["cow_4k"] > 8000
        assert switch_as_expected(switch, row, base)  # type: ignore[arg-type]
    assert set(switch_table(default[0]).frame["as said"]) == {"yes"}


def test_command_prints_the_answer_and_the_table_and_writes_the_page(study_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    sweep.run(study_file, out, sweep.RunOptions(executor="inline", quiet=True))
    done = subprocess.run([sys.executable, "-m", "sweep", "report", str(out)], capture_output=True, text=True, check=True)
    assert "takes the least time in" in done.stdout
    assert "mmu_lock_write" in done.stdout
    assert f"page: {out / 'report' / 'index.html'}" in done.stdout
    assert (out / "report" / "index.html").stat().st_size > 100_000


def test_report_as_json_has_claims_with_their_rows(thread_report: Report) -> None:
    report = json.loads(json.dumps(thread_report.as_json()))
    assert [claim["claim"] for claim in report["claims"]] == [claim.text for claim in CLAIMS]
    assert all(claim["figure"] and claim["verdict"] and claim["message"] for claim in report["claims"])
    assert len(report["tables"]) == len(REPORTED) + 2  # overcommit, switches
    assert report["answer"].startswith(
        "Hardly: patch 2 saves 8,016 exits and 0.30% of the guest's time. THP instead of 4K saves 26.1 times"
    )


def test_overcommit_brings_retry_storms_to_which_patch_2_is_immune(worlds: list[World]) -> None:
    """On half the cores; settings without copy-on-write have none."""
    default = worlds[0]
    vain = {(name, cores): overcommit.writes_in_vain(default, name, cores) for name in overcommit.SETTINGS for cores in (8, 4)}
    assert vain["4K", 4] is not None and vain["4K", 8] is not None
    assert vain["4K", 4] > 10 * vain["4K", 8]
    assert vain["4K, patch 2", 4] == 0
    for calm in ("always-writable slot", "huge zero page off", "hugetlb"):
        assert vain[calm, 4] == 0
    judged = judge(overcommit.CLAIM, worlds)
    assert judged is not None
    assert judged.verdict == Verdict.HOLDS
