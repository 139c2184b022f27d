"""`merge`: datasets of one study, made on several machines, become one. What they have in common must agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sweep.dataset.read import Dataset
from sweep.dataset.records import Commit, PartRecord
from sweep.dataset.repair import repair
from sweep.dataset.seal import seal
from sweep.dataset.store import Store, chunk_key
from sweep.errors import DatasetError, UsageError
from sweep.left import done_now, kept_of
from sweep.ownership import check_same_study, write_study
from sweep.plan import Plan
from sweep.record import read_study
from sweep.study import Study, study_digest


@dataclass(frozen=True)
class Merged:
    """What a merge made."""

    out: Path | str
    points: int
    left: int
    sealed: dict[str, Any] | None


def merge(places: Sequence[Path | str], out: Path | str) -> Merged:
    """Join datasets into `out`, which may hold some of it already. Raises UsageError, DatasetError where studies differ,
    NondeterminismError where rows of the same points do."""
    if not places:
        raise UsageError("merge: give the datasets to join")
    sources = [Dataset(place).store for place in places]
    studies = [read_study(source) for source in sources]
    store = Store(out)
    study = _same(sources, studies)
    for source, record in zip(sources, [source.json("study.json") for source in sources], strict=True):
        if record["model_digest"] != sources[0].json("study.json")["model_digest"]:
            raise DatasetError(f"{source.name}: was made by another model than {sources[0].name}; run one of them again")
    check_same_study(store, study)
    with store.writing():
        store.prepare()
        repair(store)
        for source in sources:
            _copy(source, store)
        plan = Plan(study)
        kept = kept_of(plan)
        write_study(store, study, int(kept.sum()))
        done = done_now(plan, store, kept)
        complete = np.array_equal(done, kept)
        sealed = seal(store, plan.digest, study_digest(study)).as_json() if complete else None
        if not complete:
            store.read("points")  # what two of them made must agree, also while others are to come
    return Merged(store.place, int(done.sum()), int((kept & ~done).sum()), sealed)


def _same(sources: Sequence[Store], studies: Sequence[Study]) -> Study:
    """The study, which must have the same points everywhere."""
    digests = [Plan(study).digest for study in studies]
    for source, digest in zip(sources, digests, strict=True):
        if digest != digests[0]:
            raise DatasetError(
                f"{source.name}: has another plan ({digest[:12]}) than {sources[0].name} ({digests[0][:12]}); "
                f"run both from the same study file, then merge"
            )
    return studies[0]


def _copy(source: Store, store: Store) -> None:
    """Parts, then commits. What a seal holds becomes a commit."""
    state = source.state()
    for part in state.parts():
        _copy_part(source, store, part)
    commits = list(state.commits)
    if state.seal:
        indices = ((0, Plan(read_study(source)).upper, 1),) if state.seal.fits else ()
        commits.append(Commit(chunk_key([state.seal.root_digest]), state.seal.parts, state.seal.plan, indices))
    for commit in commits:
        store.commit(commit)


def _copy_part(source: Store, store: Store, part: PartRecord) -> None:
    if bad := source.damage(part):
        raise DatasetError(f"{bad}; run that dataset again, then merge")
    store.adopt(part, source.storage.read(part.path))
