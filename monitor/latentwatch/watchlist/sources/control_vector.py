"""Control vectors of repeng and llama.cpp: a GGUF file with `direction.<N>` per layer.

Both number layers from 0 and write the same keys, but mean two places by one number, and no key says which wrote it:

    repeng                      `direction.N` is made of hidden_states[N + 1], the stream after layer N
                                (repeng/extract.py, `batched_get_hiddens`)
    llama.cpp cvector-generator `direction.N` is made of `l_out-<N - 1>`, the stream after layer N - 1
                                (tools/cvector-generator: `direction.%zu` of il + 1 in pca.hpp and mean.hpp)

So a person must say it. llama.cpp itself adds `direction.N` after layer N (llama_adapter_cvec::apply, build_cvec) in
either case. The score is the projection x . v / |v|, as repeng's `project_onto_direction`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from latentwatch.errors import RefusalReason
from latentwatch.names import HookPoint
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread, passed_over
from latentwatch.watchlist.location import Location
from latentwatch.watchlist.sources import About, Source, SourceOptions
from latentwatch.watchlist.sources.persona_vector import projection
from latentwatch.watchlist.tensors_gguf import GgufFile

WRITERS: Final = {"repeng": 0, "llama.cpp": 1}
"""By how much each one's number is above that of the layer whose output was read."""
_PAIRS: Final = (
    Known(
        used=frozenset(("controlvector.layer_count", "controlvector.model_hint")),
        only={"general.architecture": ("controlvector",)},
    )
    | passed_over("how the file is laid out", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.alignment")
    | passed_over("a fact for people", "general.name", "general.description", "general.author", "general.license")
)


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:
    """Open the file; its only row, index 0, is the direction at the hook point."""
    options.refuse_unused(location, "written_by")
    tensors = GgufFile(location.file())
    name = f"direction.{hook_point.layer + _shift(location, options)}"
    shape = tensors.shape(name)
    if len(shape) != 1 or 0 in shape:
        raise location.refuse(f"{name} has shape {list(shape)}, not a vector", "Give one number per dimension.")
    directions = [one for one in tensors.entries if re.fullmatch(r"direction\.\d+", one, re.ASCII)]
    if options.written_by == "llama.cpp" and "direction.0" in tensors.entries:
        raise location.refuse(
            "it has a direction.0, which llama.cpp neither writes nor reads: its first is direction.1",
            "Check option written_by.",
            RefusalReason.SOURCE_PLACE_MISSING,
        )
    others = {one: Unread("the direction of another layer", shape) for one in directions if one != name}
    pairs = tensors.declare(location, {name: shape}, others, _PAIRS)
    if "general.architecture" not in pairs.fields:
        raise location.refuse("it has no general.architecture = 'controlvector'", "Give a control vector's file.")
    pairs.agrees("controlvector.layer_count", len(directions))

    def rows(index_K: Sequence[int]) -> EncoderRows:
        return projection(tensors, tensors.whole(name)[None].repeat(len(index_K), axis=0))

    about = About(
        architecture="direction",
        kind="direction",
        units="projection onto the unit direction",
        d_in=shape[0],
        width=1,
        places=(str(hook_point),),
        notes={"model_hint": pairs.text("controlvector.model_hint") or "not stated", "direction": name},
        normed_last=options.written_by == "repeng",
    )
    return Source(about, (tensors.path,), rows)


def _shift(location: Location, options: SourceOptions) -> int:
    if options.written_by not in WRITERS:
        raise location.refuse(
            "nothing in it says who wrote it: direction.N is after layer N if repeng did, and after layer N - 1 if "
            "llama.cpp's cvector-generator did",
            f"Give option written_by: {' or '.join(WRITERS)}.",
            RefusalReason.SOURCE_PLACE_MISSING,
        )
    return WRITERS[options.written_by]
