"""Repositories of the Hugging Face hub, read wherever a folder with a model is, and written by `vlmem convert --push`.

Fetched are the files of a model: safetensors, JSON, tokenizers and templates. Code and pickles stay where they are.
"""

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from vlmem_jax.paths import AnyPath, as_path

FETCHED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt")
REPO = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?")
"""USER/NAME, and perhaps @ a branch, a tag or a commit."""


def folder(name: str | os.PathLike) -> AnyPath:
    """The folder that `name` means, on a disk, in a bucket, or a repository of the hub: USER/NAME[@REVISION].

    A folder on the disk goes before a repository of that name; the files of a repository are fetched into the hub's
    cache (HF_HOME), once. Raises OSError where it cannot be had, saying how to, and what `as_path` raises.
    """
    text = os.fspath(name)
    path = as_path(text)
    match = REPO.fullmatch(text)
    return path if match is None or path.exists() else as_path(_fetched(match["repo"], match["revision"]))


@functools.cache
def _fetched(repo: str, revision: str | None) -> str:
    from huggingface_hub import constants, snapshot_download

    with _told(f"there is no folder {as_path(repo)}, and the repository {repo} of {constants.ENDPOINT}"):
        return snapshot_download(repo, revision=revision, allow_patterns=list(FETCHED))


def check_name(repo: str) -> str:
    """`repo`, if a repository may have that name. Raises ValueError."""
    match = REPO.fullmatch(repo)
    if match is None or match["revision"]:
        raise ValueError(f"a repository of the Hugging Face hub is named USER/NAME; got {repo!r}")
    return repo


def push(source: AnyPath, repo: str, private: bool = False, message: str = "Upload of a model") -> str:
    """Writes the files of the folder `source` into a repository, which is made if there is none; gives its address.

    Raises OSError saying what the hub refused.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi(library_name="vlmem_jax")
    with _told(f"the repository {repo} of {constants.ENDPOINT}"):
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(source), commit_message=message)
    return f"{constants.ENDPOINT}/{repo}"


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the hub, of which a request may raise many kinds, as one line that begins with `what`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"{what} is for those who accepted its terms: accept them on its page, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"{what} has no such branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(f"{what} does not exist, or is private; for one of yours run `hf auth login`") from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(f"{what} cannot be reached, and is not in the cache of earlier downloads") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; run `hf auth login` with a token that may" * (status in (401, 403))
        raise OSError(f"{what} refused: {_line(error)}{hint}") from error
    except Exception as error:  # of the network, by the library that carries requests
        raise OSError(f"{what} cannot be reached: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]
