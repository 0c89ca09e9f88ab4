"""The image processor against plain numpy: names, units, holes, sizes; and everything that it refuses."""

import numpy as np
import pytest
import torch
from conftest import randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from test_remote_code import run_without_package
from transformers import AutoImageProcessor

from modeling_mapex import MapexBatchFeature, MapexConfig, MapexForPreTraining, MapexImageProcessor, terrain_slope


MODALITIES = {
    "s1": {
        "bands": ["VV", "VH"],
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "db",
        "nodata": [-9999.0],
        "mean": [-12.0, -19.0],
        "std": [4.0, 5.0],
        "clip": [[-40.0, 5.0], [-50.0, 0.0]],
    },
    "s2": {
        "bands": ["B04", "B03", "B02"],
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "reflectance",
        "nodata": [0.0],
        "mean": [0.1, 0.12, 0.08],
        "std": [0.05, 0.06, 0.07],
        "clip": [[0.0, 1.0]] * 3,
        "dn_scale": 1e-4,
        "dn_offset": 0.0,
    },
    "cover": {
        "bands": ["trees", "crops", "water"],
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "class",
        "codes": [10, 40, 80],
        "mean": [0.5, 0.3, 0.2],
        "std": [0.5, 0.4, 0.3],
        "nodata": [0.0],
    },
    "rgb": {
        "bands": ["R", "G", "B"],
        "gsd": 10.0,
        "patch_size": 4,
        "unit": "uint8",
        "mean": [90.0, 100.0, 110.0],
        "std": [50.0, 40.0, 30.0],
    },
    "height": {"bands": ["z"], "gsd": 30.0, "patch_size": 2, "unit": "metres", "mean": [300.0], "std": [200.0]},
    "heat": {"bands": ["t"], "gsd": 30.0, "patch_size": 2, "unit": "kelvin", "mean": [290.0], "std": [9.0]},
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 2}


def make(**options) -> MapexImageProcessor:
    return MapexImageProcessor(MODALITIES, **options)


@pytest.fixture(scope="module")
def processor():
    return make()


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def numbers(rng, channels=3, side=8, batch=2):
    return rng.integers(100, 4000, (batch, channels, side, side), dtype=np.uint16)


def normalised(name, physical):
    """Clipped and normalised in float64."""
    spec = {key: np.array(MODALITIES[name][key])[..., None, None] for key in ("mean", "std")}
    if "clip" in MODALITIES[name]:
        low, high = np.array(MODALITIES[name]["clip"]).T[..., None, None]
        physical = np.clip(physical, low, high)
    return (physical - spec["mean"]) / spec["std"]


def close(tensor, expected):
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=2e-5)


