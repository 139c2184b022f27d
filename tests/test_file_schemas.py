"""`faultsweep schema`: what the readers take, the schemas take; what has the wrong shape, both refuse."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sweep.configs import config_root, load_costs
from sweep.errors import StudyError
from sweep.file_schemas import KINDS, schema_of
from sweep.parameters import PARAMETERS
from sweep.quantity import SIZE_PATTERN, parse_size
from sweep.steps import STEP_CLASSES
from sweep.study import load_study

FOLDERS = {"study": "studies", "workload": "workloads", "costs": "costs"}
SHIPPED = [(kind, path) for kind, folder in FOLDERS.items() for path in sorted((config_root() / folder).glob("*.toml"))]
SCHEMAS = {kind: schema_of(kind) for kind in KINDS}
CHECKED = {kind: Draft202012Validator(schema) for kind, schema in SCHEMAS.items()}

HEAD = '[study]\nname = "s"\n'
POINT = HEAD + '[point]\nmemory = "2MiB"\n'
BLOCK = POINT + "[[block]]\n"
STEPS = POINT + 'workload = "w"\n[workload.w]\nsteps = [{ op = "touch" }, '

TAKEN = {
    "a head": HEAD,
    "sizes": HEAD + '[point]\nmemory = "1.5 GiB"\noffset = 0\nguest_page = "4KiB"\n',
    "daemons": POINT + "khugepaged = { scan_sleep_ms = 10 }\nksm = false\n",
    "axes": BLOCK
    + "grid = { vcpus = { pow2 = [1, 8] }, thp_failure = { linspace = [0.0, 1.0, 3] }, cores = { range = [1, 3] }, ksm = [false] }\n",
    "a zip and a sample": BLOCK + 'zip = { kernel = ["6.1"], mmu = ["tdp"] }\nsample = { method = "sobol", n = 1 }\nwhere = "vcpus > 0"\n',
    "steps": STEPS
    + '{ op = "dontneed", every = "2MiB", size = "4KiB" }, { op = "touch", order = "zipf", touches = 9, range = [0, 0.5] }]\n',
}
REFUSED = {
    "no name": '[study]\ntitle = "t"\n',
    "nothing": "",
    "a name that is none": '[study]\nname = "S p"\n',
    "an unknown table": HEAD + "[points]\n",
    "an unknown key of study": HEAD + "replicas = 3\n",
    "a seed below 0": HEAD + "seed = -1\n",
    "a seed of text": HEAD + 'seed = "7"\n',
    "no replicates": HEAD + "replicates = 0\n",
    "no budget": HEAD + "budget_cpu_hours = 0\n",
    "observations of another type": HEAD + "observations = 3\n",
    "an include that is no list": 'include = "base.toml"\n' + HEAD,
    "a point that is no table": "point = 3\n" + HEAD,
    "a block that is no list": HEAD + "[block]\n",
    "an unknown parameter": POINT + "vcpu = 1\n",
    "a kernel that is a number": POINT + "kernel = 6.12\n",
    "a kernel that never was": POINT + 'kernel = "5.20"\n',
    "a policy that is none": POINT + 'policy = "mainlin"\n',
    "a backing that is none": POINT + 'backing = "thp"\n',
    "no vCPUs": POINT + "vcpus = 0\n",
    "vCPUs with a fraction": POINT + "vcpus = 1.5\n",
    "too many vCPUs": POINT + "vcpus = 4097\n",
    "a size without unit": HEAD + '[point]\nmemory = "16G"\n',
    "a size as a number": HEAD + "[point]\nmemory = 4096\n",
    "a switch of text": POINT + 'pml = "yes"\n',
    "a chance above 1": POINT + "thp_failure = 1.5\n",
    "a daemon that is true": POINT + "khugepaged = true\n",
    "an unknown setting of a daemon": POINT + "ksm = { pages = 3 }\n",
    "a setting out of bounds": POINT + "khugepaged = { max_ptes_none = 512 }\n",
    "an unknown key of a block": BLOCK + "grids = { vcpus = [1] }\n",
    "an axis that is a number": BLOCK + "grid = { vcpus = 3 }\n",
    "an empty axis": BLOCK + "grid = { vcpus = [] }\n",
    "an axis of an unknown parameter": BLOCK + "grid = { cpus = [1] }\n",
    "a wrong value on an axis": BLOCK + 'grid = { backing = ["anonymous", "thp"] }\n',
    "an unknown generator": BLOCK + "grid = { vcpus = { log2 = [1, 8] } }\n",
    "a generator that lacks a number": BLOCK + "grid = { vcpus = { pow2 = [8] } }\n",
    "a generator with too many": BLOCK + "grid = { vcpus = { range = [1, 8, 2, 2] } }\n",
    "fractions of vCPUs": BLOCK + "grid = { vcpus = { linspace = [1.0, 2.0, 3] } }\n",
    "a zip that is no table": BLOCK + "zip = 3\n",
    "a where that is a truth": BLOCK + "where = true\n",
    "a method that is none": BLOCK + 'grid = { vcpus = [1, 2] }\nsample = { method = "halton", n = 2 }\n',
    "a sample without a number": BLOCK + 'grid = { vcpus = [1, 2] }\nsample = { method = "sobol" }\n',
    "a workload without steps": POINT + '[workload.w]\nabout = "nothing"\n',
    "a workload of no steps": POINT + "[workload.w]\nsteps = []\n",
    "an unknown key of a workload": POINT + '[workload.w]\nsteps = [{ op = "fork" }]\nnote = "n"\n',
    "an unknown op": STEPS + '{ op = "tuch" }]\n',
    "a step without op": STEPS + '{ access = "read" }]\n',
    "a step that is no table": STEPS + '"fork"]\n',
    "an unknown field of a step": STEPS + '{ op = "touch", acess = "read" }]\n',
    "a field of another op": STEPS + '{ op = "fork", access = "read" }]\n',
    "an access that is none": STEPS + '{ op = "touch", access = "readwrite" }]\n',
    "a part beyond memory": STEPS + '{ op = "collapse", range = [0.0, 2.0] }]\n',
    "a part with one end": STEPS + '{ op = "touch", range = [0.5] }]\n',
    "a list without a path": STEPS + '{ op = "touch_list" }]\n',
    "a step's size without unit": STEPS + '{ op = "touch", every = 4096 }]\n',
    "touches below 0": STEPS + '{ op = "touch", touches = -1 }]\n',
    "a window of text": STEPS + '{ op = "touch", access = "pairs", window = "4" }]\n',
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_schema_is_one_and_says_which_draft(kind: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[kind])
    assert SCHEMAS[kind]["$schema"].endswith("draft/2020-12/schema")


@pytest.mark.parametrize(("kind", "path"), SHIPPED, ids=lambda given: given.stem if isinstance(given, Path) else given)
def test_what_ships_is_valid(kind: str, path: Path) -> None:
    CHECKED[kind].validate(tomllib.loads(path.read_text()))


@pytest.mark.parametrize("text", TAKEN.values(), ids=TAKEN)
def test_what_the_reader_takes_is_valid(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    load_study(tmp_path / "s.toml")
    CHECKED["study"].validate(tomllib.loads(text))


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_what_has_the_wrong_shape_neither_takes(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(StudyError):
        load_study(tmp_path / "s.toml")
    assert not CHECKED["study"].is_valid(tomllib.loads(text))


def test_a_name_may_come_from_an_included_file() -> None:
    assert CHECKED["study"].is_valid({"include": ["base.toml"]})


@pytest.mark.parametrize(
    "change",
    [{"value": -1}, {"value": "9"}, {"range": [1]}, {"unit": "us"}, {"origin": "x"}, {"value": 1.5}],
    ids=str,
)
def test_a_broken_cost_neither_takes(tmp_path: Path, change: dict[str, Any]) -> None:
    text = (config_root() / "costs" / "default.toml").read_text()
    ((key, value),) = change.items()
    lines = [line for line in text.split("[cost.")[1].splitlines() if not line.startswith(f"{key} ")]
    broken = text.replace(text.split("[cost.")[1], "\n".join([*lines[:1], f"{key} = {json.dumps(value)}", *lines[1:], "", ""]))
    (tmp_path / "c.toml").write_text(broken)
    with pytest.raises(StudyError):
        load_costs("c.toml", tmp_path)
    assert not CHECKED["costs"].is_valid(tomllib.loads(broken))


def test_every_parameter_and_every_op_is_there() -> None:
    study = SCHEMAS["study"]
    steps = [
        study["$defs"][each["$ref"].rpartition("/")[2]]
        for each in study["properties"]["workload"]["additionalProperties"]["properties"]["steps"]["items"]["oneOf"]
    ]
    assert {step["properties"]["op"]["const"] for step in steps} == set(STEP_CLASSES)
    assert set(study["properties"]["point"]["properties"]) == set(PARAMETERS)


def described(schema: Any, path: str = "") -> Iterator[str]:
    """Keys of tables that say nothing of what they mean."""
    if isinstance(schema, dict):
        for key, entry in schema.get("properties", {}).items() if isinstance(schema.get("properties"), dict) else ():
            if not {"description", "$ref", "const"} & set(entry):
                yield f"{path}/{key}"
        for key, entry in schema.items():
            yield from described(entry, f"{path}/{key}")
    if isinstance(schema, list):
        for number, entry in enumerate(schema):
            yield from described(entry, f"{path}/{number}")


@pytest.mark.parametrize("kind", ["study", "workload"])
def test_every_key_says_what_it_means(kind: str) -> None:
    assert not [path for path in described(SCHEMAS[kind]) if not path.endswith(("/study", "/sample"))]


@pytest.mark.parametrize("text", ["0", "4KiB", "1.5 GiB", "16GB", "7 B"])
def test_the_pattern_of_sizes_takes_what_is_one(text: str) -> None:
    assert parse_size(text) >= 0
    assert Draft202012Validator({"pattern": SIZE_PATTERN}).is_valid(text)


@pytest.mark.parametrize("text", ["16G", "", "4 kib", "KiB", "1.1234567GiB", "-4KiB", "4KiBs", "00x"])
def test_and_no_other(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)
    assert not Draft202012Validator({"pattern": SIZE_PATTERN}).is_valid(text)


def test_the_command_prints_it() -> None:
    command = [sys.executable, "-m", "sweep", "schema"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == SCHEMAS["study"]
    wrong = subprocess.run([*command, "workloads"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "schema 'workloads': did you mean 'workload'?\n")
