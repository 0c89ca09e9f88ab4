"""BigEarthNet's folders of patches, Sentinel-2 and Sentinel-1, to shards.

    python conversion/convert_bigearthnet.py --source BigEarthNet --output shards/bigearthnet
    python conversion/convert_bigearthnet.py --source BigEarthNet --output shards/bigearthnet --workers 8 --resume
    python conversion/convert_bigearthnet.py --source BigEarthNet-v1.0 --output shards/bigearthnet --allow_missing

The source holds, at any depth, folders of patches as they are unpacked: `S2A_MSIL2A_..._87_48` with a GeoTIFF for each
of 12 bands and `..._labels_metadata.json`, and `S1A_IW_GRDH_..._87_48` with `_VV.tif`, `_VH.tif` and a JSON that names
its Sentinel-2 patch. Bands of 20 and 60 m are repeated, bit for bit, onto the grid of 10 m. The place is the tile, so
that two dates of the same ground stay together.
"""

import os
import re
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from conversion_common import ConversionArguments, Plan, Source, run, source_folder
from conversion_reading import check_same_ground, crop, missing_file, present, read_json, read_raster, read_size

from modeling_mapex import SENSORS
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item


# The level-3 classes of CORINE Land Cover that occur, in the order of their codes, as the patches spell them.
LABELS = [
    "Continuous urban fabric",
    "Discontinuous urban fabric",
    "Industrial or commercial units",
    "Road and rail networks and associated land",
    "Port areas",
    "Airports",
    "Mineral extraction sites",
    "Dump sites",
    "Construction sites",
    "Green urban areas",
    "Sport and leisure facilities",
    "Non-irrigated arable land",
    "Permanently irrigated land",
    "Rice fields",
    "Vineyards",
    "Fruit trees and berry plantations",
    "Olive groves",
    "Pastures",
    "Annual crops associated with permanent crops",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland",
    "Moors and heathland",
    "Sclerophyllous vegetation",
    "Transitional woodland/shrub",
    "Beaches, dunes, sands",
    "Bare rock",
    "Sparsely vegetated areas",
    "Burnt areas",
    "Inland marshes",
    "Peatbogs",
    "Salt marshes",
    "Salines",
    "Intertidal flats",
    "Water courses",
    "Water bodies",
    "Coastal lagoons",
    "Estuaries",
    "Sea and ocean",
]
BANDS = {name: SENSORS[name].band_names for name in ("s1", "s2")}
NODATA = {"s1": -9999.0, "s2": 0}
SCHEMA = ShardSchema(
    modalities={
        "s1": {"bands": BANDS["s1"], "unit": "db", "gsd": 10.0, "dtype": "float32", "nodata": NODATA["s1"]},
        "s2": {"bands": BANDS["s2"], "unit": "dn", "gsd": 10.0, "dtype": "uint16", "nodata": NODATA["s2"]},
    },
    labels={"labels": {"kind": "multi_label", "names": LABELS}},
    title="BigEarthNet",
)
SENTINEL_1, SENTINEL_2 = re.compile(r"S1[A-D]_IW_"), re.compile(r"S2[A-D]_MSIL2A_")


@dataclass(kw_only=True)
class BigEarthNetArguments(ConversionArguments):
    allow_missing: bool = field(
        default=False, metadata={"help": "Keep patches of one sensor whose partner is missing, without it."}
    )