class TestBandsAndUnits:
    @pytest.mark.parametrize("names", [["B04", "B03", "B02"], ["B02", "B08", "B03", "B12", "B04"]])
    def test_bands_by_name(self, processor, rng, names):
        image = numbers(rng, len(names))
        features = processor({"s2": image}, bands={"s2": names}, units={"s2": "dn"})
        wanted = image[:, [names.index(band) for band in ("B04", "B03", "B02")]]
        close(features["pixel_values"]["s2"], normalised("s2", wanted * 1e-4))

    @pytest.mark.parametrize(("offset", "expected"), [(None, 0.0), (-0.1, -0.1)])
    def test_digital_numbers(self, processor, rng, offset, expected):
        image = numbers(rng) + 1000
        options = {} if offset is None else {"dn_offset": {"s2": offset}}
        features = processor({"s2": image}, units={"s2": "dn"}, **options)
        close(features["pixel_values"]["s2"], normalised("s2", image * 1e-4 + expected))

    def test_linear_power(self, processor, rng):
        power = rng.gamma(2.0, 0.05, (1, 2, 8, 8))
        power[0, 1, 2, 3] = 0.0  # no echo: no logarithm
        features = processor({"s1": power}, units={"s1": "linear"})
        with np.errstate(divide="ignore"):
            expected = normalised("s1", 10 * np.log10(power))
        expected[0, 1, 2, 3] = 0.0
        close(features["pixel_values"]["s1"], expected)
        assert (~features["valid_mask"]["s1"]).nonzero().tolist() == [[0, 2, 3]]

    def test_clip_is_per_band(self, processor):
        image = np.array([30.0, -70.0])[:, None, None] * np.ones((2, 8, 8))
        features = processor({"s1": image})
        assert features["pixel_values"]["s1"][0, :, 0, 0].tolist() == pytest.approx([(5 + 12) / 4, (-50 + 19) / 5])

    def test_without_normalisation(self, rng):
        image = numbers(rng)
        features = make(do_normalize=False)({"s2": image}, units={"s2": "dn"})
        close(features["pixel_values"]["s2"], image * 1e-4)

    def test_codes_become_one_channel_a_class(self, processor):
        codes = np.array([[10, 40], [80, 0]]).repeat(4, axis=0).repeat(4, axis=1)
        features = processor({"cover": codes})
        one_hot = np.stack([codes == code for code in (10, 40, 80)])
        expected = normalised("cover", one_hot.astype(float)) * (codes != 0)
        close(features["pixel_values"]["cover"][0], expected)
        assert torch.equal(features["valid_mask"]["cover"][0], torch.from_numpy(codes != 0))
        back = processor.inverse_transform(features["pixel_values"])["cover"][0, 0].numpy()
        assert np.array_equal(back[codes != 0], codes[codes != 0])

    def test_a_unit_that_nobody_knows_is_taken_as_it_is(self, processor):
        features = processor({"heat": np.full((1, 4, 4), 308.0)}, units={"heat": "kelvin"})
        assert features["pixel_values"]["heat"].unique().item() == pytest.approx(2.0)

    def test_missing_bands_by_request(self, rng):
        image = numbers(rng, 2)
        features = make(missing_bands="mean")({"s2": image}, bands={"s2": ["B02", "B04"]}, units={"s2": "dn"})
        pixels = features["pixel_values"]["s2"]
        close(
            pixels[:, [0, 2]], normalised("s2", np.stack([image[:, 1], image[:, 0], image[:, 0]], 1) * 1e-4)[:, [0, 2]]
        )
        assert not pixels[:, 1].any() and features["valid_mask"]["s2"].all()

    def test_inverse(self, processor, rng):
        image = numbers(rng)
        features = processor({"s2": image}, units={"s2": "dn"})
        np.testing.assert_allclose(processor.inverse_transform(features["pixel_values"])["s2"], image * 1e-4, atol=1e-6)
        with pytest.raises(ValueError, match="got 2 channels"):
            processor.inverse_transform({"s2": torch.zeros(1, 2, 4, 4)})
        with pytest.raises(ValueError, match="Unknown modality"):
            processor.inverse_transform({"s9": torch.zeros(1, 2, 4, 4)})


class TestHoles:
    @pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf, -9999.0])
    def test_holes_are_the_mean_and_marked(self, processor, rng, hole):
        image = rng.normal(-14, 3, (2, 2, 8, 8)).astype(np.float32)
        expected = normalised("s1", image.astype(float))
        image[0, 1, 2, 3] = hole
        expected[0, 1, 2, 3] = 0.0
        features = processor({"s1": image})
        close(features["pixel_values"]["s1"], expected)  # the other band of that pixel keeps its value
        assert (~features["valid_mask"]["s1"]).nonzero().tolist() == [[0, 2, 3]]

    def test_nodata_of_the_call(self, processor, rng):
        image = numbers(rng)
        image[0, 0, 0, 0], image[1, 2, 7, 7], image[1, 0, 4, 4] = 65535, 1, 0
        features = processor({"s2": image}, units={"s2": "dn"}, nodata={"s2": [65535, 1]})
        assert (~features["valid_mask"]["s2"]).nonzero().tolist() == [[0, 0, 0], [1, 7, 7]]
        features = processor({"s2": image[1:]}, units={"s2": "dn"})  # its own nodata: 0
        assert (~features["valid_mask"]["s2"]).nonzero().tolist() == [[0, 4, 4]]

    def test_the_mean_without_normalisation(self, rng):
        image = rng.normal(-14, 3, (2, 8, 8))
        image[0, 0, 0] = np.nan
        assert make(do_normalize=False)({"s1": image})["pixel_values"]["s1"][0, 0, 0, 0] == -12.0


