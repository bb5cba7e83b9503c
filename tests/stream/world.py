"""A small world of streams: a model that remembers frames, videos and folders, and what is needed to look at them."""

import json

import jax
import numpy as np
from PIL import Image

from tests import drawn, patches_world
from vlmem_jax import stream as streams
from vlmem_jax.checkpoint import save_params
from vlmem_jax.config import build, to_dict
from vlmem_jax.families import resolve
from vlmem_jax.generate import LoadedModel, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.processing import FrameConfig, Tokenizer, make_processor
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.stream import Notes, Reading, Show, Stream, open_source

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", FRAME]
SLOTS = 4
"""Frames that are kept."""
GREEDY = SamplingConfig(max_new_tokens=5)
KEYS = {
    "preset": "tiny_llava_video",
    "memory": {"kind": "vlm2", "working": 2, "episodic": SLOTS, "heads": 4, "geometry_width": 0},
    "decoder": {"layers": 2},
    "vision": {"layers": 1},
}


def model(folder, devices=1, mesh=None, seed=1, **keys):
    """Untrained, with a memory whose outputs are not zero; its tokenizer goes into the folder."""
    patches_world.save_tokenizer(folder / "tokenizer", CONTROL)
    vlm = VLM(resolve(KEYS | keys))
    tokenizer = Tokenizer.load(folder / "tokenizer", vlm.special_tokens)
    processor = make_processor(tokenizer, build(FrameConfig, {}), vlm.config.vision.geometry, "", "llava-video", False)
    made = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    return LoadedModel(vlm, drawn.random_params(vlm, seed), processor, made)


def checkpoint(folder, seed=1, **keys):
    """What `vlmem convert` would leave of `model`, in the folder itself."""
    made = model(folder, seed=seed, **keys)
    save_params(folder / "0", jax.tree.map(jax.numpy.asarray, made.params))
    described = {"model": to_dict(made.vlm.config), "image": {}, "system": ""}
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def pictures(folder, count, size=(24, 16), seed=0):
    """Pictures 0.png, 1.png, ..., of their own colours."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for n in range(count):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"{n}.png")
    return folder


class Frames:
    """A source of these pictures, 10 a second; None: one that is damaged."""

    def __init__(self, pictures, live=False, before=lambda n: None):
        self.name, self.live, self.pictures, self.before = "frames", live, pictures, before

    def __iter__(self):
        for n, picture in enumerate(self.pictures):
            self.before(n)
            yield streams.Shown(n / 10, (n + 1) / 10, lambda picture=picture: self.made(picture))

    @staticmethod
    def made(picture):
        if picture is None:
            raise ValueError("it is damaged")
        return picture


def photos(count, seed=0, size=(24, 16)):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(count)]


class Shown(list):
    """What a stream has answered: (seconds, question, answer, problem)."""

    def __init__(self):
        super().__init__()
        self.show = Show(self._begin, self._piece, self._end)

    def _begin(self, seconds, question):
        self._now = seconds, question, ""

    def _piece(self, piece):
        self._now = *self._now[:2], self._now[2] + piece

    def _end(self, problem):
        self.append((*self._now, problem))


class Said(list):
    """Notes that are said."""

    def __init__(self, log=None, **reading):
        super().__init__()
        self.notes = Notes(self.append, log)
        self.reading = Reading(**{"fps": 10, "notes": self.notes, **reading})


def stream(asker, name, questions=(), said=None, source=None, **options):
    """(stream, what it answers, what it says)."""
    shown, said = Shown(), Said() if said is None else said
    source = source or open_source(str(name), said.reading)
    return Stream(asker, source, said.reading, shown.show, questions, **options), shown, said


def lines(file):
    """The objects in a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
