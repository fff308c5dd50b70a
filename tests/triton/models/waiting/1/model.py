"""Takes its time over one request, and notes under its key whether it is cancelled meanwhile."""

import os
import time
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb

STEP = 0.01  # seconds


class TritonPythonModel:
    """The name is what Triton's Python backend asks for."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [answer(request) for request in requests]


def answer(request: Any) -> Any:
    key, seconds = (pb.get_input_tensor_by_name(request, name).as_numpy() for name in ("key", "seconds"))
    with (Path(os.environ["NOTES"]) / key[0].decode()).open("a") as notes:
        notes.write(f"{request.parameters()}\nbegan\n")
        notes.flush()
        deadline = time.monotonic() + seconds[0]
        while time.monotonic() < deadline and not request.is_cancelled():
            time.sleep(STEP)
        notes.write("cancelled\n" if request.is_cancelled() else "ended\n")
    return pb.InferenceResponse([pb.Tensor("key", key)])
