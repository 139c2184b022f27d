"""The command line: arguments in, calls out, errors as one line with their exit status. No logic lives here."""

import csv
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
from typer.exceptions import TyperException

from sweep.errors import FaultsweepError, InterruptedRunError, UsageError
from sweep.quantity import human_time

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Simulate the page-fault path of KVM hosts and sweep it. Example: faultsweep run configs/studies/thread.toml",
)
StudyPath = Annotated[Path, typer.Argument(help="study file (TOML)")]
DatasetPath = Annotated[str, typer.Argument(help="dataset: a directory, or a URL like s3://bucket/name")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the study, e.g. vcpus=4 or study.seed=7")]


def _words(*words: str) -> Callable[[str], list[str]]:
    """Completes one of these."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _workloads(incomplete: str) -> list[str]:
    from sweep.configs import shared_workloads

    return [name for name in shared_workloads() if name.startswith(incomplete)]


def _kernels(incomplete: str) -> list[str]:
    from kernels.policy import REGIMES

    return [str(regime.since) for regime in REGIMES if str(regime.since).startswith(incomplete)]


Executor = Annotated[str, typer.Option(help="inline, local or ray", autocompletion=_words("inline", "local", "ray"))]


def _print_json(value: Any) -> None:
    print(json.dumps(_finite(value), indent=1, default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
def plan(study: StudyPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a study; print its points, axes, predicted time, memory, bytes. Example: faultsweep plan configs/studies/thread.toml"""
    from sweep.preview import as_text, preview

    shown = preview(study, overrides or ())
    _print_json(shown) if as_json else print(as_text(shown))


@app.command()
def run(
    study: StudyPath,
    out: Annotated[str | None, typer.Option(help="dataset directory or URL; default results/<study name>")] = None,
    executor: Executor = "ray",
    address: Annotated[str | None, typer.Option(help="address of a Ray cluster")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="default: the CPUs of this machine")] = None,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first N points")] = None,
    shard: Annotated[str, typer.Option(help="i/n: every n-th point, from the i-th")] = "0/1",
    on_error: Annotated[str, typer.Option(help="continue or stop", autocompletion=_words("continue", "stop"))] = "continue",
    max_failures: Annotated[int | None, typer.Option(min=0, help="stop after so many failed points")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="go on over the budget")] = False,
    deadline: Annotated[
        float, typer.Option(min=1.0, help="seconds that a chunk may take beside what is predicted, before its worker is killed")
    ] = 120.0,
    insecure_cluster: Annotated[bool, typer.Option("--insecure-cluster", help="join a Ray cluster that asks for no token")] = False,
    new_version: Annotated[bool, typer.Option("--new-version", help="a sibling directory if model or costs changed")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="a line per chunk: points, seconds, worker")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="plain lines, no bar")] = False,
) -> None:
    """Run what is missing of a study; again to resume or extend. Example: faultsweep run configs/studies/thread.toml --executor local"""
    from sweep.runner import RunOptions
    from sweep.runner import run as run_study
    from sweep.study import load_study

    if on_error not in ("continue", "stop"):
        raise UsageError(f"--on-error {on_error!r}: continue or stop is needed")
    options = RunOptions(
        executor=executor,
        address=address,
        workers=workers,
        limit=limit,
        shard=_shard(shard),
        on_error=on_error,
        max_failures=max_failures,
        yes=yes,
        new_version=new_version,
        insecure_cluster=insecure_cluster,
        deadline=deadline,
        quiet=quiet,
        verbose=verbose,
        progress=not no_progress,
        command=sys.argv,
    )
    summary = run_study(load_study(study, overrides or ()), out, options)
    for note in summary.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        _print_json({**summary.__dict__, "left": summary.left, "exit_status": summary.exit_status})
    elif not quiet:
        _print_summary(summary)
    raise typer.Exit(summary.exit_status)


