"""The generated pages of docs/: `python -m sweep.pages` rewrites them all, and a test compares them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from kernels.policy import PROPOSALS
from sweep.cli import app
from sweep.configs import COST_TEXTS, CostFile, config_root, load_costs
from sweep.dataset.files import publish
from sweep.file_schemas import Schema, cost_meanings, is_size, parameter_schemas, step_schemas
from sweep.parameters import ALLOWED_VALUES, COLUMN_OF, KERNELS, Point, policy_fits
from sweep.schema import columns_page
from sweep.steps import STEP, STEP_CLASSES, check_steps

MOST_LISTED = 12  # values of an enumeration
NEEDS: Mapping[str, str] = {"child_exit": "fork"}  # what has to stand before a step


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _markdown_table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    return [_row(head), "|" + "---|" * len(head), *map(_row, rows), ""]


def _code(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(schema: Schema) -> str:
    """What a schema allows, for people."""
    if "$ref" in schema:
        return "a table (below)"
    if is_size(schema):
        return "size"
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "const" in schema:
        return _code(schema["const"])
    if "enum" in schema:
        listed = [_code(value) for value in schema["enum"]]
        return ", ".join(listed) if len(listed) <= MOST_LISTED else f"{listed[0]} ... {listed[-1]}"
    if "prefixItems" in schema:
        return f"[{', '.join(map(_values, schema['prefixItems']))}]"
    if "minimum" in schema:
        return f"{schema['minimum']:,} ... {schema['maximum']:,}"
    return {"boolean": "`true`, `false`", "string": "text"}[schema["type"]]


def _default(schema: Schema) -> str:
    return _code(schema["default"]) if "default" in schema else ""


def parameters_page() -> str:
    """docs/parameters.md."""
    parameters, settings = parameter_schemas()
    lines = [
        "# Parameters",
        "",
        "Generated from `sweep/parameters.py`. What a point is: keys of `[point]`, `grid` and `zip` of a [study file](study.md), and",
        'columns of a [dataset](columns.md). A size is text with a unit, as in `"16GiB"`; 16GiB and 16GB differ, 16G is refused.',
        "",
    ]
    head = ("parameter", "values", "default", "column", "meaning")
    lines += _markdown_table(
        head,
        ((_code(n), _values(s), _default(s), _code(COLUMN_OF.get(n, n)), s["description"]) for n, s in parameters.items()),
    )
    for name, schema in parameters.items():
        for table in (settings[part["$ref"].rpartition("/")[2]] for part in schema.get("anyOf", ()) if "$ref" in part):
            lines += [f"## Settings of `{name}`", "", table["description"], "", *_fields(table)]
    lines += [
        "## Proposals",
        "",
        "What each `policy` changes ([the model](model.md) has the behaviours), and the kernels that it makes sense on.",
        "",
    ]
    lines += _markdown_table(("policy", "changes", "kernels"), map(_proposal, PROPOSALS))
    return "\n".join(lines)


def _proposal(policy: str) -> tuple[str, str, str]:
    """(policy, behaviours that it sets, kernels)."""
    changes = ", ".join(f"`{behaviour.name}` = {value}" for behaviour, value in PROPOSALS[policy].changes.items())
    return _code(policy), changes, _since([kernel for kernel in KERNELS if policy_fits(policy, kernel)]) or "all"


def _fields(table: Schema) -> list[str]:
    """The keys of a table but `op`, as a table."""
    fields = {name: schema for name, schema in table["properties"].items() if name != "op"}
    if not fields:
        return ["No fields.", ""]
    rows = ((_code(n), _values(s), _default(s), s["description"]) for n, s in fields.items())
    return _markdown_table(("field", "values", "default", "meaning"), rows)


def steps_page() -> str:
    """docs/steps.md."""
    step, classes = step_schemas()
    lines = [
        "# Steps",
        "",
        "Generated from `sweep/steps.py` and from the checks of the model. What a [workload](howto/workload.md) is made of: each is a",
        "table with `op` and fields. Steps run one after the other; numbers have their unit in the name, or are counts.",
        "",
        "Kernels, memory and MMUs that have the call (all, where nothing is said):",
        "",
    ]
    lines += _markdown_table(("op", "memory", "MMU", "kernels"), (row for op in STEP_CLASSES for row in _availability(op)))
    for op in STEP_CLASSES:
        (table,) = (t for t in (classes[part["$ref"].rpartition("/")[2]] for part in step["oneOf"]) if t["properties"]["op"]["const"] == op)
        lines += [f"## `{op}`", "", table["description"], "", *_fields(table)]
    return "\n".join(lines)


def _availability(op: str) -> list[tuple[str, str, str, str]]:
    """(op, backings, MMUs, kernels) where the model takes a step with its defaults: one row for each kind of memory that differs."""
    groups: dict[frozenset[tuple[str, str]], list[str]] = {}
    for backing in _in_order("backing"):
        places = product(_in_order("mmu"), KERNELS)
        taken = frozenset((mmu, kernel) for mmu, kernel in places if _takes(op, {"backing": backing, "mmu": mmu, "kernel": kernel}))
        groups.setdefault(taken, []).append(backing)
    rows = []
    for taken, backings in groups.items():
        if taken:
            mmus = [mmu for mmu in _in_order("mmu") if mmu in {mmu for mmu, _ in taken}]
            kernels = [kernel for kernel in KERNELS if kernel in {kernel for _, kernel in taken}]
            rows.append((_code(op), _but_all(backings, _in_order("backing")), _but_all(mmus, _in_order("mmu")), _since(kernels)))
    return rows


def _takes(op: str, point: Mapping[str, str]) -> bool:
    if op == "touch_list":
        return True  # what can be wrong with one is its file
    steps = [STEP.validate_python({"op": name}) for name in (NEEDS.get(op), op) if name]
    return not check_steps(steps, Path(), Point.model_validate(point))


def _in_order(name: str) -> list[str]:
    """The values of an enumerated parameter, as its type has them."""
    return [value for value in parameter_schemas()[0][name]["enum"] if value in ALLOWED_VALUES[name]]


def _but_all(some: Sequence[str], every: Sequence[str]) -> str:
    return "" if len(some) == len(every) else ", ".join(map(_code, some))


def _since(kernels: Sequence[str]) -> str:
    """'6.11 and newer'; '' for all of them."""
    if tuple(kernels) == KERNELS:
        return ""
    first, last = KERNELS.index(kernels[0]), KERNELS.index(kernels[-1])
    if tuple(kernels) != KERNELS[first : last + 1]:
        return ", ".join(kernels)
    return f"{kernels[0]} and newer" if kernels[-1] == KERNELS[-1] else f"{kernels[0]} ... {kernels[-1]}"


def costs_page() -> str:
    """docs/costs.md."""
    files = {path.stem: load_costs(path.stem, path.parent) for path in sorted((config_root() / "costs").glob("*.toml"))}
    default = files.pop("default")
    lines = [
        "# Costs",
        "",
        "Generated from `configs/costs`. What each part of a fault takes, in virtual nanoseconds, and the range that it is known to.",
        "`costs` of a point names the file; `default@vm_exit_ns=high` moves one value to an end of its range. `basis` says how sure a",
        "value is: `measured`, `fitted`, `sourced`, or a `guess`. A file of your own: [how-to](howto/costs.md).",
        "",
        "## `default`",
        "",
        *_about(default),
        *_costs(default, default.values),
    ]
    for name, file in files.items():
        moved = [cost for cost in file.values if (file.values[cost], file.ranges[cost]) != (default.values[cost], default.ranges[cost])]
        lines += [f"## `{name}`", "", *_about(file), "Where it differs from `default`:", "", *_costs(file, moved)]
    return "\n".join(lines)


def _about(file: CostFile) -> list[str]:
    return [*(f"* {key}: {text}" for key, text in file.about.items()), ""]


def _costs(file: CostFile, costs: Iterable[Any]) -> list[str]:
    meanings = cost_meanings()

    def row(cost: Any) -> tuple[str, ...]:
        low, high = file.ranges[cost]
        said = {"unit": "ns", **file.texts.get(cost, {})}
        known = [said.get(key, "") for key in COST_TEXTS if key in ("unit", "basis", "source")]
        return _code(cost.name.lower()), f"{file.values[cost]:,}", f"{low:,} ... {high:,}", *known, meanings.get(cost, "")

    return _markdown_table(("cost", "value", "range", "unit", "basis", "source", "meaning"), map(row, costs))


def commands_page() -> str:
    """docs/commands.md, as typer writes it."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="faultsweep"), name="faultsweep", title="Commands")
    first, _, rest = text.partition("\n\n")
    note = (
        "Generated from `sweep/cli.py`. Exit status: 0 all points done; 1 ran, some points failed; 2 usage or study error; 3 dataset\n"
        "conflict or corruption; 4 over the budget (`--yes` to go on); 5 environment; 129, 130, 143 ended by SIGHUP, SIGINT, SIGTERM\n"
        "(run again to go on)."
    )
    return f"{first}\n\n{note}\n\n{rest}".replace("```console", "<!-- not run: the shape of a command -->\n```console").rstrip() + "\n"


PAGES: Mapping[str, Callable[[], str]] = {
    "columns.md": columns_page,
    "commands.md": commands_page,
    "costs.md": costs_page,
    "parameters.md": parameters_page,
    "steps.md": steps_page,
}


def main() -> None:
    """Rewrite them."""
    for name, page in PAGES.items():
        publish(config_root().parent / "docs" / name, page().encode())


if __name__ == "__main__":
    main()
