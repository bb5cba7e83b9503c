"""Every experiment in configs/ is one that `vlmem train` accepts."""

from pathlib import Path

import pytest

from vlmem_jax.config import ConfigError, load, override
from vlmem_jax.models import VLM
from vlmem_jax.processing import FrameConfig, PatchConfig, StepConfig
from vlmem_jax.rl import TASKS
from vlmem_jax.train.config import experiment
from vlmem_jax.train.stages import Split
from vlmem_jax.trees import flatten

CONFIGS = Path(__file__).parent.parent / "configs"
SPECS = [str(path.relative_to(CONFIGS)) for path in sorted(CONFIGS.rglob("*.py"))]
SPECS += ["comemo_2b.py:released", "comemo_9b.py:released", "tiny/qwen2_5_vl.py:comemo", "tiny/qwen2_5_vl.py:lora"]
SPECS += ["tiny/qwen3_vl.py:comemo", "tiny/qwen3_vl.py:lora"]
SPECS += [f"vlm2_llava_video_7b.py:{profile}" for profile in ("vlm3r", "stream")]
SPECS += [f"vismem_qwen25vl_7b.py:{profile}" for profile in ("paper_supplement", "released")]


@pytest.mark.parametrize("spec", SPECS)
def test_configs_build(spec):
    built = experiment(load(str(CONFIGS / spec)))
    if isinstance(built.image, StepConfig):
        assert (built.model.vision.kind, built.template) == ("qwen3_vit", "qwen-vl-steps")
    elif isinstance(built.image, PatchConfig):
        assert (built.model.vision.kind, built.template) == ("qwen_vit", "qwen2-vl")
    elif isinstance(built.image, FrameConfig):
        assert (built.model.vision.kind, built.template) == ("siglip", "llava-video")
    else:
        assert built.image.dhr_map == ("code" if spec.endswith(":released") else "raster")
        assert (built.model.vision.kind, built.template) == ("intern_vit", "internlm2-chat")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if ":" not in spec and "comemo" in spec])
def test_stages_train_what_the_paper_trains(spec):
    built = experiment(load(str(CONFIGS / spec)))
    paths = list(flatten(VLM(built.model).abstract()))
    gates = {path for path in paths if path.endswith("_gate")}
    new = {path for path in paths if path.startswith(("projector/", "memory/"))}
    trained = {stage.name: set(Split.of(stage, paths).trainable) for stage in built.stages}
    assert len(gates) == 2
    assert trained == {"pretrain": new, "pretrain_phase2": new - gates, "finetune": set(paths)}


def test_profiles_of_the_smallest_qwen():
    plain, comemo = (experiment(load(str(CONFIGS / "tiny" / f"qwen2_5_vl.py{end}"))) for end in ("", ":comemo"))
    assert (plain.model.memory_kind, [stage.name for stage in plain.stages]) == ("none", ["finetune"])
    assert (comemo.model.memory_kind, [stage.name for stage in comemo.stages]) == ("comemo", ["pretrain", "finetune"])
    paths = list(flatten(VLM(comemo.model).abstract()))
    assert all(path.startswith(("projector/", "memory/")) for path in Split.of(comemo.stages[0], paths).trainable)


@pytest.mark.parametrize("spec", ["lora_qwen25vl_7b.py", "tiny/qwen2_5_vl.py:lora", "tiny/qwen3_vl.py:lora"])
def test_a_stage_of_fine_tuning_trains_the_adapter_alone(spec):
    built = experiment(load(str(CONFIGS / spec)))
    stage = built.stages[-1]
    trained = Split.of(stage, list(flatten(VLM(built.model).abstract()))).trainable
    [adapter] = built.model.adapters
    assert trained == {f"adapters/{adapter.name}/decoder/{target}/{x}" for target in adapter.targets for x in "ab"}
    assert [built.model_of(one).adapter for one in built.stages] == [-1] * (len(built.stages) - 1) + [0]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("template", "qwen2-vl", "config.template is no key any more: the family of the model tells it"),
        ("image.kind", "tiles", "config.image.kind is no key any more: the tower of the model tells it"),
        ("image.size", 448, "config.image.size is no key any more: .* model.vision.image_size"),
        ("model.comemo.every", 2, "config.model.comemo is no key any more: .* config.model.memory"),
        ("stages.finetune.rl.kl", 0.1, "config.stages.2.rl is no key any more: its keys stand in task"),
    ],
)
def test_a_key_that_there_was_names_what_became_of_it(key, value, message):
    with pytest.raises(ConfigError, match=message):
        experiment(override(load(str(CONFIGS / "comemo_2b.py")), {key: value}))


