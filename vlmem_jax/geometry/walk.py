"""What is kept of a camera's walk: the newest frames, and keyframes, with their places in the world. Pure numpy."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from vlmem_jax.trees import State, axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept(State):
    """Frames that may be seen again, in the order of time; empty slots come first."""

    pictures_FHWc: UInt8[np.ndarray, "F H W c"] = axes("frames", None, None, None)
    numbers_F: Int64[np.ndarray, "F"] = axes("frames")
    """-1: empty."""
    points_FP3: Float64[np.ndarray, "F P 3"] = axes("frames", "patches", None)
    """One of each patch, in the world."""
    weights_FP: Float64[np.ndarray, "F P"] = axes("frames", "patches")
    """How far a point is to be trusted; 0 where it is not, or not known."""
    cameras_F3: Float64[np.ndarray, "F 3"] = axes("frames", None)
    """From where the frame was taken."""

    @classmethod
    def empty(cls, frames: int, patches: int, height: int, width: int) -> "Kept":
        return cls(
            np.zeros((frames, height, width, 3), np.uint8),
            np.full(frames, -1, np.int64),
            np.zeros((frames, patches, 3)),
            np.zeros((frames, patches)),
            np.zeros((frames, 3)),
        )

    def at(self, slots: np.ndarray | slice) -> "Kept":
        """The frames in these slots."""
        return jax.tree.map(lambda x: x[slots], self)

    def __add__(self, other: "Kept") -> "Kept":
        """The frames of both."""
        return jax.tree.map(lambda *both: np.concatenate(both), self, other)

    @property
    def filled_F(self) -> Bool[np.ndarray, "F"]:
        return self.numbers_F >= 0

    @property
    def known_F(self) -> Bool[np.ndarray, "F"]:
        """Which frames later ones can be joined to."""
        return self.weights_FP.any(1)

    def since(self, number: int) -> "Kept":
        """The same, with the slots of frames before this one emptied."""
        later_F = self.numbers_F >= number
        return dataclasses.replace(
            self,
            numbers_F=np.where(later_F, self.numbers_F, -1),
            weights_FP=np.where(later_F[:, None], self.weights_FP, 0.0),
        )

    def apart(self, other: "Kept") -> Float64[np.ndarray, "F G"]:
        """How far frames are from others: their cameras, and the middles of what they look at, summed.

        Cameras in one place that look away from each other have nothing in sight by which a window could be joined.
        """

        def places(kept: Kept) -> np.ndarray:
            weights_FP1 = kept.weights_FP[..., None]
            middles_F3 = (kept.points_FP3 * weights_FP1).sum(1) / np.maximum(weights_FP1.sum(1), 1e-12)
            return np.stack([kept.cameras_F3, middles_F3], 1)

        return np.linalg.norm(places(self)[:, None] - places(other), axis=-1).sum(-1)

    def with_key(self, frame: "Kept") -> "Kept":
        """One keyframe more, in as many slots.

        Where none is empty, of the two that are nearest to each other the later goes: keyframes spread over all that
        has been walked, and those stay that were placed first, over the fewest windows.
        """
        frames = self + frame
        gone = 0
        if frames.filled_F.all():
            apart_FF = frames.apart(frames)
            np.fill_diagonal(apart_FF, np.inf)
            gone = max(np.unravel_index(apart_FF.argmin(), apart_FF.shape))
        return frames.at(np.delete(np.arange(len(frames.numbers_F)), gone))

    def nearest(self, frame: "Kept", count: int) -> "Kept":
        """The `count` frames nearest to one, or those that there are, in the order of time."""
        slots = np.flatnonzero(self.filled_F)
        order = np.argsort(self.at(slots).apart(frame)[:, 0], kind="stable")
        return self.at(np.sort(slots[order[:count]]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk(State):
    """All that is carried from frame to frame, of one size from the first on; `trees.to_host` gives what is saved."""

    recent: Kept
    """The newest frames, among them those that have not come out."""
    keys: Kept
    pushed: Int64[np.ndarray, ""] = axes()
    """Frames that came in."""
    out: Int64[np.ndarray, ""] = axes()
    """Frames that came out."""
    worlds: Int64[np.ndarray, ""] = axes()
    """Worlds begun: one, and another with each cut."""
    identities: Int64[np.ndarray, ""] = axes()
    """Windows that could not be joined."""
    last_key: Int64[np.ndarray, ""] = axes()
    """The frame that became a keyframe last; -1: none in this world."""

    @classmethod
    def empty(cls, recent: int, keyframes: int, patches: int, height: int, width: int) -> "Walk":
        zero = np.zeros((), np.int64)
        kept = (Kept.empty(frames, patches, height, width) for frames in (recent, keyframes))
        return cls(*kept, zero, zero, zero, zero, zero - np.int64(1))

    def with_picture(self, picture_HWc: UInt8[np.ndarray, "H W c"]) -> "Walk":
        """One frame more, whose place is not known; the oldest of the newest goes. Raises ValueError where it is of
        another size."""
        slots, *size = self.recent.pictures_FHWc.shape
        if picture_HWc.shape != tuple(size):
            raise ValueError(f"frames of a stream must keep their shape {tuple(size)}, got {picture_HWc.shape}")
        frame = Kept.empty(1, self.recent.weights_FP.shape[1], *size[:2])
        frame = dataclasses.replace(frame, pictures_FHWc=picture_HWc[None], numbers_F=self.pushed[None])
        recent = self.recent.at(np.s_[1:]) + frame
        return dataclasses.replace(self, recent=recent, pushed=np.asarray(self.pushed + 1))

    def anchors(self, count: int) -> Kept:
        """The keyframes, older than the newest frames, that are nearest to the newest one whose place is known."""
        oldest = self.recent.numbers_F[self.recent.filled_F][0]
        older = self.keys.at(self.keys.filled_F & (self.keys.numbers_F < oldest))
        known = (self.keys + self.recent).at(np.concatenate([self.keys.known_F, self.recent.known_F]))
        return older.nearest(known.at([known.numbers_F.argmax()]), count) if len(older.numbers_F) else older

    def begin_world(self, number: int) -> "Walk":
        """The same with the frames before this one forgotten."""
        return dataclasses.replace(
            self,
            recent=self.recent.since(number),
            keys=self.keys.since(number),
            worlds=np.asarray(self.worlds + 1),
            last_key=np.asarray(np.int64(-1)),
        )

    def with_places(
        self,
        points_FP3: Float64[np.ndarray, "F P 3"],
        weights_FP: Float64[np.ndarray, "F P"],
        cameras_F3: Float64[np.ndarray, "F 3"],
        keyframe_every: int,
    ) -> "Walk":
        """With places for the F newest frames, which come out; some of them become keyframes."""
        recent, keys, last_key = self.recent, self.keys, self.last_key
        for name, x in dict(points_FP3=points_FP3, weights_FP=weights_FP, cameras_F3=cameras_F3).items():
            recent = dataclasses.replace(recent, **{name: np.concatenate([getattr(recent, name)[: -len(x)], x])})
        for slot in range(-len(points_FP3), 0):
            frame = recent.at([slot])
            if frame.known_F[0] and (last_key < 0 or frame.numbers_F[0] - last_key >= keyframe_every):
                keys, last_key = keys.with_key(frame), frame.numbers_F[0]
        return dataclasses.replace(self, recent=recent, keys=keys, last_key=np.asarray(last_key), out=self.pushed)