def _shard(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if not (first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
        raise UsageError(f"--shard {text!r}: i/n is needed, like 0/4")
    return int(first), int(second)


def _print_summary(summary: Any) -> None:
    if summary.done_before == summary.total:
        print(f"{summary.study}: all {summary.total} points are done already; nothing to do ({summary.out})")
    else:
        failed = f", {summary.failed} failed" if summary.failed else ""
        left = f", {summary.left} left" if summary.left else ""
        print(f"{summary.study}: {summary.done} points in {human_time(summary.seconds)}{failed}{left}, {summary.done_before} done before")
    if summary.left or summary.failed:
        given = sys.argv[1:]
        out = [] if any(word == "--out" or word.startswith("--out=") for word in given) else ["--out", str(summary.out)]
        print(f"go on: faultsweep {shlex.join([*given, *out])}")
    elif summary.sealed:
        print(f"sealed {summary.sealed['root_digest'][:16]}; next: faultsweep report {summary.out}")


@app.command()
def status(dataset: DatasetPath, as_json: AsJson = False) -> None:
    """Done, failed, left, rate, time left. Example: faultsweep status results/thread"""
    from sweep.preview import as_text, status_of

    shown = status_of(dataset)
    _print_json(shown) if as_json else print(as_text(shown))


@app.command()
def verify(
    dataset: DatasetPath,
    recompute: Annotated[int, typer.Option(min=0, help="recompute so many points and compare")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check checksums, schema, completeness; recompute points. Example: faultsweep verify results/thread --recompute 20"""
    from sweep.verify import verify as verify_dataset

    verdict = verify_dataset(dataset, recompute)
    if as_json:
        _print_json(verdict.__dict__)
    else:
        print("\n".join(verdict.wrong) or f"{dataset}: {verdict.points} points, {verdict.recomputed} recomputed, all well")
    raise typer.Exit(3 if verdict.wrong else 0)


@app.command()
def report(
    dataset: DatasetPath,
    other: Annotated[str | None, typer.Argument(help="a second dataset, to compare the first with")] = None,
    page: Annotated[Path | None, typer.Option("--page", help="file for the page [default: report/index.html in the dataset]")] = None,
    as_json: AsJson = False,
) -> None:
    """Write DIR/report/index.html, print the main table; or compare two datasets. Example: faultsweep report results/thread"""
    from sweep.report.build import build_report
    from sweep.report.compare import compare

    built = compare(dataset, other, page) if other is not None else build_report(dataset, page)
    _print_json(built.as_json()) if as_json else print(built.as_text())


@app.command()
def query(
    dataset: DatasetPath,
    sql: Annotated[str, typer.Argument(help="SQL over points, steps, errors")],
    out_format: Annotated[
        str, typer.Option("--format", help="table, csv, json or parquet", autocompletion=_words("table", "csv", "json", "parquet"))
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="the same as --format json")] = False,
) -> None:
    """SQL over points, steps, errors. Example: faultsweep query results/thread 'select kernel, avg(exits) from points group by 1'"""
    from sweep.dataset.read import open_dataset

    writers: dict[str, Callable[[pa.Table], None]] = {
        "table": _write_table,
        "csv": _write_csv,
        "json": lambda t: _print_json(t.to_pylist()),
        "parquet": _write_parquet,
    }
    out_format = "json" if as_json else out_format
    if out_format not in writers:
        raise UsageError(f"--format {out_format!r}: {', '.join(writers)} are there")
    writers[out_format](open_dataset(dataset).sql(sql))


def _write_table(table: pa.Table) -> None:
    import pandas as pd

    with pd.option_context("display.max_rows", None, "display.max_columns", None, "display.width", 240):
        print(table.to_pandas().to_string(index=False))


def _write_csv(table: pa.Table) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    print(text.getvalue(), end="")


def _write_parquet(table: pa.Table) -> None:
    if sys.stdout.isatty():
        raise UsageError("--format parquet writes bytes; redirect them into a file")
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    sys.stdout.buffer.write(sink.getvalue())


@app.command()
def merge(
    datasets: Annotated[list[str], typer.Argument(help="datasets of one study: directories or URLs")],
    out: Annotated[str, typer.Option(help="dataset to make, or to add to")],
    as_json: AsJson = False,
) -> None:
    """Join datasets of one study, each made with run --shard i/n. Example: faultsweep merge part0 part1 --out whole"""
    from sweep.merge import merge as merge_datasets

    merged = merge_datasets(datasets, out)
    if as_json:
        _print_json(merged.__dict__)
    else:
        rest = f"sealed {merged.sealed['root_digest'][:16]}" if merged.sealed else f"{merged.left} left"
        print(f"{merged.out}: {merged.points} points, {rest}")


@app.command()
def export(
    dataset: DatasetPath,
    to: Annotated[Path, typer.Option(help="file to write: .parquet, .csv, .arrow or .feather")],
    table: Annotated[str, typer.Option(help="points, steps or errors", autocompletion=_words("points", "steps", "errors"))] = "points",
    as_json: AsJson = False,
) -> None:
    """One Parquet, CSV or Arrow file of a table. Example: faultsweep export results/thread --to points.csv"""
    from sweep.export import export as export_table

    rows = export_table(dataset, to, table)
    _print_json({"file": str(to), "table": table, "rows": rows}) if as_json else print(f"{to}: {rows} rows of {table}")


@app.command()
def explain(
    dataset: DatasetPath,
    point_id: Annotated[str, typer.Argument(help="id of a point, or its beginning")],
    touches: Annotated[int, typer.Option(min=1, max=1_000_000, help="events to show")] = 60,
    as_json: AsJson = False,
) -> None:
    """Run one point again, event by event. Example: faultsweep explain results/thread 7e997"""
    from sweep.explain import explain as explain_point

    explained = explain_point(dataset, point_id, touches)
    _print_json(explained.as_json()) if as_json else print(explained.as_text())


@app.command()
def calibrate(
    source: Annotated[str | None, typer.Option("--from", help="fit to rates: a .csv file, or a name in configs/observations")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="cost file to write (TOML)")] = None,
    costs: Annotated[str, typer.Option(help="cost file to start from: values, ranges")] = "default",
    hosts: Annotated[list[str] | None, typer.Option("--host", help="rows whose case begins so")] = None,
    cases: Annotated[list[str] | None, typer.Option("--case", help="rows whose case matches this pattern")] = None,
    widen: Annotated[list[str] | None, typer.Option("--widen", help="NAME=LOW:HIGH: a wider range, in ns, for this host")] = None,
    hold: Annotated[list[str] | None, typer.Option("--hold", help="a cost that stays as it is")] = None,
    note: Annotated[str, typer.Option(help="what the fit leaves unexplained; goes into the file")] = "",
    leave_one_out: Annotated[bool, typer.Option("--leave-one-out", help="predict each row from a fit to the others")] = False,
    seconds: Annotated[float | None, typer.Option(help="time that measuring may take; default 60")] = None,
    memory: Annotated[str | None, typer.Option(help="memory that measuring may use; default 512MiB")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine's costs, or fit a host's to observed rates (--from). Example: faultsweep calibrate -o mine.toml"""
    from sweep.calibrate import CalibrateOptions
    from sweep.calibrate import calibrate as cost_file

    fitting = (costs, hosts or (), cases or (), widen or (), hold or (), note, leave_one_out)
    made = cost_file(CalibrateOptions(source, out, *fitting, seconds, memory, partial(print, file=sys.stderr)))
    _print_json(made.as_json()) if as_json else print(made.as_text())


@app.command()
def replay(
    trace: Annotated[str, typer.Argument(help="recorded faults: perf script, ftrace, bpftrace text (or gz), CSV, Parquet; - for a pipe")],
    out: Annotated[str | None, typer.Option(help="dataset directory; default results/replay-<name>")] = None,
    study: Annotated[Path | None, typer.Option(help="study file to run over the workload 'trace'; default: a grid of settings")] = None,
    trace_format: Annotated[
        str | None, typer.Option("--format", help="perf, ftrace, bpftrace, csv or parquet; default: as it looks")
    ] = None,
    vendor: Annotated[str | None, typer.Option(help="whose error codes: intel, amd or shadow; default: as the values say")] = None,
    slots: Annotated[str | None, typer.Option(help="guest memory, START+SIZE: 0+3GiB,4GiB+13GiB; default: what the faults touch")] = None,
    threads: Annotated[str | None, typer.Option(help="only the faults of these thread ids: 4145,4150-4157")] = None,
    skip_bad: Annotated[int, typer.Option("--skip-bad", min=0, help="leave out so many bad lines; their count is told")] = 0,
    kernel: Annotated[str | None, typer.Option(help="the recorded host's kernel, e.g. 6.1; default: as the trace says, or 6.12")] = None,
    import_only: Annotated[bool, typer.Option("--import-only", help="import and count, run no study")] = False,
    executor: Executor = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="default: the CPUs of this machine")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="go on over the budget")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="no progress")] = False,
) -> None:
    """Import recorded faults, count double ones, ask what if. Example: faultsweep replay examples/traces/perf.txt"""
    from sweep.replay.run import ReplayOptions
    from sweep.replay.run import replay as replay_trace
    from sweep.runner import RunOptions

    running = RunOptions(executor=executor, workers=workers, yes=yes, quiet=quiet, command=sys.argv)
    options = ReplayOptions(trace, out, study, trace_format, vendor, slots, threads, skip_bad, kernel, import_only, running)
    replayed = replay_trace(options)
    _print_json(replayed.as_json()) if as_json else print(replayed.as_text())
    raise typer.Exit(replayed.summary.exit_status if replayed.summary else 0)


