import json

import pytest
import sentencepiece
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from vlmem_jax.families.internvl import FAMILY
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.processing.tokenizer import Tokenizer


def save_fast(folder):
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
    tokenizer = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def save_sentencepiece(folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few lines of text to learn from, again and again"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<|im_end|>": size + 1}))


@pytest.fixture(params=[save_fast, save_sentencepiece])
def language_tokenizer(request, tmp_path):
    """A tokenizer as it comes with a language model: control tokens of a chat, none for images."""
    folder = tmp_path / "source"
    folder.mkdir()
    request.param(folder)
    return folder


def test_image_tokens_are_appended_in_their_order(language_tokenizer, tmp_path):
    before = Tokenizer.load(language_tokenizer)
    files = TokenizerFiles.of(language_tokenizer, FAMILY.added_tokens)
    assert files.added == FAMILY.added_tokens and files.new_size == before.vocab_size + 9
    files.copy(tmp_path / "copy", {})
    after = Tokenizer.load(tmp_path / "copy")
    assert [after.id(token) for token in FAMILY.added_tokens] == list(range(before.vocab_size, before.vocab_size + 9))
    assert after.encode("ab<img><IMG_CONTEXT></img>") == before.encode("ab") + [
        before.vocab_size + i for i in (0, 2, 1)
    ]
    assert after.id("<|im_end|>") == before.id("<|im_end|>")
    assert TokenizerFiles.of(tmp_path / "copy", FAMILY.added_tokens).added == ()


def test_a_tokenizer_that_has_them_is_copied_byte_for_byte(language_tokenizer, tmp_path):
    TokenizerFiles.of(language_tokenizer, FAMILY.added_tokens).copy(tmp_path / "once", {})
    (tmp_path / "once" / "modeling.py").write_text("print('never copied')")
    TokenizerFiles.of(tmp_path / "once", FAMILY.added_tokens).copy(tmp_path / "twice", {})
    for path in (tmp_path / "twice").iterdir():
        assert path.read_bytes() == (tmp_path / "once" / path.name).read_bytes()
    assert not (tmp_path / "twice" / "modeling.py").exists()


def test_a_folder_without_a_tokenizer(tmp_path):
    files = TokenizerFiles.of(tmp_path, FAMILY.added_tokens)
    assert files.new_size == 0
    files.copy(tmp_path / "copy", {})
    assert not (tmp_path / "copy").exists()
