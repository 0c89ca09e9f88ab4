"""The image processor: its outputs against the same formulas in float64 numpy, and its errors, which name the fix."""

import copy
import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_remote_code import run_without_package
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, Trainer, TrainingArguments
from transformers.utils import logging

from modeling_mapex import MapexBatchFeature, MapexForPreTraining, MapexImageProcessor, MapexModel, terrain_slope


OPTICAL = ["B02", "B03", "B04", "B08"]
MODALITIES = {
    "dem": {
        "bands": ["elevation"],
        "gsd": 30.0,
        "patch_size": 2,
        "unit": "metres",
        "mean": [300.0],
        "std": [200.0],
        "clip": [[-500.0, 9000.0]],
        "nodata": [-9999.0, -32768.0],
    },
    "heat": {"bands": ["T"], "gsd": 100.0, "patch_size": 2, "unit": "kelvin", "mean": [290.0], "std": [10.0]},
    "rgb": {
        "bands": ["R", "G", "B"],
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "uint8",
        "mean": [90.0, 95.0, 100.0],
        "std": [50.0, 40.0, 30.0],
        "clip": [[0.0, 255.0]] * 3,
    },
    "s1": {
        "bands": ["VV", "VH"],
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "db",
        "mean": [-12.0, -19.0],
        "std": [4.0, 5.0],
        "clip": [[-40.0, 10.0], [-45.0, 5.0]],
        "nodata": [-9999.0],
    },
    "s2": {
        "bands": OPTICAL,
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "reflectance",
        "mean": [0.05, 0.07, 0.06, 0.25],
        "std": [0.02, 0.03, 0.04, 0.1],
        "clip": [[0.0, 1.0]] * 4,
        "nodata": [0.0],
        "dn_scale": 1e-4,
        "dn_offset": 0.0,
    },
    "worldcover": {
        "bands": ["tree_cover", "built_up", "water"],
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "class",
        "mean": [0.5, 0.1, 0.2],
        "std": [0.5, 0.3, 0.4],
        "codes": [10, 50, 80],
        "nodata": [0.0],
    },
}
RANGES = {"dem": (-50, 3000), "heat": (250, 320), "rgb": (0, 255), "s1": (-50, 12), "s2": (0.001, 1.3)}


def processor(**options) -> MapexImageProcessor:
    return MapexImageProcessor(MODALITIES, **options)


