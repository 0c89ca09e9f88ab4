"""Converters: pixels, georeference and labels are those of the source bit for bit, and bad input is named, not lost."""

import importlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest


rasterio = pytest.importorskip("rasterio", reason="conversion needs the extra `data`")
pq = pytest.importorskip("pyarrow.parquet", reason="shards need the extra `data`")
pytest.importorskip("datasets", reason="shards need the extra `data`")

from rasterio.transform import from_origin  # noqa: E402

from modeling_mapex.data_mapex import read_schema, stream_shards  # noqa: E402
from modeling_mapex.inspection_mapex import validate_shards  # noqa: E402
from modeling_mapex.shards_mapex import Layer, shard_files  # noqa: E402


# The tests' own reading and writing of images without georeference.
pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
ROOT = Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the archives beside the repository")
UTM = "EPSG:32633"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch):
    """As when a script is run: its own folder comes first."""
    monkeypatch.syspath_prepend(str(ROOT / "conversion"))


def load(name: str):
    return importlib.import_module(name)


def convert(name: str, source, output, *options) -> int:
    return load(f"convert_{name}").main(["--source", str(source), "--output", str(output), *map(str, options)])


def write_raster(path: Path, pixels: np.ndarray, gsd=10.0, crs=UTM, origin=(500_000, 5_000_000), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype}
    if crs:
        profile |= {"crs": crs, "transform": from_origin(*origin, gsd, gsd)}
    with rasterio.open(path, "w", **profile, **options) as raster:
        raster.write(pixels)
    return path


def pixels_of(dtype: str, *shape: int) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return RNG.normal(-12, 4, shape).astype(dtype)
    return RNG.integers(1, min(4000, np.iinfo(dtype).max), shape).astype(dtype)


@pytest.fixture(autouse=True)
def _same_pixels_in_any_order_of_tests():
    global RNG
    RNG = np.random.default_rng(0)


def samples_of(output, split="train") -> dict[str, dict]:
    assert validate_shards(output, split) == []
    return dict(sorted((sample["id"], sample) for sample in stream_shards(output, split)))


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


def assert_as_in_file(sample: dict, modality: str, path) -> None:
    """Pixels, coordinate system and transform, as plain rasterio reads them."""
    with rasterio.open(path) as raster:
        expected = raster.read()
        assert sample["images"][modality].dtype == expected.dtype
        assert np.array_equal(sample["images"][modality], expected, equal_nan=expected.dtype.kind == "f")
        assert sample["crs"][modality] == raster.crs.to_string()
        assert tuple(sample["transform"][modality]) == tuple(raster.transform)[:6]


# --- small sources, one of each layout ---


def make_eurosat(folder: Path, count=3) -> Path:
    for label, index in itertools.product(("Forest", "AnnualCrop", "River"), range(count)):
        write_raster(folder / label / f"{label}_{index}.tif", pixels_of("uint16", 13, 16, 16), 10.01)
    return folder


def make_sen1floods11(folder: Path) -> Path:
    degrees = {"gsd": 8.983152841195215e-05, "crs": "EPSG:4326"}
    for index, chip in enumerate(("Ghana_1", "India_2", "Spain_3")):
        degrees["origin"] = (10.0 * index, 8.0 + 15.0 * index)
        radar = pixels_of("float32", 2, 24, 32)
        radar[:, :5] = np.nan
        write_raster(folder / "S1Hand" / f"{chip}_S1Hand.tif", radar, nodata=np.nan, compress="deflate", **degrees)
        water = RNG.integers(-1, 2, (1, 24, 32)).astype("int16")
        write_raster(folder / "LabelHand" / f"{chip}_LabelHand.tif", water, **degrees)
    write_raster(folder / "S2Hand" / "Spain_3_S2Hand.tif", pixels_of("int16", 13, 24, 32), nodata=0, **degrees)
    return folder


TERRAMESH = {
    "S2L2A": ("s2", "int16", 12),
    "S2L1C": ("s2_l1c", "int16", 13),
    "S1RTC": ("s1", "float64", 2),
    "DEM": ("dem", "int16", 1),
    "NDVI": ("ndvi", "float64", 1),
    "S2RGB": ("rgb", "uint8", 3),
    "LULC": (None, "uint8", 1),
}


def make_terramesh(folder: Path) -> Path:
    for name, (_, dtype, count) in TERRAMESH.items():
        for chip in ("12D_34L_0_1", "12D_34L_2_2", "elsewhere"):
            pixels = pixels_of(dtype, count, 16, 16)
            write_raster(folder / name / f"{chip}.tif", pixels % 10 if name == "LULC" else pixels)
    return folder


def make_bigearthnet(folder: Path, patches=(("33UUP", "87_48"), ("33UUP", "9_3"), ("29SND", "5_5"))) -> Path:
    sizes = {60: 2, 20: 6, 10: 12}
    resolution = dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12"), 20) | {"B01": 60, "B09": 60}
    for index, (tile, position) in enumerate(patches):
        s2, s1 = (
            f"S2A_MSIL2A_2017061{index}T101031_{position}",
            f"S1A_IW_GRDH_1SDV_2017061{index}T165043_{tile}_{position}",
        )
        for band in ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"):
            gsd = resolution.get(band, 10)
            pixels = pixels_of("uint16", 1, sizes[gsd], sizes[gsd])
            write_raster(folder / "S2" / s2 / f"{s2}_{band}.tif", pixels, gsd)
        for band in ("VV", "VH"):
            write_raster(folder / "S1" / s1 / f"{s1}_{band}.tif", pixels_of("float32", 1, 12, 12))
        description = {"labels": ["Pastures", "Sea and ocean"][: index + 1]}
        s2_description = description | {"tile_source": f"S2A_MSIL1C_2017_N0205_R022_T{tile}_2017.SAFE"}
        s1_description = description | {"corresponding_s2_patch": s2}
        for root, name, content in (("S2", s2, s2_description), ("S1", s1, s1_description)):
            (folder / root / name / f"{name}_labels_metadata.json").write_text(json.dumps(content))
    return folder


CAMPAIGN = """
title: My field campaign
modalities:
  s1: {pattern: "s1/{id}.tif", bands: [VV, VH], unit: db}
  planet: {pattern: "planet/{id}_sr.tif", bands: [r, nir], channels: [1, 4], unit: dn, gsd: 5.0, optional: true}
labels:
  water: {pattern: "labels/{id}.tif", kind: mask, names: {0: land, 1: water}, ignore_index: -1}
  biomass: {pattern: "agb/{id}.tif", kind: map, unit: t/ha, optional: true}
place_regex: "^(.*)_[0-9]+$"
"""


