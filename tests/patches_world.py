"""What tests of models that see patches share: a tokenizer of one id a character, a video, and packed rows."""

import jax
import numpy as np
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import Fuse

from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing.patch_processor import place
from vlmem_jax.types import IGNORED, Batch, Sample

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
PLACEHOLDERS = (120, 121)
"""Of images and of videos, in `sample`."""


def save_tokenizer(folder, control=CONTROL):
    """A tokenizer without a start token, as Qwen's."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(["<unk>", *map(chr, range(32, 127)), "\n"])}
    tokenizer = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = '{"bos_token": null, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}'
    (folder / "tokenizer_config.json").write_text(settings)
    return folder


def save_video(path, frames=10, fps=10, size=(24, 16), level=20):
    """Each frame is brighter than the one before by `level`."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(frames):
            pixels = np.full((*size[::-1], 3), level * i % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def sample(vlm, grids: list[PatchGrid], text: int, seed: int = 0) -> Sample:
    """Two tokens of text, the `grids` (those of several frames as videos), and `text` more tokens; random pixels."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(5, 100, 2)]
    parts += [np.full(grid.tokens, PLACEHOLDERS[grid.frames > 1]) for grid in grids]
    tokens_T = np.concatenate([*parts, rng.integers(5, 100, text)]).astype(np.int32)
    placed = place(tokens_T, grids, PLACEHOLDERS, vlm.config.vision.geometry)
    visual_index_T = np.full(len(tokens_T), -1, np.int32)
    visual_index_T[np.isin(tokens_T, PLACEHOLDERS)] = placed.slot_C
    tile = vlm.tile
    return Sample(
        tokens_T=tokens_T,
        labels_T=np.where(np.arange(len(tokens_T)) < len(tokens_T) - text, IGNORED, tokens_T).astype(np.int32),
        positions_T=placed.positions_T,
        visual_index_T=visual_index_T,
        pixels_ISSc=rng.integers(0, 256, (len(placed.slot_C), tile.side, tile.side, tile.channels)).astype(np.uint8),
        visual_positions_M=placed.visual_positions_M,
        layout_I4=placed.layout_I4,
        name=f"sample {seed}",
    )


def one_row(row: Batch) -> Batch:
    """A packed row as a batch."""
    return jax.tree.map(lambda x: jax.numpy.asarray(x[None]), row)
