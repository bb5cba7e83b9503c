"""Repositories of the hub, against a server that stands in for it."""

import pytest

from tests.hf_hub import commit_of
from vlmem_jax.hub import repos


@pytest.fixture
def model(tmp_path):
    """A folder as people upload them."""
    folder = tmp_path / "model"
    (folder / "adapters" / "lora").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja"):
        (folder / name).write_text(name)
    (folder / "adapters" / "lora" / "adapter_model.safetensors").write_text("lora")
    for name in ("modeling.py", "pytorch_model.bin", "weights.pkl", "model.pt", "image.png"):
        (folder / name).write_text("not this")
    return folder


def test_the_files_of_a_model_are_fetched_and_neither_code_nor_pickles(hub, model):
    hub.add("some/model", model)
    found = repos.folder("some/model")
    names = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert names == set(hub.fetched()) == {
        "config.json", "model.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja",
        "adapters/lora/adapter_model.safetensors",
    }  # fmt: skip
    assert (found / "tokenizer.json").read_text() == "tokenizer.json"


def test_what_was_fetched_is_not_fetched_again_and_a_folder_goes_before(hub, model, tmp_path):
    hub.add("some/model", model)
    commit = commit_of(hub.repos["some/model"])
    places = {repos.folder(name) for name in ("some/model", "some/model@main", f"some/model@{commit}")}
    repos._fetched.cache_clear()
    assert places == {repos.folder("some/model")}
    assert len(hub.fetched()) == 6
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert repos.folder("some/model") == tmp_path / "some" / "model"


def test_paths_are_no_repositories(hub, tmp_path):
    for name in ("model", "./some/model", "a/b/c", "../b", str(tmp_path / "no"), "a/b@", "some/model/"):
        assert not repos.folder(name).exists()
    assert not hub.asked


def test_each_refusal_is_one_line_that_says_what_to_do(hub, model):
    hub.add("some/model", model)
    hub.add("some/gated", model)
    hub.gated.add("some/gated")
    for name, words in {
        "some/none": "there is no folder .*some/none, and the repository some/none of http.* does not exist, or is "
        "private; for one of yours run `hf auth login`",
        "some/model@old": "has no such branch, tag or commit",
        "some/gated": "accept them on its page, then run `hf auth login`",
    }.items():
        with pytest.raises(OSError, match=words) as raised:
            repos.folder(name)
        assert "\n" not in str(raised.value)


def test_without_a_network_the_cache_serves(hub, model, monkeypatch):
    from huggingface_hub import constants

    hub.add("some/model", model)
    there = repos.folder("some/model")
    repos._fetched.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert repos.folder("some/model") == there
    with pytest.raises(OSError, match="cannot be reached, and is not in the cache of earlier downloads"):
        repos.folder("some/other")


def test_a_push_makes_the_repository_and_needs_a_token(hub, model, monkeypatch):
    assert repos.push(model, "me/mine", private=True) == f"{hub.url}/me/mine"
    assert hub.private == {"me/mine": True}
    assert hub.repos["me/mine"]["model.safetensors"] == b"model.safetensors"
    repos.push(model, "me/mine")  # again, into the one that is there
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(OSError, match="repository me/other .* refused: .*run `hf auth login`"):
        repos.push(model, "me/other")
    for name in ("mine", "a/b/c", "me/mine@main", "me /mine"):
        with pytest.raises(ValueError, match="is named USER/NAME"):
            repos.check_name(name)
