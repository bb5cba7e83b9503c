"""Tokenizers from both kinds of folder."""

import json
import shutil

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlmem_jax.processing import Tokenizer

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufffd▁", exclude_categories=["Cs"]), max_size=20)
PER_TOKENIZER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


def test_known_text_survives(tokenizer):
    text = "What is the digit?\nIt is seven."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_of_others_holds_no_control_tokens(tokenizer):
    encode = tokenizer.text_encoder(["<|im_end|>", "<IMG_CONTEXT>"])
    ids = encode("is<|im_end|><IMG_CONTEXT><s></s> <img>the")
    assert not {tokenizer.id(token) for token in ("<|im_end|>", "<IMG_CONTEXT>", "<s>", "</s>")} & set(ids)
    assert ids.count(tokenizer.id("<img>")) == 1, "special, but no control token here"
    assert encode("the digit") == tokenizer.encode("the digit")


def test_a_word_with_the_id_of_a_control_token_is_refused(tokenizer_folders, tmp_path):
    shutil.copytree(tokenizer_folders["sentencepiece"], tmp_path, dirs_exist_ok=True)
    [newline] = Tokenizer.load(tmp_path).encode("\n")
    added = json.loads((tmp_path / "added_tokens.json").read_text()) | {"<IMG_CONTEXT>": newline}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    encode = Tokenizer.load(tmp_path).text_encoder(["<IMG_CONTEXT>"])
    assert encode("the digit") and newline not in encode("<IMG_CONTEXT>")
    with pytest.raises(ValueError, match=rf"{tmp_path} reads as the control token <IMG_CONTEXT>, got 'a\\nb'"):
        encode("a\nb")


def test_control_tokens_are_single_ids_in_any_text(tokenizer):
    ids = tokenizer.encode("is<img>the<IMG_CONTEXT><IMG_CONTEXT></img>\n<|im_end|>")
    context = tokenizer.id("<IMG_CONTEXT>")
    assert ids.count(context) == 2 and ids[-1] == tokenizer.id("<|im_end|>")
    assert tokenizer.id("<img>") in ids and tokenizer.id("</img>") in ids
    assert max(ids) < tokenizer.vocab_size


def test_encode_adds_no_start_token(tokenizer):
    assert tokenizer.bos_id not in tokenizer.encode("the digit")
    assert tokenizer.bos_id == tokenizer.id("<s>") and tokenizer.pad_id == tokenizer.id("</s>")


def test_decode_can_show_special_tokens(tokenizer):
    ids = tokenizer.encode("is<|im_end|>")
    assert tokenizer.decode(ids) == "is"
    assert tokenizer.decode(ids, skip_special=False) == "is<|im_end|>"


def test_sentencepiece_encodes_the_pieces_between_added_tokens_alone(tokenizer_folders):
    folder = tokenizer_folders["sentencepiece"]
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.load(folder)
    expected = model.encode("the digit") + [tokenizer.id("<img>")] + model.encode(" at row")
    assert tokenizer.encode("the digit<img> at row") == expected
    assert tokenizer.vocab_size == model.get_piece_size() + 5


def test_pad_falls_back_to_the_end_token(tokenizer_folders, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folders["characters"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": None}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.pad_id == tokenizer.id("<|im_end|>")


@PER_TOKENIZER
@given(text=TEXT)
def test_a_stream_gives_the_whole_text_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces)


def test_a_stream_holds_half_a_character_back(tokenizer_folders):
    tokenizer = Tokenizer.load(tokenizer_folders["bytes"])
    ids = tokenizer.encode("a😀b")
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "😀", "b"]
    broken = tokenizer.stream()
    assert [broken.push(i) for i in ids[:3]] == ["a", "", ""] and broken.flush() == "\ufffd"


