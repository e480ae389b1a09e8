"""The libraries that sources come from, where one is installed: the judge that `watchlist build` and `verify` ask.

None of them is needed to build or to serve. A library is asked to read the same files with its own loader.
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
from latentwatch.watchlist.sources import Source

if TYPE_CHECKING:
    import torch

Encode = Callable[[F64], F64]
"""Tokens [T, D] to activations of every feature [T, F], in the library's own float32."""


@dataclass(frozen=True)
class Upstream:
    """A source, loaded by its own library."""

    library: str
    """Name and version; where it cannot be asked, why not."""
    encode: Encode | None
    """None where it cannot be asked."""


def load(choice: SourceChoice, source: Source) -> Upstream:
    """The source that was opened for a choice, in its own library, if that is installed and can read it."""
    if choice.format not in _LOADERS:
        return Upstream("no library reads this format from disk", None)
    distribution, loader = _LOADERS[choice.format]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return Upstream(f"{distribution} is not installed", None)
    try:
        encode = loader(choice, source)
    except Exception as error:
        # A library raises nearly anything on a file that it cannot read, or lacks a package of its own; no judge then.
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return Upstream(f"{distribution} {version} cannot read it ({why})", None)
    return Upstream(f"{distribution} {version}", encode)


def _folder(source: Source) -> str:
    """The folder that holds the files of the source; a hub's cache has it too."""
    return str(source.files[0].parent)


def _in_torch(encode: Callable[[torch.Tensor], torch.Tensor]) -> Encode:
    import torch

    def numpy_in_and_out(x_TD: F64) -> F64:
        with torch.no_grad():
            return np.asarray(encode(torch.tensor(x_TD, dtype=torch.float32)).numpy(), np.float64)

    return numpy_in_and_out


def _sae_lens(choice: SourceChoice, source: Source) -> Encode:
    sae_lens = importlib.import_module("sae_lens")
    sae = sae_lens.SAE.load_from_disk(_folder(source), dtype="float32")
    norm = choice.options.norm
    if norm not in (None, "none", "expected_average_only_in"):
        sae.cfg.normalize_activations = norm
        sae._setup_activation_normalization()  # SAELens has no other way to say what its registry says
    scale = choice.options.input_scale or source.about.notes.get("input_scale")
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(float(str(scale)))
    if choice.options.centre:
        return _in_torch(lambda x: sae.encode(x - x.mean(dim=-1, keepdim=True)))
    return _in_torch(sae.encode)


def _dictionary_learning(_: SourceChoice, source: Source) -> Encode:
    load_dictionary = importlib.import_module("dictionary_learning.utils").load_dictionary
    dictionary, _config = load_dictionary(_folder(source), "cpu")
    return _in_torch(dictionary.encode)


def _sparsify(_: SourceChoice, source: Source) -> Encode:
    coder = importlib.import_module("sparsify").SparseCoder.load_from_disk(_folder(source))

    def encode(x: torch.Tensor) -> torch.Tensor:
        top, index, pre = coder.encode(x)
        act: torch.Tensor = pre.new_zeros(pre.shape).scatter_(-1, index, top)
        return act

    return _in_torch(encode)


def _openmoss(_: SourceChoice, source: Source) -> Encode:
    model = importlib.import_module("llamascopium.models.sae").SparseAutoEncoder.from_local(
        _folder(source), device="cpu"
    )
    hook = model.cfg.hook_point_in
    return _in_torch(lambda x: model.encode(model.normalize_activations({hook: x})[hook]))


def _circuit_tracer(_: SourceChoice, source: Source) -> Encode:
    """Of a cross-layer transcoder its library wants the files of every layer, so it is no judge of one."""
    library = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder")
    coder = library.load_relu_transcoder(
        str(source.files[-1]), 0, device=_cpu(), lazy_encoder=False, lazy_decoder=False
    )
    return _in_torch(coder.encode)


def _repeng(_: SourceChoice, source: Source) -> Encode:
    extract = importlib.import_module("repeng.extract")
    number = int(str(source.about.notes["direction"]).removeprefix("direction."))
    # In float16, as some store it, NumPy would take its length in float16 too.
    direction_D = np.float64(extract.ControlVector.import_gguf(source.files[0]).directions[number])
    return lambda x_TD: np.asarray(extract.project_onto_direction(x_TD, direction_D), np.float64)[:, None]


def _sklearn(choice: SourceChoice, _: Source) -> Encode:
    reader = importlib.import_module("latentwatch.watchlist.sources.sklearn_probe")
    model = reader.load(choice.location)
    return lambda x_TD: np.asarray(reader.decision(model, x_TD), np.float64)


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


_LOADERS: Final[dict[str, tuple[str, Callable[[SourceChoice, Source], Encode]]]] = {
    "saelens": ("sae-lens", _sae_lens),
    "dictionary_learning": ("dictionary-learning", _dictionary_learning),
    "sparsify": ("eai-sparsify", _sparsify),
    "openmoss": ("llamascopium", _openmoss),
    "circuit_tracer": ("circuit-tracer", _circuit_tracer),
    "control_vector": ("repeng", _repeng),
    "sklearn_probe": ("scikit-learn", _sklearn),
}
