"""What memories are built of and with, end to end: a tiny checkpoint and real videos."""

import functools
import json

import jax
import numpy as np
import pytest

from tests import drawn, patches_world
from vlmem_jax.agent import memory, prompts
from vlmem_jax.checkpoint import save_params
from vlmem_jax.config import to_dict
from vlmem_jax.families import resolve
from vlmem_jax.generate import load_model
from vlmem_jax.models import VLM

KEYS = {"preset": "tiny_qwen2_5_vl", "memory": None, "decoder": {"layers": 2}, "vision": {"layers": 2}}
SMALL = {
    "ingest.threshold": 200, "ingest.longest": 2.0, "ingest.fps": 1.0, "ingest.side": 32,
    "build.images": 4, "build.fps": 0.5, "build.schema_fps": 0.5, "build.manage.images": 4, "build.manage.reserved": 2,
    "schema.kept": 2, "schema.first": 4, "retrieve.images": 4, "retrieve.looked": 2,
}  # fmt: skip
"""A config that asks for few frames, which come in segments of two seconds."""
FLAGS = [f"--config.{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def short():
    """Texts of few tokens, which is enough for a model that knows nothing; it is loaded, and compiles, once."""
    once = functools.lru_cache(load_model)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("agent.memory", "cli.memory_build"):
            patch.setattr(f"vlmem_jax.{module}.load_model", once)
        patch.setattr(prompts, "WORDS", 8)
        patch.setattr(memory, "TEXT", 1400)
        yield


def checkpoint(folder, seed=1, keys=KEYS):
    """What `vlmem convert` would leave of an untrained model, in the folder itself."""
    vlm = VLM(resolve(keys))
    save_params(folder / "0", jax.tree.map(jax.numpy.asarray, drawn.random_params(vlm, seed)))
    image = {"min_pixels": 64, "max_pixels": 256}
    (folder / "model.json").write_text(json.dumps({"model": to_dict(vlm.config), "image": image, "system": ""}))
    patches_world.save_tokenizer(folder / "tokenizer")
    return folder


def video(path, seconds=8, fps=4, size=(32, 24), seed=0):
    """A file of another picture each two seconds."""
    import av

    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for n in range(seconds * fps):
            if n % (2 * fps) == 0:
                pixels = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
