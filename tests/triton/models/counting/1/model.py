"""Streams numbers and their squares."""

from typing import Any

import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    """The name is what Triton's Python backend asks for."""

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            count = pb.get_input_tensor_by_name(request, "COUNT:0").as_numpy()[0]
            start = pb.get_input_tensor_by_name(request, "START:0")
            first = 0 if start is None else start.as_numpy()[0]
            for number in range(first, first + count):
                tensors = [("NUMBER:0", number), ("SQUARE:0", number * number)]
                sender.send(pb.InferenceResponse([pb.Tensor(name, np.array([n], np.int64)) for name, n in tensors]))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
