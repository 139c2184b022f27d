"""Enums, sizes and array layouts of the model: the vocabulary that every other module of `kernels` speaks.

All quantities are integers: bytes, pages of 4 KiB, or nanoseconds of virtual time.
"""

from collections.abc import Mapping
from enum import IntEnum

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT
PMD_ORDER = 9
PMD_PAGES = 1 << PMD_ORDER
PMD_BYTES = PMD_PAGES * PAGE_BYTES
PUD_ORDER = 18
PUD_PAGES = 1 << PUD_ORDER
PUD_BYTES = PUD_PAGES * PAGE_BYTES
KVM_MAX_VCPUS = 4096  # arch/x86/include/asm/kvm_host.h, CONFIG_KVM_MAX_NR_VCPUS=4096
MAX_SMT = 2  # hardware threads of a core
MAX_MEMORY_BYTES = 1 << 44  # 16 TiB: page numbers stay below 2**33
PREFETCH_PAGES = 8  # PTE_PREFETCH_NUM, arch/x86/kvm/mmu/mmu.c
FAULT_AROUND_PAGES = 16  # fault_around_bytes, mm/memory.c: 64 KiB
KSM_PAGE_SHARING = 256  # ksm_max_page_sharing, mm/ksm.c
MAX_PTES_SHARED = PMD_PAGES // 2  # khugepaged_max_ptes_shared, mm/khugepaged.c
PML_ENTRIES = 512  # arch/x86/kvm/vmx/vmx.h

NEVER = 1 << 60  # ns; a point in virtual time that no event reaches


class HostPmd(IntEnum):
    """What the VMM's page table holds for a host region (2 MiB; 1 GiB for 1 GiB hugetlb): docs/model.md section 1."""

    NONE = 0  # nothing mapped, no page table
    TBL = 1  # a page table; HostPte says the rest
    HZ_RO = 2  # leaf: the huge zero page, read-only
    THP_RW = 3  # leaf: anonymous THP, writable
    THP_EX = 4  # leaf: THP, read-only, nobody else has it
    THP_SH = 5  # leaf: THP shared with a child
    HUGE_RW = 6  # leaf: hugetlb page, writable
    HUGE_RO = 7  # leaf: private hugetlb page made by a read, or ours again
    HUGE_SH = 8  # leaf: private hugetlb page shared with a child
    HUGE_SH_BUSY = 9  # the same, while a task copies it under hugetlb_fault_mutex
    SHM_THP = 10  # leaf: huge page of shmem, writable
    CACHED = 11  # huge page in the page cache, not mapped
    HUGE_BUSY = 12  # none yet; a task holds the page's lock and clears it
    COLLAPSING = 13  # khugepaged copies into a new THP under mmap_lock


class HostPte(IntEnum):
    """What the VMM's page table holds for a page below a HostPmd.TBL."""

    NONE = 0
    Z_RO = 1  # the shared 4 KiB zero page
    ANON_RW = 2  # anonymous page of our own
    ANON_TRW = 3  # the same, part of a THP's folio
    ANON_EX = 4  # read-only and ours: reused on a write
    ANON_SH = 5  # shared with a child
    ANON_TSH = 6  # part of a THP's folio, shared with a child or not known to be exclusive
    KSM_RO = 7
    FILE_RO = 8  # page-cache page in a private mapping
    SHM_RW = 9  # page-cache page in a shared mapping: writable even when a read made it
    CACHED = 10  # in the page cache, not mapped
    SHM_BUSY = 11  # none yet; a task holds the new folio's lock and clears it


class Spte(IntEnum):
    """KVM's 4 KiB entry below a table; the leaf values are those of SptePmd too, in order of rights."""

    N = 0
    RO = 1
    WP = 2  # write-protected for dirty logging: MMU-writable, so fast_page_fault() makes it writable again
    RW = 3
    RW_CLEAN = 4  # writable, Dirty bit clear, until a guest write sets the bit


