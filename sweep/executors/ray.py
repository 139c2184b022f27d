"""Ray: long-lived actors, a chunk of points per call. A local Ray of its own, or the cluster of an address.

Token authentication is always on. Only this module imports ray.
"""

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweep.errors import EnvironmentProblemError
from sweep.executors.base import Chunk, ChunkResult, run_chunk
from sweep.point import Context

OBJECT_STORE_BYTES = 128 << 20
WAY_OUT = "use --executor local, which needs no Ray"


def token_path() -> Path:
    """The token file that Ray reads: the one of RAY_AUTH_TOKEN_PATH, else Ray's default, made here with rights for the user
    alone where it is missing (Ray itself would make it readable by all). Ray reads its place when it is imported, so it is
    never moved."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(given) if given else Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    except OSError as error:
        raise EnvironmentProblemError(f"{path}: no token file can be made ({error.strerror}); {WAY_OUT}") from None
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _environment() -> None:
    if "ray" not in sys.modules:  # read once, at import; a ray.init() without it switches tokens on by itself
        os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_AUTH_TOKEN" not in os.environ:
        token_path()


def connect(address: str | None, workers: int) -> Any:
    """Import and start (or join) Ray. Raises EnvironmentProblemError that names the way out."""
    _environment()
    try:
        import ray

        if address is None:
            ray.init(
                address="local",
                num_cpus=workers,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            root = Path(__file__).resolve().parent.parent
            modules = [str(root), str(root.parent / "kernels")]
            ray.init(address=address, runtime_env={"py_modules": modules}, log_to_driver=False, logging_level=logging.ERROR)
    except ImportError as error:
        raise EnvironmentProblemError(f"ray cannot be imported ({error}); {WAY_OUT}") from None
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentProblemError(f"Ray at {address or 'this machine'} cannot be used ({text[0]}); {WAY_OUT}") from None
    return ray


class _Worker:
    """The actor: keeps the context, runs chunks."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def run(self, chunk: Chunk) -> ChunkResult:
        return run_chunk(chunk.points, self._context, f"ray-{os.getpid()}")


class RayPool:
    """Actors that take chunks in turn; one that died is replaced."""

    def __init__(self, context: Context, workers: int, address: str | None = None) -> None:
        self._ray = connect(address, workers)
        self.slots = workers
        self._context = self._ray.put(context)
        self._actor_class = self._ray.remote(num_cpus=1, max_restarts=0)(_Worker)
        self._actors = [self._actor_class.remote(self._context) for _ in range(workers)]
        self._load = [0] * workers
        self._owner: dict[Any, int] = {}

    def submit(self, chunk: Chunk) -> Any:
        slot = self._load.index(min(self._load))
        handle = self._actors[slot].run.remote(chunk)
        self._owner[handle] = slot
        self._load[slot] += 1
        return handle

    def wait(self, handles: Sequence[Any], seconds: float) -> list[tuple[Any, ChunkResult | Exception]]:
        ready, _ = self._ray.wait(list(handles), num_returns=1, timeout=seconds)
        return [(handle, self._outcome(handle)) for handle in ready]

    def _outcome(self, handle: Any) -> ChunkResult | Exception:
        slot = self._owner.pop(handle)
        self._load[slot] -= 1
        try:
            result: ChunkResult = self._ray.get(handle)
            return result
        except self._ray.exceptions.RayActorError as error:
            self._actors[slot] = self._actor_class.remote(self._context)
            return RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        except self._ray.exceptions.RayError as error:
            return RuntimeError(f"{type(error).__name__}: {str(error).splitlines()[0]}")

    def close(self, now: bool) -> None:
        for actor in self._actors if now else ():
            self._ray.kill(actor)
        self._ray.shutdown()
