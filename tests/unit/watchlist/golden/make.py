"""Make the golden fixtures: tiny encoders saved by the upstream libraries' own classes, and what those classes encode.

Run in an environment of its own, since the main test suite needs none of these libraries:

    pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3 \
                circuit-tracer==0.5.0 llamascopium==2.0.0b34 repeng==0.4.0 skops==0.16.0 scikit-learn
    python tests/unit/watchlist/golden/make.py [CASE ...]

A case whose library is missing is left as it is. Two libraries are not on the package index: put a checkout of
openai/sparse_autoencoder and of OpenMOSS/Language-Model-SAEs at f7315179 (`src`) on PYTHONPATH to remake their cases.
Each case is a folder: the source in its published layout, expected.safetensors with x [T, D] and act [T, F] in
float32, and case.json with how a watchlist.yaml names the source.

Legend: T tokens, D d_model, F features.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
D, F, T, K_TOP = 16, 24, 96, 5
LAYER = 3

Case = tuple[dict[str, Any], torch.Tensor]
CASES: dict[str, Callable[[Path], Case]] = {}


def case(function: Callable[[Path], Case]) -> Callable[[Path], Case]:
    """Register a case under its function's name."""
    CASES[function.__name__] = function
    return function


def stream() -> torch.Tensor:
    """A small residual stream with a mean of its own; float32 [T, D]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(T, D, generator=generator) * 0.5 + torch.randn(D, generator=generator) * 0.3


def randomise(module: torch.nn.Module, seed: int = 1) -> None:
    """Fill every float parameter, biases too: a zero bias would hide a wrong sign."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1 / math.sqrt(D) if parameter.ndim == 2 else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def spread_thresholds(threshold: torch.Tensor) -> None:
    """Thresholds from just below zero to well above it."""
    with torch.no_grad():
        threshold.copy_(torch.linspace(-0.1, 0.8, threshold.numel()).reshape(threshold.shape))


# SAELens


def sae_lens_case(folder: Path, architecture: str, spec: dict[str, Any] | None = None, **cfg: Any) -> Case:
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(architecture)
    metadata = {"model_name": "tiny", "hook_name": f"blocks.{LAYER}.hook_resid_post", **cfg.pop("metadata", {})}
    sae = sae_class(config_class(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **cfg))
    randomise(sae)
    if hasattr(sae, "threshold"):
        spread_thresholds(sae.threshold.data)
    sae.save_model(folder)
    scale = (spec or {}).get("options", {}).get("input_scale")
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    with torch.no_grad():
        return {"format": "saelens", "library": "sae-lens", **(spec or {})}, sae.encode(stream())


for norm in ("none", "layer_norm", "constant_norm_rescale"):
    for architecture in ("standard", "jumprelu", "gated"):
        for subtracts in (True, False):
            name = f"saelens_{architecture}_{norm}_{'b_dec' if subtracts else 'no_b_dec'}"
            CASES[name] = lambda folder, a=architecture, n=norm, s=subtracts: sae_lens_case(
                folder, a, normalize_activations=n, apply_b_dec_to_input=s
            )


@case
def saelens_expected_average(folder: Path) -> Case:
    spec = {"options": {"input_scale": 0.7}}
    return sae_lens_case(folder, "jumprelu", spec, normalize_activations="expected_average_only_in")


@case
def saelens_topk(folder: Path) -> Case:
    return sae_lens_case(folder, "topk", k=K_TOP)


@case
def saelens_topk_rescaled(folder: Path) -> Case:
    return sae_lens_case(folder, "topk", k=K_TOP, rescale_acts_by_decoder_norm=True)


@case
def saelens_batchtopk_inference(folder: Path) -> Case:
    """What a trained BatchTopK SAE becomes when it is saved for use, with decoder norms folded."""
    from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(model_name="tiny", hook_name=f"blocks.{LAYER}.hook_resid_post")
    config = BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K_TOP, rescale_acts_by_decoder_norm=True, metadata=metadata)
    sae = BatchTopKTrainingSAE(config)
    randomise(sae)
    sae.topk_threshold = torch.tensor(0.6, dtype=torch.float64)
    sae.save_inference_model(str(folder))
    with torch.no_grad():
        return {"format": "saelens", "library": "sae-lens"}, SAE.load_from_disk(folder).encode(stream())


