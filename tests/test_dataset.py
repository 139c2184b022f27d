"""Runs and datasets: the same rows and files whatever the executor, interrupted or not; damage is found."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sweep
from sweep.dataset.storage import TEMP_PREFIX
from sweep.dataset.store import Store
from sweep.errors import BudgetExceededError, DatasetError, NondeterminismError, UsageError
from sweep.export import export
from sweep.merge import merge
from sweep.point import Runner
from sweep.runner import RunOptions
from sweep.schema import POINTS, STEPS, arrow_schema
from sweep.verify import verify

QUIET = RunOptions(executor="inline", quiet=True)


def run(study: Path, out: Path, **options: object) -> sweep.RunSummary:
    return sweep.run(study, out, RunOptions(**{"executor": "inline", "quiet": True, **options}))  # type: ignore[arg-type]


def files_of(out: Path) -> dict[str, bytes]:
    """Data files by name: what sealing must make identical."""
    return {str(path.relative_to(out)): path.read_bytes() for table in ("points", "steps", "errors") for path in (out / table).glob("*")}


def forged(rows: pa.Table) -> pa.Table:
    """The same points with other counts."""
    column = rows.schema.get_field_index("pf_taken")
    return rows.set_column(column, rows.schema.field(column), [[n + 1 for n in rows.column(column).to_pylist()]])


@pytest.fixture
def reference(study_file: Path, tmp_path: Path) -> Path:
    out = tmp_path / "reference"
    assert run(study_file, out).exit_status == 0
    return out


@pytest.mark.parametrize(("executor", "workers"), [("inline", 1), ("local", 1), ("local", 3), ("ray", 2)])
def test_every_executor_gives_the_same_files(study_file: Path, tmp_path: Path, reference: Path, executor: str, workers: int) -> None:
    out = tmp_path / executor
    summary = run(study_file, out, executor=executor, workers=workers)
    assert (summary.exit_status, summary.done, summary.failed, summary.left) == (0, 24, 0, 0)
    assert files_of(out) == files_of(reference)


def test_an_interrupted_run_goes_on_and_ends_the_same(study_file: Path, tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "x"
    first = run(study_file, out, limit=7)
    assert (first.exit_status, first.sealed) == (0, None)
    shard = run(study_file, out, shard=(1, 3))
    assert shard.done_before + shard.done == 8
    last = run(study_file, out)
    assert last.done == 24 - first.done - shard.done
    assert files_of(out) == files_of(reference)


def test_a_second_run_does_nothing_and_says_so(study_file: Path, reference: Path) -> None:
    before = files_of(reference)
    again = run(study_file, reference)
    assert (again.done, again.done_before, again.exit_status) == (0, 24, 0)
    assert files_of(reference) == before


def test_new_axis_values_run_only_the_new_points(study_file: Path, reference: Path) -> None:
    study_file.write_text(study_file.read_text().replace("vcpus = [1, 3]", "vcpus = [1, 2, 3]"))
    more = run(study_file, reference)
    assert (more.done_before, more.done, more.total) == (24, 12, 36)
    assert len(sweep.open_dataset(reference).points()) == 36


def test_rows_are_complete_and_typed(reference: Path) -> None:
    points = pd.read_parquet(reference / "points")
    assert list(points.columns) == [column.name for column in POINTS]
    assert points["point_id"].is_unique
    assert points["point_id"].is_monotonic_increasing
    steps = sweep.open_dataset(reference).steps()
    assert list(steps.columns) == [column.name for column in STEPS]
    assert len(steps) == 2 * len(points)
    assert (steps.groupby("point_id")["pf_taken"].sum().sort_index() == points.set_index("point_id")["pf_taken"]).all()
    assert (points["touches"] == points["reads"] + points["writes"]).all()
    assert (points["pf_taken"] == points["pf_fixed"] + points["pf_spurious"] + points["pf_retry"]).all()


def test_data_files_name_no_time_and_no_machine(reference: Path) -> None:
    for path in (reference / "points").iterdir():
        metadata = pq.ParquetFile(path).metadata.metadata or {}
        assert set(metadata) <= {b"faultsweep_schema", b"faultsweep_table"}


def test_sql_sees_the_tables_and_nothing_else(reference: Path) -> None:
    dataset = sweep.open_dataset(reference)
    assert dataset.sql("select count(*) as n from points").to_pylist() == [{"n": 24}]
    joined = dataset.sql("select sum(s.pf_taken) = sum(distinct 0) + sum(s.pf_taken) as same from steps s")
    assert joined.to_pylist() == [{"same": True}]
    for hostile in ("select * from read_csv('/etc/passwd')", "copy points to '/tmp/x.csv'", "attach '/tmp/x.db'", "selec 1"):
        with pytest.raises(UsageError, match="query"):
            dataset.sql(hostile)


def test_another_study_or_seed_is_refused_with_both_digests(study_file: Path, reference: Path) -> None:
    before = files_of(reference)
    study_file.write_text(study_file.read_text().replace("seed = 5", "seed = 6"))
    with pytest.raises(DatasetError, match=r"seed \(5 there, 6 now\).*--new-version"):
        run(study_file, reference)
    study_file.write_text(study_file.read_text().replace("seed = 6", "seed = 5").replace("40.0", "41.0"))
    with pytest.raises(DatasetError, match="workload 'mixed'"):
        run(study_file, reference)
    assert files_of(reference) == before


def test_what_an_extension_adds_has_to_fit_the_budget(study_file: Path, reference: Path) -> None:
    text = study_file.read_text().replace("replicates = 2", "replicates = 3\nbudget_cpu_hours = 1e-9")
    study_file.write_text(text)
    with pytest.raises(BudgetExceededError, match="12 points need about"):
        run(study_file, reference)
    assert run(study_file, reference, yes=True).done == 12


def test_new_version_makes_a_sibling(study_file: Path, reference: Path) -> None:
    study_file.write_text(study_file.read_text().replace("seed = 5", "seed = 6"))
    made = run(study_file, reference, new_version=True)
    assert made.out == reference.with_name("reference.2")
    assert made.done == 24


def test_a_directory_that_is_no_dataset_is_left_alone(study_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DatasetError, match=r"holds notes\.txt"):
        run(study_file, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_point_that_fails_becomes_a_row_and_the_sweep_goes_on(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Runner.prepare

    def fails_with_three_vcpus(runner: Runner, values: Mapping[str, Any]) -> Any:
        if values["vcpus"] == 3:
            raise ArithmeticError("three is too many")
        return real(runner, values)

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "prepare", fails_with_three_vcpus)
        summary = run(study_file, tmp_path / "x")
        assert (summary.exit_status, summary.done, summary.failed) == (1, 12, 12)
        again = run(study_file, tmp_path / "x")
        assert (again.done_before, again.failed) == (12, 12)
        errors = sweep.open_dataset(tmp_path / "x").errors()
        assert len(errors) == 12
        assert set(errors["kind"]) == {"ArithmeticError"}
        assert set(errors["message"]) == {"three is too many"}
        stopped = run(study_file, tmp_path / "y", on_error="stop")
        assert (stopped.exit_status, stopped.left > 0) == (1, True)
    mended = run(study_file, tmp_path / "x")
    assert (mended.done, mended.exit_status) == (12, 0)
    assert sweep.open_dataset(tmp_path / "x").errors().empty


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(content[:-7])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_verify_finds_damage(reference: Path, how: str) -> None:
    assert verify(reference, recompute=3).wrong == []
    path = next((reference / "points").iterdir())
    damage(path, how)
    wrong = verify(reference).wrong
    assert len(wrong) == 1
    assert str(path) in wrong[0]


def test_verify_finds_a_value_that_the_model_does_not_give(study_file: Path, tmp_path: Path) -> None:
    """A part whose digest fits but whose numbers were changed."""
    from sweep.dataset.store import State

    out = tmp_path / "x"
    run(study_file, out, limit=1)
    store = Store(out)
    table = store.read("points")
    key = next((out / "commits").glob("*.json")).stem
    before = store.state().commits[0]
    for part in before.parts:
        store.storage.remove(part.path)
    store.storage.remove(f"commits/{key}.json")
    parts = store.publish(key, {"points": forged(table), "steps": store.read("steps", state=State(None, ()))})
    store.commit(replace(before, parts=parts))
    assert any("differs from what the model gives" in line for line in verify(out, recompute=1).wrong)


def test_a_dataset_makes_its_points_again_without_the_files_it_came_from(study_file: Path, tmp_path: Path) -> None:
    """Included files, overrides and touch lists: study.json holds the study as understood."""
    (tmp_path / "base.toml").write_text(study_file.read_text())
    (tmp_path / "list.csv").write_text("vcpu,gfn,write\n0,5,1\n0,6,0\n")
    top = tmp_path / "top.toml"
    listed = '[workload.mixed]\nsteps = [{ op = "touch_list", path = "list.csv" }]\n'
    top.write_text(f'include = ["base.toml"]\n[study]\nname = "top"\n{listed}')
    study = sweep.load_study(top, ["vcpus=2", "study.replicates=1"])
    sweep.run(study, tmp_path / "x", QUIET)
    for path in (top, tmp_path / "base.toml"):
        path.unlink()
    verdict = verify(tmp_path / "x", recompute=6)
    assert (verdict.wrong, verdict.points, verdict.recomputed) == ([], 6, 6)
    assert set(sweep.open_dataset(tmp_path / "x").points()["touches"]) == {2}


def test_leftovers_of_a_dead_run_do_not_count(study_file: Path, tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "x"
    run(study_file, out, limit=5)
    (out / "points" / f"{TEMP_PREFIX}abc").write_bytes(b"half")
    (out / "points" / "part-without-commit.parquet").write_bytes(b"never committed")
    (out / f"{TEMP_PREFIX}def").write_bytes(b"half")
    assert len(sweep.open_dataset(out).points()) == 5
    run(study_file, out)
    assert files_of(out) == files_of(reference)


def test_a_run_that_died_before_its_study_was_written_is_no_foreign_folder(study_file: Path, tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "x"
    out.mkdir()
    (out / f"{TEMP_PREFIX}abc").write_bytes(b"half of study.json")
    run(study_file, out)
    assert files_of(out) == files_of(reference)
    assert not list(out.glob(f"**/{TEMP_PREFIX}*"))
    (out / "study.toml").unlink()  # it comes after study.json
    run(study_file, out)
    assert (out / "study.toml").read_text() == study_file.read_text()


def test_a_crash_between_seal_and_clean_up_counts_every_row_once(study_file: Path, tmp_path: Path, reference: Path) -> None:
    out = tmp_path / "x"
    run(study_file, out, limit=20)
    commits = {path.name: path.read_bytes() for path in (out / "commits").iterdir()}
    parts = files_of(out)
    run(study_file, out)
    sealed = json.loads((out / "sealed.json").read_text())
    for name, content in commits.items():
        (out / "commits" / name).write_bytes(content)
    for name, content in parts.items():
        (out / name).write_bytes(content)
    sealed["absorbed"] = [Path(name).stem for name in commits]
    (out / "sealed.json").write_text(json.dumps(sealed))
    assert len(sweep.open_dataset(out).points()) == 24
    run(study_file, out)
    assert files_of(out) == files_of(reference)


def test_two_drivers_may_write_at_once(study_file: Path, tmp_path: Path, reference: Path) -> None:
    """They publish the same bytes under the same names; rows that both made count once."""
    out = tmp_path / "x"
    command = [sys.executable, "-m", "sweep", "run", str(study_file), "--out", str(out), "--executor", "inline", "-q"]
    with subprocess.Popen(command) as first, subprocess.Popen(command) as second:
        assert (first.wait(120), second.wait(120)) == (0, 0)
    assert run(study_file, out).exit_status == 0
    assert files_of(out) == files_of(reference)
    assert verify(out).wrong == []


def test_rows_of_another_model_stop_the_run(study_file: Path, tmp_path: Path) -> None:
    """A second driver whose numbers differ: neither wins."""
    from sweep.dataset.records import Commit

    out = tmp_path / "x"
    run(study_file, out, limit=3)
    store = Store(out)
    table = store.read("points")
    key = store.state().commits[0].key
    with pytest.raises(NondeterminismError, match="other rows before"):
        store.publish(key, {"points": forged(table)})
    store.commit(Commit("another", store.publish("another", {"points": forged(table)})))
    with pytest.raises(NondeterminismError, match="made twice and differ"):
        run(study_file, out)


SESSION = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
os.setsid()
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "sweep", "run", *sys.argv[2:]])
"""


