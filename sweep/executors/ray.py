"""Ray: a task for each chunk of points. A local Ray of its own, or the cluster of an address.

Token authentication is always on. Only this module imports ray.
"""

import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweep.errors import EnvironmentProblemError, FaultsweepError
from sweep.executors.base import WorkerDiedError
from sweep.executors.cluster import CURE, OpenProbe, check_reachable, check_token_is_there
from sweep.worker import Chunk, ChunkResult, Job, run_chunk

OBJECT_STORE_BYTES = 128 << 20
LARGE_BYTES = 1 << 30  # a chunk that needs so much memory is placed by it
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


def _environment(address: str | None) -> None:
    if "ray" not in sys.modules:  # read once, at import; a ray.init() without it switches tokens on by itself
        os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is not None:
        check_token_is_there()
    elif "RAY_AUTH_TOKEN" not in os.environ:
        token_path()


def _check_token(address: str) -> None:
    """The cluster takes our token. Raises EnvironmentProblemError."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError

    try:
        GcsClient(address=address).internal_kv_get(b"faultsweep", namespace=b"probe", timeout=2)
    except AuthenticationError:
        raise EnvironmentProblemError(f"Ray at {address}: does not take the token of this machine; {CURE}") from None


def connect(address: str | None, workers: int, insecure: bool = False) -> Any:
    """Import and start (or join) Ray. Raises EnvironmentProblemError that names the way out."""
    _environment(address)
    probe = None
    if address is not None:
        check_reachable(address)
        probe = None if insecure or address == "auto" else OpenProbe(address)
    try:
        import ray

        if probe and address:
            _check_token(address)
            probe.check()
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
    except FaultsweepError:
        raise
    except Exception as error:  # Ray has a bare Exception for a node that starts too late
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentProblemError(f"Ray at {address or 'this machine'} cannot be used ({text[0]}); {WAY_OUT}") from None
    return ray


_jobs: dict[str, Job] = {}  # of this worker process


def _run(job: list[Any], chunk: Chunk) -> ChunkResult:
    """In a worker: the job is fetched once for all its chunks."""
    import ray

    key = job[0].hex()
    if key not in _jobs:
        _jobs.clear()
        _jobs[key] = ray.get(job[0])
    return run_chunk(chunk, _jobs[key], f"ray-{os.uname().nodename}-{os.getpid()}")


class RayPool:
    """Tasks of one CPU, which Ray's workers take in turn; they stay, with the compiled kernels in them. A chunk that needs much memory
    is placed where so much is free, twice as much at the second attempt. Retries are the driver's business."""

    def __init__(self, job: Job, workers: int, address: str | None = None, insecure: bool = False) -> None:
        self._ray = connect(address, workers, insecure)
        self.slots = workers if address is None else max(1, int(self._ray.cluster_resources().get("CPU", workers)))
        self._job = [self._ray.put(job)]
        self._task = self._ray.remote(num_cpus=1, max_retries=0)(_run)

    def submit(self, chunk: Chunk) -> Any:
        options = {"memory": chunk.nbytes * chunk.attempt} if chunk.nbytes >= LARGE_BYTES else {}
        return self._task.options(**options).remote(self._job, chunk)

    def wait(self, handles: Sequence[Any], seconds: float) -> list[tuple[Any, ChunkResult | Exception]]:
        ready, _ = self._ray.wait(list(handles), num_returns=1, timeout=seconds)
        return [(handle, self._outcome(handle)) for handle in ready]

    def _outcome(self, handle: Any) -> ChunkResult | Exception:
        try:
            result: ChunkResult = self._ray.get(handle)
            return result
        except self._ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            return cause if isinstance(cause, Exception) else RuntimeError(_first_line(error))
        except self._ray.exceptions.OutOfMemoryError as error:
            return MemoryError(_first_line(error))
        except self._ray.exceptions.RayError as error:
            return WorkerDiedError(_first_line(error))

    def abandon(self, handle: Any) -> None:
        self._ray.cancel(handle, force=True)

    def close(self, now: bool) -> None:  # noqa: ARG002 - what still runs ends with the job
        self._ray.shutdown()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
