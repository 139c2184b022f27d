"""Drivers and workers that are killed at any time, and memory that runs out: nothing is lost, nothing stands twice, nobody is left."""

import fcntl
import json
import os
import sys
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest

import sweep
from sweep.dataset import seal
from sweep.dataset.storage import TEMP_PREFIX
from sweep.dataset.store import Store
from sweep.errors import EnvironmentProblemError
from sweep.plan import Points
from sweep.point import Ran, Runner
from sweep.runner import RunOptions
from sweep.verify import verify
from tests import greedy
from tests.warm import Answer, Order, WarmDrivers

KILLS = int(os.environ.get("FAULTSWEEP_KILLS", "100"))
WORKER_KILLS = KILLS // 2
STUDY = """
[study]
name = "killed"
seed = 3
replicates = 2
[point]
memory = "1MiB"
workload = "one"
[[block]]
grid = { kernel = ["6.1", "6.13"], vcpus = [1, 2, 3, 4] }
[workload.one]
steps = [{ op = "touch", access = "read" }, { op = "touch", order = "random" }]
"""


@pytest.fixture(scope="module")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmDrivers]:
    with WarmDrivers(tmp_path_factory.mktemp("drivers") / "stderr") as warm:
        yield warm


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "killed.toml"
    path.write_text(STUDY)
    return str(path)


def files_of(out: Path) -> dict[str, bytes]:
    """All that sealing must make identical."""
    tables = {str(path.relative_to(out)): path.read_bytes() for table in ("points", "steps", "errors") for path in (out / table).glob("*")}
    return {**tables, "sealed.json": (out / "sealed.json").read_bytes()}


def stage(out: Path) -> str:
    """How far a run came before it was killed."""
    if (out / "sealed.json").exists():
        return "after it was sealed" if not json.loads((out / "sealed.json").read_text())["absorbed"] else "between seal and clean-up"
    if not (out / "study.json").exists():
        return "before its first file"
    if list(out.glob(f"**/{TEMP_PREFIX}*")):
        return "inside a file"
    kept = json.loads((out / "study.json").read_text())["points"]
    rows = sum(json.loads(path.read_text())["parts"][0]["rows"] for path in (out / "commits").glob("*.json"))
    return "before the seal, all points done" if rows == kept else "between files"