def physical(name: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Values in the unit of the statistics, `(*shape, channels, 8, 8)`."""
    generator = np.random.default_rng(seed)
    if name == "worldcover":
        return generator.choice([10, 50, 80], (*shape, 1, 8, 8))
    return generator.uniform(*RANGES[name], (*shape, len(MODALITIES[name]["bands"]), 8, 8))


def column(values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)[:, None, None]


def reference(name: str, values: np.ndarray, normalize: bool = True) -> np.ndarray:
    """Values in the unit of the statistics, clipped and normalised in float64."""
    spec = MODALITIES[name]
    if "codes" in spec:
        values = (values == column(spec["codes"])).astype(np.float64)
    if "clip" in spec:
        low, high = np.array(spec["clip"]).T
        values = np.clip(values, column(low), column(high))
    return (values - column(spec["mean"])) / column(spec["std"]) if normalize else values


def close(actual: torch.Tensor, desired) -> None:
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), desired, rtol=1e-5, atol=1e-5)


def same(one, other) -> None:
    """Two batches are equal to the bit."""
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


class TestValues:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("name", MODALITIES)
    def test_clipped_and_normalised(self, name, normalize):
        values = physical(name, 2)
        features = processor(do_normalize=normalize)({name: values})
        close(features["pixel_values"][name], reference(name, values, normalize))
        assert features["valid_mask"][name].all() and features["valid_mask"][name].shape == (2, 8, 8)
        assert features["modality_mask"][name].tolist() == [True, True]
        assert features["gsd"][name] == MODALITIES[name]["gsd"]

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize(("offset", "given"), [(0.0, {}), (-0.1, {"dn_offset": {"s2": -0.1}})])
    @pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
    def test_digital_numbers(self, dtype, offset, given, normalize):
        numbers = np.random.default_rng(1).integers(1, 14_000, (2, 4, 8, 8)).astype(dtype)
        features = processor(do_normalize=normalize)({"s2": numbers}, units={"s2": "dn"}, **given)
        close(features["pixel_values"]["s2"], reference("s2", numbers.astype(np.float64) * 1e-4 + offset, normalize))

    def test_own_offset_and_scale_of_digital_numbers(self):
        spec = {**MODALITIES["s2"], "dn_scale": 2.75e-5, "dn_offset": -0.2}
        numbers = np.random.default_rng(1).integers(7_000, 45_000, (4, 8, 8))
        features = MapexImageProcessor({"s2": spec})({"s2": numbers}, units={"s2": "dn"})
        close(features["pixel_values"]["s2"][0], reference("s2", numbers * 2.75e-5 - 0.2))

    def test_linear_power(self):
        """Where there is no echo there is no decibel."""
        decibel = physical("s1", 2)
        power = 10 ** (decibel / 10)
        power[0, 0, :2], power[1, 1, 3, 3] = 0.0, -1e-9
        features = processor()({"s1": power}, units={"s1": "linear"})
        desired = reference("s1", decibel)
        desired[power <= 0] = 0.0
        close(features["pixel_values"]["s1"], desired)
        assert (features["valid_mask"]["s1"].numpy() == (power > 0).all(axis=1)).all()

    def test_statistics_without_a_unit(self):
        spec = {"bands": ["a"], "gsd": 1.0, "patch_size": 2, "mean": [5.0], "std": [2.0]}
        close(MapexImageProcessor({"own": spec})({"own": np.full((4, 4), 9.0)})["pixel_values"]["own"], 2.0)


class TestBands:
    @pytest.mark.parametrize("unit", ["reflectance", "dn"])
    @pytest.mark.parametrize(
        "given",
        [
            ["B08", "B04", "B03", "B02"],
            ["B01", "B02", "B11", "B03", "B04", "B08"],
            ["B08", "B12", "B02", "B01", "B04", "B03", "B8A"],
            tuple(OPTICAL),
            np.array(["B04", "B03", "B02", "B08"]),
        ],
    )
    def test_named(self, given, unit):
        """Any order, and more than the model has: as if given in the model's order."""
        own = physical("s2", 2) * (1 if unit == "reflectance" else 10_000)
        layers = {band: own[:, position] for position, band in enumerate(OPTICAL)}
        layers |= {band: np.full((2, 8, 8), np.nan) for band in given if band not in OPTICAL}
        images = np.stack([layers[band] for band in given], axis=1)
        options = {"units": {"s2": unit}}
        same(processor()({"s2": images}, bands={"s2": given}, **options), processor()({"s2": own}, **options))

    def test_missing_bands_are_filled_with_a_warning(self, caplog):
        own = physical("s2", 2)
        logging.get_logger("modeling_mapex.image_processing_mapex").warning_once.cache_clear()
        for normalize in (True, False):
            process = processor(missing_bands="mean", do_normalize=normalize)
            features = process({"s2": own[:, [3, 0]]}, bands={"s2": ["B08", "B02"]})
            desired = reference("s2", own, normalize)
            desired[:, 1:3] = 0.0 if normalize else column(MODALITIES["s2"]["mean"][1:3])
            close(features["pixel_values"]["s2"], desired)
            assert features["valid_mask"]["s2"].all()
        assert caplog.text.count("lacks the bands ['B03', 'B04']; they are filled with their mean") == 1

    @pytest.mark.parametrize(
        ("radar", "heights", "pixels"),
        [((101, 203), (34, 68), 16), ((60, 90), (20, 30), 1), ((101, 101), (34, 34), 0), ((101, 203), None, 0)],
    )
    def test_warns_where_resizing_moves_sensors_against_each_other(self, caplog, radar, heights, pixels):
        """One resolution for rows and columns: how far the far edge of one sensor lies from that of the other."""
        logging.get_logger("modeling_mapex.image_processing_mapex").warning_once.cache_clear()
        specs = {name: MODALITIES[name] | {"patch_size": 8} for name in ("dem", "s2")}
        images = {"s2": np.full((4, *radar), 0.1), "dem": None if heights is None else np.full((1, *heights), 300.0)}
        features = MapexImageProcessor(specs)(images)
        assert (f"askew by up to {pixels} pixels" in caplog.text) if pixels else not caplog.text
        if heights is not None:
            sides = {name: np.array(values.shape[2:]) for name, values in features["pixel_values"].items()}
            metres = {name: side * features["gsd"][name] for name, side in sides.items()}
            true = {"s2": np.array(radar) * 10.0, "dem": np.array(heights) * 30.0}
            away = np.abs(metres["s2"] / true["s2"] - metres["dem"] / true["dem"]) * sides["s2"].max()
            assert abs(away.max() - pixels) <= 0.1 * pixels + 0.5

    def test_a_missing_band_is_no_hole(self):
        """Only the bands that came say where there is data."""
        own = physical("s2", 1)
        own[0, 0, 0] = np.nan  # B02 of the first row
        process = processor(missing_bands="mean")
        features = process({"s2": own[:, [0, 3]]}, bands={"s2": ["B02", "B08"]})
        assert features["valid_mask"]["s2"].sum() == 56 and features["valid_mask"]["s2"][0, 1:].all()
        assert process({"s2": own[:, [3]]}, bands={"s2": ["B08"]})["valid_mask"]["s2"].all()
        # Nor does it take the holes of a band that the model has not.
        assert process({"s2": own[:, [0, 3]]}, bands={"s2": ["B01", "B08"]})["valid_mask"]["s2"].all()


class TestNoData:
    @pytest.mark.parametrize(
        ("dtype", "marks", "nodata"),
        [
            (np.float32, [np.nan], None),
            (np.float32, [np.inf], None),
            (np.float64, [-np.inf, np.nan], None),
            (np.float32, [-9999, -32768], None),
            (np.int16, [-9999, -32768], None),
            (np.float64, [-1.0], -1.0),
            (np.int32, [2**31 - 1, -1], [2**31 - 1, -1]),
            (np.uint16, [65535], 65535),
            # The usual marks of GDAL, which float32 does not hold exactly, or not at all.
            (np.float32, [-3.4e38], -3.4e38),
            (np.float32, [-3.4028234663852886e38], [-3.4028234663852886e38]),
            (np.float64, [-1.7976931348623157e308], -1.7976931348623157e308),
            (np.float32, [-9999.9], -9999.9),
            (np.float64, [1e20], 1e20),
        ],
    )
    def test_marks(self, dtype, marks, nodata):
        values = np.random.default_rng(2).integers(1, 3000, (2, 1, 8, 8)).astype(dtype)
        hole = np.zeros(values.shape, dtype=bool)
        for position, mark in enumerate(marks):
            values[position % 2, 0, position] = mark
            hole[position % 2, 0, position] = True
        features = processor()({"dem": values}, nodata=None if nodata is None else {"dem": nodata})
        close(features["pixel_values"]["dem"], np.where(hole, 0.0, reference("dem", np.where(hole, 0, values))))
        assert (features["valid_mask"]["dem"].numpy() == ~hole[:, 0]).all()

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("unit", ["reflectance", "dn"])
    def test_other_bands_keep_their_values(self, unit, normalize):
        values = physical("s2", 2)
        hole = np.random.default_rng(3).random(values.shape) < 0.1
        scale = 1 if unit == "reflectance" else 10_000
        features = processor(do_normalize=normalize)({"s2": np.where(hole, 0, values * scale)}, units={"s2": unit})
        fill = 0.0 if normalize else column(MODALITIES["s2"]["mean"])
        close(features["pixel_values"]["s2"], np.where(hole, fill, reference("s2", values, normalize)))
        assert (features["valid_mask"]["s2"].numpy() == ~hole.any(axis=1)).all()

    def test_given_marks_replace_the_own(self):
        values = physical("dem", 1)
        values[0, 0, 0], values[0, 0, 1] = -9999, 7777
        valid = processor()({"dem": values}, nodata={"dem": 7777})["valid_mask"]["dem"][0]
        assert valid[0].all() and not valid[1].any() and valid[2:].all()
        assert processor()({"dem": physical("dem", 1)}, nodata={"dem": []})["valid_mask"]["dem"].all()

    @pytest.mark.parametrize(("nodata", "gone"), [(None, [0]), (255, [255]), ([0, 255], [0, 255]), ([0, 80], [0, 80])])
    def test_categorical(self, nodata, gone):
        """Also a class that is named as nodata is none."""
        codes = physical("worldcover", 2)
        for position, mark in enumerate(gone):
            codes[:, :, position] = mark
        features = processor()({"worldcover": codes}, nodata=None if nodata is None else {"worldcover": nodata})
        hole = np.isin(codes, gone)
        close(features["pixel_values"]["worldcover"], np.where(hole, 0.0, reference("worldcover", codes)))
        assert (features["valid_mask"]["worldcover"].numpy() == ~hole[:, 0]).all()

    @pytest.mark.parametrize("name", ["s1", "worldcover", "dem"])
    def test_masked_arrays(self, name):
        """As rasterio reads with `masked=True`; what lies under the mask counts as little as NaN."""
        values = physical(name, 2)
        hole = np.zeros(values.shape, dtype=bool)
        hole[:, 0, 2:4] = True
        masked = np.ma.MaskedArray(np.where(hole, 30, values), hole)
        with_nan = np.where(hole, np.nan, values)
        same(processor()({name: masked}), processor()({name: with_nan}))
        same(processor()({name: [*masked]}), processor()({name: with_nan}))


class TestInputs:
    @pytest.mark.parametrize(
        "convert",
        [
            torch.from_numpy,
            list,
            np.ndarray.tolist,
            lambda values: [torch.from_numpy(value) for value in values],
            lambda values: [values[0], torch.from_numpy(values[1])],
            lambda values: [torch.tensor(values[0], requires_grad=True), values[1]],
            lambda values: values.astype(">f8"),
            lambda values: values[:, ::-1].copy()[:, ::-1],
            lambda values: np.moveaxis(np.moveaxis(values, 1, 3).copy(), 3, 1),
            lambda values: np.frombuffer(values.tobytes()).reshape(values.shape),
            lambda values: torch.tensor(values, requires_grad=True),
        ],
    )
    @pytest.mark.parametrize("name", ["s1", "dem"])
    def test_containers(self, name, convert):
        values = physical(name, 2)
        features = processor()({name: convert(values)})
        same(features, processor()({name: values}))
        assert not features["pixel_values"][name].requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint16, torch.int16, torch.uint8])
    def test_dtypes_of_tensors(self, dtype):
        values = torch.from_numpy(physical("rgb", 2)).to(dtype)
        expected = processor()({"rgb": values.double().numpy()})
        same(processor()({"rgb": values}), expected)
        same(processor()({"rgb": [values[0], values[1].double().numpy()]}), expected)

    def test_pil(self):
        values = physical("rgb", 2).astype(np.uint8)
        images = [Image.fromarray(value.transpose(1, 2, 0)) for value in values]
        same(processor()({"rgb": images}), processor()({"rgb": values}))
        same(processor()({"rgb": images[0]}), processor()({"rgb": values[0]}))
        codes = physical("worldcover", 1).astype(np.uint8)[0, 0]
        palette = Image.fromarray(codes)
        palette.putpalette([*range(256)] * 3)  # the codes are the indices, whatever colours they are shown in
        assert palette.mode == "P"
        same(processor()({"worldcover": palette}), processor()({"worldcover": codes}))
        heights = physical("dem", 1)[0, 0].astype(np.float32)
        same(processor()({"dem": Image.fromarray(heights)}), processor()({"dem": heights}))

    def test_none_is_absent(self):
        values = physical("s1", 2)
        features = processor()({"s1": [values[0], None, values[1]], "dem": physical("dem", 3), "rgb": None})
        assert set(features["pixel_values"]) == {"s1", "dem"}
        assert features["modality_mask"]["s1"].tolist() == [True, False, True]
        close(features["pixel_values"]["s1"][::2], reference("s1", values))
        assert not features["pixel_values"]["s1"][1].any() and not features["valid_mask"]["s1"][1].any()
        assert features["valid_mask"]["s1"][::2].all()
        assert "s2" not in processor()({"s1": values, "s2": [None, None]}, units={"s2": "dn"})["pixel_values"]

    @pytest.mark.parametrize("name", MODALITIES)
    def test_inputs_are_not_changed(self, name):
        array = physical(name, 2).astype(np.float32)
        before = array.copy()
        for value in (array, torch.from_numpy(array), [*array], [*torch.from_numpy(array)], torch.from_numpy(array[0])):
            processor()({name: value})
            assert (array == before).all()
        power = 10 ** (physical("s1", 2).astype(np.float32) / 10)
        before = power.copy()
        processor()({"s1": torch.from_numpy(power)}, units={"s1": "linear"})
        assert (power == before).all()