def make_campaign(folder: Path) -> Path:
    for name in ("north_1", "north_2", "south_1"):
        write_raster(folder / "s1" / f"{name}.tif", pixels_of("float32", 2, 12, 16))
        write_raster(folder / "labels" / f"{name}.tif", RNG.integers(-1, 2, (1, 12, 16)).astype("int8"))
        if name != "south_1":
            # Of twice the resolution, and without a coordinate system.
            write_raster(folder / "planet" / f"{name}_sr.tif", pixels_of("uint16", 4, 24, 32), crs=None)
            write_raster(folder / "agb" / f"{name}.tif", pixels_of("float32", 1, 12, 16))
    (folder / "campaign.yaml").write_text(CAMPAIGN)
    return folder


ARRAYS = """
id: [chip, month]
place: chip
modalities:
  s1: {array: radar, channels: [0, 1], bands: [VV, VH], unit: db, gsd: 10, nodata: -9999}
  s1_descending: {array: radar, channels: [2, 3], bands: [VV, VH], unit: db, gsd: 10, nodata: -9999, sensor: s1}
  dem: {array: height, bands: [elevation], unit: metres, gsd: 10}
labels:
  cover: {array: cover, kind: mask, names: {3: grass, 7: rock}}
  mass: {array: mass, kind: map, unit: t/ha}
  seen: {array: seen, kind: multi_label, names_array: species}
  owner: {array: owner, kind: class, names: [state, private]}
"""


def make_arrays(folder: Path) -> dict[str, np.ndarray]:
    arrays = {
        "radar": pixels_of("float32", 6, 4, 8, 8),
        "height": pixels_of("int16", 6, 8, 8),
        "cover": RNG.choice(np.array([3, 7], "uint8"), (6, 8, 8)),
        "mass": pixels_of("float64", 6, 8, 8),
        "seen": RNG.integers(0, 2, (6, 3)).astype("uint8"),
        "species": np.array(["oak", "elm", "ash"]),
        "owner": np.array([0, 1, 1, 0, 0, 1]),
        "chip": np.array(["a", "a", "b", "b", "c", "c"]),
        "month": np.array([1, 2] * 3),
    }
    arrays["radar"][4, 2:] = -9999.0
    arrays["height"][5] = -9999
    folder.mkdir(exist_ok=True)
    np.savez(folder / "chips.npz", **arrays)
    (folder / "chips.yaml").write_text(ARRAYS)
    return arrays


# --- what comes out is what went in ---


def test_bigearthnet_package(tmp_path):
    """The real patches that anybody can install."""
    pytest.importorskip("bigearthnet_common", reason="the example patches need the extra `demo`")
    for archive in metadata.files("bigearthnet-common"):
        if archive.name.endswith("-Example.tar.bz2"):
            with tarfile.open(archive.locate()) as tar:
                tar.extractall(tmp_path / "source", filter="data")
    assert convert("bigearthnet", tmp_path / "source", tmp_path / "shards") == 0
    samples = samples_of(tmp_path / "shards")
    assert len(samples) == 6 and {sample["place"] for sample in samples.values()} == {
        "29SND",
        "29UPU",
        "33UUP",
        "35VPK",
    }
    schema = read_schema(tmp_path / "shards")
    names = schema.labels["labels"]["names"]
    assert len(set(names)) == 43
    for s1 in sorted((tmp_path / "source").glob("*/S1*")):
        description = json.loads((s1 / f"{s1.name}_labels_metadata.json").read_text())
        sample = samples[description["corresponding_s2_patch"]]
        s2 = tmp_path / "source" / "BigEarthNet-S2-Example" / sample["id"]
        for patch, modality in ((s1, "s1"), (s2, "s2")):
            for band, pixels in zip(schema.modalities[modality]["bands"], sample["images"][modality]):
                with rasterio.open(patch / f"{patch.name}_{band}.tif") as raster:
                    step = 120 // raster.height
                    assert step == {"B01": 6, "B09": 6}.get(
                        band, 2 if band in ("B05", "B06", "B07", "B8A", "B11", "B12") else 1
                    )
                    blocks = pixels.reshape(raster.height, step, raster.width, step)
                    assert (blocks == raster.read(1)[:, None, :, None]).all() and pixels.dtype == raster.dtypes[0]
                    if step == 1:
                        assert tuple(sample["transform"][modality]) == tuple(raster.transform)[:6]
                        assert sample["crs"][modality] == raster.crs.to_string()
            assert sample["gsd"][modality] == 10.0
        assert {name for name, there in zip(names, sample["labels"]["labels"]) if there} == set(description["labels"])


def test_bigearthnet_names_are_the_package_s():
    constants = pytest.importorskip("bigearthnet_common.constants", reason="the names to compare with: extra `demo`")
    assert sorted(load("convert_bigearthnet").LABELS) == sorted(constants.OLD_LABELS)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_eurosat(tmp_path, suffix):
    source = tmp_path / "source"
    if suffix == "tif":
        make_eurosat(source)
    else:
        for name in ("Forest/Forest_1", "River/River_7"):
            path = source / f"{name}.jpg"
            path.parent.mkdir(parents=True)
            with rasterio.open(path, "w", driver="JPEG", count=3, height=64, width=64, dtype="uint8") as raster:
                raster.write(pixels_of("uint8", 3, 64, 64))
    assert convert("eurosat", source, tmp_path / "shards") == 0
    samples = samples_of(tmp_path / "shards")
    schema = read_schema(tmp_path / "shards")
    files = sorted(source.glob(f"*/*.{suffix}"))
    assert list(samples) == [file.stem for file in files]
    for file in files:
        sample = samples[file.stem]
        assert schema.labels["label"]["names"][sample["labels"]["label"]] == file.parent.name
        if suffix == "tif":
            assert_as_in_file(sample, "s2_l1c", file)
            assert sample["gsd"]["s2_l1c"] == pytest.approx(10.01) and sample["sensors"]["s2_l1c"]["bands"][-1] == "B8A"
        else:
            with rasterio.open(file) as raster:
                assert np.array_equal(sample["images"]["rgb"], raster.read())
            assert (sample["gsd"]["rgb"], sample["crs"]["rgb"], sample["transform"]["rgb"]) == (10.0, None, None)


def test_sen1floods11(tmp_path):
    source = make_sen1floods11(tmp_path / "source")
    assert convert("sen1floods11", source, tmp_path / "shards") == 0
    samples = samples_of(tmp_path / "shards")
    assert list(samples) == ["Ghana_1", "India_2", "Spain_3"]
    for chip, sample in samples.items():
        assert_as_in_file(sample, "s1", source / "S1Hand" / f"{chip}_S1Hand.tif")
        with rasterio.open(source / "LabelHand" / f"{chip}_LabelHand.tif") as raster:
            assert np.array_equal(sample["labels"]["water"], raster.read(1)) and raster.dtypes == ("int16",)
            # Ten metres at the equator; meridians converge.
            expected = 10.0 * math.sqrt(math.cos(math.radians(raster.bounds.top)))
        assert sample["gsd"]["s1"] == pytest.approx(expected, rel=0.005)
    assert_as_in_file(samples["Spain_3"], "s2_l1c", source / "S2Hand" / "Spain_3_S2Hand.tif")
    assert samples["Ghana_1"]["images"]["s2_l1c"] is None


