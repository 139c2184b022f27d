"""Running one step of a single actor: the same counters, state, times and latencies as the event loop, faster.

Accesses are made in blocks (blocks.py) and looked up in a table of what the event loop's phases do (learned.py). What
is not in the table goes through those phases, at its place in the order. Each cell of memory (a 2M region; where the
host's regions lie across the guest's, the part of one in the other) has a mode that says which of its accesses can be
looked up; only the phases, and the first access of a region, change it.
"""

from typing import NamedTuple

import numpy as np

from kernels.blocks import BLOCK, WRITES, count_writes, fill_block, is_run_of_pages, next_run
from kernels.engine import NO_END, OVER, SPLIT, start_step
from kernels.jit import jit, prefetch, shared
from kernels.learned import CLASSES, FRESH, LEAF, UNKNOWN, PageTable, fold, forget_all, learn, run_access
from kernels.mmu import is_leaf
from kernels.skip import Skip, fill_firsts, start_skipping, writes_of_hits
from kernels.spec import (
    PAGE_SHIFT,
    PMD_ORDER,
    PMD_PAGES,
    PUD_ORDER,
    Access,
    Actor,
    Counter,
    Cpu,
    HostPmd,
    Order,
    Phase,
    Spte,
    SptePmd,
    Stream,
    Vm,
)
from kernels.state import Bytes, Env, Int64s, Machine, guest_region, host_region, host_state, slot_end

# Modes: bit 0: a huge leaf allows reads, bit 1: and writes, bit 2: the page's byte says it, bit 3: nothing is there yet.
SLOW, LEAF_READ, LEAF_ALL, PAGED, UNTOUCHED = np.int64(0), np.int64(1), np.int64(3), np.int64(4), np.int64(8)
MODES = 9
AHEAD = 32  # accesses from the prefetch of a page's byte to its use
FAILED, DONE, LEARNED = np.int64(0), np.int64(1), np.int64(2)  # what became of a slow access
LANE_1, LANE_2, LANE_3 = np.uint64(CLASSES), np.uint64(2 * CLASSES), np.uint64(3 * CLASSES)
U0, U1, U2 = np.uint64(0), np.uint64(1), np.uint64(2)


class Scratch(NamedTuple):
    """What a step of a lone actor needs besides the machine; holds nothing from one step to the next."""

    modes: Bytes  # (cells,)
    span: Int64s  # (2,) cells that the step may touch, [first, end)
    tally: Int64s  # (MODES,) how many of them are in each mode
    units: Int64s  # (BLOCK,)
    block: Int64s  # (BLOCK + AHEAD,) accesses
    paged: Int64s  # (BLOCK,) those of a block whose page's byte has to be looked at


def new_scratch(m: Machine) -> Scratch:
    cells = 2 * len(m.spte_pmd) + 2 if m.vm[Vm.SHIFT] % PMD_PAGES else len(m.spte_pmd)
    return Scratch(
        modes=np.empty(cells, np.uint8),
        span=np.zeros(2, np.int64),
        tally=np.zeros(MODES, np.int64),
        units=np.empty(BLOCK, np.int64),
        block=np.zeros(BLOCK + AHEAD, np.int64),
        paged=np.empty(BLOCK, np.int64),
    )


@jit
def crossing(m: Machine) -> int:
    """-1 where host regions lie across the guest's, else 0: a mask for pages, see cell_of()."""
    return np.int64(-1) if m.vm[Vm.SHIFT] & (PMD_PAGES - 1) else np.int64(0)


@jit
def cell_of(page: int, shift: int, across: int) -> int:
    """The page's cell: the number of region starts, of the guest and (if they lie across) of the host, up to it."""
    return ((page - shift) >> PMD_ORDER) + (((page & across) - (shift & across & -PMD_PAGES)) >> PMD_ORDER)


@jit
def cell_start(cell: int, shift: int, across: int) -> int:
    """The first page of a cell."""
    if not across:
        return shift + (cell << PMD_ORDER)
    if cell & 1:
        return ((shift >> PMD_ORDER) + ((cell + 1) >> 1)) << PMD_ORDER
    return shift + (cell >> 1 << PMD_ORDER)


