"""A process that runs one study and says what it took: `python -m tests.bench.driver STUDY OUT EXECUTOR WORKERS`, JSON."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import sweep
from sweep import runner


def cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def peak_bytes() -> int:
    """The most memory that this process had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def tree_cpu() -> float:
    """Of this process and of all those that it waited for."""
    return cpu(resource.RUSAGE_SELF) + cpu(resource.RUSAGE_CHILDREN)


def main() -> None:
    study, out, executor, workers = sys.argv[1:]
    seal, sealing = runner.seal, [0.0]

    def timed_seal(*arguments: Any) -> Any:
        before = tree_cpu()
        made = seal(*arguments)
        sealing[0] = tree_cpu() - before
        return made

    runner.seal = timed_seal
    start = time.monotonic()
    summary = sweep.run(study, out, runner.RunOptions(executor=executor, workers=int(workers), quiet=True, yes=True))
    found = {
        "points": summary.done,
        "wall_s": time.monotonic() - start,
        "cpu_s": tree_cpu(),
        "driver_cpu_s": cpu(resource.RUSAGE_SELF),
        "seal_cpu_s": sealing[0],
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