def test_terramesh(tmp_path):
    source = make_terramesh(tmp_path / "source")
    (source / "S1RTC" / "elsewhere.tif").unlink()
    write_raster(source / "DEM" / "12D_34L_0_1.tif", np.full((1, 16, 16), -9999, "int16"))
    assert convert("terramesh", source, tmp_path / "shards") == 0
    samples = samples_of(tmp_path / "shards")
    assert [sample["place"] for sample in samples.values()] == ["12D_34L", "12D_34L", "elsewhere"]
    for chip, sample in samples.items():
        for folder, (modality, dtype, _) in TERRAMESH.items():
            path = source / folder / f"{chip}.tif"
            if modality is None:
                with rasterio.open(path) as raster:
                    assert np.array_equal(sample["labels"]["lulc"], raster.read(1))
            elif not path.exists() or (modality, chip) == ("dem", "12D_34L_0_1"):  # absent, or without one valid pixel
                assert sample["images"][modality] is None
            else:
                assert sample["images"][modality].dtype == dtype
                assert_as_in_file(sample, modality, path)
    shutil.rmtree(source / "NDVI")
    shutil.rmtree(source / "LULC")
    assert convert("terramesh", source, tmp_path / "less") == 0
    schema = read_schema(tmp_path / "less")
    assert "ndvi" not in schema.modalities and schema.labels == {}


def test_geotiff_folder(tmp_path):
    source = make_campaign(tmp_path / "source")
    options = ("--description", source / "campaign.yaml")
    assert convert("geotiff_folder", source, tmp_path / "shards", *options) == 0
    samples = samples_of(tmp_path / "shards")
    assert [sample["place"] for sample in samples.values()] == ["north", "north", "south"]
    for name, sample in samples.items():
        assert_as_in_file(sample, "s1", source / "s1" / f"{name}.tif")
        for label, folder in (("water", "labels"), ("biomass", "agb")):
            if name == "south_1" and label == "biomass":
                assert sample["labels"][label] is None
            else:
                with rasterio.open(source / folder / f"{name}.tif") as raster:
                    assert np.array_equal(sample["labels"][label], raster.read(1))
        if name == "south_1":
            assert sample["images"]["planet"] is None
        else:
            with rasterio.open(source / "planet" / f"{name}_sr.tif") as raster:
                assert np.array_equal(sample["images"]["planet"], raster.read([1, 4]))
            assert sample["gsd"]["planet"] == 5.0
    spec = read_schema(tmp_path / "shards").modalities
    assert spec["s1"]["nodata"] == [-9999.0] and "nodata" not in spec["planet"]
    assert spec["planet"]["dtype"] == "uint16" and spec["s1"]["gsd"] == 10.0


def test_missing_data_as_files_and_description_say(tmp_path):
    """Of maps too what the files say; NaN in a list leaves the others; hidden files beside the images do not count."""
    source = make_campaign(tmp_path / "source")
    for name in ("north_1", "north_2"):
        mass = pixels_of("float32", 1, 12, 16)
        mass[0, 0, :3] = -5.0
        write_raster(source / "agb" / f"{name}.tif", mass, nodata=-5.0)
    write_raster(source / "s1" / "south_1.tif", np.full((2, 12, 16), np.inf, dtype=np.float32))
    (source / "s1" / "._north_1.tif").write_bytes(b"of another system")
    options = ("--description", source / "campaign.yaml")
    for nodata, expected in (("[.nan, -9999]", [-9999]), (".nan", None), ("-3", -3)):
        new = f"bands: [VV, VH], unit: db, nodata: {nodata}"
        (source / "campaign.yaml").write_text(CAMPAIGN.replace("bands: [VV, VH], unit: db", new))
        assert (
            convert("geotiff_folder", source, tmp_path / "shards", *options, "--overwrite") == 1
        )  # south has no pixel
        schema = read_schema(tmp_path / "shards")
        assert schema.modalities["s1"].get("nodata") == expected and schema.labels["biomass"]["nodata"] == -5.0
        assert list(samples_of(tmp_path / "shards")) == ["north_1", "north_2"]


def test_missing_data_marked_otherwise_than_in_the_first_file(tmp_path, capsys):
    """By another value, or in a mask beside the pixels: such a file is left out and named."""
    source = make_campaign(tmp_path / "source")
    options = ("--description", source / "campaign.yaml")
    for name, nodata in (("north_1", -1.0), ("north_2", -2.0)):
        write_raster(source / "s1" / f"{name}.tif", pixels_of("float32", 2, 12, 16), nodata=nodata)
    write_raster(source / "planet" / "north_1_sr.tif", pixels_of("uint16", 4, 24, 32), crs=None)
    with rasterio.open(source / "planet" / "north_1_sr.tif", "r+") as raster:
        raster.write_mask(np.arange(24 * 32).reshape(24, 32) % 2 == 0)
    assert convert("geotiff_folder", source, tmp_path / "shards", *options) == 1
    printed = capsys.readouterr().out
    assert "north_2.tif marks pixels without data by -2, others of `s1` by [-1.0]" in printed
    assert "north_1_sr.tif marks pixels without data in a mask, which is not read" in printed
    assert list(samples_of(tmp_path / "shards")) == ["south_1"]
    new = CAMPAIGN.replace("unit: db}", "unit: db, nodata: [-1, -2]}").replace("gsd: 5.0,", "gsd: 5.0, nodata: 0,")
    (source / "campaign.yaml").write_text(new)
    assert convert("geotiff_folder", source, tmp_path / "shards", *options, "--overwrite") == 0


def test_codes_of_a_mask_that_do_not_count(tmp_path):
    """As files say, unless they say so of a class."""
    source = make_campaign(tmp_path / "source")
    (source / "campaign.yaml").write_text(CAMPAIGN.replace(", ignore_index: -1", ""))
    for nodata, expected in ((-1, -1), (1, None)):
        for name in ("north_1", "north_2", "south_1"):
            codes = RNG.integers(-1 if expected else 0, 2, (1, 12, 16)).astype("int8")
            write_raster(source / "labels" / f"{name}.tif", codes, nodata=nodata)
        options = ("--description", source / "campaign.yaml", "--overwrite")
        assert convert("geotiff_folder", source, tmp_path / "shards", *options) == 0
        assert read_schema(tmp_path / "shards").labels["water"].get("ignore_index") == expected


