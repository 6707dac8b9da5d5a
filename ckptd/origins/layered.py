"""All sources of the configuration, laid over one another and checked together, with every error at once."""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ckptd.config import Settings
from ckptd.dialects import translate
from ckptd.errors import BadConfig
from ckptd.origins import files

PREFIX = "CKPTD_"
# Variables of ckptd that are no settings: places, fail points, and what clients read.
_OTHER_VARIABLES = frozenset({"CKPTD_DIR", "CKPTD_FAIL", files.VARIABLE})
_CLOSE_ENOUGH = 0.75
_NUMBER = re.compile(r"\d{1,18}(\.\d+)?")

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The configuration in force.

    settings  complete: `state_dir` and `socket` are absolute
    origins   dotted key -> "default", "flag", "env CKPTD_...", "FILE" or "FILE:LINE"
    problems  what is odd but no error, for the log and `ckpt config check`
    files     those that were read, the weakest first
    """

    settings: Settings
    origins: dict[str, str]
    problems: tuple[str, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One source: its values as a tree, and where each dotted key stands."""

    values: Tree
    where: dict[str, str]


def load(
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read every source and check them together. Blocks on a few small files.

    config_file  the only file to read, else the usual ones
    overrides    flags: dotted key -> value; None values are flags that were not given

    BadConfig with all errors of all sources; its `errors` detail lists {where, key, message}.
    """
    env = os.environ if environ is None else environ
    flags = {key: value for key, value in (overrides or {}).items() if value is not None}
    errors: list[dict[str, str]] = []
    problems: list[str] = []
    upper = [_from_environ(env, errors, problems), _Layer(_tree(flags), dict.fromkeys(flags, "flag"))]
    lower: list[_Layer] = []
    read: list[Path] = []
    system = any(layer.values.get("mode") == "system" for layer in upper)
    try:
        named = files.chain(config_file, env, user=not system)
    except BadConfig as error:
        named = []
        errors.append({"where": f"env {files.VARIABLE}", "key": "", "message": error.message})
    for path in named:
        try:
            lower.append(_from_file(files.read(path)))
            read.append(path)
        except BadConfig as error:
            errors.append({"where": str(path), "key": "", "message": error.message.removeprefix(f"{path}: ")})
    merged, where = _merge([*lower, *upper])
    settings = _checked(merged, where, errors)
    if settings is None or errors:
        raise _all_of(errors)
    found = files.settle(settings.mode, settings.state_dir, settings.socket, env)
    settings = settings.model_copy(update={"state_dir": found.state_dir, "socket": found.socket})
    origins = {key: _origin(key, where) for key in leaves(settings)}
    if env.get("CKPTD_DIR") and origins["state_dir"] == "default" and settings.mode == "user":
        origins["state_dir"] = "env CKPTD_DIR"
    return Loaded(settings, origins, tuple(problems), tuple(read))


def leaves(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting; a list of tables is one setting."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def known_keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting and section of a model."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def _from_file(file: files.File) -> _Layer:
    where = {key: f"{file.path}:{line}" for key, line in file.lines.items()}
    return _in_our_words(_Layer(file.data, {"": str(file.path), **where}))


def _in_our_words(layer: _Layer) -> _Layer:
    """Translate other tools' names in [retention] here, so that each of our keys knows the name and line that said it.

    What can't be translated stays as it is: the model says why, with all other errors.
    """
    table = layer.values.get("retention")
    if not isinstance(table, dict):
        return layer
    try:
        found = translate(table)
    except ValueError:
        return layer
    where = dict(layer.where)
    for key, names in found.said_by.items():
        place = layer.where.get(f"retention.{names[0]}") or layer.where[_above(f"retention.{names[0]}", layer.where)]
        where[f"retention.{key}"] = f"{place} ({', '.join(names)})"
    return _Layer({**layer.values, "retention": found.table}, where)


def _from_environ(environ: Mapping[str, str], errors: list[dict[str, str]], problems: list[str]) -> _Layer:
    """Take CKPTD_A__B variables. Without "__" only exact names count: clients have variables of their own."""
    known = {key.upper().replace(".", "__"): key for key in known_keys()}
    values: Tree = {}
    where = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in _OTHER_VARIABLES or not environ[variable]:
            continue
        name = variable.removeprefix(PREFIX)
        if name in known:
            values[known[name]] = _value(environ[variable])
            where[known[name]] = f"env {variable}"
            continue
        hint = _did_you_mean(name, known, prefix=PREFIX)
        if "__" in name:
            errors.append({"where": f"env {variable}", "key": name.lower(), "message": f"unknown setting{hint}"})
        elif hint:
            problems.append(f"env {variable} is no setting{hint}")
    return _Layer(_tree(values), where)


def _value(text: str) -> Any:
    """Read lists and tables as JSON and bare numbers as in TOML (5 is 5 seconds); the model converts the rest."""
    if _NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    if text[:1] in {"[", "{"}:
        try:
            return json.loads(text)
        except ValueError:
            return text  # the model says what it expected here
    return text


def _tree(flat: Mapping[str, Any]) -> Tree:
    """Unfold dotted keys."""
    tree: Tree = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    return tree


def _merge(layers: list[_Layer]) -> tuple[Tree, dict[str, str]]:
    """Lay the later over the earlier: tables are merged, everything else is replaced whole."""
    merged: Tree = {}
    where: dict[str, str] = {}
    for layer in layers:
        for key in _given(layer.values):
            for old in [known for known in where if known == key or known.startswith(f"{key}.")]:
                del where[old]
            inside = {k: place for k, place in layer.where.items() if k.startswith(f"{key}.")}
            where |= {key: layer.where.get(key) or layer.where.get(_above(key, layer.where), ""), **inside}
        merged = _over(merged, layer.values)
    return merged, where


def _given(tree: Tree, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _given(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _over(lower: Tree, upper: Tree) -> Tree:
    both = dict(lower)
    for key, value in upper.items():
        here = both.get(key)
        both[key] = _over(here, value) if isinstance(here, dict) and isinstance(value, dict) else value
    return both


def _above(key: str, where: Mapping[str, str]) -> str:
    """Return the longest key of `where` that `key` lies under, "" when there is none."""
    while key and key not in where:
        key = key.rpartition(".")[0]
    return key


def _checked(merged: Tree, where: dict[str, str], errors: list[dict[str, str]]) -> Settings | None:
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            key = ".".join(str(part) for part in found["loc"])
            message = found["msg"].removeprefix("Value error, ")
            if found["type"] == "extra_forbidden":
                message = "unknown key" + _did_you_mean(key.rpartition(".")[2], _siblings(found["loc"]))
            errors.append({"where": where.get(_above(key, where), ""), "key": key, "message": message})
        return None


def _siblings(loc: tuple[int | str, ...]) -> list[str]:
    """Return the names that could stand where an unknown key stands."""
    model: Any = Settings
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_of(model.model_fields[part].annotation)
    return list(model.model_fields) if model else []


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section inside an annotation such as `Arenas` or `tuple[Root, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_of(arg))), None)


def _did_you_mean(name: str, known: Mapping[str, str] | list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), 1, _CLOSE_ENOUGH)
    return f": did you mean {prefix}{close[0]}?" if close else ""


def _origin(key: str, where: dict[str, str]) -> str:
    exact = where.get(key) or where.get(key.rpartition(".")[0])  # keep_every = 1000 says keep_every.steps
    if exact is None:
        # An array of tables is recorded by its elements ("roots.0").
        exact = next((place for known, place in sorted(where.items()) if known.startswith(f"{key}.")), None)
    return exact or "default"


def _all_of(errors: list[dict[str, str]]) -> BadConfig:
    lines = [": ".join(filter(None, (error["where"], error["key"], error["message"]))) for error in errors]
    count = f"{len(lines)} errors" if len(lines) > 1 else "an error"
    return BadConfig(f"the configuration has {count}:\n  " + "\n  ".join(lines), errors=errors)
