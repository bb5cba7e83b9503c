"""Data in other files than JSONL: told by their first bytes, and made into lines."""

import base64
import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image

from vlmem_jax.cli.main import main
from vlmem_jax.data.convert import convert
from vlmem_jax.data.jsonl import JsonLines, as_record
from vlmem_jax.processing.images import open_image

TURNS = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A dog."}]


def picture(kind="PNG", level=80):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (level, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps([{"conversations": TURNS}]), "is one JSON array; `vlmem data convert "),
        (json.dumps({"conversations": TURNS}, indent=2), "is pretty-printed JSON"),
        ("[\n  {", "is one JSON array"),
        (gzip.compress(b"{}", mtime=0), "is compressed by gzip; `gunzip "),
        (b"PK\x03\x04....", "is a zip archive"),
        (b"PAR1....", "is a parquet file; `vlmem data convert "),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "`git lfs pull` fetches it"),
        ("<!DOCTYPE html><html>not found</html>", "is a web page"),
    ],
)
def test_what_is_no_jsonl_is_named_with_the_command_that_helps(tmp_path, content, what):
    path = tmp_path / "train.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=what):
        JsonLines(str(path))


def test_a_comma_behind_a_line_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"conversations": TURNS}) + ",\n")
    with pytest.raises(ValueError, match=r"train.jsonl:1: .* without a comma behind it"):
        JsonLines(str(tmp_path / "train.jsonl"))[0]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"conversations": TURNS, "image": "a.png"}] * 2),
        json.dumps([{"conversations": TURNS, "image": "a.png"}] * 2, indent=2),
        "".join(json.dumps({"conversations": TURNS, "image": "a.png"}, indent=1) + ",\n" for _ in range(2)),
        "\ufeff" + "".join(json.dumps({"conversations": TURNS, "image": "a.png"}) + "\n" for _ in range(2)),
    ],
)
def test_json_in_any_layout_becomes_lines(tmp_path, content):
    (tmp_path / "in.json").write_text(content, encoding="utf-8")
    assert convert(tmp_path / "in.json", tmp_path / "out.jsonl") == (2, 0, [])
    assert lines(tmp_path / "out.jsonl") == [{"conversations": TURNS, "image": "a.png"}] * 2


def test_the_command_that_a_message_gives_works(tmp_path, capsys):
    (tmp_path / "train.json").write_text(json.dumps([{"conversations": TURNS, "image": "a.png"}]))
    with pytest.raises(ValueError) as error:
        JsonLines(str(tmp_path / "train.json"))
    command = str(error.value).partition("`")[2].partition("`")[0]
    assert main(command.split()[1:]) == 0
    assert "1 lines, 0 images written" in capsys.readouterr().out
    assert JsonLines(str(tmp_path / "train_lines.jsonl"))[0].images == ("a.png",)


def test_alpaca_becomes_a_conversation(tmp_path):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "Ho", "id": 3}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    convert(tmp_path / "in.json", tmp_path / "out.jsonl")
    first, second = lines(tmp_path / "out.jsonl")
    assert [turn["value"] for turn in first["conversations"]] == ["Add.\n1 2", "3"]
    assert second["id"] == 3 and as_record("a:1", second).conversations[1]["value"] == "Ho"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_that_lines_hold_become_files_once(tmp_path, kind):
    text = "data:image/x;base64," + base64.b64encode(picture(kind)).decode()
    parts = [{"type": "image_url", "image_url": {"url": text}}, {"type": "text", "text": "What?"}]
    rows = [
        {"conversations": TURNS, "image": text},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    made = convert(tmp_path / "in.json", tmp_path / "sub" / "out.jsonl")
    assert made == (2, 1, [])
    for line in lines(tmp_path / "sub" / "out.jsonl"):
        [path] = as_record("a:1", line).images
        assert path.startswith("out_images/") and path.endswith({"PNG": ".png", "JPEG": ".jpg"}[kind])
        assert open_image(tmp_path / "sub" / path).size == (6, 4)


def test_parquet_with_images_as_bytes_and_as_paths(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    rows = [
        {"messages": messages, "images": [{"bytes": picture(level=n), "path": None}], "note": None} for n in range(70)
    ]
    rows.append({"messages": messages, "images": [{"bytes": None, "path": "a.png"}], "note": "x"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert convert(tmp_path / "in.parquet", tmp_path / "out.jsonl") == (71, 70, [])
    read = [as_record("a:1", line) for line in lines(tmp_path / "out.jsonl")]
    assert read[-1].images == ("a.png",)
    assert [np.asarray(open_image(tmp_path / one.images[0]))[0, 0, 0] for one in read[:-1]] == list(range(70))


def test_what_cannot_be_used_is_named_or_left_out(tmp_path):
    rows = [{"conversations": TURNS}, {"image": "data:image/png;base64,@@"}, 3, {"image": "data:image/png;base64,aGk="}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="in.json:1: value 2: an image must be base64.*--skip-bad"):
        convert(tmp_path / "in.json", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    made = convert(tmp_path / "in.json", tmp_path / "out.jsonl", skip=True)
    assert made.lines == 1 and [reason.partition("value ")[2][:1] for reason in made.skipped] == ["2", "3", "4"]
    with pytest.raises(ValueError, match="--out must not exist yet"):
        convert(tmp_path / "in.json", tmp_path / "out.jsonl")
    (tmp_path / "broken.json").write_text('[{"a": 1},\n {"b": }]')
    with pytest.raises(ValueError, match="broken.json:2: a value must be JSON"):
        convert(tmp_path / "broken.json", tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="--images must lie in the folder of --out"):
        convert(tmp_path / "in.json", tmp_path / "sub" / "out.jsonl", tmp_path / "images")
