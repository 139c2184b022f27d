"""Plans: addressed by index, counted and priced without expanding; samples; stretches that the plan alone decides."""

import time
from pathlib import Path

import numpy as np
import pytest

from sweep.configs import digest_of
from sweep.errors import StudyError
from sweep.left import chosen_of, kept_of
from sweep.plan import MAX_POINTS, Plan
from sweep.preview import preview
from sweep.price import FEWEST, Prices, stretches
from sweep.study import load_study

HEAD = '[study]\nname = "x"\nreplicates = 2\n[point]\nworkload = "first_touch"\n'
PRODUCT = 'grid = { vcpus = [1, 2, 4], memory = ["4MiB", "1GiB"], thp_failure = { linspace = [0.0, 1.0, 5] } }\n'


def plan_of(tmp_path: Path, text: str) -> Plan:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return Plan(load_study(path))


def test_ids_are_digests_of_the_canonical_parameters(tmp_path: Path) -> None:
    """The identity of a point is what it was when datasets were published with it."""
    import hashlib
    import json

    plan = plan_of(tmp_path, HEAD + "[[block]]\n" + PRODUCT)
    for planned in plan:
        workload = plan.study.workloads[planned.point.workload]
        identity = {
            "parameters": planned.point.canonical(),
            "workload": workload.digest(),
            "seed": planned.seed,
            "replicate": planned.replicate,
        }
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        assert planned.point_id == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert len({planned.point_id for planned in plan}) == len(plan) == 60


def test_any_index_gives_the_point_that_counting_through_gives(tmp_path: Path) -> None:
    text = (
        HEAD
        + "[[block]]\n"
        + PRODUCT
        + 'where = "memory >= vcpus * 2 * MiB"\n[[block]]\ngrid = { vcpus = [2, 8] }\npoint = { memory = "1GiB" }\n'
    )
    plan = plan_of(tmp_path, text)
    whole = dict(plan.at(range(plan.upper)))
    kept = kept_of(plan)
    assert np.flatnonzero(kept).tolist() == list(whole)
    assert len(plan) == len(whole) < plan.upper
    for index in np.random.default_rng(1).permutation(plan.upper).tolist():
        assert [planned for _, planned in plan.at(range(index, index + 1))] == ([whole[index]] if kept[index] else [])


def test_a_point_that_two_blocks_give_runs_once(tmp_path: Path) -> None:
    """Whether its parameters are given or default, moved alone or side by side; cores = vcpus is what no cores means."""
    blocks = [
        "grid = { vcpus = [1, 2] }",
        'zip = { vcpus = [2, 3], cores = [2, 1] }\npoint = { kernel = "6.12" }',
        'grid = { vcpus = [1, 2, 3, 4], cores = [1, 2, 4] }\nwhere = "cores == vcpus"',
    ]
    plan = plan_of(tmp_path, HEAD + "".join(f"[[block]]\n{block}\n" for block in blocks))
    found = [(p.point.vcpus, p.point.cores or p.point.vcpus) for p in plan if not p.replicate]
    assert found == [(1, 1), (2, 2), (3, 1), (4, 4)]
    assert len(plan) == 8


BIG = """[study]
name = "big"
replicates = %d
[point]
workload = "nothing"
[[block]]
[block.grid]
kernel = ["5.15", "5.17", "6.1", "6.2", "6.5", "6.6", "6.7", "6.8", "6.10", "6.12"]
vcpus = { range = [1, 1001] }
memory = ["4KiB", "8KiB", "1MiB", "2MiB", "4MiB", "8MiB", "16MiB", "32MiB", "1GiB", "2GiB"]
thp_failure = { linspace = [0.0, 1.0, 1000] }
"""


def test_a_plan_of_a_thousand_million_points_is_previewed_without_expanding_it(tmp_path: Path) -> None:
    """Counted in work, not seconds: nothing is made for each point."""
    path = tmp_path / "big.toml"
    path.write_text(BIG % 10)
    preview(path, ())
    start = time.process_time()
    shown = preview(path, ())
    assert time.process_time() - start < 5  # a point each would take hours
    assert shown["points"] == 1_000_000_000
    assert shown["last points"][-1]["replicate"] == 9
    path.write_text(BIG % 10_000)
    with pytest.raises(StudyError, match=f"1,000,000,000,000 points; at most {MAX_POINTS:,}"):
        preview(path, ())