def test_profiles_of_vismem():
    """Their sizes, as published: of the query builder, and of an adapter."""
    for end, lengths, builder, adapter in (
        ("", (8, 16), 315_750_400 + 2048 * 3584, 5_046_272),
        (":paper_supplement", (4, 8), 315_750_400 + 2048 * 3584, 5_046_272),
        (":released", (8, 16), 315_750_400, 10_092_544),
    ):
        built = experiment(load(str(CONFIGS / f"vismem_qwen25vl_7b.py{end}")))
        assert built.model.memory.lengths == lengths
        sizes = {path: leaf.size for path, leaf in flatten(VLM(built.model).abstract()).items()}
        for part, size in (("query_builder/", builder), ("short/lora/", adapter), ("long/lora/", adapter)):
            assert sum(n for path, n in sizes.items() if path.startswith(f"memory/{part}")) == size
        trained = {stage.name: Split.of(stage, list(sizes)).trainable for stage in built.stages}
        assert trained["formation"] | trained["invocation"] == {path for path in sizes if path.startswith("memory/")}
        assert ("warmup" in trained) == (end == ":released")
        assert trained.get("warmup", trained["formation"]) == trained["formation"]
        for stage in built.stages:
            TASKS[stage.task_kind].check(built, stage)


def test_profiles_of_vlm2():
    """Two clips of 32 frames fill a row, or one of 128 of which 32 are shown; the tower and the language model stay."""
    for end, frames, clips in (("", 32, 2), (":vlm3r", 32, 2), (":stream", 128, 1)):
        built = experiment(load(str(CONFIGS / f"vlm2_llava_video_7b.py{end}")))
        standing = built.tile.keeps or frames
        assert (built.image.frames, built.data.pack_tiles) == (frames, clips * frames)
        text = built.data.pack_tokens // clips - standing * built.tile.tokens  # beside the frames of a clip
        assert 400 < text < 500
        assert built.data.rows * clips == 128
        paths = list(flatten(VLM(built.model).abstract()))
        for stage in built.stages:
            trained = Split.of(stage, paths).trainable
            assert {path.split("/")[0] for path in trained} - {"adapters"} == {"projector", "memory"}
            assert "projector/newline" not in trained
            assert any(path.startswith("adapters/") for path in trained) == (stage.name != "align")


def test_the_last_layers_of_the_tower_may_form_short_memories():
    """Four slots a latent token, two adapters of rank 16 in each of 8 layers, a map of queries, and nothing else."""
    built = experiment(override(load(str(CONFIGS / "vismem_qwen25vl_7b.py")), {"model.memory.former": "lora_vision"}))
    shapes = flatten(VLM(built.model).abstract()["memory"]["short"])
    assert (shapes.pop("m_init").shape, shapes.pop("query/kernel").shape) == ((32, 1280), (3584, 1280))
    assert sum(leaf.size for leaf in shapes.values()) == 8 * 2 * 2 * 1280 * 16


def test_keys_change_from_the_command_line():
    config = load(str(CONFIGS / "comemo_9b.py"))
    changes = {"model.memory": "none", "stages.finetune.steps": "7", "data.train.0.path": "mine.jsonl"}
    built = experiment(override(config, changes))
    assert built.model.memory is None and built.stages[2].steps == 7 and built.data.train[0].path == "mine.jsonl"
    assert built.model.decoder.width == 4096
