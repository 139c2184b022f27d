"""A real Ray cluster of three nodes on this machine; nodes that die with their workers, and one that hangs; tokens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

import sweep
from sweep.errors import EnvironmentProblemError
from sweep.executors.cluster import address_of, check_reachable
from sweep.executors.ray import connect
from sweep.verify import verify

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "5" * 64


class RayCluster:
    """tests/ray_cluster.py, with its token."""

    def __init__(self, home: Path, token: str | None) -> None:
        (home / ".ray").mkdir(parents=True, exist_ok=True)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {
            "HOME": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token" if token else "disabled",
        }
        if token:
            (home / ".ray" / "auth_token").write_text(token)
            (home / ".ray" / "auth_token").chmod(0o600)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "ray_cluster.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
        )
        self.address = self._line()

    def _line(self) -> str:
        output: IO[str] | None = self.process.stdout
        assert output is not None
        return output.readline().strip()

    def order(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def add_node(self) -> int:
        """The raylet's process."""
        self.order("add")
        return int(self._line())

    def close(self) -> None:
        try:
            self.order("quit")
            self.process.wait(60)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()

    def command(self, *arguments: str, environment: dict[str, str] | None = None) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "sweep", "run", *arguments, "--address", self.address, "--no-progress"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment or self.environment,
            cwd=ROOT,
        )


def with_children(process: int) -> list[int]:
    """The process and all below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [process]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def send(process: int, number: int) -> list[int]:
    """A signal to a raylet and its workers."""
    found = with_children(process)
    for each in found:
        try:
            os.kill(each, number)
        except ProcessLookupError:
            continue
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    made = RayCluster(tmp_path_factory.mktemp("home"), TOKEN)
    yield made
    made.close()


def committed(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def wait_for(out: Path, commits: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while committed(out) < commits and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def test_nodes_that_die_and_hang_lose_nothing(cluster: RayCluster, study_file: Path, tmp_path: Path) -> None:
    """A node is killed with its workers, a second one as well, a third one hangs: every row once, and the same bits."""
    study_file.write_text(study_file.read_text().replace("replicates = 2", "replicates = 200").replace("touches = 3000", "touches = 60000"))
    first, second = cluster.add_node(), cluster.add_node()
    out, stopped = tmp_path / "x", []
    process = cluster.command(str(study_file), "--out", str(out), "--deadline", "20")
    try:
        wait_for(out, 3, process)
        send(first, signal.SIGKILL)
        wait_for(out, 6, process)
        third = cluster.add_node()
        wait_for(out, 9, process)
        send(third, signal.SIGKILL)
        stopped = send(second, signal.SIGSTOP)
        said, err = process.communicate(timeout=500)
    finally:
        process.kill()
        for each in stopped:
            try:
                os.kill(each, signal.SIGKILL)
            except ProcessLookupError:
                continue
    assert process.returncode == 0, err
    assert "2400 points" in said
    assert verify(out, recompute=3).wrong == []
    assert len(sweep.open_dataset(out).points()) == 2400


@pytest.mark.parametrize("token", ["6" * 64, None])
def test_a_wrong_or_missing_token_is_named(cluster: RayCluster, study_file: Path, tmp_path: Path, token: str | None) -> None:
    environment = {**cluster.environment, "HOME": str(tmp_path)}
    if token:
        environment["RAY_AUTH_TOKEN"] = token
    process = cluster.command(str(study_file), "--out", str(tmp_path / "x"), environment=environment)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 5
    assert ("does not take the token" if token else "there is no token") in err
    assert "Traceback" not in err


def test_a_cluster_without_a_token_is_joined_only_when_asked(study_file: Path, tmp_path: Path) -> None:
    made = RayCluster(tmp_path / "home", None)
    environment = {**made.environment, "RAY_AUTH_TOKEN": TOKEN}
    try:
        process = made.command(str(study_file), "--out", str(tmp_path / "x"), environment=environment)
        _, err = process.communicate(timeout=240)
        assert (process.returncode, "answers without a token" in err) == (5, True), err
        process = made.command(str(study_file), "--out", str(tmp_path / "x"), "--insecure-cluster", environment=environment)
        said, err = process.communicate(timeout=240)
        assert (process.returncode, "24 points" in said) == (0, True), err
    finally:
        made.close()


def test_an_address_where_nobody_answers_is_named_at_once() -> None:
    with pytest.raises(EnvironmentProblemError, match="nobody answers"):
        check_reachable("127.0.0.1:1")
    for wrong in ("host", "host:", ":1", "host:x", "host:99999", "\n:1"):
        with pytest.raises(EnvironmentProblemError, match=r"HOST:PORT is needed|nobody answers"):
            check_reachable(wrong)
    assert address_of("auto") is None
    assert address_of("[::1]:6379") == ("::1", 6379)


def test_a_node_that_starts_too_late_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ray.init() raises a bare Exception then."""
    import ray

    def late(**_options: object) -> None:
        raise Exception("The current node timed out during startup.\nmore lines")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(EnvironmentProblemError, match=r"cannot be used \(The current node timed out during startup\.\); "):
        connect(None, 1)
