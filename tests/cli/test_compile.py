"""`vlmem compile`: programs for TPUs that are not there."""

import pytest

from tests.flight.command import compile_step, compile_steps

pytest.importorskip("libtpu")
pytestmark = pytest.mark.tpu_aot

COMEMO = ("--config", "configs/tiny/comemo.py", "--topology", "v5e:2x2")
# two layers, and an optimizer of few operations, to be quick
COMEMO += ("--config.model.decoder.layers=2", "--config.model.memory.every=1", "--config.optimizer.name=adamw")
VISMEM = ("--config", "configs/tiny/vismem.py", "--topology", "v5e:2x2")
VLM2 = ("--config", "configs/tiny/vlm2.py", "--topology", "v5e:1x1")
ONE_ROW = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")


@pytest.fixture(scope="module")
def over_slices(tmp_path_factory):
    mesh = ("--slices", "2", "--config.mesh.data=2", "--config.mesh.fsdp=4")
    done = compile_step(tmp_path_factory.mktemp("slices"), *COMEMO, *mesh)
    assert done.code == 0, done.err[-3000:]
    return done


def test_the_numbers_are_printed_and_written(over_slices):
    numbers = over_slices.report
    assert numbers["what"] == "train: finetune" and numbers["fits"]
    kinds = ("parameter", "state", "input", "activation", "temporary", "peak")
    assert min(numbers[f"{kind}_bytes"] for kind in kinds) > 0
    assert any("vlmem_jax/" in buffer["source"] for buffer in numbers["buffers"])
    assert 0 < numbers["hbm_share"] < 0.5
    assert numbers["collectives"] and numbers["activation_gathers"] == []
    assert 0 < numbers["predicted_step_seconds"] <= numbers["exposed_step_seconds"]
    assert 0 < numbers["predicted_mfu"] < 1
    answer, _, rest = over_slices.out.partition("writing machine code")
    assert "memory of a chip" in answer and "first estimate" in answer
    assert "compiler's estimate" in rest and 0 < numbers["roofline_seconds"] < numbers["cycles_seconds"]


def test_data_goes_over_slices_and_nothing_else_does(over_slices):
    numbers = over_slices.report
    assert numbers["slices"] == 2
    over = {tuple(c["axes"]) for c in numbers["collectives"]}
    assert over == {("fsdp",), ("data",)}
    between = [c for c in numbers["collectives"] if c["axes"] == ["data"]]
    assert {c["kind"] for c in between} == {"all-reduce"} and {c["devices"] for c in between} == {2}


@pytest.mark.slow
def test_what_does_not_fit_is_listed_and_settings_are_tried(tmp_path):
    wide = ("--config.model.decoder.vocab=4800000", "--config.loss_chunk=64", "--config.model.remat=offload")
    plain = ("--config.model.memory=none", "--config.model.attention.implementation=xla")  # to be quick
    done = compile_step(tmp_path, *COMEMO, *wide, *plain, "--packs", "1")
    assert done.code == 1, done.out[-2000:] + done.err[-2000:]
    numbers = done.report
    assert not numbers["fits"] and numbers["hbm_share"] > 1
    assert "IT DOES NOT FIT" in done.out and "machine code" not in done.out
    largest = numbers["buffers"][0]
    assert largest["bytes"] > 2**28 and any("vlmem_jax/" in buffer["source"] for buffer in numbers["buffers"])
    tried = [line for line in done.out.splitlines() if line.startswith("  --config.")]
    less = {line.split(":")[0].strip(): float(line.split(", ")[1].split()[0]) for line in tried if "less" in line}
    assert less["--config.optimizer.state_dtype=bfloat16"] > 0  # and not enough: no machine code
    (spread,) = (line for line in tried if line.startswith("  --config.mesh.data=1 --config.mesh.fsdp=-1"))
    assert "; fits, a step takes" in spread


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_serving_compiles_too(tmp_path, what):
    words = ("--what", what, "--tokens", "256", "--tiles", "4", "--rows", "8")
    done = compile_step(tmp_path, *COMEMO, *words)
    assert done.code == 0, done.err[-3000:]
    numbers = done.report
    assert numbers["what"] == what and numbers["fits"]
    assert (numbers["state_bytes"] > 0) == (what == "decode")
    assert 0 < numbers["predicted_step_seconds"] <= numbers["exposed_step_seconds"]
    assert 0 < numbers["predicted_mfu"] < 1


