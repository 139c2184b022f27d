"""`validate`: the model against real kernels, in three layers."""

import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from kernels.jit import model_digest
from sweep.errors import EnvironmentProblemError, UsageError
from sweep.host import boot, kvm
from sweep.host.case import Case, predict
from sweep.host.compare import CaseResult, Row, Verdict
from sweep.host.draw import random_cases
from sweep.host.litmus import cache_root
from sweep.host.result import LayerResult, agreement, dataset_of, read_dataset, write_dataset
from sweep.host.settings import Settings, changed_settings
from sweep.host.shrink import shrink
from sweep.host.suite import host_suite, short_suite, suite
from sweep.host.target import BootTarget, Layer, LiveTarget, Predict, Target, model_kernel
from sweep.kvm import KVM
from sweep.provenance import cpu_model, git_state, package_versions, thp_state
from sweep.quantity import parse_size

DEFAULT_SECONDS, DEFAULT_MEMORY = 60, "2GiB"
MAX_RANDOM = 100_000
MAX_SHRUNK = 3  # differing random cases of one kernel that are made shorter
MMUS = ("tdp", "legacy", "shadow")


@dataclass(frozen=True)
class ValidateOptions:
    """What the command was given. `boot`: versions, in the order of running."""

    layers: Sequence[str] = ()
    boot: Sequence[str] = ()
    image: Path | None = None
    modules: Path | None = None
    mmus: Sequence[str] = ("tdp",)
    everything: bool = False
    only: str = ""
    random: int = 0
    seed: int = 0
    change_settings: bool = False
    memory: str = DEFAULT_MEMORY
    seconds: int = DEFAULT_SECONDS
    out: Path | None = None


class Detail(StrEnum):
    """How much of a result is printed: what differs, counters of each case over its steps, or each step."""

    DIFFERENCES = "differences"
    COUNTERS = "counters"
    STEPS = "steps"


@dataclass
class Validation:
    """Every layer's result, and what the command ends with."""

    layers: list[LayerResult] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0: all that must be equal is; 1: something differs or failed; 5: a layer that was named, or every layer, could not run."""
        if any(result.is_bad for layer in self.layers for result in layer.results):
            return 1
        if any(layer.skipped and layer.asked for layer in self.layers) or not any(layer.count(Verdict.EQUAL) for layer in self.layers):
            return 5
        return 0

    def as_json(self) -> dict[str, Any]:
        return {
            "exit_status": self.exit_status,
            "layers": [
                {
                    **layer.identity,
                    "skipped": layer.skipped,
                    "notes": list(layer.notes),
                    "verdicts": {verdict.value: layer.count(verdict) for verdict in Verdict},
                    "bad": [_bad_json(result) for result in layer.results if result.is_bad],
                }
                for layer in self.layers
            ],
        }

    def as_text(self, detail: Detail = Detail.COUNTERS) -> str:
        return "\n".join(line for layer in self.layers for line in lines_of(layer, detail))


def _bad_json(result: CaseResult) -> dict[str, Any]:
    rows = [{name: str(getattr(row, name)) for name in ("step", "op", "counter", "real", "predicted")} for row in result.wrong]
    return {"case": result.case.name, "text": str(result.case), "reason": result.reason, "rows": rows}


def lines_of(layer: LayerResult, detail: Detail) -> Iterator[str]:
    """The layer's cases and counters, then what was left out and why, then the sums."""
    name = f"{layer.layer} {layer.kernel or ''} {layer.mmu if layer.mmu != 'none' else ''}".strip()
    if layer.skipped:
        yield f"{name}: skipped: {layer.skipped}"
        return
    yield f"{name} ({layer.host.get('release', '?')})"
    yield from (f"  note: {note}" for note in layer.notes)
    reasons: dict[str, int] = {}
    for result in layer.results:
        if result.verdict == Verdict.LEFT_OUT:
            reasons[result.reason] = reasons.get(result.reason, 0) + 1
        elif result.is_bad or detail != Detail.DIFFERENCES:
            yield from _case_lines(result, detail)
    yield from (f"  left out: {count} cases: {reason}" for reason, count in reasons.items())
    ran = len(layer.results) - layer.count(Verdict.LEFT_OUT)
    counts = sum(row.verdict == Verdict.EQUAL for result in layer.results for row in result.rows)
    yield f"  {ran} cases, {layer.count(Verdict.EQUAL)} exact, {counts:,} counts equal"


