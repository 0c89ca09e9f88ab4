"""What a shard is: a parquet file of multi-modal samples that says what it holds.

A row is one sample: per modality the pixels as raw bytes with their shape, coordinate system, transform and resolution,
and labels. Bands, units, data types and classes are the same in all rows and stand once, as JSON with a version, in the
metadata of the parquet schema. Raw bytes because they are read tens of times faster than nested array types.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


SCHEMA_VERSION = 1
_SCHEMA_KEY = b"mapex"  # in the metadata of the parquet schema: the description
_SEPARATOR = "__"
_MODALITY_KEYS = {"bands", "unit", "gsd", "dtype", "nodata", "dn_offset", "sensor"}
_LABEL_KEYS = {
    "class": {"kind", "names"},
    "multi_label": {"kind", "names"},
    "mask": {"kind", "names", "ignore_index", "dtype"},
    "map": {"kind", "unit", "nodata", "dtype"},
}


class Layer(NamedTuple):
    """The pixels of one modality of one sample, and where they lie.

    Attributes:
        pixels (`np.ndarray` of shape `(channels, height, width)`): Values as they are in the source.
        crs (`str`, *optional*): Coordinate reference system, like `"EPSG:32633"` or WKT.
        transform (`tuple[float, ...]`, *optional*): The affine transform `(a, b, c, d, e, f)` from column and row to
            coordinates: `x = a column + b row + c`, `y = d column + e row + f`.
        gsd (`float`, *optional*): Metres per pixel; default that of the schema.
    """

    pixels: np.ndarray
    crs: str | None = None
    transform: tuple[float, ...] | None = None
    gsd: float | None = None


@dataclass
class Sample:
    """One row to write.

    Attributes:
        id (`str`): Unique in the whole data set.
        place (`str`): Samples of one place (a scene, a tile) belong on the same side of a split.
        images (`dict[str, Layer | None]`): Modality to its pixels; `None` or left out where it is missing.
        labels (`dict[str, Any]`): Label to an index (`class`), 0 or 1 per class (`multi_label`), or an array
            `(height, width)` (`mask`, `map`); left out where it is missing.
    """

    id: str
    place: str
    images: dict[str, Layer | None]
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardSchema:
    """What the samples of a data set hold.

    Args:
        modalities (`dict[str, dict]`): Per modality `bands` (names, in the order of the channels), `unit` of the values
            as stored (see `MapexImageProcessor`), `gsd` (metres per pixel), `dtype` (numpy's name); optionally `nodata`
            (a value, or a list of them), `dn_offset` and `sensor` (a note for people).
        labels (`dict[str, dict]`): Per label its `kind`: `"class"` and `"multi_label"` with the `names` of the classes;
            `"mask"` (a class per pixel) with `dtype` and optionally `names` (list, or pairs of code and name) and
            `ignore_index`; `"map"` (a value per pixel) with `dtype` and optionally `unit` and `nodata`.
        title (`str`): What the data set is, for people.

    Raises:
        ValueError: a name that cannot be a column, an unknown or missing key.
    """

    modalities: dict[str, dict[str, Any]]
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    title: str = ""

    def __post_init__(self):
        names = [*self.modalities, *self.labels]
        if not self.modalities:
            raise ValueError("A data set needs at least one modality.")
        if len(set(names)) != len(names):
            raise ValueError(f"A label has the name of a modality: {names}.")
        for name in names:
            if not name.isidentifier() or _SEPARATOR in name or name in ("id", "place"):
                raise ValueError(f"`{name}` cannot name a column: use letters, digits and single `_`.")
        for name, spec in self.modalities.items():
            missing = {"bands", "unit", "gsd", "dtype"} - set(spec)
            unknown = set(spec) - _MODALITY_KEYS
            if missing or unknown:
                raise ValueError(f"Modality `{name}` lacks {sorted(missing)} and has unknown keys {sorted(unknown)}.")
        for name, spec in self.labels.items():
            kind = spec.get("kind")
            if kind not in _LABEL_KEYS:
                raise ValueError(f"Label `{name}` is of kind {kind!r}; possible are {list(_LABEL_KEYS)}.")
            needed = {"names"} if kind in ("class", "multi_label") else {"dtype"}
            if not needed <= set(spec) <= _LABEL_KEYS[kind]:
                raise ValueError(f"Label `{name}` needs {sorted(needed)} and takes {sorted(_LABEL_KEYS[kind])}.")

    def to_arrow(self):
        """The `pyarrow.Schema` of the rows, with this description in its metadata."""
        import pyarrow as pa

        columns = [("id", pa.string()), ("place", pa.string())]
        for name in self.modalities:
            columns += [
                (name, pa.large_binary()),
                (f"{name}__shape", pa.list_(pa.int32())),
                (f"{name}__crs", pa.string()),
                (f"{name}__transform", pa.list_(pa.float64())),
                (f"{name}__gsd", pa.float64()),
            ]
        for name, spec in self.labels.items():
            if spec["kind"] == "class":
                columns.append((name, pa.int64()))
            elif spec["kind"] == "multi_label":
                columns.append((name, pa.list_(pa.int8())))
            else:
                columns += [(name, pa.large_binary()), (f"{name}__shape", pa.list_(pa.int32()))]
        description = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "modalities": self.modalities,
            "labels": self.labels,
        }
        return pa.schema(columns, metadata={_SCHEMA_KEY: json.dumps(description)})

    @classmethod
    def from_arrow(cls, schema, where: str = "this file") -> "ShardSchema":
        """The description in the metadata of a `pyarrow.Schema`.

        Raises:
            ValueError: there is none, or it is of a version that this release does not know.
        """
        raw = (schema.metadata or {}).get(_SCHEMA_KEY)
        if raw is None:
            raise ValueError(
                f"{where} is no MAPEX shard: its schema has no `mapex` metadata. Write it with `write_shards` or a "
                "script in conversion/."
            )
        description = json.loads(raw)
        version = description.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{where} is of shard schema version {version}; this release reads version {SCHEMA_VERSION}. Install "
                "the release that wrote it, or convert the source again."
            )
        return cls(description["modalities"], description["labels"], description["title"])

    def select(self, modalities: Sequence[str] | None = None, labels: Sequence[str] | None = None) -> "ShardSchema":
        """This description for some of the modalities and labels only.

        Raises:
            ValueError: one that it does not have.
        """
        chosen = []
        for kind, available, wanted in (
            ("modalities", self.modalities, modalities),
            ("labels", self.labels, labels),
        ):
            if isinstance(wanted, str):
                raise TypeError(f'`{kind}` must be a list, got the string "{wanted}".')
            unknown = [name for name in wanted or () if name not in available]
            if unknown:
                raise ValueError(f"The shards have no {kind} {unknown}. Available: {list(available)}.")
            chosen.append({name: available[name] for name in (available if wanted is None else wanted)})
        return ShardSchema(*chosen, title=self.title)

    def encode(self, sample: Sample) -> dict[str, Any]:
        """A sample to a row.

        Raises:
            ValueError: it does not fit this description.
        """
        row: dict[str, Any] = {"id": sample.id, "place": sample.place}
        strange = [*(set(sample.images) - set(self.modalities)), *(set(sample.labels) - set(self.labels))]
        if strange:
            raise ValueError(f"holds {strange}, which the schema does not name")
        if all(sample.images.get(name) is None for name in self.modalities):
            raise ValueError("has no modality at all")
        for name, spec in self.modalities.items():
            layer = sample.images.get(name)
            row |= {name: None} | {f"{name}__{key}": None for key in ("shape", "crs", "transform", "gsd")}
            if layer is None:
                continue
            pixels = np.asarray(layer.pixels)
            if pixels.dtype.newbyteorder("=") != np.dtype(spec["dtype"]):
                raise ValueError(f"`{name}` is of type {pixels.dtype}, the schema says {spec['dtype']}")
            if pixels.ndim != 3 or pixels.shape[0] != _num_channels(spec) or 0 in pixels.shape:
                raise ValueError(f"`{name}` has the shape {pixels.shape}; its bands are {spec['bands']}")
            if layer.transform is not None and len(layer.transform) != 6:
                raise ValueError(f"`{name}` has a transform of {len(layer.transform)} numbers, not 6")
            row[name] = to_bytes(pixels)
            row[f"{name}__shape"] = list(pixels.shape)
            row[f"{name}__crs"] = layer.crs
            row[f"{name}__transform"] = None if layer.transform is None else [float(x) for x in layer.transform]
            row[f"{name}__gsd"] = float(spec["gsd"] if layer.gsd is None else layer.gsd)
        for name, spec in self.labels.items():
            value = sample.labels.get(name)
            if spec["kind"] == "class":
                if value is not None and not 0 <= int(value) < len(spec["names"]):
                    raise ValueError(f"`{name}` is {value}, but there are {len(spec['names'])} classes")
                row[name] = None if value is None else int(value)
            elif spec["kind"] == "multi_label":
                if value is not None and (len(value) != len(spec["names"]) or not set(map(int, value)) <= {0, 1}):
                    raise ValueError(f"`{name}` must be 0 or 1 for each of {len(spec['names'])} classes")
                row[name] = None if value is None else [int(x) for x in value]
            else:
                row |= {name: None, f"{name}__shape": None}
                if value is not None:
                    value = np.asarray(value)
                    if value.dtype.newbyteorder("=") != np.dtype(spec["dtype"]) or value.ndim != 2:
                        raise ValueError(
                            f"`{name}` is {value.dtype} of shape {value.shape}; the schema says {spec['dtype']} of "
                            "(height, width)"
                        )
                    row |= {name: to_bytes(value), f"{name}__shape": list(value.shape)}
        return row

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row to a sample that describes itself.

        Returns:
            `dict` with `id` and `place`; `images` (modality to an array `(channels, height, width)` as stored, or
            `None`); `sensors` (modality to its description in this schema); `gsd`, `crs`, `transform` (modality to its
            own); `labels` (label to an integer, a list, an array `(height, width)`, or `None`). Arrays are views of the
            row's bytes and cannot be written to.
        """
        sample: dict[str, Any] = {"id": row["id"], "place": row["place"], "sensors": self.modalities}
        sample |= {"images": {}, "gsd": {}, "crs": {}, "transform": {}, "labels": {}}
        for name, spec in self.modalities.items():
            raw = row[name]
            sample["images"][name] = None if raw is None else from_bytes(raw, spec["dtype"], row[f"{name}__shape"])
            for key in ("gsd", "crs", "transform"):
                sample[key][name] = row[f"{name}__{key}"]
        for name, spec in self.labels.items():
            value = row[name]
            if value is not None and spec["kind"] in ("mask", "map"):
                value = from_bytes(value, spec["dtype"], row[f"{name}__shape"])
            sample["labels"][name] = value
        return sample

    def decode_batch(self, rows: dict[str, list]) -> dict[str, list]:
        """As [`ShardSchema.decode`] for columns of rows: the transform of a map-style `datasets.Dataset`."""
        count = len(rows["id"])
        if not count:
            return {}
        samples = [self.decode({key: column[index] for key, column in rows.items()}) for index in range(count)]
        return {key: [sample[key] for sample in samples] for key in samples[0]}


def _num_channels(spec: dict[str, Any]) -> int:
    return 1 if spec["unit"] == "class" else len(spec["bands"])


def to_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def from_bytes(raw: bytes, dtype: str, shape: Sequence[int]) -> np.ndarray:
    return np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<")).reshape(shape)


def shard_files(source: str | os.PathLike, split: str = "train", *, required: bool = True) -> list[Path]:
    """The shards of a split in a local folder, in order.

    Raises:
        FileNotFoundError: there are none, or some of them are missing.
    """
    files = sorted(Path(source).glob(f"{split}-[0-9]*-of-[0-9]*.parquet"))
    if not required:
        return files
    if not files:
        others = sorted({path.name.rsplit("-", 3)[0] for path in Path(source).glob("*-of-*.parquet")})
        begun = " It was begun and not finished: convert with --resume." * (Path(source) / f".{split}.partial").exists()
        raise FileNotFoundError(
            f"No shards of the split `{split}` in {source}. Splits there: {others or 'none'}.{begun}"
        )
    check_number([path.name for path in files], split, str(source))
    return files


def check_number(names: Sequence[str], split: str, where: str) -> None:
    """Raise `FileNotFoundError` unless these names of shards are as many as they say that there are."""
    total = int(names[0].removesuffix(".parquet").rsplit("-", 1)[1])
    if len(names) != total:
        raise FileNotFoundError(f"The split `{split}` in {where} has {len(names)} of its {total} shards.")


def without_data(pixels: np.ndarray, nodata: float | Sequence[float] | None = None) -> np.ndarray:
    """Which values are none: NaN, infinities, and those that `nodata` names, in the precision of the pixels."""
    holes = ~np.isfinite(pixels)
    # Python's numbers are compared in the precision of the array, numpy's in their own.
    for value in np.atleast_1d([] if nodata is None else nodata).tolist():
        holes |= pixels == value
    return holes


def mask_names(spec: dict[str, Any]) -> dict[int, str]:
    """Code to name of a mask's classes: from a list, or from pairs of code and name."""
    names = spec.get("names") or []
    pairs = enumerate(names) if all(isinstance(name, str) for name in names) else names
    result = {int(code): str(name) for code, name in pairs}
    if spec.get("ignore_index") is not None:
        result.setdefault(int(spec["ignore_index"]), "ignored")
    return result
