"""Enums, sizes and array layouts of the model: the vocabulary that every other module of `kernels` speaks.

All quantities are integers: bytes, pages of 4 KiB, or nanoseconds of virtual time.
"""

from enum import IntEnum

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
PMD_ORDER = 9
PMD_PAGES = 1 << PMD_ORDER
PMD_BYTES = PMD_PAGES * PAGE_BYTES
KVM_MAX_VCPUS = 4096  # arch/x86/include/asm/kvm_host.h, CONFIG_KVM_MAX_NR_VCPUS=4096
MAX_MEMORY_BYTES = 1 << 44  # 16 TiB: page numbers stay below 2**32, as mulhi32() needs

NEVER = 1 << 60  # ns; a point in virtual time that no event reaches


class HostPmd(IntEnum):
    """What the VMM's page table holds for a 2 MiB region (fault-path section "primary MMU")."""

    NONE = 0  # nothing mapped, no page table
    TBL = 1  # a page table; HostPte says the rest
    HZ_RO = 2  # leaf: the huge zero page, read-only
    THP_RW = 3  # leaf: anonymous THP, writable
    HUGE_RO = 4  # leaf: private hugetlb page made by a read
    HUGE_RW = 5  # leaf: hugetlb page, writable
    HUGE_BUSY = 6  # none yet; a task holds hugetlb_fault_mutex and clears the page


class HostPte(IntEnum):
    """What the VMM's page table holds for a 4 KiB page below a HostPmd.TBL."""

    NONE = 0
    Z_RO = 1  # the shared 4 KiB zero page
    ANON_RW = 2  # anonymous page of our own
    SHM_RW = 3  # shmem page: writable even when a read made it
    SHM_BUSY = 4  # none yet; a task holds the new folio's lock and clears it


class SptePmd(IntEnum):
    """KVM's 2 MiB entry (TDP MMU): non-present, leaf (as in Spte), or a 4 KiB table below."""

    N = 0
    RO = 1
    RW = 2
    RW_CLEAN = 3
    T = 4


class Spte(IntEnum):
    """KVM's 4 KiB entry below a SptePmd.T."""

    N = 0
    RO = 1
    RW = 2
    RW_CLEAN = 3  # writable, Dirty bit clear: a second fault on a writable leaf wrote it so, until a guest write sets the bit


# One byte holds both halves of a page's state: HostPte in the low nibble, Spte in the high one.
HOST_MASK = 0x0F
SPTE_SHIFT = 4


class Backing(IntEnum):
    """Names of the KVM selftests (tools/testing/selftests/kvm/lib/test_util.c)."""

    ANONYMOUS = 0
    ANONYMOUS_THP = 1
    ANONYMOUS_HUGETLB_2MB = 2
    SHMEM = 3


class ThpEnabled(IntEnum):
    """/sys/kernel/mm/transparent_hugepage/enabled."""

    ALWAYS = 0
    MADVISE = 1
    NEVER = 2


class Prealloc(IntEnum):
    """What the VMM does before the guest starts; the values are bits."""

    NONE = 0
    POPULATE = 1
    PRE_FAULT = 2
    POPULATE_PRE_FAULT = 3


class Actor(IntEnum):
    """Who runs in a step."""

    GUEST = 0  # a vCPU: accesses that exit when the SPTE forbids them
    VMM = 1  # a VMM thread in MADV_POPULATE_*: host page table only
    PREFAULT = 2  # KVM_PRE_FAULT_MEMORY: read faults inside the kernel, no exit
    OUTSIDE = 3  # a VMM thread that writes its own copy-on-write memory, in no memslot


class Access(IntEnum):
    WRITE = 0
    READ = 1
    PAIRS = 2
    MIXED = 3


class Order(IntEnum):
    SEQUENTIAL = 0
    RANDOM = 1
    STRIDED = 2
    ZIPF = 3
    LIST = 4


class Spread(IntEnum):
    SLICES = 0
    ALL = 1


