"""How this package's loops are compiled: as the model's are, and kept under a digest of these sources too."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from kernels.program import Program


@cache
def sources_digest() -> str:
    """SHA-256 (hex) over this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class KeptProgram(Program):
    """A Program of this package: the folder where machine code is kept goes by the model's sources only, its name by these."""

    def __init__(self, function: Callable[..., int]) -> None:
        super().__init__(function)
        self.symbol = f"{self.symbol}.{sources_digest()[:16]}"
