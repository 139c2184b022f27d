"""results/published/validation: whole, every case exact, from four kernels; what the README says of it is what it holds."""

import re

import pytest

from kernels.policy import parse_kernel
from sweep.configs import config_root
from sweep.host.boot import BOOT_VERSIONS
from sweep.host.result import CASES, COUNTS, agreement, read_dataset

ROOT = config_root().parent
PUBLISHED = ROOT / "results" / "published" / "validation"


def test_the_readme_shows_the_published_agreement() -> None:
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- faultsweep validate --show results/published/validation -->\n(.*?)\n<!-- end -->", readme, re.S)
    assert found
    assert found[1] == agreement(read_dataset(PUBLISHED).tables["cases"]), "put the output of that command between the comments"


def test_it_holds_every_kernel_with_both_tables() -> None:
    dataset = read_dataset(PUBLISHED)
    cases, counts = (dataset.tables[name].to_pandas() for name in ("cases", "counts"))
    assert dataset.tables["cases"].schema.names == CASES.names
    assert dataset.tables["counts"].schema.names == COUNTS.names
    assert set(cases[cases.layer == "boot"].kernel) == set(BOOT_VERSIONS)
    assert all(parse_kernel(kernel) for kernel in cases.kernel)
    assert set(cases.verdict) <= {"equal", "left out"}
    assert (counts.verdict == "differs").sum() == 0
    assert (counts[counts.verdict == "equal"].real == counts[counts.verdict == "equal"].predicted).all()
    assert counts[counts.verdict == "free"].reason.str.len().min() > 0
    assert {host["release"] for host in dataset.hosts} == set(cases.release)
    assert cases[cases.case.str.startswith("random/")].kernel.nunique() >= len(BOOT_VERSIONS)


@pytest.mark.parametrize("kernel", BOOT_VERSIONS)
def test_the_model_still_predicts_what_these_kernels_counted(kernel: str) -> None:
    """The suite's cases of that kernel, predicted anew, against the published counts."""
    from sweep.host.case import predict
    from sweep.host.compare import WITNESSED, value_of
    from sweep.host.suite import suite

    counts = read_dataset(PUBLISHED).tables["counts"].to_pandas()
    for mmu in sorted(set(counts[(counts.layer == "boot") & (counts.kernel == kernel)].mmu)):
        rows = counts[(counts.layer == "boot") & (counts.kernel == kernel) & (counts.mmu == mmu) & (counts.verdict == "equal")]
        by_case = dict(list(rows.groupby("case")))
        checked = 0
        for case in suite(kernel, mmu):
            if case.name not in by_case:
                continue
            predicted = predict(case)
            for row in by_case[case.name].itertuples():
                value = value_of(predicted[row.step], WITNESSED.get(row.counter, row.counter))
                assert value == row.real, (mmu, case.name, row.step, row.counter)
            checked += 1
        assert checked >= 280
