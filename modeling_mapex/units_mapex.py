"""Units of pixel values: which can be converted to which, and which values cannot be of the unit that was stated."""

import torch


# Which units the values of a band may be given in, for each unit that its statistics may be in. A unit that is not
# listed here ("kelvin", say) is taken as it is, unchecked.
UNITS: dict[str, tuple[str, ...]] = {
    "reflectance": ("reflectance", "dn"),
    "db": ("db", "linear"),
    "metres": ("metres",),
    "degrees": ("degrees",),
    "uint8": ("uint8",),
    "class": ("class",),
}
# Values outside of these ranges cannot be of the unit; more than `_IMPLAUSIBLE_SHARE` of them is an error. Glint and
# clouds reach reflectances of 2, single scatterers 30 dB.
_PLAUSIBLE = {
    "reflectance": (-0.3, 2.5),
    "dn": (-10_000.0, 65_535.0),
    "db": (-90.0, 60.0),
    "linear": (0.0, 1e6),
    "metres": (-12_000.0, 9_000.0),
    "degrees": (0.0, 90.0),
    "uint8": (-30.0, 285.0),  # resampling overshoots
}
_IMPLAUSIBLE_SHARE = 0.01


def check_range(name: str, unit: str, values: torch.Tensor, low: float, high: float) -> None:
    """Refuse values that cannot be of a unit.

    Args:
        name (`str`): Of the modality, for the message.
        unit (`str`): That the values were given in.
        values (`torch.Tensor`): Valid pixels of a batch, of any shape.
        low, high (`float`): Their least and greatest.

    Raises:
        ValueError: they lie outside of what is plausible for the unit, or look like another one.
    """
    if unit not in _PLAUSIBLE or not values.numel():
        return
    least, most = _PLAUSIBLE[unit]
    if low < least or high > most:
        share = ((values < least) | (values > most)).float().mean().item()
        if share > _IMPLAUSIBLE_SHARE:
            fix = {
                "reflectance": f'They look like digital numbers: pass `units={{"{name}": "dn"}}`.'
                if high > 250
                else "They look like percent: divide by 100.",
                "linear": f'They look like decibel: pass `units={{"{name}": "db"}}`.',
            }.get(unit, "State their unit with `units`, convert them, or say with `nodata` what marks missing data.")
            raise ValueError(
                f"`{name}` was given as `{unit}`, but {share:.0%} of its values lie outside {least:g} .. {most:g} "
                f"(they reach from {low:g} to {high:g}). {fix}"
            )
    # What follows could be true of a single pixel by chance; of all pixels of a batch hardly.
    varied = low != high
    fractions = high < 3.0 and bool((values != values.round()).any())
    if unit == "dn" and varied and high > 0.0 and fractions:
        looks = f'reach no more than {high:g}. They look like reflectance: pass `units={{"{name}": "reflectance"}}`.'
    elif unit == "db" and varied and low >= 0.0:
        looks = f'are all above 0 and reach {high:g}. They look like linear power: pass `units={{"{name}": "linear"}}`.'
    elif unit == "uint8" and high <= 1.0 and fractions:
        looks = f"reach no more than {high:g}. They look like values scaled to 0 .. 1: multiply them by 255."
    else:
        return
    raise ValueError(f"`{name}` was given as `{unit}`, but its values {looks}")
