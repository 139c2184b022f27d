"""Why one setting is faster than another: which exits it saves, and what the rest of the difference went to."""

from collections.abc import Callable, Mapping

from sweep.quantity import human_time
from sweep.recommend.ranking import GUEST, Row
from sweep.report.facts import PARTS

MIN_SHARE = 0.02  # of the rival's exits, or of the difference in time: less is not worth a sentence


def copies(row: Row) -> float:
    """Copy-on-write of what was read, or shared, before, after which the page is faulted in once more."""
    return max(0.0, float(row["cow_4k"] + row["cow_huge"] - row["spte_prefetch"]))


def double_faults(row: Row) -> float:
    """Exits of pages that are copied, and those in vain because a notifier ran meanwhile: what CoW costs beside the first touch."""
    return copies(row) + float(row["pf_retry"])


EXITS: Mapping[str, Callable[[Row], float]] = {
    "CoW double faults": double_faults,
    "faults that map a page or make it writable": lambda row: max(0.0, float(row["pf_fixed"]) - copies(row)),
    "spurious faults": lambda row: float(row["pf_spurious"]),
    "kicks of vCPUs by TLB flushes and full dirty logs": lambda row: float(row["exits"] - row["pf_taken"]),
}


def reasons(best: Row, rival: Row) -> list[str]:
    """Sentences, the strongest first; `best` and `rival` are rows of a Ranking (its row())."""
    found = [text for text in (_exits(best, rival), _beforehand(best, rival), _time(best, rival)) if text]
    return found or [_handling(best, rival)]


def _exits(best: Row, rival: Row) -> str:
    saved = {name: count(rival) - count(best) for name, count in EXITS.items()}
    name = max(saved, key=lambda name: saved[name])
    if saved[name] <= MIN_SHARE * rival["exits"]:
        return ""
    of = f"{EXITS[name](rival):,.0f} of {rival['exits']:,.0f} exits with {rival['label']} are {name}"
    parts = f" ({copies(rival):,.0f} copies, {rival['pf_retry']:,.0f} retries)" if EXITS[name] is double_faults else ""
    return f"{of}{parts}; {best['label']} has {EXITS[name](best):,.0f} of {best['exits']:,.0f}"


def _time(best: Row, rival: Row) -> str:
    more = {text: float(rival[name] - best[name]) for name, text in PARTS.items()}
    text = max(more, key=lambda text: more[text])
    total = float((rival["guest_ns"] - best["guest_ns"]) * max(1, int(rival["vcpus"])))
    if more[text] <= max(0.0, MIN_SHARE * total):
        return ""
    return f"{text}: {human_time(more[text] / 1e9)} more with {rival['label']}, summed over its vCPUs and the VMM's threads"


def _beforehand(best: Row, rival: Row) -> str:
    """Preallocation, which is the VMM's time."""
    if best["prealloc"] == "none" or rival["prealloc"] != "none":
        return ""
    spent, less = (float(row["total_ns"] - row[GUEST]) for row in (best, rival))
    return f"with {best['label']} the VMM allocates the memory, in {human_time(max(0.0, spent - less) / 1e9)}, not the guest's faults"


def _handling(best: Row, rival: Row) -> str:
    """Of about the same exits."""
    more = float(rival["fault_ns"] - best["fault_ns"])
    if more <= 0:
        return "both take the same exits; nothing in the model tells them apart"
    return f"both take about the same exits; those with {rival['label']} take {human_time(more / 1e9)} longer, summed over its vCPUs"
