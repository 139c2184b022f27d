"""Storages, and a dataset on one that fails: nothing is lost, nothing stands twice."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer

import sweep
from sweep import runner
from sweep.dataset.storage import LocalStorage, Storage, open_storage
from sweep.dataset.store import Store
from sweep.errors import DatasetError, EnvironmentProblemError
from sweep.left import kept_of
from sweep.merge import merge
from sweep.plan import Plan
from sweep.price import Prices
from sweep.runner import RunOptions, chunks_of
from sweep.study import load_study
from sweep.timings import Timings
from sweep.verify import verify
from sweep.worker import Job, run_chunk
from tests.faulty import Crash, FaultyStorage, MemoryStorage, Trouble, opened_as

FAULTS = int(os.environ.get("FAULTSWEEP_FAULTS", "2000"))
SHARDS = 8
TINY = """
[study]
name = "tiny"
[point]
memory = "16KiB"
workload = "one"
[[block]]
grid = { vcpus = [1, 2, 3] }
[workload.one]
steps = [{ op = "touch" }]
"""


def check_contract(storage: Storage) -> None:
    """What every storage does."""
    assert storage.names("points") == []
    assert storage.size("points/a") is None
    assert storage.create("points/a", b"one")
    assert not storage.create("points/a", b"two")
    assert storage.read("points/a") == b"one"
    assert storage.size("points/a") == 3
    storage.replace("points/a", b"three")
    storage.replace("study.json", b"{}")
    assert storage.create("points/b", b"")
    assert storage.names("points") == ["a", "b"]
    assert storage.read("points/a") == b"three"
    storage.remove("points/a")
    storage.remove("points/never")
    assert storage.names("points") == ["b"]
    with pytest.raises(DatasetError, match="points/a"):
        storage.read("points/a")


def test_a_folder(tmp_path: Path) -> None:
    check_contract(open_storage(tmp_path / "x"))
    check_contract(open_storage(f"file://{tmp_path}/y"))
    assert not list(tmp_path.rglob(".tmp*"))


def test_what_the_faulty_storage_is_over() -> None:
    check_contract(MemoryStorage("memory"))


def test_a_full_disk_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    storage = LocalStorage(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblemError, match=r"No space left on device; free space"):
        storage.create("points/a", b"x")
    assert list((tmp_path / "points").iterdir()) == []


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A URL in an S3 server of this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "y",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
        }.items():
            patch.setenv(name, value)
        urlopen(Request(f"{endpoint}/bucket", method="PUT")).close()
        yield "s3://bucket"
    server.stop()


def test_an_object_store(bucket: str) -> None:
    check_contract(open_storage(f"{bucket}/contract/a"))


def test_a_dataset_in_an_object_store(bucket: str, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same files as in a folder, by two drivers at once, verified, repaired, read, merged."""
    url = f"{bucket}/studies/small"
    command = [sys.executable, "-m", "sweep", "run", str(study_file), "--out", url, "--executor", "inline", "-q"]
    with subprocess.Popen(command) as first, subprocess.Popen(command) as second:
        assert (first.wait(240), second.wait(240)) == (0, 0)
    options = RunOptions(executor="local", workers=2, quiet=True)
    assert sweep.run(study_file, url, options).exit_status == 0
    sweep.run(study_file, tmp_path / "x", options)
    seal = open_storage(url).read("sealed.json")
    assert seal == (tmp_path / "x" / "sealed.json").read_bytes()
    storage = open_storage(url)
    part = f"points/{storage.names('points')[0]}"
    content = storage.read(part)
    storage.replace(part, content[:-1] + bytes([content[-1] ^ 1]))
    assert len(verify(url).wrong) == 1
    sweep.run(study_file, url, options)
    assert verify(url, recompute=2).wrong == []
    assert open_storage(url).read("sealed.json") == seal
    assert len(sweep.open_dataset(url).points()) == 24
    assert merge([url], f"{bucket}/studies/copy").points == 24


def test_a_bucket_that_is_not_there_is_named(bucket: str, study_file: Path) -> None:
    with pytest.raises(EnvironmentProblemError, match=r"s3://nowhere/x.*check URL"):
        sweep.run(study_file, "s3://nowhere/x", RunOptions(executor="inline", quiet=True))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> sweep.Study:
    path = tmp_path_factory.mktemp("tiny") / "tiny.toml"
    path.write_text(TINY)
    return load_study(path)


def sealed_files(storage: MemoryStorage) -> dict[str, bytes]:
    return {name: content for name, content in storage.files.items() if name.split("/")[0] in ("points", "steps", "errors", "sealed.json")}


def attempt(study: sweep.Study, storage: FaultyStorage) -> str:
    """One run, as a process of its own would be; what stopped it, or ''."""
    try:
        status = sweep.run(study, storage.name, RunOptions(executor="inline", quiet=True)).exit_status
    except (Crash, EnvironmentProblemError, DatasetError) as error:
        return repr(error)
    return f"status {status}" if status else ""


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_fault_is_survived(tiny: sweep.Study, shard: int, record_property: Any) -> None:
    """Runs are broken at one operation each, begun again, and end with the same files as a run that nothing broke."""
    random, injected = Random(shard), 0
    whole = MemoryStorage("whole")
    with opened_as(whole):
        sweep.run(tiny, "whole", RunOptions(executor="inline", quiet=True))
    while injected < FAULTS // SHARDS:
        storage = FaultyStorage(MemoryStorage("faulty"), random)
        with opened_as(storage):
            for _ in range(20):
                storage.arm(random.choice(list(Trouble)), random.randint(1, 60))
                attempt(tiny, storage)
            storage.arm(None, 0)
            assert attempt(tiny, storage) == ""
        injected += storage.injected
        assert sealed_files(storage.inner) == sealed_files(whole)
    record_property("faults of the storage that were survived", injected)


def test_parts_that_come_after_another_run_has_sealed_do_not_stay(tiny: sweep.Study, tmp_path: Path) -> None:
    """Two runs at once: the other one sealed this chunk's rows, and took away the part that both had published before this one's last."""
    out = str(tmp_path / "x")
    summary = sweep.run(tiny, out, RunOptions(executor="inline", quiet=True))
    store, plan = Store(out), Plan(tiny)
    kept = kept_of(plan)
    (chunk, *_) = chunks_of(Prices(plan), kept, kept)
    late = run_chunk(chunk, Job(tiny, out), "late")
    store.storage.remove(late.commit.parts[0].path)
    assert store.strays(store.state())
    runner._commit(store, late, summary, Timings(store))
    assert store.strays(store.state()) == []
    assert verify(out).wrong == []
