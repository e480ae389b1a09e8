"""The libraries that sources come from, where one is installed: the oracle that `watchlist verify` asks.

None of them is needed to build or to serve. A library is asked to read the same folder with its own loader.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from latentwatch.arrays import F64
from latentwatch.watchlist.selection import SourceChoice

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Upstream:
    """A source, loaded by its own library."""

    library: str
    """Name and version."""
    encode: Callable[[F64], F64]
    """Tokens [T, D] to activations of every feature [T, F], in the library's own float32."""


def load(choice: SourceChoice) -> Upstream | None:
    """The source in its own library; None where that is not installed or cannot read it from disk."""
    if choice.format not in _LOADERS or choice.location.text.startswith("hf:"):
        return None
    distribution, loader = _LOADERS[choice.format]
    try:
        encode = loader(choice)
        version = importlib.metadata.version(distribution)
    except ImportError:
        return None
    return Upstream(f"{distribution} {version}", encode)


def _in_torch(encode: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[F64], F64]:
    import torch

    def numpy_in_and_out(x_TD: F64) -> F64:
        with torch.no_grad():
            return np.asarray(encode(torch.tensor(x_TD, dtype=torch.float32)).numpy(), np.float64)

    return numpy_in_and_out


def _sae_lens(choice: SourceChoice) -> Callable[[F64], F64]:
    sae = importlib.import_module("sae_lens").SAE.load_from_disk(str(choice.location.folder()))
    if choice.options.input_scale is not None:
        sae.fold_activation_norm_scaling_factor(choice.options.input_scale)
    if choice.options.centre:
        return _in_torch(lambda x: sae.encode(x - x.mean(dim=-1, keepdim=True)))
    return _in_torch(sae.encode)


def _dictionary_learning(choice: SourceChoice) -> Callable[[F64], F64]:
    load_dictionary = importlib.import_module("dictionary_learning.utils").load_dictionary
    dictionary, _ = load_dictionary(str(choice.location.folder()), "cpu")
    return _in_torch(dictionary.encode)


def _sparsify(choice: SourceChoice) -> Callable[[F64], F64]:
    coder = importlib.import_module("sparsify").SparseCoder.load_from_disk(choice.location.folder())

    def encode(x: torch.Tensor) -> torch.Tensor:
        top, index, pre = coder.encode(x)
        act: torch.Tensor = pre.new_zeros(pre.shape).scatter_(-1, index, top)
        return act

    return _in_torch(encode)


def _openmoss(choice: SourceChoice) -> Callable[[F64], F64]:
    model = importlib.import_module("llamascopium.models.sae").SparseAutoEncoder.from_local(
        str(choice.location.folder()), device="cpu"
    )
    hook = model.cfg.hook_point_in
    return _in_torch(lambda x: model.encode(model.normalize_activations({hook: x})[hook]))


_LOADERS: Final[dict[str, tuple[str, Callable[[SourceChoice], Callable[[F64], F64]]]]] = {
    "saelens": ("sae-lens", _sae_lens),
    "dictionary_learning": ("dictionary-learning", _dictionary_learning),
    "sparsify": ("eai-sparsify", _sparsify),
    "openmoss": ("llamascopium", _openmoss),
}