class TestInputs:
    def test_kinds_of_images_agree(self, processor, rng):
        from PIL import Image

        image = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)
        expected = normalised("rgb", image)[None]
        for form in (
            *(image, image[None], torch.from_numpy(image), [image], [torch.from_numpy(image)], image.tolist()),
            *(Image.fromarray(image.transpose(1, 2, 0)), [Image.fromarray(image.transpose(1, 2, 0))]),
            *(image.astype(np.float64), image.astype(">i4"), np.frombuffer(image.tobytes(), np.uint8).reshape(3, 8, 8)),
            *(image.transpose(2, 1, 0).copy().transpose(2, 1, 0), torch.from_numpy(image).bfloat16()),
            torch.from_numpy(image).float().requires_grad_(),
        ):
            close(processor({"rgb": form})["pixel_values"]["rgb"], expected)

    def test_inputs_are_not_changed(self, processor, rng):
        image = rng.normal(-14, 3, (2, 2, 8, 8)).astype(np.float32)
        image[0, 0, 0, 0] = np.nan
        tensor = torch.from_numpy(image.copy())
        for form in (image, tensor, [image[0]], [tensor[1]]):
            processor({"s1": form, "s2": None})
        assert np.array_equal(image, tensor.numpy(), equal_nan=True) and np.isnan(image[0, 0, 0, 0])

    def test_absent(self, processor, rng):
        s1, height = rng.normal(-14, 3, (2, 8, 8)), rng.uniform(0, 500, (3, 1, 4, 4))
        features = processor({"s1": [None, s1, None], "s2": None, "height": height}, gsd={"s1": [12.0]})
        assert set(features["pixel_values"]) == {"s1", "height"}
        assert features["modality_mask"]["s1"].tolist() == [False, True, False]
        assert features["modality_mask"]["height"].all()
        assert features["valid_mask"]["s1"].flatten(1).any(1).tolist() == [False, True, False]
        assert torch.equal(features["pixel_values"]["s1"][1:2], processor({"s1": s1})["pixel_values"]["s1"])
        assert features["gsd"] == {"s1": 12.0, "height": 30.0}

    @settings(max_examples=25, deadline=None)
    @given(
        st.permutations(["B02", "B03", "B04", "B08"]),
        st.lists(st.tuples(st.booleans(), st.booleans()).filter(any), min_size=1, max_size=4),
    )
    def test_a_sample_is_what_it_would_be_alone(self, names, presence):
        processor, rng = make(), np.random.default_rng(len(presence))
        draw = {
            "s1": lambda: rng.normal(-14, 3, (2, 8, 8)),
            "s2": lambda: rng.integers(1, 4000, (4, 8, 8)).astype(np.uint16),
        }
        samples = [
            {name: draw[name]() if there else None for name, there in zip(("s1", "s2"), row)} for row in presence
        ]
        images = {name: [sample[name] for sample in samples] for name in ("s1", "s2")}
        options = {"bands": {"s2": names}, "units": {"s2": "dn"}}
        batch = processor(images, **options)
        for index, sample in enumerate(samples):
            alone = processor(sample, **options)
            for name, pixels in alone["pixel_values"].items():
                assert torch.equal(batch["pixel_values"][name][index], pixels[0])
                assert batch["modality_mask"][name][index]


