"""Makes vLLM's Llama a model whose layers return the whole stream, and later something else in every forward.

An eager model may do so: what a layer returns is Python. After HOSTILE_AFTER forwards its layers return a dictionary, a
tensor of rank 4, one that is too wide, one of another type, a list, nothing that is a tensor, in turn; the model itself
goes on with the stream that is in it. Python imports this module at start from PYTHONPATH, in every process of vLLM.
"""

import importlib.abc
import importlib.util
import os
import sys
from typing import Any

AFTER = int(os.environ.get("HOSTILE_AFTER", "-1"))
forwards = 0


def turned(stream: Any) -> Any:
    import torch

    return [
        {"stream": stream},
        stream[None, None],
        torch.cat([stream, stream], dim=-1),
        stream.to(torch.complex64),
        [stream],
        (None, {"stream": stream}),
    ][forwards % 6]


def straight(output: Any) -> Any:
    import torch

    if isinstance(output, torch.Tensor):
        output = output.real if output.is_complex() else output
        return output.reshape(-1, output.shape[-1])[:, :64].contiguous()
    if isinstance(output, dict):
        return output["stream"]
    return straight(output[-1])


def patch(llama: Any) -> None:
    original = llama.LlamaDecoderLayer.forward

    def layer_forward(self: Any, positions: Any, hidden_states: Any, residual: Any) -> Any:
        hidden, residual = original(self, positions, hidden_states, None)
        stream = hidden + residual
        return turned(stream) if forwards > AFTER else stream

    def model_forward(
        self: Any, input_ids: Any, positions: Any, intermediate_tensors: Any, inputs_embeds: Any = None, **_: Any
    ) -> Any:
        global forwards
        forwards += 1
        stream = self.embed_input_ids(input_ids)
        for layer in self.layers:
            stream = straight(layer(positions, stream, None))
        return self.norm(stream)

    llama.LlamaDecoderLayer.forward = layer_forward
    llama.LlamaModel.forward = model_forward


class Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        patch(module)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "vllm.model_executor.models.llama":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        spec.loader = Loader(spec.loader)
        return spec


if AFTER >= 0:
    sys.meta_path.insert(0, Finder())
