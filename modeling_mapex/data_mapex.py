"""Reading shards with `datasets`: map-style and streaming, from a folder or the Hub, split by process and worker."""

import copy
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .shards_mapex import ShardSchema, check_number, shard_files


# With as many readers as shards, each has one shard, in every epoch another, and `places` may leave out all of one: in
# so many epochs in a row a reader may come away empty.
_EPOCHS = 30


def _locate(source: str | os.PathLike, split: str, revision: str | None, token: str | None) -> list[str]:
    """Paths of the shards for `datasets`: of a local folder, or in a data set repository on the Hub."""
    if Path(source).is_dir():
        return [str(path) for path in shard_files(source, split)]
    if not isinstance(source, str) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} is neither a folder nor the id of a data set on the Hub (`owner/name`).")
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import httpx

    pattern = f"datasets/{source}{f'@{revision}' if revision else ''}/**/{split}-[0-9]*-of-[0-9]*.parquet"
    try:
        found = sorted(HfFileSystem(token=token).glob(pattern))
    except httpx.TransportError as error:  # no OSError, as one would expect of a network
        raise ConnectionError(
            f"There is no folder {source}. Cannot reach the Hub for the data set `{source}`: {error}. Try again later."
        ) from error
    if not found:
        raise FileNotFoundError(f"No shards of the split `{split}` in the data set `{source}` on the Hub.")
    folders: dict[str, list[str]] = {}
    for path in found:
        folder, name = path.rsplit("/", 1)
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        check_number(names, split, f"{folder} on the Hub")
    return [f"hf://{path}" for path in found]


def read_schema(
    source: str | os.PathLike, split: str = "train", *, revision: str | None = None, token: str | None = None
) -> ShardSchema:
    """What the shards of a split hold.

    Args:
        source (`str`): A folder, or the id of a data set on the Hub.
        split (`str`): Name of the split.
        revision, token (`str`, *optional*): For the Hub.

    Raises:
        FileNotFoundError: there are no shards.
        ConnectionError: the Hub cannot be reached.
        ValueError: they are not of MAPEX, of an unknown version, or differ in what they hold.
    """
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = {}
    for path in _locate(source, split, revision, token):
        options = {"token": token} if path.startswith("hf://") else {}
        with fsspec.open(path, "rb", **options) as file:
            try:
                schemas[path] = ShardSchema.from_arrow(pq.read_schema(file), path)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is damaged: {error}. Convert it again, or download it again.") from error
    first, *others = schemas
    for path in others:
        if schemas[path] != schemas[first]:
            raise ValueError(f"{path} and {first} differ in what they hold: they are no shards of one data set.")
    return schemas[first]


def split_of_place(place: str, shares: dict[str, float], seed: int = 0) -> str:
    """On which side of a split the samples of a place belong. All of a place belong on one, so that no test chip has a
    neighbour in training; and always on the same, whatever else the data set holds.

    Args:
        place (`str`): The `place` of a sample.
        shares (`dict[str, float]`): Name to share of the places, like `{"train": 0.8, "test": 0.2}`; sums to 1.
        seed (`int`): Another split.

    Raises:
        ValueError: the shares do not sum to 1.
    """
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
        raise ValueError(f"The shares of a split must be positive and sum to 1, got {shares}.")
    draw = int.from_bytes(hashlib.sha256(f"{seed}-{place}".encode()).digest()[:8], "big") / 2**64
    for name, share in shares.items():
        draw -= share
        if draw < 0:
            return name
    return name


