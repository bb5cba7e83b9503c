"""Folders on a disk and in a bucket of Google Cloud Storage (gs://BUCKET/...), read and written in the same way."""

import functools
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

AnyPath = Path | epath.Path
"""Of a disk, or of a bucket: the second has the methods of the first."""


def as_path(path: str | os.PathLike) -> AnyPath:
    """`path`, absolute.

    Raises ValueError for other schemes than gs://, ModuleNotFoundError without the extra `gcs`, and OSError for a
    bucket that cannot be reached.
    """
    text = os.fspath(path)
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text).absolute()
    bucket = rest.partition("/")[0]
    if scheme != "gs" or not bucket:
        raise ValueError(f"a path is one on a disk, or gs://BUCKET/FOLDER; got {text}")
    _check_bucket(bucket)
    return epath.Path(text)


def is_remote(path: str | os.PathLike) -> bool:
    """Whether `path` lies in a bucket."""
    return "://" in os.fspath(path)


def write_whole(file: AnyPath, content: bytes) -> None:
    """Writes `file`, and the folder it lies in; it appears when it is complete."""
    if is_remote(file):  # as every object does
        file.write_bytes(content)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, file)
    except BaseException:  # such as a full disk, which it would keep full
        unfinished.unlink(missing_ok=True)
        raise


class Mirror:
    """A folder for files that grow, which objects in a bucket cannot: `folder` itself if it is on a disk, else a copy.

    `grown`: names of files to start from, where there are any. What has changed goes to the bucket by `send`, and at
    the end of a `with` block.
    """

    def __init__(self, folder: str | os.PathLike, grown: Sequence[str] = ()):
        self._remote = as_path(folder) if is_remote(folder) else None
        self.local = Path(tempfile.mkdtemp(prefix="vlmem-") if self._remote else folder)
        self._sent: dict[Path, tuple[int, int]] = {}
        for name in grown if self._remote else ():
            if (self._remote / name).exists():
                write_whole(self.local / name, (self._remote / name).read_bytes())

    def send(self) -> None:
        """Copies every file that has changed. Raises OSError, naming the file."""
        for file in self.local.rglob("*") if self._remote else ():
            version = file.stat().st_mtime_ns, file.stat().st_size
            if file.is_file() and self._sent.get(file) != version:
                target = self._remote / file.relative_to(self.local).as_posix()
                try:
                    target.write_bytes(file.read_bytes())
                except Exception as error:  # of many kinds, by what is wrong with credentials or network
                    raise OSError(f"{target} could not be written: {_first_line(error)}") from error
                self._sent[file] = version

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, failure: type | None, *_) -> None:
        if self._remote:
            try:
                self.send()
            except OSError:
                if failure is None:  # another error, on its way, says more
                    raise
            finally:
                shutil.rmtree(self.local, ignore_errors=True)


@functools.cache
def _check_bucket(bucket: str) -> None:
    if importlib.util.find_spec("gcsfs") is None:
        raise ModuleNotFoundError(f"gs://{bucket} cannot be reached without the package gcsfs", name="gcsfs")
    import fsspec

    # other hosts, and TensorStore, write without its knowledge: what it remembers of folders would be wrong
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs
    try:
        epath.Path(f"gs://{bucket}").stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no bucket gs://{bucket}, or no permission to see it") from error
    except Exception as error:  # of many kinds, by what is wrong with credentials or network
        raise OSError(
            f"gs://{bucket} cannot be reached: {_first_line(error)}. The machine's service account or `gcloud auth "
            "application-default login` must give permission to read buckets and to write objects"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, where it holds something else."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content
