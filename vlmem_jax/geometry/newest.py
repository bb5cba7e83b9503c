"""Geometry that is made once of a video, however many questions are asked about it."""

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np
from jaxtyping import UInt8

from vlmem_jax.processing.processor import GeometryOf
from vlmem_jax.types import Geometry

KEPT = 8
"""Clips; a gigabyte at 32 frames of 384 pixels."""


class Newest:
    """What a model of geometry makes of clips: a `GeometryOf` that keeps that of the clips it was asked of last, by
    their pixels. Threads may call it side by side; of one clip it is made by the first of them alone."""

    def __init__(self, made_by: GeometryOf, kept: int = KEPT):
        self.digest, self._made_by, self._kept = made_by.digest, made_by, kept
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple, Future[Geometry]] = OrderedDict()

    def __call__(self, pixels_ISSc: UInt8[np.ndarray, "I S S c"]) -> Geometry:
        key = pixels_ISSc.shape, hashlib.blake2b(np.ascontiguousarray(pixels_ISSc)).digest()
        with self._lock:
            mine = key not in self._found
            found = self._found.setdefault(key, Future())
            self._found.move_to_end(key)
            if len(self._found) > self._kept:
                self._found.popitem(last=False)
        if mine:
            try:
                found.set_result(self._made_by(pixels_ISSc))
            except BaseException as error:
                found.set_exception(error)
        return found.result()
