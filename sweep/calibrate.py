"""`faultsweep calibrate`: costs measured on this machine, or with `--from FILE` fitted to observed rates, and what those say of each."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from kernels.cost import MAX_COST_NS, Cost
from sweep.configs import COST_NAMES, CostFile, load_costs
from sweep.cost_text import cost_toml
from sweep.dataset.files import publish
from sweep.errors import UsageError
from sweep.files import nearest
from sweep.fit import Bounds, Fit, Floats, Rates, Sum, fit
from sweep.observations import Observation, load_observations

if TYPE_CHECKING:
    from sweep.measure.run import Measurement

VAGUE = 0.6  # a relative error from which on none is shown


@dataclass(frozen=True)
class CalibrateOptions:
    """What to fit, to which rows, and where the result goes; without `source`, how much measuring may use."""

    source: str | None = None  # --from
    out: Path | None = None
    costs: str = "default"
    hosts: Sequence[str] = ()
    cases: Sequence[str] = ()
    widen: Sequence[str] = ()
    hold: Sequence[str] = ()
    note: str = ""
    leave_one_out: bool = False
    seconds: float | None = None
    memory: str | None = None
    say: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Calibration:
    """A fit with all that is told about it."""

    options: CalibrateOptions
    base: CostFile
    rows: tuple[Observation, ...]
    fit: Fit
    held: frozenset[Cost]
    left_out: Mapping[str, float]  # case -> what a fit to the other rows predicts
    file: CostFile

    def row_table(self) -> pd.DataFrame:
        """Row by row: observed, predicted before and after, predicted over observed."""
        table = []
        for i, row in enumerate(self.rows):
            entry = {
                "row": row.case,
                "metric": row.metric,
                "observed": _figure(row.value),
                "before": _figure(self.fit.before[i]),
                "fitted": _figure(self.fit.after[i]),
                "fitted/observed": f"{self.fit.after[i] / row.value:.3f}",
            }
            if self.left_out:
                entry["left out"] = _figure(self.left_out[row.case])
                entry["left out/observed"] = f"{self.left_out[row.case] / row.value:.3f}"
            table.append(entry)
        return pd.DataFrame(table)

    def cost_table(self) -> pd.DataFrame:
        """Costs with an effect, and those that were held: base value, fitted value, range, what the data says."""
        table = []
        for cost in Cost:
            if cost in self.fit.free or cost in self.held:
                low, high = self.file.ranges[cost]
                entry = {"cost": cost.name.lower(), "before": self.base.values[cost], "fitted": self.fit.values[cost]}
                table.append(entry | {"range": f"{low} ... {high}", "the data says": verdict(self.fit, self.held, cost)})
        return pd.DataFrame(table)

    def without_effect(self) -> list[str]:
        return [cost.name.lower() for cost in Cost if cost not in self.fit.free and cost not in self.held]

    def as_text(self) -> str:
        parts = [self.row_table().to_string(index=False), ""]
        few = [f"{row.case} {share:.1%}" for row, share in zip(self.rows, self.fit.pages, strict=True) if share < 1]
        if few:
            parts += [f"fitted with fewer pages, which changes no figure by more than 0.2 %: {', '.join(few)}; shown with all", ""]
        parts += [self.cost_table().to_string(index=False), ""]
        if self.without_effect():
            parts += [f"no effect on any row, as before: {', '.join(self.without_effect())}", ""]
        parts.append(f"the data determines {len(self.fit.combinations)} combinations of costs:")
        parts += [f"  {combination(terms)}" for terms in self.fit.combinations]
        if self.options.out is not None:
            parts += ["", f"wrote {self.options.out}"]
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": [
                {
                    "case": row.case,
                    "metric": row.metric,
                    "observed": row.value,
                    "before": float(self.fit.before[i]),
                    "fitted": float(self.fit.after[i]),
                    "left_out": self.left_out.get(row.case),
                    "pages": self.fit.pages[i],
                }
                for i, row in enumerate(self.rows)
            ],
            "costs": self.cost_table().to_dict("records"),
            "without_effect": self.without_effect(),
            "combinations": [{cost.name.lower(): power for cost, power in terms} for terms in self.fit.combinations],
            "out": None if self.options.out is None else str(self.options.out),
        }


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def combination(terms: Sequence[tuple[Cost, float]]) -> str:
    """A product of costs to powers, as text."""
    return " * ".join(cost.name.lower() if power == 1 else f"{cost.name.lower()}^{power:.2g}" for cost, power in terms)


def verdict(fitted: Fit, held: frozenset[Cost], cost: Cost) -> str:
    """What the data says of one cost."""
    if cost in held:
        return "nothing: held"
    total = fitted.sum_of(cost)
    if total is None:
        return "nothing: no effect"
    text = _sum_text(total, cost)
    return text + (f"; at the end of its range, {fitted.values[cost]}" if fitted.at_bound(cost) else "")


def _sum_text(total: Sum, cost: Cost) -> str:
    known = "determined" if total.determined else "not determined"
    error = f", +-{100 * total.error:.0f} %" if total.error < VAGUE else ""
    if len(total.costs) == 1:
        return f"{known}{error}" if total.determined else f"{known} by itself{error}"
    if cost != total.costs[0]:
        return f"in the sum with {total.costs[0].name.lower()} only"
    terms = [f"{'' if abs(w - 1) < 0.05 else f'{w:.3g} '}{c.name.lower()}" for c, w in zip(total.costs, total.weights, strict=True)]
    return f"only the sum {' + '.join(terms)} = {total.ns:,.0f}: {known}{error}"


FIT_ONLY = {"hosts": "--host", "cases": "--case", "widen": "--widen", "hold": "--hold", "leave_one_out": "--leave-one-out"}
MEASURE_ONLY = {"seconds": "--seconds", "memory": "--memory"}


def calibrate(options: CalibrateOptions) -> "Calibration | Measurement":
    """Measure or fit, and write the cost file if a place for it is given. Raises UsageError, StudyError, EnvironmentProblemError."""
    fits = options.source is not None
    for name, flag in (MEASURE_ONLY if fits else FIT_ONLY).items():
        if getattr(options, name):
            raise UsageError(f"{flag} is of no use {'with' if fits else 'without'} --from; leave it out")
    _check_out(options)
    if fits:
        return fit_costs(options)
    from sweep.measure.run import MeasureOptions, measure  # numba comes with it, which a fit does without

    limits = {name: getattr(options, name) for name in MEASURE_ONLY if getattr(options, name) is not None}
    return measure(MeasureOptions(options.out, options.costs, options.note, say=options.say, **limits))


def fit_costs(options: CalibrateOptions) -> Calibration:
    """A fit to the rows of `options.source`. Raises UsageError, StudyError, EnvironmentProblemError."""
    base = load_costs(options.costs, Path())
    rows = chosen(load_observations(str(options.source), Path()), options)
    bounds, widened = ranges_of(base, options.widen)
    held = frozenset(_cost(name, "--hold") for name in options.hold)
    if held & set(widened):
        raise UsageError(f"--hold {min(c.name.lower() for c in held & set(widened))}: --widen moves it; give one of the two")
    free = {cost: bound for cost, bound in bounds.items() if cost not in held}
    fitted = fit(Rates(rows, base), base, free)
    left_out = _leave_one_out(rows, base, free) if options.leave_one_out else {}
    file = _cost_file(options, base, rows, fitted, held, bounds, widened)
    if options.out is not None:
        publish(options.out, cost_toml(file).encode())
    return Calibration(options, base, rows, fitted, held, left_out, file)


def _check_out(options: CalibrateOptions) -> None:
    """Refuse before the work what cannot be written after it. Raises UsageError."""
    if options.out is None:
        return
    if options.out.suffix != ".toml":
        raise UsageError(f"-o {options.out}: a cost file is TOML; give a name that ends in .toml")
    if options.out.is_dir() or not options.out.resolve().parent.is_dir():
        raise UsageError(f"-o {options.out}: no file can be written there; make the folder first, or give another name")
    if options.costs.partition("@")[0].endswith(".toml") and options.out.resolve() == Path(options.costs.partition("@")[0]).resolve():
        raise UsageError(f"-o {options.out}: is the file that it starts from; give another name")


def chosen(rows: Sequence[Observation], options: CalibrateOptions) -> tuple[Observation, ...]:
    """The rows of one host that --host and --case ask for. Raises UsageError."""
    patterns = [*options.cases, *(f"{prefix}*" for prefix in options.hosts)] or ["*"]
    kept = tuple(row for row in rows if any(fnmatchcase(row.case, pattern) for pattern in patterns))
    if not kept:
        raise UsageError(f"no row's case matches {', '.join(patterns)}; there are {', '.join(row.case for row in rows[:40])}")
    hosts = {(row.arch, row.host): row.case for row in kept}
    if len(hosts) > 1:
        places = "; ".join(f"{case}: {arch}, {host}" for (arch, host), case in hosts.items())
        raise UsageError(f"the rows are of several hosts ({places}), and a cost file is of one; choose with --host or --case")
    return kept


def _cost(name: str, option: str) -> Cost:
    if name not in COST_NAMES:
        raise UsageError(f"{option} {name[:80]!a}: unknown cost; {nearest(name, COST_NAMES)}")
    return COST_NAMES[name]


def ranges_of(base: CostFile, widen: Sequence[str]) -> tuple[dict[Cost, Bounds], dict[Cost, Bounds]]:
    """(the range of every cost, those that --widen NAME=LOW:HIGH gave). Raises UsageError."""
    bounds = {cost: Bounds(*spread) for cost, spread in base.ranges.items()}
    widened: dict[Cost, Bounds] = {}
    for text in widen:
        match = re.fullmatch(r"([a-z0-9_]{1,40})=([0-9]{1,13}):([0-9]{1,13})", text)
        if match is None:
            raise UsageError(f"--widen {text[:80]!a}: NAME=LOW:HIGH in whole ns is needed, like clear_2m_ns=60000:2000000")
        cost, new = _cost(match[1], "--widen"), Bounds(int(match[2]), int(match[3]))
        old = bounds[cost]
        if not new.low <= old.low <= old.high <= new.high <= MAX_COST_NS:
            raise UsageError(f"--widen {text}: must take in the range of the file, {old.low} ... {old.high}, and end by {MAX_COST_NS}")
        bounds[cost] = widened[cost] = new
    return bounds, widened


def _leave_one_out(rows: Sequence[Observation], base: CostFile, free: Mapping[Cost, Bounds]) -> dict[str, float]:
    """What a fit to the other rows predicts for each. Raises UsageError for a single row."""
    if len(rows) < 2:
        raise UsageError("--leave-one-out needs two rows or more")
    found = {}
    for row in rows:
        others = fit(Rates([other for other in rows if other is not row], base), base, free)
        predicted: Floats = Rates([row], base).whole({cost: float(ns) for cost, ns in others.values.items()})
        found[row.case] = float(predicted[0])
    return found


def _command(options: CalibrateOptions) -> str:
    """The command that makes this file, without places of this machine."""
    source = Path(str(options.source))
    words = [f"--from {source.name}"]
    words += [f"--host {prefix}" for prefix in options.hosts] + [f"--case {pattern}" for pattern in options.cases]
    words += [f"--costs {Path(options.costs).name}"] * (options.costs != "default")
    words += [f"--widen {text}" for text in options.widen] + [f"--hold {name}" for name in options.hold]
    return "faultsweep calibrate " + " ".join(words)


def _cost_file(
    options: CalibrateOptions,
    base: CostFile,
    rows: Sequence[Observation],
    fitted: Fit,
    held: frozenset[Cost],
    bounds: Mapping[Cost, Bounds],
    widened: Mapping[Cost, Bounds],
) -> CostFile:
    """The fitted costs, each with where it comes from."""
    worst = max(abs(after / row.value - 1) for row, after in zip(rows, fitted.after, strict=True))
    about = {
        "machine": f"{rows[0].arch}, host CPUs {rows[0].host}, as the source gives it",
        "method": f"least squares in logarithms, {len(rows)} rows, largest residual {worst:.1%}: {_command(options)}",
        "date": date.today().isoformat(),
        "source": "; ".join(dict.fromkeys(row.source for row in rows)) + f" (rows {', '.join(row.case for row in rows)})",
    }
    if options.note:
        about["note"] = options.note
    texts = {}
    for cost in Cost:
        old = dict(base.texts.get(cost, {}))
        changed = fitted.values[cost] != base.values[cost]
        said = [f"fitted: {verdict(fitted, held, cost)}"] if changed else []
        if cost in widened:
            said.append(f"range widened from [{base.ranges[cost][0]}, {base.ranges[cost][1]}] for this host")
        if said:
            before = f"{base.name}: {base.values[cost]}, {old.get('basis', 'no basis')}"
            old["source"] = "; ".join([*said, before, *([old["source"]] if old.get("source") else [])])
        if changed:
            old["basis"] = "fitted"
            old = {key: text for key, text in old.items() if key not in ("machine", "method", "date")}  # those were of the old value
        texts[cost] = {"unit": "ns", **old}
    ranges = {cost: (bound.low, bound.high) for cost, bound in bounds.items()}
    name = options.out.stem if options.out is not None else base.name
    return CostFile(name, fitted.values, ranges, (), about, texts)
