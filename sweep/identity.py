"""Who a point is: a digest of its canonical parameters, its workload's content, seed and replicate."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sweep.parameters import CAME_LATER, PARAMETERS

_SORTED = sorted(PARAMETERS)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@lru_cache(maxsize=1 << 16)
def _pair(name: str, _kind: str, value: Any) -> str:
    """Name and value as JSON; nothing for a parameter that came later, with its default (Point.canonical())."""
    return "" if name in CAME_LATER and value == CAME_LATER[name] else f'"{name}":{_text(value)}'


def _plain_pair(name: str, value: Any) -> str:
    return f'"{name}":{_text(value)}' if isinstance(value, dict) else _pair(name, type(value).__name__, value)


class Identity:
    """A point's identity but for the replicate: canonical JSON of `parameters`, `replicate`, `seed`, `workload`, in this order."""

    def __init__(self, values: Mapping[str, Any], workload_digest: str, seed: int) -> None:
        """`values`: every parameter, as Point.values() gives them."""
        pairs = [text for name in _SORTED if (text := _plain_pair(name, values[name]))]
        self._begun = hashlib.blake2b(f'{{"parameters":{{{",".join(pairs)}}},"replicate":'.encode(), digest_size=16)
        self._rest = f',"seed":{seed},"workload":"{workload_digest}"}}'

    def of(self, replicate: int) -> str:
        """BLAKE2b-128, 32 hex digits."""
        whole = self._begun.copy()
        whole.update(f"{replicate}{self._rest}".encode())
        return whole.hexdigest()
