"""How probable texts are behind prompts, through the cache of an engine."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from tests.evals import world
from tests.verbs import written
from vlmem_jax.evals.answers import Answering
from vlmem_jax.generate import InvocationConfig, SamplingConfig
from vlmem_jax.generate import answers as answers_to
from vlmem_jax.generate.prompts import pad_prompts

NEVER = InvocationConfig("never")


@pytest.mark.parametrize("memory", [None, "vismem"])
def test_texts_are_weighed_as_the_model_reads_them(tmp_path, memory):
    """With images and without, more of them than are scored in a call, by a memory that speaks and nobody calls."""
    model = world.model(tmp_path, memory)
    image = Image.open(tmp_path / "0.png").convert("RGB")
    prompts = [model.processor.prompt("What is this?", [image]), model.processor.prompt("Say b"),
               model.processor.prompt("Go on: 1 2", [image, image])]  # fmt: skip
    generator = model.generator()
    [greedy] = answers_to(generator, prompts[1:2], SamplingConfig(max_new_tokens=3), invocation=NEVER)
    given = [[[5, 6, 7], [8], [9, 10], [11], [12, 13]], [greedy, [*greedy[:-1], 40], greedy[:1]], [[41, 42]]]
    found = Answering(generator, model.processor.tokenizer, 2).likelihoods(prompts, given, NEVER)
    banned = list({*generator.banned_ids, *(NEVER.banned_ids(model.vlm.speech) if memory else ())})
    for prompt, texts, each in zip(prompts, given, found, strict=True):
        wholes = [written(prompt, ids) for ids in texts]
        batch = pad_prompts([dataclasses.replace(whole, name="") for whole in wholes], 5, model.processor.tile)
        logits_BTV = jax.jit(model.vlm.logits)(model.params, batch)
        logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV.at[:, :, np.array(banned)].set(-np.inf)))
        for row, ids in enumerate(texts):
            logp_TV = logp_BTV[row, len(prompt.tokens_T) - 1 :][: len(ids)]
            assert each[row].logp == pytest.approx(logp_TV[np.arange(len(ids)), ids].sum(), abs=1e-4)
            assert each[row].greedy == (logp_TV.argmax(-1).tolist() == ids)
    assert [one.greedy for one in found[1]] == [True, False, True]