def test_describing_reads_the_middle_of_a_file_only(tmp_path, monkeypatch):
    """A mosaic may be larger than memory; in degrees its resolution is that of its middle."""
    source = make_campaign(tmp_path / "source")
    for name in ("north_1", "north_2", "south_1"):
        for folder, dtype in (("s1", "float32"), ("labels", "int8")):
            pixels = pixels_of(dtype, 2 if folder == "s1" else 1, 13, 16)
            write_raster(source / folder / f"{name}.tif", pixels, 1e-4, "EPSG:4326", (10.0, 50.0))
    module, read_raster = load("convert_geotiff_folder"), load("conversion_reading").read_raster
    read = []
    monkeypatch.setattr(
        module, "read_raster", lambda *args, **options: read.append(args[2]) or read_raster(*args, **options)
    )
    arguments = module.GeoTiffArguments(
        source=str(source), output=str(tmp_path / "shards"), description=str(source / "campaign.yaml")
    )
    schema = module.prepare(arguments).schema
    assert {(window.height, window.width) for window in read} == {(1, 2), (2, 2)}
    assert schema.modalities["s1"]["gsd"] == read_raster(source / "s1" / "north_1.tif").gsd


def test_classes_from_folders(tmp_path):
    for name in ("Forest/Forest_1", "Forest/Forest_2", "River/River_1"):
        write_raster(tmp_path / "source" / f"{name}.tif", pixels_of("uint8", 3, 8, 8))
    description = tmp_path / "classes.yaml"
    description.write_text(
        'modalities: {rgb: {pattern: "{id}.tif", bands: [R, G, B], unit: uint8}}\n'
        "labels: {landuse: {kind: class, folder: true}}\n"
        'place: "near {id}"\n'
    )
    assert convert("geotiff_folder", tmp_path / "source", tmp_path / "shards", "--description", description) == 0
    samples = samples_of(tmp_path / "shards")
    assert {name: sample["labels"]["landuse"] for name, sample in samples.items()} == {
        "Forest/Forest_1": 0,
        "Forest/Forest_2": 0,
        "River/River_1": 1,
    }
    assert samples["River/River_1"]["place"] == "near River/River_1"


def test_npz(tmp_path):
    arrays = make_arrays(tmp_path)
    options = ("--description", tmp_path / "chips.yaml")
    assert convert("npz", tmp_path / "chips.npz", tmp_path / "shards", *options) == 0
    samples = list(samples_of(tmp_path / "shards").values())
    assert [sample["id"] for sample in samples] == ["a-1", "a-2", "b-1", "b-2", "c-1", "c-2"]
    assert [sample["place"] for sample in samples] == arrays["chip"].tolist()
    for row, sample in enumerate(samples):
        images, labels = sample["images"], sample["labels"]
        assert np.array_equal(images["s1"], arrays["radar"][row, :2]) and sample["crs"]["s1"] is None
        if row == 4:
            assert images["s1_descending"] is None
        else:
            assert np.array_equal(images["s1_descending"], arrays["radar"][row, 2:])
        if row == 5:  # the nodata values of the registered sensor are known
            assert images["dem"] is None
        else:
            assert np.array_equal(images["dem"], arrays["height"][row, None])
        assert np.array_equal(labels["cover"], arrays["cover"][row]) and np.array_equal(
            labels["mass"], arrays["mass"][row]
        )
        assert labels["seen"] == arrays["seen"][row].tolist() and labels["owner"] == arrays["owner"][row]
    assert read_schema(tmp_path / "shards").labels["seen"]["names"] == ["oak", "elm", "ash"]


def test_arrays_in_foreign_byte_order(tmp_path):
    arrays = make_arrays(tmp_path)
    swapped = {**arrays, "radar": arrays["radar"].astype(">f4"), "mass": arrays["mass"].astype(">f8")}
    np.savez(tmp_path / "chips.npz", **swapped)
    assert convert("npz", tmp_path / "chips.npz", tmp_path / "shards", "--description", tmp_path / "chips.yaml") == 0
    sample = samples_of(tmp_path / "shards")["a-1"]
    assert np.array_equal(sample["images"]["s1"], arrays["radar"][0, :2])
    assert np.array_equal(sample["labels"]["mass"], arrays["mass"][0])


# --- reading rasters ---


def test_crs_is_the_file_s_own(tmp_path):
    """A code is given only if it is the same system, not a similar one."""
    reading = load("conversion_reading")
    laea = "+proj=laea +lat_0=52 +lon_0=10 +x_0=4321000 +y_0=3210000 +ellps=GRS80 +units=m"
    layer = reading.read_raster(write_raster(tmp_path / "a.tif", pixels_of("uint8", 1, 8, 8), crs=laea))
    assert not layer.crs.startswith("EPSG") and rasterio.CRS.from_wkt(layer.crs) == rasterio.CRS.from_string(laea)
    assert reading.read_raster(write_raster(tmp_path / "b.tif", pixels_of("uint8", 1, 8, 8))).crs == UTM


def test_resolution_in_metres():
    reading = load("conversion_reading")
    metres = reading.resolution_in_metres
    assert metres(UTM, (20.0, 0, 5e5, 0, -5.0, 5e6), 10, 10) == 10.0
    assert metres(UTM, (6.0, 8.0, 0, 8.0, -6.0, 0), 10, 10) == pytest.approx(10.0)  # rotated
    assert metres("EPSG:2263", (1.0, 0, 0, 0, -1.0, 0), 10, 10) == pytest.approx(0.3048, rel=1e-5)  # US survey feet
    # Lengths of a degree on the WGS 84 ellipsoid: 111.320 km of the equator, 110.574 km of the meridian there;
    # 55.800 km and 111.412 km at 60 degrees.
    assert metres("EPSG:4326", (1.0, 0, 0, 0, -1.0, 0.5), 1, 1) == pytest.approx(math.sqrt(111320 * 110574), rel=1e-5)
    assert metres("EPSG:4326", (0.1, 0, 0, 0, -0.1, 60.05), 1, 1) == pytest.approx(
        math.sqrt(5580.0 * 11141.2), rel=1e-4
    )
    with pytest.raises(ValueError, match="not a coordinate reference system"):
        metres("nonsense", (1.0, 0, 0, 0, -1.0, 0), 1, 1)


