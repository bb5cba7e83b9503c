"""Geometry of frames that never end: windows of the newest, with anchors, joined to one world (VLM^2 sec. 3.2).

A model of geometry sees a bounded number of frames at once, and gives each window a scale, a turn and an origin of its
own. Each window therefore holds frames that were seen before: some of the newest, and anchors, old frames kept for
good. The similarity that brings their points to where they are places the frames that are new. Each window adds an
error of its own; anchors bound the sum while the camera stays where it has been. Where it goes on to new places,
nothing does. Host code: the model is a callable.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from vlmem_jax.geometry.coordinates import check_grid, fault, patch_means, scene_size
from vlmem_jax.geometry.samples import samples
from vlmem_jax.geometry.scene import Scene
from vlmem_jax.geometry.similarity import IDENTITY, Similarity, fit, residual
from vlmem_jax.geometry.walk import Walk
from vlmem_jax.types import Geometry


@dataclasses.dataclass(frozen=True)
class WindowsConfig:
    """Which frames are seen at once, and how they are joined."""

    grid: int = 27
    """Patches along a side of a frame."""
    recent: int = 8
    """The newest frames of a window."""
    anchors: int = 2
    """Its keyframes, those nearest in place."""
    stride: int = 4
    """Frames from one window to the next, and so many others come in at most before one comes out."""
    keyframes: int = 64
    """Kept at most."""
    keyframe_every: int = 40
    """Frames."""
    coord_frame: Literal["first", "anchor"] = "first"
    """Where coordinates have their origin: in the first camera, or, so that they stay small on long walks, in the mean
    of the anchors' cameras. Their axes are those of the first camera."""
    confidence_weighted: bool = False
    """Whether a patch's point is the mean of its pixels' by their confidence."""
    least_confidence: float = 0.05
    """Points by which windows are joined have more."""
    edge: float = 0.03
    """As in `samples`, at 378 pixels along a side; fewer show steeper slopes, and need more."""
    cut: float = 0.3
    """Residual, see `similarity.residual`, above which nothing fits: the video has been cut."""

    def __post_init__(self):
        if not 1 <= self.stride < self.recent:
            raise ValueError(
                "stride must be at least 1 and below recent, so that windows share frames, got stride "
                f"{self.stride} and recent {self.recent}"
            )
        if not 0 <= self.anchors <= self.keyframes or self.keyframe_every < 1:
            raise ValueError(
                "anchors must be 0 to keyframes, and keyframe_every at least 1, got anchors "
                f"{self.anchors}, keyframes {self.keyframes} and keyframe_every {self.keyframe_every}"
            )


class Join(NamedTuple):
    """How a window was joined to the world, for the log."""

    views: int
    """Different frames in it."""
    common: int
    """Points in sight that have a place already."""
    residual: float | None
    """As in `similarity.residual`; None where nothing could be fitted."""
    scale: float
    """Of the world by that of the window."""
    world: int
    """In which the new frames are, from 1; 0 before there is one."""
    identity: bool
    """Whether nothing could be fitted: the new frames stay as the model gave them, and none is joined to them."""
    cut: bool
    """Whether another world begins."""


class Placed(NamedTuple):
    """A frame that comes out."""

    number: int
    """From 0, in the order in which they came in."""
    geometry: Geometry | None
    """Numpy arrays [N, ...] of N patches; None where the model gave nothing of use."""
    join: Join
    """Of the window in which the frame was new."""
    fault: str | None
    """Why there is no geometry."""


