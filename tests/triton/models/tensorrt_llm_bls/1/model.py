"""Stands in for TensorRT-LLM: one token a step, a thread a request, and notes what it was asked and whether it ended.

Its tokens are the words of the prompt, some of which tell it how to go on: ``endless`` begins again until there are
`max_tokens`, ``slowly`` takes 20 ms over a token, ``breaking`` fails after two, ``bytewise`` sends each byte by itself,
``accumulating`` sends all there is with each token. What it notes goes into the file that a word ``key=…`` names.
"""

import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

# Seconds over a token. This Triton (2.51) dies, now and then, of a stream that is cancelled while answers rush by:
# https://github.com/triton-inference-server/server/issues/7368
PACE = 0.005


class TritonPythonModel:
    """The name is what Triton's Python backend asks for."""

    def initialize(self, args: dict[str, Any]) -> None:
        self.batched = json.loads(args["model_config"])["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            threading.Thread(target=self.answer, args=(request, request.get_response_sender())).start()

    def answer(self, request: Any, sender: Any) -> None:
        inputs = {tensor.name(): plain(tensor.as_numpy()) for tensor in request.inputs()}
        prompt = inputs["text_input"]
        key = re.search(r"key=(\S+)", prompt)
        with (Path(os.environ["NOTES"]) / (key[1] if key else "unnamed")).open("a") as notes:
            notes.write(json.dumps(inputs) + "\n")
            notes.flush()
            try:
                for chunk in chunks(inputs, prompt.split()):
                    if sender.is_cancelled():  # not the request, which is the backend's own once `execute` has returned
                        notes.write("cancelled\n")
                        break
                    sender.send(self.response(chunk, inputs))
                    notes.write("token\n")
                    notes.flush()
                else:
                    notes.write("ended\n")
            except RuntimeError as error:
                sender.send(pb.InferenceResponse([], pb.TritonError(str(error))))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def response(self, chunk: bytes, inputs: dict[str, Any]) -> Any:
        shape = (1, 1) if self.batched else (1,)
        tensors = [pb.Tensor("text_output", np.array([chunk], np.object_).reshape(shape))]
        if inputs.get("return_num_input_tokens"):
            count = len(inputs["text_input"].split())
            tensors.append(pb.Tensor("num_input_tokens", np.array([count], np.int32)))
        return pb.InferenceResponse(tensors)


def plain(array: Any) -> Any:
    values = [value.decode() if isinstance(value, bytes) else value for value in array.reshape(-1).tolist()]
    return values[0] if len(values) == 1 else values


def chunks(inputs: dict[str, Any], words: list[str]) -> Iterator[bytes]:
    """Give what goes into each response."""
    tokens = [f" {word}".encode() for word in words]
    endless = itertools.cycle(tokens) if "endless" in words else iter(tokens)
    answer = itertools.islice(endless, inputs["max_tokens"])
    if not inputs.get("stream"):
        echo = b"" if inputs.get("exclude_input_in_output") else inputs["text_input"].encode()
        yield echo + b"".join(answer)
        return
    if "bytewise" in words:
        answer = iter([bytes([byte]) for byte in b"".join(answer)])
    said = b""
    for number, token in enumerate(answer):
        if "breaking" in words and number == 2:
            raise RuntimeError("the engine broke")
        time.sleep(0.02 if "slowly" in words else PACE)
        said += token
        yield said if "accumulating" in words else token
