"""Mean and standard deviation of every band in shards, in the unit and clip range of the sensor registry.

    python conversion/compute_statistics.py shards/bigearthnet shards/terramesh
    python conversion/compute_statistics.py shards/mine --modalities s1 dem --json statistics.json
    python conversion/compute_statistics.py shards/mine --own '{"planet": {"unit": "reflectance", "dn_scale": 1e-4}}'

The registry's own numbers come from this script. Pixels without data do not count. A sensor that is not registered is
described by `--own`, with the keys of `MapexConfig.modalities` that say how to read it; put the result there as `mean`
and `std`. The slope of the terrain is derived from `dem`.
"""

import argparse
import json
import math
import sys

import torch
from tqdm import tqdm

from modeling_mapex import SENSORS, MapexImageProcessor, terrain_slope
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.data_mapex import read_schema, stream_shards
from modeling_mapex.image_processing_mapex import NoValidPixelError
from modeling_mapex.sensors_mapex import modality_spec


# Rare classes, and the cirrus band of clear skies, would be blown up to large values by their own small deviation.
LEAST_DEVIATION = {"class": 0.1, "reflectance": 0.005}


class Moments:
    """Count, sum and sum of squares of the bands of a sensor."""

    def __init__(self):
        self.bands: dict[str, list[float]] = {}

    def add(self, bands: list[str], pixels: torch.Tensor, valid: torch.Tensor) -> None:
        """`pixels (channels, height, width)`, `valid (height, width)`."""
        values = pixels[:, valid].double()  # (C, N)
        for band, total, squares in zip(bands, values.sum(dim=1).tolist(), values.square().sum(dim=1).tolist()):
            count, *sums = self.bands.setdefault(band, [0, 0.0, 0.0])
            self.bands[band] = [count + values.shape[1], sums[0] + total, sums[1] + squares]

    def result(self, least: float = 0.0) -> dict[str, dict[str, float]]:
        table = {}
        for band, (count, total, squares) in self.bands.items():
            mean = total / count
            deviation = math.sqrt(max(squares / count - mean * mean, 0.0))
            table[band] = {"mean": mean, "std": max(deviation, least), "pixels": count}
        return table


def specification(name: str, sensor: dict, own: dict) -> dict | None:
    """How to read the pixels of a modality: its bands of the registered sensor, or as described by the user."""
    if name in own:
        spec = {"bands": sensor["bands"], "gsd": sensor["gsd"], "patch_size": 1, **own[name]}
    else:
        key = sensor.get("sensor", name)
        if key not in SENSORS:
            return None
        bands = [band for band in SENSORS[key].band_names if band in sensor["bands"]]
        spec = modality_spec(key, patch_size=1, bands=bands)
        spec.pop("target_groups")
    return {**spec, "mean": [0.0] * len(spec["bands"]), "std": [1.0] * len(spec["bands"])}


def main(args: argparse.Namespace) -> None:
    moments: dict[str, Moments] = {}
    for source in args.shards:
        specs = {}
        for name, sensor in read_schema(source, args.split).modalities.items():
            spec = specification(name, sensor, args.own)
            if spec is None:
                print(f"{source}: `{name}` is no registered sensor: describe it with --own.", file=sys.stderr)
            elif not args.modalities or name in args.modalities:
                specs[name] = spec
        if not specs:
            continue
        collate = MapexCollator(MapexImageProcessor(specs, do_normalize=False))
        for sample in tqdm(stream_shards(source, args.split, modalities=list(specs)), desc=source, unit=" samples"):
            try:
                features = collate([sample])
            except NoValidPixelError:
                continue
            for name, pixels in features["pixel_values"].items():
                key = sample["sensors"][name].get("sensor", name)
                valid = features["valid_mask"][name][0]
                moments.setdefault(key, Moments()).add(specs[name]["bands"], pixels[0], valid)
                if key == "dem":
                    slope = terrain_slope(torch.where(valid, pixels[0], torch.nan), sample["gsd"][name])
                    moments.setdefault("slope", Moments()).add(["slope"], slope, slope[0].isfinite())
    if not moments:
        sys.exit("No modality of these shards is a registered sensor, or chosen by --modalities.")

    results = {}
    for key, entry in moments.items():
        results[key] = entry.result(LEAST_DEVIATION.get(SENSORS[key].unit if key in SENSORS else "", 0.0))
    print(f"{'sensor':12}{'band':22}{'mean':>12}{'std':>12}{'pixels':>14}")
    for key, bands in results.items():
        for band, row in bands.items():
            print(f"{key:12}{band:22}{row['mean']:12.5g}{row['std']:12.5g}{row['pixels']:14,}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="Folders of shards, or data set ids on the Hub.")
    parser.add_argument("--split", default="train", help="Split to read.")
    parser.add_argument("--modalities", nargs="*", help="Only these modalities of the shards.")
    parser.add_argument("--own", type=json.loads, default={}, help="JSON that describes sensors of your own.")
    parser.add_argument("--json", help="File to write the numbers to.")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; nothing was written.")
