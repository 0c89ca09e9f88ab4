"""The README's main command on its real patches, with a model of random weights; and the pictures."""

import pytest
import torch
from conftest import randomize, tiny_config, tiny_inputs

from modeling_mapex import MapexConfig, MapexForPreTraining, MapexModel
from modeling_mapex.visualization_mapex import display_bands, plot_reconstruction, plot_routing


pytest.importorskip("matplotlib", reason="pictures need the extra `viz`")


@pytest.fixture(scope="module")
def quickstart():
    pytest.importorskip("rasterio", reason="the quickstart needs the extra `demo`")
    import quickstart

    return quickstart


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of the sensors of the patches, calibrated, in files by modality."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "decoder_hidden_size": 32}
    config = MapexConfig.from_preset("nano", modalities={"s1": None, "s2": ["B04", "B05"], "dem": None}, **sizes)
    model = randomize(MapexForPreTraining(config))
    pixels = {name: torch.randn(2, len(spec["bands"]), 16, 16) for name, spec in config.modalities.items()}
    model.calibrate_experts([{"pixel_values": pixels}])
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, shard_by_modality=True)
    return folder


@pytest.mark.parametrize("name", ["s1", "s2"])
def test_runs(quickstart, checkpoint, tmp_path, capsys, name):
    pytest.importorskip("bigearthnet_common", reason="the quickstart needs the extra `demo`")
    options = {"model": str(checkpoint), "prune_for": name, "experts_per_layer": 1}
    quickstart.main(quickstart.Arguments(output_dir=str(tmp_path), **options))
    printed = capsys.readouterr().out
    assert f"6 BigEarthNet patches of 1.2 km, {name}: (6, 2, 120, 120)" in printed
    for row in ("modalities", "encoder parameters", "weights on disk", "ms per chip", f"error of hidden {name}"):
        assert row in printed
    assert "differ from the model in memory by at most 0.0e+00" in printed
    small = MapexModel.from_pretrained(tmp_path / f"mapex-nano-{name}")
    assert list(small.config.modalities) == [name] and small.config.num_layer_experts == [1] * 4
    for picture in ("reconstruction.png", "routing.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_refuses_bad_options_and_files(quickstart, checkpoint, tmp_path):
    def run(**options):
        quickstart.main(quickstart.Arguments(**{"output_dir": str(tmp_path), "model": str(checkpoint), **options}))

    with pytest.raises(SystemExit, match="--prune_for must be one of"):
        run(prune_for="s3")
    with pytest.raises(SystemExit, match="--patch must be below 6"):
        run(patch=6)
    with pytest.raises(SystemExit, match=r"Cannot load .*nowhere"):
        run(model=str(tmp_path / "nowhere"))
    MapexForPreTraining.from_pretrained(checkpoint, modalities=["s1"]).save_pretrained(tmp_path / "pruned")
    with pytest.raises(
        SystemExit, match=r"pruned has no \['s2'\], which the patches have: give a --model that was not"
    ):
        run(model=str(tmp_path / "pruned"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="Choose another place with --output_dir"):
        run(output_dir=str(tmp_path / "file"))
    pairs = quickstart.extract_patches(tmp_path)
    broken = next(pairs[0][0].glob("*_VV.tif"))
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(SystemExit, match=r"Cannot read .*_VV\.tif"):
        quickstart.read_patch(pairs[0][0], ["VV"])


def test_patches_are_read_as_they_are(quickstart, tmp_path):
    """Bands of 10 m pixel by pixel, bands of 20 m resampled to the same grid."""
    import rasterio

    s1, s2 = quickstart.extract_patches(tmp_path)[0]
    patch = quickstart.read_patch(s2, ["B04", "B05"])
    with rasterio.open(s2 / f"{s2.name}_B04.tif") as raster:
        assert (patch[0] == raster.read(1)).all()
    with rasterio.open(s2 / f"{s2.name}_B05.tif") as raster:
        assert abs(patch[1].mean() - raster.read(1).mean()) < 2.0
    assert quickstart.read_patch(s1, ["VV", "VH"]).shape == (2, 120, 120)


def test_plots_name_what_they_show():
    model = randomize(MapexForPreTraining(tiny_config()))
    pixel_values = tiny_inputs()
    outputs = model(pixel_values)
    figure = plot_reconstruction(
        model.config, pixel_values, model.reconstruct(pixel_values, outputs), outputs.hidden_patches, sample=1
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 9 and titles[0] == "height: elevation"
    shown = int((~outputs.hidden_patches["optical"][1]).sum())
    assert titles[4] == f"visible: {shown} of 24 patches"

    statistics = model.calibrate_experts([{"pixel_values": pixel_values}])
    figure = plot_routing(statistics, model.config.moe_layers, kept=[[0], [1, 2]], criterion="usage")
    panels = [axis for axis in figure.axes if axis.get_title().startswith("block")]
    assert [axis.get_title() for axis in panels] == ["block 1", "block 3"]
    share = torch.tensor(statistics["optical"]["usage"][0])
    cells = [text.get_text() for text in panels[0].texts[4:8]]
    assert cells == [f"{value:.0f}" for value in (100 * share / share.sum()).tolist()]
    assert [len(axis.patches) for axis in panels] == [1, 2]


def test_display_bands():
    assert display_bands("s2", ["B02", "B03", "B04", "B08"]) == [2, 1, 0]
    assert display_bands("s2", ["B08", "B11"]) == [0]
    assert display_bands("my_sensor", ["a", "b"]) == [0]
