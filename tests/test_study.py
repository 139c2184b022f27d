"""Study files: what they mean. What is refused is in test_bad_input.py."""

from pathlib import Path

import pytest

import sweep
from sweep.errors import StudyError
from sweep.parameters import Point
from sweep.plan import Plan
from sweep.quantity import format_size, human_size, human_time, parse_size
from sweep.runner import RunOptions
from sweep.study import load_study
from sweep.verify import verify
from sweep.where import Where, WhereError


def plan_of(tmp_path: Path, text: str, overrides: tuple[str, ...] = ()) -> Plan:
    path = tmp_path / "s.toml"
    path.write_text('[study]\nname = "s"\n' + text)
    return Plan(load_study(path, overrides))


def test_a_block_is_a_product_of_grid_and_zip_and_the_last_axis_moves_fastest(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path,
        "[[block]]\ngrid = { vcpus = [1, 2], use_zero_page = [true, false] }\n"
        'zip = { kernel = ["6.1", "6.12"], backing = ["anonymous", "anonymous_thp"] }\npoint = { memory = "2MiB" }\n',
    )
    rows = [(p.point.vcpus, p.point.use_zero_page, p.point.kernel, p.point.backing, p.point.memory) for p in plan.points()]
    assert len(rows) == 8
    assert rows[0] == (1, True, "6.1", "anonymous", 2 << 20)
    assert rows[1] == (1, True, "6.12", "anonymous_thp", 2 << 20)
    assert rows[-1] == (2, False, "6.12", "anonymous_thp", 2 << 20)


def test_a_point_that_two_blocks_give_runs_once(tmp_path: Path) -> None:
    block = "[[block]]\ngrid = { vcpus = [1, 2] }\n"
    assert len(plan_of(tmp_path, block + "[[block]]\ngrid = { vcpus = [2, 4] }\n").points()) == 3


def test_a_default_written_out_is_the_same_point(tmp_path: Path) -> None:
    bare = plan_of(tmp_path, "").points()[0]
    written = plan_of(tmp_path, '[point]\nvcpus = 1\ncores = 1\nmemory = "1024MiB"\nkernel = "6.12"\n').points()[0]
    assert bare.point_id == written.point_id


def test_ids_change_with_parameters_seed_replicate_and_the_workloads_content(tmp_path: Path) -> None:
    steps = '[point]\nworkload = "w"\n[workload.w]\nsteps = [{ op = "touch", access = "%s" }]\n'
    ids = {plan_of(tmp_path, steps % access).points()[0].point_id for access in ("read", "write")}
    path = tmp_path / "r.toml"
    path.write_text('[study]\nname = "s"\nreplicates = 2\nseed = 9\n')
    ids |= {p.point_id for p in Plan(load_study(path)).points()}
    ids.add(plan_of(tmp_path, "[point]\nvcpus = 2\n").points()[0].point_id)
    assert len(ids) == 5
    assert all(len(i) == 32 and set(i) <= set("0123456789abcdef") for i in ids)


def test_axis_generators(tmp_path: Path) -> None:
    def vcpus(text: str) -> list[int]:
        return [p.point.vcpus for p in plan_of(tmp_path, f"[[block]]\ngrid = {{ vcpus = {text} }}\n").points()]

    assert vcpus("{ pow2 = [1, 16] }") == [1, 2, 4, 8, 16]
    assert vcpus("{ pow2 = [3, 9] }") == [4, 8]
    assert vcpus("{ range = [2, 9, 3] }") == [2, 5, 8]  # the stop is left out, as in Python


def test_include_gives_defaults(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[study]\nname = "base"\nseed = 3\n[point]\nkernel = "6.1"\nvcpus = 4\n')
    path = tmp_path / "top.toml"
    path.write_text('include = ["base.toml"]\n[study]\nname = "top"\n[point]\nvcpus = 2\n')
    study = load_study(path)
    point = Plan(study).points()[0].point
    assert (study.name, study.seed, point.kernel, point.vcpus) == ("top", 3, "6.1", 2)


def test_set_overrides_a_parameter_and_takes_its_axis_away(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "[[block]]\ngrid = { vcpus = [1, 2, 4] }\n", ("vcpus=8", "study.seed=7", "kernel=6.10"))
    assert [(p.point.vcpus, p.seed, p.point.kernel) for p in plan.points()] == [(8, 7, "6.10")]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("vcpus >= 2", 2),
        ("vcpus in [1, 4]", 2),
        ("not (vcpus == 1 or vcpus == 4)", 1),
        ("memory >= vcpus * 512 * MiB", 2),
        ("memory == '1GiB' and vcpus % 2 == 0", 2),
        ("1 < vcpus < 4", 1),
        ("kernel >= '6.9'", 3),
        ("kernel in ['6.1', '6.13']", 0),
        ("policy == 'mainline' and backing not in ['shmem']", 3),
    ],
)
def test_where(tmp_path: Path, where: str, kept: int) -> None:
    text = f'[[block]]\ngrid = {{ vcpus = [1, 2, 4] }}\nwhere = """{where}"""\n'
    if kept == 0:
        with pytest.raises(StudyError, match="keeps no point"):
            plan_of(tmp_path, text).points()
    else:
        assert len(plan_of(tmp_path, text).points()) == kept


