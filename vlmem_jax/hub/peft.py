"""Low-rank adapters in the layout of PEFT: a folder with adapter_config.json and adapter_model.safetensors.

A linear map of the checkpoint has a pair, A and B. Where it is several of ours in one (q, k and v), ours are blocks of
that pair, unless they share A.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmem_jax import families
from vlmem_jax.config import build
from vlmem_jax.hub.safetensors_io import Tensors, Writer
from vlmem_jax.models import AdapterConfig, ModelConfig
from vlmem_jax.paths import read_json
from vlmem_jax.records import Rule

CONFIG_FILE, STEM = "adapter_config.json", "adapter_model"
FOLDER = "adapters"
"""Beside a checkpoint: a folder for each of its adapters."""
KEY = "vlmem_jax"
"""Of our own words in adapter_config.json: which maps of ours the pairs are."""
PREFIX = "base_model.model."
FIXED = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}
"""Keys with one supported value."""
Pair = tuple[np.ndarray, np.ndarray]
"""A [rank, in] and B [out, rank] of a linear map."""


@dataclasses.dataclass(frozen=True)
class _Map:
    """A linear map of ours, which is one of the checkpoint or a part of it."""

    part: str
    name: str
    modules: tuple[str, ...]
    """That of the checkpoint in each layer."""
    rules: tuple[Rule, Rule]
    """How A and B, of rank `rank`, are reordered."""

    def take(self, pair: Pair) -> Pair:
        """Our A [in, rank] and B [rank, out] of the checkpoint's."""
        return tuple(rule.view(x).reshape(rule.our_shape[1:]) for rule, x in zip(self.rules, pair, strict=True))

    def give(self, pair: Pair) -> Pair:
        """The checkpoint's A and B of ours; rows of B that are not of this map are 0."""
        given = tuple(np.zeros(rule.shape, x.dtype) for rule, x in zip(self.rules, pair, strict=True))
        for rule, x, out in zip(self.rules, pair, given, strict=True):
            view = rule.view(out)
            view[...] = x.reshape(view.shape)
        return given


def _maps(model: ModelConfig, layout: Any, rank: int) -> list[list[_Map]]:
    """Every linear map that may have an adapter; those of one map of the checkpoint stand together."""
    rules = {rule.ours: rule for rule in families.of_model(model).name_table(model, layout, None)}
    found = []
    for part, maps in model.linear_maps.items():
        for name, linear in maps.items():
            rule = rules[f"{part}/layers/{linear.path}/kernel"]
            (out, into), pick = rule.groups[0], dict(rule.pick)
            ours = [axis for group in rule.groups[1] for axis in group if axis not in into]
            if linear.part is not None:
                pick[ours[0]] = linear.part
            ours = " ".join(axis for axis in ours if not isinstance(pick.get(axis), int))
            out, into, sizes = " ".join(out), " ".join(into), {**rule.sizes, "rank": rank}
            a = Rule("a", rule.names, f"rank ({into}) -> ({into}) rank", sizes, True)
            b = Rule("b", rule.names, f"({out}) rank -> rank ({ours})", sizes, True, pick)
            found.append(_Map(part, name, tuple(name.removesuffix(".weight") for name in rule.names), (a, b)))
    return [list(group) for _, group in itertools.groupby(found, lambda one: one.modules)]


