"""Any change to somebody's file is refused, or read as its own library reads it; never silently something else.

Every format of `sources.FORMATS` is asked, on each of its golden cases: a new reader is fuzzed once it has one, and
the first test fails until it has.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from latentwatch.errors import WatchlistRefused
from latentwatch.watchlist.sources import FORMATS

from tests.support import foreign
from tests.support.foreign import CONFIGS, CONTAINERS, Fixture

skops = pytest.importorskip("skops")
ALL = foreign.names()
KINDS = foreign.one_per_kind()
NEVER_IN_THE_ENCODER = frozenset(
    ("W_dec", "w_dec", "W_D", "decoder.weight", "b_dec", "decoder.bias", "W_skip", "affine_skip_connection")
) | {"scaling_factor", "threshold of a list", "stats_last_nonzero"}
"""What other formats call their decoder: a reader may know these and pass over them."""
FOREIGN_TENSORS = sorted(
    NEVER_IN_THE_ENCODER
    | {"threshold", "log_threshold", "b_gate", "b_mag", "r_mag", "gate_bias", "b_enc", "b_E_glu", "W_E_glu", "mean"}
    | {"scale", "std", "encoder.weight", "pre_bias", "k", "topk_threshold", "norm", "input_scale", "temperature"}
    | {"activation_function.threshold", "log_jumprelu_threshold", "dataset_average_activation_norm.x", "direction"}
)
FOREIGN_KEYS = [
    *(
        "norm",
        "normalize",
        "scale",
        "input_scale",
        "centre",
        "mean",
        "layer",
        "hook_point",
        "hook_name",
        "hook",
        "site",
    ),
    *("activation", "activation_fn", "act_fn", "k", "top_k", "bias", "apply_b_dec_to_input", "threshold", "transpose"),
    *("rescale_acts_by_decoder_norm", "norm_activation", "use_glu_encoder", "reshape_activations", "signed", "gate"),
    *("normalize_activations", "jump_relu_threshold", "hook_head_index", "model_from_pretrained_kwargs", "layer_norm"),
]
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, 1, 2, 5, 24, 0.5, -1, "", "3", [], {}, {"in": 1.0, "out": 2.0}, [1, 2]),
        *("none", "relu", "topk", "jumprelu", "gated", "tanh", "groupmax", "layer_norm", "sae", "AutoEncoderTopK"),
        *("token-wise", "dataset-wise", "inference", "float16", "hook_z"),
        *("blocks.4.hook_resid_post", "blocks.3.hook_mlp_out", "resid_pre_layer_3"),
    ]
)
words = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
quick = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)


def test_every_format_is_fuzzed(tmp_path: Path) -> None:
    assert {foreign.fixture(name, tmp_path / name).format for name in ALL} == set(FORMATS)


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Fixture:
    """The case of the test's parameter, valid as it is."""
    made = foreign.fixture(request.param, tmp_path / "source")
    made.opened()
    return made


def containers(source: Fixture) -> list[Path]:
    return [path for path in source.files if path.suffix in CONTAINERS]


def configs(source: Fixture) -> list[Path]:
    return [path for path in source.files if path.suffix in CONFIGS]


def refused_or_unchanged(source: Fixture, before: np.ndarray) -> bool:
    """Whether it is refused; if it is not, its numbers must be those of the file before the change."""
    try:
        after = source.encoded()
    except WatchlistRefused as refusal:
        assert refusal.found
        assert refusal.instead
        return True
    np.testing.assert_array_equal(after, before)
    return False


@pytest.mark.parametrize("source", KINDS, indirect=True)
@quick
@given(data=st.data())
def test_a_tensor_that_nothing_declares_is_refused_by_name(source: Fixture, data: st.DataObject) -> None:
    for path in containers(source):
        tensors, beside = foreign.read_tensors(path)
        if list(tensors) == [""]:
            continue  # a file of one tensor without a name has no room for another
        name = data.draw(st.sampled_from(FOREIGN_TENSORS) | words)
        if name in tensors or name.startswith("direction"):
            continue
        shape = data.draw(st.sampled_from([(), (1,), (16,), (24,), (16, 24), (24, 16), (16, 16)]))
        before = source.encoded()
        foreign.write_tensors(path, tensors | {name: np.ones(shape, np.float32)}, beside)
        try:
            if not refused_or_unchanged(source, before):
                assert name in NEVER_IN_THE_ENCODER, f"{name} was passed over"
        finally:
            foreign.write_tensors(path, tensors, beside)


