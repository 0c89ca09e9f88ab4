"""Writing shards: atomically, in parts that an interrupted run can go on from, with any number of reading processes."""

import json
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from .shards_mapex import Sample, ShardSchema, shard_files


_ITEMS_KEY = b"mapex_items"  # in the metadata of the file: which items it was made of, and which of them failed
_ROW_GROUP_BYTES = 8 << 20  # a reader holds about two row groups


class Item(NamedTuple):
    """Something that becomes one sample: its id, the file or folder to name in messages, and what `read` needs."""

    id: str
    source: str
    payload: Any


@dataclass
class WriteReport:
    """What became of the items: how many are in the shards, and which were left out and why."""

    written: int
    failures: list[tuple[str, str]]
    shards: list[Path]
    reused: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 if all were written, 1 if some were left out, 2 if there is nothing."""
        return 2 if not self.written else int(bool(self.failures))

    def summary(self) -> str:
        lines = [f"left out: {source}: {reason}" for source, reason in self.failures]
        size = sum(path.stat().st_size for path in self.shards) / 1e6
        head = f"{self.written} samples in {len(self.shards)} shards, {size:.1f} MB, {self.seconds:.1f} s"
        if self.reused:
            head += f" ({self.reused} samples were there already)"
        if self.failures:
            head += f"; {len(self.failures)} items left out"
        return "\n".join([*lines, head])


def write_shards(
    items: Sequence[Item],
    read: Callable[[Item], Sample],
    schema: ShardSchema,
    output: str | os.PathLike,
    split: str = "train",
    *,
    workers: int = 0,
    shard_bytes: int = 256 << 20,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> WriteReport:
    """Read `items` and write them, in their order, to `output/{split}-00000-of-00003.parquet` and so on.

    Nothing appears under these names before all is written: work goes on in a hidden folder beside them, shard by
    shard, each renamed when complete. What is interrupted goes on with `resume`, which reads again only shards that
    were not finished or that left something out. The result does not depend on the number of workers.

    Args:
        items (`Sequence[Item]`): What to read. The second of two with the same id is left out.
        read (`Callable[[Item], Sample]`): Reads one. `OSError`, `ValueError` and `KeyError` leave the item out, with
            their message in the report. With workers it must be a function that another process can import.
        schema (`ShardSchema`): What the samples hold.
        output (`str`): Folder, made if need be.
        split (`str`): First part of the file names.
        workers (`int`): Processes that read; 0 reads in this one.
        shard_bytes (`int`): A shard is closed when it holds so much.
        overwrite (`bool`): Replace the shards of this split, when the new ones are complete.
        resume (`bool`): Go on with an interrupted run, or read again what an earlier one left out.
        progress (`bool`): Show a progress bar.

    Raises:
        FileExistsError: there are shards of this split, or of an interrupted run, and neither option is set.
        ValueError: `resume` of shards that were made of other items or with another schema, or no items.
    """
    if not items:
        raise ValueError("There is nothing to convert: no items were found in the source.")
    if not split.replace("_", "").isalnum():
        raise ValueError(f"`split` must be letters, digits and `_`, got {split!r}.")
    output = Path(output)
    partial = output / f".{split}.partial"
    finished = shard_files(output, split, required=False)
    if (finished or partial.exists()) and not (overwrite or resume):
        state = "is already there" if finished else "was begun and not finished"
        raise FileExistsError(
            f"The split `{split}` in {output} {state}. Pass --resume (`resume=True`) to go on with it, --overwrite "
            "(`overwrite=True`) to replace it, or choose another --output."
        )
    start = time.perf_counter()
    if overwrite and not resume:
        shutil.rmtree(partial, ignore_errors=True)
    fresh = not partial.exists()
    spans = [(0, len(items), None)]
    if resume:
        if not fresh:
            _take_back(output, split, partial)
        spans = _plan(items, finished if fresh else sorted(partial.glob("*.parquet")), schema)
    partial.mkdir(parents=True, exist_ok=True)
    if resume and fresh:
        for index, path in enumerate(finished):
            _link(path, partial / f"{index:05d}.parquet")

    writer = _ShardWriter(partial, schema, shard_bytes)
    reused, failures, written = 0, [], 0
    seen: set[str] = set()
    bar = _progress_bar(len(items), f"{split}") if progress else None
    try:
        with _reader(read, schema, workers) as run:
            for begin, end, done in spans:
                if done is not None:  # a complete shard of an earlier run
                    writer.skip()
                    written, reused = written + done, reused + done
                    seen.update(item.id for item in items[begin:end])
                    if bar:
                        bar.update(end - begin)
                    continue
                whole = end < len(items)  # a shard that must hold exactly these items, since others follow it
                for item, row, error in run(items[begin:end]):
                    if error is None and item.id in seen:
                        error = f"the id `{item.id}` is taken by an earlier item"
                    seen.add(item.id)
                    if error is None:
                        written += 1
                        writer.add(item, row, keep_open=whole)
                    else:
                        failures.append((item.source, error))
                        writer.fail(item, error)
                    if bar:
                        bar.update(1)
                writer.close_shard()
    except BaseException:
        writer.abandon()
        if not any(partial.iterdir()):
            partial.rmdir()
        raise
    finally:
        writer.thread.shutdown()
        if bar:
            bar.close()
    paths = sorted(partial.glob("*.parquet"))
    if not written:
        shutil.rmtree(partial)
        return WriteReport(0, failures, [], 0, time.perf_counter() - start)
    final = [output / f"{split}-{index:05d}-of-{len(paths):05d}.parquet" for index in range(len(paths))]
    for path, name in zip(paths, final):
        if name.exists() and path.samefile(name):  # of two links to one file, renaming one to the other does nothing
            path.unlink()
        else:
            os.replace(path, name)
    for path in finished:
        if path not in final:
            path.unlink()
    partial.rmdir()
    return WriteReport(written, failures, final, reused, time.perf_counter() - start)


def _progress_bar(total: int, title: str):
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=" samples", smoothing=0.1)


def _take_back(output: Path, split: str, partial: Path) -> None:
    """The first shards of a run that was ended while all of them were being given their names."""
    waiting = sorted(int(path.stem) for path in partial.glob("*.parquet"))
    if waiting:
        named = [output / f"{split}-{index:05d}-of-{waiting[-1] + 1:05d}.parquet" for index in range(waiting[0])]
        if all(path.is_file() for path in named):
            for index, path in enumerate(named):
                _link(path, partial / f"{index:05d}.parquet")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _plan(items: Sequence[Item], shards: list[Path], schema: ShardSchema) -> list[tuple[int, int, int | None]]:
    """Spans of items, in order: `(begin, end, number of samples)` for a complete shard, `None` for one to read."""
    import pyarrow.parquet as pq

    spans, position = [], 0
    for path in shards:
        metadata = pq.read_metadata(path)
        found = ShardSchema.from_arrow(metadata.schema.to_arrow_schema(), str(path))
        made_of = json.loads(metadata.metadata[_ITEMS_KEY])
        expected = [item.id for item in items[position : position + len(made_of["ids"])]]
        if found != schema or made_of["ids"] != expected:
            what = "with another description" if found != schema else "of other items"
            raise ValueError(
                f"{path} was made {what} than these: the source or the options have changed. Pass --overwrite to "
                "convert all of it again."
            )
        end = position + len(expected)
        spans.append((position, end, None if made_of["failed"] else metadata.num_rows))
        position = end
    if position < len(items):
        spans.append((position, len(items), None))
    return spans


class _reader:
    """Runs `read` over items, in this process or in several, and yields `(item, row, error)` in their order."""

    def __init__(self, read: Callable[[Item], Sample], schema: ShardSchema, workers: int):
        self.read, self.schema, self.workers, self.pool = read, schema, workers, None

    def __enter__(self) -> Callable[[Sequence[Item]], Iterator[tuple[Item, dict | None, str | None]]]:
        if self.workers > 0:
            # spawn: libraries that the parent has threads of do not survive a fork
            self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_ignore_interrupt)
        return self.run

    def __exit__(self, *error):
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, dict | None, str | None]]:
        if self.pool is None:
            for item in items:
                yield (item, *_read_row(self.read, self.schema, item))
            return
        waiting: deque = deque()
        for item in items:
            waiting.append((item, self.pool.submit(_read_row, self.read, self.schema, item)))
            if len(waiting) >= 4 * self.workers:  # so many are in memory at most
                first, future = waiting.popleft()
                yield (first, *future.result())
        while waiting:
            first, future = waiting.popleft()
            yield (first, *future.result())


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends the pool


def _read_row(read: Callable[[Item], Sample], schema: ShardSchema, item: Item) -> tuple[dict | None, str | None]:
    try:
        return schema.encode(read(item)), None
    except KeyError as error:
        return None, f"lacks {error}"
    except (OSError, ValueError) as error:
        return None, str(error)


class _ShardWriter:
    """Collects rows to row groups and row groups to files, each under a temporary name until it is complete."""

    def __init__(self, folder: Path, schema: ShardSchema, shard_bytes: int):
        import pyarrow.parquet as pq

        self.folder, self.shard_bytes = folder, shard_bytes
        self.arrow_schema = schema.to_arrow()
        self.pixels = [name for name in self.arrow_schema.names if self.arrow_schema.field(name).type == "large_binary"]
        self.parquet_writer = pq.ParquetWriter
        self.index, self.writer = 0, None
        # Arrow writes without holding the interpreter, so one row group is written while the next is read.
        self.thread, self.pending = ThreadPoolExecutor(1), None
        self._reset()
        for stale in folder.glob("*.part"):
            stale.unlink()

    def _reset(self) -> None:
        self.rows: list[dict] = []
        self.row_bytes = self.file_bytes = 0
        self.made_of: dict[str, list] = {"ids": [], "failed": []}

    @property
    def path(self) -> Path:
        return self.folder / f"{self.index:05d}.parquet"

    def skip(self) -> None:
        self.index += 1

    def fail(self, item: Item, error: str) -> None:
        self.made_of["ids"].append(item.id)
        self.made_of["failed"].append([item.source, error])

    def add(self, item: Item, row: dict, keep_open: bool) -> None:
        # Only now: if all items that follow a full shard fail, none is begun for them alone, without a row.
        if self.file_bytes >= self.shard_bytes and not keep_open:
            self.close_shard()
        self.made_of["ids"].append(item.id)
        self.rows.append(row)
        self.row_bytes += sum(len(row[name]) for name in self.pixels if row[name] is not None)
        if self.row_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def _write_row_group(self) -> None:
        import pyarrow as pa

        if self.writer is None:
            self.writer = self.parquet_writer(
                self.path.with_suffix(".part"),
                self.arrow_schema,
                # Imagery compresses little, and decompressing costs more than reading it.
                compression={name: "NONE" if name in self.pixels else "ZSTD" for name in self._leaves()},
                use_dictionary=[name for name in self._leaves() if name.endswith(("__crs", "place"))],
                write_statistics=False,
            )
        self._wait()
        table = pa.Table.from_pylist(self.rows, schema=self.arrow_schema)
        self.pending = self.thread.submit(self.writer.write_table, table)
        self.file_bytes += self.row_bytes
        self.rows, self.row_bytes = [], 0

    def _wait(self) -> None:
        """For the row group that is being written; raises what went wrong with it."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def _leaves(self) -> list[str]:
        """Column paths as parquet counts them."""
        lists = [name for name in self.arrow_schema.names if str(self.arrow_schema.field(name).type).startswith("list")]
        return [f"{name}.list.element" if name in lists else name for name in self.arrow_schema.names]

    def close_shard(self) -> None:
        if not self.made_of["ids"]:
            return
        if self.rows or self.writer is None:
            self._write_row_group()
        self._wait()
        self.writer.add_key_value_metadata({_ITEMS_KEY: json.dumps(self.made_of)})
        self.writer.close()
        os.replace(self.path.with_suffix(".part"), self.path)
        self.writer = None
        self.index += 1
        self._reset()

    def abandon(self) -> None:
        self.thread.shutdown()
        if self.writer is not None:
            self.writer.close()
        self.path.with_suffix(".part").unlink(missing_ok=True)
        self._reset()
