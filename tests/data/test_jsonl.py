import concurrent.futures

import pytest

from vlmem_jax.data.jsonl import JsonLines

GOOD = '{"conversations": [{"from": "human", "value": "a"}]}'


@pytest.fixture
def lines(tmp_path):
    def read(content):
        path = tmp_path / "train.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return JsonLines(str(path))

    return read


def test_image_is_a_path_a_list_or_absent(lines):
    template = '{"conversations": [{"from": "human", "value": "a"}], "image": %s}\n'
    read = lines(
        GOOD + "\n" + "".join(template % image for image in ('"a.jpg"', '["a.jpg", "b.jpg"]', "null", '""', "[]"))
    )
    assert [record.images for record in read] == [(), ("a.jpg",), ("a.jpg", "b.jpg"), (), (), ()]
    assert all(record.video is None for record in read)


def test_blank_lines_do_not_count_but_names_do_count_them(lines):
    read = lines(f"\n{GOOD}\r\n\n  \n{GOOD}")  # the last line has no newline
    assert len(read) == 2
    assert [record.name.rpartition(":")[2] for record in read] == ["2", "5"]


def test_lines_of_a_file_are_read_from_many_threads(lines):
    content = [f'{{"conversations": [{{"from": "human", "value": "{i:0{1 + i % 7}}"}}]}}' for i in range(500)]
    read = lines("\n".join(content))
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        values = list(executor.map(lambda i: int(read[i].conversations[0]["value"]), range(500)))
    assert values == list(range(500))


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{oops", "must be one JSON object; Expecting property name"),
        ("[1]", "must be a JSON object, got list"),
        ("{}", "`conversations` or `messages` must be a list of messages; this line is empty"),
        ('{"text": 1}', "`conversations` or `messages` must be a list of messages; this line has the keys text"),
        ('{"instruction": "a", "output": "b"}', "`vlmem data convert` makes conversations of them"),
        ('{"conversations": []}', "`conversations` is empty"),
        ('{"conversations": "text"}', "`conversations` must be a list of messages"),
        ('{"conversations": [1], "image": 3}', "`image` must be a path or a list of paths, got 3"),
        ('{"conversations": [1], "image": [null]}', "`image` must be a path or a list of paths"),
        ('{"conversations": [1], "video": 3}', "`video` must be a path"),
        ('{"conversations": [1]}', "but message 1 is 1"),
        ('{"conversations": [{"from": "human", "value": ""}], "image": "a.jpg", "video": "a.mp4"}', "has both"),
        (b"\xff{}", "must be UTF-8"),
        ("[" * 100_000, "train.jsonl:2: "),
    ],
)
def test_a_bad_line_names_file_and_line(lines, line, reason):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(ValueError, match="train.jsonl:2: ") as error:
        lines(GOOD.encode() + b"\n" + line)[1]
    assert reason in str(error.value)


def test_a_file_must_be_there_and_hold_a_line(lines, tmp_path):
    with pytest.raises(ValueError, match="nothing.jsonl does not exist"):
        JsonLines(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match="train.jsonl has no line"):
        lines("\n\n")
