"""The sensor registry: which bands a sensor has, in which order, unit, resolution and statistics, as plain data.

This file is the single source of truth for sensors that MAPEX knows by name; a sensor of your own needs no entry
here, only a dictionary of the same form in `MapexConfig.modalities` (see `modality_spec`).
"""

import difflib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Band:
    """One spectral band, polarisation or layer of a sensor.

    Args:
        name (`str`): Name that users type, e.g. `"B04"` or `"VV"`.
        unit (`str`): Physical unit of mean, standard deviation and clip range: `"reflectance"` (0 to 1), `"db"`
            (decibel), `"metres"`, `"degrees"`, `"uint8"` (0 to 255), or `"class"` (1 where the pixel is of the class
            that the band stands for, else 0).
        gsd (`float`): Native ground sampling distance in metres.
        target_group (`str`): Bands of one group are strongly correlated; the pretraining target is normalised per
            patch and group, so that a bright band does not drown the others.
        wavelength (`float`, *optional*): Central wavelength in nanometres.
        mean, std (`float`, *optional*): Of valid pixels after clipping, in `unit`; `Sensor.statistics` says of which.
        clip (`tuple[float, float]`, *optional*): Values are limited to this range before normalisation, in `unit`.
        code (`int`, *optional*): For a categorical layer, the pixel value that this band stands for.
    """

    name: str
    unit: str
    gsd: float
    target_group: str
    wavelength: float | None = None
    mean: float | None = None
    std: float | None = None
    clip: tuple[float, float] | None = None
    code: int | None = None


@dataclass(frozen=True)
class Sensor:
    """A sensor: its bands in their canonical order, and the grid they are delivered on.

    Args:
        title (`str`): Name for people.
        gsd (`float`): Ground sampling distance in metres of the common grid; bands with a coarser native resolution
            are resampled to it.
        bands (`tuple[Band, ...]`): Bands in canonical order, all of the same unit.
        display (`tuple[str, ...]`): The band, or the three bands as red, green and blue, that show it to a person.
        nodata (`tuple[float, ...]`): Values that mark pixels without data, in whichever unit the pixels come; NaN
            always does.
        dn_scale, dn_offset (`float`, *optional*): From digital numbers to reflectance: `dn * dn_scale + dn_offset`.
        statistics (`str`): Of which imagery the bands' means and standard deviations are, and of how many pixels.
    """

    title: str
    gsd: float
    bands: tuple[Band, ...]
    display: tuple[str, ...]
    nodata: tuple[float, ...] = ()
    dn_scale: float | None = None
    dn_offset: float | None = None
    statistics: str = ""

    @property
    def band_names(self) -> list[str]:
        return [band.name for band in self.bands]

    @property
    def unit(self) -> str:
        return self.bands[0].unit