@pytest.mark.parametrize("source", KINDS, indirect=True)
@quick
@given(data=st.data())
def test_a_value_beside_the_tensors_that_nothing_declares_is_refused_by_name(
    source: Fixture, data: st.DataObject
) -> None:
    for path in containers(source):
        tensors, beside = foreign.read_tensors(path)
        if path.suffix == ".npz" or list(tensors) == [""]:
            continue
        name = data.draw(words.filter(lambda word: word not in ("names", "window", "model", "licence", "version")))
        value = data.draw(st.sampled_from(["resid_post.4", "true", "0.5"]))
        foreign.write_tensors(path, tensors, beside | {name: value})
        try:
            with pytest.raises(WatchlistRefused, match=name):
                source.opened()
        finally:
            foreign.write_tensors(path, tensors, beside)


@pytest.mark.parametrize("source", KINDS, indirect=True)
@quick
@given(data=st.data())
def test_a_key_that_nothing_declares_is_refused_by_name(source: Fixture, data: st.DataObject) -> None:
    for path in configs(source):
        content = foreign.read_config(path)
        before = source.encoded()
        changed = copy.deepcopy(content)
        _, section = data.draw(st.sampled_from(list(foreign.sections(changed))))
        key, invented = data.draw(
            st.one_of(
                words.map(lambda word: (f"x_{word}", True)), st.sampled_from(FOREIGN_KEYS).map(lambda key: (key, False))
            )
        )
        if key in section or any("details" in name for name in content.get("metadata", ())):
            continue
        section[key] = data.draw(VALUES)
        foreign.write_config(path, changed)
        try:
            refused = refused_or_judged(source) if not invented else refused_or_unchanged(source, before)
            assert refused or not invented, f"{key} was passed over"
        finally:
            foreign.write_config(path, content)


def refused_or_judged(source: Fixture) -> bool:
    """Whether it is refused; if it is not, its own library must give the same numbers, where that is installed."""
    try:
        source.judged()
    except WatchlistRefused as refusal:
        if refusal.reason == "source_numbers" and "random token" in refusal.found:
            raise AssertionError(f"read as something else than its library reads: {refusal}") from refusal
        return True
    return False


@pytest.mark.parametrize("source", KINDS, indirect=True)
@settings(quick, max_examples=20)
@given(data=st.data())
def test_any_value_of_a_key_is_refused_or_read_as_the_library_reads_it(source: Fixture, data: st.DataObject) -> None:
    for path in configs(source):
        content = foreign.read_config(path)
        changed = copy.deepcopy(content)
        _, section = data.draw(st.sampled_from([one for one in foreign.sections(changed) if one[1]]))
        section[data.draw(st.sampled_from(sorted(section)))] = data.draw(VALUES)
        foreign.write_config(path, changed)
        try:
            refused_or_judged(source)
        finally:
            foreign.write_config(path, content)


@pytest.mark.parametrize("source", KINDS, indirect=True)
@pytest.mark.parametrize("how", ["transposed", "a row less", "a row more", "a column less", "flat"])
def test_a_tensor_of_another_shape_is_refused_or_belongs_to_the_decoder(source: Fixture, how: str) -> None:
    change = {
        "transposed": lambda array: array.T,
        "a row less": lambda array: array[:-1],
        "a row more": lambda array: np.concatenate([array, array[-1:]]),
        "a column less": lambda array: array[..., :-1],
        "flat": lambda array: array.reshape(-1),
    }[how]
    before = source.encoded()
    for path in containers(source):
        tensors, beside = foreign.read_tensors(path)
        for name, array in tensors.items():
            made = change(array) if array.ndim else np.repeat(array, 2)
            if made.shape == array.shape:
                continue
            foreign.write_tensors(path, tensors | {name: made}, beside)
            refused_or_unchanged(source, before)
        foreign.write_tensors(path, tensors, beside)


