"""Small memories on disk."""

import io

import numpy as np
from PIL import Image

from vlmem_jax.agent.nodes import Cue, Episode, Extracted, Frame, Segment
from vlmem_jax.agent.schema import Schema, Texts
from vlmem_jax.agent.writing import write_store

MADE = {"video": "film", "model": "scripted", "embedder": "letters"}


def jpeg(shade):
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def axis(n, width=8):
    """The unit vector along an axis."""
    return np.eye(width)[[n]]


def embed(texts):
    """The axis of the first letter."""
    return np.concatenate([axis(ord(text[0].lower()) % 8) for text in texts])


def fill(store, segments=4):
    """A memory of segments of ten seconds, each two an episode that is about one thing."""
    schema, things = Schema(), ["apple", "boat", "cat", "dog"]
    with store.transaction() as batch:
        for n in range(segments):
            frames = tuple(Frame(store.frames.write(jpeg(40 * n + 20 * i)), 10.0 * n + 5 * i) for i in range(2))
            batch.put(Segment(n, 10.0 * n, 10.0 * n + 10, f"segment {n}", frames), axis(n % 8))
            batch.put(Cue(n, 10.0 * n + 2, 10.0 * n + 4, f"said {n}"))
            if n % 2:
                span, said = (10.0 * n - 10, 10.0 * n + 10), {"entities": [{"entity name": things[n // 2 % 4]}]}
                batch.put(Episode(n // 2, *span, (n - 1, n), f"episode {n // 2}", frames), axis(n // 2 % 8))
                batch.put(Extracted(n // 2, *span, said, frames[:1]))
                schema.add(n // 2, Texts.of(said), embed)
        for concept in schema.concepts:
            batch.put_concept(concept)
        batch.mark("closed")
    return schema


def written(folder, segments=4, made=MADE):
    """A closed memory in a folder."""
    with write_store(folder, made) as store:
        fill(store, segments)
    return folder
