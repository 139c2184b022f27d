"""Reading the TOML files that users give: bounded, regular files only, every fault with its line."""

import errno
import re
import stat
import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from sweep.errors import Fault, StudyError

MAX_TOML_BYTES = 1 << 20
Location = tuple[int | str, ...]


def read_bytes(path: Path, limit: int = MAX_TOML_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises StudyError that names path, cause and cure."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise StudyError([Fault(str(path), "", "is no regular file; give the path of a TOML file")])
        if info.st_size > limit:
            raise StudyError([Fault(str(path), "", f"has {info.st_size} bytes; at most {limit} are read")])
        with path.open("rb") as file:
            return file.read(limit + 1)[:limit]
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "")
        raise StudyError([Fault(str(path), "", f"cannot be read: {error.strerror} ({reason}); check the path and its rights")]) from None


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Parsed content and text. Raises StudyError for what is no UTF-8 or no TOML."""
    if path.suffix in {".yaml", ".yml", ".json"}:
        raise StudyError([Fault(str(path), "", "TOML only; write the study as a .toml file")])
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise StudyError([Fault(str(path), "", f"byte {error.start} is no UTF-8; save the file as UTF-8")]) from None
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise StudyError([_toml_fault(path, text, str(error))]) from None
    except RecursionError:
        raise StudyError([Fault(str(path), "", "is nested too deeply; a study needs three levels")]) from None
    except ValueError as error:  # a number of thousands of digits
        raise StudyError([Fault(str(path), "", f"no valid TOML: {str(error).split(':')[0]}; shorten the number")]) from None


def _toml_fault(path: Path, text: str, message: str) -> Fault:
    found = re.search(r"at line (\d+)", message)
    line = int(found[1]) if found else text.count("\n") + 1
    what = message.split(" (at ", maxsplit=1)[0]
    if "overwrite" in message or "twice" in message or "redefine" in message or "declare" in message:
        key = _key_of(text.splitlines()[line - 1 : line])
        first = next((i for i, row in enumerate(text.splitlines(), 1) if i != line and key and _key_of([row]) == key), None)
        what = f"{key or 'a key'} is given twice" + (f", first on line {first}" if first else "") + "; keep one"
    return Fault(f"{path}:{line}", "", f"no valid TOML: {what}")


def _key_of(rows: Sequence[str]) -> str:
    found = re.match(r"\s*(\[*[A-Za-z0-9_.\"'-]+\]*)\s*(=|$)", rows[0]) if rows else None
    return found[1] if found else ""


def line_of(text: str, location: Location) -> int | None:
    """The line on which a key was written: the header of its table, then the key itself. None where it was not."""
    rows = text.splitlines()
    names = [str(part) for part in location if isinstance(part, str)]
    numbers = [part for part in location if isinstance(part, int)]
    line, depth, table_count = None, 0, 0
    for number, row in enumerate(rows, 1):
        header = re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?", row)
        if not header or not names:
            continue
        parts = [part.strip("\"' ") for part in header[1].split(".")]
        if parts != names[: len(parts)]:
            continue
        if row.lstrip().startswith("[["):
            table_count += 1
            if numbers and table_count != numbers[0] + 1:
                continue
        if len(parts) >= depth:
            line, depth = number, len(parts)
    for name in names[depth:]:
        pattern = re.compile(rf"(^|[\s,{{])[\"']?{re.escape(name)}[\"']?\s*=")
        line = next((i for i in range(line or 1, len(rows) + 1) if pattern.search(rows[i - 1])), line)
    return line


def where_is(path: Path | str, text: str, location: Location) -> str:
    """'file:line' for messages."""
    line = line_of(text, location)
    return f"{path}:{line}" if line else str(path)


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' or the list of what is known."""
    names = list(known)
    close = get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def pydantic_fault(path: Path | str, text: str, prefix: Location, error: ErrorDetails, known: Iterable[str]) -> Fault:
    """One pydantic error as one line."""
    location = (*prefix, *(part for part in error["loc"] if not str(part).startswith(("function-", "tagged-union"))))
    field = ".".join(str(part) for part in location)
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        what = f"unknown key {str(error['loc'][-1])!r}; {nearest(str(error['loc'][-1]), known)}"
    elif error["type"] == "missing":
        what = "is missing"
    else:
        message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        what = message if repr(given) in message else f"{short(given)}: {message}"
    return Fault(where_is(path, text, location), field, what)


def short(value: object) -> str:
    """A value for a message: its repr, cut to 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