HOLD_EVERY_LAYER = ("control_vector", "persona_vector")


@pytest.mark.parametrize("source", ALL, indirect=True)
def test_a_source_is_refused_under_every_other_hook_point(source: Fixture) -> None:
    """Files with a direction per layer are for all of them; under another one they must give another direction."""
    own = source.opened().rows([0]).w_KD
    for layer in range(source.layer + 2):
        if layer == source.layer:
            continue
        try:
            other = source.opened(layer).rows([0]).w_KD
        except WatchlistRefused as refusal:
            assert refusal.instead
        else:
            assert source.format in HOLD_EVERY_LAYER
            assert not np.allclose(other, own)


@pytest.mark.parametrize("source", ALL, indirect=True)
def test_a_source_whose_path_or_file_names_another_layer_is_refused(source: Fixture) -> None:
    """Each part of the path with the layer's number in it, then each text in its configurations."""
    for part in Path(source.path).parts:
        other = re.sub(rf"(layers?[._]?|-l|^){source.layer}(?!\d)", rf"\g<1>{source.layer + 1}", part)
        if other == part:
            continue
        old = next(path for path in source.folder.rglob(part))
        new = old.rename(old.with_name(other))
        with pytest.raises(WatchlistRefused):
            source.opened(path=source.path.replace(part, other))
        new.rename(old)
    for path in configs(source):
        text = path.read_text()
        for name in ("blocks.", "layers.", "resid_post_layer_"):
            if f"{name}{source.layer}" in text:
                path.write_text(text.replace(f"{name}{source.layer}", f"{name}{source.layer + 1}"))
                with pytest.raises(WatchlistRefused):
                    source.opened()
        path.write_text(text)


@pytest.mark.parametrize("source", ALL, indirect=True)
def test_a_renamed_source_without_a_place_is_asked_for_it(source: Fixture, tmp_path: Path) -> None:
    """A place that the files state stays; one that stood in the path alone must be given, and agree."""
    lies = source.folder / source.path
    suffix = lies.suffix if lies.is_file() else ""
    lies.rename(tmp_path / f"renamed{suffix}")
    made = Fixture(
        source.format,
        tmp_path,
        f"renamed{suffix}",
        source.layer,
        {"k": 5} if source.format == "qwen_scope" else source.options,
    )
    try:
        made.opened()
    except WatchlistRefused as refusal:
        assert refusal.reason == "source_place_missing"
        assert "trained_on" in refusal.instead
        made.opened(trained_on=f"resid_post.{source.layer}")
        with pytest.raises(WatchlistRefused):
            made.opened(trained_on=f"resid_post.{source.layer + 1}")
    else:
        stated: list[Any] = [*map(foreign.read_config, configs(made)), dict(made.options)]
        stated += [foreign.read_tensors(path)[1] for path in containers(made)]
        assert source.format in HOLD_EVERY_LAYER or str(source.layer) in str(stated) or "resid" in str(stated)


@pytest.mark.parametrize("name", ["note", "x", "metadata.note"])
def test_a_person_may_say_of_an_unknown_name_that_it_does_not_matter(tmp_path: Path, name: str) -> None:
    made = foreign.fixture("saelens_jumprelu_none_b_dec", tmp_path)
    path = tmp_path / "cfg.json"
    content = foreign.read_config(path)
    before = made.encoded()
    holder = content["metadata"] if name.startswith("metadata.") else content
    holder[name.removeprefix("metadata.")] = 1
    foreign.write_config(path, content)
    with pytest.raises(WatchlistRefused, match=name) as refusal:
        made.opened()
    assert refusal.value.reason == "source_unknown"
    opened = made.opened(ignore=(name,))
    np.testing.assert_array_equal(opened.rows([0]).w_KD, opened.rows([0]).w_KD)
    with pytest.raises(WatchlistRefused, match="no unknown name"):
        made.opened(ignore=(name, "W_enc"))
    assert before.shape[1] == opened.about.width
