"""Fails as it is told to: with one of Triton's codes, or with an exception of Python's."""

from typing import Any

import triton_python_backend_utils as pb


class TritonPythonModel:
    """The name is what Triton's Python backend asks for."""

    def execute(self, requests: list[Any]) -> list[Any]:
        answers = []
        for request in requests:
            how = pb.get_input_tensor_by_name(request, "how").as_numpy()[0].decode()
            if how == "raise":
                raise RuntimeError("the weights are gone")
            error = pb.TritonError(f"told to be {how}", getattr(pb.TritonError, how))
            answers.append(pb.InferenceResponse([], error))
        return answers
