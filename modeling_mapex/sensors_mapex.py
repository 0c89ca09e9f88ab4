"""The sensor registry: which bands a sensor has, in which order, unit and resolution, as plain data.

This file is the single source of truth for sensors that MAPEX knows by name; a sensor of your own needs no entry
here, only a dictionary of the same form in `MapexConfig.modalities` (see `modality_spec`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """One spectral band, polarisation or layer of a sensor.

    Args:
        name (`str`): Name that users type, e.g. `"B04"` or `"VV"`.
        unit (`str`): Physical unit of the values before normalisation: `"dB"`, `"reflectance"`, `"metres"`, `"uint8"`.
        gsd (`float`): Native ground sampling distance in metres.
        target_group (`str`): Bands of one group are strongly correlated; the pretraining target is normalised per
            patch and group, so that a bright band does not drown the others.
        wavelength (`float`, *optional*): Central wavelength in nanometres.
    """

    name: str
    unit: str
    gsd: float
    target_group: str
    wavelength: float | None = None


@dataclass(frozen=True)
class Sensor:
    """A sensor: its bands in their canonical order, and the grid they are delivered on.

    Args:
        title (`str`): Name for people.
        gsd (`float`): Ground sampling distance in metres of the common grid; bands with a coarser native resolution
            are resampled to it.
        bands (`tuple[Band, ...]`): Bands in canonical order.
        display (`tuple[str, ...]`): The band, or the three bands as red, green and blue, that show it to a person.
    """

    title: str
    gsd: float
    bands: tuple[Band, ...]
    display: tuple[str, ...]

    @property
    def band_names(self) -> list[str]:
        return [band.name for band in self.bands]


# Resolutions and wavelengths of Sentinel-2: central wavelengths of S2A's MSI, ESA Sentinel-2 User Handbook, table 1.
# B10 (cirrus) is not part of a Level-2A product.
SENSORS: dict[str, Sensor] = {
    "s1": Sensor(
        title="Sentinel-1 C-band SAR backscatter",
        gsd=10.0,
        bands=(
            Band("VV", "dB", 10.0, "backscatter"),
            Band("VH", "dB", 10.0, "backscatter"),
        ),
        display=("VV",),
    ),
    "s2": Sensor(
        title="Sentinel-2 MSI, Level-2A surface reflectance",
        gsd=10.0,
        bands=(
            Band("B01", "reflectance", 60.0, "visible", 442.7),
            Band("B02", "reflectance", 10.0, "visible", 492.4),
            Band("B03", "reflectance", 10.0, "visible", 559.8),
            Band("B04", "reflectance", 10.0, "visible", 664.6),
            Band("B05", "reflectance", 20.0, "near_infrared", 704.1),
            Band("B06", "reflectance", 20.0, "near_infrared", 740.5),
            Band("B07", "reflectance", 20.0, "near_infrared", 782.8),
            Band("B08", "reflectance", 10.0, "near_infrared", 832.8),
            Band("B8A", "reflectance", 20.0, "near_infrared", 864.7),
            Band("B09", "reflectance", 60.0, "near_infrared", 945.1),
            Band("B11", "reflectance", 20.0, "shortwave_infrared", 1613.7),
            Band("B12", "reflectance", 20.0, "shortwave_infrared", 2202.4),
        ),
        display=("B04", "B03", "B02"),
    ),
    "rgb": Sensor(
        title="Sentinel-2 true colour, 8 bit",
        gsd=10.0,
        bands=(
            Band("R", "uint8", 10.0, "colour", 664.6),
            Band("G", "uint8", 10.0, "colour", 559.8),
            Band("B", "uint8", 10.0, "colour", 492.4),
        ),
        display=("R", "G", "B"),
    ),
    "dem": Sensor(
        title="Digital elevation model",
        gsd=30.0,
        bands=(Band("elevation", "metres", 30.0, "elevation"),),
        display=("elevation",),
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
        raise ValueError(f"Unknown bands {unknown} of `{modality}`. Available: {available}.")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"Bands of `{modality}` are repeated: {wanted}.")
    return [available.index(band) for band in wanted]


def modality_spec(name: str, *, patch_size: int, bands: list[str] | None = None) -> dict:
    """The entry for the registered sensor `name` in `MapexConfig.modalities`, as plain data.

    Args:
        name (`str`): A key of `SENSORS`.
        patch_size (`int`): Side of a patch in pixels of the sensor's grid.
        bands (`list[str]`, *optional*): A subset of the sensor's bands, in the order of your channels. Default: all.

    Returns:
        `dict`: `{"bands": list[str], "gsd": float (metres), "patch_size": int, "target_groups": list[list[str]]}`.

    Raises:
        ValueError: unknown sensor or band.
    """
    sensor = get_sensor(name)
    positions = select_bands(name, sensor.band_names, sensor.band_names if bands is None else bands)
    chosen = [sensor.bands[position] for position in positions]
    groups: dict[str, list[str]] = {}
    for band in chosen:
        groups.setdefault(band.target_group, []).append(band.name)
    return {
        "bands": [band.name for band in chosen],
        "gsd": sensor.gsd,
        "patch_size": patch_size,
        "target_groups": list(groups.values()),
    }
