"""Arrays in an .npz file, one row a sample, described by a small YAML file, to shards.

    python conversion/convert_npz.py --source chips.npz --description chips.yaml --output shards/chips

conversion/descriptions has examples. An array of an .npz is decompressed whole, once in every process, so that memory
for all arrays named in the description is needed 1 + `workers` times; --workers rarely pays here. Georeference is not
known and stays empty.
"""

import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from conversion_common import ConversionArguments, Plan, Source, run
from conversion_reading import check_same_ground, crop, present
from conversion_yaml import check_keys, check_sensor, check_values, class_names, load_sections

from modeling_mapex import SENSORS
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item


LABEL_KEYS = {  # needed, possible
    "mask": (["kind", "array"], ["names", "ignore_index", "channel"]),
    "map": (["kind", "array"], ["unit", "nodata", "channel"]),
    "multi_label": (["kind", "array"], ["names", "names_array"]),
    "class": (["kind", "array"], ["names", "names_array"]),
}


@dataclass(kw_only=True)
class NpzArguments(ConversionArguments):
    description: str = field(metadata={"help": "YAML file that says what the arrays are."})


@cache
def load_array(path: str, name: str) -> np.ndarray:
    """An array of the file, read once per process.

    Raises:
        OSError: the file is missing or damaged.
        ValueError: it has no such array.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise OSError(f"{path} is no .npz file, or truncated")
        with np.load(path, allow_pickle=False) as archive:
            if name not in archive:
                raise ValueError(f"{path} has no array `{name}`. It has {archive.files}.")
            return archive[name]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise OSError(f"{path} is damaged: {error}") from error


def load(path: str) -> dict[str, Any]:
    """The description, checked as far as that goes without the arrays."""
    description = load_sections(path, ["id", "place"])
    for name, spec in description["modalities"].items():
        where = f"{path}: modality `{name}`"
        check_keys(where, spec, ["array", "bands", "unit", "gsd"], ["channels", "nodata", "sensor", "dn_offset"])
        check_values(where, spec)
        check_sensor(where, name, spec)
    for name, spec in description["labels"].items():
        where = f"{path}: label `{name}`"
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind not in LABEL_KEYS:
            raise ValueError(f"{where}: `kind` must be one of {list(LABEL_KEYS)}, is {kind!r}.")
        check_keys(where, spec, *LABEL_KEYS[kind])
        check_values(where, spec)
        if kind in ("multi_label", "class") and ("names" in spec) == ("names_array" in spec):
            raise ValueError(f"{where}: give `names`, or `names_array` (an array that holds them).")
        if "names" in spec:
            spec["names"] = class_names(where, spec["names"])
            if kind in ("multi_label", "class") and not all(isinstance(entry, str) for entry in spec["names"]):
                raise ValueError(f"{where}: `names` must be a list, in the order of the classes.")
    return description


def describe(description: dict[str, Any], path: str) -> tuple[ShardSchema, int]:
    """The schema, and the number of samples."""
    modalities: dict[str, dict[str, Any]] = {}
    labels: dict[str, dict[str, Any]] = {}
    lengths: dict[str, int] = {}
    for name, spec in description["modalities"].items():
        array = load_array(path, spec["array"])
        where = f"modality `{name}`: array `{spec['array']}` of shape {array.shape}"
        if array.ndim not in (3, 4):
            raise ValueError(f"{where} is not (samples, channels, height, width) or (samples, height, width).")
        available = 1 if array.ndim == 3 else array.shape[1]
        chosen = spec.get("channels", list(range(available)))
        if not all(channel < available for channel in chosen):
            raise ValueError(f"{where} has the channels 0 to {available - 1}; `channels` are {chosen}.")
        if len(chosen) != (1 if spec["unit"] == "class" else len(spec["bands"])):
            raise ValueError(f"{where}: {len(chosen)} channels do not fit the bands {spec['bands']}.")
        entry = {key: spec[key] for key in ("bands", "unit", "sensor", "dn_offset", "nodata") if key in spec}
        sensor = SENSORS.get(spec.get("sensor", name))
        if "nodata" not in spec and sensor is not None and sensor.nodata:
            entry["nodata"] = list(sensor.nodata)
        modalities[name] = entry | {"gsd": float(spec["gsd"]), "dtype": str(array.dtype.newbyteorder("="))}
        lengths[spec["array"]] = len(array)
    for name, spec in description["labels"].items():
        array = load_array(path, spec["array"])
        where = f"label `{name}`: array `{spec['array']}` of shape {array.shape}"
        entry = {key: spec[key] for key in ("kind", "names", "ignore_index", "unit", "nodata") if key in spec}
        if "names_array" in spec:
            entry["names"] = [str(text) for text in load_array(path, spec["names_array"])]
        if spec["kind"] in ("mask", "map"):
            entry["dtype"] = str(array.dtype.newbyteorder("="))
            if array.ndim != (4 if "channel" in spec else 3):
                raise ValueError(f"{where} is not (samples, height, width); for one channel of more, give `channel`.")
        elif spec["kind"] == "multi_label" and array.shape[1:] != (len(entry["names"]),):
            raise ValueError(f"{where} does not have a column for each of {len(entry['names'])} names.")
        elif spec["kind"] == "class" and (array.ndim != 1 or array.dtype.kind not in "iu"):
            raise ValueError(f"{where} and type {array.dtype} is not one integer a sample.")
        labels[name] = entry
        lengths[spec["array"]] = len(array)
    if len(set(lengths.values())) != 1:
        raise ValueError(f"The arrays of {path} differ in their number of samples: {lengths}.")
    schema = ShardSchema(modalities, labels, title=str(description.get("title", "")))
    return schema, next(iter(lengths.values()))


def texts(path: str, names: str | Sequence[str] | None, count: int) -> list[str] | None:
    """A text for each sample, from one array or several joined by `-`."""
    if names is None:
        return None
    columns = [load_array(path, name) for name in ([names] if isinstance(names, str) else names)]
    for name, column in zip([names] if isinstance(names, str) else names, columns):
        if column.shape != (count,):
            raise ValueError(f"Array `{name}` of {path} has the shape {column.shape}, not one value a sample.")
    return ["-".join(map(str, row)) for row in zip(*(column.tolist() for column in columns))]


class Reader:
    """Reads a row of the arrays by description and schema."""

    def __init__(self, description: dict[str, Any], schema: ShardSchema, path: str):
        self.description, self.schema, self.path = description, schema, path

    def __call__(self, item: Item) -> Sample:
        row, place, window = item.payload
        layers: dict[str, Layer | None] = {}
        labels: dict[str, Any] = {}
        for name, spec in self.description["modalities"].items():
            pixels = load_array(self.path, spec["array"])[row]
            pixels = pixels[None] if pixels.ndim == 2 else pixels[spec.get("channels", slice(None))]
            layers[name] = Layer(crop(pixels, window, f"`{name}`"), gsd=float(spec["gsd"]))
        check_same_ground({f"`{name}`": layer for name, layer in layers.items()})
        layers = {name: present(layer, self.schema.modalities[name].get("nodata")) for name, layer in layers.items()}
        for name, spec in self.description["labels"].items():
            value = load_array(self.path, spec["array"])[row]
            if spec["kind"] in ("mask", "map"):
                value = crop(value[spec["channel"]] if "channel" in spec else value, window, f"`{name}`")
            labels[name] = value
        return Sample(item.id, place, layers, labels)

    def size(self, item: Item) -> tuple[int, int]:
        return max(load_array(self.path, spec["array"]).shape[-2:] for spec in self.description["modalities"].values())


def prepare(arguments: NpzArguments) -> Plan:
    path = arguments.source
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path} (--source).")
    description = load(arguments.description)
    schema, count = describe(description, path)
    digits = len(str(max(count - 1, 0)))
    ids = texts(path, description.get("id"), count)
    ids = ids or [f"{Path(path).stem}-{row:0{digits}d}" for row in range(count)]
    places = texts(path, description.get("place"), count) or ids
    items = [Item(id, f"{path}, row {row}", Source(row, place)) for row, (id, place) in enumerate(zip(ids, places))]
    reader = Reader(description, schema, path)
    return Plan(items, reader, schema, reader.size)


main = partial(run, NpzArguments, prepare, __doc__)

if __name__ == "__main__":
    sys.exit(main())
