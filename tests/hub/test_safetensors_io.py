import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vlmem_jax.hub.safetensors_io import Tensors, Writer

BF16 = np.dtype(ml_dtypes.bfloat16)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(5, 3)).astype(BF16),
        "b": rng.normal(size=(7,)).astype(np.float32),
        "c": rng.normal(size=(1, 2, 3)).astype(np.float16),
        "ids": np.arange(4),
    }


def write(folder, tensors, shard_bytes=10**9):
    folder.mkdir(exist_ok=True)
    writer = Writer(folder, {name: (value.shape, value.dtype) for name, value in tensors.items()}, shard_bytes)
    for name, value in tensors.items():
        writer[name][...] = value
    writer.flush()


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        assert ours[name].tobytes() == theirs[name].tobytes()


def test_reads_what_the_reference_library_writes(tmp_path):
    safetensors.numpy.save_file(some_tensors(), tmp_path / SINGLE_FILE, {"format": "pt"})
    same(Tensors(tmp_path), some_tensors())


def test_the_reference_library_reads_what_it_writes(tmp_path):
    write(tmp_path, some_tensors())
    same(safetensors.numpy.load_file(tmp_path / SINGLE_FILE), some_tensors())
    assert not (tmp_path / INDEX_FILE).exists()


def test_shards_stay_below_their_limit_and_the_index_names_them(tmp_path):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(7)} | {"large": np.zeros(100, np.float32)}
    write(tmp_path, tensors, shard_bytes=100)
    same(Tensors(tmp_path), tensors)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 7 * 40 + 400
    assert sorted(set(index["weight_map"].values())) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for name in set(index["weight_map"].values()):
        shard = safetensors.numpy.load_file(tmp_path / name)
        assert set(shard) == {tensor for tensor, file in index["weight_map"].items() if file == name}
        assert sum(value.nbytes for value in shard.values()) <= 100 or len(shard) == 1


def test_tensors_are_maps_that_cannot_be_written(tmp_path):
    write(tmp_path, some_tensors())
    with pytest.raises(ValueError, match="read-only"):
        Tensors(tmp_path)["b"][0] = 1


def test_a_header_of_odd_length_is_fine(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)
    assert len(header) % 2
    data = np.array([1.5, -2], np.float32)
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(header)) + header + data.tobytes())
    np.testing.assert_array_equal(Tensors(tmp_path)["x"], data)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_cut_off_file_is_named(tmp_path, keep):
    write(tmp_path, some_tensors())
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off") as error:
        Tensors(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "COMPLEX", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        "text",
    ],
)
def test_a_damaged_header_is_named(tmp_path, entry):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="its header is damaged"):
        Tensors(tmp_path)


def test_missing_shards_are_all_named(tmp_path):
    write(tmp_path, {f"t{i}": np.zeros(10, np.float32) for i in range(4)}, shard_bytes=40)
    for i in (1, 3):
        (tmp_path / f"model-0000{i}-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks 2 of 4 shards.*00001-of-00004.*00003-of-00004"):
        Tensors(tmp_path)


def test_shards_without_an_index_are_read_if_all_are_there(tmp_path):
    tensors = {f"t{i}": np.full(10, i, np.float32) for i in range(4)}
    write(tmp_path, tensors, shard_bytes=40)
    (tmp_path / INDEX_FILE).unlink()
    read = Tensors(tmp_path)
    assert all((read[name] == value).all() for name, value in tensors.items())
    for i in (3, 4):
        (tmp_path / f"model-0000{i}-of-00004.safetensors").unlink()
    with pytest.raises(ValueError, match="shards without an index beside them, and lacks number 3, 4 of 4"):
        Tensors(tmp_path)


def test_an_index_may_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"x": "../secret.safetensors"}}')
    with pytest.raises(ValueError, match="only name files beside it"):
        Tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match="must be JSON with a weight_map"):
        Tensors(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        safetensors.numpy.save_file({"x": np.zeros(2)}, tmp_path / name)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(ValueError, match="tensor x stands in .*a.safetensors and again in .*b.safetensors"):
        Tensors(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match=r"has neither .*pytorch_model\.bin may hold code and is never opened"):
        Tensors(tmp_path)


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, some_tensors())
