"""Reading rasters for the converters: whole or not at all, with the ground they cover."""

import json
import math
import os
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.windows
from rasterio.crs import CRS
from rasterio.enums import MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError

from modeling_mapex.shards_mapex import Layer, without_data


# A damaged JPEG is an error, not a warning and a grey area; and the folder is not listed anew for every file of it.
_GDAL_OPTIONS = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "YES", "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE"}
_IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Window(NamedTuple):
    """A piece of an image, in pixels of a grid of `grid` (height, width) pixels that covers the whole image."""

    top: int
    left: int
    height: int
    width: int
    grid: tuple[int, int]

    def on(self, height: int, width: int, what: str) -> tuple[int, int, int, int]:
        """The same piece (top, left, height, width) of an image of the same ground with other pixels.

        Raises:
            ValueError: its edges lie within pixels.
        """
        edges = []
        for value, own, of in zip(self[:4], (height, width) * 2, self.grid * 2):
            if value * own % of:
                raise ValueError(
                    f"{what} has {height} x {width} pixels: a chip of {self.height} x {self.width} of the finest "
                    f"modality's {self.grid[0]} x {self.grid[1]} pixels is no whole number of them. Choose another "
                    "--chip_size."
                )
            edges.append(value * own // of)
        return tuple(edges)


@lru_cache(maxsize=256)
def _describe_crs(wkt: str) -> tuple[str, str, float]:
    """Name, kind (`"projected"`, `"geographic"`, `"other"`), and metres or radians per unit."""
    crs = CRS.from_wkt(wkt)
    code = crs.to_epsg()
    # A code that is merely similar (another ellipsoid) would move the image.
    name = f"EPSG:{code}" if code is not None and CRS.from_epsg(code) == crs else wkt
    if crs.is_geographic:
        return name, "geographic", crs.units_factor[1]
    return (name, "projected", crs.linear_units_factor[1]) if crs.is_projected else (name, "other", math.nan)


def resolution_in_metres(crs: str, transform: Sequence[float], height: int, width: int) -> float:
    """Metres per pixel: the geometric mean of both axes, in degrees at the latitude of the middle of the image.

    Args:
        crs (`str`): `"EPSG:..."` or WKT.
        transform (`Sequence[float]`): `(a, b, c, d, e, f)`.
        height, width (`int`): Of the image.

    Raises:
        ValueError: the coordinate system has no metres.
    """
    try:
        wkt = CRS.from_string(crs).wkt
    except CRSError as error:
        raise ValueError(f"not a coordinate reference system: {crs!r} ({error})") from error
    return _resolution(_describe_crs(wkt), transform, height, width)


def _resolution(facts: tuple[str, str, float], transform: Sequence[float], height: int, width: int) -> float:
    name, kind, factor = facts
    a, b, _, d, e, f = transform
    if kind == "other":
        raise ValueError(f"the coordinate system {name} is neither projected nor geographic: give the `gsd`")
    east = north = factor
    if kind == "geographic":  # metres per unit along the parallel and the meridian of the WGS 84 ellipsoid
        latitude = (f + d * width / 2 + e * height / 2) * factor
        flat = 1.0 - 6.69437999014e-3 * math.sin(latitude) ** 2
        east *= 6378137.0 / math.sqrt(flat) * math.cos(latitude)
        north *= 6378137.0 * (1.0 - 6.69437999014e-3) / flat**1.5
    return math.sqrt(math.hypot(a * east, d * north) * math.hypot(b * east, e * north))


# Bytes of a value of the TIFF data types that are longer than one.
_TIFF_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_BLOCK_TAGS = {273: 279, 324: 325}  # where strips and tiles begin: how many bytes they have


@lru_cache(maxsize=4096)
def _check_whole_tiff(path: str, size: int, modified: int) -> None:
    """Raise if a TIFF points beyond its end; a file of another format passes. Once for all chips of a file.

    GDAL only warns where tags are cut off, and goes on without georeference, and sees a lost block only on reading it.
    `size` and `modified` are those of the file.
    """
    with open(path, "rb") as file:

        def fetch(offset: int, count: int) -> bytes:
            if offset + count > size:
                raise OSError(f"{path}: truncated: it has {size} bytes and refers to byte {offset + count}")
            file.seek(offset)
            return file.read(count)

        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 16 or struct.unpack(order + "H", head[2:4])[0] not in (42, 43):
            return
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        counter, entry, pointer = [order + form for form in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I"))]
        width = struct.calcsize(pointer)
        (directory,) = struct.unpack(pointer, head[8:16] if big else head[4:8])
        seen = set()
        while directory and directory not in seen:
            seen.add(directory)
            (count,) = struct.unpack(counter, fetch(directory, struct.calcsize(counter)))
            start, length = directory + struct.calcsize(counter), count * struct.calcsize(entry)
            table = fetch(start, length + width)
            blocks = {}
            for tag, kind, number, value in struct.iter_unpack(entry, table[:length]):
                inline = number * _TIFF_TYPE_BYTES.get(kind, 1)
                if inline > width:
                    value = fetch(struct.unpack(pointer, value)[0], inline)
                if tag in _TIFF_BLOCK_TAGS or tag in _TIFF_BLOCK_TAGS.values():
                    form = f"{order}u{_TIFF_TYPE_BYTES.get(kind, 1)}"
                    blocks[tag] = np.frombuffer(value, form, number).astype(np.int64)
            for begin, length_of in _TIFF_BLOCK_TAGS.items():
                if begin in blocks and len(blocks.get(length_of, ())) == len(blocks[begin]) > 0:
                    fetch(int((blocks[begin] + blocks[length_of]).max()), 0)
            (directory,) = struct.unpack(pointer, table[length:])


def read_raster(
    path: str | Path,
    bands: Sequence[int] | None = None,
    window: Window | None = None,
    gsd: float | None = None,
    check: Callable[["Header"], None] | None = None,
) -> Layer:
    """The pixels of a raster file as they are, and where they lie.

    Args:
        path (`str`): A file that GDAL reads.
        bands (`Sequence[int]`, *optional*): Channels, counted from 1. Default: all.
        window (`Window`, *optional*): Only this piece.
        gsd (`float`, *optional*): Metres per pixel where the file has no coordinate system.
        check (`Callable`, *optional*): Gets the file's [`Header`] before its pixels are read; raises to refuse it.

    Returns:
        [`Layer`]: `pixels` of shape `(channels, height, width)`; transform and gsd are those of the piece.

    Raises:
        OSError: the file is missing, truncated or otherwise unreadable.
        ValueError: it lacks a coordinate system and `gsd` is not given, or lacks a channel.
    """
    path = str(path)
    try:
        if os.path.isfile(path):  # and not in an archive, as GDAL can read them
            state = os.stat(path)
            _check_whole_tiff(path, state.st_size, state.st_mtime_ns)
        with warnings.catch_warnings(), rasterio.Env(**_GDAL_OPTIONS):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # is an error below, or expected
            with rasterio.open(path) as raster:
                if check is not None:
                    check(_header_of(raster))
                count, height, width = raster.count, raster.height, raster.width
                unknown = [band for band in bands or () if not 1 <= band <= count]
                if unknown:
                    raise ValueError(f"{path} has {count} channels, so no {unknown}")
                transform, crs = tuple(raster.transform[:6]), raster.crs
                piece = None
                if window is not None:
                    top, left, rows, columns = window.on(height, width, path)
                    piece = rasterio.windows.Window(left, top, columns, rows)
                    a, b, c, d, e, f = transform
                    transform = (a, b, c + a * left + b * top, d, e, f + d * left + e * top)
                pixels = raster.read(bands, window=piece)  # (C, H, W)
    except (RasterioError, struct.error) as error:
        raise OSError(f"{path}: {_last_cause(error)}") from error
    referenced = crs is not None and transform != _IDENTITY
    if not referenced and gsd is None:
        raise ValueError(
            f"{path} has no coordinate system, so its resolution is unknown. Give its metres per pixel as `gsd`, or "
            "add the georeference to the file (`gdal_edit.py -a_srs ... -a_ullr ...`)."
        )
    if not referenced:
        return Layer(pixels, None, None, gsd)
    facts = _describe_crs(crs.wkt)
    try:
        metres = _resolution(facts, transform, *pixels.shape[1:])
    except ValueError as error:
        if gsd is None:
            raise ValueError(f"{path}: {error}") from error
        metres = gsd
    return Layer(pixels, facts[0], transform, metres)


def _last_cause(error: BaseException) -> str:
    """GDAL's own words: rasterio raises `Read failed. See previous exception for details.`"""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


class Header(NamedTuple):
    """What a raster file says of itself.

    Attributes:
        height, width (`int`): In pixels.
        nodata (`float`, *optional*): Value of pixels without data.
        has_mask (`bool`): Whether such pixels are marked in a mask beside the channels instead.
        names (`list[str | None]`): Descriptions of the channels.
    """

    height: int
    width: int
    nodata: float | None
    has_mask: bool
    names: list[str | None]


def _header_of(raster: rasterio.DatasetReader) -> Header:
    flags = raster.mask_flag_enums[0]
    has_mask = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
    return Header(raster.height, raster.width, raster.nodata, has_mask, list(raster.descriptions))


def read_header(path: str | Path) -> Header:
    """What a raster file says of itself, without its pixels.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        with warnings.catch_warnings(), rasterio.Env(**_GDAL_OPTIONS):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                return _header_of(raster)
    except RasterioError as error:
        raise OSError(f"{path}: {_last_cause(error)}") from error


def read_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a raster file.

    Raises:
        OSError: it cannot be opened.
    """
    return read_header(path)[:2]


def crop(array: np.ndarray, window: Window | None, what: str) -> np.ndarray:
    """The piece of `array (..., height, width)`, as a view."""
    if window is None:
        return array
    top, left, height, width = window.on(*array.shape[-2:], what)
    return array[..., top : top + height, left : left + width]


def present(layer: Layer, nodata: Any = None) -> Layer | None:
    """`layer`, or `None` if not one of its pixels holds data: such a layer is stored as missing.

    Args:
        layer ([`Layer`]): As read.
        nodata (number or a list of them, *optional*): Values of pixels without data; NaN and infinities are some too.
    """
    for channel in layer.pixels:  # almost always, the first pixels of the first channel decide
        for rows in (channel[:8], channel[8:]):
            if not without_data(rows, nodata).all():
                return layer
    return None


def check_same_ground(layers: Mapping[str, Layer | None]) -> None:
    """Raise unless all layers of a sample cover the same ground, to half a pixel of the finer one of two.

    Args:
        layers (`dict[str, Layer | None]`): File name to what was read from it.

    Raises:
        ValueError: two files differ in their coordinate system or their bounds; or, where one has none, in their size.
    """
    (first, reference), *others = [(path, layer) for path, layer in layers.items() if layer is not None] or [("", None)]
    for path, layer in others:
        if reference.crs is not None and layer.crs is not None:
            if reference.crs != layer.crs:
                raise ValueError(f"{first} is in {reference.crs}, {path} in {layer.crs}: bring them to one grid first")
            own, others_ = _corners(reference), _corners(layer)
            # In units of the coordinates: the length of the shorter step from pixel to pixel.
            step = min(min(math.hypot(x[0], x[3]), math.hypot(x[1], x[4])) for x in (reference[2], layer[2]))
            if any(abs(x - y) > 0.5 * step for x, y in zip(own, others_)):
                raise ValueError(
                    f"{first} and {path} do not cover the same ground: their first and last corners are {own} and "
                    f"{others_}"
                )
        else:
            sizes = [tuple(side * each.gsd for side in each.pixels.shape[1:]) for each in (reference, layer)]
            if any(abs(x - y) > 0.5 * min(reference.gsd, layer.gsd) for x, y in zip(*sizes)):
                raise ValueError(
                    f"{first} and {path} do not cover the same ground: they are {_metres(sizes[0])} and "
                    f"{_metres(sizes[1])} metres high and wide"
                )


def _corners(layer: Layer) -> tuple[float, float, float, float]:
    a, b, c, d, e, f = layer.transform
    height, width = layer.pixels.shape[1:]
    return c, f, c + a * width + b * height, f + d * width + e * height


def _metres(size: tuple[float, float]) -> str:
    return f"{size[0]:g} x {size[1]:g}"


def list_files(folder: Path, ending: str) -> list[Path]:
    """The files of a folder whose names end so, by name; hidden ones do not count.

    Raises:
        PermissionError: it may not be listed (`Path.glob` would take it for empty).
    """
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not path.name.startswith("."))


def read_json(path: Path) -> dict:
    """A JSON file.

    Raises:
        OSError: it is missing.
        ValueError: it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def missing_file(path: str | Path, why: str) -> FileNotFoundError:
    """For an item that lacks a partner: as payload, it lists the item in the report."""
    return FileNotFoundError(f"{path} is missing: {why}")