@app.command()
def recommend(
    workload: Annotated[
        str | None, typer.Option(help="what the guest does: of configs/workloads, or of --study", autocompletion=_workloads)
    ] = None,
    trace: Annotated[str | None, typer.Option(help="or a recorded trace, as replay reads it; says memory and vCPUs")] = None,
    memory: Annotated[str | None, typer.Option(help="of the guest, like 16GiB")] = None,
    vcpus: Annotated[int | None, typer.Option(help="of the guest")] = None,
    kernel: Annotated[str | None, typer.Option(help="of the host, like 6.1", autocompletion=_kernels)] = None,
    budget: Annotated[str | None, typer.Option(help="host memory that the guest may take, like 4GiB; default: any")] = None,
    proposals: Annotated[bool, typer.Option("--proposals", help="the list thread's patches as well")] = False,
    what_if: Annotated[bool, typer.Option("--what-if/--no-what-if", help="look at other kernels, sizes, failing THPs, fewer cores")] = True,
    study: Annotated[Path | None, typer.Option(help="study file with workloads and parameters of your own")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="any parameter, e.g. mmu=shadow or thp_failure=0.2")] = None,
    out: Annotated[str | None, typer.Option(help="directory to keep the dataset in; default: not kept")] = None,
    executor: Executor = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="default: the CPUs of this machine")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="go on over the budget of CPU hours")] = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="no progress")] = False,
) -> None:
    """Rank settings for a guest. Example: faultsweep recommend --workload boot_ovmf --memory 16GiB --vcpus 8 --kernel 6.1"""
    from sweep.recommend.answer import recommend as rank
    from sweep.recommend.asked import RecommendOptions
    from sweep.runner import RunOptions

    running = RunOptions(executor=executor, workers=workers, yes=yes, quiet=quiet, command=sys.argv)
    asked = RecommendOptions(
        memory=memory,
        vcpus=vcpus,
        kernel=kernel,
        workload=workload,
        trace=trace,
        study=study,
        budget=budget,
        proposals=proposals,
        what_if=what_if,
        overrides=overrides or (),
        out=out,
        run=running,
    )
    found = rank(asked)
    _print_json(found.as_json()) if as_json else print(found.as_text())