def test_kernels_compare_as_versions_in_where() -> None:
    older = Where("kernel < '6.10'", frozenset({"kernel"}))
    assert older({"kernel": "6.9"})
    assert not older({"kernel": "6.12"})


HOSTILE = ("__import__('os')", "vcpus.real", "(lambda: 1)()", "[v for v in [1]]", "vcpus ** 9", "f'{vcpus}'", "vcpus is 1", "x", "", "1 +")


@pytest.mark.parametrize("text", [*HOSTILE, "print(1)", "vcpus if 1 else 2", "vcpus := 3", "vcpus[0]", "{1: 2}", "b'x' == 1"])
def test_where_allows_nothing_else(text: str) -> None:
    with pytest.raises(WhereError):
        Where(text, frozenset({"vcpus"}))


def test_a_large_product_is_counted_without_expanding_it(tmp_path: Path) -> None:
    axis = "{ range = [1, 1001] }"
    sizes = ", ".join(f'"{i}MiB"' for i in range(1, 1001))
    text = f"[[block]]\ngrid = {{ vcpus = {axis}, prealloc_threads = {axis}, cores = {axis}, memory = [{sizes}] }}\n"
    with pytest.raises(StudyError, match="1,000,000,000,000 points"):
        plan_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "size"), [("4KiB", 4096), ("16GiB", 1 << 34), ("4GB", 4 * 10**9), ("1.5GiB", 3 << 29), ("0", 0), ("512 B", 512)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["16G", "4", "", "-1GiB", "1e3MiB", "4 gib", "0.3B", 4096, None, True, "١GiB"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|unit|bytes"):
        parse_size(text)


def test_figures_for_people() -> None:
    assert [human_size(v) for v in (5, 1536, 3 << 30)] == ["5 B", "1.5 KiB", "3 GiB"]
    assert [human_time(v) for v in (0.0000012, 0.25, 30, 300)] == ["1.2 us", "250 ms", "30 s", "5 min"]


def test_daemons_are_axes_columns_and_part_of_the_identity(tmp_path: Path) -> None:
    """A table of settings, whole or in part, is one value; a dataset verifies after its settings went through study.json."""
    path = tmp_path / "d.toml"
    path.write_text(
        '[study]\nname = "d"\n[point]\nmemory = "4MiB"\nbacking = "anonymous_thp"\nworkload = "w"\n'
        "[[block]]\ngrid = { khugepaged = [false, { scan_sleep_ms = 1 }], ksm = [false, { sleep_ms = 1, fraction = 0.5 }] }\n"
        '[workload.w]\nsteps = [{ op = "touch", access = "pairs", every = "8KiB" }, { op = "idle", ns = 3000000 }, { op = "touch" }]\n'
    )
    sweep.run(path, tmp_path / "out", RunOptions(executor="inline"))
    points = sweep.open_dataset(tmp_path / "out").points()
    assert sorted(points["khugepaged"].unique()) == ["false", "pages_to_scan=4096,scan_sleep_ms=1,max_ptes_none=511"]
    assert sorted(points["ksm"].unique()) == ["false", "pages_to_scan=100,sleep_ms=1,fraction=0.5"]
    assert points.groupby("khugepaged")["thp_collapse_alloc"].sum()["false"] == 0
    assert points["thp_collapse_alloc"].sum() > 0
    assert verify(tmp_path / "out", recompute=4).wrong == []


@pytest.mark.parametrize(
    ("where", "left"),
    [("ksm == false", 2), ("not ksm", 2), ("ksm and pml", 1), ("pml == true", 2), ("khugepaged == false", 4), ("true", 4)],
)
def test_where_knows_the_words_of_toml_and_every_parameter(tmp_path: Path, where: str, left: int) -> None:
    path = tmp_path / "d.toml"
    path.write_text(
        '[study]\nname = "d"\n[point]\nmemory = "4MiB"\n'
        f'[[block]]\ngrid = {{ pml = [false, true], ksm = [false, {{ sleep_ms = 1 }}] }}\nwhere = "{where}"\n'
    )
    assert len(Plan(load_study(path)).points()) == left


def test_parameters_that_came_later_do_not_change_older_identities() -> None:
    plain = Point().canonical()
    assert "pml" not in plain
    assert "ksm" not in plain
    assert Point.model_validate({"pml": True}).canonical()["pml"] is True
