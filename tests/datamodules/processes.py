"""Several processes that do the same at the same time."""

import multiprocessing
from collections.abc import Callable


def at_once(work: Callable[[], object], count: int = 4) -> None:
    """Call a function in several processes that start together; all of them must succeed."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)

    def run() -> None:
        barrier.wait(30)
        work()

    processes = [context.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count
