"""A word-level tokenizer for questions about mosaics, written as the `tokenizer.json` that any model could bring.

`In image 2, which digit is at row 3, column 1?` becomes three tokens: the words that carry no information are dropped
and a number joins the word before it. Words it does not know become `<unk>`.
"""

import json
import pathlib
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")
PATCH_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|endoftext|>")
"""Control tokens of models that see images as patches; the demo's own does not use them."""
MAX_IMAGES = 4
MAX_LINES = 8
"""Most rows or columns of digits in an image."""
IGNORED_WORDS = ("in", "which", "what", "digit", "digits", "is", "are", "at", "the", "of", "and")
TEMPLATE_WORDS = ("system", "user", "assistant")
"""Names of speakers in the chat template. Speakers take turns, so the control token before a name says as much."""


def words(kept: Sequence[str] = ()) -> list[str]:
    """The vocabulary; `kept` stand at its end."""
    lines = range(1, MAX_LINES + 1)
    return [
        *SPECIAL,
        "all",
        *(str(digit) for digit in range(10)),
        *(f"image{n}" for n in range(1, MAX_IMAGES + 1)),
        *(f"row{n}" for n in lines),
        *(f"column{n}" for n in lines),
        *PATCH_SPECIAL,
        *kept,
    ]


def write_tokenizer(folder: pathlib.Path, kept: Sequence[str] = (), ignored: Sequence[str] = ()) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, which is made if need be.

    `kept`: tokens besides, which are left as they are wherever they stand; those like `<this>` are control tokens.
    `ignored`: words that are dropped besides.
    """
    vocab = {word: index for index, word in enumerate(words(kept))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(rf"\b({'|'.join((*IGNORED_WORDS, *TEMPLATE_WORDS, *ignored))})\b"), ""),
            normalizers.Replace(Regex(r"(?<=\b(image|row|column))\s+(?=\d)"), ""),
            normalizers.Replace(Regex(r"[^a-z0-9]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL + PATCH_SPECIAL])
    control = [word for word in kept if word.startswith("<")]
    plain = [word for word in kept if word not in control]
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=word.isalnum()) for word in plain])
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in control])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