@jit
def leaf_mode(env: Env, table: PageTable, leaf: int) -> int:
    """Of a cell below a huge leaf: what the leaf allows a vCPU."""
    if env.stream[Stream.ACTOR] != Actor.GUEST or table.after[LEAF] == UNKNOWN:
        return SLOW
    return LEAF_ALL if leaf == Spte.RW else LEAF_READ


@jit
def mode_of(m: Machine, env: Env, table: PageTable, page: int) -> int:
    """The mode of the cell that begins with that page."""
    if len(m.spte_pud) and is_leaf(m.spte_pud[(page - m.vm[Vm.SHIFT]) >> PUD_ORDER]):
        return leaf_mode(env, table, np.int64(m.spte_pud[(page - m.vm[Vm.SHIFT]) >> PUD_ORDER]))
    host, entry = host_state(m, page), np.int64(m.spte_pmd[guest_region(m, page)])
    if is_leaf(entry):
        return leaf_mode(env, table, entry)
    kind = env.stream[Stream.ACTOR]
    if host == HostPmd.TBL:
        return PAGED if entry >= SptePmd.T or kind == Actor.VMM or kind == Actor.HOST else SLOW
    whole = ((guest_region(m, page) + 1) << PMD_ORDER) <= m.vm[Vm.PAGES] and m.vm[Vm.HOST_ORDER] == PMD_ORDER
    return UNTOUCHED if host == HostPmd.NONE and entry == SptePmd.N and whole else SLOW


@shared
def note_modes(m: Machine, env: Env, table: PageTable, scratch: Scratch, first: int, end: int) -> None:
    """Cells [first, end) changed, perhaps."""
    shift, across = m.vm[Vm.SHIFT], crossing(m)
    for cell in range(max(first, scratch.span[0]), min(end, scratch.span[1])):
        mode = mode_of(m, env, table, cell_start(cell, shift, across))
        scratch.tally[scratch.modes[cell]] -= 1
        scratch.tally[mode] += 1
        scratch.modes[cell] = mode


@jit
def find_modes(m: Machine, env: Env, table: PageTable, scratch: Scratch) -> None:
    """The span of the step that begins, and the modes of its cells."""
    s = env.stream
    shift, across = m.vm[Vm.SHIFT], crossing(m)
    first, last = shift, slot_end(m) - 1
    kind = s[Stream.ACTOR]
    if (kind == Actor.GUEST or kind == Actor.HOST) and s[Stream.ORDER] != Order.LIST:
        first = shift + (s[Stream.START_BYTES] >> PAGE_SHIFT)
        last = shift + ((s[Stream.START_BYTES] + (s[Stream.UNITS] - 1) * s[Stream.EVERY_BYTES]) >> PAGE_SHIFT)
    scratch.tally[:] = 0
    scratch.span[0] = scratch.span[1] = cell_of(first, shift, across)
    if m.cpu[0, Cpu.INDEX] >= m.cpu[0, Cpu.LIMIT]:
        return
    scratch.span[1] = cell_of(last, shift, across) + 1
    for cell in range(scratch.span[0], scratch.span[1]):
        mode = mode_of(m, env, table, cell_start(cell, shift, across))
        scratch.tally[mode] += 1
        scratch.modes[cell] = mode


@jit
def all_in(scratch: Scratch, cells: int) -> bool:
    """So many cells are all that the step may touch."""
    return cells == scratch.span[1] - scratch.span[0]


@jit
def touch_page(pte: Bytes, access: np.uint64, after: Bytes, seen: Int64s, lane: np.uint64) -> bool:
    """Look one access up. False: its class is not known, and nothing was done."""
    page = access >> U1
    k = np.uint64(pte[page]) * U2 + (access & U1)
    state = after[k]
    if state == UNKNOWN:
        return False
    pte[page] = state
    seen[lane + k] += 1
    return True


