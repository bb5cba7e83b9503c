"""Safetensors files of a Hugging Face folder: mapped, never held in memory; pickled weights are never opened."""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STEM = "model"
"""Beginning of the names of a model's files: STEM.safetensors, or shards with an index beside them."""
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
    "BOOL": np.dtype(np.bool_),
}
SAMPLE = 16
"""Numbers of each tensor that its digest depends on."""
_HEADER_LIMIT = 100_000_000  # bytes; what other readers of the format accept


class Tensors(Mapping[str, np.ndarray]):
    """Every tensor of a folder by name, as a read-only map of its file.

    Raises ValueError naming the file, for a folder without safetensors, missing shards and damaged files.
    """

    def __init__(self, folder: str | os.PathLike, stem: str = STEM):
        self.folder = Path(folder)
        self._entries: dict[str, tuple[Path, int, dict]] = {}
        self._maps: dict[Path, np.memmap] = {}
        for path in _files(self.folder, stem):
            start, header = _read_header(path)
            for name, entry in header.items():
                if name in self._entries:
                    raise ValueError(f"tensor {name} stands in {self._entries[name][0]} and again in {path}")
                self._entries[name] = path, start + entry["data_offsets"][0], entry

    def __getitem__(self, name: str) -> np.ndarray:
        path, offset, entry = self._entries[name]
        if path not in self._maps:
            self._maps[path] = np.memmap(path, np.uint8, "r")
        return np.ndarray(entry["shape"], DTYPES[entry["dtype"]], self._maps[path], offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Tells a checkpoint from others by names, shapes, dtypes and the first numbers of its tensors, however they are
    spread over files: few bytes are read."""
    content = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        x = tensors[name]
        content.update(repr((name, x.shape, x.dtype.name, x.reshape(-1)[:SAMPLE].tobytes())).encode())
    return content.hexdigest()


class Writer(Mapping[str, np.ndarray]):
    """Safetensors files of known content: `writer[name]` is the tensor in its file, to be assigned to.

    `tensors`: shape and dtype of each, in the order in which they are laid out. Files larger than `shard_bytes` are
    avoided by splitting, with an index beside the shards. Raises OSError at once if the disk has no room for all.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        shard_bytes: int,
        stem: str = STEM,
    ):
        shards: list[dict] = [{}]
        filled = 0
        for name, (shape, dtype) in tensors.items():
            size = math.prod(shape) * dtype.itemsize
            if shards[-1] and filled + size > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = shape, dtype
            filled += size
        count = len(shards)
        names = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        names = [f"{stem}.safetensors"] if count == 1 else names
        self._arrays: dict[str, np.ndarray] = {}
        self._maps = [self._create(Path(folder) / name, shard) for name, shard in zip(names, shards, strict=True)]
        if count > 1:
            total = sum(array.nbytes for array in self._arrays.values())
            files = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": files}
            (Path(folder) / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _create(self, path: Path, shard: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> np.memmap:
        codes = {dtype: code for code, dtype in DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in shard.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start aligned
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.flush()
            try:
                # a full disk must fail here: met while writing to the map it would kill the process
                os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
        mapped = np.memmap(path, np.uint8, "r+")
        for name, (shape, dtype) in shard.items():
            offset = 8 + len(text) + header[name]["data_offsets"][0]
            self._arrays[name] = np.ndarray(shape, dtype, mapped, offset)
        return mapped

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def flush(self) -> None:
        """Brings everything to the disk."""
        for mapped in self._maps:
            mapped.flush()


def _files(folder: Path, stem: str) -> list[Path]:
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} must be JSON with a weight_map from tensor to file name: {error!r}") from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ValueError(f"{index} may only name files beside it; got {', '.join(map(repr, outside))}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {len(missing)} of {len(names)} shards of its index: {', '.join(missing)}")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    if shards := _without_index(folder, stem):
        return shards
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = f"; {', '.join(pickled[:3])} may hold code and is never opened, save it as safetensors" if pickled else ""
    raise ValueError(f"{folder} has neither {single.name} nor {index.name}{hint}")


def _without_index(folder: Path, stem: str) -> list[Path]:
    """Shards by their own names, which say how many there are. Raises ValueError where one is missing."""
    matches = [re.fullmatch(rf"{stem}-(\d+)-of-(\d+)\.safetensors", path.name) for path in sorted(folder.iterdir())]
    found = {int(match[1]): folder / match[0] for match in matches if match}
    totals = {int(match[2]) for match in matches if match}
    missing = sorted(set(range(1, max(totals, default=0) + 1)) - found.keys())
    if len(totals) > 1 or missing:
        raise ValueError(
            f"{folder} has shards without an index beside them, and lacks number {', '.join(map(str, missing)) or '?'} "
            f"of {max(totals)}"
        )
    return list(found.values())


def _read_header(path: Path) -> tuple[int, dict[str, dict]]:
    """Where the data begin, and the entry of each tensor; checked against the size of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{path} is cut off or no safetensors file: {size} bytes hold no header; fetch it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((_checked_end(name, entry) for name, entry in header.items()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no safetensors file, its header is damaged: {error!r}") from error
    if 8 + length + end > size:
        raise ValueError(f"{path} is cut off: {8 + length + end} bytes are announced, {size} are there; fetch it again")
    return 8 + length, header


def _checked_end(name: str, entry: dict) -> int:
    start, end = entry["data_offsets"]
    if start < 0 or end - start != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:
        raise ValueError(f"tensor {name} is {entry['shape']} of {entry['dtype']}, which is not {end - start} bytes")
    return end
