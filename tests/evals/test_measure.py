import subprocess

import vlmem_jax
from vlmem_jax.evals.measure import version


def test_the_version_names_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path, monkeypatch):
    file = tmp_path / "vlmem_jax" / "__init__.py"
    file.parent.mkdir()
    file.write_text("")
    monkeypatch.setattr("vlmem_jax.__file__", str(file))
    assert version() == vlmem_jax.__version__
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))

    def git(*words):
        words = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert version() == f"{vlmem_jax.__version__} ({commit})"
    file.write_text("changed")
    assert version() == f"{vlmem_jax.__version__} ({commit}, changed)"