class SptePmd(IntEnum):
    """KVM's 2 MiB or 1 GiB entry: non-present, leaf (as in Spte), or a table below."""

    N = 0
    RO = 1
    WP = 2
    RW = 3
    RW_CLEAN = 4
    T = 5
    T_NX = 6  # a table made because of an instruction fetch, nx_huge_page_disallowed


# One byte holds both halves of a page's state: HostPte in the low nibble, Spte in the high one.
HOST_MASK = 0x0F
SPTE_SHIFT = 4


class Mmu(IntEnum):
    """KVM's MMU for the guest."""

    TDP = 0  # TDP MMU (arch/x86/kvm/mmu/tdp_mmu.c)
    LEGACY = 1  # direct MMU with rmaps, tdp_mmu=N
    SHADOW = 2  # shadow paging, without EPT or NPT


class Backing(IntEnum):
    """Names of the KVM selftests (tools/testing/selftests/kvm/lib/test_util.c), and three more."""

    ANONYMOUS = 0
    ANONYMOUS_THP = 1
    ANONYMOUS_HUGETLB_2MB = 2
    ANONYMOUS_HUGETLB_1GB = 3
    SHMEM = 4
    SHARED_HUGETLB_2MB = 5
    SHARED_HUGETLB_1GB = 6
    SHMEM_THP = 7
    PRIVATE_MEMFD = 8
    ANONYMOUS_DEFAULT = 9


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
    HOST = 4  # a VMM thread that accesses the memory itself
    IDLE = 5  # nobody: time passes
    CALL = 6  # a VMM thread in one system call (fork, madvise, ioctl); no vCPU runs
    KHUGEPAGED = 7  # daemon, beside the step's actors
    KSMD = 8  # daemon, beside the step's actors


class Call(IntEnum):
    """What an Actor.CALL does."""

    FORK = 0
    CHILD_EXIT = 1
    DONTNEED = 2
    COLLAPSE = 3
    KSM_MERGE = 4
    LOG_ON = 5
    LOG_GET = 6
    LOG_OFF = 7


class Access(IntEnum):
    WRITE = 0
    READ = 1
    PAIRS = 2
    MIXED = 3
    EXEC = 4  # instruction fetch: counted as a read


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
    SCAN = 16  # a daemon looks at the next region or page, or sleeps until it does
    ALLOC = 17  # khugepaged has its THP: mmap_lock for writing, then it looks again
    COPIED = 18  # khugepaged sets the THP, releases mmap_lock
    MERGE = 19  # KSM: next pair of the page
    DONE = 20


class Outcome(IntEnum):
    """RET_PF_* of one fault."""

    RETRY = 0
    FIXED = 1
    SPURIOUS = 2


class Action(IntEnum):
    """What handle_mm_fault() does, chosen by primary_mmu.action_table(); after WAIT: what daemons do inside a pair."""

    NONE = 0  # the walk is satisfied
    MAP_ZERO = 1
    MAP_HUGE_ZERO = 2
    ALLOC_4K = 3
    ALLOC_THP = 4
    ALLOC_SHMEM = 5
    ALLOC_SHMEM_THP = 6
    ALLOC_HUGE = 7
    READ_FILE = 8
    MAP_CACHED = 9
    MAP_CACHED_HUGE = 10
    COW_FILE = 11
    REUSE_4K = 12
    REUSE_THP = 13
    REUSE_HUGE = 14
    COW_4K = 15  # from here on: inside a pair
    COPY_4K = 16
    SPLIT_HUGE_ZERO = 17
    SPLIT_THP = 18
    THP_FOR_HUGE_ZERO = 19
    COPY_HUGE = 20
    WAIT = 21  # somebody else holds the page's lock
    COLLAPSE = 22
    KSM_SPLIT = 23
    KSM_SETTLE = 24
    KSM_UNSHARE_FOLIO = 25
    KSM_PROTECT = 26
    KSM_REPLACE = 27


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
    CACHE_LINE_WAIT_NS = 42
    ZONE_LOCK_WAIT_NS = 43
    PAGE_TABLE_LOCK_WAIT_NS = 44
    BANDWIDTH_WAIT_NS = 45
    CORE_WAIT_NS = 46


