"""Is a Ray cluster there, does it want a token, is ours the right one? Asked before Ray joins it, which would wait for minutes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from sweep.errors import EnvironmentProblemError

CONNECT_SECONDS = 2.0
CURE = "copy the head's ~/.ray/auth_token there (mode 0600), or set RAY_AUTH_TOKEN"
ANSWER_SECONDS = 20.0  # for the probe without a token: it imports Ray
OPEN, CLOSED = 10, 11  # exit status of the probe
PROBE = f"""
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_get(b"faultsweep", namespace=b"probe", timeout=2)
except Exception:
    sys.exit({CLOSED})
sys.exit({OPEN})
"""


def address_of(address: str) -> tuple[str, int] | None:
    """Host and port; None for names that Ray resolves by itself ('auto'). Raises EnvironmentProblemError."""
    if address == "auto":
        return None
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise EnvironmentProblemError(f"--address {address[:200]!r}: HOST:PORT is needed, like 10.0.0.1:6379, or auto")
    return host.strip("[]"), int(port)


def check_reachable(address: str) -> None:
    """Somebody listens there. Raises EnvironmentProblemError."""
    if (found := address_of(address)) is None:
        return
    try:
        socket.create_connection(found, CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise EnvironmentProblemError(
            f"Ray at {address}: nobody answers ({reason}); start its head (ray start --head), or check address and firewall"
        ) from None


def check_token_is_there() -> None:
    """A cluster's token cannot be made here. Raises EnvironmentProblemError."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" not in os.environ and not path.is_file():
        raise EnvironmentProblemError(
            f"{path}: there is no token; copy the head's ~/.ray/auth_token to it (mode 0600), or set RAY_AUTH_TOKEN"
        )


class OpenProbe:
    """Asks the cluster something without a token, in a process of its own, while Ray is imported here."""

    def __init__(self, address: str) -> None:
        self.address = address
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROBE, address.removeprefix("ray://")],
            env={**environment, "RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def check(self) -> None:
        """Raises EnvironmentProblemError where the cluster answered: anybody on the network can run code there."""
        try:
            status = self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = CLOSED
        if status == OPEN:
            raise EnvironmentProblemError(
                f"Ray at {self.address}: answers without a token, so anybody who reaches it can run code there; "
                f"start it with RAY_AUTH_MODE=token, or join it all the same with --insecure-cluster"
            )