class TestSizeAndResolution:
    @pytest.mark.parametrize(("given", "expected"), [(8, 8), (9, 8), (10, 12), (3, 4), (1, 4)])
    def test_nearest_multiple_of_the_patch(self, processor, given, expected):
        features = processor({"s1": np.full((2, given, given), -10.0)})
        pixels = features["pixel_values"]["s1"]
        assert pixels.shape == (1, 2, expected, expected)
        assert features["gsd"]["s1"] * expected == pytest.approx(10.0 * given), "the ground stays the same"
        assert torch.allclose(pixels, pixels[:, :, :1, :1]), "a constant image stays constant"

    def test_a_ramp_stays_a_ramp(self, processor):
        ramp = np.broadcast_to(np.arange(12.0) * 30, (1, 12, 12))
        pixels = processor({"height": ramp}, size={"height": (24, 24)})["pixel_values"]["height"][0, 0, 5]
        assert torch.allclose(pixels[2:-2].diff(), torch.full((19,), 30 / 2 / 200), atol=1e-4)

    def test_a_hole_spoils_what_it_touches(self, processor):
        image = np.full((2, 12, 12), -10.0)
        image[:, 6, 6] = np.nan
        valid = processor({"s1": image}, size={"s1": (8, 8)})["valid_mask"]["s1"][0]
        assert not valid[4, 4] and valid.sum() >= 8 * 8 - 9
        holes = (~valid).nonzero()
        assert holes.min() >= 3 and holes.max() <= 5

    def test_one_resolution_or_one_for_each(self, processor, rng):
        image = rng.normal(-14, 3, (3, 2, 8, 8))
        assert processor({"s1": image}, gsd={"s1": [9.999, 10.0, 10.001]})["gsd"]["s1"] == pytest.approx(10.0)
        height = np.full((3, 1, 4, 4), 100.0)
        features = processor({"s1": [image[0], None, image[1]], "height": height}, gsd={"s1": [8.0, 12.0]})
        assert features["gsd"]["s1"].tolist() == [8.0, 10.0, 12.0]  # an absent one has the mean
        mixed = processor({"s1": [image[0], image[1][:, :4, :4]]}, size={"s1": (8, 8)})
        assert mixed["gsd"]["s1"].tolist() == [10.0, 5.0]
        assert torch.equal(mixed["pixel_values"]["s1"][:1], processor({"s1": image[0]})["pixel_values"]["s1"])


