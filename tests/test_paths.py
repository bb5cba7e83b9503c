import errno
import importlib.util
from pathlib import Path

import pytest

from vlmem_jax import paths
from vlmem_jax.cli.main import main
from vlmem_jax.paths import Mirror, as_path, write_whole


def test_a_path_on_a_disk_is_an_ordinary_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert as_path("runs/a") == tmp_path / "runs" / "a" and isinstance(as_path("runs/a"), Path)
    assert as_path(tmp_path) == tmp_path


def test_a_path_in_a_bucket_reads_and_writes_like_one_on_a_disk(bucket):
    folder = as_path(bucket)
    assert str(folder / "a" / "b") == f"{bucket}/a/b" and as_path(folder) == folder
    assert not folder.is_dir()
    content = bytes(range(256)) * 3
    write_whole(folder / "a" / "b", content)
    assert (folder / "a" / "b").read_bytes() == content
    assert folder.is_dir() and (folder / "a").is_dir() and not (folder / "a").is_file()
    assert [item.name for item in folder.iterdir()] == ["a"]


def test_what_others_write_is_seen_at_once(gcs, bucket):
    folder = as_path(bucket)
    write_whole(folder / "0", b"")
    assert [item.name for item in folder.iterdir()] == ["0"]
    gcs.objects["bucket", f"{bucket.removeprefix('gs://bucket/')}/1"] = 1, b"content"
    assert [item.name for item in folder.iterdir()] == ["0", "1"] and (folder / "1").read_bytes() == b"content"


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://", "gs:///run"])
def test_other_schemes_are_refused(path):
    with pytest.raises(ValueError, match=f"gs://BUCKET/FOLDER; got {path}"):
        as_path(path)


def test_a_bucket_that_is_not_there_is_named(gcs):
    with pytest.raises(FileNotFoundError, match="there is no bucket gs://buckte"):
        as_path("gs://buckte/run")
    assert gcs.buckets == {"bucket"}, "and not made"


def test_without_gcsfs_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    paths._check_bucket.cache_clear()
    assert main(["generate", "--checkpoint", "gs://bucket/run", "--prompt", "?"]) == 2
    assert "pip install 'vlmem_jax[gcs]'" in capsys.readouterr().err


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "folder" / "file"
    write_whole(file, b"old")
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(file, b"newest")
    assert file.read_bytes() == b"new"


def test_on_a_disk_nothing_is_mirrored(tmp_path):
    with Mirror(tmp_path) as mirror:
        assert mirror.local == tmp_path
        (tmp_path / "file").write_text("content")
        mirror.send()
    assert (tmp_path / "file").read_text() == "content"


def test_a_mirror_starts_from_what_is_there_and_sends_what_has_grown(gcs, bucket):
    folder = as_path(bucket)
    write_whole(folder / "inside" / "lines", b"1\n")
    with Mirror(bucket, ["inside/lines", "new"]) as mirror:
        for line in ("2\n", "3\n"):
            with (mirror.local / "inside" / "lines").open("a") as file:
                file.write(line)
            mirror.send()
            assert (folder / "inside" / "lines").read_bytes().endswith(line.encode())
        generation = gcs.generation
        mirror.send()
        assert gcs.generation == generation, "what has not changed is not sent again"
        (mirror.local / "last").write_text("x")
    assert (folder / "inside" / "lines").read_bytes() == b"1\n2\n3\n" and (folder / "last").exists()
    assert not mirror.local.exists()


def test_a_mirror_that_cannot_send_says_so_and_hides_no_other_error(gcs, bucket):
    gcs.refuse = lambda name: name.endswith("lines")
    with (
        pytest.raises(OSError, match=f"{bucket}/lines could not be written: OSError: Forbidden"),
        Mirror(bucket) as one,
    ):
        (one.local / "lines").write_text("1")
    with pytest.raises(ValueError, match="the reason"), Mirror(bucket) as other:
        (other.local / "lines").write_text("1")
        raise ValueError("the reason")
    assert not one.local.exists() and not other.local.exists()


def test_a_file_that_could_not_be_written_leaves_the_one_before_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"before")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", b"after")
    assert [file.name for file in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"before"
