"""Where launchers are tested: a repository of their own, with stand-ins for `vlmem` and for the tools of clouds."""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CONFIG = "configs/tiny/comemo.py"
AWKWARD = 'it\'s "two"  words, $HOME and $(date) \\ *'
TRAIN = ["--config", CONFIG, "--workdir", "gs://bucket/a run", "--config.tokenizer", AWKWARD, "--config.seed=3"]
WORDS = [f"--config={CONFIG}", "--workdir=gs://bucket/a run", f"--config.tokenizer={AWKWARD}", "--config.seed=3"]
"""TRAIN as `vlmem train` gets it."""

PLACES = {
    "local_cluster.sh": [],
    "slurm.sh": [],
    "gke.sh": ["--cluster", "tpus", "--type", "v5p-128"],
    "tpu_vm.sh": ["--name", "mine", "--zone", "us-west4-a", "--type", "v5litepod-16"],
}
"""What a launcher needs besides a training."""

VLMEM = """
me=$(mktemp -u "$RECORDS/vlmem.XXXXXXXX")
printf '%s\\0' "$@" >"$me.words"
env >"$me.env"
trap 'echo TERM >>"$me.signals"; stop=1' TERM
trap 'echo INT >>"$me.signals"; stop=1' INT
echo "step 1"
until mkdir "$RECORDS/lock" 2>/dev/null; do sleep 0.01; done
for file in "$RECORDS"/vlmem.fails "$RECORDS"/vlmem.fails.$(sed -z -n 's/^--process=//p' "$me.words" | tr -d '\\0'); do
    # the first line of the file is the status of this run
    if [ -s "$file" ]; then
        status=$(head -n 1 "$file")
        sed -i 1d "$file"
    fi
done
rmdir "$RECORDS/lock"
[ "${status-0}" = 0 ] || { sleep 0.2 && exit "$status"; }
touch "$me.runs"
while [ -e "$RECORDS/vlmem.waits" ] && [ -z "${stop-}" ]; do sleep 0.05; done
while [ -e "$RECORDS/vlmem.saves" ]; do sleep 0.05; done
echo saved
"""
"""Trains until the file `vlmem.waits` is gone or a signal comes, and saves until `vlmem.saves` is gone; `vlmem.fails`
says with what status it fails."""


class Stage:
    """A repository with the launchers, and a folder of stand-ins that comes first on the path."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.records = folder / "repository", folder / "bin", folder / "records"
        for path in (self.root / "launch", self.root / CONFIG, self.bin, self.records, folder / "home"):
            (path.parent if path.suffix else path).mkdir(parents=True)
        for script in SCRIPTS:
            shutil.copy(script, self.root / "launch")
        shutil.copy(ROOT / "setup.py", self.root)
        (self.root / CONFIG).write_text("# nobody reads this\n")
        subprocess.run("git init -q && git add -A", shell=True, cwd=self.root, check=True)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "RECORDS": str(self.records),
            "PYTHON": sys.executable,
        }
        for tool in ("gcloud", "xpk", "sbatch", "srun", "scancel", "scontrol"):
            self.tool(tool, "exit 1")
        self.tool("vlmem", VLMEM)

    def tool(self, name: str, script: str, folder: Path | None = None) -> None:
        """A stand-in; each of its calls is a line of the file NAME.calls, quoted for a shell."""
        file = (folder or self.bin) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >>"$RECORDS/{name}.calls"\n')
        with file.open("a") as out:
            out.write(f'echo >>"$RECORDS/{name}.calls"\n{script}\n')
        file.chmod(0o755)

    def install(self, extra: str, root: Path | None = None) -> None:
        """Makes `prepare EXTRA` find that it has been there."""
        environment = (root or self.root) / ".venv"
        environment.mkdir(parents=True, exist_ok=True)
        with (ROOT / "setup.py").open() as file:
            stamp = subprocess.run(["cksum"], stdin=file, capture_output=True, check=True).stdout
        (environment / f".installed-{extra}").write_bytes(stamp)

    def start(self, script: str, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.root / "launch" / script, *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words: str) -> tuple[int, str, str]:
        """Status, stdout and stderr."""
        process = self.start(script, *words)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def calls(self, tool: str) -> list[list[str]]:
        file = self.records / f"{tool}.calls"
        return [shlex.split(line) for line in file.read_text().splitlines()] if file.exists() else []

    def trainings(self) -> list[list[str]]:
        """Words that each start of vlmem got, the first word (train) left out."""
        found = [file.read_text().split("\0")[:-1] for file in self.records.glob("vlmem.*.words")]
        assert all(words[0] == "train" for words in found)
        return sorted(words[1:] for words in found)

    def signals(self) -> list[str]:
        """What each training received, one string a training."""
        return [file.read_text() for file in self.records.glob("vlmem.*.signals")]

    def wait_for_trainings(self, count: int) -> None:
        """Until so many trainings are under way."""
        end = time.monotonic() + 20
        while len(list(self.records.glob("vlmem.*.runs"))) < count:
            assert time.monotonic() < end, "no training has begun"
            time.sleep(0.02)
