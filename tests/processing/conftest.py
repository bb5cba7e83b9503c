"""Small tokenizers on disk: one whole word an id, and sentencepiece trained on a few lines."""

import json

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel, Fuse

from vlmem_jax.processing import Tokenizer

CONTROL = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
LINES = [
    "What is the digit at row one, column two?",
    "It is seven; the image shows a mosaic of digits.",
    "Describe the picture in one sentence. 你是谁？",
    "system user assistant Frame1: Frame2: \n hello world",
]


def special(tokens):
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def save_char_tokenizer(folder):
    """Every known character is a token; others are <unk>."""
    characters = sorted(
        set("".join(LINES)) | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:")
    )
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = FastTokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens(special(["<s>", "</s>", *CONTROL]))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_byte_tokenizer(folder):
    """Every byte of UTF-8 is a token."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = FastTokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_special_tokens(special(["<s>", "</s>", *CONTROL]))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_sentencepiece(folder, dummy_prefix):
    """A model with byte fallback, and the control tokens as added tokens in both files that may hold them."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    ids = {token: size + index for index, token in enumerate(CONTROL)}
    (folder / "added_tokens.json").write_text(json.dumps({token: ids[token] for token in CONTROL[2:]}))
    decoder = {str(ids[token]): {"content": token, "special": True} for token in CONTROL[:2]}
    settings = {"bos_token": {"content": "<s>"}, "pad_token": "</s>", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SAVE = {
    "characters": save_char_tokenizer,
    "bytes": save_byte_tokenizer,
    "sentencepiece": lambda folder: save_sentencepiece(folder, False),
    "sentencepiece_prefix": lambda folder: save_sentencepiece(folder, True),
}


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    folders = {}
    for name, save in SAVE.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save(folders[name])
    return folders


@pytest.fixture(scope="session", params=list(SAVE))
def tokenizer(request, tokenizer_folders) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    return Tokenizer.load(tokenizer_folders[request.param])


@pytest.fixture(scope="session")
def char_tokenizer(tokenizer_folders) -> Tokenizer:
    return Tokenizer.load(tokenizer_folders["characters"])