class Phase(IntEnum):
    """Where an actor is. Each value is one event of the loop in engine.py; *_HELD runs with mmu_lock held."""

    TOUCH = 0  # in the guest (or the VMM's loop): next access, or re-execution
    FAULT = 1  # after the exit: snapshot of the sequence, pre-check, GUP-fast
    WALK = 2  # slow GUP: walk, and what handle_mm_fault() starts
    COMMIT = 3  # handle_mm_fault() sets the host entry, no notifier
    START = 4  # mmu_notifier_invalidate_range_start: asks for mmu_lock
    START_HELD = 5
    START_DONE = 6  # lock released; the host entry is replaced
    CHANGE = 7  # change_pte callback: asks for mmu_lock
    CHANGE_HELD = 8
    CHANGE_DONE = 9
    END = 10  # mmu_notifier_invalidate_range_end: asks for mmu_lock
    END_HELD = 11
    END_DONE = 12
    MAP = 13  # after GUP: second pre-check, asks for mmu_lock (read)
    MAP_HELD = 14  # stale check, install
    MAP_DONE = 15
    DONE = 16


class Outcome(IntEnum):
    """RET_PF_* of one fault."""

    RETRY = 0
    FIXED = 1
    SPURIOUS = 2


class Action(IntEnum):
    """What handle_mm_fault() does, chosen by primary_mmu.action_table()."""

    NONE = 0  # the walk is satisfied
    MAP_ZERO = 1
    MAP_HUGE_ZERO = 2
    ALLOC_4K = 3
    ALLOC_THP = 4
    ALLOC_SHMEM = 5
    ALLOC_HUGE = 6
    REUSE_HUGE = 7
    COW_4K = 8
    SPLIT_HUGE_ZERO = 9
    THP_FOR_HUGE_ZERO = 10
    WAIT = 11  # somebody else holds the page's lock


class Counter(IntEnum):
    """Index of each cumulative counter; the lower-case name is the column's name."""

    TOUCHES = 0
    READS = 1
    WRITES = 2
    HITS = 3
    PF_TAKEN = 4
    PF_FIXED = 5
    PF_SPURIOUS = 6
    PF_FAST = 7
    PF_RETRY = 8
    EXITS = 9
    REMOTE_TLB_FLUSH_REQUESTS = 10
    REMOTE_TLB_FLUSH = 11
    TLB_IPIS = 12
    INVALIDATE_RANGE_START = 13
    INVALIDATE_RANGE_END = 14
    CHANGE_PTE = 15
    SPTE_PREFETCH = 16
    MMU_LOCK_READ = 17
    MMU_LOCK_WRITE = 18
    GUP_FAST = 19
    GUP_SLOW = 20
    PGFAULT = 21
    VMM_PGFAULT = 22
    THP_FAULT_ALLOC = 23
    THP_FAULT_FALLBACK = 24
    THP_SPLIT_PMD = 25
    THP_COLLAPSE_ALLOC = 26
    ZERO_PAGE_MAPS = 27
    HUGE_ZERO_MAPS = 28
    COW_4K = 29
    COW_HUGE = 30
    COW_KSM = 31
    COW_REUSE = 32
    BYTES_CLEARED = 33
    BYTES_COPIED = 34
    BYTES_CLEARED_WASTED = 35
    FAULT_NS = 36
    MMU_LOCK_WAIT_NS = 37
    MMU_LOCK_WRITE_HOLD_NS = 38
    MMAP_LOCK_WAIT_NS = 39
    CLEAR_NS = 40
    FLUSH_NS = 41


class Gauge(IntEnum):
    """Index of each state figure, as it stands after a step; the lower-case name is the column's name."""

    PAGES_4K = 0
    PAGES_2M = 1
    PAGES_1G = 2
    RSS_BYTES = 3  # private anonymous memory, as smaps counts it: no hugetlb, no shmem
    ANON_HUGE_BYTES = 4
    HELD_BYTES = 5  # all memory the host gave: anonymous, hugetlb and shmem