NAN = np.full((2, 8, 8), np.nan)
S1 = np.random.default_rng(1).normal(-14, 3, (2, 8, 8))
S2 = np.random.default_rng(1).integers(100, 4000, (3, 8, 8))
ERRORS = [
    ({"s9": S1}, {}, "Unknown modality `s9`. This processor has"),
    ({}, {}, "`images` is empty"),
    ({"s1": None}, {}, "Every modality is None"),
    ({"s1": [None]}, {}, "Every modality of every sample is None"),
    ({"s1": [S1, None], "s2": None}, {}, r"Samples \[1\] have no modality at all"),
    ({"s1": []}, {}, "The batch is empty"),
    ({"s1": [S1, S1], "rgb": np.zeros((3, 8, 8))}, {}, "different numbers of samples: .* put None"),
    ({"s1": [S1, S1[:, :4, :4]]}, {}, r"`s1` differ in size: .*`random_crop`"),
    ({"s1": [S1, S1[:1]]}, {}, r"differ in their number of channels: \[1, 2\]"),
    ({"s1": S1[0]}, {}, r"`s1` needs 2 channels in the order \['VV', 'VH'\], got 1"),
    ({"rgb": np.zeros((8, 8, 3))}, {}, "`rgb` needs 3 channels .* Channels come first"),
    ({"s1": np.zeros((1, 1, 2, 8, 8))}, {}, r"must be \(channels, height, width\)"),
    ({"s2": S2}, {"bands": {"s2": ["B04", "B03"]}}, "`bands` names 2 channels of `s2`.* but the image has 3"),
    ({"s2": S2}, {"bands": {"s2": ["B04", "B3", "B02"]}}, r"Unknown bands \['B3'\] of `s2`.*Did you mean \['B03'\]"),
    ({"s2": S2}, {"bands": {"s2": ["B04", "B04", "B02"]}}, "are repeated"),
    (
        {"s2": S2},
        {"bands": {"s2": ["B04", "B08", "B02"]}},
        r"lacks the bands \['B03'\].*prune_for_modal.*missing_bands",
    ),
    ({"s2": S2}, {"units": {"s2": "DN"}}, r"`s2` cannot be given in `DN`. Accepted: \['reflectance', 'dn'\]"),
    ({"s2": S2}, {}, '`s2` was given as `reflectance`, but 100% .* digital numbers: pass `units={"s2": "dn"}`'),
    ({"s2": S2 * 1e-4}, {"units": {"s2": "dn"}}, 'look like reflectance: pass `units={"s2": "reflectance"}`'),
    ({"s1": 10 ** (S1 / 10)}, {}, 'look like linear power: pass `units={"s1": "linear"}`'),
    ({"s1": S1}, {"units": {"s1": "linear"}}, 'look like decibel: pass `units={"s1": "db"}`'),
    ({"rgb": np.random.rand(3, 8, 8)}, {}, r"look like values scaled to 0 \.\. 1: multiply them by 255"),
    ({"height": np.full((1, 4, 4), 30_000.0)}, {}, "lie outside -12000 .. 9000 .*`nodata`"),
    ({"s1": NAN}, {}, "`s1` of samples .* has not one valid pixel: .* Pass None"),
    ({"s1": [S1, NAN]}, {}, r"`s1` of samples \[1\]"),
    ({"cover": np.zeros((8, 8))}, {}, "`cover` of samples .* has not one valid pixel"),
    ({"cover": np.full((8, 8), 7)}, {}, r"`cover` holds the codes \[7.0\].*nodata"),
    ({"cover": np.zeros((3, 8, 8))}, {}, "`cover` is a categorical layer: it takes one channel"),
    ({"s1": S1}, {"units": {"s2": "dn"}}, r"`units` is given for \['s2'\].*nothing uses it"),
    ({"s1": S1}, {"gsd": {"s1": -1.0}}, "`gsd` of `s1` must be metres per pixel above 0"),
    ({"s1": S1}, {"gsd": {"s1": [10.0, 10.0]}}, "`gsd` of `s1` has 2 values for 1 images"),
    ({"s1": S1}, {"size": {"s1": (9, 8)}}, "must be two multiples of its patch size 4"),
    ({"s2": S2 * 1e-4}, {"dn_offset": {"s2": -0.1}}, "`dn_offset` of `s2` is not used with the unit `reflectance`"),
    ({"s1": S1}, {"return_tensors": "np"}, '`return_tensors` must be "pt"'),
]


