"""khugepaged and ksmd in virtual time, beside the actors of a step. docs/model.md section 10.

Their pairs go through the phases of mmu_notifier.py; what is theirs is when they look, and what they do inside a pair.
"""

import numpy as np

from kernels.calls import (
    UNFOLDED,
    can_collapse,
    copy_into_thp,
    is_mergeable,
    is_selected,
    is_stable_page,
    set_collapsed,
    set_merged,
    unshare_folio,
)
from kernels.contention import move_memory
from kernels.cost import Cost
from kernels.fault import run_phase
from kernels.jit import jit
from kernels.locks import lock_mmap_write, release, unlock_mmap_write
from kernels.mmu_notifier import FOR_WRITE, flush_host, plan_callback, replaces_page
from kernels.primary_mmu import split_region, thp_fails
from kernels.spec import (
    MAX_PTES_SHARED,
    PMD_ORDER,
    PMD_PAGES,
    Action,
    Actor,
    Counter,
    Cpu,
    HostPmd,
    HostPte,
    Phase,
    Setup,
    Vm,
)
from kernels.state import Env, Machine, host_pte, host_region, host_state, lookup, set_host_pte

SHARED_LIMIT = np.int64(MAX_PTES_SHARED)


@jit
def start_daemon(m: Machine, actor: int, kind: int, at: int) -> None:
    c = m.cpu[actor]
    c[:] = 0
    c[Cpu.WAIT_PAGE] = -1
    c[Cpu.KIND] = kind
    c[Cpu.PHASE] = Phase.SCAN
    c[Cpu.PAGE] = m.vm[Vm.SHIFT]
    c[Cpu.TIME] = max(0, at - m.vm[Vm.CLOCK])


@jit
def start_daemons(m: Machine, env: Env) -> None:
    """Their rows follow those of the step's actors."""
    actor = m.vm[Vm.ACTORS]
    if env.setup[Setup.KHUGEPAGED]:
        start_daemon(m, actor, Actor.KHUGEPAGED, m.vm[Vm.KHUGE_TIME])
        actor += 1
    if env.setup[Setup.KSM]:
        start_daemon(m, actor, Actor.KSMD, m.vm[Vm.KSM_TIME])
        actor += 1
    m.vm[Vm.DAEMONS] = actor - m.vm[Vm.ACTORS]


@jit
def stop_daemons(m: Machine) -> None:
    """Keep the absolute times of what they do next."""
    for actor in range(m.vm[Vm.ACTORS], m.vm[Vm.ACTORS] + m.vm[Vm.DAEMONS]):
        at = m.vm[Vm.CLOCK] + m.cpu[actor, Cpu.TIME]
        m.vm[Vm.KHUGE_TIME if m.cpu[actor, Cpu.KIND] == Actor.KHUGEPAGED else Vm.KSM_TIME] = at


@jit
def khugepaged_wants(m: Machine, env: Env, region: int) -> bool:
    return can_collapse(m, env, region, env.setup[Setup.KHUGE_MAX_NONE], SHARED_LIMIT)


@jit
def rest_khugepaged(m: Machine, env: Env, actor: int) -> bool:
    """Back to scanning; the pass is over when its budget is used up or it has been everywhere."""
    m.cpu[actor, Cpu.PHASE] = Phase.SCAN
    if m.vm[Vm.KHUGE_BUDGET] <= 0 or m.vm[Vm.KHUGE_HEADS] == 2:
        m.vm[Vm.KHUGE_BUDGET] = 0
        m.cpu[actor, Cpu.TIME] += env.setup[Setup.KHUGE_SLEEP_NS]
    return False


@jit
def scan_region(m: Machine, env: Env, actor: int) -> bool:
    """khugepaged_scan_mm_slot(): one region."""
    vm = m.vm
    c = m.cpu[actor]
    if vm[Vm.KHUGE_BUDGET] <= 0:
        vm[Vm.KHUGE_BUDGET] = env.setup[Setup.KHUGE_PAGES]
        vm[Vm.KHUGE_HEADS] = vm[Vm.KHUGE_REGION] == 0
    region = vm[Vm.KHUGE_REGION]
    vm[Vm.KHUGE_BUDGET] -= PMD_PAGES
    vm[Vm.KHUGE_REGION] += 1
    if vm[Vm.KHUGE_REGION] == len(m.host_pmd):
        vm[Vm.KHUGE_REGION] = 0
        vm[Vm.KHUGE_HEADS] += 1
    c[Cpu.TIME] += env.costs[Cost.SCAN_PTE_NS] * (PMD_PAGES if m.host_pmd[region] == HostPmd.TBL else 1)
    fails = env.setup[Setup.THP_FAILURE_CUT] > 0 and thp_fails(env, region)
    if fails or not khugepaged_wants(m, env, region):
        return rest_khugepaged(m, env, actor)
    m.counters[Counter.THP_COLLAPSE_ALLOC] += 1
    c[Cpu.PAGE] = max(region << PMD_ORDER, vm[Vm.SHIFT])
    c[Cpu.TIME] += env.costs[Cost.COLLAPSE_NS]
    c[Cpu.PHASE] = Phase.ALLOC
    return False


