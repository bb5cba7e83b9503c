"""Leaves of a parameter tree that are not there yet: read or made a piece at a time, when asked for."""

import math
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from vlmem_jax.hub.rules import Rule

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
            return np.array(self._layer(self._rule.names[0])[index], order="C")  # never a map of the file
        names = self._rule.names[index[0]]
        out = np.empty((len(names), *(part.stop - part.start for part in index[1:])), self.dtype)
        for layer, name in zip(out, names, strict=True):
            layer[...] = self._layer(name)[index[1:]]
        return out

    def view(self) -> np.ndarray:
        """The whole leaf where it lies, if it is one tensor: nothing is read before it is used."""
        [name] = self._rule.names
        return self._layer(name)

    def _layer(self, name: str) -> np.ndarray:
        view = self._rule.view(self._tensors[name])
        return view.reshape(self.shape[1:] if self._rule.stacked else self.shape)


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


class Made(Leaf):
    """What `make`, a function that jax.jit takes, makes when it is asked for."""

    def __init__(self, make: Callable[[], jax.Array]):
        made = jax.eval_shape(make)
        super().__init__(made.shape, made.dtype)
        self._make = make

    def read(self, index: Index) -> np.ndarray:
        return np.asarray(jax.jit(self._make)())[self._full(index)]

    def slabs(self, rows: int) -> Iterator[np.ndarray]:
        whole = self.read(())
        for start in range(0, self.shape[0], rows):
            yield whole[start : start + rows]

    def array(self, sharding: jax.sharding.Sharding, dtype=None) -> jax.Array:
        dtype = self.dtype if dtype is None else dtype
        return jax.jit(lambda: self._make().astype(dtype), out_shardings=sharding)()


class Fresh(Leaf):
    """`layers` layers that `init(number)`, a function that jax.jit takes, makes when they are asked for."""

    def __init__(self, init: Callable[[jax.Array], jax.Array], layers: int):
        made = jax.eval_shape(init, 0)
        super().__init__((layers, *made.shape), made.dtype)
        self._init = init

    def slabs(self, rows: int) -> Iterator[np.ndarray]:
        init = jax.jit(self._init)
        for start in range(0, self.shape[0], rows):
            yield np.stack([np.asarray(init(layer)) for layer in range(start, min(start + rows, self.shape[0]))])

    def array(self, sharding: jax.sharding.Sharding, dtype=None) -> jax.Array:
        dtype = self.dtype if dtype is None else dtype
        layers = np.arange(self.shape[0])
        # one after the other: random bits take several times the memory of what they become
        return jax.jit(lambda: jax.lax.map(self._init, layers).astype(dtype), out_shardings=sharding)()
