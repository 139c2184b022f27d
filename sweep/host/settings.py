"""Settings of the host that a case needs."""

from sweep.host.case import Case

THP = "/sys/kernel/mm/transparent_hugepage"
NR_HUGEPAGES = "/proc/sys/vm/nr_hugepages"
HUGETLB_PAGES = 24


def settings_of(case: Case) -> dict[str, str]:
    """File -> value: what the case's prediction takes for granted."""
    point = case.point
    return {
        f"{THP}/enabled": point.thp_enabled,
        f"{THP}/use_zero_page": str(int(point.use_zero_page)),
        f"{THP}/shmem_enabled": "advise" if point.backing == "shmem_thp" else "never",
    }
