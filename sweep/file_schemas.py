"""JSON Schemas (draft 2020-12) of the files that users write, for editors: study files, shared workloads, cost files.

They are made of what reads those files: parameters and steps are pydantic's schemas of `sweep.parameters` and `sweep.steps`, keys and
bounds are the readers'. They say what a file may look like; whether its values fit together `faultsweep plan` says.
"""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from kernels.cost import MAX_COST_NS, Cost
from sweep.blocks import MAX_SAMPLE, METHODS
from sweep.configs import COST_KEYS, COST_NAMES, MAX_STEPS, WORKLOAD_KEYS
from sweep.errors import UsageError
from sweep.files import nearest
from sweep.parameters import NAME_PATTERN, PARAMETERS, Point
from sweep.quantity import SIZE_PATTERN, format_size
from sweep.steps import STEP
from sweep.study import (
    BLOCK_KEYS,
    DEFAULT_BUDGET_CPU_HOURS,
    GENERATORS,
    MAX_BUDGET_CPU_HOURS,
    MAX_PATH,
    MAX_REPLICATES,
    MAX_SEED,
    MAX_TITLE,
    SAMPLE_KEYS,
    STUDY_KEYS,
    TOP_KEYS,
)

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES: Mapping[type, str] = {int: "integer", float: "number"}


class _OfToml(GenerateJsonSchema):
    """Schemas of what stands in TOML: there is no null, sizes are text with a unit."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - as pydantic calls it
        return False

    def nullable_schema(self, schema: Any) -> Schema:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> Schema:
        made = super().default_schema(schema)
        if is_size(made):
            made["default"] = format_size(made["default"]) if made["default"] is not None else None
        if made.get("default", ...) is None:
            del made["default"]
        return made

    def tagged_union_schema(self, schema: Any) -> Schema:
        made = super().tagged_union_schema(schema)
        made.pop("discriminator", None)  # OpenAPI's, no keyword of JSON Schema
        return made


def is_size(schema: Schema) -> bool:
    """It is the schema of a size: text with a unit, or 0."""
    return any(kind.get("pattern") == SIZE_PATTERN for kind in schema.get("anyOf", ()))


def parameter_schemas() -> tuple[dict[str, Schema], dict[str, Schema]]:
    """(schema of each parameter, definitions that they refer to)."""
    made = Point.model_json_schema(schema_generator=_OfToml)
    return made["properties"], made.get("$defs", {})


def step_schemas() -> tuple[Schema, dict[str, Schema]]:
    """(schema of a step, definitions that it refers to: one for each op)."""
    made = STEP.json_schema(schema_generator=_OfToml)
    return made, made.pop("$defs")


def _table(known: tuple[str, ...], properties: Mapping[str, Schema], required: tuple[str, ...] = (), **more: Any) -> Schema:
    """A table with known keys only, in the reader's order. Raises KeyError for a key that has no schema here."""
    made: Schema = {"type": "object", "properties": {key: properties[key] for key in known}, "additionalProperties": False}
    return {**made, **({"required": list(required)} if required else {}), **more}


def _generator(kind: str) -> Schema:
    """`{ range = [0, 8] }` and the like: what the function of that name takes."""
    taken = inspect.signature(GENERATORS[kind]).parameters.values()
    numbers = {
        "type": "array",
        "prefixItems": [{"type": _TYPES[each.annotation]} for each in taken],
        "minItems": sum(each.default is each.empty for each in taken),
        "maxItems": len(taken),
    }
    shape = f"[{', '.join(each.name for each in taken)}]: {GENERATORS[kind].__doc__}"
    return _table((kind,), {kind: {**numbers, "description": shape}}, (kind,))


def _axis(name: str, parameter: Schema) -> Schema:
    """The values of a parameter: a list, or for numbers what makes one; only numbers with a fraction come from linspace."""
    fitting = {"integer": ("range", "pow2"), "number": tuple(GENERATORS)}.get(parameter.get("type", ""), ())
    listed = {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "minItems": 1}
    meaning = {"description": parameter["description"]}
    return {"anyOf": [listed, *map(_generator, fitting)], **meaning} if fitting else {**listed, **meaning}


def _head() -> Schema:
    """The table [study]."""
    name = {"type": "string", "pattern": f"^{NAME_PATTERN}$", "description": "name, and default directory under results/"}
    title = {"type": "string", "maxLength": MAX_TITLE, "default": "", "description": "free text"}
    seed = {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "default": 0, "description": "of every draw of the study"}
    replicates = {"type": "integer", "minimum": 1, "maximum": MAX_REPLICATES, "default": 1}
    budget = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": MAX_BUDGET_CPU_HOURS, "default": DEFAULT_BUDGET_CPU_HOURS}
    observations = {"type": "string", "minLength": 1, "maxLength": MAX_PATH}
    keys: dict[str, Schema] = {
        "name": name,
        "title": title,
        "seed": seed,
        "replicates": {**replicates, "description": "replicate r touches the same pages in every configuration"},
        "budget_cpu_hours": {**budget, "description": "CPU hours; a run that is predicted to take more needs --yes"},
        "observations": {
            **observations,
            "description": "observed rates beside predictions: a name in configs/observations, or a .csv file",
        },
    }
    return _table(STUDY_KEYS, keys)


