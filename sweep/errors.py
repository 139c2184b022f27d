"""What can go wrong, each with the exit status the command ends with (contract: 2 usage, 3 dataset, 4 budget, 5 environment)."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_SHOWN_FAULTS = 40


class FaultsweepError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_status = 2


def printable(text: str, limit: int) -> str:
    """Text from a file on one line of a terminal: control characters escaped, cut in the middle if it is long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} ... {shown[-limit // 2 + 5 :]}"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a file: where, which field, what and what to do."""

    where: str  # 'file:line', or 'file' where no line is known
    field: str
    text: str

    def __str__(self) -> str:
        parts = (printable(self.where, 300), printable(self.field, 80), printable(self.text, 420))
        return ": ".join(part for part in parts if part)


class StudyError(FaultsweepError):
    """A study, workload or cost file cannot be used: every fault of it, one line each."""

    exit_status = 2

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(dict.fromkeys(faults))
        lines = [str(fault) for fault in self.faults[:MAX_SHOWN_FAULTS]]
        if len(self.faults) > MAX_SHOWN_FAULTS:
            lines.append(f"... and {len(self.faults) - MAX_SHOWN_FAULTS} more")
        super().__init__("\n".join(lines))


class TraceError(FaultsweepError):
    """A recorded trace cannot be read, or does not say what it must: 'file:line: what, and what to do'."""

    exit_status = 2

    def __init__(self, where: str, text: str) -> None:
        super().__init__(str(Fault(where, "", text)))


class UsageError(FaultsweepError):
    """A command or a call was given something it cannot take."""

    exit_status = 2


class DatasetError(FaultsweepError):
    """The dataset belongs to another study or model, or is damaged."""

    exit_status = 3


class MissingFileError(DatasetError):
    """A file of the dataset is not there."""


class NondeterminismError(DatasetError):
    """The same points gave different rows: no result of this dataset can be trusted until it is known why."""


class BudgetExceededError(FaultsweepError):
    """More work than the stated budget; `--yes` goes on."""

    exit_status = 4


class EnvironmentProblemError(FaultsweepError):
    """The machine or the cluster cannot do it: unreachable, full, forbidden."""

    exit_status = 5


class InterruptedRunError(BaseException):  # no Exception: nothing on the way up may take it for a failed point
    """Stopped by a signal; what is done is committed."""

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.exit_status = 128 + signal_number
