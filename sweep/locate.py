"""On which line of a TOML file a key, a block or a step was written: for messages only."""

import re
from collections.abc import Sequence
from pathlib import Path

Location = tuple[int | str, ...]
Source = tuple[Path | str, str]  # a file and its text


def line_of(text: str, location: Location) -> int | None:
    """The line of the innermost part of a location that was written; None if nothing of it was.

    A location is what messages join with dots: ('block', 1, 'grid', 'vcpus') or ('workload', 'w', 'steps', 3, 'at')."""
    rows = text.splitlines()
    start, end, depth = _table(rows, location)
    line = start
    rest = list(location[depth:])
    while rest:
        part = rest.pop(0)
        if isinstance(part, int):
            found = _item(rows, line or 1, part)
        else:
            found = _key(rows, part, line or 1, end)
        if found is None:
            return line
        line = found
    return line


def _table(rows: Sequence[str], location: Location) -> tuple[int | None, int, int]:
    """(line of the deepest [header] or [[header]] that the location lies in, its last line, parts of the location used)."""
    best: tuple[int | None, int, int] = (None, len(rows), 0)
    count = -1
    inside = True
    for number, row in enumerate(rows, 1):
        header = re.match(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$", row)
        if not header:
            continue
        if best[0] is not None and best[1] == len(rows):
            best = (best[0], number - 1, best[2])
        names = [part.strip("\"' ") for part in header[2].split(".")]
        if header[1] == "[[":
            count += names[:1] == list(location[:1])
            inside = len(location) < 2 or not isinstance(location[1], int) or count == location[1]
        used = _match(names, location)
        if used > best[2] and inside:
            best = (number, len(rows), used)
    return best


def _match(names: Sequence[str], location: Location) -> int:
    """How many parts of the location a header's names cover; numbers after the first name are skipped."""
    used = 0
    for name in names:
        while used < len(location) and isinstance(location[used], int):
            used += 1
        if used == len(location) or location[used] != name:
            return 0
        used += 1
    if used < len(location) and isinstance(location[used], int):
        used += 1
    return used


def _key(rows: Sequence[str], name: str, start: int, end: int) -> int | None:
    pattern = re.compile(rf"(^|[\s,{{])[\"']?{re.escape(name)}[\"']?\s*(=|\.)")
    return next((i for i in range(start, min(end, len(rows)) + 1) if pattern.search(rows[i - 1])), None)


def _item(rows: Sequence[str], start: int, wanted: int) -> int | None:
    """Line on which item `wanted` of the inline list that opens on line `start` begins."""
    depth, item, fresh = 0, -1, False
    for number in range(start, len(rows) + 1):
        row = re.sub(r'"[^"]*"|\'[^\']*\'', lambda text: "s" * len(text[0]), rows[number - 1]).split("#")[0]
        for char in row[row.find("=") + 1 if number == start else 0 :]:
            if fresh and depth == 1 and not char.isspace() and char != "]":
                item, fresh = item + 1, False
                if item == wanted:
                    return number
            depth += (char in "[{") - (char in "]}")
            fresh = fresh or (depth == 1 and char in "[,")
            if depth <= 0 and char in "]}":
                return None
    return None


def where_is(sources: Sequence[Source], location: Location) -> str:
    """'file:line' of a location in the first file that has its last part, else in the one that has most of it."""
    for path, text in sources:
        line = line_of(text, location)
        if line is not None and (len(sources) == 1 or _last_is_on(text, line, location)):
            return f"{path}:{line}"
    path, text = sources[0]
    line = line_of(text, location)
    return f"{path}:{line}" if line else str(path)


def _last_is_on(text: str, line: int, location: Location) -> bool:
    names = [part for part in location if isinstance(part, str)]
    return bool(names) and names[-1] in text.splitlines()[line - 1]
