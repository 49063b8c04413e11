"""Two nodes of two processes, started by torchrun, train as one process does."""

import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TESTS, subprocess_environment
from tests.optim.ranks import Net, assert_close, make_optimizer, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 4
SCRIPT = """
    import sys, time
    import torch
    import torch.distributed as dist
    from pathlib import Path
    from lit_fanions.optim import sharing
    from tests.optim.ranks import Net, make_optimizer, train, weights

    sharing._WORTH_SENDING = 0  # so that matrices of a test are shared
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    net = Net()
    optimizer = make_optimizer(net)
    optimizer.process_group = dist.group.WORLD
    folder, waits = Path(sys.argv[1]), sys.argv[2] == "wait"
    train(net, optimizer, steps=STEPS)
    (folder / f"trained{dist.get_rank()}").touch()
    while waits:
        train(net, optimizer, steps=1)
        time.sleep(0.05)
    torch.save(weights(net), folder / f"{dist.get_rank()}.pt")
    dist.barrier()  # gloo aborts where a peer leaves in the middle of a collective
    dist.destroy_process_group()
"""


def start_nodes(folder: Path, mode: str) -> list[subprocess.Popen[bytes]]:
    """Start two nodes, each a torchrun with two processes."""
    script = folder / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("STEPS", str(STEPS)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
        "--rdzv_backend=static", "--master_addr=127.0.0.1", f"--master_port={port}",
    ]  # fmt: skip
    return [
        subprocess.Popen(
            [*command, f"--node_rank={node}", str(script), str(folder), mode],
            env=subprocess_environment(), cwd=TESTS.parent,
            stderr=(folder / f"{node}.txt").open("wb"),
        )
        for node in range(2)
    ]  # fmt: skip


def wait_for_nodes(nodes: list[subprocess.Popen[bytes]], folder: Path, seconds: float) -> list[int]:
    """Return the exit statuses of nodes; kill those that have not ended in time."""
    end = time.monotonic() + seconds
    try:
        return [node.wait(max(0.1, end - time.monotonic())) for node in nodes]
    except subprocess.TimeoutExpired:
        logs = "\n".join((folder / f"{i}.txt").read_text()[-2000:] for i in range(len(nodes)))
        raise AssertionError(f"nodes have not ended within {seconds} s\n{logs}") from None
    finally:
        for node in nodes:
            node.kill()


def test_two_nodes_train_as_one_process(tmp_path):
    statuses = wait_for_nodes(start_nodes(tmp_path, "end"), tmp_path, 200)
    assert statuses == [0, 0], (tmp_path / "0.txt").read_text()[-6000:]
    net = Net()
    train(net, make_optimizer(net), steps=STEPS)
    for rank in range(4):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), weights(net))


def test_a_terminated_node_ends_the_other(tmp_path):
    nodes = start_nodes(tmp_path, "wait")
    end = time.monotonic() + 200
    while len(list(tmp_path.glob("trained*"))) < 4 and time.monotonic() < end:
        time.sleep(0.2)
    nodes[1].send_signal(signal.SIGTERM)
    statuses = wait_for_nodes(nodes, tmp_path, 90)
    assert 0 not in statuses
    assert not list(tmp_path.glob("*.pt"))