class TestRefuses:
    @pytest.mark.parametrize(("images", "options", "message"), ERRORS)
    def test_with_the_fix(self, processor, images, options, message):
        with pytest.raises(ValueError, match=message):
            processor(images, **options)

    @pytest.mark.parametrize(
        ("images", "options", "message"),
        [
            (S1, {}, "must be a dictionary from modality to images"),
            ({"s1": "s1.tif"}, {}, "`s1` must be an array, a tensor, a PIL image, a list of them, or None"),
            ({"s1": np.full((2, 4, 4), "a")}, {}, "Pixels must be numbers"),
            ({"s1": S1}, {"units": "db"}, "`units` must be a dictionary"),
            ({"s2": S2}, {"bands": {"s2": "B04"}}, 'must be a list of names, got the string "B04"'),
            ({"s1": S1}, {"unit": {"s1": "db"}}, "unit"),
        ],
    )
    def test_types(self, processor, images, options, message):
        with pytest.raises(TypeError, match=message):
            processor(images, **options)

    def test_resizing_that_is_off(self):
        with pytest.raises(ValueError, match=r"9 x 9 pixels, no multiples of its patch size 4.* for 8 x 8"):
            make(do_resize=False)({"s1": np.full((2, 9, 9), -10.0)})

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ({"mean": [0.0]}, "`mean` of `s1` needs 2 values"),
            ({"std": [1.0, 0.0]}, "`std` of `s1` must be above 0"),
            ({"mean": [None, None]}, "Modality `s1` has no `mean`.*compute_statistics.py"),
            ({"sdt": [1.0]}, r"unknown keys \['sdt'\]"),
        ],
    )
    def test_descriptions(self, spec, message):
        with pytest.raises(ValueError, match=message):
            MapexImageProcessor({"s1": {**MODALITIES["s1"], **spec}})

    def test_constructor(self):
        with pytest.raises(ValueError, match=r"has no arguments \['do_normalise'\]"):
            make(do_normalise=False)
        with pytest.raises(ValueError, match='`missing_bands` must be "raise" or "mean"'):
            make(missing_bands="zero")
        with pytest.raises(ValueError, match="`modalities` is empty"):
            MapexImageProcessor()
        with pytest.raises(ValueError, match="`planet` has no `mean`"):
            own = {"planet": {"bands": ["red"], "gsd": 3.0}}
            MapexImageProcessor.from_config(MapexConfig.from_preset("nano", modalities=own))

    @pytest.mark.parametrize(
        ("images", "units"),
        [
            ({"s2": np.random.default_rng(0).uniform(0.0001, 0.01, (3, 8, 8))}, "reflectance"),  # dark water
            ({"s2": np.random.default_rng(0).uniform(0.9, 1.6, (3, 8, 8))}, "reflectance"),  # snow
            ({"s2": np.where(np.arange(768).reshape(3, 16, 16) == 5, 6.5535, 0.2)}, "reflectance"),  # one saturated
            ({"s2": np.full((3, 8, 8), 1)}, "dn"),
            ({"s1": np.zeros((2, 8, 8))}, "db"),
            ({"s1": np.random.default_rng(0).normal(8, 6, (2, 8, 8))}, "db"),  # a town
            ({"rgb": np.zeros((3, 8, 8), np.uint8)}, "uint8"),
            ({"rgb": np.eye(8, dtype=np.uint8)[None].repeat(3, 0)}, "uint8"),
            ({"height": np.full((1, 4, 4), -430.0)}, "metres"),
        ],
    )
    def test_but_not_what_is_rare(self, processor, images, units):
        assert processor(images, units=dict.fromkeys(images, units))["pixel_values"]


class TestFeature:
    def test_to_reaches_inside(self, processor):
        features = processor({"s1": [S1, S1]}, gsd={"s1": [8.0, 12.0]})
        features["labels"] = torch.tensor([1, 0])
        moved = features.to("cpu", torch.bfloat16)
        assert moved is features and isinstance(moved, MapexBatchFeature)
        assert moved["pixel_values"]["s1"].dtype == torch.bfloat16
        assert moved["gsd"]["s1"].tolist() == [8.0, 12.0] and moved["gsd"]["s1"].dtype == torch.float32
        assert (moved["modality_mask"]["s1"].dtype, moved["labels"].dtype) == (torch.bool, torch.int64)
        for arguments in ({"device": "meta"}, {"dtype": torch.float16}):
            moved = features.to(**arguments)
            for tensor in (moved["valid_mask"]["s1"], moved["gsd"]["s1"], moved["labels"], moved["pixel_values"]["s1"]):
                assert tensor.device.type == "meta"  # and stays there

    def test_goes_into_a_model_and_through_accelerate(self, processor):
        operations = pytest.importorskip("accelerate.utils.operations", reason="needs the extra `train`")
        features = processor({"s1": [S1, None], "s2": [S2, S2]}, units={"s2": "dn"})
        features = operations.send_to_device(features, "cpu")
        model = MapexForPreTraining(MapexConfig(modalities={name: MODALITIES[name] for name in ("s1", "s2")}, **TINY))
        assert model(**features).loss.isfinite()


