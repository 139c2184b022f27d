"""Code blocks of the documents. Each is run, becomes a file, or says why it does neither, on the line before it:

    <!-- file: mine.toml -->        it becomes that file
    <!-- not run: needs root -->    it is left alone, for this reason
    <!-- printed -->                its lines are among those that the command before it has printed

Blocks of a page run in order and in one folder, as a reader would have them run: `sh` by bash (`faultsweep` is this checkout), `python` in
one namespace. A `toml` block without a name is a study, and must be one. Other `text` is a format or an example, and is not run.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

from sweep.configs import config_root
from sweep.plan import Plan
from sweep.study import load_study

ROOT = config_root().parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "results" / "README.md"]
MARKER = re.compile(r"<!-- (?:(not run|file): (\S.*?)|(printed)) -->\s*")
COMMAND = re.compile(r"^\s*(\$ |faultsweep |make |pip |python )", re.M)
SECONDS = 600  # what hangs ends


class Block(NamedTuple):
    """A block: where it stands, its language ('' if it says none), its text, and what the line before says of it."""

    page: str
    line: int
    language: str
    text: str
    marker: str = ""  # 'not run', 'file' or 'printed'
    said: str = ""  # the reason, or the file's name

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> Iterator[Block]:
    """Every block of a page in CommonMark, indented ones too."""
    before = None
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block") and token.map:
            near = before is not None and before.type == "html_block" and before.map and before.map[1] == token.map[0]
            said = MARKER.fullmatch(before.content) if near and before else None
            language = token.info.split()[0] if token.info.strip() else ""
            marker, about = (said[1] or said[3], said[2] or "") if said else ("", "")
            yield Block(page, token.map[0] + 1, language, token.content, marker, about)
        before = token


def fault_of(block: Block) -> str:
    """What is wrong with a block that is neither run nor explained; '' if nothing is."""
    if block.marker == "not run":
        return ""
    if block.marker == "file":
        return "" if re.fullmatch(r"[a-z0-9_-]+\.[a-z]+", block.said) else f"{block.place}: {block.said!r} is no plain file name"
    if block.marker == "printed":
        return "" if block.language == "text" else f"{block.place}: what is printed is text"
    if block.language == "text":
        return f"{block.place}: a command in a block of text" if COMMAND.search(block.text) else ""
    if block.language not in RUN:
        return f"{block.place}: language {block.language!r} is not run; say why, or which of {', '.join(RUN)} it is"
    return ""


class Session:
    """A reader's folder with what the checkout has, and the names that Python blocks have made."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""  # by the last command
        for part in ("configs", "examples", "results/published"):
            shutil.copytree(ROOT / part, folder / part)
        programs.mkdir()
        (programs / "faultsweep").write_text(f'#!/bin/sh\nexec {sys.executable} -m sweep "$@"\n')
        (programs / "faultsweep").chmod(0o755)
        paths = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}

    def run(self, block: Block) -> None:
        """Raises what the block raises, with its place in the page."""
        try:
            if block.marker == "file":
                (self.folder / block.said).write_text(block.text)
            elif block.marker == "printed":
                missing = set(_lines(block.text)) - set(_lines(self.printed))
                assert not missing, f"{block.place}: not printed: {missing}\n{self.printed}"
            elif block.marker != "not run" and block.language in RUN:
                RUN[block.language](self, block)
        except Exception as error:
            error.add_note(f"in the block at {block.place}")
            raise


def _lines(text: str) -> list[str]:
    """Lines without the space that aligns columns."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def _sh(session: Session, block: Block) -> None:
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    pipes: Mapping[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=session.folder, env=session.environment, start_new_session=True, **pipes) as running:
        try:
            out, err = running.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)  # what it has started as well
            raise
    session.printed = out
    assert running.returncode == 0, f"{block.place}: status {running.returncode}\n{out[-2000:]}\n{err[-2000:]}"


def _python(session: Session, block: Block) -> None:
    with contextlib.chdir(session.folder):
        exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), session.names)


def _toml(session: Session, block: Block) -> None:
    path = session.folder / "block.toml"
    path.write_text(block.text)
    assert Plan(load_study(path)).points(), f"{block.place}: a study without points"


RUN: Mapping[str, Callable[[Session, Block], None]] = {"sh": _sh, "python": _python, "toml": _toml}
