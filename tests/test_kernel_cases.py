"""Counts of real kernels' TDP MMU (tests/cases/*.json, measured under emulation): every one that this version covers, exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from kernels.spec import Backing
from sweep.configs import Workload
from sweep.parameters import PARAMETERS, Point
from sweep.quantity import parse_size
from sweep.steps import STEP, STEP_CLASSES, build_step

FILES = sorted((Path(__file__).parent / "cases").glob("*.json"))
DERIVED = {"pf_taken_less_spurious": lambda c: c["pf_taken"] - c["pf_spurious"]}
NOT_COVERED = {
    "collapse",
    "dirty_log",
    "dontneed",
    "fork",
    "host_touch",
    "offset",
    "anonymous_default",
    "private_memfd",
    "shmem_thp",
}


def cases() -> list[Any]:
    found = []
    for path in FILES:
        for case in json.loads(path.read_text())["cases"]:
            if covered(case):
                found.append(pytest.param(case, id=f"{path.stem}:{case['name']}:{case['point']['memory']}"))
    return found


def covered(case: dict[str, Any]) -> bool:
    """Steps and parameters that this version models; decided by what it offers, not by name."""
    point = case["point"]
    known = set(point) <= set(PARAMETERS) and point["backing"].upper() in Backing.__members__
    return known and parse_size(point.get("offset", "0")) == 0 and all(step["op"] in STEP_CLASSES for step in case["steps"])


def run_case(case: dict[str, Any]) -> list[dict[str, int]]:
    from kernels import simulate

    point = Point.model_validate(case["point"])
    steps = [build_step(STEP.validate_python(step), Path()) for step in case["steps"]]
    run = simulate(
        steps=steps,
        kernel=point.kernel,
        backing=point.backing,
        memory=point.memory,
        vcpus=point.vcpus,
        use_zero_page=point.use_zero_page,
    )
    return [step.counters | step.gauges for step in run.steps]


@pytest.mark.parametrize("case", cases())
def test_counts_equal_the_kernels(case: dict[str, Any]) -> None:
    for number, (expected, counted) in enumerate(zip(case["expect"], run_case(case), strict=True)):
        wrong = {}
        for name, value in expected.items():
            have = DERIVED[name](counted) if name in DERIVED else counted[name]
            low, high = value if isinstance(value, list) else (value, value)
            if not low <= have <= high:
                wrong[name] = (have, value)
        assert not wrong, f"step {number} {case['steps'][number]}: (model, kernel) {wrong}"


def lacks(case: dict[str, Any]) -> set[str]:
    """What this version would need for a case: ops, the offset, a backing."""
    point = case["point"]
    ops = {step["op"] for step in case["steps"]} - set(STEP_CLASSES) - {"child_exit"}
    shifted = {"offset"} if parse_size(point.get("offset", "0")) else set()
    return ops | shifted | ({point["backing"]} if point["backing"].upper() not in Backing.__members__ else set())


def test_what_is_not_covered_is_known_by_name() -> None:
    missing = [lacks(case) for path in FILES for case in json.loads(path.read_text())["cases"] if not covered(case)]
    assert all(missing)
    assert set().union(*missing) == NOT_COVERED


def test_every_file_contributes() -> None:
    assert len(FILES) == 9
    assert {case.id.split(":")[0] for case in cases()} == {path.stem for path in FILES}
    assert len(cases()) >= 300


def test_workload_type_is_what_points_use() -> None:
    assert Workload("x", (), Path()).digest() == Workload("y", (), Path()).digest()
