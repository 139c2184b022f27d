"""Costs of the model as sums of what was timed: which of them this machine told, and the cost file with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import NamedTuple

from kernels.cost import MAX_COST_NS, Cost
from kernels.spec import PMD_PAGES
from sweep.configs import CostFile
from sweep.measure.figures import Figure, Quantity, combined
from sweep.measure.sampling import Sample


class Term(NamedTuple):
    """A part of a sum: what was timed, or another cost of the same file."""

    weight: float
    of: Quantity | Cost


Recipe = tuple[Term, ...]


def recipe(timed: Quantity, *less: Cost, weight: float = 1, plus: tuple[Cost, ...] = ()) -> Recipe:
    return (Term(weight, timed), *(Term(-1, cost) for cost in less), *(Term(1, cost) for cost in plus))


# Of several recipes the first counts of which everything was timed. Clearing and copying are costs of their own and taken off.
RECIPES: Mapping[Cost, tuple[Recipe, ...]] = {
    Cost.TOUCH_NS: (recipe(Quantity.GUEST_TOUCH),),
    Cost.VM_EXIT_NS: (recipe(Quantity.GUEST_EXIT),),
    Cost.KVM_FAULT_NS: (recipe(Quantity.GUEST_FAULT, Cost.VM_EXIT_NS, Cost.GUP_FAST_NS, Cost.MMU_LOCK_READ_NS),),
    Cost.GUP_SLOW_NS: (recipe(Quantity.WALK),),
    Cost.ZERO_MAP_NS: (recipe(Quantity.ZERO_FAULT),),
    Cost.HUGE_ZERO_MAP_NS: (recipe(Quantity.HUGE_ZERO_FAULT),),
    Cost.ANON_FAULT_NS: (recipe(Quantity.ANON_FAULT, Cost.CLEAR_4K_NS),),
    Cost.SHMEM_FAULT_NS: (recipe(Quantity.SHMEM_FAULT, Cost.CLEAR_4K_NS),),
    Cost.HUGETLB_FAULT_NS: (recipe(Quantity.HUGETLB_FAULT, Cost.CLEAR_2M_NS),),
    Cost.REUSE_NS: (recipe(Quantity.REUSE_FAULT),),
    Cost.COW_4K_NS: (recipe(Quantity.COW_FAULT, Cost.CLEAR_4K_NS),),
    Cost.SPLIT_PMD_NS: (recipe(Quantity.SPLIT),),
    Cost.HUGE_ZERO_THP_NS: (recipe(Quantity.HUGE_ZERO_WRITE, plus=(Cost.THP_FAULT_NS,)),),
    Cost.CLEAR_4K_NS: (recipe(Quantity.CLEAR),),
    Cost.CLEAR_2M_NS: (recipe(Quantity.THP_FAULT, Cost.THP_FAULT_NS), recipe(Quantity.CLEAR, weight=PMD_PAGES)),
    Cost.COPY_4K_NS: (recipe(Quantity.COPY),),
    Cost.COPY_2M_NS: (recipe(Quantity.COPY, weight=PMD_PAGES),),
    Cost.TLB_FLUSH_NS: (recipe(Quantity.FIRST_TARGET),),
    Cost.TLB_FLUSH_TARGET_NS: (recipe(Quantity.MORE_TARGETS),),
    Cost.FILE_MAP_NS: (recipe(Quantity.FILE_FAULT),),
    Cost.FORK_NS: (recipe(Quantity.FORK),),
    Cost.FORK_PTE_NS: (recipe(Quantity.FORK_ENTRY),),
    Cost.MADVISE_NS: (recipe(Quantity.EMPTY_ADVICE),),
    Cost.ZAP_PTE_NS: (recipe(Quantity.ZAP),),
    Cost.COLLAPSE_NS: ((Term(1, Quantity.COLLAPSE), Term(-PMD_PAGES, Cost.COPY_4K_NS), Term(-PMD_PAGES, Cost.SCAN_PTE_NS)),),
    Cost.LINE_NS: (recipe(Quantity.LINE_OF_TWO, Cost.LINE_CPU_NS),),
    Cost.LINE_CPU_NS: (recipe(Quantity.LINE_GROWTH),),
}

_INSIDE = "it is spent inside of other work, and nothing shows it alone"
_NO_GUEST = "no guest with that state is run"
UNTOLD: Mapping[Cost, str] = {
    Cost.GUP_FAST_NS: _INSIDE,
    Cost.THP_FAULT_NS: "it cannot be told from clearing; their sum was measured, see clear_2m_ns",
    Cost.NOTIFIER_NS: _INSIDE,
    Cost.MMU_LOCK_WRITE_NS: _INSIDE,
    Cost.MMU_LOCK_READ_NS: _INSIDE,
    Cost.TLB_VICTIM_NS: "no guest of several vCPUs is run",
    Cost.SCAN_PTE_NS: _INSIDE,
    Cost.KSM_MERGE_NS: "KSM is a setting of the whole machine",
    Cost.DIRTY_LOG_NS: _NO_GUEST,
    Cost.WRITE_PROTECT_NS: _NO_GUEST,
    Cost.SPLIT_SPTE_NS: _NO_GUEST,
    Cost.PML_FULL_NS: _NO_GUEST,
    Cost.MEMORY_2M_NS: "it takes all CPUs of the host, and memory that its caches do not hold",
    Cost.ZONE_LOCK_NS: _INSIDE,
    Cost.TIME_SLICE_NS: "it is a setting of the scheduler",
    Cost.CONTEXT_SWITCH_NS: "no vCPU is preempted",
    Cost.SMT_NS: "no core is shared on purpose",
    Cost.LEGACY_FAULT_NS: _INSIDE,
}


class Outcome(NamedTuple):
    """What became of one cost: its figure, of how many runs at least, and how it was had; no figure: why not."""

    figure: Figure | None
    runs: int
    how: str


@dataclass(frozen=True)
class Derivation:
    """Costs from samples; what is not told keeps the value and range of `base`."""

    base: CostFile
    samples: Mapping[Quantity, Sample]

    def outcome(self, cost: Cost) -> Outcome:
        """By the first recipe whose sum is there and above 0."""
        if cost in UNTOLD:
            return Outcome(None, 0, UNTOLD[cost])
        tried = [self._try(cost, terms) for terms in RECIPES[cost]]
        return next((outcome for outcome in tried if outcome.figure), tried[0])

    def _try(self, cost: Cost, terms: Recipe) -> Outcome:
        timed = [term.of for term in terms if isinstance(term.of, Quantity)]
        missing = next((self.samples[quantity] for quantity in timed if self.samples[quantity].figure() is None), None)
        if missing is not None:
            return Outcome(None, 0, missing.reason())
        figure = combined(self._atoms(terms).values())
        words = [self._words(term) for term in terms]
        if round(figure.value) < 1:
            sum_of = f"{figure.value:.0f} ns ({figure.low:.0f} ... {figure.high:.0f})"
            if not 1 <= figure.high < self.kept(cost).low:
                return Outcome(None, 0, f"its parts make {sum_of}, which is no time")
            words.append(f"{sum_of}, too little to tell, but less than the {self.base.name} range")
            figure = figure._replace(value=1.0)
        runs = min(len(self.samples[quantity].runs) for quantity in timed)
        return Outcome(figure, runs, f"median of {runs} runs: {'; '.join(words)}")

    def _atoms(self, terms: Recipe) -> dict[Quantity | Cost, tuple[float, Figure]]:
        """The sum written out in what was timed and what was kept, each once: (weight, figure)."""
        found: dict[Quantity | Cost, tuple[float, Figure]] = {}
        for weight, part in terms:
            for atom, (inner, figure) in self._parts(part).items():
                found[atom] = (weight * inner + found.get(atom, (0.0, figure))[0], figure)
        return found

    def _parts(self, part: Quantity | Cost) -> dict[Quantity | Cost, tuple[float, Figure]]:
        if isinstance(part, Quantity):
            figure = self.samples[part].figure()
            assert figure is not None
            return {part: (1.0, figure)}
        if self.outcome(part).figure is None:
            return {part: (1.0, self.kept(part))}
        return self._atoms(next(terms for terms in RECIPES[part] if self._try(part, terms).figure))

    def kept(self, cost: Cost) -> Figure:
        """Value and range of the file that the measurement starts from."""
        value, (low, high) = self.base.values[cost], self.base.ranges[cost]
        return Figure(value, min(low, value), max(high, value))

    def _words(self, term: Term) -> str:
        if isinstance(term.of, Quantity):
            return term.of.value if term.weight == 1 else f"{term.weight:.0f} x {term.of.value}"
        sign = "less" if term.weight < 0 else "plus"
        factor = "" if abs(term.weight) == 1 else f"{abs(term.weight):.0f} x "
        known = "" if self.outcome(term.of).figure else f" = {self.base.values[term.of]} ({self.base.name})"
        return f"{sign} {factor}{term.of.name.lower()}{known}"

    def outcomes(self) -> dict[Cost, Outcome]:
        return {cost: self.outcome(cost) for cost in Cost}


def whole(figure: Figure) -> tuple[int, int, int]:
    """(value, low, high) in whole ns, the range rounded outward and not below 0."""
    value = min(round(figure.value), MAX_COST_NS)
    return value, min(max(floor(figure.low), 0), value), min(max(ceil(figure.high), value), MAX_COST_NS)


def cost_file(name: str, derivation: Derivation, about: Mapping[str, str]) -> CostFile:
    """The base file with what was measured in it; every cost says which it is."""
    base = derivation.base
    values, ranges, texts = dict(base.values), dict(base.ranges), {}
    for cost, outcome in derivation.outcomes().items():
        if outcome.figure is None:
            texts[cost] = {"unit": "ns", **base.texts.get(cost, {}), "method": f"{base.name}, not measured: {outcome.how}"}
            continue
        values[cost], *spread = whole(outcome.figure)
        ranges[cost] = spread[0], spread[1]
        origin = {key: about[key] for key in ("machine", "date", "source")}
        texts[cost] = {"unit": "ns", "basis": "measured", "method": outcome.how, **origin}
    return CostFile(name, values, ranges, (), about, texts)
