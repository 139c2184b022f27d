"""Puts settings back once whoever changed them is gone: `python guardian.py JOURNAL`, with a pipe from that process as input.

The end of the input is the sign: a pipe closes however its writer ends, also by SIGKILL. In a session of its own, so that no
signal to the terminal's group reaches it. Standard library only, nothing of the package."""

import json
import signal
import sys
from pathlib import Path


def restore(journal: Path) -> list[str]:
    """Write back what the journal says, newest change first, and remove it; what could not be written stays in it."""
    try:
        originals: dict[str, str] = json.loads(journal.read_text())
    except (OSError, ValueError):
        return []
    failed = {}
    for path, value in reversed(originals.items()):
        try:
            Path(path).write_text(value)
        except OSError as error:
            failed[path] = f"{path}: {error.strerror}"
    if failed:
        journal.write_text(json.dumps({path: originals[path] for path in failed}))
    else:
        journal.unlink(missing_ok=True)
    return list(failed.values())


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    failed = restore(Path(sys.argv[1]))
    print("\n".join(failed), file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