@pytest.mark.parametrize("method", ["sobol", "latin_hypercube", "random"])
def test_a_sample_of_a_product(tmp_path: Path, method: str) -> None:
    text = HEAD + f'[[block]]\nsample = {{ method = "{method}", n = 64 }}\n'
    text += "grid = { thp_failure = { linspace = [0.0, 1.0, 1001] }, vcpus = { range = [1, 65] } }\n"
    plan = plan_of(tmp_path, text)
    points = [p.point for p in plan if not p.replicate]
    assert len(points) == 64
    assert [p.point_id for p in plan] == [p.point_id for p in plan_of(tmp_path, text)]
    if method != "random":  # balanced in each dimension: each eighth has its share
        for values, low, high in (([p.thp_failure for p in points], 0.0, 1.001), ([p.vcpus for p in points], 1, 65)):
            counts, _ = np.histogram(values, bins=8, range=(low, high))
            assert counts.min() >= 6
            assert counts.max() <= 10
    other = plan_of(tmp_path, text.replace('name = "x"', 'name = "x"\nseed = 9'))
    assert [p.point.vcpus for p in other if not p.replicate] != [p.vcpus for p in points]


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ('{ method = "sobol", n = 0 }', "1 to 16,777,216"),
        ('{ method = "halton", n = 8 }', "sobol, latin_hypercube, random"),
        ('{ method = "sobol", n = 8, seed = 3 }', "unknown key 'seed'"),
        ("64", "must be a table"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(tmp_path: Path, sample: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        plan_of(tmp_path, HEAD + f"[[block]]\nsample = {sample}\ngrid = {{ vcpus = [1, 2] }}\n")


def test_a_sample_without_an_axis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no axis"):
        plan_of(tmp_path, HEAD + '[[block]]\nsample = { method = "sobol", n = 4 }\n')


def test_stretches_cover_the_plan_and_become_smaller(tmp_path: Path) -> None:
    text = HEAD.replace("replicates = 2", "replicates = 400") + "[[block]]\n" + PRODUCT.replace('"4MiB"', '"4MiB", "16GiB"')
    plan = plan_of(tmp_path, text + 'where = "memory < 16 * GiB or vcpus == 1"\n')
    kept = kept_of(plan)
    found = stretches(Prices(plan), kept)
    assert [s.start for s in found] == [0, *(s.end for s in found[:-1])]
    assert found[-1].end == plan.upper
    assert len(found) >= FEWEST / 2
    assert found[-1].seconds <= max(s.seconds for s in found)
    assert found == stretches(Prices(plan_of(tmp_path, text + 'where = "memory < 16 * GiB or vcpus == 1"\n')), kept)
    assert sum(s.seconds for s in found) == pytest.approx(Prices(plan).estimate().seconds, rel=0.01)


def test_shards_are_every_nth_point(tmp_path: Path) -> None:
    kept = kept_of(plan_of(tmp_path, HEAD + "[[block]]\n" + PRODUCT + 'where = "vcpus != 2"\n'))
    shards = [chosen_of(kept, None, (i, 3)) for i in range(3)]
    assert np.array_equal(np.sum(shards, axis=0), kept)
    assert max(s.sum() for s in shards) - min(s.sum() for s in shards) <= 1
    assert chosen_of(kept, 5, (0, 1)).sum() == 5


def test_the_digest_of_a_plan_tells_whether_indices_mean_the_same(tmp_path: Path) -> None:
    base = plan_of(tmp_path, HEAD + "[[block]]\n" + PRODUCT)
    assert base.digest == plan_of(tmp_path, HEAD.replace("[point]", 'title = "other"\n[point]') + "[[block]]\n" + PRODUCT).digest
    for other in (HEAD.replace("replicates = 2", "replicates = 3"), HEAD.replace('"x"', '"x"\nseed = 4')):
        assert base.digest != plan_of(tmp_path, other + "[[block]]\n" + PRODUCT).digest
    assert base.digest != plan_of(tmp_path, HEAD + "[[block]]\n" + PRODUCT.replace("[1, 2, 4]", "[1, 4, 2]")).digest
    assert len(base.digest) == len(digest_of(0))
