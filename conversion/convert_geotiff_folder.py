r"""Any co-registered GeoTIFFs, described by a small YAML file, to shards.

    python conversion/convert_geotiff_folder.py --source campaign --description campaign.yaml --output shards/campaign
    python conversion/convert_geotiff_folder.py --source campaign --description campaign.yaml --output shards/chips \\
        --chip_size 256 --workers 4

The description says which files belong together: what stands for `{id}` in their patterns is the same for all files of
a sample, and may hold one folder (`Forest/Forest_12`). conversion/descriptions/geotiff_example.yaml explains every key.
Layers may differ in resolution but must cover the same ground in one coordinate system; nothing is reprojected.
"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from conversion_common import ConversionArguments, Plan, Source, run, source_folder
from conversion_reading import (
    Header,
    Window,
    check_same_ground,
    missing_file,
    present,
    read_header,
    read_raster,
    read_size,
)
from conversion_yaml import check_keys, check_sensor, check_values, class_names, load_sections

from modeling_mapex import SENSORS
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema, mask_names
from modeling_mapex.writing_mapex import Item


FILE_KEYS = ["channels", "gsd", "optional"]
LABEL_KEYS = {  # needed, possible
    "mask": (["kind", "pattern"], ["names", "ignore_index", *FILE_KEYS]),
    "map": (["kind", "pattern"], ["unit", "nodata", *FILE_KEYS]),
    "class": (["kind", "folder"], []),
}


@dataclass(kw_only=True)
class GeoTiffArguments(ConversionArguments):
    description: str = field(metadata={"help": "YAML file that says which files are what."})


def load(path: str) -> dict[str, Any]:
    """The description, checked as far as that goes without files."""
    description = load_sections(path, ["place", "place_regex"])
    for name, spec in description["modalities"].items():
        where = f"{path}: modality `{name}`"
        check_keys(where, spec, ["pattern", "bands", "unit"], [*FILE_KEYS, "nodata", "sensor", "dn_offset"])
        check_values(where, spec)
        check_sensor(where, name, spec)
        num_channels = 1 if spec["unit"] == "class" else len(spec["bands"])
        if "channels" in spec and len(spec["channels"]) != num_channels:
            raise ValueError(f"{where}: {len(spec['channels'])} `channels` for {num_channels} `bands`.")
    for name, spec in description["labels"].items():
        where = f"{path}: label `{name}`"
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind not in LABEL_KEYS:
            raise ValueError(f"{where}: `kind` must be one of {list(LABEL_KEYS)}, is {kind!r}.")
        check_keys(where, spec, *LABEL_KEYS[kind])
        check_values(where, spec)
        if kind == "class" and spec["folder"] is not True:
            raise ValueError(f"{where}: `folder` must be true: the class is the name of the folder.")
        if "names" in spec:
            spec["names"] = class_names(where, spec["names"])
        if isinstance(spec.get("nodata"), list):
            raise ValueError(f"{where}: a map has one `nodata`, got {spec['nodata']}.")
        if len(spec.get("channels", [1])) != 1:
            raise ValueError(f"{where}: a label is one channel; got `channels: {spec['channels']}`.")
    for name, spec in layers_of(description).items():
        if "{id}" not in spec["pattern"]:
            raise ValueError(f"{path}: the pattern of `{name}` has no {{id}}: {spec['pattern']!r}.")
    if "place_regex" in description:
        if "place" in description:
            raise ValueError(f"{path}: give `place` or `place_regex`, not both.")
        try:
            groups = re.compile(description["place_regex"]).groups
        except re.error as error:
            raise ValueError(f"{path}: `place_regex` is no regular expression: {error}.") from error
        if groups < 1:
            raise ValueError(f"{path}: `place_regex` needs a group (...) that matches the place.")
    return description


def layers_of(description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All that comes from files: modalities and labels."""
    entries = description["modalities"] | description["labels"]
    return {name: spec for name, spec in entries.items() if "pattern" in spec}


def compile_pattern(pattern: str) -> re.Pattern:
    first, *others = (re.escape(part) for part in pattern.split("{id}"))
    # The id's first appearance may hold a folder; all others repeat it.
    return re.compile(f"{first}(?P<id>[^/]+?(?:/[^/]+?)?){'(?P=id)'.join(others)}")


