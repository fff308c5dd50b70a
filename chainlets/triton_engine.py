"""Models on a Triton Inference Server as Chainlets: any model, and language models that TensorRT-LLM serves."""

from chainlets.triton_config import TritonConfig
from chainlets.triton_errors import TritonError, TritonMismatchError, TritonRefusedError, TritonUnavailableError
from chainlets.triton_generate import TritonChat, TritonGenerate, TritonTextConfig
from chainlets.triton_model import TritonModel
from chainlets.triton_sampling import Guide, Sampling
from chainlets.triton_tensors import Tensor

__all__ = [
    "Guide",
    "Sampling",
    "Tensor",
    "TritonChat",
    "TritonConfig",
    "TritonError",
    "TritonGenerate",
    "TritonMismatchError",
    "TritonModel",
    "TritonRefusedError",
    "TritonTextConfig",
    "TritonUnavailableError",
]