def test_windows(tmp_path):
    reading = load("conversion_reading")
    pixels = pixels_of("uint16", 3, 6, 8)
    path = write_raster(tmp_path / "a.tif", pixels, 60.0)
    window = reading.Window(12, 24, 12, 12, (36, 48))  # of a grid six times as fine
    layer = reading.read_raster(path, [3, 1], window)
    assert np.array_equal(layer.pixels, pixels[[2, 0], 2:4, 4:6]) and layer.gsd == 60.0
    assert layer.transform == (60.0, 0.0, 500_000 + 4 * 60, 0.0, -60.0, 5_000_000 - 2 * 60)
    with pytest.raises(ValueError, match=r"a\.tif has 6 x 8 pixels: a chip of 10 x 10 .* Choose another --chip_size"):
        reading.read_raster(path, window=reading.Window(10, 10, 10, 10, (36, 48)))
    with pytest.raises(ValueError, match=r"a\.tif has 3 channels, so no \[4\]"):
        reading.read_raster(path, [1, 4])


@pytest.mark.parametrize(
    "options",
    [{}, {"compress": "deflate", "tiled": True, "blockxsize": 16, "blockysize": 16}, {"BIGTIFF": "YES"}, "tags", "jpg"],
)
def test_truncated_files_fail_wherever_they_are_cut(tmp_path, options):
    reading = load("conversion_reading")
    path = tmp_path / ("a.jpg" if options == "jpg" else "a.tif")
    if options == "jpg":
        with rasterio.open(path, "w", driver="JPEG", count=3, height=64, width=64, dtype="uint8") as raster:
            raster.write(pixels_of("uint8", 3, 64, 64))
    else:
        write_raster(path, pixels_of("uint16", 2, 32, 48), **(options if isinstance(options, dict) else {}))
    if options == "tags":  # these move to the end of the file, behind the pixels
        with rasterio.open(path, "r+") as raster:
            raster.update_tags(note="x" * 300)
    whole = path.read_bytes()
    assert reading.read_raster(path, gsd=10.0).gsd == 10.0
    for cut in sorted({*range(0, len(whole), 61), *range(len(whole) - 40, len(whole))}):
        path.write_bytes(whole[:cut])
        if options == "jpg" and cut >= len(whole) - 2:  # the end marker: all pixels may be there without it
            continue
        with pytest.raises(OSError, match=path.name):
            reading.read_raster(path, gsd=10.0)


def test_same_ground(tmp_path):
    reading = load("conversion_reading")

    def layer(height, width, gsd, crs=UTM, left=500_000.0):
        transform = None if crs is None else (gsd, 0.0, left, 0.0, -gsd, 5e6)
        return Layer(np.zeros((1, height, width)), crs, transform, gsd)

    reference = layer(12, 12, 10.0)
    for other in (layer(2, 2, 60.0), layer(12, 12, 10.0, left=500_004.0), layer(4, 4, 30.0, crs=None), None):
        reading.check_same_ground({"a.tif": reference, "b.tif": other})
    for other, message in (
        (layer(12, 12, 10.0, left=500_006.0), "a.tif and b.tif do not cover the same ground: their first and last"),
        (layer(2, 3, 60.0), "do not cover the same ground"),
        (layer(5, 4, 30.0, crs=None), "a.tif and b.tif do not cover the same ground: they are 120 x 120 and 150 x 120"),
        (layer(12, 12, 10.0, crs="EPSG:32634"), "a.tif is in EPSG:32633, b.tif in EPSG:32634"),
    ):
        with pytest.raises(ValueError, match=message):
            reading.check_same_ground({"a.tif": reference, "b.tif": other})


# --- chips ---


def test_chips_of_layers_of_different_resolution(tmp_path, capsys):
    source = make_campaign(tmp_path / "source")
    options = ("--description", source / "campaign.yaml", "--chip_size", 10)
    assert convert("geotiff_folder", source, tmp_path / "shards", *options) == 0
    printed = capsys.readouterr().out
    assert printed.count("edges that fill no chip of 10 pixels were left out") == 1
    # Of the finest layer, 24 x 32 pixels of 5 m, chips of 10 x 10; south_1, which lacks it, gets as large ones.
    samples = samples_of(tmp_path / "shards")
    assert len(samples) == 3 * 2 * 3 and samples["south_1_10_20"]["images"]["s1"].shape == (2, 5, 5)
    sample = samples["north_1_10_20"]
    with rasterio.open(source / "planet" / "north_1_sr.tif") as raster:
        assert np.array_equal(sample["images"]["planet"], raster.read([1, 4])[:, 10:20, 20:30])
    with rasterio.open(source / "s1" / "north_1.tif") as raster:
        assert np.array_equal(sample["images"]["s1"], raster.read()[:, 5:10, 10:15])
        assert tuple(sample["transform"]["s1"]) == (10.0, 0.0, 500_100.0, 0.0, -10.0, 4_999_950.0)
    with rasterio.open(source / "labels" / "north_1.tif") as raster:
        assert np.array_equal(sample["labels"]["water"], raster.read(1)[5:10, 10:15])
    assert sample["place"] == "north"


def test_chips_of_patches_and_arrays(tmp_path, capsys):
    source = make_bigearthnet(tmp_path / "source")
    assert convert("bigearthnet", source, tmp_path / "whole") == 0
    assert convert("bigearthnet", source, tmp_path / "chips", "--chip_size", 5) == 0
    assert "`labels` describes whole images" in capsys.readouterr().out
    whole, chips = samples_of(tmp_path / "whole"), samples_of(tmp_path / "chips")
    assert len(chips) == 4 * len(whole)
    for name, sample in chips.items():
        image, top, left = name.rsplit("_", 2)
        for modality, pixels in sample["images"].items():
            expected = whole[image]["images"][modality][:, int(top) : int(top) + 5, int(left) : int(left) + 5]
            assert np.array_equal(pixels, expected)
            assert sample["transform"][modality][2] == whole[image]["transform"][modality][2] + 10 * int(left)
    arrays = make_arrays(tmp_path / "arrays")
    options = ("--description", tmp_path / "arrays" / "chips.yaml", "--chip_size", 4, "--limit", 1)
    assert convert("npz", tmp_path / "arrays" / "chips.npz", tmp_path / "pieces", *options) == 0
    samples = samples_of(tmp_path / "pieces")
    assert list(samples) == ["a-1_0_0", "a-1_0_4", "a-1_4_0", "a-1_4_4"]
    assert np.array_equal(samples["a-1_4_0"]["labels"]["mass"], arrays["mass"][0, 4:, :4])


def test_images_smaller_than_a_chip_are_reported(tmp_path, capsys):
    source = make_eurosat(tmp_path / "source", 1)
    write_raster(source / "River" / "River_0.tif", pixels_of("uint16", 13, 8, 16))
    assert convert("eurosat", source, tmp_path / "shards", "--chip_size", 16) == 1
    assert "River_0.tif: is 8 x 16 pixels, smaller than a chip of 16" in capsys.readouterr().out


# --- bad input ---


