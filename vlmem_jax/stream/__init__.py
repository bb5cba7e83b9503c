"""Video as it comes: frames are looked at one by one at a cost that stays the same, and questions asked at any time."""

from vlmem_jax.stream.asking import Asker
from vlmem_jax.stream.frames import FrameGeometry, Reading, Shown, Source
from vlmem_jax.stream.notes import Log, Notes
from vlmem_jax.stream.questions import Question
from vlmem_jax.stream.run import Place, Show, Stream, check_geometry
from vlmem_jax.stream.sources import kind_of, open_source
from vlmem_jax.stream.watching import Snapshot, Watcher

__all__ = [
    "Asker",
    "FrameGeometry",
    "Log",
    "Notes",
    "Place",
    "Question",
    "Reading",
    "Show",
    "Shown",
    "Snapshot",
    "Source",
    "Stream",
    "Watcher",
    "check_geometry",
    "kind_of",
    "open_source",
]