def find_patches(folder: Path) -> list[Path]:
    """All patch folders below `folder`, by name; patches themselves are not listed, there are half a million."""
    found, open_folders = [], [str(folder)]
    while open_folders:
        with os.scandir(open_folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    patch = SENTINEL_1.match(entry.name) or SENTINEL_2.match(entry.name)
                    (found if patch else open_folders).append(entry.path)
    return sorted(map(Path, found), key=lambda path: (path.name, str(path)))


def metadata_file(patch: Path) -> Path:
    return patch / f"{patch.name}_labels_metadata.json"


def prepare(arguments: BigEarthNetArguments) -> Plan:
    source = source_folder(arguments)
    patches = find_patches(source)
    if not patches:
        raise ValueError(f"{source} holds no patch: no folder named like S2A_MSIL2A_... or S1A_IW_....")
    optical = [path for path in patches if SENTINEL_2.match(path.name)]
    items: list[tuple[str, Item]] = []
    radar: dict[str, list[Path]] = {}
    for path in patches:
        if SENTINEL_1.match(path.name):
            try:
                radar.setdefault(read_json(metadata_file(path))["corresponding_s2_patch"], []).append(path)
            except KeyError as error:
                error = ValueError(f"{metadata_file(path)} lacks {error}")
                items.append((path.name, Item(path.name, str(path), error)))
            except (OSError, ValueError) as error:
                items.append((path.name, Item(path.name, str(path), error)))
    for path in optical:
        partners = radar.pop(path.name, [])
        for partner in partners or [None]:
            payload = Source({"s1": partner, "s2": path})
            if partner is None and not arguments.allow_missing:
                payload = missing_file("its Sentinel-1 patch", "no S1 folder names it; --allow_missing keeps it")
            items.append((path.name, Item(path.name, str(path), payload)))
    for name, partners in radar.items():
        for partner in partners:
            payload = Source({"s1": partner, "s2": None})
            if not arguments.allow_missing:
                payload = missing_file(f"its Sentinel-2 patch {name}", "--allow_missing keeps it")
            items.append((name, Item(name, str(partner), payload)))
    return Plan([item for _, item in sorted(items, key=lambda entry: entry[:1])], read, SCHEMA, size)


def band_file(patch: Path, band: str) -> Path:
    return patch / f"{patch.name}_{band}.tif"


def size(item: Item) -> tuple[int, int]:
    s1, s2 = item.payload.files["s1"], item.payload.files["s2"]
    return read_size(band_file(s1, "VV") if s2 is None else band_file(s2, "B02"))


def read_patch(patch: Path, bands: list[str]) -> Layer:
    """All bands on the grid of the finest one."""
    files = [band_file(patch, band) for band in bands]
    layers = [read_raster(file) for file in files]
    check_same_ground(dict(zip(map(str, files), layers)))
    finest = max(layers, key=lambda layer: layer.pixels.shape[1])
    height, width = finest.pixels.shape[1:]
    pixels = np.empty((len(bands), height, width), finest.pixels.dtype)
    for file, layer, target in zip(files, layers, pixels):
        (band,) = layer.pixels
        down, across = height // band.shape[0], width // band.shape[1]
        if band.dtype != pixels.dtype or (height, width) != (down * band.shape[0], across * band.shape[1]):
            raise ValueError(
                f"{file} is {band.dtype} of {band.shape[0]} x {band.shape[1]} pixels, which does not fit the finest "
                f"band's {pixels.dtype} of {height} x {width}"
            )
        target.reshape(band.shape[0], down, band.shape[1], across)[:] = band[:, None, :, None]
    return finest._replace(pixels=pixels)


def read(item: Item) -> Sample:
    patches, _, window = item.payload
    layers = {name: None if patch is None else read_patch(patch, BANDS[name]) for name, patch in patches.items()}
    check_same_ground({str(patches[name]): layer for name, layer in layers.items()})
    layers = {name: layer and piece(layer, window, name) for name, layer in layers.items()}
    labelled = patches["s2"] or patches["s1"]
    description = read_json(metadata_file(labelled))
    unknown = set(description["labels"]) - set(LABELS)
    if unknown:
        raise ValueError(f"{metadata_file(labelled)} has labels {sorted(unknown)}, which are no classes of BigEarthNet")
    return Sample(
        item.id,
        place(patches["s1"], patches["s2"], description),
        {name: layer and present(layer, NODATA[name]) for name, layer in layers.items()},
        {"labels": [int(name in description["labels"]) for name in LABELS]},
    )


def piece(layer: Layer, window, name: str) -> Layer:
    if window is None:
        return layer
    top, left, _, _ = window.on(*layer.pixels.shape[1:], name)
    a, b, c, d, e, f = layer.transform
    transform = (a, b, c + a * left + b * top, d, e, f + d * left + e * top)
    return layer._replace(pixels=crop(layer.pixels, window, name), transform=transform)


def place(s1: Path | None, s2: Path | None, description: dict) -> str:
    """The tile, like `33UUP`: from the Sentinel-2 product's name, or the Sentinel-1 patch's; else the scene's name."""
    if s2 is None:
        return s1.name.split("_")[-3]
    tile = re.search(r"_T(\d\d[A-Z]{3})_", f"{s2.name} {description.get('tile_source', '')}")
    return tile.group(1) if tile else s2.name.rsplit("_", 2)[0]


main = partial(run, BigEarthNetArguments, prepare, __doc__)

if __name__ == "__main__":
    sys.exit(main())