class TestSaving:
    def test_round_trip(self, processor, tmp_path):
        processor.save_pretrained(tmp_path)
        for loaded in (MapexImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
            assert isinstance(loaded, MapexImageProcessor) and loaded.modalities == processor.modalities
            same = loaded({"s1": S1})["pixel_values"]["s1"]
            assert torch.equal(same, processor({"s1": S1})["pixel_values"]["s1"])

    def test_travels_with_the_model_and_is_pruned_with_it(self, tmp_path):
        config = MapexConfig(modalities={name: MODALITIES[name] for name in ("s1", "s2")}, **TINY)
        model = randomize(MapexForPreTraining(config))
        model.calibrate_experts([{"pixel_values": {"s1": torch.randn(2, 2, 8, 8), "s2": torch.randn(2, 3, 8, 8)}}])
        model.save_pretrained(tmp_path / "full")
        model.prune_for_modalities({"s2": ["B02", "B04"]}).save_pretrained(tmp_path / "small")
        small = AutoImageProcessor.from_pretrained(tmp_path / "small")
        assert list(small.modalities) == ["s2"] and small.modalities["s2"]["mean"] == [0.08, 0.1]
        full = AutoImageProcessor.from_pretrained(tmp_path / "full")
        image = {"images": {"s2": S2}, "units": {"s2": "dn"}, "bands": {"s2": ["B04", "B03", "B02"]}}
        wanted = full(**image)["pixel_values"]["s2"][:, [2, 0]]
        assert torch.equal(small(**image)["pixel_values"]["s2"], wanted)

        # Without the package, from the code beside the weights.
        torch.save(wanted, tmp_path / "wanted.pt")
        np.save(tmp_path / "image.npy", S2)
        torch_save_free = """
            import numpy as np
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained("small", trust_remote_code=True)
            assert type(processor).__module__.startswith("transformers_modules")
            options = {"units": {"s2": "dn"}, "bands": {"s2": ["B04", "B03", "B02"]}}
            features = processor({"s2": np.load("image.npy")}, **options)
            assert torch.equal(features["pixel_values"]["s2"], torch.load("wanted.pt"))
            model = AutoModel.from_pretrained("small", trust_remote_code=True)
            assert model(**features.to(torch.float32)).pooler_output.isfinite().all()
            processor.save_pretrained("again")
        """
        from safetensors.torch import save_file

        save_file({"s2": torch.zeros(1)}, tmp_path / "inputs.safetensors")  # which the helper opens
        run_without_package(torch_save_free, tmp_path)
        again = AutoImageProcessor.from_pretrained(tmp_path / "again")
        assert again.modalities == small.modalities

    def test_a_processor_with_other_options_is_left_alone(self, tmp_path):
        config = MapexConfig(modalities={"s1": MODALITIES["s1"]}, **TINY)
        model = MapexForPreTraining(config)
        MapexImageProcessor.from_config(config, do_resize=False).save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        assert not AutoImageProcessor.from_pretrained(tmp_path).do_resize
        other = MapexForPreTraining(MapexConfig(modalities={"rgb": MODALITIES["rgb"]}, **TINY))
        other.save_pretrained(tmp_path)
        assert list(AutoImageProcessor.from_pretrained(tmp_path).modalities) == ["rgb"]

    def test_no_statistics_no_file(self, tmp_path):
        spec = {key: value for key, value in MODALITIES["s1"].items() if key not in ("mean", "std")}
        MapexForPreTraining(MapexConfig(modalities={"s1": spec}, **TINY)).save_pretrained(tmp_path)
        assert not (tmp_path / "preprocessor_config.json").exists()


class TestSlope:
    def test_planes(self):
        ramp = np.broadcast_to(np.arange(8.0) * 30, (1, 8, 8))
        assert torch.allclose(terrain_slope(ramp, 30.0), torch.tensor(45.0))
        assert torch.allclose(terrain_slope(ramp, 60.0), torch.rad2deg(torch.atan(torch.tensor(0.5))))
        assert not terrain_slope(torch.full((2, 4, 4), 7.0), 10.0).any()

    def test_unknown_spreads_to_its_neighbours(self):
        elevation = np.zeros((9, 9))
        elevation[4, 4] = np.nan
        unknown = terrain_slope(elevation, 10.0).isnan()
        assert sorted(map(tuple, unknown.nonzero().tolist())) == [(3, 4), (4, 3), (4, 5), (5, 4)]
