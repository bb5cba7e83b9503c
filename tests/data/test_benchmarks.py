"""Questions of benchmarks about space, in the files that they are released in."""

import json

import pytest

from tests import patches_world
from vlmem_jax.data import Prompts, SourceConfig
from vlmem_jax.processing import PatchConfig, Tokenizer, make_processor
from vlmem_jax.types import PatchGeometry

COUNT = {
    "id": 3, "dataset": "arkitscenes", "scene_name": "41069025", "question_type": "object_counting",
    "question": "How many table(s) are in this room?", "ground_truth": "4", "options": None,
}  # fmt: skip
DIRECTION = {
    "id": 5, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": "object_rel_direction_easy",
    "question": "Is the table to the left?", "ground_truth": "B", "options": ["A. left", "B. right"],
}  # fmt: skip
MOVED = {
    "id": 1, "video_path": "scannet/videos/scene0011_00.mp4", "question_type": "camera_movement_direction",
    "question": "Where does the camera go?", "options": ["A. Left", "B. Forward"], "ground_truth": "Forward",
    "mc_answer": "B",
}  # fmt: skip
SCANQA = {
    "scene_id": "scene0015_00", "question_id": "val-scene0015-0", "question": "What color is the chair?",
    "object_ids": [8], "object_names": ["chair"], "answers": ["dark brown", "brown"],
}  # fmt: skip
SQA = {
    "scene_id": "scene0050_00", "question_id": 220602000002, "situation": "I am standing by the ottoman.",
    "alternative_situation": ["I stood up."], "question": "What instrument in front of me is ebony and ivory?",
}  # fmt: skip
ASKED = SQA | {"answers": ["piano"]}
ANNOTATION = {
    "scene_id": "scene0050_00", "question_id": 220602000002, "question_type": "N/A",
    "answers": [{"answer": "piano", "answer_confidence": "yes", "answer_id": 1}],
}  # fmt: skip


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = Tokenizer.load(patches_world.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return make_processor(tokenizer, PatchConfig(min_pixels=64), PatchGeometry(4, 2, 2, 2, 2.0), None, "qwen2-vl")


@pytest.fixture
def read(tmp_path, processor):
    """Prompts of a file that holds this."""

    def make(benchmark, content, name="test.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return Prompts([SourceConfig(str(path))], processor, benchmark)

    return make


def test_a_number_of_vsi_bench(read):
    prompt = read("vsibench", [COUNT])[0, 0]
    assert prompt.text == (
        "These are frames of a video.\nHow many table(s) are in this room?\n"
        "Please answer the question using a single word or phrase."
    )
    assert (prompt.id, prompt.source, prompt.answers) == ("3", "object_counting", ("4",))
    assert prompt.answer_type == "number" and prompt.videos[0].path == "arkitscenes/41069025.mp4"


def test_a_choice_of_vsi_bench(read):
    prompt = read("vsibench", [DIRECTION])[0, 0]
    assert prompt.text == (
        "These are frames of a video.\nIs the table to the left?\nOptions:\nA. left\nB. right\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert (prompt.source, prompt.answers, prompt.answer_type) == ("object_rel_direction_easy", ("B",), "choice")


def test_vsti_bench_has_paths_of_videos_and_letters_of_its_own(read):
    distance = MOVED | {"question_type": "camera_displacement", "ground_truth": 1.2, "mc_answer": None}
    choice, number = (read("vstibench", [MOVED, distance])[0, n] for n in range(2))
    assert (choice.videos[0].path, choice.answers) == ("scannet/videos/scene0011_00.mp4", ("B",))
    assert "Options:\nA. Left\nB. Forward\n" in choice.text and choice.answer_type == "choice"
    assert (number.answers, number.answer_type) == (("1.2",), "number") and "Options" not in number.text


def test_json_jsonl_and_parquet_are_the_same(read, tmp_path, processor):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([COUNT, DIRECTION]), tmp_path / "test.parquet")
    files = [
        read("vsibench", [COUNT, DIRECTION]),
        read("vsibench", "".join(json.dumps(one) + "\n" for one in (COUNT, DIRECTION)), "test.jsonl"),
        Prompts([SourceConfig(str(tmp_path / "test.parquet"))], processor, "vsibench"),
    ]
    for prompts in files:
        assert prompts.counts == [2]
        found = [(one.text, one.id, one.answers, one.videos) for one in (prompts[0, 0], prompts[0, 1])]
        assert found == [(one.text, one.id, one.answers, one.videos) for one in (files[0][0, 0], files[0][0, 1])]
    names = [prompts.name((0, 1)).rpartition("/")[2] for prompts in files]
    assert names == ["test.json:1: value 2", "test.jsonl:2: value 2", "test.parquet: row 2"]


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What color is the chair?", "color"),
        ("What is the color of the chair?", "color"),
        ("What kind of chair is it?", "object nature"),
        ("Where is the chair?", "place"),
        ("How many chairs are there?", "number"),
        ("What is next to the chair?", "object"),
        ("What isle is it?", "other"),
        ("On what side is it?", "other"),
    ],
)
def test_scanqa_by_the_first_words_of_its_questions(read, question, kind):
    prompt = read("scanqa", [SCANQA | {"question": question}])[0, 0]
    assert prompt.source == kind and prompt.text.split("\n")[1] == question
    assert prompt.answers == ("dark brown", "brown") and prompt.videos[0].path == "scene0015_00.mp4"


