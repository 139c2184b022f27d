"""Every command and code block of README and docs runs, or says why it does not."""

from pathlib import Path

import pytest

from tests.blocks import PAGES, ROOT, RUN, Block, Session, blocks_of, fault_of

BLOCKS = {str(page.relative_to(ROOT)): list(blocks_of(page.read_text(), str(page.relative_to(ROOT)))) for page in PAGES}
LIVE = [page for page, blocks in BLOCKS.items() if any(block.language in RUN and block.marker != "not run" for block in blocks)]


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    assert not [fault for block in BLOCKS[page] if (fault := fault_of(block))]


@pytest.mark.slow
@pytest.mark.parametrize("page", LIVE)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    session = Session(tmp_path / "reader", tmp_path / "programs")
    for block in BLOCKS[page]:
        session.run(block)


def only(text: str) -> Block:
    (block,) = blocks_of(text, "page.md")
    return block


@pytest.mark.parametrize(
    "text",
    [
        "```\nfaultsweep doctor\n```",  # no language
        "```console\n$ faultsweep doctor\n```",  # one that is not run
        "```text\nfaultsweep doctor\n```",  # hidden as output
        "text\n\n    faultsweep doctor\n",  # indented
        "<!-- not run: -->\n```c\nmain();\n```",  # no reason
        "<!-- not run -->\n```c\nmain();\n```",
        "<!-- not run: needs a compiler -->\n\n```c\nmain();\n```",  # not on the line before
        "<!-- file: ../../etc/passwd -->\n```text\nroot\n```",
    ],
)
def test_a_block_that_nothing_runs_is_told(text: str) -> None:
    assert "page.md:" in fault_of(only(text))


@pytest.mark.parametrize(
    ("text", "marker", "said"),
    [
        ("<!-- not run: needs a cluster -->\n```sh\nsbatch x\n```", "not run", "needs a cluster"),
        ("* item\n\n  <!-- file: a.toml -->\n  ```toml\n  a = 1\n  ```", "file", "a.toml"),
        ("```text\n24 points in 1 s\n```", "", ""),
    ],
)
def test_what_stands_before_a_block_is_heard(text: str, marker: str, said: str) -> None:
    block = only(text)
    assert (block.marker, block.said, fault_of(block)) == (marker, said, "")


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfaultsweep plan missing.toml | cat\n```",
        "<!-- printed -->\n```text\n24 points\n```",
        "```python\nassert 1 == 2\n```",
        '```toml\n[study]\nname = "S"\n```',
    ],
)
def test_a_block_that_fails_fails_its_page(text: str, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:
        Session(tmp_path / "reader", tmp_path / "programs").run(only(text))
    assert "page.md:" in "".join([str(caught.value), *caught.value.__notes__])


def test_blocks_of_a_page_share_folder_and_names(tmp_path: Path) -> None:
    page = """
<!-- file: n.txt -->
```text
7
```
```sh
cp n.txt m.txt
```
```python
n = open("m.txt").read()
```
```python
assert n == "7\\n"
```
"""
    session = Session(tmp_path / "reader", tmp_path / "programs")
    for block in blocks_of(page, "page.md"):
        session.run(block)
    assert session.names["n"] == "7\n"
