"""The script of all checks, with stand-ins for the checks."""

import subprocess

import pytest

XDIST = ["-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
QUICK = [*XDIST, "-m", "not slow", "--seconds=75"]
FILES = [
    "vlmem_jax/train/loop.py",
    "vlmem_jax/train/step.py",
    "configs/tiny/comemo.py",
    "tests/test_configs.py",
    "tests/train/test_loop.py",
    "tests/train/test_cluster.py",
    "tests/rl/test_loss.py",
    "tests/rl/world.py",
]


@pytest.fixture
def checks(stage):
    """The stage with a repository of FILES on its branch main."""
    stage.install("test")
    for tool in ("ruff", "lint-imports", "pytest"):
        stage.tool(tool, "exit ${STATUS-0}" if tool == "pytest" else "")
    (stage.root / ".gitignore").write_text(".venv/\n")
    for file in FILES:
        (stage.root / file).parent.mkdir(parents=True, exist_ok=True)
        (stage.root / file).touch()
    git(stage, "add -A", "-c user.name=a -c user.email=b commit -qm all", "branch -M main")
    return stage


def git(stage, *commands):
    for command in commands:
        subprocess.run(f"git {command}", shell=True, cwd=stage.root, check=True, capture_output=True)


def quick(stage, *words):
    """The tests that ran."""
    assert stage.run("test.sh", "--quick", *words)[0] == 0
    [line] = stage.calls("pytest")
    assert line[: len(QUICK)] == QUICK
    return line[len(QUICK) :]


def test_all_checks_run_and_more_words_go_to_pytest(checks):
    assert checks.run("test.sh", "-k", "a b")[0] == 0
    assert checks.calls("ruff") == [["check", "."], ["format", "--check", "."]]
    assert len(checks.calls("lint-imports")) == 1
    assert checks.calls("pytest") == [[*XDIST, "-k", "a b"]]


def test_a_check_that_fails_is_the_status(checks):
    checks.environment["STATUS"] = "1"
    assert checks.run("test.sh")[0] == 1
    (checks.root / "vlmem_jax/train/loop.py").write_text("changed")
    assert checks.run("test.sh", "--quick")[0] == 1
    checks.environment["STATUS"] = "5"  # all that is near is slow
    assert checks.run("test.sh", "--quick")[0] == 0


def test_a_changed_file_brings_its_own_test_and_then_those_of_its_folder(checks):
    (checks.root / "vlmem_jax/train/loop.py").write_text("changed")
    assert quick(checks, "-x") == ["tests/train/test_loop.py", "tests/train/test_cluster.py", "-x"]


def test_what_is_committed_on_a_branch_and_what_is_new_count(checks):
    git(checks, "checkout -qb mine", "mv tests/rl/world.py tests/rl/own.py")
    git(checks, "-c user.name=a -c user.email=b commit -qm mine")
    (checks.root / "tests/rl/test_rows.py").touch()
    assert quick(checks) == ["tests/rl/test_rows.py", "tests/rl/test_loss.py"]


def test_a_folder_may_have_one_test(checks):
    (checks.root / "configs/tiny/comemo.py").write_text("changed")
    assert quick(checks) == ["tests/test_configs.py"]


def test_nothing_near_is_no_failure(checks):
    (checks.root / "benchmarks").mkdir()
    (checks.root / "benchmarks" / "cpu.py").touch()
    status, out, _ = checks.run("test.sh", "--quick")
    assert status == 0 and "no test is near what has changed" in out and checks.calls("pytest") == []


def test_help_shows_an_example(checks):
    status, out, _ = checks.run("test.sh", "--help")
    assert status == 0 and "example:\n  launch/test.sh --quick" in out and checks.calls("ruff") == []
