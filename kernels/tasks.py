"""What compiled code is given to run: the steps of a configuration, and what chance decides in each of its points."""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from kernels.spec import Stream
from kernels.state import Int64s


class Loop(IntEnum):
    """How a step is run."""

    MANY = 0  # event by event
    ALONE = 1  # a lone actor
    CALL = 2  # a system call of the VMM


class Task(IntEnum):
    """Index of a row of Tasks.rows: a step, besides its accesses."""

    LOOP = 0
    NUMBER = 1  # among the workload's steps; -1: preallocation
    GUEST = 2  # its time is the guest's
    BUDGET = 3  # events
    MOST_NS = 4  # it ends before that


class Chance(IntEnum):
    """Index of a row of Chances.rows: a point."""

    SEED = 0  # the bits of an unsigned number
    REPLICATE = 1
    THP_FAILURE_CUT = 2  # see draws.cut()


class Tasks(NamedTuple):
    """The steps, in order."""

    rows: Int64s  # (steps there is room for, len(Task))
    streams: Int64s  # (the same, len(Stream)), all but the key
    steps: Int64s  # (1,) how many there are


class Chances(NamedTuple):
    """The points."""

    rows: Int64s  # (points there is room for, len(Chance))


def new_tasks(steps: int) -> Tasks:
    return Tasks(np.zeros((steps, len(Task)), np.int64), np.zeros((steps, len(Stream)), np.int64), np.zeros(1, np.int64))


def new_chances(points: int) -> Chances:
    return Chances(np.zeros((points, len(Chance)), np.int64))
