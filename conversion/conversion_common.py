"""What the converters share: their options, cutting chips, and the frame of a run.

This file is no command. A converter is a function that turns its arguments into a `Plan`; `run` does the rest, the same
for all of them:

    python conversion/convert_eurosat.py --source EuroSAT_MS --output shards/eurosat
    python conversion/convert_eurosat.py --source EuroSAT_MS --output shards/eurosat --resume      # interrupted before
    python conversion/convert_eurosat.py --source EuroSAT_MS --output shards/eurosat --overwrite --workers 8

The exit code is 0 if everything was converted, 1 if something was left out (the summary lists it), 2 if there is
nothing to show for it, 130 after Ctrl-C.
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from conversion_reading import Window

from modeling_mapex.shards_mapex import Sample, ShardSchema
from modeling_mapex.writing_mapex import Item, write_shards


@dataclass(kw_only=True)
class ConversionArguments:
    source: str = field(metadata={"help": "Where the imagery is."})
    output: str = field(metadata={"help": "Folder for the shards, made if need be."})
    split: str = field(default="train", metadata={"help": "Name of the split: the first part of the file names."})
    workers: int = field(default=0, metadata={"help": "Processes that read; 0 reads in this one."})
    chip_size: int = field(
        default=0,
        metadata={
            "help": "Cut images into chips of so many pixels of their finest modality; what is left over at the right "
            "and bottom edge is left out. 0 keeps images whole."
        },
    )
    limit: int = field(default=0, metadata={"help": "Convert only the first so many images; 0 means all."})
    shard_megabytes: int = field(default=256, metadata={"help": "Size of a shard."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the shards of this split."})
    resume: bool = field(
        default=False, metadata={"help": "Go on with an interrupted run, or read again what was left out."}
    )


class Source(NamedTuple):
    """The payload of an item: what to read (as the converter likes), its place, which piece of it (`None`: all)."""

    files: Any
    place: str = ""
    window: Window | None = None


class Plan(NamedTuple):
    """What a converter has found.

    Attributes:
        items (`list[Item]`): With a `Source` as payload, or with an exception: why the item cannot be read.
        read (`Callable[[Item], Sample]`): Reads one with a `Source`.
        schema (`ShardSchema`): What they hold.
        size (`Callable[[Item], tuple[int, int]]`): Height and width of the finest modality, from headers.
    """

    items: list[Item]
    read: Callable[[Item], Sample]
    schema: ShardSchema
    size: Callable[[Item], tuple[int, int]]


class _Read:
    """Calls the converter's `read`, or raises what kept the item from being found complete."""

    def __init__(self, read: Callable[[Item], Sample]):
        self.read = read

    def __call__(self, item: Item) -> Sample:
        if isinstance(item.payload, Exception):
            raise item.payload
        return self.read(item)


def cut_chips(items: Sequence[Item], chip_size: int, size: Callable[[Item], tuple[int, int]]) -> tuple[list[Item], str]:
    """Replace every image by its chips, ids with their top and left pixel; and what to say about what is left over."""
    chips, total, kept = [], 0, 0
    for item in items:
        if isinstance(item.payload, Exception):
            chips.append(item)
            continue
        try:
            height, width = size(item)
            if min(height, width) < chip_size:
                raise ValueError(f"is {height} x {width} pixels, smaller than a chip of {chip_size}")
        except (OSError, ValueError) as error:
            chips.append(item._replace(payload=error))
            continue
        corners = [
            (top, left)
            for top in range(0, height - chip_size + 1, chip_size)
            for left in range(0, width - chip_size + 1, chip_size)
        ]
        total, kept = total + height * width, kept + len(corners) * chip_size**2
        chips += [
            item._replace(
                id=f"{item.id}_{top}_{left}",
                payload=item.payload._replace(window=Window(top, left, chip_size, chip_size, (height, width))),
            )
            for top, left in corners
        ]
    note = f"edges that fill no chip of {chip_size} pixels were left out: {1 - kept / max(total, 1):.1%} of all pixels"
    return chips, note if kept < total else ""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring, and adds defaults."""


def source_folder(arguments: ConversionArguments) -> Path:
    """The folder `--source`.

    Raises:
        FileNotFoundError, NotADirectoryError: it is none.
    """
    source = Path(arguments.source)
    if not source.exists():
        raise FileNotFoundError(f"There is no folder {source} (--source).")
    if not source.is_dir():
        raise NotADirectoryError(f"{source} (--source) is a file; a folder is expected. Unpack an archive first.")
    return source


def run(
    arguments_class: type[ConversionArguments],
    prepare: Callable[[Any], Plan],
    description: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the arguments, `prepare` a plan from them, write the shards, print what became of it; the exit code."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(arguments_class, description=description, formatter_class=_HelpFormatter)
    parsed, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments = arguments_class(**vars(parsed))
    try:
        return convert(arguments, prepare(arguments))
    except (BrokenExecutor, OSError, ValueError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing half-written is left; the same command with --resume goes on.", file=sys.stderr)
        return 130


def convert(arguments: ConversionArguments, plan: Plan) -> int:
    """Write the shards of a plan and print the summary; the exit code.

    Raises:
        ValueError, OSError: what `write_shards` raises, bad arguments, or nothing to convert.
    """
    for name, least in (("workers", 0), ("chip_size", 0), ("limit", 0), ("shard_megabytes", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(arguments, name)}.")
    items, notes = plan.items, []
    if arguments.limit:
        items = items[: arguments.limit]
    if arguments.chip_size:
        items, note = cut_chips(items, arguments.chip_size, plan.size)
        whole = [name for name, spec in plan.schema.labels.items() if spec["kind"] in ("class", "multi_label")]
        notes = [note] * bool(note)
        notes += [f"`{name}` describes whole images: a chip has that of its image, true or not" for name in whole]
    # In an order that has nothing to do with the source's, where classes and scenes follow each other: so the window of
    # a stream is a fair sample. By the ids alone, so that it is the same when a run is resumed.
    items = sorted(items, key=lambda item: zlib.crc32(item.id.encode()))
    report = write_shards(
        items,
        _Read(plan.read),
        plan.schema,
        arguments.output,
        arguments.split,
        workers=arguments.workers,
        shard_bytes=arguments.shard_megabytes << 20,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    )
    print("\n".join([*(f"note: {note}" for note in notes), report.summary()]))
    return report.exit_code


def _one_line(error: Exception) -> str:
    if isinstance(error, BrokenExecutor):
        return "a reading process died, most likely for want of memory. Take fewer --workers, and --resume."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())
