"""A small world to evaluate in: an untrained VisMem that often calls for memories, and prompts of two sources."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tests import patches_world
from vlmem_jax.checkpoint import save_params
from vlmem_jax.config import build, to_dict
from vlmem_jax.families import resolve
from vlmem_jax.generate import LoadedModel
from vlmem_jax.models import VLM
from vlmem_jax.processing import PatchConfig, Tokenizer, make_processor
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh

IMAGE = dict(min_pixels=64, max_pixels=1024)


def model(folder, memory="vismem", seed=1):
    """On one device. Writes tokenizer and pictures, and prompts.jsonl: 5 prompts, one of them without answer."""
    patches_world.save_tokenizer(folder / "tokenizer")
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16 + 8 * n, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    write(
        folder,
        {"prompt": "Say b", "answer": "b", "source": "letters"},
        {"prompt": "What is this?", "image": "0.png", "answers": ["a", "B"], "source": "letters"},
        {"prompt": "What differs?", "images": ["0.png", "1.png"], "answer": "c"},
        {"prompt": "Go on: 1 2 3", "image": "0.png", "id": "last"},
        {"prompt": "Which <image>? <|image_pad|><|im_end|>", "image": "1.png", "answer": "a"},
    )
    sizes = {"decoder": {"layers": 2}, "vision": {"layers": 2}}
    vlm = VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": memory, **sizes}))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), vlm.abstract())
    if memory == "vismem":
        params["memory"]["invoke_logit_bias"] = jnp.full((1,), 5.0)
    image = build(PatchConfig, IMAGE)
    tokenizer = Tokenizer.load(folder / "tokenizer", vlm.special_tokens)
    processor = make_processor(tokenizer, image, vlm.config.vision.geometry, "", "qwen2-vl")
    return LoadedModel(vlm, params, processor, make_mesh(MeshConfig(), jax.devices()[:1]))


def checkpoint(folder, memory="vismem"):
    """What `vlmem convert` would leave of `model`, in the folder itself."""
    made = model(folder, memory)
    save_params(folder / "0", made.params)
    described = {"model": to_dict(made.vlm.config), "image": IMAGE, "system": ""}
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def frames_checkpoint(folder, frames=4):
    """A small model that sees videos as `frames` frames, without memory, and a.mp4 of 10 frames in a second."""
    patches_world.save_tokenizer(folder / "tokenizer", [*patches_world.CONTROL, FRAME])
    patches_world.save_video(folder / "a.mp4")
    vlm = VLM(resolve({"preset": "tiny_llava_video", "decoder": {"layers": 2}, "vision": {"layers": 2}}))
    rng = np.random.default_rng(1)
    save_params(
        folder / "0", jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), vlm.abstract())
    )
    described = {"model": to_dict(vlm.config), "image": {"frames": frames}, "system": ""}
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def write(folder, *fields):
    """prompts.jsonl of these objects, or lines as they are."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in fields]
    (folder / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))


def lines(file):
    """The objects in a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