@jit
def on_alloc(m: Machine, env: Env, actor: int) -> bool:
    """collapse_huge_page(): mmap_lock for writing, then everything again."""
    if not lock_mmap_write(m, env, actor):
        return False
    c = m.cpu[actor]
    if not khugepaged_wants(m, env, host_region(m, c[Cpu.PAGE])):
        unlock_mmap_write(m, env, actor)
        return rest_khugepaged(m, env, actor)
    c[Cpu.ACTION] = Action.COLLAPSE
    c[Cpu.TIME] += env.costs[Cost.NOTIFIER_NS]
    c[Cpu.PHASE] = Phase.START
    return False


@jit
def on_copied(m: Machine, env: Env, actor: int) -> bool:
    set_collapsed(m, host_region(m, m.cpu[actor, Cpu.PAGE]))
    unlock_mmap_write(m, env, actor)
    return rest_khugepaged(m, env, actor)


@jit
def rest_ksmd(m: Machine, env: Env, actor: int) -> bool:
    c = m.cpu[actor]
    c[Cpu.PHASE] = Phase.SCAN
    c[Cpu.ACTION] = Action.NONE
    if m.vm[Vm.KSM_BUDGET] <= 0:
        c[Cpu.TIME] += env.setup[Setup.KSM_SLEEP_NS]
    return False


@jit
def scan_page(m: Machine, env: Env, actor: int) -> bool:
    """scan_get_next_rmap_item(): one page."""
    vm = m.vm
    c = m.cpu[actor]
    if vm[Vm.KSM_BUDGET] <= 0:
        vm[Vm.KSM_BUDGET] = env.setup[Setup.KSM_PAGES]
    i = vm[Vm.KSM_PAGE]
    vm[Vm.KSM_PAGE] = i + 1 if i + 1 < vm[Vm.PAGES] else 0
    vm[Vm.KSM_BUDGET] -= 1
    c[Cpu.TIME] += env.costs[Cost.SCAN_PTE_NS]
    page = vm[Vm.SHIFT] + i
    if not (is_selected(i, env.setup[Setup.KSM_CUT]) and is_mergeable(m, page)):
        return rest_ksmd(m, env, actor)
    c[Cpu.PAGE] = page
    c[Cpu.ACTION] = Action.NONE
    c[Cpu.TIME] += env.costs[Cost.KSM_MERGE_NS]
    c[Cpu.PHASE] = Phase.MERGE
    return False


@jit
def next_merge_action(m: Machine, actor: int) -> int:
    """The pair that comes next for ksmd's page; Action.NONE: no more."""
    c = m.cpu[actor]
    page, done = c[Cpu.PAGE], c[Cpu.ACTION]
    if done == Action.KSM_SPLIT:
        return Action.KSM_SETTLE
    if done == Action.KSM_PROTECT:
        return Action.KSM_REPLACE if c[Cpu.COMMITTED] and c[Cpu.OLD] != HostPte.KSM_RO else Action.NONE
    if done == Action.KSM_REPLACE:
        return Action.NONE
    pmd = host_state(m, page)
    if pmd != HostPmd.TBL:
        return Action.KSM_SPLIT if done == Action.NONE and is_mergeable(m, page) else Action.NONE
    pte = host_pte(m, page)
    if pte == HostPte.ANON_TRW or pte == HostPte.ANON_TSH:
        return Action.KSM_UNSHARE_FOLIO if done == Action.NONE else Action.NONE
    plain = pte == HostPte.ANON_RW or pte == HostPte.ANON_EX or pte == HostPte.ANON_SH
    return Action.KSM_PROTECT if plain else Action.NONE


