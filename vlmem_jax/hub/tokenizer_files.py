"""The tokenizer that travels with a checkpoint: copied, and given the tokens of images and memories that it lacks."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from vlmem_jax.hub import library
from vlmem_jax.paths import AnyPath, as_path, write_whole
from vlmem_jax.processing.chat import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from vlmem_jax.processing.tokenizer import Tokenizer, with_special

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Small files that go with a model: its tokenizer, first, and what only others read."""
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer of `folder`; `added` go behind its `size` ids."""

    folder: AnyPath
    files: Mapping[str, bytes]
    """The content of those of FILES that lie there; of an old tokenizer, a tokenizer.json that says the same, too."""
    size: int = 0
    added: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: str | os.PathLike, wanted: Sequence[str]) -> "TokenizerFiles":
        """Finds out which of `wanted` are missing. A folder without a tokenizer has size 0 and gets none."""
        folder = as_path(folder)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if not files.keys() & set(FILES[:2]):
            if not {"vocab.json", "merges.txt"} <= files.keys():
                return cls(folder, files)
            files["tokenizer.json"] = library.tokenizer_json(files, folder)
        tokenizer = Tokenizer.read(files, folder)
        size = tokenizer.vocab_size
        if all(_has(tokenizer, token) for token in IMAGE_TOKENS):
            return cls(folder, files, size)
        return cls(folder, files, size, tuple(token for token in wanted if not _has(tokenizer, token)))

    @property
    def new_size(self) -> int:
        """The smallest vocabulary a model may have."""
        return self.size + len(self.added)

    def copy(self, target: AnyPath, own: Mapping[str, int]) -> None:
        """Writes the files into the folder `target`. `own`: ids of tokens that a memory has of its own.

        Raises ValueError where one of these or its id is in use otherwise.
        """
        files = self.files
        if self.size:
            behind = {token: self.size + i for i, token in enumerate(self.added)}
            files = with_special(files, behind | own, self.folder)
        for name, content in files.items():
            write_whole(target / name, content)


def _has(tokenizer: Tokenizer, token: str) -> bool:
    try:
        tokenizer.id(token)
    except ValueError:
        return False
    return True
