"""A small world to read from: a tokenizer of one id a character, tiles of 8 pixels, four visual tokens a tile."""

import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from vlmem_jax.data import DataConfig, SourceConfig
from vlmem_jax.processing import ImageConfig, TileProcessor, Tokenizer
from vlmem_jax.types import TileGeometry

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {token: i for i, token in enumerate(["<unk>", *map(chr, range(32, 127)), "\n"])}
    tokenizer = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    return TileProcessor(Tokenizer.load(folder), ImageConfig(max_tiles=4), TileGeometry(8, 2), system="s")


class Folder:
    """Writes images and JSONL lines, and makes the config that reads them."""

    def __init__(self, path):
        self.path = path

    @staticmethod
    def talk(question="What?", answer="Yes.", **fields):
        """A line of one turn."""
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields}

    def image(self, name, width=16, height=8, seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(self.path / name)
        return name

    def truncate(self, name):
        """Damages an image so that its header still reads."""
        data = (self.path / name).read_bytes()
        (self.path / name).write_bytes(data[: len(data) // 2])

    def jsonl(self, lines, name="train.jsonl"):
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        (self.path / name).write_text(text)
        return str(self.path / name)

    def config(self, *lines, eval=(), **changes):
        """A config whose one training file has these lines."""
        sources = {"train": lines, "eval": eval}
        sources = {key: (SourceConfig(self.jsonl(value, f"{key}.jsonl")),) for key, value in sources.items() if value}
        defaults = dict(pack_tokens=300, pack_tiles=8, max_sample_tokens=200, rows=2, loss_weight="square", threads=2)
        return DataConfig(**{**defaults, **sources, **changes})


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


@pytest.fixture
def video(folder):
    """Name of a video of ten frames of 16 x 16 pixels, one second, each brighter than the one before."""
    av = pytest.importorskip("av")
    with av.open(str(folder.path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return "a.mp4"