class TestResize:
    @pytest.mark.parametrize(
        ("given", "size", "wanted"),
        [
            ((8, 12), None, (8, 12)),
            ((9, 13), None, (8, 12)),
            ((10, 14), None, (12, 16)),
            ((1, 3), None, (4, 4)),
            ((60, 60), None, (60, 60)),
            ((8, 8), (16, 16), (16, 16)),
            ((30, 30), [8, 8], (8, 8)),
        ],
    )
    def test_size_and_ground_extent(self, given, size, wanted):
        values = np.random.default_rng(0).uniform(-30, 0, (2, 2, *given))
        features = processor()({"s1": values}, gsd={"s1": 10.0}, size=None if size is None else {"s1": size})
        assert features["pixel_values"]["s1"].shape == (2, 2, *wanted)
        assert features["valid_mask"]["s1"].shape == (2, *wanted) and features["valid_mask"]["s1"].all()
        area = given[0] * given[1] * 10.0**2
        assert wanted[0] * wanted[1] * features["gsd"]["s1"] ** 2 == pytest.approx(area)

    @pytest.mark.parametrize("name", ["s1", "worldcover", "dem"])
    def test_constant_stays_constant(self, name):
        values = np.full((len(MODALITIES[name]["bands"]) if name != "worldcover" else 1, 13, 11), -10.0)
        if name == "worldcover":
            values[:] = 50
        pixels = processor()({name: values})["pixel_values"][name]
        close(pixels, np.broadcast_to(reference(name, values)[:, :1, :1], pixels.shape))

    @pytest.mark.parametrize(("given", "wanted"), [((18, 18), (20, 20)), ((17, 21), (16, 20))])
    def test_ramp_stays_a_ramp(self, given, wanted):
        """Pixel centres are where they were on the ground."""
        rows, columns = np.mgrid[: given[0], : given[1]] + 0.5
        pixels = processor(do_normalize=False)({"s1": np.stack([-rows, -columns])})["pixel_values"]["s1"][0]
        rows, columns = np.mgrid[: wanted[0], : wanted[1]] + 0.5
        desired = np.stack([-rows * given[0] / wanted[0], -columns * given[1] / wanted[1]])
        # Within a twentieth of a pixel: the kernel of antialiasing is sampled, and its centre moves a little.
        np.testing.assert_allclose(pixels[:, 2:-2, 2:-2], desired[:, 2:-2, 2:-2], atol=0.05)

    @pytest.mark.parametrize("side", [9, 18])
    def test_valid_mask_shrinks(self, side):
        """A pixel made of any that had no data has none; far from it all have."""
        values = np.full((2, side, side), -10.0)
        values[0, side // 2, side // 2] = np.nan
        features = processor()({"s1": values})
        valid, pixels = features["valid_mask"]["s1"][0], features["pixel_values"]["s1"][0]
        clean = torch.from_numpy(reference("s1", np.full(pixels.shape, -10.0)))
        assert 1 <= (~valid).sum() <= 16
        assert ((pixels - clean).abs()[:, valid] < 1e-3).all(), "no hole bleeds into a valid pixel"

    def test_sizes_that_become_one(self):
        """Each sample is resized by itself, and they stay in order."""
        sizes = [(8, 8), (9, 9), (7, 9), (9, 9), (8, 8)]
        images = [np.full((2, *size), -float(value)) for value, size in enumerate(sizes)]
        features = processor(do_normalize=False)({"s1": images})
        close(features["pixel_values"]["s1"][:, 0, 0, 0], [0, -1, -2, -3, -4])
        assert features["gsd"]["s1"].tolist() == pytest.approx([10 * (a * b) ** 0.5 / 8 for a, b in sizes])

    def test_mixed_sizes(self):
        images = [physical("s1"), physical("s1").repeat(2, axis=-1)]
        with pytest.raises(ValueError, match=r"`s1` differ in size: .*`random_crop`.*`size=\{\"s1\": \(height, width"):
            processor()({"s1": images})
        assert processor()({"s1": images}, size={"s1": (8, 8)})["pixel_values"]["s1"].shape == (2, 2, 8, 8)

    def test_off(self):
        process = processor(do_resize=False)
        assert process({"s1": physical("s1")})["pixel_values"]["s1"].shape == (1, 2, 8, 8)
        with pytest.raises(ValueError, match=r"9 x 8 pixels, .* `do_resize` is off. .* for 8 x 8"):
            process({"s1": np.zeros((2, 9, 8))})


class TestGsd:
    @pytest.mark.parametrize("given", [20.0, [20.0], [20.0, 20.0], [20.0, 20.0000001], np.array([20.0, 20.0])])
    def test_one(self, given):
        value = processor()({"s1": physical("s1", 2)}, gsd={"s1": given})["gsd"]["s1"]
        assert isinstance(value, float) and value == pytest.approx(20.0, rel=1e-3)

    def test_one_a_sample(self):
        images = {"s1": [*physical("s1", 2), None], "dem": physical("dem", 3)}
        value = processor()(images, gsd={"s1": [10.0, 12.0]})["gsd"]["s1"]
        assert value.dtype == torch.float32 and value.tolist() == [10.0, 12.0, 11.0]

    @pytest.mark.parametrize("given", [0.0, -10.0, [10.0, np.nan], np.inf])
    def test_refused(self, given):
        with pytest.raises(ValueError, match="`gsd` of `s1` must be metres per pixel above 0"):
            processor()({"s1": physical("s1", 2)}, gsd={"s1": given})

    def test_wrong_number(self):
        with pytest.raises(ValueError, match="has 3 values for 2 images: one for all, or one for each that is there"):
            processor()({"s1": physical("s1", 2)}, gsd={"s1": [10.0] * 3})


S1, S2, RGB, DEM = (physical(name) for name in ("s1", "s2", "rgb", "dem"))
POWER = 10 ** (S1 / 10)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ({"s7": S1}, {}, r"Unknown modality `s7`\. This processor has \['dem', .*for another, use"),
        ({"s2": S2}, {"bands": {"s2": ["B02", "B03", "B04", "B008"]}}, r"Unknown bands \['B008'\].*mean \['B08'\]"),
        ({"s2": S2}, {"bands": {"s2": ["B02", "B02", "B04", "B08"]}}, "are repeated"),
        ({"s2": S2[:2]}, {"bands": {"s2": ["B08", "B02"]}}, r"lacks .*\['B03', 'B04'\].*prune_for_modalities"),
        ({"s2": S2[:2]}, {"bands": {"s2": ["B08", "B02"]}}, r"\{\"s2\": \['B02', 'B08'\]\}.*missing_bands=\"mean\""),
        ({"s2": S2[:1]}, {"bands": {"s2": ["B11"]}}, "processor of another model"),
        ({"s2": S2}, {"bands": {"s2": ["B02", "B03"]}}, r"names 2 channels of `s2`.*the image has 4"),
        ({"s2": S2[:3]}, {}, r"needs 4 channels in the order .* got 3\. Name yours with `bands="),
        ({"s2": S2.transpose(1, 2, 0)}, {}, "Channels come first: move the last axis to the front"),
        ({"dem": DEM.transpose(1, 2, 0)}, {}, "Channels come first"),
        ({"worldcover": np.full((2, 8, 8), 10)}, {}, r"takes one channel with the codes \[10, 50, 80\].* got 2 chan"),
        ({"worldcover": np.full((8, 8), 10)}, {"bands": {"worldcover": ["a"]}}, r"no band names, got .*\['a'\]"),
        ({"worldcover": np.full((8, 8), 11)}, {}, r"holds the codes \[11\.0\].* pass `nodata=\{\"worldcover\": \[11"),
        ({"s2": S2 * 10_000}, {}, r"lie outside -0\.3 \.\. 2\.5 .*look like digital numbers: .*\{\"s2\": \"dn\"\}"),
        ({"s2": S2}, {"units": {"s2": "dn"}}, r"look like reflectance: pass `units=\{\"s2\": \"reflectance\"\}`"),
        ({"s1": POWER}, {}, r"look like linear power: pass `units=\{\"s1\": \"linear\"\}`"),
        ({"s1": S1}, {"units": {"s1": "linear"}}, r"look like decibel: pass `units=\{\"s1\": \"db\"\}`"),
        ({"rgb": RGB / 255}, {}, "scaled to 0 .. 1: multiply them by 255"),
        ({"rgb": RGB * 4.0}, {}, "`rgb` was given as `uint8`, but .*State their unit with `units`, convert them"),
        ({"dem": DEM * 100}, {}, r"`dem` was given as `metres`, but \d+% .* or say with `nodata`"),
        ({"s1": S1}, {"units": {"s1": "dB"}}, r"cannot be given in `dB`\. Accepted: \['db', 'linear'\]"),
        ({"heat": physical("heat")}, {"units": {"heat": "celsius"}}, r"Accepted: \['kelvin'\]"),
        ({"s1": S1}, {"units": {"s2": "dn"}}, r"`units` is given for \['s2'\], but `images` holds \['s1'\]"),
        ({"s1": S1}, {"size": {"s1": (8, 10)}}, r"two multiples of its patch size 4, got \(8, 10\)"),
        ({"s1": S1}, {"size": {"s1": 8}}, "two multiples of its patch size 4, got 8"),
        ({"s1": S1}, {"size": {"s1": (8.0, 8.0)}}, r"two multiples of its patch size 4, got \(8\.0"),
        ({"s1": S1}, {"size": {"s1": (0, 8)}}, "two multiples of its patch size 4"),
        ({"s2": S2}, {"dn_offset": {"s2": -0.1}}, r"not used with the unit `reflectance`: pass `units=.*\"dn\"\}`"),
        ({"s1": S1}, {"return_tensors": "np"}, "`return_tensors` must be \"pt\", got 'np'"),
        ({}, {}, r"`images` is empty: pass at least one of \['dem'"),
        ({"s1": []}, {}, "The batch is empty"),
        ({"s1": np.zeros((0, 2, 8, 8))}, {}, "The batch is empty"),
        ({"s1": np.zeros((2, 0, 8))}, {}, r"has no pixels: its shape is \(2, 0, 8\)"),
        ({"worldcover": np.zeros((3, 1, 0, 0))}, {}, "has no pixels"),
        ({"s1": None}, {}, "Every modality is None"),
        ({"s1": [None, None]}, {}, "Every modality of every sample is None"),
        ({"s1": [S1, None], "dem": [DEM, None]}, {}, r"Samples \[1\] have no modality at all\. Leave them out"),
        ({"s1": [S1, S1], "dem": [DEM]}, {}, r"different numbers of samples: \{'s1': 2, 'dem': 1\}.* put None"),
        ({"s1": [S1, np.full_like(S1, np.nan)]}, {}, r"samples \[1\] .*not one valid pixel.*Pass None in its place"),
        ({"s2": np.zeros_like(S2)}, {}, r"samples \[0\] .*not one valid pixel"),
        ({"worldcover": np.zeros((8, 8))}, {}, r"samples \[0\] .*not one valid pixel"),
        ({"s1": np.zeros_like(S1)}, {"units": {"s1": "linear"}}, "not one valid pixel"),
        ({"s1": [S1, S1[:1]]}, {}, r"differ in their number of channels: \[1, 2\]"),
        ({"s1": S1[None, None]}, {}, r"must be \(channels, height, width\), got \(1, 1, 2, 8, 8\)"),
        ({"s1": [S1[None]]}, {}, "A list holds one image, or None, per sample"),
        ({"s1": [[[1.0, 2.0], [1.0]]]}, {}, "the nested lists are no array"),
    ],
)
def test_values_are_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        processor()(images, **options)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (S1, {}, r"`images` must be a dictionary .*like \{\"dem\": array\}, got ndarray"),
        ([S1], {}, "`images` must be a dictionary"),
        ({"s1": "scene.tif"}, {}, "`s1` must be an array, a tensor, a PIL image, a list of them, .*got str"),
        ({"s1": 3.0}, {}, "got float"),
        ({"s1": S1}, {"bands": ["VV", "VH"]}, "`bands` must be a dictionary from modality to value, got list"),
        ({"s1": S1}, {"bands": {"s1": "VV"}}, "`bands` of `s1` must be a list of names, got the string"),
        ({"s1": S1}, {"gsd": 10.0}, "`gsd` must be a dictionary"),
        ({"s1": S1}, {"units": "db"}, "`units` must be a dictionary"),
        ({"s1": S1.astype(np.complex64)}, {}, "must be real numbers, got complex64"),
        ({"s1": torch.from_numpy(S1).to(torch.complex64)}, {}, "must be real numbers, got torch.complex64"),
        ({"s1": S1.astype(object)}, {}, "must be real numbers, got object"),
        ({"s1": S1}, {"unit": {"s1": "db"}}, "unexpected keyword argument 'unit'"),
    ],
)
def test_types_are_refused(images, options, message):
    with pytest.raises(TypeError, match=message):
        processor()(images, **options)