def _case_lines(result: CaseResult, detail: Detail) -> Iterator[str]:
    yield f"  {result.case.name}: {result.verdict}{': ' + result.reason if result.reason else ''}"
    if result.is_bad:
        yield f"    {result.case}"
    if detail == Detail.COUNTERS:
        for name, rows in _by_counter(result).items():
            yield _line(name, _whole(name, [row.real for row in rows]), _whole(name, [row.predicted for row in rows]), _worst(rows))
    for row in result.rows if detail == Detail.STEPS else result.wrong:
        why = f" ({row.reason})" if row.reason else ""
        yield _line(f"step {row.step} {row.op:10} {row.counter}", row.real, row.predicted, row.verdict) + why


def _line(what: str, real: int, predicted: int, verdict: Verdict) -> str:
    return f"    {what:44} real {real:>10} predicted {predicted:>10} {verdict}"


def _by_counter(result: CaseResult) -> dict[str, list[Row]]:
    """The rows of each counter; one that is 0 on both sides in all steps is left out."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        found.setdefault(row.counter, []).append(row)
    return {name: rows for name, rows in found.items() if any(row.real or row.predicted for row in rows)}


def _whole(name: str, values: Sequence[int]) -> int:
    """A counter's sum over the steps; a gauge as it stands after the last."""
    return values[-1] if name.startswith("pages_") or name.endswith("_bytes") else sum(values)


def _worst(rows: Sequence[Row]) -> Verdict:
    verdicts = {row.verdict for row in rows}
    return next(verdict for verdict in (Verdict.DIFFERS, Verdict.FREE, Verdict.EQUAL) if verdict in verdicts)


def _cases(options: ValidateOptions, target: Target) -> list[Case]:
    """Of the suite, and random ones; those whose name matches `only`."""
    found: list[Case] = []
    with_guest = target.layer != Layer.MEMORY
    if not options.random or options.everything:
        short = short_suite if with_guest and not options.everything else suite
        found += short(target.kernel, target.mmu) if with_guest else host_suite(target.kernel)
    found += random_cases(options.random, options.seed, target.kernel, target.mmu if with_guest else "tdp", with_guest)
    return [case for case in found if re.search(options.only, case.name)]


def ask(target: Target, options: ValidateOptions, predict_case: Predict, notes: Sequence[str] = ()) -> LayerResult:
    """Run the cases, and make shorter what differs of the random ones. Raises EnvironmentProblemError."""
    results = target.run(_cases(options, target), predict_case)
    told = list(notes)
    random = [n for n, result in enumerate(results) if result.wrong and result.case.name.startswith("random/")]
    for n in random[:MAX_SHRUNK]:
        results[n] = shrink(results[n], lambda cases: target.run(cases, predict_case))
    if len(random) > MAX_SHRUNK:
        told.append(f"{len(random) - MAX_SHRUNK} more random cases differ and are shown as drawn")
    host = dict(target.description())
    return LayerResult(target.layer.value, target.kernel, target.mmu, host, results, notes=tuple(told))


def _live(layer: Layer, options: ValidateOptions, settings: Settings, predict_case: Predict) -> LayerResult:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise EnvironmentProblemError(f"needs Linux on x86_64, not {sys.platform} on {platform.machine()}")
    kernel, note = model_kernel(platform.release())
    mmu = "none"
    if layer == Layer.KVM:
        if not KVM.exists():
            raise EnvironmentProblemError("no /dev/kvm on this machine")
        try:
            KVM.open("r+b", buffering=0).close()
        except OSError as error:
            raise EnvironmentProblemError(f"/dev/kvm is there, but: {error.strerror}; join group kvm, or run as root") from None
        mmu = kvm.mmu_of()
    target = LiveTarget(layer, kernel, mmu, settings, options.seconds, parse_size(options.memory))
    return ask(target, options, predict_case, [note] if note else [])