def in_a_session(study: Path, out: Path, hangups: str = "SIG_DFL") -> list[str]:
    """A run that leads a session, with standard input as its terminal if it is one."""
    return [sys.executable, "-c", SESSION, hangups, str(study), "--out", str(out), "--executor", "local", "--workers", "1"]


@pytest.mark.parametrize(
    ("number", "status", "send"), [(signal.SIGINT, 130, os.killpg), (signal.SIGHUP, 129, os.killpg), (signal.SIGTERM, 143, os.kill)]
)
def test_a_signal_drains_and_the_next_run_finishes(study_file: Path, tmp_path: Path, number: int, status: int, send: Any) -> None:
    """Those of a terminal reach the workers as well, which leave them to the driver."""
    study_file.write_text(study_file.read_text().replace("replicates = 2", "replicates = 200"))
    out = tmp_path / "x"
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(in_a_session(study_file, out), **pipes, text=True) as process:
        deadline = time.monotonic() + 120
        while not list((out / "commits").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            send(process.pid, number)
        stdout, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("the run was done before the signal reached it")
    assert process.returncode == status, stderr
    assert "go on: faultsweep run" in stdout
    assert "Traceback" not in stderr
    committed = len(sweep.open_dataset(out).points())
    assert committed > 0
    done = run(study_file, out, executor="local", workers=1)
    assert done.done_before == committed
    assert done.left == 0


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away_drains_unless_hangups_are_ignored(study_file: Path, tmp_path: Path, ignored: bool) -> None:
    """A real one, with the progress bar on it; nohup is heeded."""
    study_file.write_text(study_file.read_text().replace("replicates = 2", "replicates = 100"))
    out = tmp_path / "x"
    command = in_a_session(study_file, out, "SIG_IGN" if ignored else "SIG_DFL")
    mine, theirs = pty.openpty()
    output: Any = subprocess.DEVNULL if ignored else theirs  # nohup sends it to a file
    with subprocess.Popen(command, stdin=theirs, stdout=output, stderr=output) as process:
        os.close(theirs)
        deadline = time.monotonic() + 120
        while not list((out / "commits").glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
            if select.select([mine], [], [], 0.02)[0]:
                with suppress(OSError):  # where the run has just ended
                    os.read(mine, 4096)
        os.close(mine)
        status = process.wait(timeout=120)
    if status == 0 and not ignored:
        pytest.skip("the run was done before the terminal went away")
    assert status == (0 if ignored else 129)
    assert (out / "sealed.json").exists() == ignored
    assert run(study_file, out).exit_status == 0
    assert len(sweep.open_dataset(out).points()) == 1200


def test_schema_is_written_as_declared(reference: Path) -> None:
    path = next((reference / "points").iterdir())
    assert pq.read_schema(path).names == arrow_schema("points").names


def test_a_seal_that_does_not_fit_its_parts_is_made_anew(study_file: Path, reference: Path) -> None:
    seal = (reference / "sealed.json").read_text()
    wrong = json.loads(seal)
    wrong["root_digest"] = "0" * 64
    (reference / "sealed.json").write_text(json.dumps(wrong))
    assert verify(reference).wrong
    run(study_file, reference)
    assert verify(reference).wrong == []
    assert (reference / "sealed.json").read_text() == seal


def test_a_repair_that_dies_half_way_loses_no_good_row(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good rows are committed before the seal of the damaged part is dropped; the next run goes on from either."""
    from sweep.dataset.storage import LocalStorage

    out = tmp_path / "x"
    run(study_file, out)
    damage(next((out / "steps").iterdir()), "flip")

    def dies(self: LocalStorage, name: str) -> None:
        if name == "sealed.json":
            raise KeyboardInterrupt
        remove(self, name)

    remove = LocalStorage.remove
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalStorage, "remove", dies)
        run(study_file, out)
    assert run(study_file, out).exit_status == 0
    assert len(sweep.open_dataset(out).points()) == 24
    assert verify(out, recompute=3).wrong == []


def test_shards_of_several_machines_merge_into_the_same_dataset(study_file: Path, tmp_path: Path, reference: Path) -> None:
    for i in range(3):
        assert run(study_file, tmp_path / str(i), shard=(i, 3)).sealed is None
    places = [tmp_path / str(i) for i in range(3)]
    partly = merge(places[:2], tmp_path / "two")
    assert (partly.points, partly.left, partly.sealed) == (16, 8, None)
    whole = merge([*places, tmp_path / "two"], tmp_path / "all")
    assert (whole.points, whole.left) == (24, 0)
    assert files_of(tmp_path / "all") == files_of(reference)
    assert (tmp_path / "all" / "sealed.json").read_text() == (reference / "sealed.json").read_text()
    again = merge([reference, tmp_path / "all"], tmp_path / "again")
    assert again.points == 24
    assert files_of(tmp_path / "again") == files_of(reference)
    assert run(study_file, tmp_path / "two").done == 8
    assert files_of(tmp_path / "two") == files_of(reference)


def test_datasets_that_do_not_belong_together_are_not_merged(study_file: Path, tmp_path: Path, reference: Path) -> None:
    study_file.write_text(study_file.read_text().replace("vcpus = [1, 3]", "vcpus = [1, 2]"))
    run(study_file, tmp_path / "x")
    with pytest.raises(DatasetError, match="another plan"):
        merge([reference, tmp_path / "x"], tmp_path / "out")
    damage(next((tmp_path / "x" / "points").iterdir()), "flip")
    with pytest.raises(DatasetError, match="is damaged"):
        merge([tmp_path / "x"], tmp_path / "out")


def test_overlapping_points_that_disagree_are_not_merged(study_file: Path, tmp_path: Path) -> None:

    run(study_file, tmp_path / "a", limit=4)
    run(study_file, tmp_path / "b", limit=5)
    store = Store(tmp_path / "b")
    commit = store.state().commits[0]
    part = next(part for part in commit.parts if part.table == "points")
    table = store.read_part(part).cast(arrow_schema("points"))
    store.storage.remove(part.path)
    store.storage.remove(f"commits/{commit.key}.json")
    store.commit(replace(commit, parts=(*store.publish(commit.key, {"points": forged(table)}), *(p for p in commit.parts if p != part))))
    with pytest.raises(NondeterminismError):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".arrow"])
def test_export_is_one_file_with_the_same_rows(reference: Path, tmp_path: Path, suffix: str) -> None:
    readers = {".parquet": pd.read_parquet, ".csv": pd.read_csv, ".arrow": pd.read_feather}
    for table in ("points", "steps"):
        to = tmp_path / f"{table}{suffix}"
        rows = export(reference, to, table)
        frame = readers[suffix](to)  # type: ignore[operator]
        expected = sweep.open_dataset(reference).arrow(table).to_pandas()
        assert len(frame) == rows == len(expected)
        assert frame["pf_taken"].tolist() == expected["pf_taken"].tolist()
    with pytest.raises(UsageError, match=r"must end with \.parquet, \.csv"):
        export(reference, tmp_path / "x.xlsx")


def test_provenance_says_how_it_was_made_and_keeps_secrets(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the data files; of the environment only what is listed."""
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "FAULTSWEEP_PASSWORD"):
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run(study_file, tmp_path / "x")
    text = next((tmp_path / "x" / "provenance").glob("*.json")).read_text()
    record = json.loads(text)
    assert "hunter2" not in text
    assert record["environment"]["SLURM_JOB_ID"] == "77"
    assert record["points"] == record["done"] == 24
    for key in ("python", "packages", "lock_digest", "model_digest", "machine", "cpu", "kernel", "thp", "git", "started", "seconds"):
        assert key in record
    times = pd.read_parquet(next((tmp_path / "x" / "provenance").glob("*.parquet")))
    assert sorted(times["point_id"]) == sorted(sweep.open_dataset(tmp_path / "x").points()["point_id"])
    assert (times["wall_ns"] > 0).all()
    assert set(times["attempt"]) == {1}


@pytest.mark.parametrize("kind", ["flip", "truncate", "delete", "swap"])
def test_every_damage_is_found_and_mended(study_file: Path, tmp_path: Path, reference: Path, kind: str) -> None:
    """Many places in each file: what verify finds is what run mends, to the same bits."""
    out = tmp_path / "x"
    whole = files_of(reference)
    shutil.copytree(reference, out)
    random = Random(kind)
    store = Store(out)
    paths = [out / name for name in whole]
    for count in range(DAMAGES[kind]):
        path = random.choice(paths)
        content = bytearray(whole[str(path.relative_to(out))])
        if kind == "flip":
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            path.write_bytes(content)
        elif kind == "truncate":
            path.write_bytes(content[: random.randrange(len(content))])
        elif kind == "delete":
            path.unlink()
        else:
            path.write_bytes(whole[str(random.choice([p for p in paths if p != path]).relative_to(out))])
        assert any(str(path) in line for line in store.check())
        if count % 250 == 0:  # the repair is the same for all
            assert run(study_file, out).exit_status == 0
            assert files_of(out) == whole
        path.write_bytes(whole[str(path.relative_to(out))])


DAMAGES = {"flip": 1000, "truncate": 1000, "delete": 100, "swap": 100}
