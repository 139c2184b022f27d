"""Reading the TOML files that users give: bounded, regular files only, every fault with its line."""

import errno
import json
import re
import stat
import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic_core import ErrorDetails

from sweep.errors import Fault, StudyError
from sweep.locate import Location, Source, where_is

MAX_TOML_BYTES = 1 << 20
MAX_DOTS = 64


def read_bytes(path: Path, limit: int = MAX_TOML_BYTES, what: str = "TOML file") -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises StudyError that names path, cause and cure."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise StudyError([Fault(str(path), "", f"is no regular file; give the path of a {what}")])
        if info.st_size > limit:
            raise StudyError([Fault(str(path), "", f"has {info.st_size} bytes; at most {limit} are read")])
        with path.open("rb") as file:
            return file.read(limit + 1)[:limit]
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "")
        raise StudyError([Fault(str(path), "", f"cannot be read: {error.strerror} ({reason}); check the path and its rights")]) from None


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Parsed content and text. Raises StudyError for what is no UTF-8 or no TOML."""
    if path.suffix.lower() in {".yaml", ".yml", ".json"}:
        raise StudyError([Fault(str(path), "", "TOML only; write the study as a .toml file")])
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise StudyError([Fault(str(path), "", f"byte {error.start} is no UTF-8; save the file as UTF-8")]) from None
    deep = next((i for i, row in enumerate(text.splitlines(), 1) if row.split("=")[0].count(".") > MAX_DOTS), None)
    if deep is not None:  # a key of thousands of dots takes tomllib all memory there is
        raise StudyError([Fault(f"{path}:{deep}", "", f"a key of more than {MAX_DOTS} dots; no study needs it")])
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise StudyError([_toml_fault(path, text, str(error))]) from None
    except RecursionError:
        raise StudyError([Fault(str(path), "", "is nested too deeply; a study needs three levels")]) from None
    except ValueError:  # more digits than Python converts
        line = next((i for i, row in enumerate(text.splitlines(), 1) if re.search(r"[0-9_]{4000}", row)), 1)
        raise StudyError([Fault(f"{path}:{line}", "", "no valid TOML: a number of thousands of digits; shorten it")]) from None


def _toml_fault(path: Path, text: str, message: str) -> Fault:
    found = re.search(r"at line (\d+)", message)
    line = int(found[1]) if found else text.count("\n") + 1
    what = message.split(" (at ", maxsplit=1)[0]
    if any(word in message for word in ("overwrite", "twice", "redefine", "declare", "Cannot mutate")):
        inline = re.search(r"namespace \('(.*)',\)", message)
        rows = text.splitlines()
        key = inline[1] if inline else _key_of(rows[line - 1 : line])
        first = next((i for i in range(line - 1, 0, -1) if key and _key_of(rows[i - 1 : i]) == key), None)
        what = f"{key or 'a key'} is given twice" + (f", first on line {first}" if first else "") + "; keep one"
    return Fault(f"{path}:{line}", "", f"no valid TOML: {what}")


def _key_of(rows: Sequence[str]) -> str:
    found = re.match(r"\s*(\[*[A-Za-z0-9_.\"'-]+\]*)\s*(=|$)", rows[0]) if rows else None
    return found[1] if found else ""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean 'x'?' or the list of what is known."""
    names = list(known)
    close = get_close_matches(word[:80], names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def pydantic_fault(sources: Sequence[Source], prefix: Location, error: ErrorDetails, known: Iterable[str]) -> Fault:
    """One pydantic error as one line."""
    location = (*prefix, *(part for part in error["loc"] if not str(part).startswith(("function-", "tagged-union"))))
    field = ".".join(str(part) for part in location)
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        what = f"unknown key {short(str(error['loc'][-1]))}; {nearest(str(error['loc'][-1]), known)}"
    elif error["type"] == "missing":
        what = "is missing"
    else:
        message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        what = message if short(given) in message else f"{short(given)}: {message}"
    return Fault(where_is(sources, location), field, what)


def short(value: object) -> str:
    """A value for a message: its repr, cut to 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def toml_value(value: Any) -> str:
    """A text, number or truth value as TOML: JSON writes them so, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
