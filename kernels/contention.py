"""What several actors share besides the locks' meaning: cache lines, zone->lock, page-table locks, memory bandwidth.

docs/model.md section 12. Each of them delays the actor's next event (Vm.DELAY) and changes nothing else.
"""

from kernels.cost import Cost
from kernels.jit import jit, shared
from kernels.spec import NEVER, PAGE_SHIFT, PMD_ORDER, PUD_ORDER, Action, Counter, Cpu, OnCpu, Phase, Setup, Vm
from kernels.state import Env, Machine

ANY_SIBLING = -1  # in Cpu.SIBLING: it changes
SMALL_LIST, HUGE_LIST = 63, 2  # zone_batchsize() of a large zone; nr_pcp_alloc() of order 9
SMALL_ACTIONS = sum(
    1 << action for action in (Action.ALLOC_4K, Action.ALLOC_SHMEM, Action.READ_FILE, Action.COW_FILE, Action.COW_4K, Action.COPY_4K)
)
HUGE_ACTIONS = sum(1 << action for action in (Action.ALLOC_THP, Action.ALLOC_SHMEM_THP, Action.THP_FOR_HUGE_ZERO))


@jit
def own_line(m: Machine, env: Env, actor: int, owner: int) -> int:
    """Fetch the cache line of a lock word (Vm.*_LINE_OWNER; the time it is free comes behind it); returns ns until it is there."""
    vm = m.vm
    if vm[owner] == actor or vm[Vm.CPUS] == 1:
        return 0
    now = m.cpu[actor, Cpu.TIME]
    free = owner + 1
    ready = max(now, vm[free]) + env.costs[Cost.LINE_NS] + env.costs[Cost.LINE_CPU_NS] * (vm[Vm.CPUS] - 1)
    vm[owner] = actor
    vm[free] = ready
    m.counters[Counter.CACHE_LINE_WAIT_NS] += ready - now
    return ready - now


@jit
def wait_until(m: Machine, actor: int, free: int, waited: int) -> int:
    """Delay the actor until a short lock is free, and count that; returns when it has the lock."""
    now = m.cpu[actor, Cpu.TIME]
    start = max(now, free)
    m.vm[Vm.DELAY] += start - now
    m.counters[waited] += start - now
    return start


@jit
def refill(m: Machine, env: Env, actor: int, action: int) -> None:
    """An action takes a page from its CPU's list, and waits for zone->lock if that is empty (rmqueue_pcplist())."""
    small = (SMALL_ACTIONS >> action) & 1
    huge = (HUGE_ACTIONS >> action) & 1
    if not (small or huge) or m.vm[Vm.WORKERS] == 1:
        return
    c = m.cpu[actor]
    pages, batch = (Cpu.PCP_SMALL, SMALL_LIST) if small else (Cpu.PCP_HUGE, HUGE_LIST)
    if c[pages] == 0:
        c[pages] = batch
        m.vm[Vm.ZONE_FREE] = wait_until(m, actor, m.vm[Vm.ZONE_FREE], Counter.ZONE_LOCK_WAIT_NS) + env.costs[Cost.ZONE_LOCK_NS]
    c[pages] -= 1


@jit
def lock_pmd(m: Machine, env: Env, actor: int) -> None:
    """__split_huge_pmd() holds the lock of the page's PMD table from now on."""
    table = m.cpu[actor, Cpu.PAGE] >> PUD_ORDER
    m.pmd_lock[table] = wait_until(m, actor, m.pmd_lock[table], Counter.PAGE_TABLE_LOCK_WAIT_NS) + env.costs[Cost.SPLIT_PMD_NS]


@jit
def add_traffic(m: Machine, nbytes: int, ns: int) -> None:
    """Memory traffic that the present event begins, and what it takes a CPU that has the memory to itself."""
    m.vm[Vm.TRAFFIC] += nbytes
    m.vm[Vm.TRAFFIC_NS] += ns


@jit
def slowed(env: Env, ns: int) -> int:
    """Work on a core whose other hardware thread works too."""
    return ns * env.costs[Cost.SMT_NS] // 1000


@jit
def is_working(m: Machine, actor: int) -> bool:
    """The actor is on a CPU, if only to spin."""
    return m.cpu[actor, Cpu.PHASE] != Phase.DONE and m.cpu[actor, Cpu.ON_CPU] == OnCpu.RUNS


@shared
def shares_core(m: Machine, env: Env, sibling: int) -> bool:
    """Cpu.SIBLING works; or, where CPUs are given from vCPU to vCPU, more of them are in use than there are cores."""
    if sibling == ANY_SIBLING:
        return m.vm[Vm.CPUS] - m.vm[Vm.FREE_CPUS] > env.setup[Setup.CORES]
    return is_working(m, sibling - 1)


@jit
def own_work(m: Machine, env: Env, actor: int, ns: int) -> int:
    """What so much work takes the actor where it runs now."""
    sibling = m.cpu[actor, Cpu.SIBLING]
    return slowed(env, ns) if sibling and shares_core(m, env, sibling) else ns


@jit
def move_memory(m: Machine, env: Env, actor: int) -> None:
    """The event's traffic goes over the memory bus: after what is on its way there, or beside it with its share of the bandwidth."""
    vm = m.vm
    if vm[Vm.TRAFFIC] == 0:
        return
    now = m.cpu[actor, Cpu.TIME]
    alone = env.costs[Cost.MEMORY_2M_NS] * (vm[Vm.TRAFFIC] >> PAGE_SHIFT) >> PMD_ORDER
    vm[Vm.MEMORY_FREE] = max(vm[Vm.MEMORY_FREE], now) + alone
    through = min((vm[Vm.CPUS] + vm[Vm.DAEMONS]) * alone, vm[Vm.MEMORY_FREE] - now)
    wait = max(0, through - own_work(m, env, actor, vm[Vm.TRAFFIC_NS]))
    vm[Vm.TRAFFIC] = 0
    vm[Vm.TRAFFIC_NS] = 0
    vm[Vm.DELAY] += wait
    m.counters[Counter.BANDWIDTH_WAIT_NS] += wait


@jit
def settle(m: Machine, env: Env, actor: int, begin: int) -> bool:
    """Add an event's delay, and what a shared core adds to its work since `begin`; False: the actor goes on later."""
    c = m.cpu[actor]
    delay = m.vm[Vm.DELAY]
    if c[Cpu.TIME] < NEVER:
        c[Cpu.TIME] = begin + own_work(m, env, actor, c[Cpu.TIME] - begin)
    if delay == 0:
        return True
    m.vm[Vm.DELAY] = 0
    c[Cpu.TIME] += delay
    return False
