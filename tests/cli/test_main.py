import os
import subprocess
import sys
import textwrap
import types

import pytest

from vlmem_jax.cli import main as cli
from vlmem_jax.cli.flags import add_config, split
from vlmem_jax.config import ConfigError


def vlmem(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "vlmem_jax", *words], capture_output=True, text=True)


@pytest.fixture
def command(monkeypatch):
    """Makes `vlmem fake` run a function, with `--size` and an experiment to read."""

    def install(run, reads_experiment=True, default=None):
        def add_arguments(parser):
            parser.add_argument("--size", type=int, default=1)
            parser.add_argument("--prompt")
            if reads_experiment:
                add_config(parser, default)

        module = types.ModuleType("vlmem_jax.cli.fake", "Does nothing.")
        module.EXAMPLE, module.add_arguments, module.run = "vlmem fake --size 3", add_arguments, run
        monkeypatch.setitem(sys.modules, "vlmem_jax.cli.fake", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", "do nothing")

    return install


@pytest.fixture
def experiment(tmp_path) -> str:
    path = tmp_path / "experiment.py"
    text = """
        from ml_collections import ConfigDict
        def get_config(profile=None):
            stages = [{"name": "pretrain", "steps": 1}]
            return ConfigDict({"seed": 0, "profile": profile, "stages": stages})
        """
    path.write_text(textwrap.dedent(text))
    return str(path)


# the line


@pytest.mark.parametrize(
    "words",
    [
        "--config {} --config.seed=3 fake --size 2",
        "fake --config {} --size 2 --config.seed 3",
        "fake --size=2 --config.seed=1 --config.seed=3 --config={}",
        "--traceback fake --config.seed=3 --size 2 --config {}",
    ],
)
def test_the_experiment_may_stand_anywhere(command, experiment, words):
    seen = []
    command(lambda args: seen.append(args) or 0)
    assert cli.main(words.format(experiment).split()) == 0
    assert seen[0].experiment.seed == 3
    assert seen[0].size == 2
    assert seen[0].config == experiment
    assert seen[0].overrides == {"seed": "3"}


def test_profiles_and_stages_by_name_reach_the_experiment(command, experiment):
    seen = []
    command(lambda args: seen.append(args.experiment) or 0)
    assert cli.main(["fake", f"--config={experiment}:small", "--config.stages.pretrain.steps=9"]) == 0
    assert seen[0].profile == "small"
    assert seen[0].stages[0]["steps"] == 9


def test_a_command_may_bring_its_own_experiment(command, experiment):
    seen = []
    command(lambda args: seen.append(args.experiment) or 0, default=experiment)
    assert cli.main(["fake", "--config.seed=-1"]) == 0
    assert seen[0].seed == -1


def test_the_exit_code_is_the_command_s(command, experiment):
    command(lambda args: 7, default=experiment)
    assert cli.main(["fake"]) == 7


@pytest.mark.parametrize("words", [["--config"], ["--config.seed"], ["--config.seed", "--size", "2"]])
def test_an_option_without_its_value_is_an_error(words):
    with pytest.raises(ConfigError, match=f"{words[0]} needs a value"):
        split(words)


def test_what_follows_a_bare_double_dash_is_left_alone():
    line = split(["generate", "--", "--config.seed=3"])
    assert line.arguments == ["generate", "--", "--config.seed=3"]
    assert line.overrides == {}


# errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("image.size must be positive; got -1"), "error: image.size must be positive; got -1\n"),
        (ConfigError("unknown key config.x"), "error: unknown key config.x\n"),
        (FileNotFoundError(2, "No such file or directory", "a.jpg"), "error: No such file or directory: a.jpg\n"),
        (OSError("disk full"), "error: disk full\n"),
        (
            ModuleNotFoundError("No module named 'av'", name="av"),
            "error: this needs the package av; install it with: pip install 'vlmem_jax[video]'\n",
        ),
        (ModuleNotFoundError("videos need PyAV"), "error: videos need PyAV\n"),
    ],
)
def test_what_the_user_can_mend_is_one_plain_line(command, experiment, capsys, error, expected):
    def run(args):
        raise error

    command(run, default=experiment)
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == expected
    assert cli.main(["fake", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError("bug"), ModuleNotFoundError("No module named 'bug'", name="bug")])
def test_faults_of_the_program_keep_their_traceback(command, experiment, error):
    def run(args):
        raise error

    command(run, default=experiment)
    with pytest.raises(type(error), match="bug"):
        cli.main(["fake"])


def test_ctrl_c_exits_as_a_shell_expects(command, experiment, capsys):
    def run(args):
        raise KeyboardInterrupt

    command(run, default=experiment)
    assert cli.main(["fake"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_overrides_of_a_command_without_experiment_are_refused(command, capsys):
    command(lambda args: 0, reads_experiment=False)
    assert cli.main(["fake", "--config.seed=3"]) == 2
    assert "reads no experiment; drop --config.seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: <command>"),
        (["trian"], "invalid choice: 'trian'"),
        (["fake", "--siz", "3"], "unrecognized arguments: --siz 3"),
        (["fake"], "required: --config"),
    ],
)
def test_usage_errors_exit_2(command, experiment, capsys, words, expected):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as caught:
        cli.main(words + ([f"--config={experiment}"] if "--siz" in words else []))
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


# the installed command


def test_help_lists_every_command_and_does_not_load_jax():
    code = """
import sys
from vlmem_jax.cli.main import main
try:
    main(["--help"])
finally:
    assert "jax" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in shown.stdout


def test_every_command_loads_alone_and_shows_an_example():
    # what takes long to load is shared; of our own modules, each command finds none there
    code = """
import os, sys
import flax.nnx, grain, jax, orbax.checkpoint, tokenizers
from vlmem_jax.cli.main import COMMANDS, main
assert not any(name.startswith("vlmem_jax.train") for name in sys.modules)
for name in COMMANDS:
    if not os.fork():
        main([name, "--help"])
    assert os.wait()[1] == 0, name
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for name in cli.COMMANDS:
        assert f"example:\n  vlmem {name}" in shown.stdout


def test_bad_keys_end_with_one_line_and_code_2(experiment, tmp_path):
    done = vlmem(
        "train", "--config", experiment, "--workdir", str(tmp_path / "run"), "--config.stages.pretrian.steps=3"
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: config.stages.pretrian: no element of config.stages has this name; "
        "did you mean config.stages.pretrain?\n"
    )


def test_version():
    assert vlmem("--version").stdout.startswith("vlmem 0.")


def test_the_console_script_is_installed():
    script = os.path.join(os.path.dirname(sys.executable), "vlmem")
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith("vlmem 0.")