@pytest.mark.parametrize(
    ("images", "unit"),
    [
        ({"s2": np.random.default_rng(0).uniform(0.0005, 0.01, (4, 8, 8))}, "reflectance"),  # deep water
        ({"s2": np.random.default_rng(0).uniform(-0.05, 0.01, (4, 8, 8))}, "reflectance"),  # after correction
        ({"s2": np.random.default_rng(0).uniform(0.7, 1.6, (4, 8, 8))}, "reflectance"),  # snow in low sun
        ({"s2": np.where(np.arange(256).reshape(4, 8, 8) == 9, 6.5, 0.1)}, "reflectance"),  # one saturated pixel
        ({"s2": np.full((4, 8, 8), 1)}, "dn"),
        ({"s2": np.full((4, 8, 8), 1500)}, "dn"),
        ({"s2": np.full((4, 8, 8), 65535)}, "dn"),
        ({"rgb": np.zeros((3, 8, 8), dtype=np.uint8)}, "uint8"),
        ({"rgb": np.random.default_rng(0).integers(0, 2, (3, 8, 8))}, "uint8"),
        ({"rgb": np.full((3, 8, 8), 255)}, "uint8"),
        ({"s1": np.zeros((2, 8, 8))}, "db"),
        ({"s1": np.random.default_rng(0).uniform(-3, 25, (2, 8, 8))}, "db"),  # a town
        ({"s1": np.random.default_rng(0).uniform(0, 400, (2, 8, 8))}, "linear"),
        ({"dem": np.zeros((8, 8))}, "metres"),
        ({"dem": np.full((8, 8), -10_900.0)}, "metres"),  # bathymetry
        ({"heat": np.zeros((8, 8))}, "kelvin"),
    ],
)
def test_unusual_values_pass(images, unit):
    (name,) = images
    assert processor()(images, units={name: unit})["pixel_values"][name].isfinite().all()