class Cpu(IntEnum):
    """Columns of Machine.cpu: one row per actor."""

    TIME = 0  # when its next event happens
    PHASE = 1
    INDEX = 2  # accesses begun (guest), or the page cursor (VMM, PREFAULT, OUTSIDE)
    LIMIT = 3
    LO = 4  # its part of the step's units, [LO, HI)
    HI = 5
    GFN = 6
    WRITE = 7
    FOLL_WRITE = 8  # GUP asks for write permission
    AGAIN = 9  # the access exited before: this is its re-execution
    PENDING = 10  # read_first: the read was begun, its write follows
    SEQ = 11  # snapshot of mmu_invalidate_seq
    MAP_WRITABLE = 12
    ACTION = 13
    COMMITTED = 14  # the host entry was really replaced inside its invalidation
    OUTCOME = 15
    EXIT_TIME = 16
    WAIT_TIME = 17
    WAIT_PAGE = 18  # page whose lock it waits for, -1 for none
    FAULTED = 19  # handle_mm_fault() was entered, and counted, before that wait
    PRESENT = 20  # a leaf was there when the access exited: PFERR_PRESENT_MASK


class Vm(IntEnum):
    """Index of Machine.vm: the VM's control state and mmu_lock (virt/kvm/kvm_main.c, include/linux/kvm_host.h)."""

    SEQ = 0  # mmu_invalidate_seq
    IN_PROGRESS = 1  # mmu_invalidate_in_progress
    RANGE_LO = 2  # union of the invalidations in progress, [lo, hi)
    RANGE_HI = 3
    READERS = 4
    WRITER = 5
    QUEUE_HEAD = 6
    QUEUE_TAIL = 7
    FAULT_MAX_NS = 8
    EVENTS = 9
    TRACED = 10
    CLOCK = 11  # virtual time at the start of the step
    ACTORS = 12  # who takes part in the step: actors 0 ... ACTORS - 1
    PAGE_WAITERS = 13


class Stream(IntEnum):
    """Index of the int64 vector that describes one step's accesses (workload.py)."""

    ACTOR = 0
    ACTORS = 1
    ACCESS = 2
    ORDER = 3
    SPREAD = 4
    START_BYTES = 5
    EVERY_BYTES = 6
    UNITS = 7
    TOUCHES = 8  # in all actors; -1: one per unit of each actor's part
    REPEAT = 9
    STRIDE = 10
    WINDOW = 11
    WRITE_CUT = 12  # a draw of 53 bits below it is a write
    READ_FIRST_CUT = 13
    THINK_NS = 14
    KEY = 15
    START_PAGE = 16  # VMM, PREFAULT, OUTSIDE: pages [START_PAGE, END_PAGE)
    END_PAGE = 17


class Trace(IntEnum):
    """Columns of Machine.trace."""

    TIME = 0
    ACTOR = 1
    PHASE = 2
    GFN = 3
    WRITE = 4
    HOST_PMD = 5
    HOST_PTE = 6
    SPTE_PMD = 7
    SPTE = 8
    SEQ = 9


# Latency histogram: log-linear, 128 buckets per power of two (error below 0.8 %); exact below 256 ns; the last bucket
# holds all from 2**43 ns (2.4 hours) on.
HIST_SUB_BITS = 7
HIST_BUCKETS = (44 - HIST_SUB_BITS) << HIST_SUB_BITS


def _dense(table: type[IntEnum]) -> None:
    """Every enum that sizes an array counts up from 0 without gaps."""
    if [int(m) for m in table] != list(range(len(table))):
        raise AssertionError(f"{table.__name__} is not dense")


assert [int(m) for m in Spte] == [int(m) for m in SptePmd][: len(Spte)]  # leaves are the same at both levels
for _table in (HostPmd, HostPte, SptePmd, Spte, Backing, Phase, Outcome, Action, Counter, Gauge, Cpu, Vm, Stream, Trace):
    _dense(_table)
assert PMD_BYTES == 2 << 20
assert max(HostPte) <= HOST_MASK and max(Spte) << SPTE_SHIFT <= 0xFF