@pytest.mark.parametrize(("executor", "kills"), [("inline", KILLS), ("local", max(1, KILLS // 25))])
def test_killed_drivers_go_on_to_the_same_dataset(
    drivers: WarmDrivers, study: str, tmp_path: Path, executor: str, kills: int, record_property: Any
) -> None:
    """At times drawn over the length of a whole run; whoever is through begins anew. Workers end with their driver."""
    random, reference = Random(kills), tmp_path / "reference"
    drivers.run(Order(study, str(reference)))
    length = drivers.run(Order(study, str(tmp_path / "length"), executor)).seconds
    stages, number, out = Tally[str](), 0, tmp_path / "0"
    for _ in range(20 * kills):
        answer = drivers.run(Order(study, str(out), executor, random.uniform(0, length)))
        if answer.killed:
            stages[stage(out)] += 1
        else:
            assert files_of(out) == files_of(reference)
            number, out = number + 1, tmp_path / str(number + 1)
        if stages.total() == kills:
            break
    assert stages.total() == kills
    for name, count in stages.items():
        record_property(f"drivers killed {name}", count)
    drivers.run(Order(study, str(out), executor))
    assert files_of(out) == files_of(reference)
    assert verify(out, recompute=2).wrong == []


def test_killed_workers_lose_no_row(drivers: WarmDrivers, study: str, tmp_path: Path, record_property: Any) -> None:
    drivers.run(Order(study, str(tmp_path / "reference")))
    killed, number = 0, 0
    while killed < WORKER_KILLS and number < 20 * WORKER_KILLS:
        out, number = tmp_path / str(number), number + 1
        answer: Answer = drivers.run(Order(study, str(out), "local", worker_kills=WORKER_KILLS - killed, seed=number))
        killed += answer.worker_kills
        assert sweep.open_dataset(out).errors().empty
        assert files_of(out) == files_of(tmp_path / "reference")
    assert killed == WORKER_KILLS
    record_property("workers killed", killed)


def run(study: str, out: Path, executor: str = "local") -> sweep.RunSummary:
    return sweep.run(study, out, RunOptions(executor=executor, workers=1, quiet=True))


@pytest.fixture
def greedy_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two points and one that needs GREEDY memory, in one chunk."""
    monkeypatch.setattr("sweep.price.FEWEST", 1)
    monkeypatch.setattr("sweep.runner.available_bytes", lambda: 1 << 50)
    path = tmp_path / "greedy.toml"
    text = STUDY.replace("vcpus = [1, 2, 3, 4]", "vcpus = [1]").replace("replicates = 2\n", "")
    text = text.replace('op = "touch"', 'op = "touch", touches = 100')
    path.write_text(text + '[[block]]\npoint = { memory = "16TiB", vcpus = 64 }\n')
    return str(path)


@pytest.mark.parametrize(
    ("serve", "kind", "message"),
    [
        (greedy.serve_in_little_memory, "MemoryError", "Unable to allocate"),
        (greedy.serve_under_the_oom_killer, "WorkerDiedError", "killed by SIGKILL, as the kernel does when memory runs out"),
    ],
)
def test_a_point_without_memory_is_tried_again_told_apart_and_becomes_a_row(
    greedy_study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any, kind: str, message: str
) -> None:
    monkeypatch.setattr("sweep.executors.local.serve", serve)
    summary = run(greedy_study, tmp_path / "x")
    assert (summary.done, summary.failed, summary.exit_status) == (2, 1, 1)
    (row,) = sweep.open_dataset(tmp_path / "x").errors().to_dict("records")
    assert (row["kind"], json.loads(row["parameters"])["vcpus"]) == (kind, 64)
    assert message in row["message"]
    times = pd.concat([pd.read_parquet(path) for path in (tmp_path / "x" / "provenance").glob("*.parquet")])
    assert times.set_index("point_id").loc[row["point_id"], "attempt"] == 2
    assert set(times[times["point_id"] != row["point_id"]]["attempt"]) == {1}
    assert len({path.stem for path in (tmp_path / "x" / "commits").iterdir()}) > 2, "the chunk was not halved"


@pytest.mark.parametrize("failures", [1, 2, 1_000_000])
def test_memory_that_comes_back_costs_no_row(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    """In this process, too: the chunk alone, once more, in halves."""
    tried = Tally[str]()

    def greedy_for_a_while(runner: Runner, points: Points) -> Ran:
        for planned in (points[number] for number in range(len(points))):
            tried[planned.point_id] += 1
            if planned.point.vcpus == 3 and planned.replicate and tried[planned.point_id] <= failures:
                raise MemoryError
        return real(runner, points)

    real = Runner.run
    monkeypatch.setattr(Runner, "run", greedy_for_a_while)
    summary = run(study, tmp_path / "x", "inline")
    failed = 2 if failures > 2 else 0
    assert (summary.done, summary.failed, summary.exit_status) == (16 - failed, failed, int(failed > 0))
    errors = sweep.open_dataset(tmp_path / "x").errors()
    assert list(errors["kind"]) == list(errors["message"]) == ["MemoryError"] * failed


def test_a_worker_that_dies_before_it_comes_to_work_blames_no_point(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST", str(tmp_path / "first"))
    monkeypatch.setattr("sweep.executors.local.serve", greedy.killed_at_its_first_start)
    assert run(study, tmp_path / "x").exit_status == 0
    assert (tmp_path / "first").exists()
    monkeypatch.setattr("sweep.executors.local.serve", greedy.killed_at_its_start)
    with pytest.raises(EnvironmentProblemError, match=r"killed by SIGKILL.* before it came to work.*__main__.*--executor inline"):
        run(study, tmp_path / "y")
    assert sweep.open_dataset(tmp_path / "y").errors().empty


def test_a_worker_that_is_killed_inside_its_answer_holds_nobody_up(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the answer would never come."""
    monkeypatch.setenv("FIRST", str(tmp_path / "first"))
    monkeypatch.setattr("sweep.executors.local.serve", greedy.killed_inside_its_answer)
    assert run(study, tmp_path / "x").exit_status == 0
    assert (tmp_path / "first").exists()


def test_the_process_that_seals_holds_the_lock_of_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver may be killed; the next one must not take for leftovers what it publishes."""
    out = tmp_path / "x"

    def seal_here(store: Store, plan_digest: str, study_digest: str) -> None:
        with (out / ".lock").open("a") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (out / "looked").touch()

    monkeypatch.setattr(seal, "seal_here", seal_here)
    monkeypatch.setattr(sys, "argv", ["seal", str(out), "plan", "study"])
    seal.main()
    assert (out / "looked").exists()