def find_files(source: Path) -> Iterator[str]:
    """All files below `source`, relative to it."""

    def refuse(error: OSError):  # a folder that may not be listed is not an empty one
        raise error

    for folder, folders, files in os.walk(source, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(source)
        yield from ((relative / name).as_posix() for name in files if not name.startswith("."))


def find_samples(source: Path, layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Id to layer to file, sorted by id.

    A file that fits several patterns (`{id}.tif`, `{id}_label.tif`) belongs to the one with the shortest id.
    """
    patterns = {name: compile_pattern(spec["pattern"]) for name, spec in layers.items()}
    samples: dict[str, dict[str, str]] = {}
    for file in find_files(source):
        matches = {name: pattern.fullmatch(file) for name, pattern in patterns.items()}
        ids = {name: match["id"] for name, match in matches.items() if match}
        shortest = min(map(len, ids.values()), default=0)
        for name, id in ids.items():
            if len(id) == shortest:
                samples.setdefault(id, {})[name] = str(source / file)
    empty = [
        spec["pattern"]
        for name, spec in layers.items()
        if not spec.get("optional") and not any(name in files for files in samples.values())
    ]
    if empty:
        raise ValueError(f"No file in {source} matches {empty}. Patterns are relative to --source.")
    # In an order that does not depend on the file system's.
    return {id: {name: files[name] for name in layers if name in files} for id, files in sorted(samples.items())}


def read_layer(path: str, spec: dict[str, Any], window: Window | None = None, check=None) -> Layer:
    return read_raster(path, spec.get("channels"), window, spec.get("gsd"), check)


def first_readable(files: list[str], spec: dict[str, Any]) -> tuple[Layer, Header]:
    """The middle of the layer of the first file that can be read, and what it says of itself: they stand for all."""
    failure = None
    for file in files:
        try:
            header = read_header(file)
            height, width = header.height, header.width
            # Symmetric, for in degrees the resolution depends on where the middle is; and a file may be large.
            middle = Window((height - 1) // 2, (width - 1) // 2, 2 - height % 2, 2 - width % 2, (height, width))
            return read_layer(file, spec, middle), header
        except (OSError, ValueError) as error:
            failure = failure or error
    raise ValueError(f"Not one file that matches {spec['pattern']} can be read; the first: {failure}")


def numbers_of(nodata: Any) -> Any:
    """Values that mark missing data, one or a list, without NaN, which does so anyway; `None` if that is all."""
    if isinstance(nodata, list):
        return [value for value in nodata if not np.isnan(value)] or None
    return None if nodata is None or np.isnan(nodata) else nodata


def describe(description: dict[str, Any], samples: dict[str, dict[str, str]]) -> ShardSchema:
    """The schema: what the YAML says, and what it leaves to the files."""
    modalities: dict[str, dict[str, Any]] = {}
    labels: dict[str, dict[str, Any]] = {}
    found = {name: [files[name] for files in samples.values() if name in files] for name in layers_of(description)}
    for name, spec in description["modalities"].items():
        if not found[name]:
            raise ValueError(f"No file matches {spec['pattern']}: leave the optional `{name}` out of the description.")
        layer, header = first_readable(found[name], spec)
        if "channels" not in spec and len(layer.pixels) != (1 if spec["unit"] == "class" else len(spec["bands"])):
            raise ValueError(
                f"{found[name][0]} has {len(layer.pixels)} channels, the description of `{name}` has the bands "
                f"{spec['bands']}. Correct `bands`, or pick channels of the file: `channels: [1, 2]`."
            )
        entry = {key: spec[key] for key in ("bands", "unit", "sensor", "dn_offset") if key in spec}
        entry |= {"gsd": float(spec.get("gsd", layer.gsd)), "dtype": str(layer.pixels.dtype)}
        sensor = SENSORS.get(spec.get("sensor", name))
        named = [header.names[channel - 1] for channel in spec.get("channels", range(1, len(header.names) + 1))]
        if named != entry["bands"] and set(named) == set(entry["bands"]):
            raise ValueError(
                f"{found[name][0]} calls its channels {named}, the description of `{name}` {entry['bands']}: correct "
                "the order of `bands`."
            )
        nodata = spec.get("nodata", header.nodata)
        if nodata is None and sensor is not None:
            nodata = list(sensor.nodata) or None
        if (numbers := numbers_of(nodata)) is not None:
            entry["nodata"] = numbers
        modalities[name] = entry
    for name, spec in description["labels"].items():
        entry = {key: spec[key] for key in ("kind", "names", "ignore_index", "unit", "nodata") if key in spec}
        if spec["kind"] == "class":
            flat = [id for id in samples if "/" not in id]
            if flat:
                raise ValueError(f"`{name}` is the folder in {{id}}, but some ids have none, like `{flat[0]}`.")
            entry["names"] = sorted({id.split("/")[0] for id in samples})
        elif not found[name]:
            raise ValueError(f"No file matches {spec['pattern']}: leave the optional `{name}` out of the description.")
        else:
            layer, header = first_readable(found[name], spec)
            if len(layer.pixels) != 1:
                raise ValueError(f"{found[name][0]} has {len(layer.pixels)} channels: pick one, like `channels: [1]`.")
            entry["dtype"] = str(layer.pixels.dtype)
            marker = numbers_of(header.nodata)
            if marker is not None and spec["kind"] == "map":
                entry.setdefault("nodata", marker)
            elif marker is not None and marker not in mask_names(entry):  # else it is a class, whatever files say
                entry.setdefault("ignore_index", int(marker))
        labels[name] = entry
    return ShardSchema(modalities, labels, title=str(description.get("title", "")))


def place_of(description: dict[str, Any], id: str) -> str:
    if "place_regex" in description:
        match = re.match(description["place_regex"], id)
        if not match:
            raise ValueError(f"`place_regex` {description['place_regex']!r} does not match the id `{id}`")
        return match.group(1)
    return str(description.get("place", "{id}")).replace("{id}", id)


class Reader:
    """Reads a sample by description and schema."""

    def __init__(self, description: dict[str, Any], schema: ShardSchema):
        self.layers, self.schema = layers_of(description), schema

    def __call__(self, item: Item) -> Sample:
        files, place, window = item.payload
        layers = {
            name: read_layer(path, self.layers[name], window, partial(self.check_header, name, path))
            for name, path in files.items()
        }
        check_same_ground({files[name]: layer for name, layer in layers.items()})
        images: dict[str, Layer | None] = {}
        labels: dict[str, Any] = {}
        for name, layer in layers.items():
            if name in self.schema.modalities:
                images[name] = present(layer, self.schema.modalities[name].get("nodata"))
            elif len(layer.pixels) != 1:
                raise ValueError(f"{files[name]} has {len(layer.pixels)} channels, a label has one")
            else:
                labels[name] = layer.pixels[0]
        for name, spec in self.schema.labels.items():
            if spec["kind"] == "class":
                labels[name] = spec["names"].index(item.id.split("/")[0])
        return Sample(item.id, place, images, labels)

    def check_header(self, name: str, path: str, header: Header) -> None:
        """Raise `ValueError` for a file that marks missing data otherwise than the schema says."""
        spec = self.schema.modalities.get(name) or self.schema.labels[name]
        if spec.get("kind") == "mask":
            return  # whose codes are checked one by one
        known = np.atleast_1d(spec.get("nodata", [])).tolist()
        if header.has_mask and not known:
            raise ValueError(
                f"{path} marks pixels without data in a mask, which is not read: write it into the pixels "
                "(`gdalwarp -dstnodata VALUE in.tif out.tif`)"
            )
        marker = numbers_of(header.nodata)
        if "nodata" not in self.layers[name] and marker is not None and marker not in known:
            raise ValueError(
                f"{path} marks pixels without data by {marker:g}, others of `{name}` by {known or 'nothing'}: bring "
                "the files to one value, or, of a modality, name all in the description, `nodata: [...]`"
            )

    def size(self, item: Item) -> tuple[int, int]:
        """Of the data set's finest modality, also where this sample lacks it: all chips cover as much ground."""
        gsd = {name: spec["gsd"] for name, spec in self.schema.modalities.items()}
        here = [name for name in item.payload.files if name in gsd]
        if not here:
            raise ValueError("has no modality at all")
        finest = min(here, key=gsd.get)
        times = gsd[finest] / min(gsd.values())
        if abs(times - round(times)) > 0.01 * times:
            raise ValueError(
                f"lacks the finest modality, and a pixel of `{finest}` is {times:g} of its pixels wide: no chip fits"
            )
        return tuple(side * round(times) for side in read_size(item.payload.files[finest]))


def prepare(arguments: GeoTiffArguments) -> Plan:
    source = source_folder(arguments)
    description = load(arguments.description)
    layers = layers_of(description)
    samples = find_samples(source, layers)
    schema = describe(description, samples)
    items = []
    for id, files in samples.items():
        lacking = [name for name, spec in layers.items() if name not in files and not spec.get("optional")]
        payload: Any
        if lacking:
            path = source / layers[lacking[0]]["pattern"].replace("{id}", id)
            payload = missing_file(path, f"`{lacking[0]}` is not `optional: true`")
        else:
            try:
                payload = Source(files, place_of(description, id))
            except ValueError as error:
                payload = error
        items.append(Item(id, next(iter(files.values())), payload))
    reader = Reader(description, schema)
    return Plan(items, reader, schema, reader.size)


main = partial(run, GeoTiffArguments, prepare, __doc__)

if __name__ == "__main__":
    sys.exit(main())