class Gauge(IntEnum):
    """Index of each state figure, as it stands after a step; the lower-case name is the column's name."""

    PAGES_4K = 0
    PAGES_2M = 1
    PAGES_1G = 2
    RSS_BYTES = 3  # memory of a private mapping, as smaps counts it: no hugetlb, no shmem
    ANON_HUGE_BYTES = 4
    HELD_BYTES = 5  # all memory the host gave: anonymous, hugetlb, page cache, KSM, a child's


class Cpu(IntEnum):
    """Columns of Machine.cpu: one row per actor."""

    TIME = 0  # when its next event happens
    PHASE = 1
    INDEX = 2  # accesses begun (guest), or the page cursor (VMM, PREFAULT, OUTSIDE)
    LIMIT = 3
    LO = 4  # its part of the step's units, [LO, HI)
    HI = 5
    PAGE = 6  # of the VMA
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
    KIND = 21  # Actor
    EXEC = 22  # the access is an instruction fetch
    OLD = 23  # host entry that the action replaces, as it was read
    PML = 24  # entries in the vCPU's page-modification log
    MMAP = 25  # MmapLock
    PCP_SMALL = 26  # free pages on its CPU's list
    PCP_HUGE = 27
    SIBLING = 28  # 1 + the actor on the core's other hardware thread; 0: nobody; see contention.ANY_SIBLING
    ON_CPU = 29  # OnCpu
    OFF_TIME = 30  # when it was queued for a CPU
    REST = 31  # what was left of its work then
    SLICE_END = 32  # NEVER: it ran out, and nobody waited
    GUEST_FROM = 33  # when it was, or will be, back in the guest; off its CPU: how much later than its CPU


class OnCpu(IntEnum):
    """What Cpu.ON_CPU says."""

    RUNS = 0
    QUEUED = 1
    SLEEPS = 2


class MmapLock(IntEnum):
    """What Cpu.MMAP and Vm.MMAP_WRITER say."""

    NONE = 0
    READ = 1
    WRITE = 2
    WAITS = 3


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
    ACTORS = 12  # who takes part in the step: actors 0 ... ACTORS - 1, then the daemons
    PAGE_WAITERS = 13
    SHIFT = 14  # page of the VMA that is gfn 0 of the slot
    PAGES = 15  # of the slot
    HOST_ORDER = 16  # of a host region: 9, or 18 for 1 GiB hugetlb
    LOGGING = 17  # KVM_MEM_LOG_DIRTY_PAGES
    DIRTY = 18  # the dirty bitmap is not empty
    CHILD = 19  # a child lives
    CHILD_BYTES = 20  # frames that only the child has by now
    ANON_VMA = 21  # fork has to copy the VMA
    KSM_SHARERS = 22  # entries that map a KSM page
    KSM_FRAMES = 23
    KSM_MERGES = 24
    MMAP_READERS = 25
    MMAP_WRITER = 26  # MmapLock
    KHUGE_TIME = 27  # absolute time of khugepaged's next pass
    KHUGE_REGION = 28  # where it goes on
    KHUGE_BUDGET = 29  # pages left in its pass
    KHUGE_HEADS = 30  # how often the pass has been at the VMA's start
    KSM_TIME = 31
    KSM_PAGE = 32
    KSM_BUDGET = 33
    CACHED = 34  # some page of the page cache may be there without being mapped
    DAEMONS = 35  # how many run beside the step's actors
    DELAY = 36  # what the present event waits for, besides its work
    MMU_LINE_OWNER = 37
    MMU_LINE_FREE = 38
    MMAP_LINE_OWNER = 39
    MMAP_LINE_FREE = 40
    ZONE_FREE = 41
    MEMORY_FREE = 42  # when the memory bus is, as far as traffic has begun
    TRAFFIC = 43  # bytes that the present event moves
    TRAFFIC_NS = 44
    SLICED = 45  # fewer CPUs than vCPUs: they take turns
    ENDLESS = 46  # some slice may have run out while nobody waited
    FREE_CPUS = 47
    RUN_HEAD = 48
    RUN_TAIL = 49
    WORKERS = 50  # how many of the step's actors have something to do
    CPUS = 51  # that those have
    WRITER_SINCE = 52  # when mmu_lock's writer got it


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
    START_PAGE = 16  # VMM, PREFAULT, OUTSIDE, CALL: pages [START_PAGE, END_PAGE), of the slot
    END_PAGE = 17
    CALL = 18  # Call
    SIZE_PAGES = 19  # dontneed: pages of one call
    EVERY_PAGES = 20  # dontneed: from one call to the next
    FRACTION_CUT = 21  # ksm_merge, of 2**20
    IDLE_NS = 22
    SKIP_HITS = 23


