"""What a parameter is to the one who decides: a setting that can be chosen, or a condition that is given.

A *setting* of a study is a combination of the chosen parameters, a *scenario* one of the given ones: settings are compared inside a
scenario. Replicates and moved costs (`default@vm_exit_ns=low`) are neither: they say how sure a figure is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sweep.parameters import COLUMN_OF, DAEMONS, PARAMETERS, Point
from sweep.quantity import format_size

PARAMETER_COLUMNS = tuple(COLUMN_OF.get(name, name) for name in PARAMETERS)
SETTINGS = (
    "backing",
    "policy",
    "mmu",
    "thp_enabled",
    "use_zero_page",
    "khugepaged",
    "ksm",
    "prealloc",
    "prealloc_threads",
    "nx_huge_pages",
    "eager_page_split",
    "pml",
)
CONDITIONS = ("workload", "kernel", "vcpus", "memory_bytes", "cores", "smt", "thp_failure", "offset_bytes", "guest_page_bytes", "costs")
PROMOTED = ("kernel", "smt", "guest_page_bytes")  # the first that varies is what is compared, where no setting varies
DEFAULTS: Mapping[str, Any] = Point.model_validate({}).columns()
ALWAYS = ("backing", *PROMOTED)  # said even where it is the default
SIZES = ("memory_bytes", "offset_bytes", "guest_page_bytes")
_WORDS: Mapping[str, str] = {"vcpus": "{} vCPU{s}", "cores": "{} core{s}", "smt": "{} thread{s} a core", "thp_failure": "THP failure {:g}"}


def chosen(varying: Sequence[str]) -> tuple[str, ...]:
    """Of the columns that vary, those whose combinations are the study's settings."""
    found = tuple(name for name in SETTINGS if name in varying)
    return found or next(((name,) for name in PROMOTED if name in varying), ())


def given(varying: Sequence[str]) -> tuple[str, ...]:
    """Of the columns that vary, those whose combinations are the study's scenarios."""
    settings = chosen(varying)
    return tuple(name for name in CONDITIONS if name in varying and name not in settings)


def rank(name: str, value: object) -> tuple[Any, ...]:
    """Sorts the values of a parameter as a reader expects them: defaults of settings first, kernels as versions."""
    parts = str(value).split(".") if name == "kernel" else []
    version = tuple(int(part) for part in parts) if all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts) else ()
    return (name in SETTINGS and value != DEFAULTS[name], version, str(value) if isinstance(value, str) else value)


def word(name: str, value: object) -> str:
    """One parameter of a label: '8 vCPUs', 'use_zero_page=False'."""
    if name in SIZES:
        return format_size(int(str(value)))
    if name in _WORDS:
        return _WORDS[name].format(value, s="" if value == 1 else "s")
    if name in DAEMONS:
        return f"{name}({value})" if value != "false" else f"no {name}"
    if name in ("policy", "backing", "workload", "prealloc", "costs"):
        return str(value)
    return f"{name}={value}" if name != "kernel" else f"kernel {value}"


def setting_label(values: Mapping[str, object]) -> str:
    """A setting in few words: its backing, and what differs from the defaults."""
    told = [word(name, value) for name, value in values.items() if name in ALWAYS or value != DEFAULTS.get(name)]
    return ", ".join(told) or ", ".join(word(name, value) for name, value in values.items()) or "the only setting"


def scenario_label(values: Mapping[str, object], nothing: str = "the only scenario") -> str:
    """A scenario in few words; as many cores as vCPUs are not said."""
    told = [word(name, value) for name, value in values.items() if name != "cores" or value != values.get("vcpus")]
    return ", ".join(told) or nothing
