"""Lets vLLM's V2 model runner run without a GPU: Triton's interpreter behind a stand-in "cpu" backend.

Python imports a module of this name at start from PYTHONPATH, before anything of vLLM; tests put this folder there.
"""

import os
import sys
from typing import Any

if "latentwatch.exporter" in sys.orig_argv:
    # The exporter runs no kernel and must start fast. Python takes this error as "there is no such module".
    raise ImportError(name="sitecustomize")

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.backends
from triton.backends.compiler import GPUTarget


class _Compiler:
    """Never compiles: the interpreter takes every launch before it gets here."""

    def __init__(self, target: Any) -> None: ...

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"


class _Driver:
    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


triton.backends.backends["cpu"] = triton.backends.Backend(compiler=_Compiler, driver=_Driver)


def _tolerant(function: Any) -> Any:
    """The interpreter's argmax meets all-NaN rows (padding), where numpy raises and a GPU does not."""

    def call(values: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(values, *args, **kwargs)
        except ValueError:
            return function(np.nan_to_num(values), *args, **kwargs)

    return call


np.nanargmax, np.nanargmin = _tolerant(np.nanargmax), _tolerant(np.nanargmin)