def test_decisions_are_scored_in_packed_rows(tmp_path):
    """With what the tower sees of each row, or, where rows are not split, of what was seen before."""
    words = ("--config", "configs/tiny/qwen3_vl.py", "--topology", "v5e:2x2", "--what", "decide", "--no-code")
    words += ("--tokens", "256", "--tiles", "128")
    in_one = ("--config.mesh.data=1", "--config.mesh.context=2", "--config.mesh.tensor=2")
    sizes = [(), ("--samples", "2"), ("--rows", "3"), in_one]
    whole, halves, odd, kept = compile_steps(tmp_path, [(*words, *size) for size in sizes])
    for done in (whole, halves, kept):
        assert done.code == 0, done.err[-3000:]
        assert done.report["what"] == "decide" and done.report["fits"] and done.report["state_bytes"] == 0
    assert halves.report["flops"] < whole.report["flops"] == halves.report["shape_flops"]
    assert kept.report["flops"] < whole.report["flops"] / 2, "it is one row of two"
    assert "must divide --rows 3" in odd.err


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Two steps of the smallest model, then the next frame of the released one, whose tower has a single layer here."""
    large = ("--config.model.preset=llava_video_7b", "--config.model.vision.layers=1", "--no-code")
    lines = [(*VLM2, "--what", "look", "--rows", "2"), (*VLM2, "--what", "ask", "--tokens", "20")]
    return compile_steps(tmp_path_factory.mktemp("streams"), [*lines, (*VLM2, *large, "--what", "look")])


def test_a_frame_and_a_question_compile_and_copy_no_bank(streams):
    for done, what in zip(streams, ("look", "ask", "look"), strict=True):
        assert done.code == 0, done.err[-3000:]
        numbers = done.report
        assert numbers["what"] == what and numbers["fits"] and numbers["copies"] == 0
        assert 0 < numbers["memory_seconds"] < numbers["predicted_step_seconds"]
        assert 0 < numbers["predicted_mfu"] < 1
        assert "are copied 0 times" in done.out


def test_banks_of_the_released_size_are_read_by_the_kernel(streams):
    numbers = streams[-1].report
    entries, slots, width = 8 + 32, (5888 + 2 * 11776), 1152
    kept = 2 * 2 * slots * width + 2 * 32 * 736 * width + 4 * (32 * width + entries + 2)
    assert numbers["state_bytes"] == kept
    attention = 4 * 768 * slots * width  # FLOPs
    assert numbers["memory_seconds"] > attention / 197e12
    assert numbers["temporary_bytes"] < 2 * slots * width  # no bank made again, no scores


def test_learning_from_rewards_compiles_with_its_memories(tmp_path):
    words = ("--what", "rl", "--tokens", "100", "--tiles", "64", "--memories", "2", "--stage", "formation")
    done = compile_step(tmp_path, *VISMEM, *words)
    assert done.code == 0, done.err[-3000:]
    numbers = done.report
    assert numbers["what"] == "rl: formation" and numbers["fits"] and numbers["activation_gathers"] == []
    assert 0 < numbers["predicted_mfu"] < 1 and numbers["flops"] > 0


REFUSED = {
    (*COMEMO, "--topology", "v5e:3x5"): "there is no slice v5e:3x5; the nearest are v5e:4x4",
    (*COMEMO, "--topology", "v4:2x2"): "a topology is one of v5e, v5p, v6e, a colon and sizes",
    (*COMEMO, "--stage", "warmup"): "there is no stage 'warmup'; the experiment has pretrain",
    (*COMEMO, "--config.mesh.tensor=3"): "the mesh must use all 4 devices",
    (*COMEMO, "--slices", "2", *ONE_ROW): "mesh.data must be a multiple of the 2 slices",
    (*COMEMO, "--packs", "0"): "--packs must be at least 1",
    (*COMEMO, "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.data=1"): (
        "mesh.tensor x mesh.context = 2 must divide model.decoder.heads 3"
    ),
    # a stage is compiled as what it is
    (*VISMEM, "--what", "train"): "the task of stage invocation is grpo: compile it with --what rl",
    (*VISMEM, "--what", "rl", "--stage", "warmup"): "the task of stage warmup is memory_sft: name a stage of",
    (*COMEMO, "--what", "look"): "a stream of frames needs a memory that keeps them; model.memory is comemo",
    (*COMEMO, "--what", "rl"): "the task of stage finetune is next_token: compile it with --what train",
    (*VISMEM, "--what", "rl", "--tokens", "360"): "data.pack_tokens must hold a prompt and its answer",
}


def test_what_cannot_be_compiled_is_one_plain_line(tmp_path):
    for done, message in zip(compile_steps(tmp_path, list(REFUSED)), REFUSED.values(), strict=True):
        assert done.code == 2
        assert message in done.err and done.err.count("\n") == 1, done.err
