"""The supervised warm-up of a memory: what is learned from what, and that it learns, alone, and resumes."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.drawn import random_params
from tests.rl import memory_world
from tests.rl.memory_world import FORMATION
from tests.rl.packed import stacked
from tests.train import world
from tests.verbs import extended, read
from vlmem_jax import rl
from vlmem_jax.checkpoint import load_params
from vlmem_jax.config import ConfigError, override
from vlmem_jax.models import VLM
from vlmem_jax.rl import MemorySFT
from vlmem_jax.rl.rollout import trainer_generator
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings
from vlmem_jax.train import run as runs
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import eval_program
from vlmem_jax.trees import flatten


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """An Experiment of the warm-up alone, from keys that differ; each step has all 6 prompts."""
    folder = tmp_path_factory.mktemp("world")
    stage = dict(
        name="warmup", steps=6, learning_rate=3e-2, warmup_fraction=0.0, trainable=FORMATION,
        task=dict(kind="memory_sft", prompts=6),
    )  # fmt: skip
    config = memory_world.config(folder)
    config.stages = [stage]
    answers = [["b", "bcb a", "say b!"][n % 3] for n in range(6)]
    lines = [json.loads(line) | {"answer": answers[n]} for n, line in enumerate((folder / "prompts.jsonl").open())]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(**changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        base = {"data.eval": config.data.train, "model.memory.lora.dropout": 0.0}
        return experiment(override(config, {**base, **changes}))

    return made


@pytest.fixture(scope="module")
def one_mesh():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.fixture
def mesh(one_mesh, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda config: one_mesh)
    return one_mesh


@pytest.fixture(scope="module")
def params(make, one_mesh):
    """Adapters have an effect, and latent tokens and embeddings are of one size; they lie where those of a run do."""
    model = VLM(make().model)
    params = random_params(model)
    params["decoder"]["embed"] *= 6
    for kind in ("short", "long"):
        for adapter in params["memory"][kind]["lora"].values():
            adapter["b"] *= 3
    return jax.device_put(params, param_shardings(one_mesh, model.abstract(), model.axes()))


def losses_by_decoding(generator, samples, answers, kind):
    """Mean negative log-probability of the tokens of each answer after a memory, one after the other from the cache."""
    vlm, params, B = generator.vlm, generator.params, len(samples)
    slots, speech, ones_B = vlm.speech.lengths[kind], vlm.speech, jnp.ones(B, jnp.int32)
    (_, state), extend = read(vlm, params, samples), jax.jit(functools.partial(extended, vlm))
    _, state = extend(params, state, ones_B[:, None] * speech.invoke_ids[kind], ones_B)
    latents_BND, _ = jax.jit(vlm.form, static_argnums=4)(params, state, jnp.arange(B), ones_B * kind, 64)
    memory_BT = jnp.zeros((B, speech.latents + 1), jnp.int32).at[:, slots].set(speech.end_ids[kind])
    logits_BV, state = extend(params, state, memory_BT, ones_B * (slots + 1), latents_BND, ones_B * slots)
    losses = [[] for _ in samples]
    for n in range(max(map(len, answers))):
        tokens_B = np.array([ids[min(n, len(ids) - 1)] for ids in answers], np.int32)
        logp_BV = np.asarray(jax.nn.log_softmax(logits_BV))
        for row, ids in enumerate(answers):
            losses[row] += [-logp_BV[row, token] for token in ids[n : n + 1]]
        logits_BV, state = extend(params, state, tokens_B[:, None], ones_B)
    return [float(np.mean(of_answer)) for of_answer in losses]


def test_the_loss_is_that_of_answers_after_a_call_in_generation(make, mesh, params):
    config = make()
    task = MemorySFT(config, config.stages[0], VLM(config.model), mesh)
    prompts, processor = task._stream.prompts, task._processor
    samples = [prompts.sample((0, n)) for n in range(6)]
    answers = [[*processor.tokenizer.encode(prompts[0, n].answers[0]), processor.stop_id] for n in range(6)]
    with jax.set_mesh(mesh):
        generator = trainer_generator(task.model, params, processor, mesh)
        wanted_KP = np.array([losses_by_decoding(generator, samples, answers, kind) for kind in range(2)])
        work = task.work(0, params)
        parts = [jax.tree.map(lambda x: x[None], part) for part in work.batch]
        total = sum(float(eval_program(task._mesh)(task.model, params, part, task.chunk)) for part in parts)
        evaluated = task.evaluate(params)
    task.close()
    assert np.abs(wanted_KP[0] - wanted_KP[1]).min() > 1e-3
    kinds = np.random.default_rng([*task._seeds, 0]).integers(2, size=6)
    assert set(kinds) == {0, 1} and work.numbers["memory/long"] == kinds.mean()
    places = [int(name.rpartition(":")[2]) - 1 for name in work.sample_ids]
    np.testing.assert_allclose(total / work.denominator, wanted_KP[kinds, places].mean(), rtol=1e-5)
    np.testing.assert_allclose(evaluated["loss"], wanted_KP[np.arange(6) % 2, range(6)].mean(), rtol=1e-5)


def test_answers_alone_are_learned(make, mesh, params):
    config = make(stages__0__task__loss_mean="token")
    task = MemorySFT(config, config.stages[0], VLM(config.model), mesh)
    with jax.set_mesh(mesh):
        work = task.work(0, params)
    task.close()
    speech, batch = task.model.speech, stacked(work.batch)
    weighted = batch.text.weights_BT > 0
    texts = [task._stream.prompts[0, n].answers[0] for n in range(6)]
    assert work.denominator == weighted.sum() == sum(len(text) + 1 for text in texts)
    own = speech.invoke_ids + speech.end_ids
    assert not np.isin(batch.text.targets_BT[weighted], own).any()
    ends = np.isin(batch.text.tokens_BT, speech.end_ids) & (batch.text.segments_BT > 0)
    assert ends.sum() == 6 and weighted[ends].all(), "the first token of an answer is foretold by the end token"
    assert (batch.text.formation.kinds_BJ >= 0).sum() == 6


def run(config, folder):
    return runs.run(config, folder, tasks=runs.TASKS | rl.TASKS, say=lambda line: None)


@pytest.mark.slow
def test_it_learns_what_forms_memories_and_goes_on_where_it_stopped(make, mesh, tmp_path):
    config = make(**{"data.eval": [], "checkpoint.every": 3})
    assert run(config, tmp_path / "whole")
    lines = world.records(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "warmup" / "6")
    assert run(config, tmp_path / "killed") and world.records(tmp_path / "killed") == lines
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.15, losses
    shapes, one = VLM(config.model).abstract(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    before, after = (
        flatten(jax.device_get(load_params(tmp_path / "whole" / step, target))) for step in ("base/0", "warmup/6")
    )
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {"/".join(path.split("/")[:2]) for path in changed} == set(FORMATION)


def test_one_kind_alone_may_be_formed(make, mesh, params):
    config = make(stages__0__task__disabled=("long",))
    task = MemorySFT(config, config.stages[0], VLM(config.model), mesh)
    with jax.set_mesh(mesh):
        work = task.work(0, params)
    task.close()
    kinds = stacked(work.batch).text.formation.kinds_BJ
    assert set(kinds[kinds >= 0].tolist()) == {0} and work.numbers["memory/long"] == 0


def test_answers_that_cannot_be_learned(make, mesh, tmp_path):
    lines = [{"prompt": "Say b", "answer": "b"}, {"prompt": "Say c"}, {"prompt": "Say d", "answer": "d<|im_end|>"},
             {"prompt": "Say e", "answer": "e" * 180}, {"prompt": "Say f", "answer": "f<ms_I>"}]  # fmt: skip
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = {"data.train.0.path": str(tmp_path / "bad.jsonl"), "data.eval": []}
    config = make(**keys)
    task = MemorySFT(config, config.stages[0], VLM(config.model), mesh)
    with pytest.raises(ValueError, match=r"on_bad_sample=skip"):
        for _ in range(4):
            task._stream.take()
    task.close()
    config = make(**keys, data__on_bad_sample="skip")
    task = MemorySFT(config, config.stages[0], VLM(config.model), mesh)
    assert {task._stream.take().prompt.text for _ in range(6)} == {"Say b"}
    reasons = {name.rpartition(":")[2]: reason for name, reason in task._stream.skipped.items()}
    task.close()
    assert "must have an answer" in reasons["2"] and "control token <|im_end|>" in reasons["3"]
    assert "may have 188; raise data.pack_tokens (sample" in reasons["4"]
    assert "must not hold tokens of the memory, but has <ms_I>" in reasons["5"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__memory": "none", "stages__0__trainable": ("decoder",)}, "memory_sft is for a memory that speaks"),
        ({"stages__0__task__kl": 0.1}, "unknown key config.stages.warmup.task.kl"),
        ({"stages__0__task__prompts": 0}, "config.stages.warmup.task: prompts must be at least 1"),
        ({"data__train": []}, "data.train must name at least one JSONL file of prompts"),
        (
            {"stages__0__task__disabled": ("shrot",)},
            "task.disabled must name kinds of the memory, short, long; got 'sh",
        ),
        ({"stages__0__task__disabled": ("short", "long")}, "task.disabled leaves no kind of memory to form"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_done(make, mesh, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(make(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