def load_shards(
    source: str | os.PathLike,
    split: str = "train",
    *,
    modalities: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    places: Callable[[str], bool] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike | None = None,
):
    """The samples of a split as a `datasets.Dataset`, with random access; each as [`ShardSchema.decode`] gives it.

    `datasets` copies the shards once into its cache, where they are read by memory mapping. Where they are too many for
    that, use [`stream_shards`].

    Args:
        source (`str`): A folder, or the id of a data set on the Hub.
        split (`str`): Name of the split.
        modalities, labels (`Sequence[str]`, *optional*): Which to read. Default: all.
        places (`Callable[[str], bool]`, *optional*): Whether to keep the samples of a place, for a split by location:
            `lambda place: split_of_place(place, {"train": 0.8, "test": 0.2}) == "train"`. Default: all.
        revision, token (`str`, *optional*): For the Hub.
        cache_dir (`str`, *optional*): Of `datasets`.

    Raises:
        FileNotFoundError, ValueError: as [`read_schema`], or an unknown modality or label.
    """
    from datasets import load_dataset

    schema = read_schema(source, split, revision=revision, token=token).select(modalities, labels)
    dataset = load_dataset(
        "parquet",
        data_files={split: _locate(source, split, revision, token)},
        split=split,
        columns=schema.to_arrow().names,
        token=token,
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    if places is not None:
        dataset = dataset.filter(places, input_columns="place")
    return dataset.with_transform(schema.decode_batch)


def stream_shards(
    source: str | os.PathLike,
    split: str = "train",
    *,
    modalities: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    places: Callable[[str], bool] | None = None,
    seed: int | None = None,
    window: int = 128,
    rank: int = 0,
    world_size: int = 1,
    revision: str | None = None,
    token: str | None = None,
) -> "ShardStream":
    """The samples of a split one after another, without a copy on disk; each as [`ShardSchema.decode`] gives it.

    Args:
        source, split, modalities, labels, places, revision, token: As for [`load_shards`].
        seed (`int`, *optional*): Shuffles the order of the shards and the samples within windows, differently in each
            epoch. Default: in the order they were written.
        window (`int`): So many samples are shuffled among themselves, and held in memory.
        rank, world_size (`int`): Which share of the samples this process sees. Whole shards if their number is a
            multiple of `world_size`; otherwise each process reads all and keeps its share. Do not let Accelerate split
            the loader again.

    Raises:
        FileNotFoundError, ValueError: as [`load_shards`].
    """
    from datasets import load_dataset
    from datasets.distributed import split_dataset_by_node
    from pyarrow.dataset import ParquetFragmentScanOptions

    schema = read_schema(source, split, revision=revision, token=token).select(modalities, labels)
    files = _locate(source, split, revision, token)
    if seed is not None:  # the first epoch's order; `set_epoch` chooses those that follow
        files = [files[index] for index in np.random.default_rng(seed).permutation(len(files))]
    dataset = load_dataset(
        "parquet",
        data_files={split: files},
        split=split,
        streaming=True,
        columns=schema.to_arrow().names,
        # Buffering ahead, the default, ends up with the whole shard in memory.
        fragment_scan_options=ParquetFragmentScanOptions(pre_buffer=False),
        token=token,
    )
    if world_size > 1:
        dataset = split_dataset_by_node(dataset, rank=rank, world_size=world_size)
    if places is not None:
        dataset = dataset.filter(places, input_columns="place")
    return ShardStream(dataset, schema, seed, window)


class _Window:
    """Permutes the samples of a window, by seed, epoch and what is in the window: the same again after a resume, which
    a shuffle buffer is not. Without a seed it leaves them as they are; a window is also the unit that is read fastest.
    """

    def __init__(self, seed: int | None):
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # reaches workers that are already running

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        if self.seed is None:
            return rows
        content = zlib.crc32("\n".join(rows["id"]).encode())
        order = np.random.default_rng([self.seed, int(self.epoch), content]).permutation(len(rows["id"]))
        return {name: [column[index] for index in order] for name, column in rows.items()}


class ShardStream(IterableDataset):
    """Samples of a split in a stream, for a `DataLoader`: split by process and worker, shuffled, resumable.

    `state_dict` and `load_state_dict` resume at the very next sample, shuffled or not. With workers, take
    `torchdata.stateful_dataloader.StatefulDataLoader`, which asks each worker for its own.

    Args:
        dataset (`datasets.IterableDataset`): Rows of shards, this process's share.
        schema (`ShardSchema`): What they hold.
        seed (`int`, *optional*): Shuffles.
        window (`int`): So many samples are shuffled among themselves.
    """

    def __init__(self, dataset, schema: ShardSchema, seed: int | None = None, window: int = 128):
        self.schema = schema
        self.window = _Window(seed)
        self.dataset = dataset.map(self.window, batched=True, batch_size=window)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.dataset:
            yield self.schema.decode(row)
        # `datasets` would begin where it was resumed again, as long as its own number of the epoch stays the same.
        self.dataset.load_state_dict(None)

    @property
    def num_shards(self) -> int:
        """More workers than this have nothing to do."""
        return self.dataset.num_shards

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; takes effect when it begins. Without a seed all are alike."""
        self.window.epoch.fill_(epoch)
        if self.window.seed is not None:
            # `datasets` orders shards by this number alone: the same for every data set and seed, if it were the epoch.
            self.dataset.set_epoch(zlib.crc32(f"{self.window.seed}-{epoch}".encode()) if epoch else 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: plain data."""
        return {"epoch": int(self.window.epoch), "stream": self.dataset.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from [`ShardStream.state_dict`] when next iterated."""
        self.set_epoch(state["epoch"])
        self.dataset.load_state_dict(state["stream"])


class MixedShardStream(IterableDataset):
    """Samples of several streams in one that never ends: each is drawn from a stream at random, by weight, and a stream
    that comes to its end begins its next epoch. Samples get a key `"epoch"`, that of their own stream.

    Resumable as [`ShardStream`] is. With workers, each draws its own mixture; a stream with fewer shards than there are
    workers is read by as many of them as it has shards.

    Args:
        streams (`dict[str, ShardStream]`): By name; all of this process's share.
        weights (`dict[str, float]`, *optional*): Share of the samples, of those names. Default: all alike.
        seed (`int`): Of the draws; give each process its own.

    Raises:
        ValueError: no streams, weights of other names or not positive, or (when iterated) a stream without samples.
    """

    def __init__(self, streams: dict[str, ShardStream], weights: dict[str, float] | None = None, seed: int = 0):
        weights = dict.fromkeys(streams, 1.0) if weights is None else weights
        if not streams or set(weights) != set(streams):
            raise ValueError(f"The weights of {sorted(weights)} do not belong to the streams {sorted(streams)}.")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
            raise ValueError(f"Weights must be above 0: leave out what is not wanted; got {weights}.")
        self.streams = streams
        self.weights = weights
        self.seed = seed
        self._drawn = 0  # samples so far
        self._in_worker = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        part, parts = self._become_part()
        mine = [name for name, stream in self.streams.items() if part < stream.num_shards]
        if not mine:
            most = max(stream.num_shards for stream in self.streams.values())
            raise ValueError(
                f"Worker {part} of {parts} has nothing to read: the data sets have at most {most} shards for this "
                f"process. Use at most {most} workers."
            )
        # What one worker lacks the others must make up for: a stream read by few of them weighs more there.
        readers = {name: min(self.streams[name].num_shards, parts) for name in mine}
        weights = np.array([self.weights[name] / readers[name] for name in mine])
        bounds = np.cumsum(weights / weights.sum())
        iterators = {name: iter(self.streams[name]) for name in mine}
        while True:
            draw = np.random.default_rng([self.seed, part, self._drawn]).random()
            name = mine[min(int(np.searchsorted(bounds, draw, side="right")), len(mine) - 1)]
            stream = self.streams[name]
            sample = next(iterators[name], None)
            for _ in range(1 if stream.window.seed is None else _EPOCHS):
                if sample is not None:
                    break
                stream.set_epoch(int(stream.window.epoch) + 1)
                iterators[name] = iter(stream)
                sample = next(iterators[name], None)
            if sample is None:
                raise ValueError(f"`{name}` has no samples for this process: check its shards, places and share.")
            self._drawn += 1
            yield {**sample, "epoch": int(stream.window.epoch)}

    def _become_part(self) -> tuple[int, int]:
        """Which of how many workers this is. The epoch of a stream lies in memory that all workers share, but in a
        mixture each goes through its part of a stream at a pace of its own: it needs copies.
        """
        worker = get_worker_info()
        if worker is None:
            return 0, 1
        if not self._in_worker:
            self.streams, self._in_worker = copy.deepcopy(self.streams), True
        return worker.id, worker.num_workers

    def begin_epoch(self, epoch: int) -> None:
        """Begin this epoch of every stream, and other draws than in earlier ones."""
        self._drawn = epoch << 32
        for stream in self.streams.values():
            stream.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the mixture is: plain data."""
        streams = {name: stream.state_dict() for name, stream in self.streams.items()}
        return {"drawn": self._drawn, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from [`MixedShardStream.state_dict`] when next iterated.

        Raises:
            ValueError: the state is of a mixture of other streams.
        """
        if set(state["streams"]) != set(self.streams):
            raise ValueError(
                f"The position is of a mixture of {sorted(state['streams'])}, this one is of {sorted(self.streams)}."
            )
        self._become_part()
        self._drawn = state["drawn"]
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
