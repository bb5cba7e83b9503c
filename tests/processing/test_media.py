"""Files that data name: where they may lie, and what they are not."""

import os
import socket

import pytest

from vlmem_jax.processing.images import open_image, read_head
from vlmem_jax.processing.media import resolve
from vlmem_jax.processing.video import probe


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "secret.jpg").touch()
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "inside.jpg").symlink_to(root / "sub" / "a.jpg")
    (root / "out").symlink_to(tmp_path / "other")
    (root / "loop").symlink_to(root / "loop")
    return root


def test_paths_stay_below_the_root(root):
    assert resolve(root, "sub/../sub/a.jpg") == root / "sub" / "a.jpg"
    assert resolve(root, "inside.jpg") == root / "sub" / "a.jpg"
    assert resolve(root, str(root / "sub" / "a.jpg")) == root / "sub" / "a.jpg"
    for path in ("../secret.jpg", "sub/../../secret.jpg", "/etc/passwd"):
        for follow in (False, True):
            with pytest.raises(ValueError, match="below its root.*; change root"):
                resolve(root, path, follow)


def test_links_may_lead_out_if_they_are_ones_own(root):
    for path in ("link.jpg", "out/b.png"):
        with pytest.raises(ValueError, match="below its root.*follow_links"):
            resolve(root, path)
        assert resolve(root, path, follow_links=True) == root / path


def test_a_circle_of_links(root):
    with pytest.raises(ValueError, match="cannot be followed: .*(?i:links|loop)"):
        resolve(root, "loop/a.png")
    with pytest.raises(ValueError, match="cannot be opened: .*links"):
        open_image(resolve(root, "loop/a.png", follow_links=True))


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("data:image/png;base64," + "A" * 100_000, "`vlmem data convert` writes it to one"),
        ("https://example.com/a.jpg", "is an address"),
        ("s3://bucket/a.jpg", "is an address"),
        ("file:///data/a.jpg", "is an address"),
        ("~/a.jpg", "write the folder out"),
    ],
)
def test_what_is_no_path_is_named_for_what_it_is(root, path, what):
    with pytest.raises(ValueError, match=what) as error:
        resolve(root, path)
    assert len(str(error.value)) < 300


def test_a_pipe_a_socket_and_a_folder_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        for open_it in (open_image, read_head, probe):
            for name, what in (("pipe.png", "a pipe"), ("socket.png", "a socket"), (".", "a folder")):
                with pytest.raises(ValueError, match=f"it is {what}, no file"):
                    open_it(tmp_path / name)
