"""The processes of a vLLM engine end with the worker that has started them, however that ends.

vLLM ends them when it is told to. A worker that is killed tells nobody, and its engine would keep the GPU for ever. So
this is a plugin of vLLM, which all its processes load as they start: see `pyproject.toml`.
"""

import os
import select
import signal
import threading

WORKER = "CHAINS_VLLM_WORKER"  # the variable that names the process that they belong to


def watch() -> None:
    """Have this process killed when the worker that it belongs to is gone, if it belongs to one."""
    worker = os.environ.get(WORKER, "")
    if not worker or int(worker) == os.getpid():
        return
    try:
        gone = os.pidfd_open(int(worker))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    except (AttributeError, OSError):  # a system that has no such thing
        return
    threading.Thread(target=_end_with, args=(gone,), name="watch worker", daemon=True).start()


def _end_with(process: int) -> None:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)  # there is nothing to put in order, and nobody to wait for it