@case
def saelens_5_flat(folder: Path) -> Case:
    """The flat cfg.json of versions 3 to 5."""
    from sae_lens import SAE

    spec, _ = sae_lens_case(folder, "standard", {"options": {"centre": False}})
    flat = {
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "tiny",
        "hook_point": f"blocks.{LAYER}.hook_resid_post",
        "activation_fn_str": "relu",
        "normalize_activations": False,
        "apply_b_dec_to_input": True,
    }
    (folder / "cfg.json").write_text(json.dumps(flat))
    with torch.no_grad():
        return spec, SAE.load_from_disk(folder).encode(stream())


@case
def saelens_transcoder_of_resid_pre(folder: Path) -> Case:
    spec, acts = sae_lens_case(
        folder,
        "jumprelu_transcoder",
        apply_b_dec_to_input=False,
        d_out=D,
        metadata={"hook_name": f"blocks.{LAYER + 1}.hook_resid_pre"},
    )
    return spec, acts


# Gemma Scope, through SAELens' own loaders


def saelens_loaded(loader: Callable[..., Any], folder: Path, repo: str, subfolder: str, **patches: Any) -> torch.Tensor:
    """What SAELens encodes after one of its hub loaders has read the folder."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = folder / Path(subfolder or "") / filename
        return str(path if path.exists() else folder / Path(filename).name)

    kept = {name: getattr(loaders, name) for name in (*patches, "hf_hub_download")}
    for name, value in {**patches, "hf_hub_download": local}.items():
        setattr(loaders, name, value)
    try:
        overrides = {"d_in": D, "d_sae": F, "dtype": "float32"}
        config, state, *_ = loader(repo, subfolder, "cpu", False, overrides)
    finally:
        for name, value in kept.items():
            setattr(loaders, name, value)
    config = loaders.handle_config_defaulting(config)
    sae_class = SAE.get_sae_class_for_architecture(config["architecture"])
    config_class = SAE.get_sae_config_class_for_architecture(config["architecture"])
    sae = sae_class(config_class.from_dict(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    with torch.no_grad():
        return sae.encode(stream())


def weights(seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "W_enc": torch.randn(D, F, generator=generator) / math.sqrt(D),
        "W_dec": torch.randn(F, D, generator=generator) / math.sqrt(D),
        "b_enc": torch.randn(F, generator=generator) * 0.2,
        "b_dec": torch.randn(D, generator=generator) * 0.2,
        "threshold": torch.linspace(0.0, 0.8, F),
    }
    made["W_enc"] /= made["W_enc"].norm(dim=0)
    return made


@case
def gemma_scope(folder: Path) -> Case:
    from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader

    sub = f"gemma-scope-2b-pt-res/layer_{LAYER}/width_16k/average_l0_71"
    (folder / sub).mkdir(parents=True)
    np.savez(folder / sub / "params.npz", **{name: tensor.numpy() for name, tensor in weights().items()})
    acts = saelens_loaded(
        gemma_2_sae_huggingface_loader,
        folder / sub,
        "google/gemma-scope-2b-pt-res",
        f"layer_{LAYER}/width_16k/average_l0_71",
    )
    return {"format": "gemma_scope", "path": sub, "library": "sae-lens"}, acts


@case
def gemma_scope_2(folder: Path) -> Case:
    from sae_lens.loading.pretrained_sae_loaders import gemma_3_sae_huggingface_loader

    sub = f"resid_post/layer_{LAYER}_width_16k_l0_big"
    (folder / sub).mkdir(parents=True)
    tensors = {name.replace("W_", "w_"): tensor for name, tensor in weights().items()}
    save_file(tensors, folder / sub / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": f"model.layers.{LAYER}.output",
        "width": F,
        "l0": 60,
    }
    (folder / sub / "config.json").write_text(json.dumps(config))
    acts = saelens_loaded(
        gemma_3_sae_huggingface_loader,
        folder / sub,
        "google/gemma-scope-2-1b-pt",
        sub,
        get_safetensors_tensor_shapes=lambda *_: {name: list(tensor.shape) for name, tensor in tensors.items()},
    )
    return {"format": "gemma_scope_2", "path": sub, "library": "sae-lens"}, acts


# dictionary_learning


def dictionary_case(folder: Path, name: str, build: Callable[[], Any], **trainer: Any) -> Case:
    from dictionary_learning.utils import load_dictionary

    dictionary = build()
    randomise(dictionary)
    if name == "JumpReluAutoEncoder":
        spread_thresholds(dictionary.threshold.data)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoderTopK"):
        dictionary.threshold.fill_(0.4)
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    fields = {"dict_class": name, "layer": LAYER, "activation_dim": D, "dict_size": F, "lm_name": "tiny"}
    fields |= {"submodule_name": f"resid_post_layer_{LAYER}", **trainer}
    (folder / "config.json").write_text(json.dumps({"trainer": fields, "buffer": {"ctx_len": 128}}))
    loaded, _ = load_dictionary(str(folder), "cpu")
    with torch.no_grad():
        return {"format": "dictionary_learning", "library": "dictionary-learning"}, loaded.encode(stream())


@case
def dictionary_learning_auto_encoder(folder: Path) -> Case:
    from dictionary_learning import AutoEncoder

    return dictionary_case(folder, "AutoEncoder", lambda: AutoEncoder(D, F))


@case
def dictionary_learning_auto_encoder_new(folder: Path) -> Case:
    from dictionary_learning.dictionary import AutoEncoderNew

    return dictionary_case(folder, "AutoEncoderNew", lambda: AutoEncoderNew(D, F))


@case
def dictionary_learning_gated(folder: Path) -> Case:
    from dictionary_learning import GatedAutoEncoder

    return dictionary_case(folder, "GatedAutoEncoder", lambda: GatedAutoEncoder(D, F))


@case
def dictionary_learning_jumprelu(folder: Path) -> Case:
    from dictionary_learning import JumpReluAutoEncoder

    return dictionary_case(folder, "JumpReluAutoEncoder", lambda: JumpReluAutoEncoder(D, F))


@case
def dictionary_learning_topk(folder: Path) -> Case:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    return dictionary_case(folder, "AutoEncoderTopK", lambda: AutoEncoderTopK(D, F, K_TOP), k=K_TOP)


@case
def dictionary_learning_batchtopk(folder: Path) -> Case:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    return dictionary_case(folder, "BatchTopKSAE", lambda: BatchTopKSAE(D, F, K_TOP), k=K_TOP)


@case
def dictionary_learning_matryoshka(folder: Path) -> Case:
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE

    return dictionary_case(
        folder, "MatryoshkaBatchTopKSAE", lambda: MatryoshkaBatchTopKSAE(D, F, K_TOP, [8, 16]), k=K_TOP
    )


# sparsify


def sparsify_case(folder: Path, hookpoint: str = f"layers.{LAYER}", **cfg: Any) -> Case:
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K_TOP, **cfg))
    randomise(coder)
    coder.save_to_disk(folder / hookpoint)
    coder = SparseCoder.load_from_disk(folder / hookpoint)
    with torch.no_grad():
        top, index, _ = coder.encode(stream())
    acts = torch.zeros(T, F).scatter_(-1, index, top)
    return {"format": "sparsify", "path": hookpoint, "library": "eai-sparsify"}, acts


@case
def sparsify_topk(folder: Path) -> Case:
    return sparsify_case(folder)


@case
def sparsify_not_normalised(folder: Path) -> Case:
    return sparsify_case(folder, normalize_decoder=False)


# Llama Scope as first published, and OpenMOSS today


def llama_scope_case(folder: Path, **changes: Any) -> Case:
    from lm_saes.config import SAEConfig
    from lm_saes.sae import SparseAutoEncoder

    hook = f"blocks.{LAYER}.hook_resid_post"
    fields = {
        "hook_point_in": hook,
        "hook_point_out": hook,
        "d_model": D,
        "d_sae": F,
        "expansion_factor": F / D,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 6.0, "out": 6.0},
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        **changes,
    }
    source = weights(3)
    state = {
        "encoder.weight": source["W_enc"].T.contiguous(),
        "encoder.bias": source["b_enc"],
        "decoder.weight": source["W_dec"].T.contiguous(),
        "decoder.bias": source["b_dec"],
    }
    (folder / "checkpoints").mkdir()
    # Published in bfloat16; in float32 here, since its loader folds in the file's own precision and ours in float64.
    save_file(state, folder / "checkpoints" / "final.safetensors")
    (folder / "hyperparams.json").write_text(json.dumps(fields))
    config = SAEConfig.from_pretrained(str(folder), device="cpu", dtype=torch.float32)
    model = SparseAutoEncoder.from_config(config)
    with torch.no_grad():
        return {"format": "llama_scope", "library": "lm-saes f7315179"}, model.encode(stream())


@case
def llama_scope(folder: Path) -> Case:
    return llama_scope_case(folder)


@case
def llama_scope_pre_encoder_bias(folder: Path) -> Case:
    norms = {"in": 6.0, "out": 5.0}
    return llama_scope_case(folder, apply_decoder_bias_to_pre_encoder=True, dataset_average_activation_norm=norms)


def openmoss_case(folder: Path, **changes: Any) -> Case:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    hook = f"blocks.{LAYER}.hook_resid_post"
    config = SAEConfig(
        **{
            "hook_point_in": hook,
            "hook_point_out": hook,
            "d_model": D,
            "expansion_factor": F / D,
            "device": "cpu",
            "dtype": torch.float32,
            **changes,
        }
    )
    model = SparseAutoEncoder(config)
    randomise(model)
    if config.act_fn == "jumprelu":
        model.activation_function.log_jumprelu_threshold.data.copy_(torch.linspace(-3.0, -0.3, F))
    model.set_dataset_average_activation_norm({hook: 5.0})
    model.save_pretrained(str(folder))
    config.save_hyperparameters(str(folder))
    with torch.no_grad():
        batch = model.normalize_activations({hook: stream()})
        return {"format": "openmoss", "library": "llamascopium"}, model.encode(batch[hook])


@case
def openmoss_relu(folder: Path) -> Case:
    return openmoss_case(folder, act_fn="relu")


@case
def openmoss_jumprelu(folder: Path) -> Case:
    return openmoss_case(folder, act_fn="jumprelu")


@case
def openmoss_jumprelu_inference(folder: Path) -> Case:
    return openmoss_case(folder, act_fn="jumprelu", norm_activation="inference", sparsity_include_decoder_norm=False)


@case
def openmoss_token_wise(folder: Path) -> Case:
    return openmoss_case(folder, act_fn="relu", norm_activation="token-wise")


@case
def openmoss_topk(folder: Path) -> Case:
    return openmoss_case(folder, act_fn="topk", top_k=K_TOP)


# Goodfire, Qwen-Scope, OpenAI


@case
def goodfire(folder: Path) -> Case:
    from sae_lens.loading.pretrained_sae_loaders import get_goodfire_huggingface_loader

    name = "Llama-3.1-8B-Instruct-SAE-l19.pth"
    source = weights(4)
    state = {
        "encoder_linear.weight": source["W_enc"].T.contiguous(),
        "encoder_linear.bias": source["b_enc"],
        "decoder_linear.weight": source["W_dec"].T.contiguous(),
        "decoder_linear.bias": source["b_dec"],
    }
    torch.save(state, folder / name)
    acts = saelens_loaded(get_goodfire_huggingface_loader, folder, "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", name)
    return {"format": "goodfire", "path": name, "layer": 19, "library": "sae-lens"}, acts


@case
def qwen_scope(folder: Path) -> Case:
    from sae_lens.loading.pretrained_sae_loaders import qwen_scope_sae_huggingface_loader

    repo, name = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K_TOP}", f"layer{LAYER}.sae.pt"
    sub = repo.split("/")[1]
    (folder / sub).mkdir()
    source = weights(5)
    state = {
        "W_enc": source["W_enc"].T.contiguous(),
        "W_dec": source["W_dec"].T.contiguous(),
        "b_enc": source["b_enc"],
        "b_dec": source["b_dec"],
    }
    torch.save(state, folder / sub / name)
    acts = saelens_loaded(qwen_scope_sae_huggingface_loader, folder / sub, repo, name)
    return {"format": "qwen_scope", "path": f"{sub}/{name}", "library": "sae-lens"}, acts


def openai_case(folder: Path, activation: str) -> Case:
    from sparse_autoencoder import model as upstream

    act = upstream.TopK(K_TOP) if activation == "TopK" else torch.nn.ReLU()
    coder = upstream.Autoencoder(F, D, act, normalize=activation == "TopK")
    randomise(coder)
    sub = "resid_post_mlp_v5_32k/autoencoders"
    (folder / sub).mkdir(parents=True)
    # The activation module's own entries stand twice in this state dict, and its loader takes only the nested ones.
    state = {key: value for key, value in coder.state_dict().items() if not key.startswith("activation.")}
    torch.save(state, folder / sub / f"{LAYER}.pt")
    loaded = upstream.Autoencoder.from_state_dict(torch.load(folder / sub / f"{LAYER}.pt", weights_only=True))
    with torch.no_grad():
        acts, _ = loaded.encode(stream())
    return {"format": "openai", "path": f"{sub}/{LAYER}.pt", "library": "openai/sparse_autoencoder"}, acts


@case
def openai_relu(folder: Path) -> Case:
    return openai_case(folder, "ReLU")


@case
def openai_topk(folder: Path) -> Case:
    return openai_case(folder, "TopK")


# circuit-tracer


def write_config(folder: Path, hook: str) -> None:
    (folder / "config.yaml").write_text(
        f"model_name: tiny\nfeature_input_hook: {hook}\nfeature_output_hook: hook_mlp_out\n"
    )


@case
def circuit_tracer_plt(folder: Path) -> Case:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    activation = JumpReLU(torch.linspace(0.0, 0.8, F), 0.1)
    coder = SingleLayerTranscoder(D, F, activation, LAYER + 1, dtype=torch.float32, device=torch.device("cpu"))
    randomise(coder)
    activation.threshold.data.copy_(torch.linspace(0.0, 0.8, F))
    coder.to_safetensors(str(folder / f"layer_{LAYER + 1}.safetensors"))
    write_config(folder, "hook_resid_pre")
    with torch.no_grad():
        return {"format": "circuit_tracer", "library": "circuit-tracer"}, coder.encode(stream())


@case
def circuit_tracer_clt(folder: Path) -> Case:
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    layers = LAYER + 2
    coder = CrossLayerTranscoder(
        layers, F, D, "jump_relu", lazy_decoder=False, dtype=torch.float32, device=torch.device("cpu")
    )
    randomise(coder)
    coder.activation_function.threshold.data.copy_(torch.linspace(0.0, 0.8, F).expand(layers, 1, F))
    coder.to_safetensors(str(folder))
    for path in folder.glob("W_*"):
        if path.name != f"W_enc_{LAYER + 1}.safetensors":
            path.unlink()
    write_config(folder, "hook_resid_pre")
    with torch.no_grad():
        return {"format": "circuit_tracer", "library": "circuit-tracer"}, coder.encode_layer(stream(), LAYER + 1)


# Directions and probes


@case
def control_vector(folder: Path) -> Case:
    np.float_ = np.float64  # repeng 0.4 still names it
    from repeng import ControlVector
    from repeng.extract import project_onto_direction

    generator = np.random.default_rng(6)
    directions = {layer: generator.normal(size=D).astype(np.float32) for layer in range(1, 6)}
    ControlVector("llama", directions).export_gguf(folder / "vector.gguf")
    act = project_onto_direction(stream().numpy(), directions[LAYER])
    spec = {"format": "control_vector", "path": "vector.gguf", "library": "repeng"}
    return spec | {"options": {"written_by": "repeng"}}, torch.tensor(act)[:, None]


@case
def persona_vector(folder: Path) -> Case:
    """arXiv 2507.21509 saves torch.stack of one vector per hidden state; no library class exists."""
    vectors = torch.randn(7, D, generator=torch.Generator().manual_seed(7))
    torch.save(vectors, folder / "evil_response_avg_diff.pt")
    direction = vectors[LAYER + 1]
    act = (stream() * direction).sum(-1) / direction.norm()
    return {"format": "persona_vector", "path": "evil_response_avg_diff.pt", "library": "torch"}, act[:, None]


def sklearn_case(folder: Path, model: Any) -> Case:
    import skops.io

    x = stream().numpy().astype(np.float64)
    label = (
        (x[:, 0] + 0.3 * x[:, 1] > 0).astype(int) if "Ridge" not in str(model) else np.digitize(x[:, 0], [-0.2, 0.3])
    )
    model.fit(x, label)
    skops.io.dump(model, folder / "probe.skops")
    act = np.atleast_2d(model.decision_function(x).T).T
    spec = {"format": "sklearn_probe", "path": "probe.skops", "library": "scikit-learn"}
    return spec | {"options": {"trained_on": f"resid_post.{LAYER}"}}, torch.tensor(act)


@case
def sklearn_probe_pipeline(folder: Path) -> Case:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return sklearn_case(folder, make_pipeline(StandardScaler(), LogisticRegression()))


@case
def sklearn_probe_multiclass(folder: Path) -> Case:
    from sklearn.linear_model import RidgeClassifier

    return sklearn_case(folder, RidgeClassifier())


def make(name: str) -> None:
    """Write one case; a missing library leaves the old one in place."""
    fresh = HERE / f".{name}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        spec, acts = CASES[name](fresh)
    except ModuleNotFoundError as error:
        shutil.rmtree(fresh)
        print(f"{name}: kept, {error.name} is not installed")
        return
    save_file({"x": stream(), "act": acts.float().contiguous()}, fresh / "expected.safetensors")
    library = spec["library"]
    try:
        spec["library"] = f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        spec["library"] = library
    spec = {"path": ".", "layer": LAYER, **spec}
    (fresh / "case.json").write_text(json.dumps(spec, indent=1) + "\n")
    shutil.rmtree(HERE / name, ignore_errors=True)
    fresh.rename(HERE / name)
    print(f"{name}: {float((acts > 0).float().mean()):.2f} fires, largest {float(acts.abs().max()):.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[1:] or CASES:
        make(wanted)