class TestConstructor:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mean": None}, r"Modality `s1` has no `mean`.*config\.modalities\[\"s1\"\].*compute_statistics\.py"),
            ({"std": [1.0, None]}, "Modality `s1` has no `std`"),
            ({"mean": [1.0]}, "`mean` of `s1` needs 2 values, one a band"),
            ({"clip": [[0, 1]] * 3}, "`clip` of `s1` needs 2 values"),
            ({"std": [1.0, 0.0]}, "`std` of `s1` must be finite, and `std` above 0"),
            ({"centre": [0.0, 0.0]}, r"unknown keys \['centre'\]"),
        ],
    )
    def test_descriptions(self, changes, message):
        with pytest.raises(ValueError, match=message):
            MapexImageProcessor({"s1": {**MODALITIES["s1"], **changes}})

    @pytest.mark.parametrize("key", ["bands", "gsd", "patch_size"])
    def test_lacking(self, key):
        with pytest.raises(ValueError, match=rf"lacks \['{key}'\]"):
            MapexImageProcessor({"s1": {name: value for name, value in MODALITIES["s1"].items() if name != key}})

    def test_arguments(self):
        with pytest.raises(ValueError, match=r"has no arguments \['do_rescale'\]"):
            processor(do_rescale=True)
        with pytest.raises(ValueError, match='`missing_bands` must be "raise" or "mean", got \'zero\''):
            processor(missing_bands="zero")
        for empty in (None, {}):
            with pytest.raises(ValueError, match="`modalities` is empty: use `MapexImageProcessor"):
                MapexImageProcessor(empty)
        with pytest.raises(TypeError, match=r"must describe each modality, got \['s1'\]"):
            MapexImageProcessor(["s1"])

    def test_unknown_without_scale(self):
        spec = {key: value for key, value in MODALITIES["s2"].items() if key != "dn_scale"}
        with pytest.raises(ValueError, match="`s2` has no `dn_scale`: convert digital numbers"):
            MapexImageProcessor({"s2": spec})({"s2": S2 * 10_000}, units={"s2": "dn"})

    def test_from_config(self):
        config = tiny_config(modalities={"s1": {**MODALITIES["s1"], "target_groups": [["VV"], ["VH"]]}})
        built = MapexImageProcessor.from_config(config, do_resize=False)
        assert built.modalities == {"s1": MODALITIES["s1"]} and not built.do_resize
        built.modalities["s1"]["mean"][0] = 7.0
        assert config.modalities["s1"]["mean"] == MODALITIES["s1"]["mean"], "nothing is shared"
        with pytest.raises(ValueError, match="Modality `height` has no `mean`"):
            MapexImageProcessor.from_config(tiny_config())


