"""Ratios on a CPU of data: the pipeline against a serial loop, and what images of many sizes compile and pad."""

import itertools
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from benchmarks.measure import RUNS, Row, in_turns
from benchmarks.models import make
from vlmem_jax import families
from vlmem_jax.data import DataConfig, Plan, SourceConfig, TrainData
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.evals.measure import compilations
from vlmem_jax.generate import Generator, Pool, Request, SamplingConfig
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.processing import PatchConfig, TileProcessor, Tokenizer, make_processor
from vlmem_jax.processing.images import ImageConfig, open_image, tile_grid
from vlmem_jax.runtime.shapes import tile_bucket
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import NextToken
from vlmem_jax.train.run import run as train
from vlmem_jax.types import Batch
from vlmem_jax.vision import VisionConfig


def write_jpegs(folder: Path, sizes: list[tuple[int, int]]) -> DataConfig:
    """A sample of one image for each (width, height), and a tokenizer in `folder`/tokenizer."""
    rng = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate(sizes):
        coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nrow 1"}, {"from": "gpt", "value": "1 2 3"}]
        lines.append(json.dumps({"image": f"{number}.jpg", "conversations": turns}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    write_tokenizer(folder / "tokenizer")
    return DataConfig(train=(SourceConfig(str(folder / "data.jsonl")),))


def pipeline(count=16, steps=16, runs=RUNS) -> list[Row]:
    """Tiles of 640x480 JPEGs: the packed, threaded pipeline against one image after the other."""
    image, vision = ImageConfig(), families.resolve({"preset": "comemo_2b"}).vision
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_jpegs(folder, [(640, 480)] * count)
        config = DataConfig(train=written.train, pack_tokens=3584, pack_tiles=13)
        processor = TileProcessor(Tokenizer.load(folder / "tokenizer"), image, vision.geometry)
        plan = Plan.train(config, processor, seed=0)
        data = TrainData(plan, steps)

        def ours() -> None:
            for _ in data.iterate():
                pass

        def serial() -> list[np.ndarray]:
            return [normalised_tiles(folder / f"{n % count}.jpg", image, vision) for n in range(steps)]

        ours(), serial()
        seconds = in_turns(ours, serial, runs=runs)
    how = f"12 tiles of 448 px and a thumbnail each, {steps} images; serial: Pillow, then fp32 normalised on the host"
    what = "data: a serial loop that decodes, tiles and normalises / the pipeline, 640x480 JPEGs"
    return [Row(what, (seconds[:, 1] / seconds[:, 0]).tolist(), 2.2, False, "x", how)]


def normalised_tiles(path: Path, config: ImageConfig, vision: VisionConfig) -> np.ndarray:
    """The usual way: decode, resize, crop each tile, and normalise it to channels-first fp32."""
    picture, size = open_image(path), vision.image_size
    cols, rows = tile_grid(*picture.size, size, config)
    resized = picture.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
    corners = itertools.product(range(rows), range(cols))
    tiles = [resized.crop((c * size, r * size, (c + 1) * size, (r + 1) * size)) for r, c in corners]
    tiles.append(picture.resize((size, size), Image.Resampling.BICUBIC))
    mean, std = np.array(vision.pixel_mean, np.float32), np.array(vision.pixel_std, np.float32)
    scaled = (np.asarray(tile, np.float32) / np.float32(255) for tile in tiles)
    return np.stack([((tile - mean) / std).transpose(2, 0, 1) for tile in scaled])


# --- compilations -----------------------------------------------------------------------------------------------------


class Watched(NextToken):
    """Notes how much had been compiled before each step."""

    seen: list[str]
    marks: list[int]

    def work(self, step: int, params: dict):
        """The step's data."""
        self.marks.append(len(self.seen))
        return super().work(step, params)


def recompilations(count=64, longest=400, training=200, generations=50, lengths=7) -> list[Row]:
    """Programs compiled after warm-up, with images of many sizes."""
    sizes = np.random.default_rng(1).integers(16, longest, (count, 2)).tolist()
    with tempfile.TemporaryDirectory() as name, compilations() as seen:
        folder, warm, steps = Path(name), 5, 5 + training
        data = write_jpegs(folder, sizes)
        image = {"max_tiles": 12}
        settings = {
            "model": {"preset": "tiny"},
            "image": image,
            "tokenizer": str(folder / "tokenizer"),
            "data": {"train": [{"path": data.train[0].path}], "pack_tokens": 256, "pack_tiles": 26, "rows": 2},
            "stages": [{"name": "finetune", "steps": steps, "learning_rate": 1e-3}],
            "checkpoint": {"every": 10 * steps, "keep_best": 0},
            "mesh": {"data": 1, "fsdp": 1},
        }
        Watched.seen, Watched.marks = seen, []
        train(experiment(settings), folder / "run", tasks={"next_token": Watched}, say=lambda line: None)
        while_training = Watched.marks[-1] - Watched.marks[warm]

        vlm, params = make({"preset": "tiny"})
        tokenizer = Tokenizer.load(folder / "tokenizer")
        processor = make_processor(tokenizer, ImageConfig(**image), vlm.config.vision.geometry)
        generator = Generator(vlm, params, stop_ids=[processor.stop_id], mesh=make_mesh(MeshConfig()))
        pictures = [open_image(folder / f"{n}.jpg") for n in range(len(sizes))]

        def asked(n: int) -> Request:
            prompt = processor.prompt("row 1 " * (n % lengths + 1), [pictures[n % len(pictures)]])
            return Request(prompt, SamplingConfig(max_new_tokens=8, temperature=float(n % 2), seed=n))

        warm, pool = max(len(pictures), 2 * lengths), Pool(generator, 1)  # each length, drawn and not
        for handle in pool.submit([asked(n) for n in range(warm)], spare=8 * lengths):
            handle.result()
        warmed = len(seen)
        for n in range(generations):
            pool.submit([asked(warm + 3 * n)])[0].result()
        while_generating = len(seen) - warmed
    spread = f"{np.min(sizes)} to {np.max(sizes)} px a side"
    trained = f"compilations in {training} training steps on images of many sizes, after {warm}"
    generated, how = f"compilations in {generations} generations, after warm-up", f"questions of 1 to {lengths} words"
    return [
        Row(trained, [float(while_training)], 0, True, "", spread),
        Row(generated, [float(while_generating)], 0, True, "", f"{spread}, {how}; warm-up: one with each image"),
    ]


def image_sizes(shortest=64, longest=256, count=50) -> list[Row]:
    """Images of as many sizes through a tower that sees them in their own size: compilations and padding."""
    sizes = np.random.default_rng(2).integers(shortest, longest + 1, (count, 2)).tolist()
    vlm, params = make({"preset": "tiny_qwen2_5_vl"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_jpegs(folder, sizes)
        config = DataConfig(train=data.train, pack_tokens=2304, pack_tiles=2048)
        image, geometry = PatchConfig(shortest**2, longest**2), vlm.config.vision.geometry
        processor = make_processor(Tokenizer.load(folder / "tokenizer"), image, geometry, template="qwen2-vl")
        plan = Plan.train(config, processor, seed=0)
        plan.extend(20)
        prompts = [processor.prompt("row 1", [open_image(folder / f"{n}.jpg")]) for n in range(count)]
    batches = [pad_prompts([prompt], 1, vlm.tile) for prompt in prompts]
    slots = [batch.views.pixels_BISSc.shape[1] for batch in batches]
    used = sum(len(prompt.pixels_ISSc) for prompt in prompts)
    see = jax.jit(vlm.see)
    shapes = {tile_bucket(n, vlm.tile) for n in range(1, max(slots) + 1)}
    with compilations() as seen:
        for tiles in shapes:
            jax.block_until_ready(see(params, Batch.empty((1,), 1, tiles, vlm.tile).views))
        warmed = len(seen)
        for batch in batches:
            jax.block_until_ready(see(params, batch.views))
    spread = f"{len({tuple(size) for size in sizes})} sizes of {shortest} to {longest} px a side, 8 px a visual token"
    compiled = f"compilations of Qwen's tower on images of {count} sizes, after warm-up"
    packed = f"{len(plan)} rows of {config.pack_tiles} visual tokens"
    return [
        Row(compiled, [float(len(seen) - warmed)], 0, True, "", f"{spread}; after {warmed} shapes"),
        Row("padding of that tower, each image alone", [100 * (1 - used / sum(slots))], 15, True, "%", spread),
        Row("the same, images in packed rows", [100 * (1 - plan.fill["tiles"])], 15, True, "%", packed),
    ]