@jit
def touch_pages(pte: Bytes, block: Int64s, first: int, end: int, after: Bytes, seen: Int64s) -> int:
    """Look accesses [first, end) up in their order; returns the first whose class is not known, or the end."""
    for i in range(first, min(first + AHEAD, end)):
        prefetch(pte, block[i] >> 1)
    for i in range(first, end - 3, 4):
        prefetch(pte, block[i + AHEAD] >> 1)
        prefetch(pte, block[i + AHEAD + 1] >> 1)
        prefetch(pte, block[i + AHEAD + 2] >> 1)
        prefetch(pte, block[i + AHEAD + 3] >> 1)
        if not touch_page(pte, np.uint64(block[i]), after, seen, U0):
            return i
        if not touch_page(pte, np.uint64(block[i + 1]), after, seen, LANE_1):
            return i + 1
        if not touch_page(pte, np.uint64(block[i + 2]), after, seen, LANE_2):
            return i + 2
        if not touch_page(pte, np.uint64(block[i + 3]), after, seen, LANE_3):
            return i + 3
    for i in range(end - (end - first) % 4, end):
        if not touch_page(pte, np.uint64(block[i]), after, seen, U0):
            return i
    return end


@jit
def sort_out(m: Machine, scratch: Scratch, first: int, end: int, most: int) -> tuple[int, int, int, int]:
    """Accesses from `first` on that can be looked up, but at most so many whose page's byte is needed; those into `paged`.

    Returns the first access that is left, how many are in `paged`, and how many reads and writes a huge leaf allows."""
    shift, across = m.vm[Vm.SHIFT], crossing(m)
    paged, hits, writes = np.int64(0), np.int64(0), np.int64(0)
    for i in range(first, end):
        access = scratch.block[i]
        mode = np.int64(scratch.modes[cell_of(access >> 1, shift, across)])
        hit, look = (mode >> (access & 1)) & 1, (mode >> 2) & 1
        if hit + look == 0 or paged + look > most:
            return i, paged, hits - writes, writes
        scratch.paged[paged] = access
        paged += look
        hits += hit
        writes += hit & access
    return end, paged, hits - writes, writes


@jit
def touch_cells(m: Machine, table: PageTable, scratch: Scratch, first: int, end: int) -> int:
    """As touch_pages(), in any cells; returns the first access that has to be looked at closer, or the end."""
    stop, paged, reads, writes = sort_out(m, scratch, first, end, np.int64(BLOCK))
    done = touch_pages(m.pte, scratch.paged, np.int64(0), paged, table.after, table.seen)
    if done < paged:
        stop, paged, reads, writes = sort_out(m, scratch, first, stop, done)
    table.seen[LEAF] += reads
    table.seen[LEAF + 1] += writes
    return stop


@jit
def same_bytes(pte: Bytes, first: int, end: int) -> bool:
    """All unsigned and 8 bits wide, so that the loop runs over vectors of bytes."""
    different = np.uint8(0)
    for page in range(np.uint64(first), np.uint64(end)):
        different = np.uint8(different | (pte[page] ^ pte[first]))
    return different == 0


@jit
def fill_bytes(pte: Bytes, first: int, end: int, state: np.uint8) -> None:
    for page in range(np.uint64(first), np.uint64(end)):
        pte[page] = state


@jit
def touch_run(pte: Bytes, first: int, end: int, write: int, after: Bytes, seen: Int64s) -> int:
    """Pages [first, end) one after the other; returns the first whose class is not known, or the end."""
    k = np.int64(pte[first]) * 2 + write
    state = after[k]
    if state != UNKNOWN and same_bytes(pte, first, end):
        if state != pte[first]:
            fill_bytes(pte, first, end, state)
        seen[k] += end - first
        return end
    for page in range(first, end):
        if not touch_page(pte, np.uint64(page << 1 | write), after, seen, U0):
            return page
    return end


@jit
def touch_fresh(m: Machine, env: Env, table: PageTable, scratch: Scratch, page: int, write: int) -> None:
    """The first access of a region, of a class that is known."""
    k = FRESH + write
    table.seen[k] += 1
    m.host_pmd[host_region(m, page)] = table.host_pmd[k]
    m.spte_pmd[guest_region(m, page)] = table.spte_pmd[k]
    if table.after[k]:
        m.pte[page] = table.after[k]
    note_around(m, env, table, scratch, page)


@jit
def note_around(m: Machine, env: Env, table: PageTable, scratch: Scratch, page: int) -> None:
    """The regions of that page changed, perhaps."""
    across = crossing(m)
    cell = cell_of(page, m.vm[Vm.SHIFT], across)
    reach = across & 2
    note_modes(m, env, table, scratch, cell - reach, cell + reach + 1)


