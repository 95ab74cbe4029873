"""Two ranks of one training, with the environment that torchrun gives them, on the CPU."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable

from hf_hpmkd.engines import end_when


def in_two_ranks(body: Callable[[], None]) -> None:
    """Runs it in two children, which have what this process has imported. One that fails ends the other, which would
    wait for it, and this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children, parent = [], os.getpid()
    for rank in ("0", "1"):
        if not (child := os.fork()):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            end_when(lambda: os.getppid() != parent)  # as where the test has waited long enough
            try:
                body()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
