"""Counts of real kernels (tests/cases/*.json, measured under emulation; TDP, legacy and shadow MMU): every one, exactly."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweep.configs import Workload
from sweep.host.case import case_from_json, faults_of, predict
from sweep.host.compare import value_of, within

FILES = sorted((Path(__file__).parent / "cases").glob("*.json"))


def cases() -> list[Any]:
    found = []
    for path in FILES:
        for case in json.loads(path.read_text())["cases"]:
            found.append(pytest.param(case, id=f"{path.stem}:{case['name']}:{case['point']['memory']}"))
    return found


@pytest.mark.parametrize("case", cases())
def test_counts_equal_the_kernels(case: dict[str, Any]) -> None:
    runnable = case_from_json(case)
    assert not faults_of(runnable)
    for number, (expected, counted) in enumerate(zip(case["expect"], predict(runnable), strict=True)):
        wrong = {name: (value_of(counted, name), value) for name, value in expected.items() if not within(value_of(counted, name), value)}
        assert not wrong, f"step {number} {case['steps'][number]}: (model, kernel) {wrong}"


def test_every_file_contributes() -> None:
    assert {case.id.split(":")[0] for case in cases()} == {path.stem for path in FILES}
    assert len(FILES) >= 23
    assert len(cases()) >= 4400


def test_workload_type_is_what_points_use() -> None:
    assert Workload("x", (), Path()).digest() == Workload("y", (), Path()).digest()