class TestInverseTransform:
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("name", MODALITIES)
    def test_round_trip(self, name, normalize):
        process, values = processor(do_normalize=normalize), physical(name, 2)
        back = process.inverse_transform(process({name: values})["pixel_values"])[name]
        spec = MODALITIES[name]
        if "clip" in spec:
            low, high = np.array(spec["clip"]).T
            values = np.clip(values, column(low), column(high))
        np.testing.assert_allclose(back, values, rtol=1e-5, atol=1e-5)

    def test_shapes_and_dtypes(self):
        process = processor()
        pixels = torch.zeros(5, 2, 3, 8, 8, dtype=torch.bfloat16)
        back = process.inverse_transform({"rgb": pixels, "worldcover": pixels[0, 0]})
        assert back["rgb"].shape == pixels.shape and back["rgb"].dtype == torch.bfloat16
        assert back["worldcover"].shape == (1, 8, 8) and not pixels.any()

    def test_refused(self):
        with pytest.raises(ValueError, match="Unknown modality `s7`"):
            processor().inverse_transform({"s7": torch.zeros(1, 2, 8, 8)})
        with pytest.raises(ValueError, match=r"`s1` has the bands \['VV', 'VH'\], got 3 channels"):
            processor().inverse_transform({"s1": torch.zeros(1, 3, 8, 8)})


def batch() -> MapexBatchFeature:
    features = processor()({"s1": physical("s1", 2), "dem": [*physical("dem", 1), None]}, gsd={"s1": [10.0, 12.0]})
    features["labels"] = torch.tensor([0, 1])
    features["names"] = ["a", "b"]
    return features


