"""Questions to a checkpoint from the command line, one at a time and as a conversation."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.evals import world as speaking
from tests.train import world
from vlmem_jax.checkpoint import save_params
from vlmem_jax.cli.main import main
from vlmem_jax.config import to_dict
from vlmem_jax.families import resolve
from vlmem_jax.generate import Chat, Request, SamplingConfig, answers, load_model
from vlmem_jax.models import VLM
from vlmem_jax.processing.images import open_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model with open gates, as `vlmem convert` would leave it, and pictures."""
    folder = world.make(tmp_path_factory.mktemp("checkpoint"))
    config = world.config(folder)
    vlm = VLM(resolve(config.model))
    params = vlm.fresh(jax.random.key(3))
    for gate in ("attn_gate", "mlp_gate"):
        params["memory"]["blocks"][gate] = jnp.full_like(params["memory"]["blocks"][gate], 0.7)
    save_params(folder / "0", params)
    described = {"model": to_dict(vlm.config), "image": dict(config.image), "system": ""}
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def ask(checkpoint, *arguments):
    return main(["generate", "--checkpoint", str(checkpoint), "--max-new-tokens", "6", *arguments])


def test_an_answer_depends_on_the_images(checkpoint, capsys):
    shown = []
    for images in ([], ["1.png"], ["1.png", "2.png"]):
        flags = [part for name in images for part in ("--image", str(checkpoint / name))]
        assert ask(checkpoint, "--prompt", "Say a word.", *flags, "--temperature", "1") == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 3


def test_a_prompt_longer_than_the_model_was_made_for_is_told(checkpoint, capsys):
    words = "the model was made for 32768 (model.decoder.max_positions)"
    assert ask(checkpoint, "--prompt", "Say a word.") == 0 and words not in capsys.readouterr().err
    about = json.loads((checkpoint / "model.json").read_text())
    short = about["model"]["decoder"] | {"max_positions": 20, "ntk_factor": 0.0}
    (checkpoint / "model.json").write_text(json.dumps(about | {"model": about["model"] | {"decoder": short}}))
    try:
        assert ask(checkpoint, "--prompt", "Say a word.") == 0
        assert words.replace("32768", "20") in capsys.readouterr().err
    finally:
        (checkpoint / "model.json").write_text(json.dumps(about))


def test_parts_stand_as_the_flags_do_and_texts_are_texts(checkpoint, monkeypatch):
    asked = []

    def kept(self, requests, *args):
        asked.extend(request.sample for request in requests)
        raise ValueError("enough")

    monkeypatch.setattr("vlmem_jax.generate.Pool.submit", kept)
    one, two = checkpoint / "1.png", checkpoint / "2.png"
    flags = ["--text", "a ", "--image", str(one), "--text", "b ", "--image", str(two)]
    typed = "c <image> <IMG_CONTEXT> <|im_end|>"
    for arguments in ([*flags, "--prompt", "c"], ["--prompt", "c", *flags], ["--prompt", typed, *flags]):
        assert ask(checkpoint, *arguments) == 2
    processor = load_model(checkpoint).processor
    gap = processor.template.before_text
    wanted = processor.prompt(["a ", open_image(one), f"{gap}b ", open_image(two), f"{gap}c"])
    for sample in asked:
        length = (
            len(asked[0].tokens_T) if sample is not asked[2] else np.flatnonzero(sample.visual_index_T >= 0)[-1] + 3
        )
        np.testing.assert_array_equal(sample.tokens_T[:length], wanted.tokens_T[:length])
        np.testing.assert_array_equal(sample.pixels_ISSc, wanted.pixels_ISSc)
    for token in (*processor.control_ids, processor.stop_id):
        assert (asked[2].tokens_T == token).sum() == (asked[0].tokens_T == token).sum()


def test_control_tokens_are_never_answered(checkpoint):
    model = load_model(checkpoint)
    generator = model.generator()
    prompt = model.processor.prompt("a", [])
    hot = SamplingConfig(max_new_tokens=50, temperature=50.0)
    [answer] = answers(generator, [prompt], hot)
    assert not set(answer) & {*model.processor.control_ids, model.processor.stop_id}
    assert max(answer) < model.processor.tokenizer.vocab_size < model.vlm.config.decoder.vocab


