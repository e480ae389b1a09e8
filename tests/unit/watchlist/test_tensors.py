"""Files are read slice by slice, exactly, without running code from them; damaged ones are refused."""

from __future__ import annotations

import pickle
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from latentwatch.errors import WatchlistRefused
from latentwatch.watchlist import file as watchlist_file
from latentwatch.watchlist import tensors as module
from latentwatch.watchlist.build import build
from latentwatch.watchlist.tensors import SafetensorsFile, Tensors
from latentwatch.watchlist.tensors_gguf import GgufFile
from latentwatch.watchlist.tensors_npz import NpzFile
from latentwatch.watchlist.tensors_torch import ROOT, TorchFile

from tests.support.parity import GOLDEN
from tests.support.sources import document, hook, probe, saelens, source, write_yaml

ROWS, COLUMNS = 37, 11


def values(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


def write(path: Path, tensor: torch.Tensor) -> Tensors:
    """The tensor as "w" in a file of the suffix's format."""
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({"w": tensor, "scalar": torch.tensor(2.5)}, path)
        return SafetensorsFile(path)
    if path.suffix == ".pt":
        torch.save({"w": tensor, "scalar": torch.tensor(2.5), "name": "text"}, path)
        return TorchFile(path)
    save = np.savez_compressed if "compressed" in path.name else np.savez
    save(path, w=tensor.numpy(), scalar=np.float32(2.5))
    return NpzFile(path)


CASES = [
    *(
        (f"a{suffix}", dtype)
        for suffix in (".safetensors", ".pt")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ),
    ("a.npz", torch.float32),
    ("compressed.npz", torch.float64),
    ("a.npz", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_selected_rows_and_columns_are_exact_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, block_bytes: int
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    tensor = values(dtype)
    file = write(tmp_path / name, tensor)
    exact = tensor.double().numpy()
    np.testing.assert_array_equal(file.rows("w", [5, 0, 36, 5]), exact[[5, 0, 36, 5]])
    np.testing.assert_array_equal(file.columns("w", [10, 0, 3]), exact[:, [10, 0, 3]].T)
    np.testing.assert_array_equal(file.whole("w"), exact)
    assert file.whole("scalar") == 2.5
    assert file.rows("w", [1]).dtype == np.float64


def test_columns_of_a_large_file_are_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(4608, 8192)}, path)
    file = SafetensorsFile(path)
    tracemalloc.start()
    file.columns("w", [0, 8191])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 4 * module.BLOCK_BYTES
    assert peak < 1.5 * module.BLOCK_BYTES


def test_a_tensor_behind_a_transposed_view_is_read_as_it_is_shaped(tmp_path: Path) -> None:
    torch.save({"w": values(torch.float32).T}, tmp_path / "view.pt")
    np.testing.assert_array_equal(
        TorchFile(tmp_path / "view.pt").rows("w", [3]), values(torch.float32).T[3:4].double().numpy()
    )


def test_a_bare_tensor_and_a_nested_state_dict_are_read(tmp_path: Path) -> None:
    torch.save(values(torch.float32), tmp_path / "bare.pt")
    assert TorchFile(tmp_path / "bare.pt").shape(ROOT) == (ROWS, COLUMNS)
    torch.save({"sae": {"w": values(torch.float32)}, "version": "2"}, tmp_path / "nested.pt")
    assert TorchFile(tmp_path / "nested.pt", key="sae").shape("w") == (ROWS, COLUMNS)
    with pytest.raises(WatchlistRefused, match="no entry 'model'"):
        TorchFile(tmp_path / "nested.pt", key="model")


class Malicious:
    """Runs code when a plain pickle is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("old_format", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_format: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Malicious()}, tmp_path / "bad.pt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(WatchlistRefused, match="asks for code"):
        TorchFile(tmp_path / "bad.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(WatchlistRefused):
        TorchFile(tmp_path / "plain.pkl")
    assert not (tmp_path / "executed").exists()


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", w=np.array([{"a": 1}], dtype=object))
    with pytest.raises(WatchlistRefused, match="dtype object"):
        NpzFile(tmp_path / "objects.npz").shape("w")


def test_a_dtype_that_cannot_be_read_exactly_is_named(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
    with pytest.raises(WatchlistRefused, match="F8_E4M3"):
        SafetensorsFile(tmp_path / "f8.safetensors").shape("w")


def test_a_gguf_model_or_an_absurd_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64))
    with pytest.raises(WatchlistRefused, match="a count of"):
        GgufFile(path)
    path.write_bytes(b"GGML" + bytes(64))
    with pytest.raises(WatchlistRefused, match="magic"):
        GgufFile(path)


@pytest.mark.parametrize("claimed", [1 << 20, 1 << 60])
@pytest.mark.parametrize("there", [0, 1 << 20])
def test_a_gguf_array_costs_little_memory_whatever_length_it_claims(tmp_path: Path, claimed: int, there: int) -> None:
    """gguf makes an object of every number of an array, and goes on making empty ones behind the end of the file."""
    path = tmp_path / "bad.gguf"
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, claimed)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(there))
    tracemalloc.start()
    try:
        with pytest.raises(WatchlistRefused, match=r"a count of|parts"):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_a_gguf_file_that_ends_inside_a_tensor_is_refused(tmp_path: Path) -> None:
    whole = (GOLDEN / "control_vector" / "vector.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-4])
    with pytest.raises(WatchlistRefused, match="not a whole GGUF file"):
        GgufFile(path)


FILES = {
    "safetensors": (SafetensorsFile, GOLDEN / "openmoss_jumprelu" / "sae_weights.safetensors"),
    "npz": (NpzFile, next(GOLDEN.glob("gemma_scope/**/params.npz"))),
    "pt": (TorchFile, GOLDEN / "dictionary_learning_gated" / "ae.pt"),
    "gguf": (GgufFile, GOLDEN / "control_vector" / "vector.gguf"),
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes overwritten, a piece cut, doubled or moved: what disks, networks and people do to files."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        at = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(len(content), 512))
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + 8] = rng.randbytes(8)
        elif kind == 2:
            del content[at : at + rng.choice([1, 8, 100, len(content)])]
        elif kind == 3:
            content[at:at] = content[at : at + rng.choice([1, 8, 100])]
        else:
            content[at : at + 8] = rng.choice([b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 1 << 40)])
        if not content:
            break
    return bytes(content)


@pytest.fixture(scope="module")
def built_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small built watchlist file."""
    folder = tmp_path_factory.mktemp("built")
    probe(folder / "p.safetensors")
    saelens(folder / "sae")
    hooks = hook(
        2,
        source("saelens", "sae"),
        source("linear_probe", "p.safetensors", prefix="p", options={"trained_on": "resid_post.2"}),
    )
    build(write_yaml(folder / "w.yaml", document(hooks)), folder / "out.safetensors")
    return (folder / "out.safetensors").read_bytes()


def test_a_damaged_watchlist_file_is_refused_or_reads_as_it_was_written(built_bytes: bytes) -> None:
    """The engine scores what this reader returns: of 10,000 damaged files, none may give a row that was not built."""
    original, rng = watchlist_file.parse(built_bytes), random.Random(0)
    refused = 0
    for _ in range(10_000):
        try:
            got = watchlist_file.parse(mutated(built_bytes, rng))
        except WatchlistRefused:
            refused += 1
            continue
        assert (got.name, got.model, got.features) == (original.name, original.model, original.features)
        for rows, expected in zip(got.hooks, original.hooks, strict=True):
            assert rows.hook_point == expected.hook_point
            np.testing.assert_array_equal(rows.w_hi_KD, expected.w_hi_KD)
            np.testing.assert_array_equal(rows.w_lo_KD, expected.w_lo_KD)
            np.testing.assert_array_equal(rows.scale_6K, expected.scale_6K)
    assert refused > 9000


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", FILES)
def test_mutated_source_files_are_refused_or_read_and_never_crash(tmp_path: Path, form: str) -> None:
    """These containers carry no checksum, so a changed number can be read; the card's sha256 then differs."""
    opener, original = FILES[form]
    data, rng = original.read_bytes(), random.Random(form)
    path = tmp_path / f"fuzzed.{form}"
    refused = 0
    for _ in range(400):
        path.write_bytes(mutated(data, rng))
        try:
            file = opener(path)
            for name, entry in file.entries.items():
                if entry.shape and 0 not in entry.shape:
                    assert file.rows(name, [entry.shape[0] - 1]).shape == (1, *entry.shape[1:])
                if len(entry.shape) == 2 and 0 not in entry.shape:
                    assert file.columns(name, [0]).shape == (1, entry.shape[0])
        except WatchlistRefused:
            refused += 1
    assert refused > 100
