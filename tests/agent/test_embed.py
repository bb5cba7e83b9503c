"""What embedders and re-rankers make of texts."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmem_jax.agent.embed import (
    CosineReranker,
    EncoderEmbedder,
    EncoderReranker,
    LexicalEmbedder,
    LexicalReranker,
    Mark,
    TableEmbedder,
    TableReranker,
    words,
)
from vlmem_jax.agent.schema import Schema, Texts
from vlmem_jax.hub.text_encoder import load_embedder, load_reranker

FIXTURES = Path(__file__).parent.parent / "fixtures" / "text_encoder"
lexical = LexicalEmbedder()


def likeness(one: str, other: str) -> float:
    x_2D = lexical([one, other])
    return float(x_2D[0] @ x_2D[1])


# --- by words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        ("The red mug's handle.", ["the", "red", "mug", "s", "handle"]),
        ("room_7: 12:30", ["room", "7", "12", "30"]),
        ("STRASSE Straße ＲＥＤ", ["strasse", "strasse", "red"]),
        ("Красная кружка", ["красная", "кружка"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("赤いマグ red杯", ["赤", "い", "マ", "グ", "red", "杯"]),
        (" \n—!", []),
    ],
)
def test_words_of_many_scripts(text, found):
    assert words(text) == found


def test_a_word_stands_where_its_hash_says():
    number = int.from_bytes(hashlib.blake2b(b"mug", digest_size=8).digest(), "little")
    [x_D] = lexical(["Mug!"])
    assert x_D.dtype == np.float32 and np.flatnonzero(x_D).tolist() == [number % 1024]
    assert x_D[number % 1024] == (1 if number >> 63 else -1)


def test_vectors_are_the_same_everywhere():
    content = lexical(["the red mug is on the table, the blue one is not", "赤い杯"]).astype("<f4").tobytes()
    assert hashlib.blake2b(content, digest_size=8).hexdigest() == "82a9743f95673a33"
    assert lexical.mark == Mark("lexical", 1024, "c33d398f5dd20b474fef5c4aa32e1f34"), (
        "of the same rules; count RULES up if vectors change"
    )


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=60))
def test_any_text_has_a_vector_of_length_1_or_says_nothing(text):
    length = np.linalg.norm(lexical([text])[0])
    assert length == pytest.approx(1) if len(set(words(text))) == 1 else length == pytest.approx(1) or length == 0


@pytest.mark.parametrize("text", ["", " ...!? ", "🙂"])
def test_a_text_without_words_is_like_nothing(text):
    assert not lexical([text]).any()


def test_no_texts_have_no_vectors():
    assert lexical([]).shape == (0, 1024)


def test_a_long_text_is_a_text():
    [x_D] = lexical(["the red mug is on the table. " * 20_000])
    assert np.linalg.norm(x_D) == pytest.approx(1, abs=1e-6)
    assert likeness("the red mug is on the table. " * 20_000, "a red mug") > 0.5


def test_a_question_is_like_what_it_is_about():
    assert likeness("Where is the red mug?", "red mug") > 0.8
    assert likeness("Where is the red mug?", "blue plate, on the shelf") < 0.2
    assert likeness("где красная кружка?", "красная кружка") > 0.7
    assert likeness("红色的杯子在哪里", "红色的杯子") > 0.7


def test_the_order_of_words_counts():
    text = "red mug, blue plate"
    assert likeness(text, "a red mug and a blue plate") > likeness(text, "a blue mug and a red plate") > 0.5


def test_a_memory_is_asked_without_a_model():
    schema = Schema()
    for episode, text in enumerate(("red mug, on the table", "grey cat, asleep", "the red mug, empty", "a door")):
        schema.add(episode, Texts((text,)), lexical)
    assert len(schema.concepts) == 3, "both mugs are one"
    assert sorted(n for n, _ in schema.search(lexical(["Who moved the red mug?"])[0])) == [0, 2]


def test_rare_words_decide_which_text_bears_on_a_question():
    texts = ["the cup is on the table in the kitchen", "the dog is in the kitchen", "the cat is in the kitchen", ""]
    scores = LexicalReranker()("is the cat in the kitchen?", texts)
    assert scores[2] > scores[1] > 0 and scores[2] > scores[0] and scores[3] == 0
    rare, common, *_ = LexicalReranker()("kitchen dog", ["the dog", "the kitchen", "kitchen wall", "kitchen floor"])
    assert rare > 2 * common
    assert LexicalReranker()("nothing here", texts) == [0.0] * 4 and LexicalReranker()("cat", []) == []


def test_repeating_a_word_adds_less_and_less():
    texts = [" ".join(["cat"] * n + ["wall"] * (8 - n)) for n in (1, 2, 4, 8)] + ["floor " * 8] * 5
    one, two, four, eight, *_ = LexicalReranker()("cat", texts)
    assert one < two < four < eight and two - one > (eight - four)


# --- by encoders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return EncoderEmbedder(load_embedder(FIXTURES / "bert", pooling="mean"))


def test_an_encoder_gives_each_text_a_vector(encoder):
    want = json.loads((FIXTURES / "bert" / "expected.json").read_text())
    found_ND, want_ND = encoder(want["texts"]), np.array([one["mean"] for one in want["alone"]])
    np.testing.assert_allclose(found_ND, want_ND / np.linalg.norm(want_ND, axis=1, keepdims=True), atol=1e-5)
    assert "" in want["texts"] and encoder([]).shape == (0, 16)
    assert encoder.mark == Mark("bert", 16, encoder.model.digest)


def test_an_encoder_re_ranks():
    reranker = EncoderReranker(load_reranker(FIXTURES / "xlm_roberta"))
    want = json.loads((FIXTURES / "xlm_roberta" / "expected.json").read_text())
    scores = reranker(want["query"], want["texts"])
    np.testing.assert_allclose(scores, [one["logits"][0] for one in want["pairs"]], atol=1e-5)
    assert reranker("why", []) == [] and reranker.name == "xlm_roberta"


def test_without_a_re_ranker_vectors_say_what_bears_on_a_question():
    reranker = CosineReranker(lexical)
    scores = reranker("red mug", ["blue plate", "a red mug", ""])
    assert max(scores) == scores[1] > 0.9 and scores[2] == 0
    assert reranker("red mug", []) == [] and reranker.name == "cosine of lexical"


# --- marks ------------------------------------------------------------------------------------------------------------


def test_vectors_of_another_embedder_are_refused(encoder):
    kept = json.loads(json.dumps(lexical.mark._asdict()))
    lexical.mark.check(kept, "store")
    lexical.mark.check(kept | {"name": "words"}, "store")
    with pytest.raises(ValueError, match=r"store holds vectors of the embedder lexical \(1024 numbers, .*build the"):
        encoder.mark.check(kept, "store")
    for other in (kept | {"digest": "0"}, kept | {"dimension": 512}, {}):
        with pytest.raises(ValueError, match="cannot be compared with those of lexical"):
            lexical.mark.check(other, "store")


def test_tables_tell_each_other_apart_and_know_nothing_else():
    one, other = TableEmbedder({"a": [1, 0], "b": [0, 1]}), TableEmbedder({"a": [0, 1], "b": [0, 1]})
    np.testing.assert_array_equal(one(["b", "a"]), [[0, 1], [1, 0]])
    assert one([]).shape == (0, 2) and one.mark != other.mark
    with pytest.raises(ValueError, match="the table has no vector of 'c'"):
        one(["a", "c"])
    with pytest.raises(ValueError, match="vectors of one width"):
        TableEmbedder({"a": [1, 0], "b": [1]})
    reranker = TableReranker({("q", "a"): 2.0})
    assert reranker("q", ["a", "a"]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="no score of 'b' for 'q'"):
        reranker("q", ["a", "b"])
