"""Leaves of a parameter tree that are not there yet: read or made a piece at a time, when asked for."""

import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from vlmem_jax.memory.base import Start
from vlmem_jax.records import Rule
from vlmem_jax.runtime.compiler import once

Index = tuple[slice, ...]


class Leaf:
    """An array that `read` gives in pieces."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self, index: Index) -> np.ndarray:
        """The piece at `index`, which may leave out last axes."""
        raise NotImplementedError

    def slabs(self, rows: int) -> Iterator[np.ndarray]:
        """The whole array, `rows` of its first axis at a time."""
        for start in range(0, self.shape[0], rows):
            yield self.read((slice(start, start + rows),))

    def array(self, sharding: jax.sharding.Sharding, dtype=None) -> jax.Array:
        """The whole array on the devices of `sharding`; each host reads only its own part. `dtype`: what to cast to."""
        dtype = self.dtype if dtype is None else dtype
        return jax.make_array_from_callback(
            self.shape, sharding, lambda index: self.read(index).astype(dtype, copy=False)
        )

    def _full(self, index: Index) -> Index:
        index = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True))


class FromTensors(Leaf):
    """What `rule` takes from tensors."""

    def __init__(self, rule: Rule, tensors: Mapping[str, np.ndarray]):
        super().__init__(rule.our_shape, tensors[rule.names[0]].dtype)
        self._rule = rule
        self._tensors = tensors

    def read(self, index: Index) -> np.ndarray:
        index = self._full(index)
        if not self._rule.stacked:
            out = np.array(self._layer(self._rule.names[0])[index], order="C")  # never a map of the file
            check_finite(self._rule.names[0], out)
            return out
        names = self._rule.names[index[0]]
        out = np.empty((len(names), *(part.stop - part.start for part in index[1:])), self.dtype)
        for layer, name in zip(out, names, strict=True):
            layer[...] = self._layer(name)[index[1:]]
            check_finite(name, layer)
        return out

    def view(self) -> np.ndarray:
        """The whole leaf where it lies, if it is one tensor: nothing is read before it is used."""
        [name] = self._rule.names
        return self._layer(name)

    def _layer(self, name: str) -> np.ndarray:
        view = self._rule.view(self._tensors[name])
        return view.reshape(self.shape[1:] if self._rule.stacked else self.shape)


_EXPONENTS = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}
"""Bits that are all set in numbers that are not finite, by dtype: to look at them is faster than `np.isfinite`."""


class NonFiniteError(ValueError):
    """A tensor holds NaN or infinity."""


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises NonFiniteError, naming the tensor, if it holds NaN or infinity."""
    if array.dtype.name in _EXPONENTS:
        kind, mask = _EXPONENTS[array.dtype.name]
        bits = np.ascontiguousarray(array).view(kind).reshape(-1)
        for start in range(0, len(bits), 1 << 20):  # little memory
            if ((bits[start : start + (1 << 20)] & mask) == mask).any():
                raise NonFiniteError(f"tensor {name} holds numbers that are not finite (NaN or infinity); get it again")


class Held(Leaf):
    """An array that is there."""

    def __init__(self, array: np.ndarray):
        super().__init__(array.shape, array.dtype)
        self._array = array

    def read(self, index: Index) -> np.ndarray:
        return self._array[index]


class Extended(Leaf):
    """`leaf`, and after its end on `axis` the array `more`."""

    def __init__(self, leaf: Leaf, more: np.ndarray, axis: int):
        shape = list(leaf.shape)
        shape[axis] += more.shape[axis]
        super().__init__(tuple(shape), leaf.dtype)
        self._leaf = leaf
        self._more = more.astype(leaf.dtype)
        self._axis = axis

    def read(self, index: Index) -> np.ndarray:
        index, axis = list(self._full(index)), self._axis
        seam, part = self._leaf.shape[axis], index[axis]
        index[axis] = slice(min(part.start, seam), min(part.stop, seam))
        old = self._leaf.read(tuple(index))
        index[axis] = slice(max(part.start - seam, 0), max(part.stop - seam, 0))
        return np.concatenate([old, self._more[tuple(index)]], axis)


class Started(Leaf):
    """A memory's parameter that starts as one of the decoder's layers, `leaf`."""

    def __init__(self, leaf: Leaf, start: Start):
        _, *sizes = leaf.shape
        if start.repeats > 1:
            sizes[1] *= start.repeats
        super().__init__((len(start.layers), *sizes), leaf.dtype)
        self._leaf, self._start = leaf, start

    def read(self, index: Index) -> np.ndarray:
        own, *inside = self._full(index)
        layers = [self._leaf.read((slice(n, n + 1),)) for n in self._start.layers[own]]
        here = self._start._replace(layers=tuple(range(len(layers))))
        return here.of(np.concatenate(layers))[:, *inside]


class Maker:
    """Makes the leaves that a model has and no file, all by one function."""

    def __init__(self, init: Callable[[jax.Array | int], dict[str, jax.Array]], layers: int | None = None):
        """`init(layer)`, which jax.jit takes, gives a layer of each leaf by its path; without `layers`, the whole."""
        self.init, self.layers = init, layers
        stacked = () if layers is None else (layers,)
        self.leaves = {
            path: Fresh(self, path, (*stacked, *one.shape), one.dtype) for path, one in jax.eval_shape(init, 0).items()
        }

    def arrays(self, shardings: Mapping[str, jax.sharding.Sharding], dtype=None) -> dict[str, jax.Array]:
        """The leaves of these paths on devices, by one program; one layer after the other, to need little memory."""

        def make() -> dict[str, jax.Array]:
            made = self.init(0) if self.layers is None else jax.lax.map(self.init, np.arange(self.layers))
            return {path: made[path].astype(dtype or made[path].dtype) for path in shardings}

        return jax.jit(make, out_shardings=dict(shardings), compiler_options=once())()


class Fresh(Leaf):
    """The leaf `path` of a maker."""

    def __init__(self, maker: Maker, path: str, shape: tuple[int, ...], dtype: np.dtype):
        super().__init__(shape, dtype)
        self.maker, self._path = maker, path

    def slabs(self, rows: int) -> Iterator[np.ndarray]:
        init = jax.jit(lambda layer: self.maker.init(layer)[self._path], compiler_options=once())
        whole = np.asarray(init(0)) if self.maker.layers is None else None
        for start in range(0, self.shape[0], rows):
            layers = range(start, min(start + rows, self.shape[0]))
            yield np.stack([np.asarray(init(n)) for n in layers]) if whole is None else whole[start : start + rows]