class Setup(IntEnum):
    """Index of Env.setup: what a point is, as far as it is neither policy nor cost."""

    MMU = 0
    MAX_ORDER = 1  # of a leaf, by the shift against the guest's address and, under shadow paging, the guest's page
    RECOVER_ORDER = 2  # the same without the guest's page
    DIRECT = 3  # KVM's tables are direct: all but shadow paging with 4K guest pages
    NX = 4
    EAGER_SPLIT = 5
    PML = 6
    HUGETLB = 7
    SHARED = 8
    FILE = 9  # pages live in the page cache, 4K or huge
    THP_FAILURE_CUT = 10
    KHUGEPAGED = 11  # 1: the daemon runs
    KHUGE_PAGES = 12
    KHUGE_SLEEP_NS = 13
    KHUGE_MAX_NONE = 14
    KSM = 15
    KSM_PAGES = 16
    KSM_SLEEP_NS = 17
    KSM_CUT = 18
    CORES = 19  # 0: a CPU for everybody
    SMT = 20


class Trace(IntEnum):
    """Columns of Machine.trace."""

    TIME = 0
    ACTOR = 1
    PHASE = 2
    GFN = 3
    WRITE = 4  # 1: write, 2: instruction fetch
    HOST_PMD = 5
    HOST_PTE = 6
    SPTE_PMD = 7
    SPTE = 8
    SEQ = 9


# Latency histogram: log-linear, 128 buckets per power of two (error below 0.8 %); exact below 256 ns; the last bucket
# holds all from 2**43 ns (2.4 hours) on.
HIST_SUB_BITS = 7
HIST_BUCKETS = (44 - HIST_SUB_BITS) << HIST_SUB_BITS


def packed(table: Mapping[int, int]) -> int:
    """A table of values 0 ... 15 over small keys as one integer, for compiled code: see lookup(). Keys it lacks hold 0."""
    return sum(int(value) << (4 * int(key)) for key, value in table.items())


def _dense(table: type[IntEnum]) -> None:
    """Every enum that sizes an array counts up from 0 without gaps."""
    if [int(m) for m in table] != list(range(len(table))):
        raise AssertionError(f"{table.__name__} is not dense")


assert [int(m) for m in Spte] == [int(m) for m in SptePmd][: len(Spte)]  # leaves are the same at both levels
for _table in (HostPmd, HostPte, SptePmd, Spte, Mmu, Backing, Phase, Outcome, Action, Counter, Gauge, Cpu, Vm, Stream, Setup, Trace):
    _dense(_table)
assert PMD_BYTES == 2 << 20
assert max(HostPte) <= HOST_MASK and max(Spte) << SPTE_SHIFT <= 0xFF
