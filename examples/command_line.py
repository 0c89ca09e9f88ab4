"""What the scripts share of their command line: options from a file, help that keeps its lines, and how they stop."""

import argparse
import json
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class Stop(SystemExit):
    """An end with a message for the user and without a traceback."""


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a script's docstring, and shows defaults."""


def message_of(error: Exception) -> str:
    """What an error says, without the traceback that one from a worker of a `DataLoader` brings along."""
    return f"{error}".rsplit(f"{type(error).__name__}: ", 1)[-1].strip()


def parse_arguments(kinds: Sequence[type], description: str, argv: list[str] | None = None) -> tuple:
    """Arguments from the command line, after those of a JSON or YAML file if the first is one."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(kinds, description=description)
    parser.formatter_class = Formatter
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        file, *argv = argv
        values = read_mapping(file)
        known = {entry.name for kind in kinds for entry in fields(kind)}
        if unknown := sorted(set(values) - known):
            raise Stop(f"{file} has options that there are not: {unknown}. Run with --help for those there are.")
        parser.set_defaults(**values)
    *parsed, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown options: {' '.join(unknown)}")
    return tuple(parsed)


def read_overrides(
    value: str | dict[str, Any] | None, config_class: type, settled: Collection[str] = ()
) -> dict[str, Any]:
    """Of `--config_overrides`: fields of the configuration as JSON, or from a file of options as a mapping; but for
    those of `settled`, and the sensors and the precision, which other options settle everywhere.
    """
    try:
        overrides = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise Stop(f"--config_overrides is no JSON: {error}") from error
    if not isinstance(overrides, dict):
        raise Stop(f"--config_overrides must be a mapping from fields to values, got {value}.")
    if unknown := sorted(set(overrides) - {entry.name for entry in fields(config_class)}):
        raise Stop(f"--config_overrides names {unknown}, which are no fields of {config_class.__name__}.")
    if refused := sorted(set(overrides) & {"modalities", "dtype", *settled}):
        raise Stop(f"--config_overrides cannot change {refused}, which the data and other options settle.")
    return overrides


def check_trackers(names: list[str] | None, available: Collection[str]) -> None:
    """Of `--report_to`: stop before the work begins."""
    if missing := [name for name in names or [] if name not in ("all", "none", *available)]:
        raise Stop(f"--report_to {' '.join(missing)}: not known or not installed. There are {sorted(available)}.")


def ignore_interrupts(worker: int) -> None:
    """In a process that reads. Ctrl-C reaches all processes of a terminal, SIGTERM often all of a job: the one that
    trains decides, and its readers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_mapping(file: str) -> dict[str, Any]:
    """Of a JSON or YAML file."""
    try:
        values = yaml.safe_load(Path(file).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Stop(f"Cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise Stop(f"{file} must hold a mapping.")
    return values
