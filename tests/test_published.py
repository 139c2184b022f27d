"""results/published: small enough, undamaged, and rebuilt bit for bit (a part of it here; `verify --recompute` does more)."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import sweep
from sweep.configs import config_root
from sweep.dataset.store import Store
from sweep.plan import Plan
from sweep.record import read_study
from sweep.runner import RunOptions
from sweep.verify import verify

PUBLISHED = config_root().parent / "results" / "published" / "thread"
REBUILT = 40


def test_it_is_small_and_sealed() -> None:
    assert sum(path.stat().st_size for path in PUBLISHED.rglob("*") if path.is_file()) < 5_000_000
    assert (PUBLISHED / "sealed.json").exists()


def test_it_is_the_shipped_study() -> None:
    assert (PUBLISHED / "study.toml").read_text() == (config_root() / "studies" / "thread.toml").read_text()


def test_points_spread_over_it_are_what_the_model_gives() -> None:
    verdict = verify(PUBLISHED, recompute=REBUILT)
    assert verdict.wrong == []
    assert verdict.recomputed == REBUILT


@pytest.mark.parametrize("workers", [2])
def test_a_shard_run_anew_gives_the_same_rows_bit_for_bit(tmp_path: Path, workers: int) -> None:
    shard = (17, 101)
    options = RunOptions(executor="local", workers=workers, shard=shard, quiet=True)
    summary = sweep.run(config_root() / "studies" / "thread.toml", tmp_path / "x", options)
    assert summary.exit_status == 0
    ids = {p.point_id for p in Plan(read_study(Store(PUBLISHED))).points()[shard[0] :: shard[1]]}
    for table in ("points", "steps"):
        fresh = sweep.open_dataset(tmp_path / "x").arrow(table)
        old = sweep.open_dataset(PUBLISHED).arrow(table)
        keys = [("point_id", "ascending")] + ([("step", "ascending")] if table == "steps" else [])
        old = old.filter([i in ids for i in old.column("point_id").to_pylist()])
        assert fresh.num_rows == old.num_rows > 0
        assert fresh.sort_by(keys).equals(old.sort_by(keys))


def test_pages_carry_checksums() -> None:
    for path in (PUBLISHED / "points").iterdir():
        pq.ParquetFile(path, page_checksum_verification=True).read()