# Sentinel-2: central wavelengths of S2A's MSI, ESA Sentinel-2 User Handbook, table 1; B10 (cirrus) is not part of a
# Level-2A product. Its digital numbers carry an offset since processing baseline 04.00 (January 2022), dn_offset=-0.1,
# which older and harmonised products do not. Landsat: USGS Landsat 8-9 Collection 2 Level 2 guide; OLI band centres.
# Means and standard deviations: `conversion/compute_statistics.py` on shards of the imagery that `statistics` names.
SENSORS: dict[str, Sensor] = {
    "s1": Sensor(
        title="Sentinel-1 C-band SAR backscatter (GRD or RTC)",
        gsd=10.0,
        bands=(
            Band("VV", "db", 10.0, "backscatter", mean=-11.66, std=4.59, clip=(-40.0, 10.0)),
            Band("VH", "db", 10.0, "backscatter", mean=-18.39, std=5.072, clip=(-40.0, 10.0)),
        ),
        display=("VV",),
        nodata=(-9999.0,),
        statistics="BigEarthNet v2, BioMassters, Sen1Floods11 and TerraMesh samples; 3.8 million pixels.",
    ),
    "s2": Sensor(
        title="Sentinel-2 MSI, Level-2A surface reflectance",
        gsd=10.0,
        bands=(
            Band("B01", "reflectance", 60.0, "visible", 442.7, mean=0.03764, std=0.03833, clip=(0.0, 1.0)),
            Band("B02", "reflectance", 10.0, "visible", 492.4, mean=0.04507, std=0.07573, clip=(0.0, 1.0)),
            Band("B03", "reflectance", 10.0, "visible", 559.8, mean=0.06446, std=0.07391, clip=(0.0, 1.0)),
            Band("B04", "reflectance", 10.0, "visible", 664.6, mean=0.06061, std=0.08191, clip=(0.0, 1.0)),
            Band("B05", "reflectance", 20.0, "near_infrared", 704.1, mean=0.1011, std=0.0964, clip=(0.0, 1.0)),
            Band("B06", "reflectance", 20.0, "near_infrared", 740.5, mean=0.1854, std=0.1299, clip=(0.0, 1.0)),
            Band("B07", "reflectance", 20.0, "near_infrared", 782.8, mean=0.2124, std=0.1474, clip=(0.0, 1.0)),
            Band("B08", "reflectance", 10.0, "near_infrared", 832.8, mean=0.221, std=0.146, clip=(0.0, 1.0)),
            Band("B8A", "reflectance", 20.0, "near_infrared", 864.7, mean=0.2287, std=0.1553, clip=(0.0, 1.0)),
            Band("B09", "reflectance", 60.0, "near_infrared", 945.1, mean=0.223, std=0.1455, clip=(0.0, 1.0)),
            Band("B11", "reflectance", 20.0, "shortwave_infrared", 1613.7, mean=0.1438, std=0.1062, clip=(0.0, 1.0)),
            Band("B12", "reflectance", 20.0, "shortwave_infrared", 2202.4, mean=0.09241, std=0.08033, clip=(0.0, 1.0)),
        ),
        display=("B04", "B03", "B02"),
        nodata=(0.0,),
        dn_scale=1e-4,
        dn_offset=0.0,
        statistics="BigEarthNet v2, BioMassters and unlabelled Level-2A samples; 2.4 to 3.7 million pixels a band.",
    ),
    "s2_l1c": Sensor(
        title="Sentinel-2 MSI, Level-1C top-of-atmosphere reflectance",
        gsd=10.0,
        bands=(
            Band("B01", "reflectance", 60.0, "visible", 442.7, mean=0.1373, std=0.02209, clip=(0.0, 1.0)),
            Band("B02", "reflectance", 10.0, "visible", 492.4, mean=0.1142, std=0.03196, clip=(0.0, 1.0)),
            Band("B03", "reflectance", 10.0, "visible", 559.8, mean=0.1093, std=0.03948, clip=(0.0, 1.0)),
            Band("B04", "reflectance", 10.0, "visible", 664.6, mean=0.1011, std=0.05684, clip=(0.0, 1.0)),
            Band("B05", "reflectance", 20.0, "near_infrared", 704.1, mean=0.1252, std=0.05305, clip=(0.0, 1.0)),
            Band("B06", "reflectance", 20.0, "near_infrared", 740.5, mean=0.1946, std=0.08191, clip=(0.0, 1.0)),
            Band("B07", "reflectance", 20.0, "near_infrared", 782.8, mean=0.2305, std=0.1033, clip=(0.0, 1.0)),
            Band("B08", "reflectance", 10.0, "near_infrared", 832.8, mean=0.2202, std=0.1065, clip=(0.0, 1.0)),
            Band("B8A", "reflectance", 20.0, "near_infrared", 864.7, mean=0.2483, std=0.1178, clip=(0.0, 1.0)),
            Band("B09", "reflectance", 60.0, "near_infrared", 945.1, mean=0.063, std=0.04249, clip=(0.0, 1.0)),
            Band("B10", "reflectance", 60.0, "cirrus", 1373.5, mean=0.001184, std=0.005, clip=(0.0, 1.0)),
            Band("B11", "reflectance", 20.0, "shortwave_infrared", 1613.7, mean=0.1666, std=0.09413, clip=(0.0, 1.0)),
            Band("B12", "reflectance", 20.0, "shortwave_infrared", 2202.4, mean=0.1005, std=0.06972, clip=(0.0, 1.0)),
        ),
        display=("B04", "B03", "B02"),
        nodata=(0.0,),
        dn_scale=1e-4,
        dn_offset=0.0,
        statistics="EuroSAT and Sen1Floods11 samples; 0.75 million pixels. Least deviation 0.005.",
    ),
    "rgb": Sensor(
        title="Sentinel-2 true colour, 8 bit",
        gsd=10.0,
        bands=(
            Band("R", "uint8", 10.0, "colour", 664.6, mean=88.07, std=51.76, clip=(0.0, 255.0)),
            Band("G", "uint8", 10.0, "colour", 559.8, mean=97.43, std=34.8, clip=(0.0, 255.0)),
            Band("B", "uint8", 10.0, "colour", 492.4, mean=104.1, std=29.87, clip=(0.0, 255.0)),
        ),
        display=("R", "G", "B"),
        statistics="EuroSAT and TerraMesh samples; 24.8 million pixels.",
    ),
    "hls": Sensor(
        title="Harmonized Landsat Sentinel-2, surface reflectance",
        gsd=30.0,
        bands=(
            Band("coastal", "reflectance", 30.0, "visible", 442.96, mean=0.03832, std=0.02305, clip=(0.0, 1.0)),
            Band("blue", "reflectance", 30.0, "visible", 482.04, mean=0.04754, std=0.02805, clip=(0.0, 1.0)),
            Band("green", "reflectance", 30.0, "visible", 561.41, mean=0.0796, std=0.03701, clip=(0.0, 1.0)),
            Band("red", "reflectance", 30.0, "visible", 654.59, mean=0.09227, std=0.05404, clip=(0.0, 1.0)),
            Band("nir", "reflectance", 30.0, "near_infrared", 864.67, mean=0.2088, std=0.1095, clip=(0.0, 1.0)),
            Band("swir1", "reflectance", 30.0, "shortwave_infrared", 1608.86, mean=0.1913, std=0.1191, clip=(0.0, 1.0)),
            Band(
                "swir2", "reflectance", 30.0, "shortwave_infrared", 2200.73, mean=0.1293, std=0.09406, clip=(0.0, 1.0)
            ),
        ),
        display=("red", "green", "blue"),
        nodata=(-9999.0,),
        dn_scale=1e-4,
        dn_offset=0.0,
        statistics="184 chips of Harmonized Landsat Sentinel-2 with water; 3.0 million pixels.",
    ),
    "landsat": Sensor(
        title="Landsat-8/9 OLI, Collection 2 Level-2 surface reflectance",
        gsd=30.0,
        bands=(
            Band("B1", "reflectance", 30.0, "visible", 442.96, mean=0.03832, std=0.02305, clip=(0.0, 1.0)),
            Band("B2", "reflectance", 30.0, "visible", 482.04, mean=0.04754, std=0.02805, clip=(0.0, 1.0)),
            Band("B3", "reflectance", 30.0, "visible", 561.41, mean=0.0796, std=0.03701, clip=(0.0, 1.0)),
            Band("B4", "reflectance", 30.0, "visible", 654.59, mean=0.09227, std=0.05404, clip=(0.0, 1.0)),
            Band("B5", "reflectance", 30.0, "near_infrared", 864.67, mean=0.2088, std=0.1095, clip=(0.0, 1.0)),
            Band("B6", "reflectance", 30.0, "shortwave_infrared", 1608.86, mean=0.1913, std=0.1191, clip=(0.0, 1.0)),
            Band("B7", "reflectance", 30.0, "shortwave_infrared", 2200.73, mean=0.1293, std=0.09406, clip=(0.0, 1.0)),
        ),
        display=("B4", "B3", "B2"),
        nodata=(0.0,),
        dn_scale=2.75e-5,
        dn_offset=-0.2,
        statistics="Those of `hls`, which is harmonised to OLI; none of Landsat's own.",
    ),
    "dem": Sensor(
        title="Digital elevation model",
        gsd=30.0,
        bands=(Band("elevation", "metres", 30.0, "elevation", mean=275.4, std=401.0, clip=(-500.0, 9000.0)),),
        display=("elevation",),
        nodata=(-9999.0, -32768.0),
        statistics="Copernicus DEM of 184 chips and 4 TerraMesh samples; 3.2 million pixels.",
    ),
    "slope": Sensor(
        title="Terrain slope, from elevation by `terrain_slope`",
        gsd=30.0,
        bands=(Band("slope", "degrees", 30.0, "slope", mean=4.054, std=6.449, clip=(0.0, 90.0)),),
        display=("slope",),
        nodata=(-9999.0,),
        statistics="Derived from `dem`; 3.2 million pixels.",
    ),
    "worldcover": Sensor(
        title="Land cover, ESA WorldCover classes",
        gsd=10.0,
        bands=(
            Band("tree_cover", "class", 10.0, "land_cover", mean=0.2526, std=0.4345, code=10),
            Band("shrubland", "class", 10.0, "land_cover", mean=0.02209, std=0.147, code=20),
            Band("grassland", "class", 10.0, "land_cover", mean=0.2218, std=0.4155, code=30),
            Band("cropland", "class", 10.0, "land_cover", mean=0.3588, std=0.4797, code=40),
            Band("built_up", "class", 10.0, "land_cover", mean=0.02562, std=0.158, code=50),
            Band("bare", "class", 10.0, "land_cover", mean=0.007424, std=0.1, code=60),
            Band("snow_and_ice", "class", 10.0, "land_cover", mean=8.293e-06, std=0.1, code=70),
            Band("water", "class", 10.0, "land_cover", mean=0.1107, std=0.3138, code=80),
            Band("herbaceous_wetland", "class", 10.0, "land_cover", mean=0.0005918, std=0.1, code=90),
            Band("mangroves", "class", 10.0, "land_cover", mean=0.0, std=0.1, code=95),
            Band("moss_and_lichen", "class", 10.0, "land_cover", mean=0.0002375, std=0.1, code=100),
        ),
        display=("built_up", "tree_cover", "water"),
        nodata=(0.0,),
        statistics="The same 184 chips as `hls`; 3.0 million pixels. Least deviation 0.1.",
    ),
}