@jit
def gigantic_state(m: Machine, page: int) -> int:
    """The entries above the page's 2M regions; 0 where there are none."""
    if not len(m.spte_pud):
        return np.int64(0)
    return host_state(m, page) << 8 | np.int64(m.spte_pud[(page - m.vm[Vm.SHIFT]) >> PUD_ORDER])


@shared
def access_slowly(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, page: int, write: int, mode: int) -> int:
    """Learn the access's class (LEARNED), or go through its phases (DONE; FAILED: more than `budget` events)."""
    if mode == PAGED and learn(lab, m, env, table, np.int64(m.pte[page]) * 2 + write):
        return LEARNED
    if mode == UNTOUCHED and learn(lab, m, env, table, FRESH + write):
        return LEARNED
    m.cpu[0, Cpu.PAGE] = page
    m.cpu[0, Cpu.WRITE] = write
    return DONE if run_access(m, env, budget) else FAILED


@shared
def access_one(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, scratch: Scratch, page: int, write: int) -> int:
    """One access that could not be looked up with others: as access_slowly()."""
    mode = np.int64(scratch.modes[cell_of(page, m.vm[Vm.SHIFT], crossing(m))])
    if mode == UNTOUCHED and table.after[FRESH + write] != UNKNOWN:
        touch_fresh(m, env, table, scratch, page, write)
        return DONE
    above = gigantic_state(m, page)
    status = access_slowly(m, env, budget, lab, table, page, write, mode)
    if gigantic_state(m, page) != above:
        note_modes(m, env, table, scratch, np.int64(0), np.int64(len(scratch.modes)))
    elif status == DONE:
        note_around(m, env, table, scratch, page)
    return status


@shared
def run_block(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, scratch: Scratch, count: int) -> bool:
    """The accesses of scratch.block, in their order. False: more than `budget` events."""
    at = np.int64(0)
    while True:
        if all_in(scratch, scratch.tally[PAGED]):
            at = touch_pages(m.pte, scratch.block, at, count, table.after, table.seen)
        else:
            at = touch_cells(m, table, scratch, at, count)
        if at == count:
            return True
        access = scratch.block[at]
        status = access_one(m, env, budget, lab, table, scratch, access >> 1, access & 1)
        if status == FAILED:
            return False
        at += status == DONE


@jit
def skip_pages(m: Machine, env: Env, table: PageTable, scratch: Scratch, first: int, end: int, write: int) -> int:
    """Pages [first, end) one after the other, a cell at a time; returns the first that has to be looked at closer, or the end."""
    shift, across = m.vm[Vm.SHIFT], crossing(m)
    page = first
    while page < end:
        cell = cell_of(page, shift, across)
        mode = np.int64(scratch.modes[cell])
        stop = min(end, cell_start(cell + 1, shift, across))
        if (mode >> write) & 1:
            table.seen[LEAF + write] += stop - page
        elif mode == PAGED:
            stop = touch_run(m.pte, page, stop, write, table.after, table.seen)
            if stop == page:
                return page
        elif mode == UNTOUCHED and table.after[FRESH + write] != UNKNOWN:
            touch_fresh(m, env, table, scratch, page, write)
            stop = page + 1
        else:
            return page
        page = stop
    return end


@jit
def run_pages(
    m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, scratch: Scratch, first: int, end: int, write: int
) -> bool:
    """A vCPU (or the VMM) accesses pages [first, end). False: more than `budget` events."""
    page = first
    while True:
        page = skip_pages(m, env, table, scratch, page, end, write)
        if page == end:
            return True
        status = access_one(m, env, budget, lab, table, scratch, page, write)
        if status == FAILED:
            return False
        page += status == DONE


@jit
def allowed_everywhere(env: Env, scratch: Scratch, kind: int) -> bool:
    """Huge leaves allow all accesses of that kind of run."""
    cells = scratch.tally[LEAF_ALL] + (scratch.tally[LEAF_READ] if kind < WRITES else 0)
    return env.stream[Stream.ORDER] != Order.LIST and all_in(scratch, cells)


