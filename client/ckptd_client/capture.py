"""What a person calls "the config", as plain JSON values: dict, argparse.Namespace, dataclass, optimizer, or a file.

Secrets are masked by name before anything leaves the process. Sizes are bounded, and what was cut
says so in its place.
"""

import importlib
import json
import math
import os
import re
from typing import Any, Dict, List, Mapping, Optional

MASK = "***"
DEPTH_MAX = 16
TEXT_CHARACTERS_MAX = 4096
ITEMS_MAX = 1000
CONFIG_BYTES_MAX = 128 << 10
CONFIG_FILE_BYTES_MAX = 1 << 20

_SECRET = re.compile(
    r"(?i)(^|[^a-z])(pw|pwd|key|keys|auth)$|token(?!i|_?(id|len|count|type|num|per|limit|max))(?!s)"
    r"|secret|passw|passphrase|credential|api_?key|access_?key|private_?key|bearer|dsn|webhook"
)
_SECRET_NUMBER = re.compile(r"(?i)secret|passw|passphrase|credential")
_URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]+)@")


def is_secret(name: str) -> bool:
    """Say whether a value under this name must not be shown: tokens, passwords, keys and their like.

    "max_tokens", "token_ids" and "tokenizer" are training words and stay.
    """
    # camelCase is cut into words first: "apiKey", "hfToken".
    return _SECRET.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)) is not None


def config_of(config: Any) -> Dict[str, Any]:
    """Return `config` as a dict of JSON values with secrets masked.

    config  None, a mapping, an argparse.Namespace, a dataclass, any object with attributes, or the
            path of a .json, .toml (Python 3.11) or .yaml file (when yaml can be imported)

    ValueError  none of these, or a file that can't be read; names the value and the rule
    """
    if config is None:
        return {}
    if isinstance(config, (str, os.PathLike)):
        config = _read(os.fspath(config))
    found = _fields(config)
    if found is None:
        message = (
            f"config of type {type(config).__name__} must be a dict, an argparse.Namespace, a dataclass or the path of"
            " a JSON, TOML or YAML file"
        )
        raise ValueError(message)
    plain = plain_of(found)
    if len(json.dumps(plain)) <= CONFIG_BYTES_MAX:
        return dict(plain)
    return {"_cut": f"larger than {CONFIG_BYTES_MAX} bytes", "_keys": [str(key) for key in found][:ITEMS_MAX]}


def optimizer_config(optimizer: Any) -> Dict[str, Any]:
    """Return an optimizer's class and its param groups without the parameters themselves.

    ValueError  it has no `param_groups`
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        message = f"optimizer of type {type(optimizer).__name__} must have param_groups, as torch optimizers do"
        raise ValueError(message)  # noqa: TRY004 - every bad argument is a ValueError, so that one except clause does
    described = []
    for group in groups[:ITEMS_MAX]:
        values = {name: value for name, value in group.items() if name != "params"}
        described.append({**plain_of(values), "params": len(group.get("params", ()))})
    return {"class": type(optimizer).__name__, "param_groups": described}


def plain_of(value: Any, name: str = "", depth: int = 0, *, mask: bool = True) -> Any:
    """Turn any value into JSON values: what JSON lacks becomes text, what is secret by its `name` becomes MASK."""
    if mask and value not in (None, "") and is_secret(name) and (_is_text(value) or _SECRET_NUMBER.search(name)):
        return MASK
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return (mask_text(value) if mask else value)[:TEXT_CHARACTERS_MAX]
    if depth >= DEPTH_MAX:
        return f"<{type(value).__name__}: nested deeper than {DEPTH_MAX}>"
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
        plain = [plain_of(item, "", depth + 1, mask=mask) for item in items[:ITEMS_MAX]]
        return plain if len(items) <= ITEMS_MAX else [*plain, f"<{len(items) - ITEMS_MAX} more>"]
    fields = _fields(value)
    if fields is not None:
        cut = list(fields.items())[:ITEMS_MAX]
        return {str(key)[:256]: plain_of(item, str(key), depth + 1, mask=mask) for key, item in cut}
    return mask_text(_text(value))[:TEXT_CHARACTERS_MAX]


def _is_text(value: Any) -> bool:
    """Numbers under names like "key" are sizes and counts; anything else may be the secret itself."""
    return not isinstance(value, (bool, int, float))


def mask_text(text: str) -> str:
    """Mask the password in every URL of a text."""
    return _URL_PASSWORD.sub(r"\1:" + MASK + "@", text)


def mask_arguments(argv: List[str]) -> List[str]:
    """Mask the values of secret options in a command line: `--api-key X`, `--api-key=X`, `hf_token=X`."""
    masked: List[str] = []
    hide_next = False
    for argument in argv[:ITEMS_MAX]:
        name, equals, value = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            masked.append(MASK)
        elif equals and value and is_secret(name.lstrip("-")):
            masked.append(f"{name}={MASK}")
        else:
            masked.append(mask_text(argument)[:TEXT_CHARACTERS_MAX])
        hide_next = not equals and argument.startswith("-") and is_secret(argument.lstrip("-"))
    return masked


def _fields(value: Any) -> Optional[Mapping[Any, Any]]:
    """Return what a mapping, a namespace, a dataclass or a plain object holds; None for anything else."""
    if isinstance(value, Mapping):
        return value
    declared = getattr(type(value), "__dataclass_fields__", None)
    if declared is not None:
        return {name: getattr(value, name, None) for name in declared}
    if type(value).__name__ in {"Namespace", "SimpleNamespace", "DictConfig"}:
        return {name: item for name, item in vars(value).items() if not name.startswith("_")}
    dump = getattr(value, "model_dump", None) or getattr(value, "to_dict", None)
    if callable(dump) and not isinstance(value, type):
        dumped = dump()
        return dumped if isinstance(dumped, Mapping) else None
    return None


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - a __str__ of the caller's; a config must not end the training
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _read(path: str) -> Any:
    suffix = os.path.splitext(path)[1].lower()
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(CONFIG_FILE_BYTES_MAX + 1)
        return _parse(text, suffix)
    except (OSError, ImportError, ValueError) as error:
        message = f"config={path!r} must be a readable JSON, TOML or YAML file: {error}"
        raise ValueError(message) from error


def _parse(text: str, suffix: str) -> Any:
    if len(text) > CONFIG_FILE_BYTES_MAX:
        raise ValueError(f"larger than {CONFIG_FILE_BYTES_MAX} bytes")
    if suffix in {".yaml", ".yml"}:
        yaml = importlib.import_module("yaml")  # only where the caller has it
        try:
            return yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    if suffix == ".toml":
        return importlib.import_module("tomllib").loads(text)
    return json.loads(text)
