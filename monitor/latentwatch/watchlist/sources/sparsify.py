"""EleutherAI sparsify folders: cfg.json beside sae.safetensors; ReLU, then the k largest of a token.

    x -> - b_dec (unless cfg.transcode) -> encoder -> relu -> top k

The folder is named after the hookpoint, a module's path: `layers.7` or `h.7` is the output of layer 7, `layers.7.mlp`
that of its MLP. Upstream truth: sparsify/{config,sparse_coder,fused_encoder}.py of 1.3.3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from latentwatch.names import HookPoint
from latentwatch.watchlist import canonical
from latentwatch.watchlist.canonical import EncoderRows
from latentwatch.watchlist.declared import Known, Unread, passed_over
from latentwatch.watchlist.location import Config, Location
from latentwatch.watchlist.sources import About, Decoder, Source, SourceOptions, refuse_architecture
from latentwatch.watchlist.tensors import SafetensorsFile

_KNOWN: Final = (
    Known(
        used=frozenset(("activation", "d_in", "expansion_factor", "num_latents", "k", "signed", "transcode"))
        | {"skip_connection"}
    )
    | passed_over("the decoder's norm in training", "normalize_decoder")
    | passed_over("a training loss", "multi_topk", "auxk_alpha")
)
_MODULE: Final = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)[._]\d+(?:\.|$)", re.ASCII)


def open_source(location: Location, hook_point: HookPoint, options: SourceOptions) -> Source:  # noqa: ARG001
    """Open the folder of one hookpoint."""
    options.refuse_unused(location)
    config = location.config("cfg.json", _KNOWN)
    k = _k(location, config)
    tensors = SafetensorsFile(location.file("sae.safetensors"))
    width, d_in = tensors.matrix("encoder.weight")
    config.agrees("d_in", d_in)
    latents = config.index("num_latents") or d_in * (config.count("expansion_factor") or 0)
    if latents not in (0, width):
        raise location.refuse(f"cfg.json means {latents} latents, and there are {width}", "Fetch both files again.")
    transcode = config.flag("transcode", False)
    used = {"encoder.weight": (width, d_in), "encoder.bias": (width,)} | ({} if transcode else {"b_dec": (d_in,)})
    unread = {"W_dec": Unread("of the decoder", (width, d_in)), "b_dec": Unread("of the decoder", (d_in,))}
    if config.flag("skip_connection", False):
        unread["W_skip"] = Unread("it adds to the output alone", (d_in, d_in))
    tensors.declare(location, used, unread)

    def rows(index_K: Sequence[int]) -> EncoderRows:
        w_KD, bias_K = tensors.rows("encoder.weight", index_K), tensors.rows("encoder.bias", index_K)
        return canonical.relu(w_KD, bias_K, None if transcode else tensors.whole("b_dec"))

    about = About(
        architecture="topk",
        d_in=d_in,
        width=width,
        places=_places(location, transcode),
        k=k,
    )
    decoder = Decoder(lambda index_K: tensors.rows("W_dec", index_K), lambda: tensors.whole("b_dec"))
    return Source(about, (location.file("cfg.json"), tensors.path), rows, decoder=None if transcode else decoder)


def _k(location: Location, config: Config) -> int:
    activation = config.text("activation") or "topk"
    if activation != "topk":
        raise refuse_architecture(location, activation, "whether a feature fires depends on its group")
    if config.flag("signed", False):
        raise refuse_architecture(location, "signed topk", "it keeps the sign of the k largest magnitudes")
    k = config.count("k")
    if k is None:
        raise config.refuse("k", "a whole number above zero")
    return k


def _places(location: Location, transcode: bool) -> tuple[str, ...]:
    """The hookpoint in the folder's name; none where the folder was renamed to what is no module's path."""
    name = location.parts[-1]
    if _MODULE.search(name) is None:
        return ()
    path = re.sub(r"^((?:\w+\.)*(?:layers|h|blocks))_(\d+)$", r"\1.\2", name)
    # A transcoder predicts the module's output from its input, so it reads before the named place.
    return (f"the input of {path}" if transcode else path,)