# --- out --------------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, model: ModelConfig, adapter: AdapterConfig, leaves: Mapping[str, np.ndarray]) -> None:
    """Writes an adapter of a model into a new folder. `leaves`: its A and B by path in it, such as decoder/q/a."""
    rank, pairs, patterns, ranks = adapter.rank, {}, [], {}
    for group in _maps(model, families.of_model(model).adapter_layout, rank):
        group = [one for one in group if one.part in adapter.parts and one.name in adapter.parts[one.part].targets]
        if not group:
            continue
        ours = [[leaves[f"{one.part}/{one.name}/{x}"] for x in "ab"] for one in group]
        shared = all(np.array_equal(a, ours[0][0]) for a, _ in ours)
        for layer, module in enumerate(group[0].modules):
            given = [one.give((a[layer], b[layer])) for one, (a, b) in zip(group, ours, strict=True)]
            above, below = zip(*given, strict=True)
            pairs[module] = (above[0], sum(below)) if shared else (np.concatenate(above), np.concatenate(below, axis=1))
        patterns.append(_pattern(group[0].modules[0]))
        if not shared:
            ranks[_pattern(re.sub(r"^.*?\d+\.", "", group[0].modules[0]))] = len(group) * rank
    folder.mkdir(parents=True)
    tensors = {
        f"{PREFIX}{name}.lora_{x}.weight": w for name, pair in pairs.items() for x, w in zip("AB", pair, strict=True)
    }
    writer = Writer(folder, {name: (x.shape, x.dtype) for name, x in tensors.items()}, 1 << 62, STEM)
    for name, x in tensors.items():
        writer[name][...] = x
    writer.flush()
    content = FIXED | {
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": "|".join(patterns),
        "rank_pattern": ranks,
        "alpha_pattern": {name: adapter.alpha * wide / rank for name, wide in ranks.items()},
        KEY: {part: list(lora.targets) for part, lora in adapter.parts.items()}
        | {"place": [one.name for one in model.adapters].index(adapter.name)},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _pattern(module: str) -> str:
    """A regular expression for this module in all layers."""
    return re.sub(r"\.\d+\.", r".\\d+.", module).replace(".", r"\.")


def beside(folder: Path) -> list[Path]:
    """The adapters that lie with a checkpoint in `folder`, in their order in the model."""

    def place(adapter: Path) -> int:
        found = (read_json(adapter / CONFIG_FILE).get(KEY) or {}).get("place")
        return found if isinstance(found, int) else 0

    found = sorted(file.parent for file in (folder / FOLDER).glob(f"*/{CONFIG_FILE}"))
    return sorted(found, key=place)


# --- in ---------------------------------------------------------------------------------------------------------------


def read_adapter(folder: Path, model: ModelConfig, name: str) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """An adapter of a model from its folder, and its A and B by path in it.

    Raises ValueError, naming the folder, for what is damaged, is for another model, or does what is not supported.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"an adapter is a folder with {CONFIG_FILE}, as PEFT writes it; {folder} has none")
    content = read_json(file)
    try:
        wrong = [f"{k} must be {v!r}, got {content[k]!r}" for k, v in FIXED.items() if content.get(k, v) != v]
        if wrong:
            raise ValueError("; ".join(wrong))
        return _read(content, {name: np.array(x) for name, x in Tensors(folder, STEM).items()}, model, name)
    except KeyError as error:
        raise ValueError(f"{file} must have the key {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no adapter for this model: {error}") from error


def _read(
    content: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelConfig, name: str
) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    pairs, words = dict(_pairs(tensors)), content.get(KEY)
    scales = {_scale(content, module, len(above)) for module, (above, _) in pairs.items()}
    if len(scales) != 1:
        raise ValueError(f"alpha / rank must be the same for all of its maps, got {sorted(scales)}")
    rank = content["r"] if words else max(len(above) for above, _ in pairs.values())
    leaves, targets = {}, {"decoder": [], "vision": []}
    for group in _fitting(model, pairs, rank):
        maps = [one for one in group if not words or one.name in words.get(one.part, ())]
        for n, one in enumerate(maps):
            each = []
            for module in one.modules:
                above, below = pairs.pop(module) if n == len(maps) - 1 else pairs[module]
                if words and len(above) > rank:
                    block = slice(n * rank, (n + 1) * rank)
                    above, below = above[block], below[:, block]
                short = rank - len(above)
                each.append(one.take((np.pad(above, ((0, short), (0, 0))), np.pad(below, ((0, 0), (0, short))))))
            leaves |= {
                f"{one.part}/{one.name}/{x}": np.stack(w) for x, w in zip("ab", zip(*each, strict=True), strict=True)
            }
            targets[one.part].append(one.name)
    if pairs:
        raise ValueError(f"it has {len(pairs)} pairs too many, or not one in each layer, such as {min(pairs)}")
    keys = {"name": name, "rank": rank, "alpha": scales.pop() * rank, "dropout": float(content.get("lora_dropout", 0))}
    targets = {part: words[part] if words and part in words else some for part, some in targets.items()}
    return build(AdapterConfig, keys | {"targets": targets["decoder"], "vision": targets["vision"]}, "adapter"), leaves


def _pairs(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Pair]]:
    """Module -> A, B. Raises ValueError for tensors that are neither."""
    for name, above in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise ValueError(f"tensor {name} is neither lora_A nor lora_B of a linear map")
        below = tensors.get(f"{PREFIX}{match[1]}.lora_B.weight")
        if above.ndim != 2 or below is None or (match[2] == "A" and below.shape[1:] != above.shape[:1]):
            raise ValueError(f"{match[1]} must have lora_A [rank, in] and lora_B [out, rank]")
        if match[2] == "A":
            yield match[1], (above, below)


def _scale(content: Mapping[str, Any], module: str, rank: int) -> float:
    """What B A x is multiplied by."""

    def of(key: str, default: Any) -> Any:
        patterns = (content.get(key) or {}).items()
        return next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", module)), default)

    stated = of("rank_pattern", content["r"])
    if stated != rank:
        raise ValueError(f"the rank of {module} is {rank}, but {CONFIG_FILE} says {stated}")
    alpha = float(of("alpha_pattern", content["lora_alpha"]))
    return alpha / math.sqrt(rank) if content.get("use_rslora") else alpha / rank


def _fitting(model: ModelConfig, pairs: Mapping[str, Pair], rank: int) -> Iterator[list[_Map]]:
    """The maps that there are pairs for, by whichever way of naming fits. Raises ValueError for other shapes."""
    family = families.of_model(model)
    named = [_maps(model, layout, rank) for layout in (family.adapter_layout, *family.layouts)]
    fits = [[group for group in groups if set(group[0].modules) <= set(pairs)] for groups in named]
    for group in max(fits, key=len):
        a, b = (rule.shape for rule in group[0].rules)
        above, below = pairs[group[0].modules[0]]
        if above.shape[1] != a[1] or below.shape[0] != b[0]:
            raise ValueError(
                f"{group[0].modules[0]} must map {a[1]} to {b[0]}, got {above.shape[1]} to {below.shape[0]}"
            )
        yield group
