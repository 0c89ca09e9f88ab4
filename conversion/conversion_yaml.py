"""Descriptions of a user's own data in YAML, checked before anything is read."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def load_description(path: str) -> dict[str, Any]:
    """A YAML file that describes data.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no YAML, or no mapping.
    """
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no description {path}. Examples are in conversion/descriptions.")
    try:
        description = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} must hold keys and values, like `modalities:`, and holds {description!r}.")
    return description


def check_keys(where: str, mapping: Any, required: Iterable[str], optional: Iterable[str]) -> None:
    """Raise unless `mapping` has all `required` keys and none but these and the `optional` ones.

    Raises:
        ValueError: it has not.
    """
    required, optional = list(required), list(optional)
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must have keys and values, and is {mapping!r}. Keys: {required + optional}.")
    unknown = [key for key in mapping if key not in required + optional]
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}. Known are {required + optional}.")
    lacking = [key for key in required if key not in mapping]
    if lacking:
        raise ValueError(f"{where} lacks {lacking}. It needs {required} and takes {optional}.")


def load_sections(path: str, optional: Iterable[str]) -> dict[str, Any]:
    """A description with its `modalities` and `labels` (none, if it has none), each a mapping from name to description.

    Raises:
        OSError, ValueError: as [`load_description`]; a key that is neither these nor `optional`.
    """
    description = load_description(path)
    check_keys(path, description, ["modalities"], ["title", "labels", *optional])
    description.setdefault("labels", {})
    for part in ("modalities", "labels"):
        if not isinstance(description[part], dict):
            raise ValueError(f"{path}: `{part}` must hold names with a description each, is {description[part]!r}.")
    if not description["modalities"]:
        raise ValueError(f"{path}: `modalities` is empty.")
    return description


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Key of a description to what its value must be, in words and as a test.
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "pattern": ("a text", lambda value: isinstance(value, str)),
    "array": ("the name of an array", lambda value: isinstance(value, str)),
    "unit": ("a text", lambda value: isinstance(value, str)),
    "bands": (
        "a list of names",
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(band, str) for band in value),
    ),
    "channels": (
        "a list of whole numbers",
        lambda value: isinstance(value, list) and all(type(channel) is int and channel >= 0 for channel in value),
    ),
    "channel": ("a whole number", lambda value: type(value) is int and value >= 0),
    "gsd": ("metres per pixel, above 0", lambda value: _is_number(value) and value > 0),
    "dn_offset": ("a number", _is_number),
    "nodata": (
        "a number or a list of numbers",
        lambda value: all(map(_is_number, value if isinstance(value, list) else [value])),
    ),
    "ignore_index": ("a whole number", lambda value: type(value) is int),
    "optional": ("true or false", lambda value: isinstance(value, bool)),
}


def check_values(where: str, spec: Mapping[str, Any]) -> None:
    """Raise if a value in a description is not of the kind that its key asks for.

    Raises:
        ValueError: one is not.
    """
    for key, value in spec.items():
        if key in _VALUES and not _VALUES[key][1](value):
            raise ValueError(f"{where}: `{key}` must be {_VALUES[key][0]}, is {value!r}.")


def check_sensor(where: str, name: str, spec: Mapping[str, Any]) -> None:
    """Raise if a modality claims to be of a registered sensor (by `sensor` or by its own name) and cannot be.

    Raises:
        ValueError: an unknown sensor, band or unit.
    """
    from modeling_mapex.sensors_mapex import SENSORS
    from modeling_mapex.units_mapex import UNITS

    if "sensor" in spec and spec["sensor"] not in SENSORS:
        raise ValueError(
            f"{where}: unknown sensor `{spec['sensor']}`. Registered are {sorted(SENSORS)}; leave `sensor` out for one "
            "of your own."
        )
    sensor = SENSORS.get(spec.get("sensor", name))
    if sensor is None:
        return
    unknown = [band for band in spec["bands"] if band not in sensor.band_names]
    if unknown:
        raise ValueError(
            f"{where}: the sensor `{spec.get('sensor', name)}` has no bands {unknown}. It has {sensor.band_names}; a "
            "sensor of your own needs another name."
        )
    if spec["unit"] not in UNITS[sensor.unit]:
        raise ValueError(f"{where}: `unit` is {spec['unit']!r}, this sensor comes in {list(UNITS[sensor.unit])}.")


def class_names(where: str, names: Any) -> list:
    """Names of the classes of a mask, from YAML: a list, or codes and names; as `ShardSchema` stores them."""
    values = names.values() if isinstance(names, dict) else names if isinstance(names, list) else ()
    if any(isinstance(name, bool) for name in values):
        raise ValueError(f"{where}: in YAML, yes, no, on and off are true and false: put such `names` into quotes.")
    if isinstance(names, dict) and all(isinstance(code, int) for code in names):
        return [[code, str(name)] for code, name in sorted(names.items())]
    if isinstance(names, list) and names:
        return [str(name) for name in names]
    raise ValueError(f"{where}: `names` must be a list of names or codes with names like {{0: land}}, is {names!r}.")
