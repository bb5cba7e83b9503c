"""Exports as transformers reads them, and what it says of folders that come."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from tests.hub.test_qwen2_5_vl import hf_folder as golden_folder
from tests.patches_world import save_tokenizer
from vlmem_jax import families
from vlmem_jax.families import PRESETS
from vlmem_jax.hub import library
from vlmem_jax.hub.convert import export_folder, import_folder
from vlmem_jax.processing import chat

hf_folder = golden_folder
"""The fixture of the golden Qwen2.5-VL, in place of that of the folder's conftest."""
QWEN = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen2.5-VL's template writes, of messages without tools."""


@pytest.fixture(scope="module")
def known():
    """The kinds of config.json that transformers has a class for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES


@pytest.mark.parametrize("size", PRESETS)
def test_configs_of_every_size_are_read_as_they_are_meant(size, known):
    model = families.resolve({"preset": size, "memory": None})
    family = families.of_model(model)
    content = family.write_files(model, family.image(), "bfloat16", None)["config.json"]
    before = json.dumps(content)
    assert library.misread(content) == []
    assert json.dumps(content) == before
    if family.tower in ("qwen_vit", "qwen3_vit"):
        assert content["model_type"] in known  # or nothing has been compared


def test_a_config_that_is_refused_or_misread_is_told():
    model = families.resolve({"preset": "tiny_qwen2_5_vl", "memory": None})
    family = families.of_model(model)
    content = family.write_files(model, family.image(), "float32", None)["config.json"]
    rated = {**content, "vision_config": content["vision_config"] | {"tokens_per_second": 2.5}}
    [line] = library.misread(rated)
    assert line.startswith("transformers refuses this config.json: ") and "tokens_per_second" in line
    heads = {**content, "text_config": {"num_key_value_heads": 1}}
    assert any("num_key_value_heads" in line for line in library.misread(heads))
    assert library.misread({"model_type": "no_such_model", "hidden_size": 3}) == []


def test_an_export_is_loaded_by_the_classes_that_others_use(hf_folder, tmp_path):
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    save_tokenizer(hf_folder)
    import_folder(hf_folder, tmp_path / "ours")
    summary = export_folder(tmp_path / "ours", tmp_path / "back")
    assert summary.notes == ()
    theirs, ours = (AutoConfig.from_pretrained(folder) for folder in (hf_folder, tmp_path / "back"))
    for part in ("text_config", "vision_config"):
        came, went = (getattr(config, part).to_dict() for config in (theirs, ours))
        assert {key: went[key] for key in came} == came
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    text = "<|im_start|>user\nWhat is it?<|im_end|>"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(hf_folder)(text)["input_ids"]
    images = AutoImageProcessor.from_pretrained(tmp_path / "back", backend="pil")
    pixels = images(np.zeros((32, 32, 3), np.uint8), return_tensors="np")
    assert pixels["image_grid_thw"].tolist()[0][0] == 1


def test_a_tokenizer_of_vocab_and_merges_alone_gets_a_tokenizer_json(hf_folder, tmp_path):
    from vlmem_jax.processing import Tokenizer

    letters = {chr(code): n for n, code in enumerate(range(33, 127))} | {"Ġ": 94, "Ċ": 95, "ab": 96, "<unk>": 97}
    (hf_folder / "vocab.json").write_text(json.dumps(letters))
    (hf_folder / "merges.txt").write_text("#version: 0.2\na b\n")
    tokens = {str(98 + n): {"content": token, "special": True} for n, token in enumerate(chat_tokens())}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": tokens, "eos_token": "<|im_end|>"}
    (hf_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (hf_folder / "tokenizer.json").unlink(missing_ok=True)
    import_folder(hf_folder, tmp_path / "ours")
    tokenizer = Tokenizer.load(tmp_path / "ours" / "tokenizer")
    assert tokenizer.encode("ab c<|im_end|>") == [96, 94, letters["c"], 98 + chat_tokens().index("<|im_end|>")]
    (hf_folder / "merges.txt").write_text("not\nmerges of any kind at all\n")
    with pytest.raises(ValueError, match="as vocab.json and merges.txt alone, which make no tokenizer.json"):
        import_folder(hf_folder, tmp_path / "again")


def chat_tokens():
    template = chat.TEMPLATES["qwen2-vl"]
    return [*template.control_tokens, *template.stops]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (QWEN, None),
        (QWEN.replace("helpful", "useful"), "writes a question otherwise than is done here: .*useful.*helpful"),
        (QWEN.replace("{{ m['role'] }}", "{{ m['role'] | upper }}"), "a question otherwise"),
        (QWEN.replace("and m['role'] != 'system' ", ""), "several turns with a system text otherwise"),
        (QWEN.replace("<|image_pad|>", "<|image_pad|><|image_pad|>"), "a question about an image otherwise"),
        ("{% for %}", "cannot write a question: TemplateSyntaxError"),
        ("{{ raise_exception('no system turns') }}", "cannot write a question: TemplateError: no system turns"),
    ],
)
@pytest.mark.parametrize("where", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_is_compared_with_ours(tmp_path, template, words, where):
    alone = where.endswith(".jinja")
    (tmp_path / where).write_text(template if alone else json.dumps({"chat_template": template}))
    found = library.template_differs(tmp_path, chat.TEMPLATES["qwen2-vl"])
    assert (found is None) == (words is None)
    if words:
        assert re.search(words, found), found


def test_the_start_token_counts_as_the_template_of_the_model_has_it(tmp_path):
    ours = chat.TEMPLATES["internlm2-chat"]
    text = "{{ bos_token }}<|im_start|>system\n" + ours.system + "<|im_end|>"
    text += "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    text += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    plain = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": text}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(plain))
    found = library.template_differs(tmp_path, ours)
    assert "several turns with a system text" in found  # of which this template writes two
    assert library.template_differs(tmp_path / "none", ours) is None


def test_what_a_folder_mixes_is_told(hf_folder, tmp_path):
    save_tokenizer(hf_folder)
    weights = safetensors.numpy.load_file(hf_folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float16)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(weights, hf_folder / "model.safetensors")
    (hf_folder / "chat_template.jinja").write_text("{{ messages }}")
    dtypes, buffers, template = import_folder(hf_folder, tmp_path / "ours").notes
    assert dtypes.startswith("tensors of several dtypes, which are kept: ") and "1 of float16" in dtypes
    assert buffers == "1 tensors named *.inv_freq are not read: they follow from the config"
    assert template.startswith("the chat template in ")
