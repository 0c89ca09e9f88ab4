"""docs/tutorial.md runs as it is written: from GeoTIFFs to a model on a Hub, and from there without the package."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from interpreters import run_python
from test_readme import SHAPE, blocks


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()


def write_floods(folder: Path, rasterio) -> None:
    """Sixteen places with a dark lake each: water is what scatters little."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    for name in ("s1", "mask"):
        (folder / name).mkdir(parents=True)
    for index in range(16):
        center, radius = generator.uniform(10, 54, 2), generator.uniform(10, 22)
        water = np.hypot(rows - center[0], columns - center[1]) < radius
        level = np.where(water, -22.0, -10.0)
        radar = np.stack([level, level - 7.0]) + generator.normal(0, 1.5, (2, 64, 64))
        mask = water.astype(np.int16)
        mask[:2] = -1
        transform = rasterio.transform.from_origin(500_000 + 640 * index, 5_000_000, 10, 10)
        for name, pixels in (("s1", radar.astype(np.float32)), ("mask", mask[None])):
            profile = {"count": len(pixels), "height": 64, "width": 64, "dtype": pixels.dtype, "transform": transform}
            with rasterio.open(folder / name / f"place{index}.tif", "w", crs="EPSG:32633", **profile) as raster:
                raster.write(pixels)


def test_from_geotiffs_to_the_hub_and_back(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="conversion needs the extra `data`")
    pytest.importorskip("datasets", reason="shards need the extra `data`")
    pytest.importorskip("accelerate", reason="fine-tuning needs the extra `train`")
    pytest.importorskip("matplotlib", reason="pictures need the extra `viz`")
    work = tmp_path / "work"
    write_floods(work / "flood", rasterio)
    for folder in ("conversion", "examples"):
        (work / folder).symlink_to(ROOT / folder)  # a reader sits in the repository
    (work / "flood.yaml").write_text(blocks(TEXT, "yaml")[0])
    lines = "\n".join(blocks(TEXT, "bash")).replace("\\\n", " ").splitlines()
    install, *commands = [line for line in lines if line]
    assert install.startswith("pip install") and len(commands) == 3
    with HubServer(tmp_path / "server") as hub:
        environment = {**hub.environment(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for command in commands:
            python, *words = shlex.split(command)
            assert python == "python"
            result = subprocess.run(
                [sys.executable, *words], cwd=work, env=environment, capture_output=True, text=True, timeout=400
            )
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        for name in ("results.json", "predictions.png", "confusion.png", "model/README.md"):
            assert (work / "outputs" / "flood" / name).stat().st_size > 500, name
        results = json.loads((work / "outputs" / "flood" / "results.json").read_text())
        assert results["metrics"]["mean_iou"] > 0.8
        card = hub.read("me/mapex-nano-s1-flood", "README.md").decode()
        assert "mean_iou" in card and "image-segmentation" in card

        (snippet,) = blocks(TEXT)
        (shape,) = SHAPE.finditer(snippet)
        check = f"\nassert tuple({shape['expression']}) == {shape['shape']}\nassert not water.any()\n"
        reader = tmp_path / "reader"
        reader.mkdir()
        run_python(snippet + check, reader, hub.environment(tmp_path / "home-2", token=None), package=False)
