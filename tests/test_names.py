"""The model, the hub, training and the commands know doors and kinds, never a memory or a family by name."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlmem_jax"
CONFIG_FILES = re.compile(r"configs/\S+")
"""Names of files that examples read."""


ASKED = r"isinstance\([^)]*\b(VisionConfig|QwenViTConfig|InternViT|QwenViT)\b|\b(vision|image|tower)\.kind (==|!=|in) "


def hits(pattern: str, allowed: tuple[str, ...]) -> list[str]:
    """`file:line: text` of each line of the package that matches, outside `allowed` folders and files."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if not name.startswith(allowed):
            lines = enumerate(file.read_text().splitlines(), 1)
            found += [f"{name}:{n}: {line}" for n, line in lines if re.search(pattern, CONFIG_FILES.sub("", line))]
    return found


def test_memories_are_named_where_they_are_kept():
    allowed = ("memory/", "families/", "agent/", "demo/", "rl/plays/")
    assert hits("comemo|vismem|vlm2|mm_mem", allowed) == []


def test_families_are_named_where_they_are_kept():
    assert hits("intern_vit|qwen_vit|internvl|qwen2_5|qwen3", ("vision/", "families/", "demo/")) == []


def test_nothing_asks_what_kind_a_tower_is():
    assert hits(ASKED, ("vision/__init__.py", "processing/__init__.py")) == []


@pytest.mark.parametrize(
    "line", ["if config.memory == 'comemo':", "isinstance(c, QwenViTConfig)", "vision.kind == 'a'"]
)
def test_such_lines_are_found(tmp_path, monkeypatch, line):
    (tmp_path / "new.py").write_text(f"one\n{line}\n")
    monkeypatch.setattr("tests.test_names.PACKAGE", tmp_path)
    assert hits(f"comemo|{ASKED}", ()) == [f"new.py:2: {line}"]
