"""The litmus cases on the kernel this runs on, by Python alone: `python -m sweep.host.live memory|kvm CASES SECONDS`.

Reads and prints the lines of `litmus.c`, so that one parser serves all layers. A process of its own for each case: a fork, a
hang or a lack of memory ends that case only. With `memory` there is no guest: cases have steps of the VMM only."""

import gc
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sweep.host import counters, kvm, mapping
from sweep.host.mapping import PAGE, Vma

CASE_SECONDS = 60
MAX_REHEARSALS, QUIET_REHEARSALS = 40, 10
Step = Callable[[Sequence[str]], Callable[[], object]]


def emit(text: str) -> None:
    """One line with its checksum."""
    line = "".join(c if " " <= c <= "~" else "?" for c in text)
    os.write(1, f"{line} *{zlib.crc32(line.encode()):08x}\n".encode())


def expand(text: str) -> list[tuple[int, bool]]:
    """'r0+4*2,w7' -> (page, write) in order. Raises ValueError."""
    found: list[tuple[int, bool]] = []
    for part in text.split(","):
        body, _, stride = part[1:].partition("*")
        first, _, count = body.partition("+")
        kinds = {"r": (False,), "w": (True,), "p": (False, True)}[part[0]]
        pages = range(int(first), int(first) + int(count or 1) * int(stride or 1), int(stride or 1))
        found += [(page, write) for page in pages for write in kinds]
    return found


