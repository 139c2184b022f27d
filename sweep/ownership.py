"""Whose a dataset is: one study, model and cost file; and the study's files in it."""

import json
from pathlib import Path
from typing import Any

from kernels.jit import model_digest
from sweep.dataset.records import is_json
from sweep.dataset.storage import TEMP_PREFIX, LocalStorage
from sweep.dataset.store import Store
from sweep.errors import DatasetError, EnvironmentProblemError, UsageError
from sweep.record import study_record
from sweep.schema import SCHEMA_VERSION
from sweep.study import Study

DATASET_NAMES = frozenset({"points", "steps", "errors", "commits", "provenance", "quarantine", "report", "replay", ".lock"})
_FIXED = ("name", "seed", "model_digest", "schema_version")


def place_of(out: str | Path | None, study: Study, new_version: bool) -> str:
    """Where the dataset lies, checked to be free or this study's. Raises DatasetError, EnvironmentProblemError."""
    place = str(out) if out is not None else str(Path("results") / study.name)
    try:
        if new_version:
            return sibling(place, study)
        check_same_study(Store(place), study)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblemError(f"{place[:200]}: cannot be used: {reason}; choose another with --out") from None
    return place


def check_same_study(store: Store, study: Study) -> None:
    """Refuse a place of another study, model or cost file, with what differs and the way out. Raises DatasetError."""
    if not store.has("study.json"):
        check_free(store)
        return
    if _never_began(store):
        return
    old, new = store.json("study.json"), {**study.identity(), "model_digest": model_digest(), "schema_version": SCHEMA_VERSION}
    there = old.get("schema_version")
    if isinstance(there, int) and there > SCHEMA_VERSION:
        raise DatasetError(
            f"{store.name}: was made by a newer version (schema {there}, this one writes {SCHEMA_VERSION}) and can only be read; "
            f"update faultsweep, or choose another --out"
        )
    differs = [f"{key} ({_short(old.get(key))} there, {_short(new[key])} now)" for key in _FIXED if old.get(key) != new[key]]
    for kind in ("workloads", "costs"):
        for name, digest in new[kind].items():
            if name in old.get(kind, {}) and old[kind][name] != digest:
                differs.append(f"{kind[:-1]} {name!r} ({_short(old[kind][name])} there, {_short(digest)} now)")
    if differs:
        raise DatasetError(
            f"{store.name}: was made with another {'; '.join(differs)}; use --new-version for a sibling directory, or another --out"
        )


def _never_began(store: Store) -> bool:
    """study.json is half of one, and nothing else is there: the disk lost the rest of a first run."""
    return not is_json(store.storage.read("study.json")) and not store.storage.names("commits") and not store.storage.names("points")


def check_free(store: Store) -> None:
    """Refuse a folder that holds something else than a dataset. Raises DatasetError."""
    if isinstance(store.storage, LocalStorage) and store.storage.root.is_dir():
        names = {entry.name for entry in store.storage.root.iterdir() if not entry.name.startswith(TEMP_PREFIX)} - DATASET_NAMES
        if names:
            raise DatasetError(f"{store.name}: holds {min(names)} but no dataset; choose an empty directory with --out")


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) > 16 else text


def sibling(place: str, study: Study) -> str:
    """The first of DIR, DIR.2, DIR.3 ... that is free or of this very study, model and costs."""
    for number in range(1, 1000):
        candidate = place if number == 1 else f"{place}.{number}"
        try:
            check_same_study(Store(candidate), study)
        except DatasetError:
            continue
        return candidate
    raise UsageError(f"{place}: has 999 versions; remove some")


def write_study(store: Store, study: Study, points: int) -> None:
    """study.json as understood (workloads and costs of earlier runs stay named), which makes the place a dataset; study.toml as given."""
    record: dict[str, Any] = study_record(study, points)
    old = store.json("study.json") if store.has("study.json") and not _never_began(store) else {}
    for kind in ("workloads", "costs"):
        record[kind] = {**old.get(kind, {}), **record[kind]}
    if old != json.loads(json.dumps(record)):
        store.write_json("study.json", record)
    text = study.text.encode()
    if not store.has("study.toml") or (text and store.storage.read("study.toml") != text):
        store.storage.replace("study.toml", text)
