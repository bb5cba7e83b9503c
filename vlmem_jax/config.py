"""Experiments as data: a Python file gives a ConfigDict, the command line changes keys, `build` checks all of it."""

import ast
import copy
import dataclasses
import difflib
import functools
import importlib.util
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from ml_collections import ConfigDict

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key and what it should be."""


def load(spec: str) -> ConfigDict:
    """The ConfigDict of `file.py[:profile]`, by the file's `get_config(profile=None)`. Raises ConfigError."""
    path, _, profile = spec.partition(":")
    if not os.path.isfile(path):
        raise ConfigError(f"a config is a Python file, as file.py or file.py:profile; there is no file {path!r}")
    module_spec = importlib.util.spec_from_file_location("vlmem_experiment_config", path)
    if module_spec is None:
        raise ConfigError(f"a config is a Python file whose name ends in .py; got {path!r}")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from error
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} must define get_config(profile=None) that returns a ConfigDict")
    config = module.get_config(profile) if profile else module.get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of {path} must return a ConfigDict; got {type(config).__name__}")
    return config


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of `config` with dotted keys replaced, such as `{"stages.pretrain.steps": "30"}`.

    Text is read as a Python literal (or true, false), and stays text where it is none. A list element goes by its
    index, or by its `name` in a list of groups. Keys that are not there yet are made, and a name on the way is a group
    of that `kind`: `build` knows which are valid. Raises ConfigError for a path through anything else.
    """
    config = copy.deepcopy(config)
    with config.unlocked():
        for key, value in changes.items():
            _set(config, key.split("."), _literal(value) if isinstance(value, str) else value, "config")
    return config


def build(cls: type[T], config: Any, where: str = "config") -> T:
    """Frozen dataclass `cls` from a ConfigDict or dict, nested dataclasses included.

    Raises ConfigError, naming the full key below `where`, for an unknown or missing key, a wrong type, and for what
    the `__post_init__` of a dataclass refuses. A class attribute `moved` says of keys that there were what became of
    them.
    """
    group = _group(config)
    if group is None:
        raise ConfigError(f"{where} must be a group of keys; got {_show(config)}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in group:
        if key in getattr(cls, "moved", {}):
            raise ConfigError(f"{where}.{key} is no key any more: {cls.moved[key]}")
        if key not in fields:
            raise ConfigError(f"unknown key {where}.{key}; {_nearest(str(key), fields, prefix=f'{where}.')}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in group:
            raise ConfigError(f"{where}.{name} must be given")
    hints = _hints(cls)
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in group.items()}
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def build_kind(kinds: Sequence[type[T]], config: Any, where: str = "config") -> T:
    """`build` of the dataclass whose default `kind` is that of `config`, or of the first where it names none.

    The name of a kind stands for a group that says no more. Raises ConfigError for an unknown kind, and what `build`
    raises.
    """
    named = {cls.kind: cls for cls in kinds}
    config = {"kind": config} if isinstance(config, str) else config
    kind = (_group(config) or {}).get("kind", kinds[0].kind)
    if kind not in named:
        raise ConfigError(f"{where}.kind must be one of {', '.join(named)}; got {_show(kind)}")
    return build(named[kind], config, where)


def to_dict(config: Any) -> Any:
    """Plain dicts, lists and scalars of a dataclass, ready for JSON; `build` takes them back to an equal dataclass."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    return _plain(config)


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of both; those of `top` win, group by group."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _set(node: Any, keys: list[str], value: Any, where: str) -> None:
    key, rest = keys[0], keys[1:]
    if not key:
        raise ConfigError(f"a key has names between its dots; got an empty one after {where}")
    if isinstance(node, list):
        key = _index(node, key, where)
        if key == len(node):
            node.append(ConfigDict() if rest else None)
        child = node[key]
    else:
        child = node.get(key)
    where = f"{where}.{key}"
    if rest:
        if child is None:
            child = ConfigDict()
        elif isinstance(child, str):
            child = ConfigDict({"kind": child})
        elif isinstance(child, tuple):
            child = [copy.deepcopy(item) for item in child]
        elif not isinstance(child, list) and _group(child) is None:
            raise ConfigError(f"{where} is {_show(child)}, not a group of keys; cannot set {where}.{'.'.join(rest)}")
        _set(child, rest, value, where)
        value = child
    if isinstance(node, ConfigDict):
        with node.ignore_type():
            node[key] = value
    else:
        node[key] = value


def _index(items: list, key: str, where: str) -> int:
    names = [group.get("name") for group in map(_group, items) if group is not None]
    if key in names:
        return next(i for i, item in enumerate(items) if (_group(item) or {}).get("name") == key)
    if not key.isdecimal():
        hint = _nearest(key, [name for name in names if name], prefix=f"{where}.")
        raise ConfigError(f"{where}.{key}: no element of {where} has this name; {hint}")
    if int(key) > len(items):
        raise ConfigError(
            f"{where}.{key}: {where} has {len(items)} elements, counted from 0; {where}.{len(items)} adds one"
        )
    return int(key)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` asks for, or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is ConfigDict or hint is dict:
        return _plain(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, args, value, where)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in args):
            options = ", ".join(map(repr, args))
            near = difflib.get_close_matches(str(value), [str(option) for option in args], 1)
            raise ConfigError(
                f"{where} must be one of {options}; got {value!r}" + (f", did you mean {near[0]!r}?" if near else "")
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong_type(hint, value, where)
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise ConfigError(f"{where} must have {len(args)} elements; got {len(value)}: {_show(value)}")
        return tuple(_convert(arg, item, f"{where}.{i}") for i, (arg, item) in enumerate(zip(args, value, strict=True)))
    if origin in (dict, Mapping):
        group = _group(value)
        if group is None:
            raise _wrong_type(hint, value, where)
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in group.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # exact: a bool must not pass as an int
        raise _wrong_type(hint, value, where)
    return value


def _convert_union(hint: Any, options: tuple, value: Any, where: str) -> Any:
    others = [option for option in options if option is not type(None)]
    if len(others) < len(options):
        literals = [choice for option in others for choice in typing.get_args(option)]
        if value is None or (value == "none" and "none" not in literals):
            return None
    if len(others) == 1:
        return _convert(others[0], value, where)
    if all(map(dataclasses.is_dataclass, others)):
        return value if isinstance(value, tuple(others)) else build_kind(others, value, where)
    for option in others:
        try:
            return _convert(option, value, where)
        except ConfigError:
            continue
    raise _wrong_type(hint, value, where)


def _wrong_type(hint: Any, value: Any, where: str) -> ConfigError:
    return ConfigError(f"{where} must be {_type_name(hint)}; got {_show(value)}")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def _show(value: Any) -> str:
    text = repr(_plain(value))
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _nearest(key: str, valid: Iterable[str], prefix: str) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"valid here: {', '.join(valid) or 'none'}"


def _group(value: Any) -> dict | None:
    """The keys and values of a dict or ConfigDict, or None for anything else."""
    return dict(value.items()) if isinstance(value, ConfigDict | Mapping) else None


def _plain(value: Any) -> Any:
    group = _group(value)
    if group is not None:
        return {key: _plain(item) for key, item in group.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return to_dict(value) if dataclasses.is_dataclass(value) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)
