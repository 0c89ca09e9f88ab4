"""Samples a second from shards, beside the same chips as GeoTIFF and as nested arrays, in one run, as ratios.

    python benchmarks/data.py                         # chips of 64 pixels, one process: about two minutes
    python benchmarks/data.py --size 120 --repetitions 9
    python benchmarks/data.py --memory                # a shard of 1 GB: the most that streaming it takes

The chips are made up: Sentinel-1 (2 bands, float32), Sentinel-2 (12 bands, uint16) and elevation (int16), one GeoTIFF
per sensor. Every way of reading ends in the same batches: normalised float32, by the same processor. The ways take
turns; printed are the median ratio and its quartiles. All files are in the page cache.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import rasterio
import torch
from rasterio.transform import from_origin
from transformers import HfArgumentParser
from transformers.utils import logging

from modeling_mapex import MapexConfig, MapexImageProcessor
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import load_shards, stream_shards
from modeling_mapex.sensors_mapex import get_sensor
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item, write_shards


SENSORS = ("s1", "s2", "dem")
SCHEMA = ShardSchema(
    {
        "s1": {"bands": get_sensor("s1").band_names, "unit": "db", "gsd": 10.0, "dtype": "float32"},
        "s2": {"bands": get_sensor("s2").band_names, "unit": "dn", "gsd": 10.0, "dtype": "uint16", "nodata": 0},
        "dem": {"bands": ["elevation"], "unit": "metres", "gsd": 10.0, "dtype": "int16", "nodata": -9999},
    }
)
TRANSFORM = from_origin(500_000, 5_000_000, 10, 10)


@dataclass
class Arguments:
    samples: int = field(default=512, metadata={"help": "Chips."})
    size: int = field(default=64, metadata={"help": "Side of a chip in pixels."})
    batch_size: int = field(default=32, metadata={"help": "Chips a batch."})
    repetitions: int = field(default=7, metadata={"help": "Rounds in which each way of reading has its turn."})
    threads: int = field(default=1, metadata={"help": "Threads of torch, as in a worker of a DataLoader."})
    memory: bool = field(default=False, metadata={"help": "Measure memory instead of speed."})


def chip(index: int, size: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(index)
    return {
        "s1": generator.normal(-14, 4, (2, size, size)).astype(np.float32),
        "s2": generator.integers(200, 4000, (12, size, size), dtype=np.uint16),
        "dem": generator.integers(0, 900, (1, size, size), dtype=np.int16),
    }


def write_geotiffs(folder: Path, args: Arguments) -> list[dict[str, Path]]:
    chips = []
    for index in range(args.samples):
        paths = {}
        for name, pixels in chip(index, args.size).items():
            paths[name] = folder / f"{index}_{name}.tif"
            profile = {"count": len(pixels), "height": args.size, "width": args.size, "dtype": pixels.dtype}
            with rasterio.open(paths[name], "w", crs="EPSG:32633", transform=TRANSFORM, **profile) as raster:
                raster.write(pixels)
        chips.append(paths)
    return chips


def read_geotiff(path: Path) -> Layer:
    with rasterio.open(path) as raster:
        return Layer(raster.read(), raster.crs.to_string(), tuple(raster.transform)[:6], 10.0)


def read_item(item: Item) -> Sample:
    return Sample(item.id, item.id, {name: read_geotiff(path) for name, path in item.payload.items()})


class Ways:
    """Ways to read the same chips; each is a function that goes over all of them in batches."""

    def __init__(self, folder: Path, args: Arguments):
        self.args = args
        self.chips = write_geotiffs(folder, args)
        self.items = [Item(str(index), str(index), paths) for index, paths in enumerate(self.chips)]
        self.shards = folder / "shards"
        write_shards(self.items, read_item, SCHEMA, self.shards, progress=False)
        config = MapexConfig.from_preset("nano", modalities=list(SENSORS))
        self.collate = MapexCollator(MapexImageProcessor.from_config(config))
        self.mapped = load_shards(self.shards, cache_dir=folder / "cache")
        self.nested = self._nested(folder).with_format("numpy")

    def _nested(self, folder: Path):
        features = {
            name: datasets.Array3D((len(spec["bands"]), self.args.size, self.args.size), spec["dtype"])
            for name, spec in SCHEMA.modalities.items()
        }
        rows = (chip(index, self.args.size) for index in range(self.args.samples))
        columns = {name: [] for name in SENSORS}
        for row in rows:
            for name in SENSORS:
                columns[name].append(row[name])
        dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        dataset.to_parquet(folder / "nested.parquet")
        return datasets.load_dataset(
            "parquet", data_files=str(folder / "nested.parquet"), split="train", cache_dir=folder / "cache"
        )

    def _sample(self, index: int, images: dict[str, np.ndarray]) -> dict:
        gsd = dict.fromkeys(SENSORS, 10.0)
        return {"id": str(index), "images": images, "sensors": SCHEMA.modalities, "gsd": gsd, "labels": {}}

    def _batches(self, samples: Iterator[dict], process: bool = True) -> None:
        batch = []
        for sample in samples:
            batch.append(sample)
            if len(batch) == self.args.batch_size:
                self._batch(batch, process)
                batch = []
        if batch:
            self._batch(batch, process)

    def _batch(self, samples: list[dict], process: bool) -> None:
        """A normalised batch, or raw arrays stacked to one as they are."""
        if process:
            self.collate(samples)
        else:
            for name in SENSORS:
                np.stack([sample["images"][name] for sample in samples])

    def geotiff(self) -> None:
        self._batches(
            self._sample(index, {name: read_geotiff(path).pixels for name, path in paths.items()})
            for index, paths in enumerate(self.chips)
        )

    def geotiff_unprocessed(self) -> None:
        self._batches(
            (
                self._sample(index, {name: read_geotiff(path).pixels for name, path in paths.items()})
                for index, paths in enumerate(self.chips)
            ),
            process=False,
        )

    def geotiff_only(self) -> None:
        for paths in self.chips:
            for path in paths.values():
                read_geotiff(path)

    def streaming(self) -> None:
        self._batches(iter(stream_shards(self.shards)))

    def shuffled_streaming(self) -> None:
        self._batches(iter(stream_shards(self.shards, seed=0)))

    def streaming_unprocessed(self) -> None:
        self._batches(iter(stream_shards(self.shards)), process=False)

    def map_style(self, process: bool = True) -> None:
        order = np.random.default_rng(0).permutation(len(self.mapped)).tolist()
        for start in range(0, len(order), self.args.batch_size):
            self._batch(self.mapped.__getitems__(order[start : start + self.args.batch_size]), process)

    def map_style_unprocessed(self) -> None:
        self.map_style(process=False)

    def nested_arrays(self) -> None:
        self._batches(self._sample(index, row) for index, row in enumerate(self.nested))

    def converting(self) -> None:
        write_shards(self.items, read_item, SCHEMA, self.shards.parent / "again", overwrite=True, progress=False)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_speed(args: Arguments, folder: Path) -> None:
    ways = Ways(folder, args)
    names = [
        *("geotiff", "geotiff_unprocessed", "geotiff_only", "streaming", "shuffled_streaming"),
        *("streaming_unprocessed", "map_style", "map_style_unprocessed", "nested_arrays", "converting"),
    ]
    for name in names:
        getattr(ways, name)()  # fill the page cache
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(args.repetitions):
        for name in names if repetition % 2 == 0 else reversed(names):
            times[name].append(seconds(getattr(ways, name)))
            print(f"\rround {repetition + 1} of {args.repetitions}: {name:24}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)

    chips = f"{args.samples} chips of {args.size} x {args.size}, 15 bands, {args.threads} thread"
    print(f"{chips}\n\n{'':58}{'ratio':>8}{'quartiles':>18}")
    rows = [
        ("streaming / GeoTIFF, samples a second", "geotiff", "streaming"),
        ("shuffled streaming / GeoTIFF, samples a second", "geotiff", "shuffled_streaming"),
        ("map-style, random order / GeoTIFF, samples a second", "geotiff", "map_style"),
        ("streaming / Array3D, samples a second", "nested_arrays", "streaming"),
        ("map-style, random order / Array3D, samples a second", "nested_arrays", "map_style"),
        ("streaming, normalised / raw, samples a second", "streaming_unprocessed", "streaming"),
        ("map-style, normalised / raw, samples a second", "map_style_unprocessed", "map_style"),
        ("GeoTIFF, normalised / raw, samples a second", "geotiff_unprocessed", "geotiff"),
        ("converting / reading the GeoTIFF, time", "converting", "geotiff_only"),
    ]
    for title, one, other in rows:
        ratios = [first / second for first, second in zip(times[one], times[other])]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(f"{title:58}{statistics.median(ratios):8.2f}{f'{low:.2f} .. {high:.2f}':>18}")


def measure_memory(args: Arguments, folder: Path) -> None:
    """One shard of about 1 GB: peak memory of this process before and after writing and streaming it."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def read(item: Item) -> Sample:
        return Sample(item.id, item.id, {name: Layer(pixels) for name, pixels in chip(item.payload, 120).items()})

    config = MapexConfig.from_preset("nano", modalities=list(SENSORS))
    collate = MapexCollator(MapexImageProcessor.from_config(config))
    items = [Item(str(index), str(index), index) for index in range(2048)]
    before = peak()
    write_shards(items, read, SCHEMA, folder, shard_bytes=1 << 40, progress=False)
    written = peak()
    batch = []
    for sample in stream_shards(folder, seed=0):
        batch.append(sample)
        if len(batch) == args.batch_size:
            collate(batch)
            batch = []
    size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    print(
        f"one shard of {size / 1e9:.2f} GB: {before:.0f} MB at the start, writing adds {written - before:.0f} MB, "
        f"streaming shuffled batches of {args.batch_size} on top of it {peak() - written:.0f} MB"
    )


def main(args: Arguments) -> None:
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        (measure_memory if args.memory else measure_speed)(args, Path(folder))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
