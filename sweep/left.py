"""What of a plan is chosen, what is done, what is left: one truth value for each index."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sweep.dataset.records import Commit
from sweep.dataset.store import State, Store
from sweep.errors import UsageError
from sweep.plan import SLAB, Bools, Plan
from sweep.schema import as_numpy, texts

IDS = 1 << 20  # that are compared at once


def kept_of(plan: Plan) -> Bools:
    """Indices that are points."""
    found = [plan.kept(lo, min(lo + SLAB, plan.upper)) for lo in range(0, plan.upper, SLAB)]
    return np.concatenate(found) if found else np.zeros(0, np.bool_)


def chosen_of(kept: Bools, limit: int | None, shard: tuple[int, int]) -> Bools:
    """`--shard i/n` takes every n-th point, `--limit N` the first N of those. Raises UsageError."""
    index, count = shard
    if not 0 <= index < count:
        raise UsageError(f"--shard {index}/{count}: i/n with 0 <= i < n is needed")
    if limit is None and count == 1:
        return kept
    chosen = np.zeros_like(kept)
    chosen[np.flatnonzero(kept)[index::count][:limit]] = True
    return chosen


def done_now(plan: Plan, store: Store, kept: Bools) -> Bools:
    """Indices whose points are in the dataset."""
    return store.stable(lambda state: done_of(plan, store, state, kept))


def done_of(plan: Plan, store: Store, state: State, kept: Bools) -> Bools:
    """Indices whose points are in the dataset: by the records where they are of this very plan, else by the points' ids."""
    if state.seal and state.seal.completes(plan.digest):
        return kept.copy()
    done = np.zeros(plan.upper, np.bool_)
    known = [commit for commit in state.commits if commit.plan == plan.digest]
    for commit in known:
        _mark(done, commit)
    foreign = tuple(commit for commit in state.commits if commit.plan != plan.digest)
    if state.seal or foreign:
        _mark_ids(done, plan, store.done(State(state.seal, foreign)), kept)
    return done & kept


def _mark(done: Bools, commit: Commit) -> None:
    for start, stop, step in commit.indices:
        done[start:stop:step] = True
    done[[index for index in commit.failed if index < len(done)]] = False


def _mark_ids(done: Bools, plan: Plan, ids: pa.Array, kept: Bools) -> None:
    """Mark what is left and has one of these ids."""
    if not len(ids):
        return
    left = np.flatnonzero(kept & ~done)
    for at in range(0, len(left), IDS):
        slab = left[at : at + IDS]
        found = pa.chunked_array([texts(points.ids) for points in plan.points_at(slab)])
        done[slab] = as_numpy(pc.is_in(found, value_set=ids).combine_chunks())
