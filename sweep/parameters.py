"""The parameters of a point, once: type, default, allowed values, meaning. Parser, columns, help, checks and JSON Schema follow from here.

Names are those of the contract; sizes are bytes inside the program and written with a unit in files.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from kernels.checks import smt_fault
from kernels.policy import LAST_MINOR, OLDEST, Behaviour, PolicyError, UnknownKernelError, Version, behaviours, parse_kernel
from kernels.spec import KVM_MAX_VCPUS, MAX_MEMORY_BYTES, MAX_SMT, PAGE_BYTES, PMD_BYTES, PUD_BYTES, Prealloc
from sweep.quantity import SIZE_PATTERN, format_size, parse_size

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
# What a file holds, for its JSON Schema, where a validator of ours reads it before pydantic does.
SizeText = Annotated[str, Field(pattern=SIZE_PATTERN)] | Literal[0]
Chance = Annotated[float, Field(ge=0, le=1)]
CountText = Annotated[int, Field(ge=1, le=KVM_MAX_VCPUS)]
KERNELS: tuple[str, ...] = tuple(
    str(version) for major, last in LAST_MINOR.items() for minor in range(last + 1) if (version := Version(major, minor)) >= OLDEST
)
KernelText = Annotated[str, Field(json_schema_extra={"enum": list(KERNELS)})]

Size = Annotated[int, BeforeValidator(lambda v: v if type(v) is int and v == 0 else parse_size(v), json_schema_input_type=SizeText)]


def _page_multiple(size: int) -> int:
    if PAGE_BYTES <= size <= MAX_MEMORY_BYTES and size % PAGE_BYTES == 0:
        return size
    low = min(MAX_MEMORY_BYTES, max(PAGE_BYTES, size // PAGE_BYTES * PAGE_BYTES))
    high = min(MAX_MEMORY_BYTES, low + PAGE_BYTES)
    nearest = format_size(low) if low == high else f"{format_size(low)}, {format_size(high)}"
    raise ValueError(f"{format_size(size)} ({size} bytes): a multiple of 4KiB from 4KiB to 16TiB is needed; nearest: {nearest}")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return float(value)


def _chance(value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{value}: 0 ... 1 is needed")
    return value + 0.0  # -0.0 is 0.0


def _shift(size: int) -> int:
    if 0 <= size <= MAX_MEMORY_BYTES and size % PAGE_BYTES == 0:
        return size
    raise ValueError(f"{format_size(size)}: a multiple of 4KiB from 0 to 16TiB is needed")


def _guest_page(size: int) -> int:
    if size not in (PAGE_BYTES, PMD_BYTES):
        raise ValueError(f"{format_size(size)}: 4KiB or 2MiB is needed")
    return size


GuestPage = Annotated[Size, AfterValidator(_guest_page)]


Fraction = Annotated[float, BeforeValidator(_number, json_schema_input_type=Chance), AfterValidator(_chance)]


class _Daemon(BaseModel):
    """Settings of a daemon of the host; the fields are those of /sys/kernel/mm."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KhugepagedSettings(_Daemon):
    """/sys/kernel/mm/transparent_hugepage/khugepaged."""

    pages_to_scan: Annotated[int, Field(strict=True, ge=1, le=1 << 32)] = Field(4096, description="pages looked at before it sleeps")
    scan_sleep_ms: Annotated[int, Field(strict=True, ge=1, le=1 << 32)] = Field(10_000, description="virtual ms that it sleeps")
    max_ptes_none: Annotated[int, Field(strict=True, ge=0, le=511)] = Field(511, description="absent pages of 512 that a collapse may fill")


class KsmSettings(_Daemon):
    """/sys/kernel/mm/ksm, and the fraction of the pages that have a twin."""

    pages_to_scan: Annotated[int, Field(strict=True, ge=1, le=1 << 32)] = Field(100, description="pages looked at before it sleeps")
    sleep_ms: Annotated[int, Field(strict=True, ge=1, le=1 << 32)] = Field(20, description="virtual ms that it sleeps")
    fraction: Fraction = Field(1.0, description="fraction of the pages that have a twin")


def _table_or_false(value: object) -> object:
    """A daemon is off (false) or has a table of settings."""
    if value is False or isinstance(value, dict):
        return None if value is False else value
    raise ValueError(f"{value!r}: false or a table of settings is needed")


def _plain(value: _Daemon | None) -> object:
    """A checked daemon as what TOML and JSON can hold: false, or a table with all its settings."""
    return value.model_dump() if value else False


