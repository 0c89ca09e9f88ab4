"""Looking into shards: what they hold, and what is wrong with them."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data_mapex import read_schema
from .shards_mapex import Layer, Sample, ShardSchema, from_bytes, mask_names, shard_files, without_data


def describe_shards(source: str | os.PathLike, split: str = "train") -> dict[str, Any]:
    """Count what a split holds, without reading pixels but those of masks.

    Returns:
        `dict` with `samples`, `places`, `shards`, `bytes`, `title`; `modalities` (per modality `bands`, `unit`,
        `dtype`, `present`, `missing`, `sizes` (height x width to a count), `gsd` (least and most));
        `labels` (per label `kind`, `missing`, and `histogram`: class to samples, or to pixels for a mask).
    """
    import pyarrow.parquet as pq

    schema = read_schema(source, split)
    files = shard_files(source, split)
    places: set[str] = set()
    result: dict[str, Any] = {"title": schema.title, "shards": len(files), "samples": 0}
    result["bytes"] = sum(path.stat().st_size for path in files)
    modalities = {
        name: {key: spec[key] for key in ("bands", "unit", "dtype")} | {"present": 0, "missing": 0, "sizes": Counter()}
        for name, spec in schema.modalities.items()
    }
    labels = {
        name: {"kind": spec["kind"], "missing": 0, "histogram": Counter()} for name, spec in schema.labels.items()
    }
    columns = ["place"]
    columns += [f"{name}__{key}" for name in modalities for key in ("shape", "gsd")]
    columns += [name for name, spec in schema.labels.items() if spec["kind"] != "map"]
    columns += [f"{name}__shape" for name, spec in schema.labels.items() if spec["kind"] in ("mask", "map")]
    for row in _rows(files, columns, pq):
        result["samples"] += 1
        places.add(row["place"])
        for name, entry in modalities.items():
            shape, gsd = row[f"{name}__shape"], row[f"{name}__gsd"]
            entry["missing" if shape is None else "present"] += 1
            if shape is not None:
                entry["sizes"][f"{shape[1]} x {shape[2]}"] += 1
                low, high = entry.get("gsd", (gsd, gsd))
                entry["gsd"] = (min(low, gsd), max(high, gsd))
        for name, entry in labels.items():
            spec = schema.labels[name]
            value = row[f"{name}__shape"] if spec["kind"] == "map" else row[name]
            if value is None:
                entry["missing"] += 1
            elif spec["kind"] == "class":
                entry["histogram"][spec["names"][value]] += 1
            elif spec["kind"] == "multi_label":
                entry["histogram"].update(text for text, there in zip(spec["names"], value) if there)
            elif spec["kind"] == "mask":
                codes, counts = np.unique(from_bytes(value, spec["dtype"], (-1,)), return_counts=True)
                names = mask_names(spec)
                entry["histogram"].update(
                    {names.get(code, str(code)): count for code, count in zip(codes.tolist(), counts.tolist())}
                )
    return result | {"places": len(places), "modalities": modalities, "labels": labels}


def validate_shards(source: str | os.PathLike, split: str = "train") -> list[str]:
    """Read everything and say what is wrong with it, a line each; nothing if all is well.

    Checked are the sizes of the bytes, shapes against bands, labels against classes, ids that occur twice, and images
    of which not one pixel holds data.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = read_schema(source, split)
    expected = set(schema.to_arrow().names)
    problems, seen = [], {}
    for path in shard_files(source, split):
        try:
            if set(pq.read_schema(path).names) != expected:
                problems.append(f"{path.name}: its columns are not those that its description says")
                continue
            if not pq.read_metadata(path).num_rows:
                problems.append(f"{path.name}: holds not one sample, which readers cannot read: convert it again")
                continue
            for row in _rows([path], None, pq):
                where = f"{path.name}: {row['id']}"
                if row["id"] in seen:
                    problems.append(f"{where}: the id is also in {seen[row['id']]}")
                seen[row["id"]] = path.name
                try:
                    _check_row(schema, row)
                except ValueError as error:
                    problems.append(f"{where}: {error}")
        except (pa.ArrowInvalid, OSError) as error:
            problems.append(f"{path.name}: damaged: {error}")
    return problems


def _check_row(schema: ShardSchema, row: dict[str, Any]) -> None:
    sample = schema.decode(row)  # raises where bytes and shape do not fit
    layers = {}
    for name, pixels in sample["images"].items():
        if pixels is None:
            continue
        layers[name] = Layer(pixels, sample["crs"][name], sample["transform"][name], sample["gsd"][name])
        if not (sample["gsd"][name] or 0) > 0:
            raise ValueError(f"`{name}` has a gsd of {sample['gsd'][name]}")
        if without_data(pixels, schema.modalities[name].get("nodata")).all():
            raise ValueError(f"`{name}` has not one valid pixel: it should be stored as missing")
    labels = {name: value for name, value in sample["labels"].items() if value is not None}
    schema.encode(Sample(sample["id"], sample["place"], layers, labels))  # raises where it does not fit the schema


def _rows(files: Sequence[Path], columns: list[str] | None, pq) -> Iterator[dict[str, Any]]:
    for path in files:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=32, columns=columns):
                yield from batch.to_pylist()
