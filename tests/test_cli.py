"""The commands, as a user types them: what they print, where, and how they end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import sweep
from sweep.cli import app
from sweep.plan import Plan
from sweep.price import Prices
from sweep.runner import RunOptions
from sweep.study import load_study


def cli(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "sweep", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def dataset(study_file: Path, tmp_path: Path) -> Path:
    out = tmp_path / "data"
    sweep.run(study_file, out, RunOptions(executor="inline", quiet=True))
    return out


def test_plan_prints_and_runs_nothing(study_file: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    done = cli("plan", str(study_file))
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("points: 24", "vcpus", "predicted CPU time", "predicted memory", "first points", "6.1"):
        assert text in done.stdout
    assert set(tmp_path.iterdir()) == before
    assert json.loads(cli("plan", str(study_file), "--json").stdout)["points"] == 24


def test_run_tells_what_it_did_and_what_comes_next(study_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    done = cli("run", str(study_file), "--out", str(out), "--executor", "inline")
    assert done.returncode == 0
    assert "24 points in" in done.stdout
    assert f"faultsweep report {out}" in done.stdout
    assert "24/24 points" in done.stderr
    again = cli("run", str(study_file), "--out", str(out), "--executor", "inline")
    assert (again.returncode, again.stdout) == (
        0,
        f"small: all 24 points are done already; nothing to do ({out})\nsealed" + again.stdout.split("sealed")[1],
    )
    assert json.loads(cli("run", str(study_file), "--out", str(out), "--json", "-q").stdout)["done_before"] == 24


def test_status_and_verify(dataset: Path) -> None:
    shown = json.loads(cli("status", str(dataset), "--json").stdout)
    assert (shown["points"], shown["done"], shown["left"], shown["failed"], shown["sealed"]) == (24, 24, 0, 0, True)
    done = cli("verify", str(dataset), "--recompute", "2")
    assert (done.returncode, "24 points, 2 recomputed, all well" in done.stdout) == (0, True)
    next((dataset / "steps").iterdir()).unlink()
    done = cli("verify", str(dataset))
    assert (done.returncode, "is missing" in done.stdout) == (3, True)


def test_status_tells_the_time_left_at_the_pace_of_the_runs_before(study_file: Path, tmp_path: Path) -> None:
    """Of predicted seconds, not of points: these differ. A stretch that is done in part counts by the part of its points."""
    out = tmp_path / "x"
    sweep.run(study_file, out, RunOptions(executor="inline", quiet=True, limit=5))
    (record,) = [json.loads(path.read_text()) for path in (out / "provenance").glob("*.json")]
    plan = json.loads(cli("status", str(out), "--json").stdout)
    prices = Prices(Plan(load_study(study_file)))
    ahead = sum(seconds[i] for _, seconds, _ in prices.priced(np.ones(24, np.bool_)) for i in range(5, 24))
    number, unit = plan["time left"].split()
    assert float(number) * {"us": 1e-6, "ms": 1e-3, "s": 1}[unit] == pytest.approx(
        ahead * record["seconds"] / record["predicted_s"], rel=0.1
    )


def test_query_in_every_format(dataset: Path, tmp_path: Path) -> None:
    sql = "select kernel, sum(pf_taken) as n from points group by kernel order by n desc, kernel limit 2"
    rows = json.loads(cli("query", str(dataset), sql, "--format", "json").stdout)
    assert set(rows[0]) == {"kernel", "n"}
    csv = cli("query", str(dataset), sql, "--format", "csv").stdout.splitlines()
    assert csv == ["kernel,n", *(f"{row['kernel']},{row['n']}" for row in rows)]
    assert str(rows[0]["n"]) in cli("query", str(dataset), sql).stdout
    command = [sys.executable, "-m", "sweep", "query", str(dataset), sql, "--format", "parquet"]
    (tmp_path / "q.parquet").write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert pd.read_parquet(tmp_path / "q.parquet").to_dict("records") == rows
    wrong = cli("query", str(dataset), "select nonsense from points")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)


def test_explain_shows_a_points_events_in_order(dataset: Path) -> None:
    point_id = sweep.open_dataset(dataset).points()["point_id"][0]
    done = cli("explain", str(dataset), point_id[:12], "--touches", "40")
    assert done.returncode == 0
    assert "exit handled: sequence snapshot, GUP-fast" in done.stdout
    assert "mmu_lock held (read): stale check, install" in done.stdout
    times = [int(line.split()[0]) for line in done.stdout.splitlines()[3:43]]
    assert times == sorted(times)
    assert cli("explain", str(dataset), "ffff-no-such").returncode == 2


def test_doctor_names_everything_it_looks_at() -> None:
    shown = json.loads(cli("doctor", "--json").stdout)
    assert {"packages", "compile cache", "ray", "kvm", "thp", "disk"} <= set(shown)
    assert shown["packages"]["well"]


def test_ray_missing_names_local_as_the_way_out(study_file: Path, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sweep.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(study_file), "--out", str(tmp_path / "x"), "--executor", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 5
    assert "--executor local" in done.stderr
    assert "Traceback" not in done.stderr


INTERRUPTED_IMPORT = """
import importlib.abc, os, runpy, signal, sys
class Interrupts(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == WHEN:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupts())
runpy.run_module("sweep", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["sweep.cli", "typer", "pyarrow", "sweep.runner", "pydantic_core"])
def test_ctrl_c_while_python_still_imports_is_one_line(study_file: Path, tmp_path: Path, module: str) -> None:
    code = INTERRUPTED_IMPORT.replace("WHEN", repr(module))
    command = [sys.executable, "-c", code, "run", str(study_file), "--out", str(tmp_path / "x"), "--executor", "inline"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted: while starting; run the same command again to go on\n"
    assert not (tmp_path / "x").exists()


def test_standard_output_is_data_and_a_closed_pipe_is_quiet(dataset: Path) -> None:
    command = f"{sys.executable} -m sweep query {dataset} 'select * from points, steps' --format csv | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.startswith("point_id,")
    assert "Traceback" not in done.stderr


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_prints_json_and_gives_an_example(name: str) -> None:
    command = COMMANDS[name]
    assert f"Example: faultsweep {name}" in command.help
    assert name == "schema" or any("--json" in parameter.opts for parameter in command.params)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("re", ["replay", "report"]),
        ("run s.toml --executor l", ["local"]),
        ("recommend --workload boot_o", ["boot_ovmf"]),
        ("recommend --kernel 6.1", ["6.1", "6.10"]),
        ("export d --table e", ["errors"]),
    ],
)
def test_the_shell_completes(words: str, completed: list[str]) -> None:
    words = f"faultsweep {words}"
    environment = {"_FAULTSWEEP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    found = CliRunner().invoke(app, [], prog_name="faultsweep", env=environment).stdout.split()
    assert set(completed) <= set(found)
    assert all(word.startswith(words.split()[-1]) for word in found)


def test_explained_events_as_json_are_those_of_the_text(dataset: Path) -> None:
    point_id = json.loads(cli("query", str(dataset), "select point_id from points limit 1", "--json").stdout)[0]["point_id"]
    found = json.loads(cli("explain", str(dataset), point_id, "--json").stdout)
    text = cli("explain", str(dataset), point_id).stdout
    assert found["events"]
    assert all(f"{event['ns']:>14} {event['who']:>5} {event['gfn']:>9}" in text for event in found["events"])
    assert len(found["steps"]) == text.count("step ")
