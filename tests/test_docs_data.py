"""docs/data.md does what it says: its commands convert a made-up campaign, its snippets read it, its table is true."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_readme import SHAPE, blocks

from modeling_mapex import SENSORS


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "data.md").read_text()


def write_campaign(folder: Path, rasterio) -> None:
    """Six places, the third without an optical image."""
    generator = np.random.default_rng(0)
    layers = {
        "s1": lambda: generator.normal(-14, 4, (2, 48, 48)).astype(np.float32),
        "s2": lambda: generator.integers(100, 4000, (4, 48, 48), dtype=np.uint16),
        "flood": lambda: generator.integers(-1, 2, (1, 48, 48), dtype=np.int16),
    }
    for name, draw in layers.items():
        (folder / name).mkdir(parents=True)
        for index in range(6):
            if (name, index) == ("s2", 2):
                continue
            pixels = draw()
            transform = rasterio.transform.from_origin(500_000 + 480 * index, 5_000_000, 10, 10)
            profile = {"count": len(pixels), "height": 48, "width": 48, "dtype": pixels.dtype, "transform": transform}
            with rasterio.open(folder / name / f"place{index}.tif", "w", crs="EPSG:32633", **profile) as raster:
                raster.write(pixels)


def test_from_a_folder_of_geotiffs_to_a_batch(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio", reason="conversion needs the extra `data`")
    pytest.importorskip("datasets", reason="shards need the extra `data`")
    pytest.importorskip("matplotlib", reason="the sheet needs the extra `viz`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_campaign(tmp_path / "campaign", rasterio)
    (tmp_path / "campaign.yaml").write_text(blocks(TEXT, "yaml")[0])
    for command in blocks(TEXT, "bash")[0].strip().splitlines():
        python, script, *options = shlex.split(command)
        assert python == "python"
        result = subprocess.run([sys.executable, ROOT / script, *options], capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr[-2000:]
    assert "s2                     5       1  dn" in result.stdout and "valid: every row" in result.stdout
    assert (tmp_path / "chips.png").read_bytes().startswith(b"\x89PNG")

    names: dict = {}
    checked = 0
    for snippet in blocks(TEXT, "python"):
        exec(compile(snippet, "docs/data.md", "exec"), names)
        for found in SHAPE.finditer(snippet):
            assert tuple(eval(found["expression"], names)) == eval(found["shape"]), found[0]
            checked += 1
    assert checked == 3
    assert (names["sample"]["crs"]["s1"], names["sample"]["gsd"]["s1"]) == ("EPSG:32633", 10.0)
    assert names["features"]["gsd"] == {"s2": 9.375}
    assert len(names["dataset"]) == 6


def test_sensor_table_is_the_registry():
    for name, sensor in SENSORS.items():
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:5] == [sensor.title, " ".join(sensor.band_names), sensor.unit, f"{sensor.gsd:g}"]
        assert cells[7] == sensor.statistics


def test_scripts_and_pictures_exist():
    for script in re.findall(r"`(convert_\w+\.py|compute_statistics\.py)`", TEXT):
        assert (ROOT / "conversion" / script).exists(), script
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