def test_truncated_file_is_left_out_and_read_again(tmp_path, capsys):
    source = make_eurosat(tmp_path / "source")
    broken = source / "Forest" / "Forest_1.tif"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    assert convert("eurosat", source, tmp_path / "shards") == 1
    printed = capsys.readouterr().out
    assert f"left out: {broken}: " in printed and "8 samples in 1 shards" in printed and "1 items left out" in printed
    assert "Forest_1" not in samples_of(tmp_path / "shards")
    broken.write_bytes(whole)
    assert convert("eurosat", source, tmp_path / "shards", "--resume") == 0
    assert convert("eurosat", source, tmp_path / "fresh") == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "fresh")


def test_nothing_can_be_read(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / f"{name}.tif").write_bytes(b"no image")
    assert convert("eurosat", tmp_path / "source", tmp_path / "shards") == 2
    assert capsys.readouterr().out.count("left out: ") == 2
    assert list((tmp_path / "shards").iterdir()) == []


def test_missing_pair(tmp_path, capsys):
    source = make_sen1floods11(tmp_path / "source")
    (source / "S1Hand" / "Ghana_1_S1Hand.tif").unlink()
    (source / "LabelHand" / "India_2_LabelHand.tif").unlink()
    assert convert("sen1floods11", source, tmp_path / "shards") == 1
    printed = capsys.readouterr().out
    for missing in ("Ghana_1_S1Hand.tif", "India_2_LabelHand.tif"):
        assert f"{missing} is missing" in printed
    assert list(samples_of(tmp_path / "shards")) == ["Spain_3"]


def test_bigearthnet_without_partner(tmp_path, capsys):
    source = make_bigearthnet(tmp_path / "source")
    first, second = sorted((source / "S2").iterdir())[:2]
    shutil.rmtree(first)
    (radar,) = (path for path in (source / "S1").iterdir() if path.name.endswith(second.name[-4:]))
    shutil.rmtree(radar)
    assert convert("bigearthnet", source, tmp_path / "shards") == 1
    printed = capsys.readouterr().out
    assert f"its Sentinel-2 patch {first.name} is missing" in printed
    assert f"left out: {second}: its Sentinel-1 patch is missing" in printed
    assert len(samples_of(tmp_path / "shards")) == 1
    assert convert("bigearthnet", source, tmp_path / "all", "--allow_missing") == 0
    samples = samples_of(tmp_path / "all")
    assert samples[first.name]["images"]["s2"] is None and samples[second.name]["images"]["s1"] is None
    assert {sample["place"] for sample in samples.values()} == {"33UUP", "29SND"}


def test_bigearthnet_with_damaged_metadata_and_missing_band(tmp_path, capsys):
    source = make_bigearthnet(tmp_path / "source")
    patches = sorted((source / "S2").iterdir())
    (patches[0] / f"{patches[0].name}_B8A.tif").unlink()
    (patches[1] / f"{patches[1].name}_labels_metadata.json").write_text('{"labels": ["Pastu')
    radar = sorted((source / "S1").iterdir())[2]
    (radar / f"{radar.name}_labels_metadata.json").unlink()
    assert convert("bigearthnet", source, tmp_path / "shards") == 2
    printed = capsys.readouterr().out
    assert "_B8A.tif: " in printed and "_labels_metadata.json is damaged" in printed
    assert f"left out: {radar}: " in printed and "No such file" in printed


def test_different_ground(tmp_path, capsys):
    source = make_terramesh(tmp_path / "source")
    moved = write_raster(source / "DEM" / "elsewhere.tif", pixels_of("int16", 1, 16, 16), origin=(500_300, 5_000_000))
    smaller = write_raster(source / "S2RGB" / "12D_34L_0_1.tif", pixels_of("uint8", 3, 16, 12))
    assert convert("terramesh", source, tmp_path / "shards") == 1
    printed = capsys.readouterr().out
    assert printed.count("do not cover the same ground") == 2 and str(moved) in printed and str(smaller) in printed
    assert list(samples_of(tmp_path / "shards")) == ["12D_34L_2_2"]


def test_other_type_and_no_crs(tmp_path, capsys):
    source = make_terramesh(tmp_path / "source")
    write_raster(source / "DEM" / "elsewhere.tif", pixels_of("float32", 1, 16, 16))
    write_raster(source / "S2L2A" / "12D_34L_0_1.tif", pixels_of("int16", 12, 16, 16), crs=None)
    assert convert("terramesh", source, tmp_path / "shards") == 1
    printed = capsys.readouterr().out
    assert "`dem` is of type float32, the schema says int16" in printed
    assert "12D_34L_0_1.tif has no coordinate system, so its resolution is unknown. Give its metres" in printed


def test_duplicate_ids(tmp_path, capsys):
    source = make_eurosat(tmp_path / "source", 1)
    shutil.copy(source / "Forest" / "Forest_0.tif", source / "River" / "Forest_0.tif")
    assert convert("eurosat", source, tmp_path / "shards") == 1
    assert "River/Forest_0.tif: the id `Forest_0` is taken by an earlier item" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bigearthnet", "eurosat", "sen1floods11", "terramesh", "geotiff_folder", "npz"])