DAEMONS: Mapping[str, type[_Daemon]] = {"khugepaged": KhugepagedSettings, "ksm": KsmSettings}


def _adapter(kind: type[_Daemon]) -> TypeAdapter[Any]:
    checked: Any = Annotated[kind | None, BeforeValidator(_table_or_false), AfterValidator(_plain)]
    return TypeAdapter(checked)


DAEMON_ADAPTERS: Mapping[str, TypeAdapter[Any]] = {name: _adapter(kind) for name, kind in DAEMONS.items()}


Khugepaged = Annotated[
    Any, BeforeValidator(DAEMON_ADAPTERS["khugepaged"].validate_python, json_schema_input_type=Literal[False] | KhugepagedSettings)
]
Ksm = Annotated[Any, BeforeValidator(DAEMON_ADAPTERS["ksm"].validate_python, json_schema_input_type=Literal[False] | KsmSettings)]
Memory = Annotated[Size, AfterValidator(_page_multiple)]


def _count(value: object) -> int:
    if type(value) is not int or not 1 <= value <= KVM_MAX_VCPUS:
        raise ValueError(f"must be an integer from 1 to {KVM_MAX_VCPUS}")
    return value


Count = Annotated[int, BeforeValidator(_count, json_schema_input_type=CountText)]


def _kernel(value: object) -> str:
    try:
        return str(parse_kernel(str(value))) if isinstance(value, str) else _refuse(value)
    except UnknownKernelError as error:
        raise ValueError(str(error)) from None


def _refuse(value: object) -> str:
    raise ValueError(f"{value!r} is no text; write the kernel in quotes, like '6.12'")


class Point(BaseModel):
    """One configuration. Raises pydantic.ValidationError with every fault at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: Annotated[str, BeforeValidator(_kernel, json_schema_input_type=KernelText)] = Field(
        "6.12", description="host kernel, a mainline version"
    )
    policy: Literal["mainline", "change_pte_prefetch", "no_change_pte", "always_writable", "huge_zero_thp", "huge_zero_split"] = Field(
        "mainline", description="a proposal on top of that kernel"
    )
    mmu: Literal["tdp", "legacy", "shadow"] = Field("tdp", description="KVM's MMU: TDP MMU, legacy direct MMU, shadow paging")
    vcpus: Count = Field(1, description="vCPUs of the guest")
    memory: Memory = Field(1 << 30, description="bytes of the data memslot")
    backing: Literal[
        "anonymous",
        "anonymous_thp",
        "anonymous_default",
        "anonymous_hugetlb_2mb",
        "anonymous_hugetlb_1gb",
        "shmem",
        "shmem_thp",
        "shared_hugetlb_2mb",
        "shared_hugetlb_1gb",
        "private_memfd",
    ] = Field("anonymous", description="memory behind the slot, names of the KVM selftests")
    thp_enabled: Literal["always", "madvise", "never"] = Field("madvise", description="transparent_hugepage/enabled of the host")
    use_zero_page: Annotated[bool, Field(strict=True)] = Field(True, description="the huge zero page; the 4K one is not affected")
    thp_failure: Fraction = Field(0.0, description="chance that a 2M allocation fails")
    offset: Annotated[Size, AfterValidator(_shift)] = Field(0, description="host minus guest address, modulo 1GiB")
    guest_page: GuestPage = Field(PMD_BYTES, description="page size of the guest's tables; matters with mmu = shadow")
    nx_huge_pages: Annotated[bool, Field(strict=True)] = Field(False, description="iTLB multihit mitigation")
    eager_page_split: Annotated[bool, Field(strict=True)] = Field(True, description="TDP MMU: huge SPTEs are split when logging begins")
    khugepaged: Khugepaged = Field(False, description="khugepaged: false, or its settings")
    prealloc: Literal["none", "populate", "pre_fault", "populate+pre_fault"] = Field(
        "none", description="what the VMM does before the guest starts"
    )
    prealloc_threads: Count = Field(1, description="VMM threads that populate")
    workload: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")] = Field("read_then_write", description="name of the workload")
    costs: Annotated[str, Field(min_length=1, max_length=200)] = Field("default", description="cost file, or NAME@parameter=low|high")
    cores: Count | None = Field(None, description="host cores that the vCPU threads share; as many as vcpus if not given")
    pml: Annotated[bool, Field(strict=True)] = Field(False, description="dirty logging by page-modification log (Intel)")
    ksm: Ksm = Field(False, description="KSM's daemon: false, or its settings")
    smt: Annotated[int, Field(strict=True, ge=1, le=MAX_SMT)] = Field(1, description="hardware threads of a core; 2 needs cores")

    @model_validator(mode="after")
    def _fits(self) -> "Point":
        if faults := self.faults():
            raise ValueError("; ".join(faults))
        return self

    def faults(self) -> list[str]:
        """Why there is no such combination; empty if there is. For points that were made without validation."""
        return [text for check in CHECKS if (text := check(self))]

    @property
    def preallocates(self) -> Prealloc:
        """`prealloc` as the kernels' bits."""
        return Prealloc[self.prealloc.upper().replace("+", "_")]

    def values(self) -> dict[str, Any]:
        """Every parameter as a plain value, defaults filled in."""
        return self.model_dump() | {"cores": self.vcpus if self.cores is None else self.cores}

    def canonical(self) -> dict[str, Any]:
        """What a point's identity is made of: every parameter, but those that came later only where they differ from their
        default, so that older points keep their identity."""
        return {name: value for name, value in self.values().items() if name not in CAME_LATER or value != CAME_LATER[name]}

    def columns(self) -> dict[str, Any]:
        """Every parameter under the name of the result's column."""
        return {COLUMN_OF.get(name, name): column_value(name, value) for name, value in self.values().items()}


