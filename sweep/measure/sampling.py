"""Runs of probes, taken in turns until each has enough of them or the time is up."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sweep.measure.figures import Figure, Quantity, figure_of

MIN_RUNS = 7  # fewer give no figure
RUNS = 31  # after so many a probe is done
MAX_TRIES = 8 * RUNS  # discarded runs included


class DiscardedRunError(Exception):
    """The run did not do what it was meant to do: its time means nothing."""


class UnavailableError(Exception):
    """This machine cannot do it, however often it is tried."""


@dataclass(frozen=True)
class Probe:
    """One run in fresh mappings: ns of each of its quantities. `run` raises DiscardedRunError or UnavailableError."""

    quantities: tuple[Quantity, ...]
    run: Callable[[], Mapping[Quantity, float]]


@dataclass
class Sample:
    """What the runs gave for one quantity: ns of each, and why the others give none."""

    runs: list[float] = field(default_factory=list)
    discarded: Counter[str] = field(default_factory=Counter)
    unavailable: str = ""

    def figure(self) -> Figure | None:
        return figure_of(self.runs) if len(self.runs) >= MIN_RUNS else None

    def reason(self) -> str:
        """Why there is no figure."""
        if self.unavailable:
            return self.unavailable
        tries = len(self.runs) + self.discarded.total()
        if not self.discarded:
            return f"{len(self.runs)} of {MIN_RUNS} runs in the time there was"
        return f"{self.discarded.total()} of {tries} runs discarded: {self.discarded.most_common(1)[0][0]}"


def _take(probe: Probe, samples: Mapping[Quantity, Sample]) -> bool:
    """One run; True if another one is wanted."""
    mine = [samples[quantity] for quantity in probe.quantities]
    try:
        found = probe.run()
    except DiscardedRunError as error:
        for sample in mine:
            sample.discarded[str(error)] += 1
    except UnavailableError as error:
        for sample in mine:
            sample.unavailable = str(error)
        return False
    else:
        for quantity in probe.quantities:
            samples[quantity].runs.append(found[quantity])
    return len(mine[0].runs) < RUNS and len(mine[0].runs) + mine[0].discarded.total() < MAX_TRIES


def sampled(probes: Sequence[Probe], clock: Callable[[], float], seconds: float) -> dict[Quantity, Sample]:
    """Samples of every quantity of the probes. A run is begun while `clock` has not gone `seconds` on; kinds alternate."""
    samples = {quantity: Sample() for probe in probes for quantity in probe.quantities}
    end = clock() + seconds
    left = list(probes)
    while left:
        wanted = []
        for probe in left:
            if clock() >= end:
                return samples
            if _take(probe, samples):
                wanted.append(probe)
        left = wanted
    return samples