def _booted(name: str, mmu: str, options: ValidateOptions, predict_case: Predict) -> LayerResult:
    limit = parse_size(options.memory) >> 20
    if limit < boot.LEAST_GUEST_MIB:
        raise EnvironmentProblemError(f"a booted kernel needs {boot.LEAST_GUEST_MIB} MiB; --memory allows {limit}")
    guest_mib = min(boot.GUEST_MIB, limit)
    if options.image is not None and not name:
        image = boot.Kernel(options.image, options.modules)
        release = boot.run_booted(image, (), mmu, options.seconds, guest_mib).kernel["release"]
        kernel, note = model_kernel(release)
    else:
        image, (kernel, note) = boot.kernel_for(name), model_kernel(name)
    target = BootTarget(image, kernel, mmu, options.seconds, guest_mib)
    return ask(target, options, predict_case, [note] if note else [])


def _attempt(layer: Layer, kernel: str, mmu: str, asked: bool, run: Callable[[], LayerResult]) -> LayerResult:
    """The layer's result; where it cannot run, why."""
    try:
        return run()
    except EnvironmentProblemError as error:
        return LayerResult(layer.value, kernel, mmu, {}, skipped=str(error), asked=asked)


def _check(options: ValidateOptions) -> None:
    for name, values, known in (("--layer", options.layers, [layer.value for layer in Layer]), ("--mmu", options.mmus, MMUS)):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise UsageError(f"{name} {unknown[0]!r}: {', '.join(known)} are there")
    if not 0 <= options.random <= MAX_RANDOM:
        raise UsageError(f"--random {options.random}: 0 ... {MAX_RANDOM} is needed")
    bad = next((version for version in options.boot if not re.fullmatch(r"[0-9]{1,2}\.[0-9]{1,3}", version)), None)
    if bad is not None:
        raise UsageError(f"--boot {bad!r}: a version like {', '.join(boot.BOOT_VERSIONS)} is needed")
    for path in (options.image, options.modules):
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file or directory")
    try:
        re.compile(options.only)
        parse_size(options.memory)
    except (re.error, ValueError) as error:
        raise UsageError(f"--only or --memory: {error}") from None


def validate(options: ValidateOptions, predict_case: Predict = predict) -> Validation:
    """Run every layer that was named, or all; a layer that cannot run says why. Raises UsageError, DatasetError."""
    _check(options)
    named = [Layer(value) for value in options.layers] or list(Layer)
    found = Validation()
    with changed_settings(cache_root(), options.change_settings) as settings:
        for layer in named:
            if layer != Layer.BOOT:
                run = partial(_live, layer, options, settings, predict_case)
                found.layers.append(_attempt(layer, "", "none", bool(options.layers), run))
    if Layer.BOOT in named:
        found.layers += _boots(options, predict_case)
    if options.out is not None:
        write_dataset(dataset_of([layer for layer in found.layers if layer.asked or not layer.skipped], about(options)), options.out)
    return found


def _boots(options: ValidateOptions, predict_case: Predict) -> list[LayerResult]:
    kernels = [*options.boot, *([""] if options.image is not None else [])]
    if not kernels:
        text = "no kernel was named; --boot 6.12 fetches and boots one, --kernel-image FILE boots yours"
        return [LayerResult(Layer.BOOT.value, "", "none", {}, skipped=text, asked="boot" in options.layers)]
    found = []
    for kernel in kernels:
        for mmu in options.mmus:
            run = partial(_booted, kernel, mmu, options, predict_case)
            found.append(_attempt(Layer.BOOT, kernel, mmu, True, run))
    return found


def about(options: ValidateOptions) -> dict[str, Any]:
    """Who found that out, when, with what."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "host": {"machine": platform.machine(), "cpu": cpu_model(), "release": platform.release(), "thp": thp_state()},
        "model_digest": model_digest(),
        "packages": package_versions(),
        "git": git_state(Path(__file__).resolve().parent),
        "options": {name: getattr(options, name) for name in ("everything", "only", "random", "seed", "seconds", "memory")},
    }


def table_of(folder: Path) -> str:
    """The agreement that a dataset holds, as README shows it. Raises DatasetError."""
    return agreement(read_dataset(folder).tables["cases"])
