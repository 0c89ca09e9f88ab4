"""TerraMesh's layers, unpacked as GeoTIFF, to shards: up to six co-registered modalities and land cover.

    python conversion/convert_terramesh.py --source TerraMesh --output shards/terramesh
    python conversion/convert_terramesh.py --source TerraMesh --output shards/terramesh --chip_size 112 --workers 4

The source holds a folder for each layer (S2L2A, S2L1C, S1RTC, DEM, NDVI, S2RGB, LULC), and these a file for each chip.
The folders that are there make the schema; a chip that lacks a layer is stored without it. Chips of the same cell of
the grid (`282D_485L` of `282D_485L_3_3`) are one place.
"""

import re
import sys
from functools import partial

from conversion_common import ConversionArguments, Plan, Source, run, source_folder
from conversion_reading import check_same_ground, list_files, present, read_raster, read_size

from modeling_mapex import SENSORS
from modeling_mapex.shards_mapex import Sample, ShardSchema
from modeling_mapex.writing_mapex import Item


FOLDERS = {
    "s2": "S2L2A",
    "s2_l1c": "S2L1C",
    "s1": "S1RTC",
    "dem": "DEM",
    "ndvi": "NDVI",
    "rgb": "S2RGB",
    "lulc": "LULC",
}
# Elevation and the vegetation index, a sensor of its own, come on the grid of Sentinel-2.
MODALITIES = {
    "s2": {"bands": SENSORS["s2"].band_names, "unit": "dn", "gsd": 10.0, "dtype": "int16", "nodata": 0},
    "s2_l1c": {"bands": SENSORS["s2_l1c"].band_names, "unit": "dn", "gsd": 10.0, "dtype": "int16", "nodata": 0},
    "s1": {"bands": SENSORS["s1"].band_names, "unit": "db", "gsd": 10.0, "dtype": "float64", "nodata": -9999.0},
    "dem": {"bands": ["elevation"], "unit": "metres", "gsd": 10.0, "dtype": "int16", "nodata": [-9999, -32768]},
    "ndvi": {"bands": ["ndvi"], "unit": "index", "gsd": 10.0, "dtype": "float64"},
    "rgb": {"bands": ["R", "G", "B"], "unit": "uint8", "gsd": 10.0, "dtype": "uint8"},
}
LAND_COVER = [
    [1, "water"],
    [2, "trees"],
    [3, "flooded_vegetation"],
    [4, "crops"],
    [5, "built_area"],
    [6, "bare_ground"],
    [7, "snow_ice"],
    [8, "clouds"],
    [9, "rangeland"],
]
LABELS = {"lulc": {"kind": "mask", "names": LAND_COVER, "ignore_index": 0, "dtype": "uint8"}}


def prepare(arguments: ConversionArguments) -> Plan:
    source = source_folder(arguments)
    there = {name: folder for name, folder in FOLDERS.items() if (source / folder).is_dir()}
    if not set(there) & set(MODALITIES):
        raise ValueError(f"{source} holds none of the folders {[FOLDERS[name] for name in MODALITIES]}.")
    chips: dict[str, dict[str, str]] = {}
    for name, folder in there.items():
        for file in list_files(source / folder, ".tif"):
            chips.setdefault(file.stem, {})[name] = str(file)
    if not chips:
        raise ValueError(f"The folders {list(there.values())} in {source} hold no .tif.")
    schema = ShardSchema(
        {name: spec for name, spec in MODALITIES.items() if name in there},
        {name: spec for name, spec in LABELS.items() if name in there},
        title="TerraMesh",
    )
    items = []
    for chip, files in sorted(chips.items()):
        cell = re.match(r"\d+[UD]_\d+[LR](?=_)", chip)
        items.append(Item(chip, next(iter(files.values())), Source(files, cell.group() if cell else chip)))
    return Plan(items, read, schema, size)


def size(item: Item) -> tuple[int, int]:
    return max(map(read_size, item.payload.files.values()))


def read(item: Item) -> Sample:
    files, place, window = item.payload
    layers = {name: read_raster(path, window=window) for name, path in files.items()}
    check_same_ground({files[name]: layer for name, layer in layers.items()})
    images = {name: present(layers[name], spec.get("nodata")) for name, spec in MODALITIES.items() if name in layers}
    labels = {name: layers[name].pixels[0] for name in LABELS if name in layers}
    return Sample(item.id, place, images, labels)


main = partial(run, ConversionArguments, prepare, __doc__)

if __name__ == "__main__":
    sys.exit(main())