class Windows:
    """The step from frame to frame. `see` takes recent + anchors pictures, always so many that it compiles once.

    The first window is due when stride + 1 frames have come in, each other one after `stride` more. Where there are
    fewer frames than it holds, they are repeated in turn. By default, the first has 5 frames, so each stands in it
    twice: a softmax over keys that are all repeated alike is that over the keys, so a model whose views are all alike
    (pi3) says of them what it says of the 5 alone.

    The world is as the first frame's camera sees it, and what that sees is at a mean distance of 1. A cut is found
    where frames that were seen before no longer fit together: those behind it must be among them, so it takes one more
    window, and up to `stride` frames have come out by then, in places of the old world that mean nothing.
    """

    def __init__(self, config: WindowsConfig, see: Callable[[UInt8[np.ndarray, "N H W c"]], Scene]):
        self.config, self.see = config, see

    def begin(self, height: int, width: int) -> Walk:
        """Before the first of frames of so many pixels."""
        config = self.config
        return Walk.empty(config.recent, config.keyframes, config.grid**2, height, width)

    def push(self, walk: Walk, picture_HWc: UInt8[np.ndarray, "H W c"]) -> tuple[Walk, list[Placed]]:
        """With one frame more, and the frames that come out. Raises ValueError where it is of another size."""
        walk = walk.with_picture(picture_HWc)
        waiting = walk.pushed - walk.out
        return self.flush(walk) if waiting >= self.config.stride + (walk.out == 0) else (walk, [])

    def flush(self, walk: Walk) -> tuple[Walk, list[Placed]]:
        """With all frames that came in come out, by a window of what there is."""
        if walk.pushed == walk.out:
            return walk, []
        anchors = walk.anchors(self.config.anchors)
        views = anchors + walk.recent.at(walk.recent.filled_F)
        new = np.flatnonzero(views.numbers_F >= walk.out).tolist()
        scene, faults = self._seen(views.pictures_FHWc)
        points_FP3, weights_FP = self._points(scene)
        similarity, common, left = _fitted(points_FP3, views.points_FP3, weights_FP * views.weights_FP)
        first = next((slot for slot in new if faults[slot] is None), None)
        apart = not walk.recent.known_F.any() if similarity is None else left > self.config.cut
        if begins := first is not None and apart:
            walk, similarity = walk.begin_world(int(views.numbers_F[first])), self._world(scene, first)
        if identity := similarity is None:
            similarity, weights_FP = IDENTITY, np.zeros_like(weights_FP)
        cut = bool(begins and walk.worlds > 1)
        join = Join(len(points_FP3), common, left, similarity.scale, int(walk.worlds), identity, cut)
        origin_3 = np.zeros(3)
        if self.config.coord_frame == "anchor" and len(anchors.numbers_F) and not begins:
            origin_3 = anchors.cameras_F3.mean(0)
        placed = []
        for slot in new:
            geometry = None if faults[slot] else self._geometry(scene, slot, similarity, origin_3)
            placed.append(Placed(int(views.numbers_F[slot]), geometry, join, faults[slot]))
        cameras_F3 = similarity.poses(scene.poses_N44[new])[:, :3, 3]
        walk = walk.with_places(
            similarity.points(points_FP3[new]), weights_FP[new], cameras_F3, self.config.keyframe_every
        )
        return dataclasses.replace(walk, identities=np.asarray(walk.identities + identity)), placed

    def _seen(self, pictures_FHWc: UInt8[np.ndarray, "F H W c"]) -> tuple[Scene, list[str | None]]:
        """What the model makes of frames, and what is wrong with each: such a one is trusted nowhere."""
        frames = len(pictures_FHWc)
        turns = np.arange(self.config.recent + self.config.anchors) % frames
        scene = Scene(*(np.asarray(x)[:frames] for x in self.see(pictures_FHWc[turns])))
        check_grid(scene, self.config.grid)
        faults = [fault(*frame, self.config.least_confidence) for frame in zip(*scene, strict=True)]
        bad_F11 = np.array([found is not None for found in faults])[:, None, None]
        scene = scene._replace(
            confidence_NHW=np.where(bad_F11, 0, scene.confidence_NHW),
            poses_N44=np.where(bad_F11, np.eye(4), scene.poses_N44),
        )
        return scene, faults

    def _points(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Points [F, P, 3] of frames in the world of their window, and their weights [F, P]."""
        config = self.config
        points_FP3, weights_FP = samples(
            scene.points_NHW3, scene.confidence_NHW, config.grid, config.least_confidence, config.edge
        )
        moves = map(Similarity.of_camera, scene.poses_N44)
        return np.stack([move.points(points_P3) for move, points_P3 in zip(moves, points_FP3, strict=True)]), weights_FP

    def _means(self, scene: Scene, slot: int) -> Float64[np.ndarray, "N 3"]:
        """What the patches of a frame show, as its camera sees it."""
        weights_1HW = scene.confidence_NHW[[slot]] if self.config.confidence_weighted else None
        return patch_means(scene.points_NHW3[[slot]], self.config.grid, weights_1HW)[0]

    def _world(self, scene: Scene, slot: int) -> Similarity:
        """From the world of a window to that of one of its cameras, which sees things at a mean distance of 1."""
        unit = Similarity(1 / scene_size(self._means(scene, slot)), np.eye(3), np.zeros(3))
        return unit @ Similarity.of_camera(scene.poses_N44[slot]).inverse()

    def _geometry(
        self, scene: Scene, slot: int, similarity: Similarity, origin_3: Float64[np.ndarray, "3"]
    ) -> Geometry:
        """What is known of a frame, in the world less an origin."""
        coords_N3 = (similarity @ Similarity.of_camera(scene.poses_N44[slot])).points(self._means(scene, slot))
        return Geometry(scene.tokens_NPG[slot], scene.views_NPV[slot], (coords_N3 - origin_3).astype(np.float32))


def _fitted(
    from_FP3: np.ndarray, to_FP3: np.ndarray, weights_FP: np.ndarray
) -> tuple[Similarity | None, int, float | None]:
    """(the similarity, of how many points, its residual)."""
    pairs = from_FP3.reshape(-1, 3), to_FP3.reshape(-1, 3), weights_FP.ravel()
    similarity, common = fit(*pairs), int(np.count_nonzero(weights_FP))
    return similarity, common, None if similarity is None else residual(similarity, *pairs)
