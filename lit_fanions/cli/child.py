"""Run `python -m lit_fanions ARGUMENTS` as a child process that ends when its parent ends.

`python -m lit_fanions.cli.child ARGUMENTS` reads its standard input, a pipe from the parent. The
pipe breaks when the parent ends, even by SIGKILL. Without this, a training that nobody waits for
would go on and take the GPU from the next one.
"""

import os
import threading


def _exit_with_parent() -> None:
    """Wait for the end of standard input, then end this process at once, without cleanup."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from lit_fanions.cli import app

    raise SystemExit(app.main())