class TestBatchFeature:
    @pytest.mark.parametrize(
        ("arguments", "options", "dtype", "device"),
        [
            ((), {}, torch.float32, "cpu"),
            (("cpu",), {}, torch.float32, "cpu"),
            ((torch.bfloat16,), {}, torch.bfloat16, "cpu"),
            (("meta",), {}, torch.float32, "meta"),
            ((torch.device("meta"), torch.float16), {}, torch.float16, "meta"),
            ((torch.empty(0, dtype=torch.float16, device="meta"),), {}, torch.float16, "meta"),
            ((), {"dtype": torch.bfloat16}, torch.bfloat16, "cpu"),
            ((), {"device": "meta", "dtype": torch.float64}, torch.float64, "meta"),
            (("meta",), {"non_blocking": True}, torch.float32, "meta"),
        ],
    )
    def test_to(self, arguments, options, dtype, device):
        features = batch()
        moved = features.to(*arguments, **options)
        assert moved is features
        for name in ("s1", "dem"):
            assert (moved["pixel_values"][name].dtype, moved["pixel_values"][name].device.type) == (dtype, device)
            for mask in (moved["modality_mask"][name], moved["valid_mask"][name]):
                assert (mask.dtype, mask.device.type) == (torch.bool, device)
        assert (moved["labels"].dtype, moved["labels"].device.type) == (torch.int64, device)
        assert moved["gsd"]["s1"].dtype == torch.float32, "half precision would blur metres"
        assert moved["gsd"]["s1"].device.type == device
        assert moved["gsd"]["dem"] == 30.0 and moved["names"] == ["a", "b"]

    def test_model_takes_it(self):
        features = batch()
        del features["names"], features["labels"]
        config = tiny_config(modalities={name: MODALITIES[name] for name in ("dem", "s1")})
        assert MapexModel(config).eval()(**features).last_hidden_state.isfinite().all()
        half = MapexModel(config).eval().to(torch.bfloat16)(**features.to(torch.bfloat16))
        assert half.last_hidden_state.dtype == torch.bfloat16

    def test_accelerate_and_trainer(self, tmp_path):
        sent = send_to_device(batch(), "meta")
        assert sent["valid_mask"]["s1"].device.type == sent["pixel_values"]["dem"].device.type == "meta"
        features = batch()
        del features["names"], features["labels"]
        config = tiny_config(modalities={name: MODALITIES[name] for name in ("dem", "s1")})
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], dataloader_pin_memory=False)
        trainer = Trainer(MapexForPreTraining(config), arguments)
        same(trainer._prepare_inputs(features), features)
        loader = DataLoader([0, 1], batch_size=2, collate_fn=lambda _: features, num_workers=1, pin_memory=False)
        (loaded,) = loader
        assert type(loaded) is MapexBatchFeature
        same(loaded, features)

    def test_copies(self):
        features = batch()
        for other in (copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
            assert type(other) is MapexBatchFeature
            same(other["pixel_values"], features["pixel_values"])


class TestSaved:
    def test_round_trip(self, tmp_path):
        process = processor(do_normalize=False, missing_bands="mean")
        process.save_pretrained(tmp_path)
        images = {name: physical(name, 2) for name in MODALITIES}
        others = [MapexImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)]
        for other in (*others, pickle.loads(pickle.dumps(process)), copy.deepcopy(process)):
            assert type(other) is MapexImageProcessor
            assert other.modalities == MODALITIES
            assert (other.do_normalize, other.do_resize, other.missing_bands) == (False, True, "mean")
            same(other(images), process(images))

    def test_overrides(self, tmp_path):
        processor().save_pretrained(tmp_path)
        assert not MapexImageProcessor.from_pretrained(tmp_path, do_resize=False).do_resize
        assert AutoImageProcessor.from_pretrained(tmp_path, missing_bands="mean").missing_bands == "mean"
        with pytest.raises(ValueError, match="`missing_bands` must be"):
            MapexImageProcessor.from_pretrained(tmp_path, missing_bands="zero")

    def test_remote_code(self, tmp_path):
        """A fresh interpreter that cannot import the package makes the same of the same arrays."""
        processor().save_pretrained(tmp_path / "saved")
        images = {name: physical(name, 2) for name in MODALITIES}
        images["s1"][0, 0, 0] = np.nan
        np.savez(tmp_path / "images.npz", **images)
        (tmp_path / "inputs.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")  # that the helper reads
        run_without_package(
            """
            import numpy as np
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained("saved", trust_remote_code=True)
            assert type(processor).__module__.startswith("transformers_modules"), type(processor)
            features = processor(dict(np.load("images.npz")))
            torch.save({key: dict(value) for key, value in features.items()}, "features.pt")
            processor.save_pretrained("again")
            """,
            tmp_path,
        )
        same(torch.load(tmp_path / "features.pt"), processor()(images))
        same(MapexImageProcessor.from_pretrained(tmp_path / "again")(images), processor()(images))