@app.command()
def validate(
    layers: Annotated[list[str] | None, typer.Option("--layer", help="memory, kvm or boot; default: all")] = None,
    boot: Annotated[list[str] | None, typer.Option("--boot", help="kernel to fetch and boot in emulation: 6.1, 6.12, 6.18, 7.3")] = None,
    image: Annotated[Path | None, typer.Option("--kernel-image", help="kernel of your own to boot")] = None,
    modules: Annotated[Path | None, typer.Option(help="its modules, if KVM is not built in")] = None,
    mmus: Annotated[list[str] | None, typer.Option("--mmu", help="of booted kernels: tdp, legacy or shadow")] = None,
    everything: Annotated[bool, typer.Option("--all", help="the whole suite, not its short form")] = False,
    only: Annotated[str, typer.Option(help="cases whose name matches this pattern")] = "",
    random: Annotated[int, typer.Option("--random", help="so many random cases; what differs is made shorter")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="of the random cases")] = 0,
    change_settings: Annotated[bool, typer.Option("--change-settings", help="set what cases need, and put it back")] = False,
    memory: Annotated[str, typer.Option(help="at most so much of it")] = "2GiB",
    seconds: Annotated[int, typer.Option(min=1, max=86_400, help="for each layer and booted kernel")] = 60,
    out: Annotated[Path | None, typer.Option(help="directory for the result as a dataset")] = None,
    show: Annotated[Path | None, typer.Option(help="print the table of such a dataset, run nothing")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="only what differs, and the sums")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="a line per step and counter")] = False,
) -> None:
    """Compare the model with real kernels: this host's memory, its /dev/kvm, booted ones. Example: faultsweep validate --boot 6.12"""
    from sweep.host.validate import Detail, ValidateOptions, table_of
    from sweep.host.validate import validate as ask_kernels

    if show is not None:
        print(table_of(show))
        return
    options = ValidateOptions(
        layers=layers or (),
        boot=boot or (),
        image=image,
        modules=modules,
        mmus=mmus or ("tdp",),
        everything=everything,
        only=only,
        random=random,
        seed=seed,
        change_settings=change_settings,
        memory=memory,
        seconds=seconds,
        out=out,
    )
    found = ask_kernels(options)
    detail = Detail.STEPS if verbose else Detail.DIFFERENCES if quiet else Detail.COUNTERS
    _print_json(found.as_json()) if as_json else print(found.as_text(detail))
    raise typer.Exit(found.exit_status)


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(help="study, workload or costs", autocompletion=_words("study", "workload", "costs"))] = "study",
) -> None:
    """Print the JSON Schema of study files (shared workloads, cost files), for editors. Example: faultsweep schema > study.schema.json"""
    from sweep.file_schemas import schema_of

    _print_json(schema_of(kind))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What works here: packages, compile cache, Ray, KVM, THP state, disk. Example: faultsweep doctor"""
    from sweep.doctor import examine

    findings = examine()
    if as_json:
        _print_json({name: {"well": well, "text": text} for name, (well, text) in findings.items()})
    else:
        for name, (well, text) in findings.items():
            print(f"{'ok ' if well else 'BAD'} {name}: {text}")
    raise typer.Exit(0 if all(well for well, _ in findings.values()) else 5)


def main() -> None:
    """Entry of the command: errors become one line and their exit status."""
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
        raise SystemExit(status if isinstance(status, int) else 0)
    except TyperException as error:
        message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        print(f"{message} (faultsweep --help tells more)", file=sys.stderr)
        raise SystemExit(2) from None
    except InterruptedRunError as error:
        print(f"interrupted: {error}; run the same command again to go on", file=sys.stderr, flush=True)
        os._exit(error.exit_status)  # at once: a thread of Arrow that is at work would abort the orderly end of Python
    except FaultsweepError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{error.filename or 'standard output'}: {error.strerror}; free space, or change rights or place", file=sys.stderr)
        raise SystemExit(5) from None


if __name__ == "__main__":
    main()