def test_empty_or_missing_source(tmp_path, capsys, name):
    (tmp_path / "chips.yaml").write_text(ARRAYS if name == "npz" else CAMPAIGN)
    options = ("--description", tmp_path / "chips.yaml") if name in ("npz", "geotiff_folder") else ()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no archive")
    for source in ("empty", "missing", "file"):
        assert convert(name, tmp_path / source, tmp_path / "shards", *options) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and str(tmp_path / source) in error and "\n" not in error
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unit: db}", "unit: db, colour: red}", r"modality `s1` has unknown keys \['colour'\]"),
        ("title: My field campaign", "titel: x", r"has unknown keys \['titel'\]"),
        ('pattern: "s1/{id}.tif", ', "", r"modality `s1` lacks \['pattern'\]"),
        ("s1/{id}.tif", "s1/*.tif", r"the pattern of `s1` has no \{id\}"),
        ("s1/{id}.tif", "radar/{id}.tif", r"No file in .* matches \['radar/\{id\}.tif'\]"),
        ("[VV, VH]", "[VV, HH]", r"the sensor `s1` has no bands \['HH'\]. It has \['VV', 'VH'\]"),
        ("[VV, VH]", "[VV]", r"s1/north_1.tif has 2 channels, the description of `s1` has the bands \['VV'\]"),
        ("[VV, VH]", "VV", "`bands` must be a list of names, is 'VV'"),
        ("unit: db}", "unit: dn}", r"`unit` is 'dn', this sensor comes in \['db', 'linear'\]"),
        ("channels: [1, 4]", "channels: [1]", "1 `channels` for 2 `bands`"),
        ("channels: [1, 4]", "channels: [1, 9]", r"has 4 channels, so no \[9\]"),
        ("gsd: 5.0", "gsd: five", "`gsd` must be metres per pixel, above 0, is 'five'"),
        ("gsd: 5.0, ", "", "north_1_sr.tif has no coordinate system, so its resolution is unknown"),
        ("kind: mask", "kind: masks", r"`kind` must be one of \['mask', 'map', 'class'\], is 'masks'"),
        ("{0: land, 1: water}", "[no, yes]", "put such `names` into quotes"),
        ("{0: land, 1: water}", "land", "`names` must be a list of names or codes with names"),
        ("unit: t/ha, ", "unit: t/ha, nodata: [-1, -2], ", r"a map has one `nodata`, got \[-1, -2\]"),
        ("labels:\n", "labels:\n  use: {kind: class, folder: true}\n", r"`use` is the folder in \{id\}, but some ids"),
        ("(.*)", ".*", "`place_regex` needs a group"),
        ("(.*)", "(.*", "`place_regex` is no regular expression"),
        ("modalities:", "modalities: [", "is no valid YAML"),
    ],
)
def test_bad_descriptions(tmp_path, capsys, old, new, message):
    source = make_campaign(tmp_path / "source")
    assert old in CAMPAIGN
    (source / "campaign.yaml").write_text(CAMPAIGN.replace(old, new, 1))
    assert convert("geotiff_folder", source, tmp_path / "shards", "--description", source / "campaign.yaml") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_bands_in_another_order_than_files_say(tmp_path, capsys):
    source = make_campaign(tmp_path / "source")
    with rasterio.open(source / "s1" / "north_1.tif", "r+") as raster:
        raster.descriptions = ("VH", "VV")
    assert convert("geotiff_folder", source, tmp_path / "shards", "--description", source / "campaign.yaml") == 2
    assert "calls its channels ['VH', 'VV'], the description of `s1` ['VV', 'VH']" in capsys.readouterr().err


def test_geotiff_folder_reports_what_differs_from_the_first_file(tmp_path, capsys):
    source = make_campaign(tmp_path / "source")
    write_raster(source / "s1" / "north_2.tif", pixels_of("float32", 3, 12, 16))
    (source / "labels" / "south_1.tif").unlink()
    write_raster(source / "s1" / "nowhere.tif", pixels_of("float32", 2, 12, 16))
    write_raster(source / "labels" / "nowhere.tif", pixels_of("int8", 1, 12, 16))
    options = ("--description", source / "campaign.yaml")
    assert convert("geotiff_folder", source, tmp_path / "shards", *options) == 1
    printed = capsys.readouterr().out
    assert "`s1` has the shape (3, 12, 16); its bands are ['VV', 'VH']" in printed
    assert f"{source / 'labels' / 'south_1.tif'} is missing: `water` is not `optional: true`" in printed
    assert "does not match the id `nowhere`" in printed
    assert list(samples_of(tmp_path / "shards")) == ["north_1"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("array: radar, channels: [0, 1]", "array: radio", "has no array `radio`. It has ['radar'"),
        ("channels: [0, 1]", "channels: [0, 4]", "has the channels 0 to 3; `channels` are [0, 4]"),
        ("channels: [0, 1], ", "", "4 channels do not fit the bands ['VV', 'VH']"),
        (", gsd: 10}", "}", "modality `dem` lacks ['gsd']"),
        ("array: cover", "array: radar", "is not (samples, height, width); for one channel of more, give `channel`"),
        ("names_array: species", "names: [oak]", "does not have a column for each of 1 names"),
        ("array: owner", "array: species", "is not one integer a sample"),
        ("place: chip", "place: radar", "Array `radar` of"),
        ("array: mass", "array: species", "is not (samples, height, width)"),
    ],
)
def test_bad_descriptions_of_arrays(tmp_path, capsys, old, new, message):
    make_arrays(tmp_path)
    assert old in ARRAYS
    (tmp_path / "chips.yaml").write_text(ARRAYS.replace(old, new, 1))
    options = ("--description", tmp_path / "chips.yaml")
    assert convert("npz", tmp_path / "chips.npz", tmp_path / "shards", *options) == 2
    assert message in capsys.readouterr().err


def test_truncated_npz(tmp_path, capsys):
    make_arrays(tmp_path)
    whole = (tmp_path / "chips.npz").read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 10):
        path = tmp_path / f"cut{cut}.npz"
        path.write_bytes(whole[:cut])
        options = ("--description", tmp_path / "chips.yaml")
        assert convert("npz", path, tmp_path / "shards", *options) == 2
        assert f"error: {path}" in capsys.readouterr().err


def test_existing_output(tmp_path, capsys):
    source = make_eurosat(tmp_path / "source", 1)
    assert convert("eurosat", source, tmp_path / "shards") == 0
    before = contents(tmp_path / "shards")
    assert convert("eurosat", source, tmp_path / "shards") == 2
    error = capsys.readouterr().err
    assert "is already there. Pass --resume" in error and contents(tmp_path / "shards") == before
    assert convert("eurosat", source, tmp_path / "shards", "--split", "validation") == 0
    assert convert("eurosat", source, tmp_path / "shards", "--overwrite", "--limit", 2) == 0
    assert len(samples_of(tmp_path / "shards")) == 2 and len(samples_of(tmp_path / "shards", "validation")) == 3


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path, capsys):
    source = make_eurosat(tmp_path / "source", 1)
    (tmp_path / "locked").mkdir(mode=0o500)
    assert convert("eurosat", source, tmp_path / "locked" / "shards") == 2
    assert capsys.readouterr().err.startswith("error: Permission denied: ")


def test_output_is_a_file(tmp_path, capsys):
    source = make_eurosat(tmp_path / "source", 1)
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "shards"):
        assert convert("eurosat", source, output) == 2
        assert f"{tmp_path / 'file'}" in capsys.readouterr().err


def test_bad_options(tmp_path, capsys):
    source = make_eurosat(tmp_path / "source", 1)
    assert convert("eurosat", source, tmp_path / "shards", "--chip_size", -1) == 2
    assert "--chip_size must be at least 0, got -1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        convert("eurosat", source, tmp_path / "shards", "--chips", 3)
    assert stopped.value.code == 2 and "unrecognized arguments: --chips 3" in capsys.readouterr().err


# --- interruptions and processes ---


