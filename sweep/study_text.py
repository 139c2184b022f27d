"""Study files that the program writes itself: for a recorded trace, for a question."""

from collections.abc import Mapping, Sequence
from typing import Any

from sweep.files import toml_value
from sweep.parameters import COLUMN_OF, policy_fits

PROPOSALS = ("change_pte_prefetch", "no_change_pte", "always_writable")  # of the list thread


def proposals_of(kernel: str, mmu: str) -> list[str]:
    """The list thread's patches that this kernel and MMU can have."""
    return [policy for policy in PROPOSALS if policy_fits(policy, kernel, mmu)]


def pair(name: str, value: Any) -> str:
    """A parameter with its value; sizes are bytes."""
    return f"{name} = {toml_value(f'{value}B' if name in COLUMN_OF else value)}"


def block(axes: Mapping[str, Sequence[Any]], point: Mapping[str, Any] | None = None) -> str:
    """A block: the product of the axes, under parameters of its own."""
    grid = ", ".join(f"{name} = [{', '.join(toml_value(value) for value in values)}]" for name, values in axes.items())
    fixed = f"point = {{ {', '.join(pair(name, value) for name, value in point.items())} }}\n" if point else ""
    return f"[[block]]\n{fixed}grid = {{ {grid} }}\n"


def listed_workload(name: str, path: str) -> str:
    """A workload that makes the accesses of a file."""
    return f'[workload.{name}]\nsteps = [{{ op = "touch_list", path = {toml_value(path)} }}]\n'
