"""The registry: every sensor has what a processor needs, and a choice of its bands takes all that belongs to them."""

import math
import re

import numpy as np
import pytest
import torch

from modeling_mapex import SENSORS, MapexConfig, MapexImageProcessor, MapexModel
from modeling_mapex.configuration_mapex import PER_BAND_KEYS
from modeling_mapex.sensors_mapex import modality_spec
from modeling_mapex.units_mapex import UNITS


BANDS = [pytest.param(band, id=f"{name}-{band.name}") for name, sensor in SENSORS.items() for band in sensor.bands]
OPTICAL = [name for name, sensor in SENSORS.items() if sensor.unit == "reflectance"]
OWN = {
    "bands": ["red", "nir"],
    "gsd": 3.0,
    "unit": "reflectance",
    "mean": [0.1, 0.3],
    "std": [0.05, 0.1],
    "dn_scale": 1e-4,
    "nodata": [0.0],
}


@pytest.mark.parametrize("band", BANDS)
def test_statistics_of_bands(band):
    low, high = (0.0, 1.0) if band.unit == "class" else band.clip
    assert low <= band.mean <= high
    assert 0.0 < band.std <= (high - low) / 2, "no deviation exceeds half of the range"
    assert band.unit in UNITS and (band.code is not None) == (band.unit == "class")


@pytest.mark.parametrize("name", SENSORS)
def test_statistics_name_their_source(name):
    """A number of pixels, or the sensor whose they are."""
    text = SENSORS[name].statistics
    borrowed = re.search(r"Those of `(\w+)`", text)
    if borrowed:
        other = SENSORS[borrowed[1]]
        assert [(band.mean, band.std) for band in SENSORS[name].bands] == [
            (band.mean, band.std) for band in other.bands
        ]
        text = other.statistics
    assert re.search(r"\d million pixels", text)


@pytest.mark.parametrize("name", SENSORS)
def test_bands_of_a_sensor(name):
    sensor = SENSORS[name]
    assert len({band.unit for band in sensor.bands}) == 1
    assert all(math.isfinite(mark) for mark in sensor.nodata)
    codes = [band.code for band in sensor.bands if band.code is not None]
    assert len(set(codes)) == len(codes) and not set(codes) & set(sensor.nodata)
    assert (sensor.dn_scale is not None) == (sensor.unit == "reflectance")


@pytest.mark.parametrize("name", OPTICAL)
def test_wavelengths_rise(name):
    wavelengths = [band.wavelength for band in SENSORS[name].bands]
    assert wavelengths == sorted(wavelengths) and wavelengths[0] >= 400 and wavelengths[-1] <= 2500


def test_colours_and_the_narrow_band():
    assert [band.wavelength for band in SENSORS["rgb"].bands] == sorted(
        (band.wavelength for band in SENSORS["rgb"].bands), reverse=True
    )
    for name in ("s2", "s2_l1c"):
        names = SENSORS[name].band_names
        assert names[names.index("B8A") - 1 : names.index("B8A") + 2] == ["B08", "B8A", "B09"]
    with_wavelength = {name for name, sensor in SENSORS.items() if sensor.bands[0].wavelength is not None}
    assert with_wavelength == {*OPTICAL, "rgb"}


@pytest.mark.parametrize("name", SENSORS)
def test_a_choice_of_bands_takes_what_belongs_to_them(name):
    """All lists with one entry a band are sliced and reordered alike; the rest is the sensor's."""
    full = modality_spec(name, patch_size=8)
    for chosen in (full["bands"][::-1], full["bands"][-1:], full["bands"][::2]):
        part = modality_spec(name, patch_size=8, bands=chosen)
        assert part.keys() == full.keys()
        positions = [full["bands"].index(band) for band in chosen]
        for key in full:
            if key in PER_BAND_KEYS:
                assert part[key] == [full[key][position] for position in positions]
            elif key not in ("bands", "target_groups"):
                assert part[key] == full[key]
    assert all(len(full[key]) == len(full["bands"]) for key in PER_BAND_KEYS if key in full)


@pytest.mark.parametrize("name", SENSORS)
def test_every_sensor_has_a_processor(name):
    """An image of the means becomes zeros, goes into the model, and comes back."""
    config = MapexConfig.from_preset("nano", [name])
    processor = MapexImageProcessor.from_config(config)
    sensor = SENSORS[name]
    if sensor.unit == "class":
        image = np.full((1, 8, 8), sensor.bands[0].code)
    else:
        image = np.ones((len(sensor.bands), 8, 8)) * np.array([band.mean for band in sensor.bands])[:, None, None]
    features = processor({name: image})
    if sensor.unit != "class":
        assert features["pixel_values"][name].abs().max() < 1e-4
    back = processor.inverse_transform(features["pixel_values"])[name][0]
    np.testing.assert_allclose(back, image, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert MapexModel(config).eval()(**features).pooler_output.isfinite().all()


@pytest.mark.parametrize("name", OPTICAL)
def test_digital_numbers_of_every_sensor(name):
    processor = MapexImageProcessor.from_config(MapexConfig.from_preset("nano", [name]))
    sensor = SENSORS[name]
    numbers = np.random.default_rng(0).integers(8_000, 9_000, (len(sensor.bands), 8, 8))
    features = processor({name: numbers}, units={name: "dn"})
    reflectance = (numbers * sensor.dn_scale + sensor.dn_offset).clip(0, 1)
    back = processor.inverse_transform(features["pixel_values"])[name][0]
    np.testing.assert_allclose(back, reflectance, rtol=1e-4)


def test_a_sensor_of_your_own():
    """One dictionary, beside registered ones, with all that it says."""
    config = MapexConfig.from_preset("nano", {"planet": OWN, "s1": None})
    assert config.modalities["planet"] == {**OWN, "patch_size": 8}
    processor = MapexImageProcessor.from_config(config)
    numbers = np.full((2, 8, 8), 2000, dtype=np.uint16)
    features = processor({"planet": numbers}, bands={"planet": ["nir", "red"]}, units={"planet": "dn"})
    np.testing.assert_allclose(features["pixel_values"]["planet"][0, :, 0, 0], [2.0, -1.0], rtol=1e-5)
    assert features["gsd"]["planet"] == 3.0


def test_the_default_sensors():
    """Not all that is registered: a checkpoint keeps its shape when a sensor is added here."""
    for config in (MapexConfig(), MapexConfig.from_preset("base")):
        assert {name: len(spec["bands"]) for name, spec in config.modalities.items()} == {
            "dem": 1,
            "rgb": 3,
            "s1": 2,
            "s2": 12,
        }
        assert all(modality_spec(name, patch_size=16) == spec for name, spec in config.modalities.items())
