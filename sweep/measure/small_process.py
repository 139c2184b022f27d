"""Runs a script of this package in a small process: what a fork or a guest costs does not depend on what Python has loaded here."""

import json
import subprocess
import sys
from pathlib import Path

from sweep.measure.sampling import DiscardedRunError, UnavailableError

SECONDS = 20.0  # more than any run takes
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sweep.measure"
START = "import sys; sys.path.insert(0, sys.argv.pop(1)); from importlib import import_module; import_module(sys.argv.pop(1)).main()"


def run_script(name: str, *arguments: int) -> dict[str, float]:
    """What main() of that module prints: figures by name. Raises UnavailableError, DiscardedRunError with what it says is wrong."""
    command = [sys.executable, "-I", "-S", "-c", START, str(ROOT), f"{PACKAGE}.{name}", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise DiscardedRunError(f"{name} took more than {SECONDS:.0f} s") from None
    except OSError as error:
        raise UnavailableError(f"no process for {name}: {error.strerror}") from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise UnavailableError(f"{name} ended with status {done.returncode}: {done.stderr.strip()[-200:]!r}") from None
    if "unavailable" in answer:
        raise UnavailableError(answer["unavailable"])
    return {str(key): float(value) for key, value in answer.items()}
