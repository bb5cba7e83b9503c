"""Encoders of text from Hugging Face folders: BERT and XLM-R, as embedders of texts and as re-rankers.

Read are `config.json`, safetensors and `tokenizer.json`, and what sentence-transformers puts beside them.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vlmem_jax.hub import repos
from vlmem_jax.hub.fit import parameters
from vlmem_jax.hub.safetensors_io import Tensors, digest
from vlmem_jax.models.text_encoder import Pooling, TextEncoderConfig, TextPrograms
from vlmem_jax.paths import is_remote
from vlmem_jax.processing.sequences import SequenceTokenizer
from vlmem_jax.records import Rule, check_fixed, check_needed, ours, section

LONGEST = 512
"""Tokens of a text, at most, where nothing says otherwise."""


class Kind(NamedTuple):
    """What is its own of a kind of encoder."""

    prefix: str
    """Of its tensors, where the folder is of a model with a head."""
    dense: str
    out: str
    """Tensors of the head."""


KINDS = {
    "bert": Kind("bert.", "bert.pooler.dense", "classifier"),
    "xlm-roberta": Kind("roberta.", "classifier.dense", "classifier.out_proj"),
}
"""By `model_type`."""
UNREAD = re.compile(r"(bert\.|roberta\.)?(pooler\.|embeddings\.(position_ids|token_type_ids)$)|cls\.|lm_head\.")
"""Names of tensors that nothing here computes with: heads that predict words, and a pooler that nobody asked for."""
NAMES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
}
"""Our key -> theirs."""
NEEDED = "vocab width layers heads mlp_width positions"
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
MODULES = ("Transformer", "Pooling", "Normalize")
"""Of sentence-transformers: what these do is done here."""


class TextModel(NamedTuple):
    """An encoder that is ready to run."""

    name: str
    """Of its folder."""
    programs: TextPrograms
    tokenizer: SequenceTokenizer
    digest: str
    """Tells its vectors from those of others: of weights, tokenizer and pooling, not of where long texts are cut."""


def load_embedder(
    source: str | os.PathLike,
    dtype: Literal["float32", "bfloat16"] = "float32",
    pooling: Pooling | None = None,
    longest: int | None = None,
) -> TextModel:
    """The encoder of a folder on a disk, or a repository of the hub, as an embedder.

    pooling, longest: by default what sentence-transformers' files in the folder say. Raises ValueError where these do
    not say it or say what is not done here, for another kind of model, and listing tensors that are missing or unknown.
    """
    folder = _folder(source)
    _check_modules(folder)
    return _load(folder, dtype, pooling or _pooling(folder), longest)


def load_reranker(
    source: str | os.PathLike, dtype: Literal["float32", "bfloat16"] = "float32", longest: int | None = None
) -> TextModel:
    """The encoder of a folder with its classification head, which must have one logit; see `load_embedder`."""
    model = _load(_folder(source), dtype, "logits", longest)
    if model.programs.width != 1:
        raise ValueError(f"a re-ranker has one logit, but {source} has {model.programs.width}; take another model")
    return model


def _folder(source: str | os.PathLike) -> Path:
    if is_remote(source):
        raise ValueError(f"the checkpoint of an encoder of text must lie on a disk; got {source}")
    folder = Path(repos.folder(source))
    if not (folder / "config.json").is_file():
        raise ValueError(f"an encoder of text is a folder with config.json; there is no {folder / 'config.json'}")
    return folder


def _load(folder: Path, dtype: str, output: Pooling | Literal["logits"], longest: int | None) -> TextModel:
    content, tensors = _json(folder, "config.json"), Tensors(folder)
    kind = KINDS.get(content.get("model_type", ""))
    if kind is None:
        found = content.get("model_type")
        raise ValueError(f"{folder} must hold an encoder of model_type {' or '.join(KINDS)}, got {found!r}")
    prefix = kind.prefix if f"{kind.prefix}embeddings.word_embeddings.weight" in tensors else ""
    labels = _labels(kind, tensors) if output == "logits" else 0
    config = config_of(content, dtype, labels)
    rules = name_table(config, kind, prefix)

    def dtype_of(path: str) -> str:
        return "float32" if path.endswith(("bias", "scale")) else dtype

    if longest is None:
        stated = _json(folder, "sentence_bert_config.json").get("max_seq_length") or LONGEST
        longest = min(stated, config.longest)
    programs = TextPrograms(config, parameters(rules, tensors, dtype_of, str(folder), UNREAD.match), output, longest)
    path = folder / "tokenizer.json"
    tokenizer = SequenceTokenizer(path, longest, config.types)
    if tokenizer.vocab_size > config.vocab:
        raise ValueError(f"{path} has ids up to {tokenizer.vocab_size - 1}, but the model has {config.vocab} tokens")
    of = repr((digest(tensors), hashlib.blake2b(path.read_bytes()).hexdigest(), output))
    return TextModel(folder.name, programs, tokenizer, hashlib.blake2b(of.encode(), digest_size=16).hexdigest())


def config_of(content: Mapping[str, Any], dtype: str, labels: int) -> TextEncoderConfig:
    """What config.json says. Raises ValueError for keys that are missing and models that are not supported."""
    check_fixed(FIXED, content)
    found = ours(NAMES, content)
    check_needed("", NAMES, found, NEEDED)
    first = 1 + content.get("pad_token_id", 1) if content["model_type"] == "xlm-roberta" else 0
    return TextEncoderConfig(**found, first_position=first, labels=labels, compute_dtype=dtype)


def _labels(kind: Kind, tensors: Mapping[str, np.ndarray]) -> int:
    """Logits of the head; where it is missing, as many as there should be."""
    name = f"{kind.out}.weight"
    return tensors[name].shape[0] if name in tensors else 1


def name_table(config: TextEncoderConfig, kind: Kind, prefix: str) -> list[Rule]:
    """Every leaf of the parameters and the tensors it comes from."""
    sizes = {"V": config.vocab, "D": config.width, "E": config.width, "F": config.mlp_width, "P": config.positions}
    sizes |= {"N": config.types, "H": config.heads, "C": config.width // config.heads, "Y": config.labels}
    tables = [
        ("words", "word_embeddings.weight", "V D -> V D"),
        ("positions", "position_embeddings.weight", "P D -> P D"),
        ("types", "token_type_embeddings.weight", "N D -> N D"),
        *_norm("norm", "LayerNorm"),
    ]
    layer = [row for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")) for row in (
        (f"attn/{ours}/kernel", f"attention.self.{theirs}.weight", "(H C) D -> D H C"),
        (f"attn/{ours}/bias", f"attention.self.{theirs}.bias", "(H C) -> H C"),
    )]  # fmt: skip
    layer += [
        ("attn/o/kernel", "attention.output.dense.weight", "D (H C) -> H C D"),
        ("attn/o/bias", "attention.output.dense.bias", "D -> D"),
        *_norm("norm1", "attention.output.LayerNorm"),
        *_linear("mlp/fc1", "intermediate.dense", "D", "F"),
        *_linear("mlp/fc2", "output.dense", "F", "D"),
        *_norm("norm2", "output.LayerNorm"),
    ]
    rules = section("", f"{prefix}embeddings.", sizes, tables)
    rules += section("layers/", f"{prefix}encoder.layer.{{}}.", sizes, layer, range(config.layers))
    if config.labels:
        head = [*_linear("dense", kind.dense, "D", "E"), *_linear("out", kind.out, "D", "Y")]
        rules += section("head/", "", sizes, head)
    return rules


def _norm(ours: str, theirs: str) -> list[tuple[str, str, str]]:
    return [(f"{ours}/scale", f"{theirs}.weight", "D -> D"), (f"{ours}/bias", f"{theirs}.bias", "D -> D")]


def _linear(ours: str, theirs: str, inputs: str, outputs: str) -> list[tuple[str, str, str]]:
    return [(f"{ours}/kernel", f"{theirs}.weight", f"{outputs} {inputs} -> {inputs} {outputs}"),
            (f"{ours}/bias", f"{theirs}.bias", f"{outputs} -> {outputs}")]  # fmt: skip


# --- sentence-transformers --------------------------------------------------------------------------------------------


def _check_modules(folder: Path) -> None:
    named = [str(one.get("type", "")).rpartition(".")[2] for one in _json(folder, "modules.json", list)]
    if others := [name for name in named if name not in MODULES]:
        raise ValueError(f"{folder / 'modules.json'} may name {', '.join(MODULES)}; it has {', '.join(others)} too")


def _pooling(folder: Path) -> Pooling:
    """What stands for a text, as the folder says: by a name, or by flags such as pooling_mode_mean_tokens."""
    content = _json(folder, "1_Pooling/config.json")
    flags = [re.sub(r"pooling_mode_|_tokens?$", "", key) for key, value in content.items() if value is True]
    said = [content["pooling_mode"]] if "pooling_mode" in content else [f for f in flags if f != "include_prompt"]
    if said not in (["cls"], ["mean"]):
        what = f"says {' and '.join(map(str, said))}" if said else "does not say which"
        raise ValueError(
            f"the first token of a text, or the mean of all, must stand for it, but {folder / '1_Pooling/config.json'} "
            f"{what}; set pooling to cls or mean"
        )
    return said[0]


def _json(folder: Path, name: str, kind: type = dict) -> Any:
    """What a file holds; empty if it is not there."""
    path = folder / name
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a JSON {'list' if kind is list else 'object'}")
    return content