def column_value(name: str, value: Any) -> Any:
    """A parameter's value as it stands in a result: settings of a daemon are one text."""
    if name not in DAEMONS:
        return value
    return ",".join(f"{key}={value[key]}" for key in DAEMONS[name].model_fields) if value else "false"


CAME_LATER: Mapping[str, Any] = {"pml": False, "ksm": False, "smt": 1}
COLUMN_OF: Mapping[str, str] = {"memory": "memory_bytes", "offset": "offset_bytes", "guest_page": "guest_page_bytes"}
PARAMETERS: tuple[str, ...] = tuple(Point.model_fields)


def _literals(annotation: Any) -> frozenset[str]:
    """The strings that an annotation with a Literal in it allows; empty where there is none."""
    if get_origin(annotation) is Literal:
        return frozenset(value for value in get_args(annotation) if isinstance(value, str))
    return frozenset().union(*(_literals(part) for part in get_args(annotation)))


ALLOWED_VALUES: Mapping[str, frozenset[str]] = {
    name: allowed for name, info in Point.model_fields.items() if (allowed := _literals(info.annotation))
}


def _check_hugetlb(p: Point) -> str:
    if "hugetlb" not in p.backing:
        return ""
    page = PUD_BYTES if p.backing.endswith("1gb") else PMD_BYTES
    if p.memory % page and not p.offset:
        return f"memory = {format_size(p.memory)} is no multiple of backing {p.backing}'s page, {format_size(page)}"
    return ""


def _check_mmu(p: Point) -> str:
    if p.policy == "change_pte_prefetch" and p.mmu != "tdp":
        return f"policy {p.policy!r} is a change to the TDP MMU: mmu = {p.mmu!r} does not have it"
    if p.mmu == "shadow" and p.preallocates & Prealloc.PRE_FAULT:
        return f"prealloc = {p.prealloc!r}: KVM_PRE_FAULT_MEMORY needs EPT or NPT, not mmu = 'shadow'"
    return ""


def _check_policy(p: Point) -> str:
    try:
        behaviours(p.kernel, p.policy)
    except PolicyError as error:
        return str(error)
    return ""


def _check_pre_fault(p: Point) -> str:
    wants = p.preallocates & Prealloc.PRE_FAULT
    if wants and not behaviours(p.kernel)[Behaviour.PRE_FAULT_MEMORY]:
        return f"prealloc = {p.prealloc!r}: kernel {p.kernel} has no KVM_PRE_FAULT_MEMORY; 6.11 is the first that has it"
    return ""


def _check_huge_zero(p: Point) -> str:
    if p.policy in ("huge_zero_thp", "huge_zero_split") and not p.use_zero_page:
        return f"policy {p.policy!r} says what a write to the huge zero page does, and use_zero_page = false switches that page off"
    return ""


def _check_smt(p: Point) -> str:
    return smt_fault(p.cores, p.smt)


CHECKS = (_check_hugetlb, _check_mmu, _check_policy, _check_pre_fault, _check_huge_zero, _check_smt)


def policy_fits(policy: str, kernel: str, mmu: str = "tdp") -> bool:
    """Whether a kernel and an MMU can have a proposal. Raises UnknownKernelError."""
    return not Point.model_construct(policy=policy, kernel=kernel, mmu=mmu).faults()
