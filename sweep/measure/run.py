"""Measuring this machine: probes, their samples, the cost file, and what is told about it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd

from kernels.cost import Cost
from kernels.spec import PMD_BYTES
from sweep.configs import CostFile, load_costs
from sweep.cost_text import cost_toml
from sweep.dataset.files import publish
from sweep.errors import EnvironmentProblemError, UsageError
from sweep.machine import available_bytes
from sweep.measure.costs import Derivation, cost_file
from sweep.measure.figures import Figure, Quantity
from sweep.measure.loops import compile_loops
from sweep.measure.machine import cpus, description, pinned
from sweep.measure.memory import memory_probes
from sweep.measure.processes import process_probes
from sweep.measure.sampling import Probe, Sample, sampled
from sweep.measure.threads import thread_probes
from sweep.provenance import package_versions
from sweep.quantity import format_size, human_size, parse_size

MAX_SECONDS = 3600.0
PARTS = 8  # of the memory that may be used: one is a region, of which a probe has three at most
MIN_MEMORY, MAX_MEMORY = PARTS * PMD_BYTES, 1 << 40
NO_COSTS = (Quantity.USER_FAULT, Quantity.COPY_FAULT)  # timed for comparison
METHOD = "medians of runs in fresh mappings of {}, kinds in turns; a run with other faults than meant is discarded; CPU time of a thread {}"
SPREAD = "a range is the quartiles of the runs; of a sum, the roots of the parts' squares"


@dataclass(frozen=True)
class MeasureOptions:
    """How much may be used, and where the result goes."""

    out: Path | None = None
    costs: str = "default"
    note: str = ""
    seconds: float = 60.0
    memory: str = "512MiB"
    say: Callable[[str], None] = lambda _: None

    def region_bytes(self) -> int:
        """Of one probe's region: a multiple of 2 MiB. Raises UsageError."""
        try:
            size = parse_size(self.memory)
        except ValueError as error:
            raise UsageError(f"--memory {self.memory[:40]!r}: {error}") from None
        most = min(MAX_MEMORY, available_bytes())
        if not MIN_MEMORY <= size <= most:
            raise UsageError(f"--memory {self.memory}: {human_size(MIN_MEMORY)} ... {human_size(most)} (what is free) is needed")
        return size // PARTS // PMD_BYTES * PMD_BYTES


@dataclass(frozen=True)
class Measurement:
    """A measured cost file with all that is told about it."""

    options: MeasureOptions
    derivation: Derivation
    file: CostFile

    def cost_table(self) -> pd.DataFrame:
        """Every cost: value, range and how it was had; without runs it is the default."""
        table = []
        for cost, outcome in self.derivation.outcomes().items():
            low, high = self.file.ranges[cost]
            entry = {"cost": cost.name.lower(), "value": self.file.values[cost], "spread": f"{low} ... {high}", "runs": outcome.runs}
            table.append(entry | {"default": self.derivation.base.values[cost], "method": self.file.texts[cost]["method"]})
        return pd.DataFrame(table)

    def as_text(self) -> str:
        frame = self.cost_table()
        width = max(map(len, frame["method"]))
        parts = [frame.to_string(index=False, formatters={"method": f"{{:<{width}}}".format}), ""]
        parts += [f"{quantity.value}: {_words(self._sample(quantity))}" for quantity in NO_COSTS]
        if self.options.out is not None:
            parts += ["", f"wrote {self.options.out}"]
        return "\n".join(line.rstrip() for line in "\n".join(parts).splitlines())

    def as_json(self) -> dict[str, Any]:
        return {
            "about": dict(self.file.about),
            "costs": self.cost_table().to_dict("records"),
            "quantities": [
                {
                    "quantity": quantity.name.lower(),
                    "what": quantity.value,
                    "runs": len(sample.runs),
                    **dict(zip(Figure._fields, sample.figure() or (None, None, None), strict=True)),
                    "discarded": dict(sample.discarded),
                    "unavailable": sample.unavailable,
                }
                for quantity, sample in self.derivation.samples.items()
            ],
            "out": None if self.options.out is None else str(self.options.out),
        }

    def _sample(self, quantity: Quantity) -> Sample:
        return self.derivation.samples[quantity]


def _words(sample: Sample) -> str:
    figure = sample.figure()
    if figure is None:
        return f"not measured: {sample.reason()}"
    return f"{figure.value:.0f} ns ({figure.low:.0f} ... {figure.high:.0f}), {len(sample.runs)} runs"


def all_probes(size: int, allowed: Sequence[int]) -> list[Probe]:
    """Every probe of this package, with regions of `size` bytes and threads on the allowed CPUs."""
    return [*memory_probes(size), *thread_probes(allowed), *process_probes(size)]


def measure(options: MeasureOptions) -> Measurement:
    """Measure, and write the cost file if a place for it is given. Raises UsageError, StudyError, EnvironmentProblemError."""
    if not (math.isfinite(options.seconds) and 1 <= options.seconds <= MAX_SECONDS):
        raise UsageError(f"--seconds {options.seconds}: 1 ... {MAX_SECONDS:.0f} is needed")
    size, base, allowed = options.region_bytes(), load_costs(options.costs, Path()), cpus()
    options.say(f"measuring this machine: at most {options.seconds:.0f} s and {options.memory}")
    end = time.monotonic() + options.seconds
    with pinned(allowed[0]) as alone:
        compile_loops()
        samples = sampled(all_probes(size, allowed), time.monotonic, end - time.monotonic())
    return measurement(options, Derivation(base, samples), alone)


def measurement(options: MeasureOptions, derivation: Derivation, alone: bool) -> Measurement:
    """The cost file of what was sampled, written. Raises EnvironmentProblemError if nothing was."""
    outcomes = derivation.outcomes()
    if not any(outcome.figure for outcome in outcomes.values()):
        raise EnvironmentProblemError(f"nothing could be measured here: {outcomes[Cost.ZERO_MAP_NS].how}; give more --seconds")
    where = "on one CPU" if alone else "on any CPU, since none may be chosen"
    about = {
        "machine": description(),
        "method": f"{METHOD.format(format_size(options.region_bytes()), where)}; {SPREAD}",
        "date": date.today().isoformat(),
        "source": f"faultsweep {package_versions().get('faultsweep', '')} calibrate",
        "minor_fault": f"{Quantity.USER_FAULT.value}: {_words(derivation.samples[Quantity.USER_FAULT])}; no cost of the model",
    }
    if options.note:
        about["note"] = options.note
    name = options.out.stem if options.out is not None else derivation.base.name
    file = cost_file(name, derivation, about)
    if options.out is not None:
        publish(options.out, cost_toml(file).encode())
    return Measurement(options, derivation, file)
