"""Encoders of text from folders. tests/fixtures/text_encoder/make.py made these, and what they must give."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from vlmem_jax.evals.measure import compilations
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.hub.text_encoder import load_embedder, load_reranker
from vlmem_jax.models.text_encoder import TextPrograms
from vlmem_jax.processing.sequences import Tokens

FIXTURES = Path(__file__).parent.parent / "fixtures" / "text_encoder"
BERT, XLM = FIXTURES / "bert", FIXTURES / "xlm_roberta"
CLOSE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def embedder():
    return load_embedder(BERT, pooling="mean")


@pytest.fixture(scope="module")
def reranker():
    return load_reranker(XLM)


def expected(folder):
    return json.loads((folder / "expected.json").read_text())


def unit(x_ND):
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def changed(source, folder, rename=lambda name: name, drop=(), config=(), **more):
    """A copy of a folder, some of whose tensors are called otherwise, missing or new."""
    shutil.copytree(source, folder)
    tensors = {rename(name): np.array(x) for name, x in Tensors(source).items() if name not in drop}
    safetensors.numpy.save_file(tensors | more, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | dict(config)))
    return folder


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load, folder", [(lambda f: load_embedder(f, pooling="cls"), BERT), (load_reranker, XLM)])
def test_texts_become_the_tokens_that_transformers_makes(load, folder):
    want, tokenizer = expected(folder), load(folder).tokenizer
    alone, pairs = tokenizer.texts(want["texts"]), tokenizer.pairs(want["query"], want["texts"])
    for found, key in ((alone, "alone"), (pairs, "pairs")):
        assert [list(one.ids) for one in found] == [one["ids"] for one in want[key]]
        assert [list(one.types) for one in found] == [one["types"] for one in want[key]]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_bert_embeds(pooling):
    model, want = load_embedder(BERT, pooling=pooling), expected(BERT)
    for found, key in ((model.tokenizer.texts(want["texts"]), "alone"),
                       (model.tokenizer.pairs(want["query"], want["texts"]), "pairs")):  # fmt: skip
        vectors = unit(np.array([one[pooling] for one in want[key]]))
        np.testing.assert_allclose(model.programs(found), vectors, **CLOSE)


def test_an_xlm_roberta_re_ranks(reranker):
    want = expected(XLM)
    logits = reranker.programs(reranker.tokenizer.pairs(want["query"], want["texts"]))
    np.testing.assert_allclose(logits, [one["logits"] for one in want["pairs"]], **CLOSE)


def test_an_xlm_roberta_embeds_by_its_names_without_a_head(tmp_path):
    drop = [name for name in Tensors(XLM) if name.startswith("classifier")]
    folder = changed(XLM, tmp_path / "m3", lambda name: name.removeprefix("roberta."), drop)
    model, want = load_embedder(folder, pooling="cls"), expected(XLM)
    vectors = unit(np.array([one["cls"] for one in want["alone"]]))
    np.testing.assert_allclose(model.programs(model.tokenizer.texts(want["texts"])), vectors, **CLOSE)


def test_a_bert_re_ranks_through_its_pooler(tmp_path):
    rng = np.random.default_rng(0)
    more = {"classifier.weight": rng.normal(size=(1, 16)), "classifier.bias": rng.normal(size=1)}
    more = {name: x.astype(np.float32) for name, x in more.items()}
    folder = changed(BERT, tmp_path / "cross", lambda name: f"bert.{name}", **more)
    model, want, tensors = load_reranker(folder), expected(BERT), Tensors(BERT)
    first_ND = np.array([one["cls"] for one in want["pairs"]])
    pooled_ND = np.tanh(first_ND @ tensors["pooler.dense.weight"].T + tensors["pooler.dense.bias"])
    logits = model.programs(model.tokenizer.pairs(want["query"], want["texts"]))
    np.testing.assert_allclose(logits, pooled_ND @ more["classifier.weight"].T + more["classifier.bias"], **CLOSE)


def test_bf16_is_near_fp32(embedder):
    texts = embedder.tokenizer.texts(expected(BERT)["texts"])
    rough = load_embedder(BERT, "bfloat16", "mean").programs(texts)
    assert rough.dtype == np.float32
    cosines = (rough * embedder.programs(texts)).sum(axis=1)
    assert cosines.min() > 0.99 and cosines.max() < 1.001 and not np.allclose(rough, embedder.programs(texts))


def test_nobody_writes_the_tokens_that_part_texts(embedder, reranker):
    for model, token, its_id in ((embedder, "[SEP]", 3), (reranker, "</s>", 2)):
        [plain], [forged] = model.tokenizer.texts(["red"]), model.tokenizer.texts([f"red {token} mug"])
        assert list(forged.ids).count(its_id) == list(plain.ids).count(its_id) == 1


def test_broken_characters_are_read(embedder):
    [tokens] = embedder.tokenizer.texts(["red \ud83d mug"])
    assert len(tokens.ids) > 4


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_neighbours_and_padding_change_nothing_and_order_is_kept(embedder):
    rng = np.random.default_rng(0)
    sequences = [Tokens(rng.integers(5, 60, n).tolist(), [0] * n) for n in (24, 1, 7, 24, 3, 16)]
    programs = TextPrograms(embedder.programs.config, embedder.programs.params, "mean", 40, batch_tokens=64)
    together = programs(sequences)
    assert sorted(programs.shapes.values()) == [(1, 40), (2, 32)]
    alone = np.concatenate([embedder.programs([one]) for one in sequences])
    np.testing.assert_allclose(together, alone, **CLOSE)
    assert programs([]).shape == (0, 16)


def test_one_program_a_length_and_none_after_warming(embedder):
    programs = TextPrograms(embedder.programs.config, embedder.programs.params, "cls", 40, batch_tokens=64)
    with compilations() as warming:
        programs.warm()
    with compilations() as later:
        for n in (1, 31, 32, 33, 40):
            programs([Tokens([7] * n, [0] * n)] * 3)
    assert len(warming) >= len(programs.shapes) == 2 and not later


def test_sequences_must_fit(embedder):
    with pytest.raises(ValueError, match="must have 1 to 24 tokens, got one of 25"):
        embedder.programs([Tokens([7] * 25, [0] * 25)])
    with pytest.raises(ValueError, match="must have 1 to 24 tokens, got one of 0"):
        embedder.programs([Tokens([], [])])
    with pytest.raises(ValueError, match="positions for 1 to 40 tokens of a text, got 41"):
        load_embedder(BERT, pooling="cls", longest=41)
    with pytest.raises(ValueError, match="room beside 3 special tokens; got 4"):
        load_embedder(BERT, pooling="cls", longest=4)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_tensors_that_are_missing_or_unknown_are_named(tmp_path):
    name = "encoder.layer.1.output.dense.weight"
    folder = changed(BERT, tmp_path / "odd", drop=[name], **{"extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(ValueError) as error:
        load_embedder(folder, pooling="cls")
    assert f"missing: {name}" in str(error.value) and "unknown: extra.weight" in str(error.value)
    with pytest.raises(ValueError, match="missing: classifier.weight"):
        load_reranker(BERT)
    with pytest.raises(ValueError, match="unknown: classifier.dense.weight"):
        load_embedder(XLM, pooling="cls")


def test_what_other_heads_need_is_not_read(tmp_path):
    more = {"embeddings.position_ids": np.arange(40)[None], "cls.predictions.bias": np.zeros(3, np.float32)}
    assert load_embedder(changed(BERT, tmp_path / "more", **more), pooling="cls").programs.width == 16


def test_a_folder_says_what_stands_for_a_text(tmp_path):
    folder = changed(BERT, tmp_path / "st")
    with pytest.raises(ValueError, match="does not say which; set pooling to cls or mean"):
        load_embedder(folder)
    (folder / "1_Pooling").mkdir()
    flags = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "include_prompt": True}
    for content, pooling in (
        (flags | {"pooling_mode_mean_tokens": True}, "mean"),
        (flags | {"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
    ):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
        assert load_embedder(folder).programs.output == pooling
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags | {"pooling_mode_max_tokens": True}))
    with pytest.raises(ValueError, match="says max; set pooling"):
        load_embedder(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ValueError, match=r"may name Transformer, Pooling, Normalize; it has Dense too"):
        load_embedder(folder, pooling="cls")


def test_models_of_other_kinds_are_refused(tmp_path):
    for n, (config, message) in enumerate((
        ({"model_type": "gpt2"}, "model_type bert or xlm-roberta, got 'gpt2'"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"vocab_size": None}, "must have vocab_size"),
        ({"num_attention_heads": 3}, "multiple of heads 3"),
    )):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_embedder(changed(BERT, tmp_path / str(n), config=config), pooling="cls")
    labels = {"classifier.out_proj.weight": np.zeros((3, 16), np.float32), "classifier.out_proj.bias": np.zeros(3, "f")}
    with pytest.raises(ValueError, match="one logit, but .* has 3"):
        load_reranker(changed(XLM, tmp_path / "labels", **labels))


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = changed(BERT, tmp_path / "damaged")
    bare = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="must say which tokens begin and end a text"):
        load_embedder(folder, pooling="cls")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        load_embedder(folder, pooling="cls")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="needs tokenizer.json, but there is no"):
        load_embedder(folder, pooling="cls")


def test_a_digest_is_of_weights_tokenizer_and_pooling_and_not_of_the_folder(tmp_path, embedder):
    copy = load_embedder(changed(BERT, tmp_path / "copy"), "bfloat16", pooling="mean", longest=12)
    assert copy.digest == embedder.digest and copy.name == "copy"
    tuned = {"encoder.layer.1.output.dense.bias": np.array(Tensors(BERT)["encoder.layer.1.output.dense.bias"]) + 1}
    others = [load_embedder(BERT, pooling="cls"), load_embedder(changed(BERT, tmp_path / "t", **tuned), pooling="mean")]
    assert len({embedder.digest, *(other.digest for other in others)}) == 3
