"""Run by test_data_mapex.py: write one shard of COUNT samples of 120 kB and stream it; prints megabytes of the shard,
and the most that writing and reading added to the process.

python tests/stream_peak_memory.py FOLDER COUNT
"""

import os
import sys
from pathlib import Path

import numpy as np
from peak_memory import peak_megabytes, reset_peak

from modeling_mapex.data_mapex import stream_shards
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item, write_shards


SCHEMA = ShardSchema({"s2": {"bands": ["B04"], "unit": "dn", "gsd": 10.0, "dtype": "uint16"}})


def read(item: Item) -> Sample:
    pixels = np.random.default_rng(item.payload).integers(1, 9999, (1, 245, 245), dtype=np.uint16)
    return Sample(item.id, item.id, {"s2": Layer(pixels)})


def main(folder: Path, count: int) -> None:
    reset_peak()
    before = peak_megabytes()
    items = [Item(str(index), str(index), index) for index in range(count)]
    report = write_shards(items, read, SCHEMA, folder, shard_bytes=1 << 40, progress=False)
    total = sum(int(sample["images"]["s2"][0, 0, 0]) for sample in stream_shards(folder, seed=0, window=64))
    assert total > 0 and len(report.shards) == 1
    print(report.shards[0].stat().st_size / 1e6, peak_megabytes() - before, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # past this line there is nothing to test; arrow's threads may not outlive the interpreter in peace
