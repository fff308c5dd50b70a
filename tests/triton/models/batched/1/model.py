"""Multiplies, and says how many requests came at once: what Triton's dynamic batcher put together."""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    """The name is what Triton's Python backend asks for."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [answer(request, len(requests)) for request in requests]


def answer(request: Any, count: int) -> Any:
    values, factor = (pb.get_input_tensor_by_name(request, name).as_numpy() for name in ("VALUES", "FACTOR"))
    counts = np.full((len(values), 1), count, np.int32)
    return pb.InferenceResponse([pb.Tensor("SCALED", values * factor), pb.Tensor("REQUESTS", counts)])
