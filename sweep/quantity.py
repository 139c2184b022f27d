"""Sizes as people write them: '4KiB', '16GiB', '4GB'. A bare '16G' could mean either and is refused."""

import re

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
BINARY_UNITS = {name: size for name, size in UNITS.items() if name.endswith("iB")}
_NUMBER = r"[0-9]{1,18}(?:\.[0-9]{1,6})?"
_SIZE = re.compile(rf"({_NUMBER})\s?([A-Za-z]+)")
SIZE_PATTERN = rf"^(?:0|{_NUMBER} ?(?:{'|'.join(UNITS)}))$"  # what parse_size() takes, for JSON Schema


def parse_size(text: object) -> int:
    """'1.5GiB' -> bytes; '0' is allowed bare. Raises ValueError that names the value and what would do."""
    if text == "0":
        return 0
    if not isinstance(text, str):
        raise ValueError(f"{text!r} has no unit; write a size as text, like '4KiB' or '16GiB'")
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text[:40]!r} is no size; write a number and one of {', '.join(UNITS)} (16GiB and 16GB differ)")
    whole, _, part = match[1].partition(".")
    scale = 10 ** len(part)
    size, rest = divmod(int(whole + part) * UNITS[match[2]], scale)
    if rest:
        raise ValueError(f"{text!r} is no whole number of bytes")
    return int(size)


def format_size(size: int) -> str:
    """The shortest exact binary form: 4096 -> '4KiB', 0 -> '0'."""
    if size == 0:
        return "0"
    unit = max((u for u in BINARY_UNITS if size % BINARY_UNITS[u] == 0), key=BINARY_UNITS.__getitem__, default="B")
    return f"{size // UNITS[unit]}{unit}"


def human_size(size: float) -> str:
    """For people: three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if abs(size) >= 100 else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.0f} TiB" if abs(size) >= 100 else f"{size:.3g} TiB"


def human_time(seconds: float) -> str:
    """For people: '340 ms', '12 s', '4 min', '2.5 h'."""
    for limit, scale, unit in ((1e-3, 1e6, "us"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min"), (172800, 1 / 3600, "h")):
        if seconds < limit:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