def get_sensor(name: str) -> Sensor:
    """Return the sensor registered as `name`.

    Raises:
        ValueError: `name` is not registered.
    """
    if name not in SENSORS:
        raise ValueError(
            f"Unknown sensor `{name}`. Registered sensors: {sorted(SENSORS)}. For a sensor of your own pass a "
            'dictionary instead of a name: {"my_sensor": {"bands": ["red", "nir"], "gsd": 3.0, "patch_size": 16}}.'
        )
    return SENSORS[name]


def select_bands(modality: str, available: list[str], wanted: list[str]) -> list[int]:
    """Positions of the `wanted` bands of `modality` among its `available` ones, in the wanted order.

    Raises:
        TypeError: `wanted` is a string, which would be read letter by letter.
        ValueError: `wanted` is empty, repeats a band or names one that is not available.
    """
    if isinstance(wanted, str):
        raise TypeError(f'Bands of `{modality}` must be a list of names, got the string "{wanted}".')
    wanted = list(wanted)
    if not wanted:
        raise ValueError(f"No bands asked for of `{modality}`. Available: {available}.")
    unknown = [band for band in wanted if band not in available]
    if unknown:
        close = [
            match for band in unknown for match in difflib.get_close_matches(str(band), available, n=1, cutoff=0.5)
        ]
        hint = f" Did you mean {close}?" if close else ""
        raise ValueError(f"Unknown bands {unknown} of `{modality}`. Available: {available}.{hint}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"Bands of `{modality}` are repeated: {wanted}.")
    return [available.index(band) for band in wanted]


def modality_spec(name: str, *, patch_size: int, bands: list[str] | None = None) -> dict[str, Any]:
    """The entry for the registered sensor `name` in `MapexConfig.modalities`, as plain data.

    Args:
        name (`str`): A key of `SENSORS`.
        patch_size (`int`): Side of a patch in pixels of the sensor's grid.
        bands (`list[str]`, *optional*): A subset of the sensor's bands, in the order of your channels. Default: all.

    Returns:
        `dict`: `{"bands": list[str], "gsd": float (metres), "patch_size": int, "target_groups": list[list[str]],
        "unit": str, "mean": list[float], "std": list[float], "clip": list[[low, high]]}`, and where the sensor has them
        `"nodata"` (list of values), `"dn_scale"`, `"dn_offset"` and `"codes"` (list of pixel values, one a band).

    Raises:
        ValueError: unknown sensor or band.
    """
    sensor = get_sensor(name)
    positions = select_bands(name, sensor.band_names, sensor.band_names if bands is None else bands)
    chosen = [sensor.bands[position] for position in positions]
    groups: dict[str, list[str]] = {}
    for band in chosen:
        groups.setdefault(band.target_group, []).append(band.name)
    spec: dict[str, Any] = {
        "bands": [band.name for band in chosen],
        "gsd": sensor.gsd,
        "patch_size": patch_size,
        "target_groups": list(groups.values()),
        "unit": sensor.unit,
        "mean": [band.mean for band in chosen],
        "std": [band.std for band in chosen],
    }
    if all(band.clip is not None for band in chosen):
        spec["clip"] = [list(band.clip) for band in chosen]
    if sensor.nodata:
        spec["nodata"] = list(sensor.nodata)
    if sensor.dn_scale is not None:
        spec.update(dn_scale=sensor.dn_scale, dn_offset=sensor.dn_offset)
    if chosen[0].code is not None:
        spec["codes"] = [band.code for band in chosen]
    return spec
