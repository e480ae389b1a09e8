"""Keeps vLLM's GPU compile mode (piecewise graphs, post-grad passes, AOT cache) on the CPU platform.

The CPU platform turns VLLM_COMPILE into a plain Dynamo trace, which never loads a cached graph: the trap of a stale
graph could not be shown. Python imports this module at start from PYTHONPATH, in every process that vLLM spawns.
"""

import importlib.abc
import importlib.util
import sys
from typing import Any


class _Patched(importlib.abc.Loader):
    """Loads vllm.platforms.cpu and then wraps one method of it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        keep_mode(module.CpuPlatform)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "vllm.platforms.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        spec.loader = _Patched(spec.loader)
        return spec


def keep_mode(platform: Any) -> None:
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        compilation = config.compilation_config
        before = compilation.mode, compilation.backend, compilation.ir_enable_torch_wrap
        original(cls, config)
        compilation.mode, compilation.backend, compilation.ir_enable_torch_wrap = before
        compilation.compile_sizes = []

    platform.check_and_update_config = classmethod(check_and_update_config)


sys.meta_path.insert(0, _Finder())