class Machine:
    """One case: memory, a guest or none, and the steps. A step is prepared first; what it returns is the part that is counted."""

    def __init__(self, words: Sequence[str], with_guest: bool) -> None:
        _, self.id, backing, pages, shift, guest_page, vcpus = words
        self.vma = mapping.map_data(backing, int(pages), int(shift))
        self.rehearsal = Vma(0, 0, mapping.shared_memory(int(pages) * PAGE), int(pages))
        self.drain = mapping.drain_batches()
        self.tracepoints = counters.open_tracepoints(self.vma) if with_guest else {}
        nested = kvm.mmu_of() != "shadow"
        self.guest = kvm.Guest(self.vma, int(vcpus), guest_page == "4k", nested) if with_guest else None
        self.child = 0
        self.vmm_faults = 0
        self.steps: Mapping[str, Step] = {
            "touch": self.touch,
            "host": self.host,
            "populate": self.populate,
            "pre_fault": self.pre_fault,
            "dontneed": self.dontneed,
            "collapse": self.collapse,
            "fork": lambda _words: self.fork,
            "child_exit": lambda _words: self.child_exit,
            "log": self.log,
        }

    def the_guest(self) -> kvm.Guest:
        if self.guest is None:
            raise RuntimeError("this step needs a guest")
        return self.guest

    def counted(self, work: Callable[[Vma], object]) -> Callable[[], object]:
        """The work over the slot, its minor faults counted as the VMM's. Done first over other memory, which is there, until it
        takes no fault: what the interpreter itself faults in (a fork shares all its memory) is behind it then."""

        def measure(vma: Vma) -> int:
            before = counters.minor_faults()
            work(vma)
            return counters.minor_faults() - before

        def run() -> None:
            quiet = 0
            for _ in range(MAX_REHEARSALS):
                hash(self.vma)  # its fields' reference counts are written: their memory is our own again
                quiet = quiet + 1 if measure(self.rehearsal) == 0 else 0
                if quiet == QUIET_REHEARSALS:
                    break
            self.vmm_faults = measure(self.vma)

        return run

    def touch(self, words: Sequence[str]) -> Callable[[], object]:
        guest = self.the_guest()
        guest.load({int(vcpu): expand(text) for vcpu, text in zip(words[::2], words[1::2], strict=True)})
        return guest.run

    def host(self, words: Sequence[str]) -> Callable[[], object]:
        accesses = expand(words[0]) if words else []
        return self.counted(lambda vma: mapping.touch(vma, accesses))

    def populate(self, words: Sequence[str]) -> Callable[[], object]:
        advice = mapping.MADV_POPULATE_READ if words[0] == "r" else mapping.MADV_POPULATE_WRITE
        return self.counted(lambda vma: mapping.advise(vma.data, vma.pages * PAGE, advice))

    def pre_fault(self, _words: Sequence[str]) -> Callable[[], object]:
        guest = self.the_guest()
        return self.counted(lambda vma: guest.pre_fault() if vma is self.vma else None)

    def dontneed(self, words: Sequence[str]) -> Callable[[], object]:
        first, size, every, calls = (int(word) for word in words)

        def run() -> None:
            for call in range(calls):
                mapping.advise(self.vma.at(first + call * every), size * PAGE, mapping.MADV_DONTNEED)

        return run

    def collapse(self, words: Sequence[str]) -> Callable[[], object]:
        first, size = (int(word) for word in words)
        return lambda: mapping.advise(self.vma.at(first), size * PAGE, mapping.MADV_COLLAPSE, may_fail=True)

    def fork(self) -> None:
        ready, tell = os.pipe()
        self.child = os.fork()
        if not self.child:
            mapping.die_with_parent()
            os.write(tell, b".")
            while True:
                signal.pause()  # it keeps what it got, and touches nothing of it
        os.read(ready, 1)

    def child_exit(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        self.child = 0

    def log(self, words: Sequence[str]) -> Callable[[], object]:
        guest = self.the_guest()
        return guest.dirty_log() if words[0] == "get" else lambda: guest.set_logging(words[0] == "on")

    def counts(self) -> dict[str, int]:
        """Everything as it stands; no counter of the machine is read twice."""
        found = counters.vmstat() | counters.smaps(self.vma) | counters.scan(self.vma)
        found |= dict(counters.read_tracepoints(self.tracepoints))
        return found | (self.guest.counts() if self.guest else {})

    def settle(self) -> None:
        if self.guest:
            self.guest.warm_up()
            self.guest.warm_up()
        self.drain()

    def report(self, head: str, work: Callable[[], object]) -> None:
        """Run, and print what moved and what stands."""
        self.vmm_faults = 0
        for vcpu in self.guest.threads if self.guest else ():
            vcpu.faults = 0
        self.counts()  # once unread: the interpreter's memory for it is there, then
        before = self.counts()
        work()
        faults = sum(vcpu.faults for vcpu in self.guest.threads) if self.guest and work == self.guest.run else 0
        vmm_faults = self.vmm_faults
        after = self.counts()
        moved = {name: value - (0 if name in GAUGES else before[name]) for name, value in after.items()}
        moved |= {"vmm_pgfault": vmm_faults} | ({"pgfault": faults} if self.guest else {})
        emit(f"{head} " + " ".join(f"{name}={value}" for name, value in moved.items()))


GAUGES = frozenset({*counters.SMAPS.values(), "pages_4k", "pages_2m", "pages_1g", "pagemap_rss_bytes", "pagemap_huge_bytes"})


def run_case(line: str, with_guest: bool) -> None:
    """Raises what the kernel raises."""
    head, *steps = (part.strip() for part in line.split(";"))
    machine = Machine(head.split(), with_guest)
    gc.disable()
    machine.report(f"fs1 base {machine.id}", machine.guest.run if machine.guest else lambda: None)
    for number, text in enumerate(steps):
        machine.settle()
        name, *words = text.split()
        work = machine.steps[name](words)
        machine.report(f"fs1 step {machine.id} {number}", work)
    if machine.child:
        machine.child_exit()
    emit(f"fs1 end {machine.id} {len(steps)}")


def in_child(line: str, with_guest: bool) -> None:
    """A process for one case."""
    number = line.split()[1]
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            emit(f"fs1 fail {number} ended by signal {os.WTERMSIG(status)}")
        return
    mapping.die_with_parent()
    signal.alarm(CASE_SECONDS)
    try:
        run_case(line, with_guest)
    except Exception as error:  # whatever it is, it is this case's
        emit(f"fs1 fail {number} {type(error).__name__}: {error}")
    finally:
        os._exit(0)


def main() -> None:
    """Arguments: layer, file of cases, seconds after which no further case is begun."""
    layer, path, seconds = sys.argv[1:4]
    mapping.die_with_parent()
    began = time.monotonic()
    emit(f"fs1 kernel release={platform.release()} mmu={kvm.mmu_of() if layer == 'kvm' else 'none'}")
    cases = 0
    for line in Path(path).read_text().splitlines():
        if time.monotonic() - began >= float(seconds):
            emit(f"fs1 late {line.split()[1]}")
            continue
        in_child(line, layer == "kvm")
        cases += 1
    emit(f"fs1 done {cases}")


if __name__ == "__main__":
    main()
