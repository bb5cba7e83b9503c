"""What all launchers share: options, errors, dry runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.stage import CONFIG, PLACES, ROOT, SCRIPTS, TRAIN, WORDS


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", PLACES)
def test_help_shows_options_and_an_example(script, stage):
    status, out, _ = stage.run(script, "--help")
    assert status == 0
    for word in ("example:", "--dry-run", "--max-restarts", "--config configs/"):
        assert word in out


@pytest.mark.parametrize("script", PLACES)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --config, the experiment"),
        (["--config", CONFIG], "needs --workdir, the folder of checkpoints"),
        (["--config", "configs/mine.py", "--workdir", "runs"], "there is no file configs/mine.py"),
        ([*TRAIN, "--max-restart", "2"], "there is no option --max-restart"),
        ([*TRAIN, "--max-restarts", "two"], "--max-restarts must be a whole number of at least 0, got 'two'"),
        ([*TRAIN, "--config.seed", "--dry-run"], "--config.seed needs a value"),
        ([*TRAIN, "--dry-run=yes"], "--dry-run takes no value"),
        ([*TRAIN, "train.jsonl"], "expected an option, got 'train.jsonl'"),
    ],
)
def test_a_bad_line_gives_a_plain_error(script, words, message, stage):
    status, out, err = stage.run(script, *PLACES[script], *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("tpu_vm.sh", ["--zone", "z", *TRAIN], "needs --name"),
        ("tpu_vm.sh", ["--name", "mine", *TRAIN], "needs --zone"),
        ("tpu_vm.sh", ["--name", "mine", "--zone", "z", *TRAIN], "needs --type"),
        (
            "tpu_vm.sh",
            [*PLACES["tpu_vm.sh"], "--spot", "--reserved", *TRAIN],
            "--spot and --reserved exclude each other",
        ),
        ("tpu_vm.sh", ["--name", "mine", "--zone", "z", "--type", "v4-8", *TRAIN], "needs --runtime-version"),
        ("gke.sh", ["--type", "v5p-128", *TRAIN], "needs --cluster"),
        ("gke.sh", ["--cluster", "tpus", *TRAIN], "needs --type"),
        ("slurm.sh", ["--gpus-per-node", "8", "--processes-per-node", "4", *TRAIN], "must be 1 or --gpus-per-node (8)"),
        ("local_cluster.sh", ["--processes", "0", *TRAIN], "--processes must be a whole number of at least 1, got '0'"),
    ],
)
def test_a_place_that_is_not_complete_gives_a_plain_error(script, words, message, stage):
    status, out, err = stage.run(script, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and message in err


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh"])
def test_a_config_that_would_not_travel_is_an_error(script, stage):
    (stage.root / "configs" / "mine.py").touch()
    status, _, err = stage.run(script, *PLACES[script], "--config", "configs/mine.py", "--workdir", "gs://b/run")
    assert status == 2
    assert "git does not know it; run: git add configs/mine.py" in err


@pytest.mark.parametrize(("script", "tool"), [("tpu_vm.sh", "gcloud"), ("gke.sh", "xpk"), ("slurm.sh", "sbatch")])
def test_a_tool_that_is_missing_is_named(script, tool, stage):
    (stage.bin / tool).unlink()
    stage.environment["PATH"] = str(stage.bin)
    for name in ("env", "bash", "dirname", "git", "mktemp", "mkdir"):
        (stage.bin / name).symlink_to(shutil.which(name))
    status, _, err = stage.run(script, *PLACES[script], *TRAIN)
    assert status == 2
    assert f"error: {tool} is not installed" in err


def found_in(text: str) -> list[list[str]]:
    """The words of each `vlmem train` in a dry run's output, at whatever depth of quoting it stands."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        for command in ("vlmem train", "worker.sh follow", "worker.sh pod"):
            first, second = command.split()
            for at in range(len(words) - 1):
                if words[at].endswith(first) and words[at + 1] == second:
                    found.append([word for word in words[at + 2 :] if word != "--multihost"])
        found += [words for word in words if " " in word and word != line for words in found_in(word)]
    return found


@pytest.mark.parametrize("script", PLACES)
def test_a_dry_run_prints_the_very_words_and_runs_nothing(script, stage):
    status, out, _ = stage.run(script, *PLACES[script], "--dry-run", *TRAIN, "--", "--new-option", "a b")
    assert status == 0
    trainings = found_in(out)
    assert len(trainings) == (2 if script == "local_cluster.sh" else 1), out
    for words in trainings:
        assert words[: len(WORDS) + 2] == [*WORDS, "--new-option", "a b"]
    for tool in ("gcloud", "xpk", "sbatch", "srun", "vlmem"):
        assert stage.calls(tool) == []