def _block(point: Schema, axes: Schema) -> Schema:
    """One of [[block]]."""
    method = {"enum": list(METHODS), "description": "scipy.stats.qmc's; random: independent draws"}
    n = {"type": "integer", "minimum": 1, "maximum": MAX_SAMPLE, "description": "points; a power of two for sobol"}
    keys: dict[str, Schema] = {
        "grid": {**axes, "description": "axes whose product is taken; the last one moves fastest"},
        "zip": {**axes, "description": "axes of one length that move side by side"},
        "point": {**point, "description": "parameters that stay as they are in this block"},
        "where": {"type": "string", "description": "keeps the points for which it holds, like memory >= vcpus * 256 * MiB"},
        "sample": _table(SAMPLE_KEYS, {"method": method, "n": n}, SAMPLE_KEYS, description="so many points of the product instead of all"),
    }
    return _table(BLOCK_KEYS, keys)


def _workload(step: Schema) -> Schema:
    steps = {"type": "array", "items": step, "minItems": 1, "maxItems": MAX_STEPS, "description": "run one after the other"}
    return _table(WORKLOAD_KEYS, {"steps": steps, "about": {"type": "string", "description": "what it stands for"}}, ("steps",))


def study_schema() -> Schema:
    """Of a study file."""
    parameters, settings = parameter_schemas()
    step, steps = step_schemas()
    axes = {f"{name}_axis": _axis(name, schema) for name, schema in parameters.items()}
    point = _table(PARAMETERS, {name: {"$ref": f"#/$defs/{name}"} for name in parameters})
    grid = _table(PARAMETERS, {name: {"$ref": f"#/$defs/{name}_axis"} for name in parameters})
    keys: dict[str, Schema] = {
        "include": {"type": "array", "items": {"type": "string"}, "description": "study files whose keys are defaults here"},
        "study": _head(),
        "point": {**point, "description": "parameters of every point, unless a block says otherwise"},
        "block": {"type": "array", "minItems": 1, "items": _block(point, grid), "description": "united; a point of two blocks runs once"},
        "workload": {"type": "object", "additionalProperties": _workload(step), "description": "workloads of this study by name"},
    }
    named = {"required": ["study"], "properties": {"study": {"required": ["name"]}}}
    alone = {"if": {"not": {"required": ["include"]}}, "then": named}  # an included file may give the name
    return {
        "$schema": DRAFT,
        "title": "faultsweep study",
        **_table(TOP_KEYS, keys),
        **alone,
        "$defs": {**parameters, **axes, **settings, **steps},
    }


def workload_schema() -> Schema:
    """Of a file of configs/workloads."""
    step, steps = step_schemas()
    return {"$schema": DRAFT, "title": "faultsweep workload", **_workload(step), "$defs": steps}


def cost_meanings() -> dict[Cost, str]:
    """What each cost is, as kernels.cost says below its name; those that it does not explain are left out."""
    body = ast.parse(inspect.getsource(Cost)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for line, following in zip(body.body, body.body[1:], strict=False):
        match line, following:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[Cost[name]] = text
    return found


def cost_schema() -> Schema:
    """Of a cost file."""
    ns = {"type": "integer", "minimum": 0, "maximum": MAX_COST_NS}
    keys: dict[str, Schema] = {key: {"type": "string"} for key in COST_KEYS} | {
        "value": {**ns, "description": "virtual ns"},
        "range": {"type": "array", "items": ns, "minItems": 2, "maxItems": 2, "description": "low and high, ns"},
        "unit": {"const": "ns"},
    }
    meanings = cost_meanings()
    entries = {
        key: {"$ref": "#/$defs/cost", **({"description": meanings[cost]} if cost in meanings else {})} for key, cost in COST_NAMES.items()
    }
    about = {"type": "object", "description": "machine, method, date and source of the whole file"}
    costs = _table(tuple(COST_NAMES), entries, tuple(COST_NAMES))
    made = _table(("about", "cost"), {"about": about, "cost": costs}, ("cost",))
    return {"$schema": DRAFT, "title": "faultsweep costs", **made, "$defs": {"cost": _table(COST_KEYS, keys, ("value",))}}


KINDS: Mapping[str, Callable[[], Schema]] = {"study": study_schema, "workload": workload_schema, "costs": cost_schema}


def schema_of(kind: str) -> Schema:
    """The schema of a kind of file. Raises UsageError."""
    if kind not in KINDS:
        raise UsageError(f"schema {kind!r}: {nearest(kind, KINDS)}")
    return KINDS[kind]()
