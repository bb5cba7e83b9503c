import pytest

from vlmem_jax.demo.tokenizer import words, write_tokenizer
from vlmem_jax.processing import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.load(folder)


def spelled(tokenizer, text):
    return [words()[index] for index in tokenizer.encode(text)]


def test_a_question_is_as_many_tokens_as_it_has_numbers(tokenizer):
    text = "In image 2, which digit is at row 3, column 1?"
    assert spelled(tokenizer, text) == ["image2", "row3", "column1"]


def test_control_tokens_are_recognised_and_names_of_speakers_cost_nothing(tokenizer):
    text = "<|im_start|>user\nimage 1: <img><IMG_CONTEXT></img>\n<|im_end|><|im_start|>assistant\n7<|im_end|>"
    expected = "<|im_start|> image1 <img> <IMG_CONTEXT> </img> <|im_end|> <|im_start|> 7 <|im_end|>"
    assert spelled(tokenizer, text) == expected.split()


def test_words_it_does_not_know_are_marked(tokenizer):
    assert spelled(tokenizer, "hello row 9") == ["<unk>", "<unk>"]


def test_answers_come_back_as_they_were(tokenizer):
    assert tokenizer.decode(tokenizer.encode("3 1 4 1")) == "3 1 4 1"


def test_the_vocabulary_fits_the_model():
    assert len(words()) == len(set(words())) < 64