def test_eight_devices_answer_as_one_and_hold_weights_where_they_are_read(checkpoint):
    many, one = load_model(checkpoint), load_model(checkpoint, devices=jax.devices()[:1])
    assert dict(many.mesh.shape) == {"data": 4, "fsdp": 1, "context": 1, "tensor": 2} and one.mesh.size == 1
    prompts = [one.processor.prompt("word " * n, []) for n in (1, 2, 3)]  # a row of the batch is padding
    greedy = SamplingConfig(max_new_tokens=6)
    assert answers(many.generator(), prompts, greedy) == answers(one.generator(), prompts, greedy)


def test_a_mesh_can_be_asked_for_and_says_what_its_heads_cost(checkpoint, capsys):
    shown = []
    for flags in ([], ["--mesh.tensor=4", "--mesh.fsdp=2"]):
        assert ask(checkpoint, "--prompt", "Say a word.", *flags) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    line = "mesh.tensor=4 does not divide the 2 kv_heads of model.decoder"
    assert line in shown[1].err and "does not divide" not in shown[0].err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mesh.data=3"], "the mesh must use all 8 devices, but mesh.data=3, mesh.fsdp=1"),
        (["--mesh.tensor=8"], "mesh.tensor x mesh.context = 8 must divide model.decoder.heads 4"),
        (["--mesh.fsdp=0"], "mesh sizes must be positive"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
    ],
)
def test_bad_input_is_one_plain_line(checkpoint, capsys, arguments, message):
    assert ask(checkpoint, "--prompt", "a", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_folder_without_a_model_is_named(tmp_path, capsys):
    assert ask(tmp_path, "--prompt", "a") == 2
    assert str(tmp_path) in capsys.readouterr().err


# --- a memory that speaks ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A checkpoint that often calls for memories, of 3 and 5 latent tokens."""
    return speaking.checkpoint(tmp_path_factory.mktemp("speaker"))


HOT = "--prompt", "What is this?", "--max-new-tokens", "12", "--temperature", "1", "--seed", "4"


def test_memories_are_shown_where_they_were_inserted(speaker, capsys):
    def out(*flags):
        assert main(["generate", "--checkpoint", str(speaker), *HOT, *flags]) == 0
        return capsys.readouterr().out

    short, long = "[short memory, 3 latent tokens]", "[long memory, 5 latent tokens]"
    shown = out("--show-memory")
    assert 0 < shown.index(long) < shown.index(short)
    assert out() == shown.replace(short, "").replace(long, "")
    assert out("--show-memory", "--reverse-types").startswith(shown.partition(long)[0] + short)
    assert long in out("--show-memory", "--disable", "short") and short not in out(
        "--show-memory", "--disable", "short"
    )
    assert out("--show-memory", "--max-invocations", "1").count(" memory, ") == 1
    assert " memory, " not in out("--show-memory", "--invocation", "never")
    ruled = out("--show-memory", "--invocation", "always").replace(short, long).split(long)
    assert len(ruled) > 1 and all(phrase[-1] in ".,:;!?" for phrase in ruled[:-1])
    random = out("--show-memory", "--invocation", "delimiter_random", "--invocation-probability", "0")
    assert " memory, " not in random


def test_a_chat_shows_memories_and_keeps_them_out_of_its_history(speaker, capsys, monkeypatch):
    chats = []

    class Kept(Chat):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            chats.append(self)

    monkeypatch.setattr("vlmem_jax.cli.chat.Chat", Kept)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\nAnd this?\n"))
    assert main(["chat", "--checkpoint", str(speaker), *HOT[2:], "--show-memory", "--disable", "long"]) == 0
    shown, note = capsys.readouterr().out, "[short memory, 3 latent tokens]"
    assert note in shown and len(chats[0].history) == 2
    assert shown.replace(note, "") == "".join(f"{answer}\n" for _, answer in chats[0].history)


@pytest.mark.parametrize("flags", [["--invocation", "learned"], ["--show-memory"], ["--max-invocations", "1"]])
def test_flags_of_a_memory_that_the_model_has_not_are_refused(checkpoint, capsys, flags):
    assert ask(checkpoint, "--prompt", "a", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.memory of" in error and "is comemo; leave them out" in error


# --- chat -------------------------------------------------------------------------------------------------------------

GREEDY = SamplingConfig(max_new_tokens=4)


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, devices=jax.devices()[:1])


@pytest.fixture
def picture(checkpoint):
    return Image.open(checkpoint / "1.png").convert("RGB")


def read_again(chat, prompt):
    """The answer to a prompt from which the chat's engine has read nothing."""
    [handle] = chat._pool.submit([Request(prompt, GREEDY)])
    return chat.processor.tokenizer.decode(handle.result())


def test_a_continued_chat_keeps_the_cache_and_equals_reading_all_again(model, picture):
    chat = Chat(model.generator(), model.processor, GREEDY)
    first = "".join(chat.ask("a b", [picture]))
    turn = chat._turn
    assert turn is not None and chat.history == [((picture, "\n", "a b"), first)]
    second = "".join(chat.ask("c d"))
    assert chat._turn.request.after is turn
    prompt = model.processor.prompt("c d", history=[([picture, "\na b"], first)])
    assert read_again(chat, prompt) == second


def test_what_is_typed_in_a_chat_is_text(model, picture):
    chat = Chat(model.generator(), model.processor, GREEDY)
    typed = "a <image> <IMG_CONTEXT> <|im_end|>"
    first = "".join(chat.ask(typed, [picture]))
    second = "".join(chat.ask(typed))
    assert chat._turn.request.after is not None and chat.history[1] == ((typed,), second)
    sample = model.processor.prompt(typed, history=[([picture, "\n", typed], first)])
    read = model.processor.prompt(typed, [picture]).tokens_T
    went_on = [*model.processor.tokenizer.encode(first), *model.processor.follow_up(typed).tokens_T]
    np.testing.assert_array_equal(sample.tokens_T, [*read, *went_on])
    assert len(np.unique(sample.visual_index_T)) - 1 == (sample.tokens_T == model.processor.context_id).sum()


def test_a_new_image_makes_the_chat_read_all_again(model, picture):
    chat = Chat(model.generator(), model.processor, GREEDY)
    first = "".join(chat.ask("a b", [picture]))
    turned = picture.rotate(90)
    second = "".join(chat.ask("c d", [turned]))
    assert chat._turn.request.after is None
    prompt = model.processor.prompt("c d", [turned], [([picture, "\na b"], first)])
    assert read_again(chat, prompt) == second


def test_a_chat_that_outgrows_its_cache_goes_on(model):
    chat = Chat(model.generator(), model.processor, GREEDY)
    for _ in range(4):
        "".join(chat.ask("word " * 60))
    assert len(chat.history) == 4


def test_a_chat_that_outgrows_its_rotary_range_is_read_again(model):
    """Its frequencies were those of a short prompt (dynamic NTK); a prompt read whole has others."""
    longest = len(model.processor.prompt("a b", []).tokens_T) + GREEDY.max_new_tokens + 4
    decoder = dataclasses.replace(model.vlm.config.decoder, ntk_factor=2.0, max_positions=longest)
    vlm = VLM(dataclasses.replace(model.vlm.config, decoder=decoder))
    chat = Chat(dataclasses.replace(model, vlm=vlm).generator(), model.processor, GREEDY)
    first = "".join(chat.ask("a b"))
    second = "".join(chat.ask("c d e f g h"))
    assert chat._turn.request.after is None
    assert read_again(chat, model.processor.prompt("c d e f g h", [], [("a b", first)])) == second


def test_an_answer_broken_off_stays_in_the_history(model):
    chat = Chat(model.generator(), model.processor, GREEDY)
    pieces = chat.ask("a b")
    first = next(pieces)
    pieces.close()
    assert chat.history == [(("a b",), first)]
    assert "".join(chat.ask("c"))


def test_chat_reads_commands_and_survives_a_wrong_file(checkpoint, picture, capsys, monkeypatch):
    first = jax.devices()[:1]  # as in the chats above, whose programs serve here, too
    monkeypatch.setattr("jax.devices", lambda: first)
    lines = f"/image nowhere.png\n/image {checkpoint / '1.png'}\na b\nc d\n/reset\ne\n/quit\nnever read\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "--checkpoint", str(checkpoint), "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "nowhere.png" in captured.err
    assert len(captured.out.splitlines()) >= 3
