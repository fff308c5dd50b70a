"""Gives each input back as the output of its name."""

from typing import Any

import triton_python_backend_utils as pb


class TritonPythonModel:
    """The name is what Triton's Python backend asks for."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [pb.InferenceResponse([returned(tensor) for tensor in request.inputs()]) for request in requests]


def returned(tensor: Any) -> Any:
    name = f"{tensor.name()}_OUT"
    if tensor.name() == "BF16":  # which numpy does not have
        return pb.Tensor.from_dlpack(name, tensor.to_dlpack())
    return pb.Tensor(name, tensor.as_numpy())