def test_scanqa_without_answers_can_be_asked(read):
    prompt = read("scanqa", [{key: SCANQA[key] for key in ("scene_id", "question_id", "question")}])[0, 0]
    assert prompt.answers == () and prompt.id == "val-scene0015-0"


def test_sqa3d_has_its_answers_in_a_file_beside(read, tmp_path):
    name = "v1_balanced_questions_test_scannetv2.json"
    with pytest.raises(ValueError, match="questions without answers.*sqa_annotations in place of questions"):
        read("sqa3d", {"info": {}, "questions": [SQA]}, name)
    beside = tmp_path / "v1_balanced_sqa_annotations_test_scannetv2.json"
    beside.write_text(json.dumps({"annotations": [ANNOTATION]}))
    prompts = read("sqa3d", {"info": {}, "questions": [SQA, SQA | {"question_id": 7}]}, name)
    prompt, before = prompts[0, 0], prompts.files[0].digest
    assert prompt.text.split("\n")[1] == (
        "I am standing by the ottoman. What instrument in front of me is ebony and ivory?"
    )
    assert (prompt.id, prompt.source, prompt.answers) == ("220602000002", "what", ("piano",))
    assert prompt.videos[0].path == "scene0050_00.mp4" and prompts.name((0, 0)).endswith(f"{name}: question 1")
    with pytest.raises(ValueError, match="question 2: `answers` must be a list of texts, got None"):
        prompts[0, 1]
    beside.write_text(json.dumps({"annotations": [ANNOTATION | {"answers": [{"answer": "organ"}]}]}))
    assert read("sqa3d", {"questions": [SQA]}, name).files[0].digest != before
    assert read("sqa3d", [ASKED])[0, 0].answers == ("piano",)


@pytest.mark.parametrize(
    ("benchmark", "line", "changes", "message"),
    [
        ("vsibench", COUNT, {"question_type": "counting"}, "`question_type` must be one of object_counting"),
        ("vsibench", COUNT, {"question_type": "object_rel_direction"}, "`question_type` must be one of"),
        ("vsibench", COUNT, {"ground_truth": "four"}, "`ground_truth` must be a number, got 'four'"),
        ("vsibench", COUNT, {"ground_truth": None}, "`ground_truth` must be a number, got None"),
        ("vsibench", COUNT, {"ground_truth": "nan"}, "`ground_truth` must be a number"),
        ("vsibench", COUNT, {"scene_name": 41069025}, "`scene_name` must be a text, got 41069025"),
        ("vsibench", COUNT, {"question": " "}, "`question` must be a text, got ' '"),
        ("vsibench", DIRECTION, {"options": None}, "`options` must be a list of texts, got None"),
        ("vsibench", DIRECTION, {"ground_truth": "C"}, "`ground_truth` must be the letter of one of .* A, B; got 'C'"),
        ("vstibench", MOVED, {"mc_answer": "Forward"}, "`mc_answer` must be the letter"),
        ("vstibench", MOVED, {"video_path": None}, "`video_path` must be a text"),
        ("scanqa", SCANQA, {"scene_id": None}, "`scene_id` must be a text"),
        ("scanqa", SCANQA, {"answers": "brown"}, "`answers` must be a list of texts, got 'brown'"),
        ("sqa3d", ASKED, {"situation": None}, "`situation` must be a text"),
        ("sqa3d", ASKED, {"answers": [3]}, r"`answers` must be a list of texts, got \[3\]"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(read, benchmark, line, changes, message):
    prompts = read(benchmark, json.dumps([line, line | changes], indent=1))
    assert prompts[0, 0].text
    number = len(json.dumps([line], indent=1).splitlines())
    with pytest.raises(ValueError, match=rf"test.json:{number}: value 2: {message}"):
        prompts[0, 1]


def test_files_that_hold_no_questions(read):
    with pytest.raises(ValueError, match="must have at least one question, but .*test.json has none"):
        read("vsibench", [])
    with pytest.raises(ValueError, match="test.json:1: a value must be JSON"):
        read("vsibench", json.dumps([COUNT])[:-1])
    with pytest.raises(ValueError, match="value 1: a line must be a JSON object, got int"):
        read("vsibench", [1])[0, 0]


def test_the_video_is_shown_before_the_words_and_measured(read, tmp_path, processor):
    patches_world.save_video(tmp_path / "scene0015_00.mp4", frames=12, fps=4)
    sample, [video] = read("scanqa", [SCANQA]).shown((0, 0))
    assert "<|vision_end|>These are frames" in processor.tokenizer.decode(sample.tokens_T, skip_special=False)
    assert video.length == 3.0 and video.frames == 6
