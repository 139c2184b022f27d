"""KVM's page table for the guest as plain state: arch/x86/kvm/mmu/tdp_mmu.c and mmu.c without locks, flushes and time.

An entry of order 18, 9 or 0 (1G, 2M, 4K) maps 2**order pages from gfn `index << order` on. Below a table are entries of
the next lower order; below anything else there are none. A 4K entry is a SptePmd here as well: leaves are the same.
"""

from collections.abc import Iterator

from kernels.spec import PMD_ORDER, Access, SptePmd

TABLES = (SptePmd.T, SptePmd.T_NX)
WRITABLE = (SptePmd.RW, SptePmd.RW_CLEAN)
FANOUT = 1 << PMD_ORDER


class Sptes:
    """The entries by order and index; what is not there is N."""

    def __init__(self, orders: tuple[int, ...], nx_huge_pages: bool) -> None:
        self.orders = orders  # the highest first
        self.nx_huge_pages = nx_huge_pages
        self.entries: dict[int, dict[int, SptePmd]] = {order: {} for order in orders}
        self.leaves = dict.fromkeys(orders, 0)  # how many there are

    # ---- One entry ---------------------------------------------------------------------------------------------------

    def at(self, order: int, gfn: int) -> SptePmd:
        return self.entries[order].get(gfn >> order, SptePmd.N)

    def put(self, order: int, gfn: int, new: SptePmd) -> None:
        old = self.entries[order].pop(gfn >> order, SptePmd.N)
        if new != SptePmd.N:
            self.entries[order][gfn >> order] = new
        self.leaves[order] += is_leaf(new) - is_leaf(old)

    def walk(self, gfn: int) -> tuple[int, SptePmd]:
        """The entry where the walk for that gfn ends, and its order: a leaf, or N."""
        for order in self.orders:
            entry = self.at(order, gfn)
            if entry not in TABLES:
                return order, entry
        raise AssertionError("a 4K entry is no table")

    def leaf_allows(self, order: int, entry: SptePmd, access: Access) -> bool:
        """is_access_allowed(): nx_huge_pages takes the execute right from huge leaves."""
        if access == Access.WRITE:
            return entry in WRITABLE
        return is_leaf(entry) and not (access == Access.EXEC and order > 0 and self.nx_huge_pages)

    def allows(self, gfn: int, access: Access) -> bool:
        """The guest's access needs no exit."""
        return self.leaf_allows(*self.walk(gfn), access)

    def set_dirty(self, gfn: int) -> bool:
        """The processor writes through the leaf and sets its Dirty bit. True if it was clear."""
        order, entry = self.walk(gfn)
        if entry == SptePmd.RW_CLEAN:
            self.put(order, gfn, SptePmd.RW)
        return entry == SptePmd.RW_CLEAN

    # ---- Tables ------------------------------------------------------------------------------------------------------

    def below(self, order: int, gfn: int) -> range:
        """First gfns of the entries in the table at that place."""
        first = gfn >> order << order
        return range(first, first + (1 << order), 1 << order - PMD_ORDER)

    def drop(self, order: int, gfn: int) -> None:
        """The entry goes, and all below it."""
        if self.at(order, gfn) in TABLES:
            for child in self.below(order, gfn):
                self.drop(order - PMD_ORDER, child)
        self.put(order, gfn, SptePmd.N)

    def split(self, order: int, gfn: int, table: SptePmd) -> None:
        """tdp_mmu_split_huge_page(): a table of leaves with the same rights in place of a huge leaf."""
        rights = self.at(order, gfn)
        self.put(order, gfn, table)
        for child in self.below(order, gfn):
            self.put(order - PMD_ORDER, child, rights)

    def make_way(self, gfn: int, goal: int, table: SptePmd, in_place: bool) -> bool:
        """Tables down to the entry of order `goal`, no table there. A huge leaf on the way is split in place, or goes.

        True if what went needs a flush."""
        flush = False
        for order in self.orders:
            entry = self.at(order, gfn)
            if order == goal:
                if entry in TABLES:
                    self.drop(order, gfn)
                return flush or entry in TABLES
            if is_leaf(entry) and in_place:
                self.split(order, gfn, table)
            elif entry not in TABLES:
                self.put(order, gfn, table)
                flush |= is_leaf(entry)
        raise AssertionError(f"no entries of order {goal}")

    # ---- Leaves ------------------------------------------------------------------------------------------------------

    def zap_leafs(self, start: int, end: int) -> bool:
        """tdp_mmu_zap_leafs(): leaves over [start, end) go, tables stay. True if there was one, so that a flush is due."""
        return self.zap_below(0, start, end)

    def zap_below(self, depth: int, start: int, end: int) -> bool:
        """The same, from the entries of order `orders[depth]` down."""
        order, zapped = self.orders[depth], False
        for index in range(start >> order, (end - 1 >> order) + 1):
            first = index << order
            entry = self.at(order, first)
            if entry in TABLES:
                zapped |= self.zap_below(depth + 1, max(start, first), min(end, first + (1 << order)))
            elif is_leaf(entry):
                self.put(order, first, SptePmd.N)
                zapped = True
        return zapped

    def all_leaves(self) -> list[tuple[int, int, SptePmd]]:
        """(order, gfn, leaf), in no certain order."""
        return [
            (order, index << order, entry) for order in self.orders for index, entry in self.entries[order].items() if entry not in TABLES
        ]

    def all_tables(self, order: int) -> list[int]:
        """First gfns, in order."""
        return [index << order for index, entry in sorted(self.entries[order].items()) if entry in TABLES]

    def leaves_below(self, order: int, gfn: int) -> Iterator[SptePmd]:
        """Of the table at that place, in order of address."""
        for child in self.below(order, gfn):
            entry = self.at(order - PMD_ORDER, child)
            if entry in TABLES:
                yield from self.leaves_below(order - PMD_ORDER, child)
            elif is_leaf(entry):
                yield entry


def is_leaf(entry: SptePmd) -> bool:
    """is_shadow_present_pte() && is_last_spte()."""
    return entry != SptePmd.N and entry not in TABLES
