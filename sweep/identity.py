"""Who a point is: a digest of its canonical parameters, its workload's content, seed and replicate.

What is hashed is canonical JSON of `parameters`, `replicate`, `seed`, `workload`, in this order. Of the points of a block it differs
in the values of the axes only, so that the text of each value is made once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.kept import Kept
from sweep.blocks import Block, Source
from sweep.parameters import CAME_LATER, PARAMETERS

_SORTED = sorted(PARAMETERS)
FIXED = -1  # behind the digits of the axes


def _pair(name: str, value: Any) -> str:
    """Name and value as JSON; nothing for a parameter that came later, with its default (Point.canonical())."""
    if name in CAME_LATER and value == CAME_LATER[name]:
        return ""
    comma = "" if name == _SORTED[0] else ","
    return f'{comma}"{name}":{json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)}'


def _texts(sources: Sequence[tuple[str, Source]]) -> Kept[int, bytes]:
    """Text of some parameters by the digit of the axis that moves them."""
    return Kept(lambda digit: "".join([_pair(name, source.value(digit)) for name, source in sources]).encode())


class Identities:
    """The identities of a block's points."""

    def __init__(self, block: Block, workload_digests: Mapping[str, str], seed: int) -> None:
        sources = [(name, block.source(name)) for name in _SORTED]
        moved = [(position, list(group)) for position, group in groupby(sources, key=lambda each: each[1].position)]
        parameters = [(FIXED if position is None else position, _texts(group)) for position, group in moved]
        self._parameters = [(FIXED, Kept(lambda _: b'{"parameters":{')), *parameters, (FIXED, Kept(lambda _: b'},"replicate":'))]
        workload = block.source("workload")
        self._workload = FIXED if workload.position is None else workload.position
        names = [workload.value(digit) for digit in range(len(workload.rows))]
        self._ends = [f',"seed":{seed},"workload":"{workload_digests[name]}"}}'.encode() for name in names]

    def of(self, digits: NDArray[np.int64], replicates: NDArray[np.int64]) -> list[str]:
        """BLAKE2b-128 of points, 32 hex digits each: their digits, shape (axes, points), and replicates."""
        found, last = [], None
        begun, end = hashlib.blake2b(), b""
        rows = np.vstack([digits, np.zeros((1, len(replicates)), np.int64)]).T.tolist()
        for row, replicate in zip(rows, replicates.tolist(), strict=True):
            if row != last:  # replicates of one configuration stand together
                begun = hashlib.blake2b(b"".join([texts[row[position]] for position, texts in self._parameters]), digest_size=16)
                last, end = row, self._ends[row[self._workload]]
            whole = begun.copy()
            whole.update(b"%d%b" % (replicate, end))
            found.append(whole.hexdigest())
        return found