@jit
def on_merge(m: Machine, env: Env, actor: int) -> bool:
    """try_to_merge_one_page(): its pairs, one after the other."""
    c = m.cpu[actor]
    action = next_merge_action(m, actor)
    if action == Action.NONE:
        return rest_ksmd(m, env, actor)
    if action != Action.KSM_REPLACE:
        c[Cpu.OLD] = host_pte(m, c[Cpu.PAGE])
    c[Cpu.ACTION] = action
    c[Cpu.TIME] += env.costs[Cost.NOTIFIER_NS]
    c[Cpu.PHASE] = Phase.START
    return False


@jit
def protect_page(m: Machine, actor: int) -> bool:
    """write_protect_page(): False if the page changed."""
    c = m.cpu[actor]
    page = c[Cpu.PAGE]
    if host_state(m, page) != HostPmd.TBL or host_pte(m, page) != c[Cpu.OLD]:
        return False
    if is_stable_page(m):
        set_merged(m, page)
        c[Cpu.OLD] = HostPte.KSM_RO  # there is nothing to replace
        return True
    if c[Cpu.OLD] == HostPte.ANON_RW:
        set_host_pte(m, page, HostPte.ANON_EX)
        c[Cpu.OLD] = HostPte.ANON_EX
    return True


@jit
def replace_page(m: Machine, actor: int) -> bool:
    """replace_page(): False if the page is no longer as write_protect_page() left it."""
    c = m.cpu[actor]
    page = c[Cpu.PAGE]
    if host_state(m, page) != HostPmd.TBL or host_pte(m, page) != c[Cpu.OLD]:
        return False
    set_merged(m, page)
    return True


@jit
def do_inside_pair(m: Machine, actor: int, action: int) -> bool:
    """What a daemon does where the entry is replaced; True: done, the VMM's TLB is to be flushed."""
    page = m.cpu[actor, Cpu.PAGE]
    region = host_region(m, page)
    if action == Action.COLLAPSE:
        m.host_pmd[region] = HostPmd.COLLAPSING
        return True
    if action == Action.KSM_SPLIT:
        pmd = m.host_pmd[region]
        if lookup(UNFOLDED, pmd) == HostPte.NONE:
            return False
        split_region(m, region, lookup(UNFOLDED, pmd))
        return True
    if action == Action.KSM_PROTECT:
        return protect_page(m, actor)
    if action == Action.KSM_REPLACE:
        return replace_page(m, actor)
    if action == Action.KSM_UNSHARE_FOLIO and m.host_pmd[region] == HostPmd.TBL:
        unshare_folio(m, region)
    return False


@jit
def on_daemon_start_done(m: Machine, env: Env, actor: int) -> bool:
    release(m, actor, FOR_WRITE)
    c = m.cpu[actor]
    action = c[Cpu.ACTION]
    done = do_inside_pair(m, actor, action)
    c[Cpu.COMMITTED] = done
    if done:
        flush_host(m, env, actor)
    ns = env.costs[Cost.SPLIT_PMD_NS] if action == Action.KSM_SPLIT else np.int64(0)
    return plan_callback(m, env, actor, np.int64(done and replaces_page(action)), ns)


@jit
def on_daemon_end_done(m: Machine, env: Env, actor: int) -> bool:
    release(m, actor, FOR_WRITE)
    c = m.cpu[actor]
    if c[Cpu.KIND] == Actor.KHUGEPAGED:
        ns = copy_into_thp(m, env, host_region(m, c[Cpu.PAGE]))
        move_memory(m, env, actor)
        c[Cpu.TIME] += ns
        c[Cpu.PHASE] = Phase.COPIED
        return False
    c[Cpu.PHASE] = Phase.MERGE
    return True


@jit
def run_daemon_phase(m: Machine, env: Env, actor: int) -> bool:
    """One phase of a daemon; True if its next phase belongs to the same event."""
    phase = m.cpu[actor, Cpu.PHASE]
    if phase == Phase.SCAN:
        return scan_region(m, env, actor) if m.cpu[actor, Cpu.KIND] == Actor.KHUGEPAGED else scan_page(m, env, actor)
    if phase == Phase.ALLOC:
        return on_alloc(m, env, actor)
    if phase == Phase.COPIED:
        return on_copied(m, env, actor)
    if phase == Phase.MERGE:
        return on_merge(m, env, actor)
    if phase == Phase.START_DONE:
        return on_daemon_start_done(m, env, actor)
    if phase == Phase.END_DONE:
        return on_daemon_end_done(m, env, actor)
    return run_phase(m, env, actor)
