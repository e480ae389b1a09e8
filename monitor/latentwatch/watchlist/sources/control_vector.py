"""Control vectors of repeng and llama.cpp: a GGUF file with `direction.<layer>`, taken after that layer.

repeng numbers layers from 0 and reads hidden_states[layer + 1] (repeng/extract.py, `batched_get_hiddens`), so
`direction.N` is a direction in resid_post.N. The score is the projection x . v / |v|.
"""

from __future__ import annotations

from collections.abc import Sequence

from latentwatch.names import HookPoint
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Source, SourceOptions
from latentwatch.watchlist.sources.persona_vector import projection
from latentwatch.watchlist.tensors_gguf import GgufFile


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open the file; its only row, index 0, is the direction at the hook point."""
    options.refuse_unused(location)
    tensors = GgufFile(location.file())
    name = f"direction.{hook_point.layer}"
    shape = tensors.shape(name)
    if len(shape) != 1:
        raise location.refuse(f"{name} has shape {list(shape)}", "A control vector has one number per dimension.")

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return projection(tensors, tensors.whole(name)[None].repeat(len(index_K), axis=0))

    about = About(
        architecture="direction",
        kind="direction",
        units="projection onto the unit direction",
        d_in=shape[0],
        width=1,
        notes={"model_hint": str(tensors.pairs.get("controlvector.model_hint", "not stated"))},
    )
    return Source(about, (tensors.path,), rows)
