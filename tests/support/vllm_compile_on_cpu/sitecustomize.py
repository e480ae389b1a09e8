"""Keeps vLLM's GPU compile mode (piecewise graphs, post-grad passes, AOT cache) on the CPU platform.

The CPU platform turns VLLM_COMPILE into a plain Dynamo trace, which never loads a cached graph: the trap of a stale
graph could not be shown. Python imports this module at start from PYTHONPATH, in every process that vLLM spawns.
"""

import importlib.abc
import importlib.util
import os
import pathlib
import re
import sys
from typing import Any


class _Patched(importlib.abc.Loader):
    """Loads a module with something done before or after it."""

    def __init__(self, loader: Any, before: Any, after: Any) -> None:
        self._loader, self._before, self._after = loader, before, after

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._before()
        self._loader.exec_module(module)
        self._after(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loaders of the modules in `patches`, each once."""

    def __init__(self, patches: dict[str, tuple[Any, Any]]) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self._patches:
            return None
        before, after = self._patches.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        spec.loader = _Patched(spec.loader, before, after)
        return spec


def define_missing_ops() -> None:
    """Schemas of the CUDA ops that vLLM's graph passes name when they are imported; none is ever called here."""
    import torch
    import vllm
    import vllm._custom_ops

    folder = pathlib.Path(vllm.__file__).parent / "compilation"
    names = {name for file in folder.rglob("*.py") for name in re.findall(r"ops\._C\.(\w+)", file.read_text())}
    library = torch.library.Library("_C", "FRAGMENT")
    for name in sorted(names):
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(Tensor! result, Tensor input) -> ()")
    kept.append(library)


def keep_mode(platform: Any) -> None:
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        compilation = config.compilation_config
        before = compilation.mode, compilation.backend, compilation.ir_enable_torch_wrap
        original(cls, config)
        compilation.mode, compilation.backend, compilation.ir_enable_torch_wrap = before
        compilation.compile_sizes = []

    platform.check_and_update_config = classmethod(check_and_update_config)


def leave_cache_unsalted(plugin: Any) -> None:
    """What every vLLM plugin does that does not know of the trap."""
    plugin._salt_compile_cache = nothing


def nothing(*_: Any) -> None: ...


kept: list[Any] = []
sys.meta_path.insert(
    0,
    _Finder(
        {
            "vllm.platforms.cpu": (nothing, lambda module: keep_mode(module.CpuPlatform)),
            "vllm.compilation.passes.pass_manager": (define_missing_ops, nothing),
            "latentwatch.engines.vllm.plugin": (
                nothing,
                leave_cache_unsalted if os.environ.get("UNSALTED") else nothing,
            ),
        }
    ),
)
