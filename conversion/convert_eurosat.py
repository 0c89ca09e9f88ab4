"""EuroSAT's folders of classes to shards: the RGB version (jpg) or the one of all 13 bands (tif).

    python conversion/convert_eurosat.py --source EuroSAT_RGB --output shards/eurosat_rgb
    python conversion/convert_eurosat.py --source EuroSAT_MS --output shards/eurosat_ms --workers 4

The source holds a folder for each class. Bands stay in the order of the files, B8A last, under their right names. Where
the chips lie is known for the tif alone, and which of them are neighbours for neither: each is a place of its own.
"""

import sys
from functools import partial

from conversion_common import ConversionArguments, Plan, Source, run, source_folder
from conversion_reading import present, read_raster, read_size

from modeling_mapex.shards_mapex import Sample, ShardSchema
from modeling_mapex.writing_mapex import Item


BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A"]
MODALITIES = {
    "rgb": {"bands": ["R", "G", "B"], "unit": "uint8", "gsd": 10.0, "dtype": "uint8"},
    "s2_l1c": {"bands": BANDS, "unit": "dn", "gsd": 10.0, "dtype": "uint16", "nodata": 0},
}
ENDINGS = {".jpg": "rgb", ".jpeg": "rgb", ".tif": "s2_l1c", ".tiff": "s2_l1c"}


def prepare(arguments: ConversionArguments) -> Plan:
    source = source_folder(arguments)
    files = [
        file
        for folder in source.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
        for file in folder.iterdir()
        if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    ]
    found = sorted({ENDINGS[file.suffix.lower()] for file in files})
    if len(found) != 1:
        state = "both jpg and tif: convert them one by one" if found else "no jpg or tif in folders of classes"
        raise ValueError(f"{source} holds {state}.")
    names = sorted({file.parent.name for file in files})
    schema = ShardSchema(
        {found[0]: MODALITIES[found[0]]}, {"label": {"kind": "class", "names": names}}, title=f"EuroSAT, {found[0]}"
    )
    items = [
        Item(file.stem, str(file), Source((found[0], str(file), names.index(file.parent.name)), file.stem))
        for file in sorted(files)
    ]
    return Plan(items, read, schema, size)


def size(item: Item) -> tuple[int, int]:
    return read_size(item.payload.files[1])


def read(item: Item) -> Sample:
    (modality, path, label), place, window = item.payload
    gsd = MODALITIES[modality]["gsd"] if modality == "rgb" else None  # a jpg cannot say it
    layer = present(read_raster(path, window=window, gsd=gsd), MODALITIES[modality].get("nodata"))
    return Sample(item.id, place, {modality: layer}, {"label": label})


main = partial(run, ConversionArguments, prepare, __doc__)

if __name__ == "__main__":
    sys.exit(main())
