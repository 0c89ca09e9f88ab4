"""Sen1Floods11's hand-labelled chips to shards: Sentinel-1, Sentinel-2 where it is there, and water.

    python conversion/convert_sen1floods11.py --source Sen1Floods11/HandLabeled --output shards/sen1floods11
    python conversion/convert_sen1floods11.py --source HandLabeled --output shards/sen1floods11 --chip_size 256

The source holds `S1Hand`, `LabelHand` and perhaps `S2Hand`. The files are in degrees; metres per pixel are those at the
latitude of the chip. Pixels of radar without data are NaN.
"""

import sys
from functools import partial

from conversion_common import ConversionArguments, Plan, Source, run, source_folder
from conversion_reading import check_same_ground, list_files, missing_file, present, read_raster, read_size

from modeling_mapex import SENSORS
from modeling_mapex.shards_mapex import Sample, ShardSchema
from modeling_mapex.writing_mapex import Item


LAYERS = {"s1": "S1Hand", "s2_l1c": "S2Hand", "water": "LabelHand"}
SCHEMA = ShardSchema(
    modalities={
        "s1": {"bands": SENSORS["s1"].band_names, "unit": "db", "gsd": 10.0, "dtype": "float32"},
        "s2_l1c": {"bands": SENSORS["s2_l1c"].band_names, "unit": "dn", "gsd": 10.0, "dtype": "int16", "nodata": 0},
    },
    labels={"water": {"kind": "mask", "names": [[0, "land"], [1, "water"]], "ignore_index": -1, "dtype": "int16"}},
    title="Sen1Floods11, hand-labelled",
)


def prepare(arguments: ConversionArguments) -> Plan:
    source = source_folder(arguments)
    chips: dict[str, dict[str, str]] = {}
    for name, folder in LAYERS.items():
        ending = f"_{folder}.tif"
        for file in list_files(source / folder, ending) if (source / folder).is_dir() else ():
            chips.setdefault(file.name.removesuffix(ending), {})[name] = str(file)
    if not chips:
        raise ValueError(f"{source} holds no chips like S1Hand/Ghana_97059_S1Hand.tif.")
    items = []
    for chip, files in sorted(chips.items()):
        lacking = [LAYERS[name] for name in ("s1", "water") if name not in files]
        payload = Source(files, chip)
        if lacking:
            payload = missing_file(source / lacking[0] / f"{chip}_{lacking[0]}.tif", "a chip needs radar and its label")
        items.append(Item(chip, next(iter(files.values())), payload))
    return Plan(items, read, SCHEMA, size)


def size(item: Item) -> tuple[int, int]:
    return read_size(item.payload.files["s1"])


def read(item: Item) -> Sample:
    files, place, window = item.payload
    layers = {name: read_raster(path, window=window) for name, path in files.items()}
    check_same_ground({files[name]: layer for name, layer in layers.items()})
    water = layers.pop("water").pixels[0]
    images = {name: present(layer, SCHEMA.modalities[name].get("nodata")) for name, layer in layers.items()}
    return Sample(item.id, place, images, {"water": water})


main = partial(run, ConversionArguments, prepare, __doc__)

if __name__ == "__main__":
    sys.exit(main())
