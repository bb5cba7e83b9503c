"""What models say about rooms, from visual tokens that were made before."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import drawn
from vlmem_jax.demo import vlm2
from vlmem_jax.demo.room_dataset import IGNORED, KEPT
from vlmem_jax.demo.room_evaluate import LONGEST_ANSWER, Clip, Videos, answers, chosen_frames, uniform
from vlmem_jax.demo.rooms import SIDE
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.families import of_model, resolve
from vlmem_jax.generate import LoadedModel, SamplingConfig, never_sampled
from vlmem_jax.generate import answers as answers_to
from vlmem_jax.models import VLM
from vlmem_jax.processing import Tokenizer, make_processor
from vlmem_jax.processing.frames import FrameConfig
from vlmem_jax.processing.video import Video
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh

QUESTIONS = {"digit": ("Which digit is on the red poster?", "4"), "count": ("How many posters are there?", "3")}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, KEPT, IGNORED)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def base():
    return drawn.params(VLM(resolve({"preset": vlm2.PRESET, "memory": None})))


@pytest.fixture(scope="module")
def make(tokenizer, base):
    """The same random model with any memory, trained with any context."""

    def made(memory=None, context="all"):
        vlm = VLM(resolve({"preset": vlm2.PRESET, "memory": memory}))
        image, family = FrameConfig(frames=24, time_line=False, context=context), of_model(vlm.config)
        processor = make_processor(
            tokenizer, image, vlm.config.vision.geometry, "", family.template, tile=vlm.tile_of(image)
        )
        params = drawn.params(vlm) | base
        return LoadedModel(vlm, params, processor, make_mesh(MeshConfig(), jax.devices()[:1]))

    return made


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 12, SIDE, SIDE, 3), np.uint8)
    return Videos([Clip(pixels_TSSc, QUESTIONS, {}, Path(), "") for pixels_TSSc in pixels], None)


def test_answers_are_those_to_a_video_of_the_frames_that_are_shown(make, videos):
    model = make()
    tokens_CMD, times_CL = chosen_frames(model, videos, uniform)
    prompts = [
        model.processor.prompt(question, videos=[Video([Image.fromarray(clip.pixels_TSSc[t]) for t in times_L])])
        for clip, times_L in zip(videos.clips, times_CL, strict=True)
        for question, _ in QUESTIONS.values()
    ]
    ids = answers_to(model.generator(), prompts, SamplingConfig(max_new_tokens=LONGEST_ANSWER))
    said = [clip[kind] for clip in answers(model, videos, tokens_CMD) for kind in QUESTIONS]
    assert said == [model.processor.tokenizer.decode(one).strip() for one in ids]
    assert len(set(said)) > 1 and not set().union(*ids) & set(never_sampled(model.processor, model.vlm))


@pytest.mark.parametrize("memory, context", [(vlm2.BOTH | {"episodic": 0}, "stride:3"), (vlm2.BOTH, "kept:8")])
def test_all_frames_are_shown_whichever_a_model_was_trained_with(make, videos, memory, context):
    tokens_CMD = chosen_frames(make(), videos, uniform)[0]
    assert answers(make(memory, context), videos, tokens_CMD) == answers(make(), videos, tokens_CMD)
