"""`make bench`: CPU time of the inner loop, medians of seven runs, printed and written to results/bench.json.

Figures are thread CPU time of this process; compile time is shown apart. Ratios hold across machines, absolute figures do not.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from kernels import Access, Order, Touch, simulate
from sweep.configs import config_root

RUNS = 7
GIB = 1 << 30


def mixed(touches: int) -> list[Touch]:
    return [Touch(access=Access.MIXED, write_percent=50.0, order=Order.RANDOM, repeat=True, touches=touches)]


CASES: dict[str, dict[str, object]] = {
    "mixed uniform, 1 GiB, 1 vCPU, 4K pages": {"memory": GIB, "steps": mixed(4_000_000)},
    "mixed uniform, first pass (most fault)": {"memory": GIB, "steps": mixed(600_000)},
    "sequential first touch, 1 GiB, 4K pages": {"memory": GIB, "steps": [Touch()]},
    "read then write, 1 GiB, 8 vCPUs, 4K pages": {"memory": GIB, "vcpus": 8, "steps": [Touch(access=Access.READ), Touch()]},
    "hits, 1 GiB, THP, 8 vCPUs": {"memory": GIB, "vcpus": 8, "backing": "anonymous_thp", "steps": [Touch(), Touch(), Touch()]},
}


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def main() -> int:
    compile_s = cpu_seconds(lambda: [simulate(memory=2 << 20, vcpus=v, steps=[Touch()]) for v in (1, 2)])
    print(f"compile or load from cache: {compile_s:.2f} s CPU")
    found: dict[str, object] = {"compile_or_load_cpu_s": round(compile_s, 3)}
    for name, parameters in CASES.items():
        seconds = statistics.median(cpu_seconds(lambda p=parameters: simulate(**p)) for _ in range(RUNS))  # type: ignore[misc, arg-type]
        counters = simulate(**parameters).counters  # type: ignore[arg-type]
        rate = counters["touches"] / seconds
        faults = counters["pf_taken"] / counters["touches"]
        print(f"{name}: {rate / 1e6:.1f} million touches/s ({1e9 / rate:.1f} ns a touch, {faults:.0%} exits per touch)")
        found[name] = {"touches_per_s": round(rate), "ns_per_touch": round(1e9 / rate, 2), "exits_per_touch": round(faults, 4)}
    path = config_root().parent / "results" / "bench.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {Path('results') / path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
