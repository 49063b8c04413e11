"""`python -m lit_fanions.cli.child ARGUMENTS`: `python -m lit_fanions`, ending with its parent.

Whoever starts it holds the other end of its standard input. If that process is killed, even by
SIGKILL, the pipe breaks: a training that nobody waits for would take the place of another.
"""

import os
import threading


def _watch() -> None:
    """Wait for the end of standard input, then end this process at once."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True).start()
    from lit_fanions.cli import app

    raise SystemExit(app.main())
