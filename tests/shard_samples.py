"""Small samples and shards that the tests of the data side share."""

import numpy as np

from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item


SCHEMA = ShardSchema(
    {
        "s1": {"bands": ["VV", "VH"], "unit": "db", "gsd": 10.0, "dtype": "float32"},
        "s2": {"bands": ["B02", "B03", "B04"], "unit": "dn", "gsd": 10.0, "dtype": "uint16", "nodata": 0},
        "dem": {"bands": ["elevation"], "unit": "metres", "gsd": 30.0, "dtype": "int16"},
    },
    {
        "crop": {"kind": "class", "names": ["wheat", "maize", "rye"]},
        "cover": {"kind": "multi_label", "names": ["water", "forest"]},
        "flood": {"kind": "mask", "dtype": "int8", "names": [[0, "dry"], [1, "wet"]], "ignore_index": -1},
        "biomass": {"kind": "map", "dtype": "float32", "unit": "t/ha"},
    },
    title="made up",
)
SIZE = 24  # pixels of 10 m; 8 of 30 m


def make_sample(index: int) -> Sample:
    """Every third sample lacks radar, every fourth its mask."""
    generator = np.random.default_rng(index)
    fine = (10.0, 0.0, 500_000.0 + index, 0.0, -10.0, 5_000_000.0)
    images = {
        "s1": Layer(generator.normal(-12, 3, (2, SIZE, SIZE)).astype(np.float32), "EPSG:32633", fine),
        "s2": Layer(generator.integers(100, 4000, (3, SIZE, SIZE), dtype=np.uint16), "EPSG:32633", fine, 10.0),
        "dem": Layer(generator.integers(0, 900, (1, SIZE // 3, SIZE // 3), dtype=np.int16), gsd=30.0),
    }
    if index % 3 == 2:
        images["s1"] = None
    labels = {
        "crop": index % 3,
        "cover": [index % 2, 1],
        "flood": generator.integers(-1, 2, (SIZE, SIZE), dtype=np.int8),
        "biomass": generator.random((SIZE, SIZE), dtype=np.float32),
    }
    if index % 4 == 3:
        del labels["flood"]
    return Sample(f"chip-{index}", f"place-{index // 5}", images, labels)


def read(item: Item) -> Sample:
    """What a converter passes to `write_shards`; a payload that is a message is a broken file."""
    if isinstance(item.payload, str):
        raise OSError(item.payload)
    return make_sample(item.payload)


def items(count: int) -> list[Item]:
    return [Item(f"chip-{index}", f"chip-{index}.tif", index) for index in range(count)]


def assert_same_sample(decoded: dict, sample: Sample) -> None:
    """Bit for bit."""
    assert (decoded["id"], decoded["place"]) == (sample.id, sample.place)
    for name, layer in sample.images.items():
        if layer is None:
            assert decoded["images"][name] is None
            continue
        pixels = decoded["images"][name]
        assert pixels.dtype == layer.pixels.dtype and pixels.shape == layer.pixels.shape
        assert pixels.tobytes() == layer.pixels.tobytes()
        assert decoded["crs"][name] == layer.crs
        assert decoded["transform"][name] == (None if layer.transform is None else list(layer.transform))
        assert decoded["gsd"][name] == (layer.gsd or SCHEMA.modalities[name]["gsd"])
    for name in SCHEMA.labels:
        expected, found = sample.labels.get(name), decoded["labels"][name]
        if isinstance(expected, np.ndarray):
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
        else:
            assert found == expected
