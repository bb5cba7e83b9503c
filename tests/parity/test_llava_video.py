"""LLaVA-Video's base against numbers of SigLIP and Qwen2 as published: tower, projector, decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import llava_golden
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from vlmem_jax.processing.images import resized
from vlmem_jax.types import Batch
from vlmem_jax.vision import FrameProjector, normalise
from vlmem_jax.vision.projector import pooled

FEATURES = dict(atol=2e-5, rtol=1e-5)
LOGITS = dict(atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def world(golden):
    return llava_golden.load(golden / "llava_video")


@pytest.fixture(scope="module")
def pixels(world):
    c = world.vlm.config.vision
    frames = np.stack(
        [resized(Image.fromarray(frame), c.image_size, c.image_size) for frame in world.io["frames_uint8"]]
    )
    return normalise(frames, c.pixel_mean, c.pixel_std, jnp.float32)


def test_frames_are_resized_without_their_shape_and_normalised(world, pixels):
    np.testing.assert_allclose(np.asarray(pixels).transpose(0, 3, 1, 2), world.io["pixel_values"], atol=1e-6)


def test_the_tower_layer_by_layer(world, pixels):
    vision = world.vlm._merge(world.params).vision
    embedded = vision.embed(pixels)
    np.testing.assert_allclose(embedded, world.io["siglip_embeddings"], **FEATURES)
    graph, layers = nnx.split(vision.layers)
    first = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], layers))
    np.testing.assert_allclose(first(embedded, embedded.shape[1], None), world.io["siglip_block0"], **FEATURES)
    np.testing.assert_allclose(vision(pixels), world.io["vision_features"], **FEATURES)


def test_the_projector_and_every_pooling(world):
    projector = world.vlm._merge(world.params).projector
    projected = projector.mlp(jnp.asarray(world.io["vision_features"]))
    np.testing.assert_allclose(projected, world.io["projected"], **FEATURES)
    side = world.vlm.config.vision.grid
    for pool in ("bilinear", "average", "max"):
        found = pooled(projected.reshape(-1, side, side, projected.shape[-1]), pool)
        np.testing.assert_allclose(found, world.io[f"pooled_{pool}"], **FEATURES)


@pytest.mark.parametrize(
    ("tokens", "keys"),
    [
        ("tokens_grid", {}),
        ("tokens_grid_average", {"pool": "average"}),
        ("tokens_frame", {"newline": "frame"}),
        ("tokens_one", {"newline": "none"}),
    ],
)
def test_newlines_stand_among_the_tokens_of_a_frame(world, tokens, keys):
    c = dataclasses.replace(world.vlm.config.vision, **keys)
    projector, params = FrameProjector(c, world.vlm.config.decoder.width, rngs=nnx.Rngs(0)), world.params["projector"]
    nnx.update(projector, params if c.newline != "none" else {"mlp": params["mlp"]})
    found = projector(jnp.asarray(world.io["vision_features"]))
    assert found.shape[1] == c.tile.tokens
    wanted = world.io[tokens][:-1] if c.newline == "none" else world.io[tokens]  # one token is not of a frame
    np.testing.assert_allclose(found.reshape(-1, found.shape[-1]), wanted, **FEATURES)


def rows(world, ids):
    """A batch of one row in which the sentinel stands for all frames."""
    side = world.vlm.config.vision.image_size
    frames = np.stack([resized(Image.fromarray(frame), side, side) for frame in world.io["frames_uint8"]])
    batch = llava_golden.spliced(world, ids, len(frames) * world.vlm.tile.tokens, len(frames))
    return batch.replace(pixels_BISSc=jnp.asarray(frames[None]))


def test_logits_and_loss_of_a_video(world):
    batch, labels = rows(world, world.io["input_ids"]), world.io["labels_spliced"]
    hidden = jax.jit(world.vlm.hidden)(world.params, batch)[0]
    np.testing.assert_allclose(hidden, world.io["hidden_last"], **LOGITS)
    logits = jax.jit(world.vlm.logits)(world.params, batch)[0]
    np.testing.assert_allclose(logits, world.io["logits"], **LOGITS)
    targets = labels[1:]
    logp = jax.nn.log_softmax(logits[:-1])[np.arange(len(targets)), np.maximum(targets, 0)]
    assert -float(logp[targets >= 0].mean()) == pytest.approx(float(world.io["loss"]), abs=1e-5)


def test_greedy_answers(world):
    ids = world.io["prompt_ids"]
    for n, wanted in enumerate(world.io["greedy_ids"]):
        batch = rows(world, ids)
        last = jax.jit(world.vlm.logits)(world.params, batch)[0, -1]
        np.testing.assert_allclose(last, world.io["greedy_step_logits"][n], **LOGITS)
        assert int(last.argmax()) == wanted
        ids = np.append(ids, wanted)


def test_logits_of_text_alone(world):
    for ids, wanted in zip(world.io["text_ids"], world.io["text_logits"], strict=True):
        batch = Batch.empty((1,), len(ids), 0, world.vlm.tile).replace(
            tokens_BT=ids[None].astype(np.int32), segments_BT=np.ones((1, len(ids)), np.int32),
            positions_BT=np.arange(len(ids), dtype=np.int32)[None],
        )  # fmt: skip
        found = jax.jit(world.vlm.logits)(world.params, jax.tree.map(jnp.asarray, batch))[0]
        np.testing.assert_allclose(found, wanted, **LOGITS)
