"""From a study to its points: counted without expanding, made one by one, each with an id from its content."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from sweep.configs import Workload
from sweep.errors import Fault, StudyError
from sweep.parameters import Point
from sweep.predict import predict_seconds
from sweep.study import Study, kept_points

MAX_POINTS = 10_000_000
BYTES_PER_POINT = 200


@dataclass(frozen=True)
class PlannedPoint:
    """One point: its identity and all that is needed to run it."""

    point_id: str  # 32 hex digits
    point: Point
    replicate: int
    seed: int


def point_id(point: Point, workload: Workload, seed: int, replicate: int) -> str:
    """BLAKE2b-128 (hex) over the canonical parameters, the workload's content, seed and replicate."""
    identity = {"parameters": point.canonical(), "workload": _workload_digest(workload), "seed": seed, "replicate": replicate}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_DIGESTS: dict[int, tuple[Workload, str]] = {}


def _workload_digest(workload: Workload) -> str:
    """Digest of a workload, computed once per object (touch lists may be large)."""
    if id(workload) not in _DIGESTS:
        _DIGESTS[id(workload)] = (workload, workload.digest())
    return _DIGESTS[id(workload)][1]


class Plan:
    """The points of a study, in order: blocks, axes (the last moves fastest), replicates. Raises StudyError."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.upper = sum(block.size() for block in study.blocks) * study.replicates
        if self.upper > MAX_POINTS:
            raise StudyError(
                [Fault(study.where("block", 0), "block", f"{self.upper:,} points; at most {MAX_POINTS:,} are taken; split the study")]
            )
        self._points: list[PlannedPoint] | None = None

    def points(self) -> list[PlannedPoint]:
        """All points, once each; made on first use. Raises StudyError for combinations that make no sense."""
        if self._points is None:
            self._points = list(self._unique())
            if not self._points:
                raise StudyError([Fault(self.study.where("block", 0, "where"), "where", "keeps no point; loosen it")])
        return self._points

    def _unique(self) -> Iterator[PlannedPoint]:
        seen: set[str] = set()
        for block in self.study.blocks:
            for point in kept_points(block):
                workload = self.study.workloads[point.workload]
                for replicate in range(self.study.replicates):
                    identity = point_id(point, workload, self.study.seed, replicate)
                    if identity not in seen:
                        seen.add(identity)
                        yield PlannedPoint(identity, point, replicate, self.study.seed)


def chunks_of(points: list[PlannedPoint], study: Study, seconds: float) -> Iterator[list[PlannedPoint]]:
    """Consecutive points in groups of about `seconds` each: what one worker call runs and one commit publishes."""
    rest = iter(points)
    while head := next(rest, None):
        chunk, total = [head], predict_seconds(head.point, study.workloads[head.point.workload])
        for planned in rest:
            chunk.append(planned)
            total += predict_seconds(planned.point, study.workloads[planned.point.workload])
            if total >= seconds or len(chunk) >= 4096:
                break
        yield chunk