def test_interrupted_run_goes_on(tmp_path, capsys, monkeypatch):
    source = make_eurosat(tmp_path / "source", 4)
    module = load("convert_eurosat")
    # The smallest shard, a megabyte, is more than these chips: make them several.
    common = load("conversion_common")
    write_shards = common.write_shards
    monkeypatch.setattr(
        common,
        "write_shards",
        lambda *arguments, **options: write_shards(*arguments, **options | {"shard_bytes": 15_000}),
    )
    from modeling_mapex import writing_mapex

    monkeypatch.setattr(writing_mapex, "_ROW_GROUP_BYTES", 1)
    assert convert("eurosat", source, tmp_path / "whole") == 0
    assert len(shard_files(tmp_path / "whole", "train")) > 3
    reads = []

    def interrupted(item):
        reads.append(item.id)
        if len(reads) == 8:
            raise KeyboardInterrupt
        return original(item)

    original = module.read
    monkeypatch.setattr(module, "read", interrupted)
    assert convert("eurosat", source, tmp_path / "shards") == 130
    assert "Nothing half-written is left; the same command with --resume" in capsys.readouterr().err
    assert contents(tmp_path / "shards") == {}
    assert list(tmp_path.glob("shards/**/*.part")) == []
    assert convert("eurosat", source, tmp_path / "shards") == 2
    assert "was begun and not finished. Pass --resume" in capsys.readouterr().err
    reads[:] = [""] * 8
    assert convert("eurosat", source, tmp_path / "shards", "--resume") == 0
    assert 0 < len(reads) - 8 < 12  # what was complete is not read again
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_commands_with_processes(tmp_path):
    """As a user calls them, in two processes: the same bytes as in one."""
    source = make_campaign(tmp_path / "source")
    (source / "planet" / "north_2_sr.tif").write_bytes(b"broken")
    options = ["--description", str(source / "campaign.yaml"), "--source", str(source)]
    script = str(ROOT / "conversion" / "convert_geotiff_folder.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, script, *options, "--output", str(tmp_path / "two"), "--workers", "2"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert finished.returncode == 1, finished.stderr
    assert f"left out: {source / 's1' / 'north_2.tif'}: " in finished.stdout
    assert "north_2_sr.tif' not recognized as being in a supported file format" in finished.stdout
    assert convert("geotiff_folder", source, tmp_path / "one", *options[:2]) == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_workers_of_every_kind_of_reader(tmp_path):
    make_arrays(tmp_path)
    sources = {
        "bigearthnet": (make_bigearthnet(tmp_path / "ben"), ()),
        "npz": (tmp_path / "chips.npz", ("--description", tmp_path / "chips.yaml")),
    }
    for name, (source, options) in sources.items():
        for workers in (0, 2):
            assert convert(name, source, tmp_path / f"{name}{workers}", *options, "--workers", workers) == 0
        assert contents(tmp_path / f"{name}0") == contents(tmp_path / f"{name}2")


@pytest.mark.parametrize("name", ["bigearthnet", "eurosat", "sen1floods11", "terramesh", "geotiff_folder", "npz"])
def test_help_shows_the_commands(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(f"convert_{name}").main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "--chip_size" in printed
    assert f"    python conversion/convert_{name}.py --source" in printed


# --- real imagery ---


def extract(archive: str, folder: Path, wanted) -> list[Path]:
    with tarfile.open(REAL_DATA / archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile() and wanted(member.name)]
        tar.extractall(folder, members, filter="data")
    return sorted(folder / member.name for member in members)


@needs_real_data
def test_real_terramesh(tmp_path):
    files = extract("terramesh_geotiff.tar", tmp_path / "source", lambda name: "282D" in name or "38D" in name)
    source = files[0].parents[1]
    assert convert("terramesh", source, tmp_path / "shards") == 0
    samples = samples_of(tmp_path / "shards")
    assert len(samples) == 2
    for file in files:
        modality = TERRAMESH[file.parent.name][0]
        if modality:
            assert_as_in_file(samples[file.stem], modality, file)


@needs_real_data
@pytest.mark.parametrize(("archive", "modality"), [("eurosat_ms_geotiff.tar", "s2_l1c"), ("eurosat_rgb.tar", "rgb")])
def test_real_eurosat(tmp_path, archive, modality):
    files = extract(archive, tmp_path / "source", lambda name: name.split("_")[-1].split(".")[0].endswith("7"))
    assert convert("eurosat", files[0].parents[1], tmp_path / "shards") == 0
    samples = samples_of(tmp_path / "shards")
    assert len(samples) == len(files) > 5
    for file in files:
        with rasterio.open(file) as raster:
            assert np.array_equal(samples[file.stem]["images"][modality], raster.read())


@needs_real_data
def test_real_sen1floods11(tmp_path):
    files = extract(
        "sen1floods11_geotiff.tar", tmp_path / "source", lambda name: "Spain_7370579" in name or "Ghana" in name
    )
    assert convert("sen1floods11", files[0].parents[1], tmp_path / "shards") == 0
    samples = samples_of(tmp_path / "shards")
    for file in files:
        chip, folder = file.stem.rsplit("_", 1)
        if folder == "LabelHand":
            with rasterio.open(file) as raster:
                assert np.array_equal(samples[chip]["labels"]["water"], raster.read(1))
        else:
            assert_as_in_file(samples[chip], {"S1Hand": "s1", "S2Hand": "s2_l1c"}[folder], file)
    assert samples["Spain_7370579"]["gsd"]["s1"] == pytest.approx(8.87, abs=0.01)


@needs_real_data
@pytest.mark.parametrize("name", ["biomassters_s1s2_agbm", "benv2_s1s2_12band"])
def test_real_arrays(tmp_path, name):
    description = ROOT / "conversion" / "descriptions" / f"{name}.yaml"
    source = REAL_DATA / f"{name}.npz"
    assert convert("npz", source, tmp_path / "shards", "--description", description) == 0
    samples = list(samples_of(tmp_path / "shards").values())
    with np.load(source) as archive:
        s1, s2 = archive["s1"], archive["s2"]
    assert len(samples) == len(s1)
    rows = {radar[:2].tobytes(): row for row, radar in enumerate(s1)}
    assert len(rows) == len({rows[sample["images"]["s1"].tobytes()] for sample in samples}), "each row is there once"
    for sample in samples:
        row = rows[sample["images"]["s1"].tobytes()]
        radar, optical = s1[row], s2[row]
        assert np.array_equal(sample["images"]["s2"], optical[: len(sample["sensors"]["s2"]["bands"])])
        if "s1_descending" in sample["images"]:
            descending = sample["images"]["s1_descending"]
            assert (descending is None) == bool((radar[2:] == -9999).all())


def test_example_descriptions_are_valid():
    descriptions = sorted((ROOT / "conversion" / "descriptions").glob("*.yaml"))
    assert len(descriptions) == 6
    for path in descriptions:
        load("convert_geotiff_folder" if path.stem == "geotiff_example" else "convert_npz").load(str(path))