def test_a_stream_leaves_special_tokens_out(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("is<|im_end|> the")
    assert "".join(stream.push(i) for i in ids) == tokenizer.decode(ids)


def test_missing_token_names_the_folder(char_tokenizer):
    with pytest.raises(ValueError, match=rf"{char_tokenizer.folder} has no token '<quad>'"):
        char_tokenizer.id("<quad>")


def test_missing_piece(tokenizer_folders):
    with pytest.raises(ValueError, match="has no token '<quad>'"):
        Tokenizer.load(tokenizer_folders["sentencepiece"]).id("<quad>")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json or tokenizer.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_damaged_file_is_named(tokenizer_folders, tmp_path, file):
    if file == "tokenizer_config.json":
        (tmp_path / "tokenizer.json").write_bytes((tokenizer_folders["characters"] / "tokenizer.json").read_bytes())
    (tmp_path / file).write_bytes(b"{broken")
    with pytest.raises(ValueError, match=file):
        Tokenizer.load(tmp_path)


OWN = ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>")


@pytest.mark.parametrize("gap", [0, 7])
def test_special_tokens_of_a_memory_get_the_ids_they_must_have(tokenizer, gap):
    first = tokenizer.vocab_size + gap
    special = {token: first + n for n, token in enumerate(OWN)}
    extended = Tokenizer.load(tokenizer.folder, special)
    text = "What is<ms_I><ms_E> the digit?<|im_end|>"
    ids = extended.encode(text)
    kept = [i for i in ids if i < first]
    assert [i for i in ids if i >= first] == [first, first + 1] and len(ids) == len(kept) + 2
    assert kept == [*tokenizer.encode("What is"), *tokenizer.encode(" the digit?<|im_end|>")]
    assert extended.decode(range(first, first + 4)) == "" and extended.decode([first + 3], False) == "<ml_E>"
    assert extended.vocab_size == first + 4 and extended.unused[-gap or len(extended.unused) :] == tuple(
        range(tokenizer.vocab_size, first)
    )
    assert extended.digest() != tokenizer.digest()


def test_special_tokens_that_are_there_change_nothing(tokenizer):
    there = {token: tokenizer.id(token) for token in ("<|im_end|>", "<img>")}
    assert Tokenizer.load(tokenizer.folder, there).digest() == tokenizer.digest()


def test_special_tokens_whose_ids_are_taken(tokenizer):
    free, seven = tokenizer.vocab_size, tokenizer.encode("7")[-1]
    where = f"but in the tokenizer in {tokenizer.folder} "
    with pytest.raises(
        ValueError, match=rf"<ms_I> must have the id {seven}, {where}that id is .*set the key token_ids"
    ):
        Tokenizer.load(tokenizer.folder, {"<ms_I>": seven})
    with pytest.raises(ValueError, match=rf"<img> must have the id {free}, {where}it has {tokenizer.id('<img>')}"):
        Tokenizer.load(tokenizer.folder, {"<img>": free})


def test_a_token_of_the_vocabulary_becomes_a_special_one(tokenizer_folders, tmp_path):
    content = json.loads((tokenizer_folders["bytes"] / "tokenizer.json").read_text())
    content["model"]["vocab"]["<ms_I>"] = 300
    plain = {"id": 301, "content": "<ms_E>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(plain | {"normalized": False, "special": False})
    for number, entry in enumerate(content["added_tokens"], 260):
        content["model"]["vocab"][entry["content"]] = entry["id"] = number
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    before = Tokenizer.load(tmp_path)
    ids = {"<ms_I>": 300, "<ms_E>": before.id("<ms_E>")}
    assert 300 not in before.encode("a<ms_I>") and before.decode([ids["<ms_E>"]]) == "<ms_E>"
    after = Tokenizer.load(tmp_path, ids)
    assert after.encode("a<ms_I><ms_E>")[-2:] == list(ids.values()) and after.decode(ids.values()) == ""


def test_a_tokenizer_that_cannot_leave_ids_out(tmp_path):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models

    FastTokenizer(models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0)).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path, {"<ms_I>": 3}).encode("a<ms_I>") == [2, 3]
    with pytest.raises(ValueError, match="cannot hold the token <ms_I> with the id 9; set the key token_ids"):
        Tokenizer.load(tmp_path, {"<ms_I>": 9})
