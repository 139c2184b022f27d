"""Whose error codes they are, and so what they say: from the values, the exit reasons, the host's vendor line, or --vendor.

kvm_page_fault reports the raw exit qualification on Intel with EPT (arch/x86/kvm/vmx/vmx.c, handle_ept_violation()), the error code
of the nested page fault on AMD (svm/svm.c, npf_interception()), and that of the guest's own page fault with shadow paging on either
(mmu/mmu.c, kvm_handle_page_fault()), whose address is then a guest virtual one. The older event, which has no vCPU, cut it to 32 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from sweep.errors import TraceError, UsageError
from sweep.replay.parse import Trace
from sweep.replay.text import Layout


class Encoding(IntEnum):
    """How read, write, fetch and present are written in a code."""

    QUALIFICATION = 0  # bit 0 read, 1 write, 2 fetch; 3-5 what the entry allows, none: not present
    PFERR = 1  # bit 0 present, 1 write, 3 reserved bit (an MMIO entry), 4 fetch
    PLAIN = 2  # scan.READ, WRITE, FETCH, with PRESENT or ABSENT where a column says so


class Vendor(StrEnum):
    """Who made the codes."""

    INTEL = "intel"
    AMD = "amd"
    SHADOW = "shadow"
    NONE = "none"  # no codes: a table of accesses


ENCODING: Mapping[Vendor, Encoding] = {
    Vendor.INTEL: Encoding.QUALIFICATION,
    Vendor.AMD: Encoding.PFERR,
    Vendor.SHADOW: Encoding.PFERR,
    Vendor.NONE: Encoding.PLAIN,
}
VENDOR_LINES: Mapping[str, Vendor] = {"GenuineIntel": Vendor.INTEL, "AuthenticAMD": Vendor.AMD, "HygonGenuine": Vendor.AMD}
WORDS: Mapping[Vendor, str] = {
    Vendor.INTEL: "an exit qualification (bit 7), which Intel's EPT gives",
    Vendor.AMD: "an error code of AMD's nested paging (bits 32 to 36)",
}


@dataclass(frozen=True)
class Decision:
    """Whose codes, why that is thought, and whether it is a guess."""

    vendor: Vendor
    why: str
    guess: bool = False

    @property
    def encoding(self) -> Encoding:
        return ENCODING[self.vendor]


def decide(trace: Trace, asked: str | None) -> Decision:
    """Raises TraceError where the values contradict one another, the vendor line or --vendor; UsageError."""
    if trace.format.layout in (None, Layout.CSV):
        if asked is not None:
            raise UsageError(f"--vendor {asked}: {trace.name} has accesses, no error codes; leave it out")
        return Decision(Vendor.NONE, "accesses, no error codes")
    found, evidence = _by_values(trace), trace.evidence
    if asked is not None:
        _check_asked(trace, Vendor(asked), found)
        return Decision(Vendor(asked), "as --vendor says")
    said = VENDOR_LINES.get(trace.vendor_line)
    if found is not None:
        if said not in (None, found):
            where = f"{trace.name}:{evidence.ept_line if found is Vendor.INTEL else evidence.npt_line}"
            raise TraceError(where, f"the error code is {WORDS[found]}, and the vendor line says {trace.vendor_line}; --vendor decides")
        return Decision(found, f"{evidence.ept or evidence.npt} error codes are {WORDS[found]}")
    return _by_others(trace, said)


def _by_values(trace: Trace) -> Vendor | None:
    """What bits say that only one kind of code has; None: there are none."""
    evidence = trace.evidence
    if evidence.ept and evidence.npt:
        first, second = sorted(((evidence.ept_line, Vendor.INTEL), (evidence.npt_line, Vendor.AMD)))
        text = (
            f"the error code is {WORDS[second[1]]}, and line {first[0]} has {WORDS[first[1]]}: traces of two hosts in one file; part them"
        )
        raise TraceError(f"{trace.name}:{second[0]}", text)
    return Vendor.INTEL if evidence.ept else Vendor.AMD if evidence.npt else None


def _check_asked(trace: Trace, asked: Vendor, found: Vendor | None) -> None:
    evidence = trace.evidence
    if found not in (None, asked):
        line = evidence.ept_line if found is Vendor.INTEL else evidence.npt_line
        raise TraceError(
            f"{trace.name}:{line}", f"the error code is {WORDS[found]}: --vendor {asked} is wrong; leave it out, or say {found}"
        )
    if asked is Vendor.INTEL and found is None and evidence.low and not evidence.ept_exits:
        text = "no error code has bit 7, which an exit qualification of an access has: --vendor intel is wrong; say amd or shadow"
        raise TraceError(f"{trace.name}:{evidence.low_line}", text)


def _by_others(trace: Trace, said: Vendor | None) -> Decision:
    """Codes without bit 7 and bits 32 to 36: shadow paging, or nested paging of an old kernel, which cut them."""
    evidence = trace.evidence
    if evidence.ept_exits:
        return Decision(Vendor.INTEL, f"{evidence.ept_exits} exits for EPT violations")
    if not evidence.old:
        return Decision(Vendor.SHADOW, "error codes of page faults, without bits 32 and 33, one of which nested paging sets")
    if evidence.npf_exits:
        return Decision(Vendor.AMD, f"{evidence.npf_exits} exits for nested page faults (npf)")
    if evidence.kernel:
        return Decision(Vendor.SHADOW, f"{evidence.kernel} error codes without the user bit, which nested paging always sets")
    if evidence.exception_exits or said is Vendor.INTEL:
        return Decision(Vendor.SHADOW, "error codes of page faults, and no exit for nested paging")
    return Decision(
        Vendor.AMD, "error codes of page faults, as an old kernel cuts them; with shadow paging say --vendor shadow", guess=True
    )