class TestBesideTheWeights:
    def model(self, **changes) -> MapexForPreTraining:
        modalities = {name: {**MODALITIES[name], **changes} for name in ("s1", "s2")}
        return MapexForPreTraining(tiny_config(modalities=modalities))

    def test_saved_with_statistics_only(self, tmp_path):
        self.model().save_pretrained(tmp_path / "with")
        loaded = AutoImageProcessor.from_pretrained(tmp_path / "with")
        assert loaded.modalities == {name: MODALITIES[name] for name in ("s1", "s2")}
        MapexForPreTraining(tiny_config()).save_pretrained(tmp_path / "without")
        self.model(mean=None).save_pretrained(tmp_path / "half")
        for folder in ("without", "half"):
            assert (tmp_path / folder / "config.json").is_file()
            assert not (tmp_path / folder / "preprocessor_config.json").exists()

    def test_one_for_other_sensors_does_not_stay(self, tmp_path):
        """It would normalise by the statistics of sensors that the model has not got, in silence."""
        self.model().save_pretrained(tmp_path)
        self.model(mean=None).save_pretrained(tmp_path)  # the same sensors: the user's own statistics for them
        assert (tmp_path / "preprocessor_config.json").is_file()
        self.model(mean=None, gsd=3.0).save_pretrained(tmp_path)
        assert not (tmp_path / "preprocessor_config.json").exists()

    def test_customised_is_kept_while_it_fits(self, tmp_path):
        model = self.model()
        MapexImageProcessor.from_config(model.config, missing_bands="mean").save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        assert MapexImageProcessor.from_pretrained(tmp_path).missing_bands == "mean"
        self.model(patch_size=8).save_pretrained(tmp_path)
        again = MapexImageProcessor.from_pretrained(tmp_path)
        assert again.modalities["s1"]["patch_size"] == 8 and again.missing_bands == "raise"
        MapexForPreTraining(tiny_config(modalities={"dem": MODALITIES["dem"]})).save_pretrained(tmp_path)
        assert set(MapexImageProcessor.from_pretrained(tmp_path).modalities) == {"dem"}

    def test_pruned(self, tmp_path):
        """Of the kept bands, with their own statistics: what it makes is a part of what the full one makes."""
        model = self.model()
        images = {"s2": physical("s2", 2)}
        inputs = processor()(images)
        model.calibrate_experts([{"pixel_values": inputs["pixel_values"]}])
        model.prune_for_modalities({"s2": ["B08", "B03"]}).save_pretrained(tmp_path)
        pruned = AutoImageProcessor.from_pretrained(tmp_path)
        (spec,) = pruned.modalities.values()
        kept = [OPTICAL.index(band) for band in spec["bands"]]
        assert sorted(spec["bands"]) == ["B03", "B08"]
        for key in ("mean", "std", "clip"):
            assert spec[key] == [MODALITIES["s2"][key][position] for position in kept]
        assert (spec["nodata"], spec["dn_scale"]) == ([0.0], 1e-4)
        features = pruned(images, bands={"s2": OPTICAL})
        same(features["pixel_values"], {"s2": inputs["pixel_values"]["s2"][:, kept]})
        small = MapexForPreTraining.from_pretrained(tmp_path)
        assert small.mapex(**features).last_hidden_state.isfinite().all()


class TestSlope:
    @pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda plane: plane.astype(">f4")])
    def test_planes(self, kind):
        rows, columns = np.mgrid[:6, :7] * 30.0
        assert terrain_slope(kind(rows), 30.0).numpy() == pytest.approx(45.0)
        assert terrain_slope(kind(-columns), 30.0).numpy() == pytest.approx(45.0)
        assert terrain_slope(kind((rows + columns) / 2**0.5), 30.0).numpy() == pytest.approx(45.0)
        assert terrain_slope(kind(columns), 15.0).numpy() == pytest.approx(np.rad2deg(np.arctan(2.0)))
        assert not terrain_slope(kind(np.full((3, 5, 5), 812.0)), 30.0).any()

    def test_holes(self):
        """Unknown there and beside it, and nowhere else."""
        elevation = np.mgrid[:7, :7][0] * 30.0
        elevation[3, 2] = np.nan
        expected = np.zeros((7, 7), dtype=bool)
        expected[[2, 3, 4, 3, 3], [2, 2, 2, 1, 3]] = True
        slope = terrain_slope(elevation, 30.0).numpy()
        assert (np.isnan(slope) == expected).all() and slope[~expected] == pytest.approx(45.0)
        masked = np.ma.masked_invalid(elevation).astype(np.float32)
        assert (np.isnan(terrain_slope(masked, 30.0).numpy()) == expected).all()

    def test_read_only_memory(self, recwarn):
        elevation = np.frombuffer(np.zeros(25, dtype=np.float32).tobytes(), dtype=np.float32).reshape(5, 5)
        assert not terrain_slope(elevation, 30.0).any() and not recwarn


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_samples_do_not_depend_on_their_batch(data):
    """Whatever the bands and whoever is absent: each sample is what it is when it is processed alone."""
    count = data.draw(st.integers(1, 4))
    extra = data.draw(st.lists(st.sampled_from(["B01", "B05", "B11"]), unique=True))
    order = data.draw(st.permutations(OPTICAL + extra))
    names = data.draw(st.lists(st.sampled_from(sorted(MODALITIES)), min_size=1, unique=True))
    unit = data.draw(st.sampled_from(["dn", "reflectance"]))
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    images, options = {}, {"bands": {}, "units": {}, "gsd": {}}
    for name in names:
        values = physical(name, count, seed=int(generator.integers(999)))
        if name == "s2":
            values = generator.uniform(0.01, 1.0, (count, len(order), 8, 8)) * (10_000 if unit == "dn" else 1)
            options["bands"]["s2"], options["units"]["s2"] = order, unit
        if name != "worldcover":
            values = np.where(generator.random(values.shape) < 0.05, np.nan, values)
        present = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        present[0] |= name == names[0]
        images[name] = [value if there else None for value, there in zip(values, present)]
    keep = [sample for sample in range(count) if any(value[sample] is not None for value in images.values())]
    images = {name: [value[sample] for sample in keep] for name, value in images.items()}
    resolutions = {name: 10.0 + generator.random(len(keep)) for name in images}
    options["gsd"] = {
        name: [metres for metres, image in zip(resolutions[name], values) if image is not None] or 10.0
        for name, values in images.items()
    }
    together = processor()(images, **options)
    for sample in range(len(keep)):
        alone = {name: value[sample] for name, value in images.items() if value[sample] is not None}
        own = {key: {name: value[name] for name in value if name in alone} for key, value in options.items()}
        own["gsd"] = {name: float(resolutions[name][sample]) for name in alone}
        single = processor()(alone, **own)
        for name in together["pixel_values"]:
            assert together["modality_mask"][name][sample] == (name in alone)
            if name not in alone:
                continue
            for key in ("pixel_values", "valid_mask"):
                assert torch.equal(together[key][name][sample], single[key][name][0])
            metres = torch.as_tensor(together["gsd"][name]).expand(len(keep))[sample]
            assert metres == pytest.approx(single["gsd"][name], rel=1e-3)