@jit
def run_touches(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, scratch: Scratch) -> bool:
    """All accesses of a vCPU, or of the VMM itself, in the order of the step. False: more than `budget` events."""
    s = env.stream
    shift, lo = m.vm[Vm.SHIFT], m.cpu[0, Cpu.LO]
    n = m.cpu[0, Cpu.HI] - lo
    index, limit = m.cpu[0, Cpu.INDEX], m.cpu[0, Cpu.LIMIT]
    while index < limit:
        run = next_run(env, index, limit)
        kind, visit, length = run
        if allowed_everywhere(env, scratch, kind):
            reads, writes = count_writes(env, run)
            table.seen[LEAF] += reads
            table.seen[LEAF + 1] += writes
            index += length
        elif is_run_of_pages(env, kind):
            unit = visit % n
            used = min(length, n - unit)
            page = shift + (s[Stream.START_BYTES] >> PAGE_SHIFT) + lo + unit
            if not run_pages(m, env, budget, lab, table, scratch, page, page + used, kind):
                return False
            index += used
        else:
            count, used = fill_block(env, run, index, lo, n, shift, scratch.units, scratch.block)
            if not run_block(m, env, budget, lab, table, scratch, count):
                return False
            index += used
    return True


@shared
def run_firsts(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, skip: Skip, scratch: Scratch) -> int:
    """The same with all hits that are no page's first read or write counted at once. OVER, or why not."""
    n = m.cpu[0, Cpu.HI] - m.cpu[0, Cpu.LO]
    start_skipping(env, skip, m.cpu[0, Cpu.LIMIT], n)
    while True:
        count = fill_firsts(env, skip, n, m.vm[Vm.SHIFT], scratch.block)
        if count == 0:
            break
        if not run_block(m, env, budget, lab, table, scratch, count):
            return NO_END
        if m.counters[Counter.THP_SPLIT_PMD]:
            return SPLIT
    writes = writes_of_hits(env, skip)
    table.seen[LEAF] += skip.left[2] - writes
    table.seen[LEAF + 1] += writes
    return OVER


@jit
def run_cursor(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, scratch: Scratch, pagewise: bool) -> bool:
    """All that an actor does which goes from page to page by itself. False: more than `budget` events."""
    c = m.cpu[0]
    shift, limit = m.vm[Vm.SHIFT], c[Cpu.LIMIT]
    write = np.int64(c[Cpu.KIND] == Actor.VMM and env.stream[Stream.ACCESS] == Access.WRITE)
    while c[Cpu.INDEX] < limit:
        if not pagewise:
            if access_slowly(m, env, budget, lab, table, shift + c[Cpu.INDEX], write, SLOW) == FAILED:
                return False
            continue
        c[Cpu.INDEX] = skip_pages(m, env, table, scratch, shift + c[Cpu.INDEX], shift + limit, write) - shift
        if c[Cpu.INDEX] < limit and access_one(m, env, budget, lab, table, scratch, shift + c[Cpu.INDEX], write) == FAILED:
            return False
    return True


@shared
def run_alone(m: Machine, env: Env, budget: int, lab: Machine, table: PageTable, skip: Skip, scratch: Scratch) -> int:
    """One step with a single actor. Returns its ns, or why there is none: NO_END, SPLIT."""
    start_step(m, env)
    kind = env.stream[Stream.ACTOR]
    touches = kind == Actor.GUEST or kind == Actor.HOST
    pagewise = touches or kind == Actor.VMM or kind == Actor.PREFAULT
    forget_all(table)
    if pagewise:
        if kind == Actor.GUEST:
            for write in range(2):
                learn(lab, m, env, table, LEAF + write)
        find_modes(m, env, table, scratch)
    if env.stream[Stream.SKIP_HITS]:
        over = run_firsts(m, env, budget, lab, table, skip, scratch)
    elif touches:
        over = OVER if run_touches(m, env, budget, lab, table, scratch) else NO_END
    else:
        over = OVER if run_cursor(m, env, budget, lab, table, scratch, pagewise) else NO_END
    if over != OVER:
        return over
    m.cpu[0, Cpu.PHASE] = Phase.DONE
    fold(m, table)
    return m.cpu[0, Cpu.TIME]
