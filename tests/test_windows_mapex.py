"""Maps in windows: each place is what the windows over it say, whatever else there is."""

import pytest
import torch
from conftest import MODALITIES, randomize, tiny_config

from modeling_mapex import MapexForPixelRegression, MapexForSemanticSegmentation
from modeling_mapex.windows_mapex import _spans, predict_in_windows


def tiny_model(model_class=MapexForSemanticSegmentation, **overrides):
    return randomize(model_class(tiny_config(num_labels=3, **overrides))).eval()


def scene(height=32, width=48, batch_size=2):
    """`radar` of 10 m and `height` of 20 m over the same ground."""
    sizes = {"radar": (height, width), "height": (height // 2, width // 2)}
    return {name: torch.randn(batch_size, len(MODALITIES[name]["bands"]), *size) for name, size in sizes.items()}


def window(values, top, left, size):
    """Of the ground that `size` pixels of radar cover."""
    scales = {"radar": 1, "height": 2}
    return {
        name: value[
            ...,
            top // scales[name] : (top + size) // scales[name],
            left // scales[name] : (left + size) // scales[name],
        ]
        for name, value in values.items()
    }


@pytest.mark.parametrize("model_class", [MapexForSemanticSegmentation, MapexForPixelRegression])
def test_mean_of_the_windows_over_a_place(model_class):
    model, pixels = tiny_model(model_class), scene()
    result = model.predict_map(pixels, window_size=16, stride=8, batch_size=5)
    total, count = torch.zeros_like(result), torch.zeros(32, 48)
    for top in range(0, 17, 8):
        for left in range(0, 33, 8):
            with torch.no_grad():
                total[..., top : top + 16, left : left + 16] += model(window(pixels, top, left, 16)).logits
            count[top : top + 16, left : left + 16] += 1
    torch.testing.assert_close(result, total / count, rtol=1e-4, atol=1e-4)


def test_one_window_is_the_model_itself():
    model, pixels = tiny_model(), scene()
    with torch.no_grad():
        expected = model(pixels).logits
    torch.testing.assert_close(model.predict_map(pixels), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.predict_map(pixels, window_size=100), expected, rtol=1e-4, atol=1e-4)
    model.config.dense_window_metres = 160  # what a model was trained on is what it predicts in
    torch.testing.assert_close(model.predict_map(pixels), model.predict_map(pixels, window_size=16))
    assert (model.predict_map(pixels) - expected).abs().max() > 1e-3
    coarse = {"height": pixels["height"]}  # of 20 m
    torch.testing.assert_close(model.predict_map(coarse), model.predict_map(coarse, window_size=8))


def test_without_dropout_and_as_it_was():
    model, pixels = tiny_model(hidden_dropout_prob=0.5), scene()
    expected = model.predict_map(pixels, window_size=16)
    model.train()
    torch.testing.assert_close(model.predict_map(pixels, window_size=16), expected)
    assert model.training


def test_size_of_the_map_and_last_windows():
    """Labels of 20 m or 5 m; a side that no whole number of strides fits."""
    model, pixels = tiny_model(), scene(32, 40)
    for size in ((16, 20), (64, 80)):
        result = model.predict_map(pixels, window_size=16, output_size=size)
        corner = window(pixels, 0, 0, 16)
        with torch.no_grad():
            expected = model(corner, output_size=(size[0] // 2, size[0] // 2)).logits
        assert result.shape == (2, 3, *size)
        part = size[0] // 4  # that no other window covers
        torch.testing.assert_close(result[..., :part, :part], expected[..., :part, :part], rtol=1e-4, atol=1e-4)
    odd = model.predict_map(pixels, window_size=16, output_size=(33, 41))
    with torch.no_grad():
        expected = model(window(pixels, 0, 0, 16), output_size=(17, 17)).logits
    torch.testing.assert_close(odd[..., :8, :8], expected[..., :8, :8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", range(17, 96, 3))
def test_windows_side_by_side_leave_no_gap_in_a_map_of_any_size(side):
    spans = _spans({"s1": 64}, "s1", {"s1": 8}, side, 16, 16)
    covered = {pixel for part in spans for pixel in range(part[None].start, part[None].stop)}
    assert covered == set(range(side)) and len({part[None].stop - part[None].start for part in spans}) == 1


@pytest.mark.parametrize("rows", [33, 34, 35])
def test_pixels_that_begin_at_different_places(rows):
    """100 rows of radar, 33 to 35 of a height of the same ground: windows of 24 and 8, each begun at the nearest."""
    model = tiny_model(modalities={**MODALITIES, "height": {**MODALITIES["height"], "patch_size": 1}})
    pixels = {"radar": torch.randn(1, 2, 100, 24), "height": torch.randn(1, 1, rows, 8)}
    gsd = {"radar": 10.0, "height": 1000.0 / rows}
    result = model.predict_map(pixels, gsd=gsd, window_size=24, stride=24, output_size=(100, 24))
    count, total = torch.zeros(100, 1), torch.zeros_like(result)
    for top in (0, 24, 48, 72, 76):
        start = min(round(top * rows / 100), rows - 8)
        part = {"radar": pixels["radar"][:, :, top : top + 24], "height": pixels["height"][:, :, start : start + 8]}
        with torch.no_grad():
            total[..., top : top + 24, :] += model(part, gsd=gsd, output_size=(24, 24)).logits
        count[top : top + 24] += 1
    torch.testing.assert_close(result, total / count, rtol=1e-4, atol=1e-4)


def test_a_tile_and_its_elevations_are_not_read_at_once():
    """As the processor makes whole patches of a Sentinel-2 tile, and of 30 m beside it."""
    sides = {"s2": 10984, "dem": 3664}
    spans = _spans(sides, "s2", {"s2": 8, "dem": 8}, 10980, 96, None)
    assert {(part["s2"].stop - part["s2"].start, part["dem"].stop - part["dem"].start) for part in spans} == {(96, 32)}
    farthest = max(abs(part["dem"].start * 10984 / 3664 - part["s2"].start) for part in spans)
    assert farthest <= 1.5 + 1  # half a pixel of 30 m; the last window ends where the image does
    assert spans[0][None].start == 0 and spans[-1][None].stop == 10980 and len(spans) == 228


def test_rounded_up_to_whole_patches():
    """Of 4 pixels of radar, and of 2 of height."""
    model, pixels = tiny_model(), scene()
    torch.testing.assert_close(
        model.predict_map(pixels, window_size=13, stride=8), model.predict_map(pixels, window_size=16, stride=8)
    )


def test_resolution_and_absence_follow_the_sample():
    model, pixels = tiny_model(), scene()
    gsd = {"radar": 10.0, "height": torch.tensor([20.0, 20.5])}
    mask = {"height": torch.tensor([True, False])}
    together = model.predict_map(pixels, mask, gsd=gsd, window_size=16)
    for sample in range(2):
        alone = {name: values[sample : sample + 1] for name, values in pixels.items() if sample == 0 or name == "radar"}
        options = {"gsd": {"height": gsd["height"][:1]}} if sample == 0 else {}
        expected = model.predict_map(alone, window_size=16, **options)
        torch.testing.assert_close(together[sample : sample + 1], expected, rtol=1e-4, atol=1e-4)


def test_no_data_is_not_predicted():
    model, pixels = tiny_model(), {"radar": torch.randn(1, 2, 32, 48)}
    valid = torch.ones(1, 32, 48, dtype=torch.bool)
    valid[:, :, 16:] = False
    pixels["radar"][:, :, :, 16:] = torch.nan
    result = model.predict_map(pixels, valid_mask={"radar": valid}, window_size=16)
    assert torch.isfinite(result[..., :24]).all() and torch.isnan(result[..., 24:]).all()
    with pytest.raises(ValueError, match="Sample 0 of the batch has no modality and no valid pixel"):
        model.predict_map(pixels, valid_mask={"radar": torch.zeros_like(valid)}, window_size=16)


def test_wrong_inputs():
    model, pixels = tiny_model(), scene()
    for name in ("window_size", "stride", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            predict_in_windows(model, pixels, **{"window_size": 16, name: 0})
    with pytest.raises(ValueError, match=r"`stride` \(17\) must not be larger than `window_size` \(16\)"):
        model.predict_map(pixels, window_size=16, stride=17)
    with pytest.raises(ValueError, match="must cover the same ground"):
        model.predict_map({"radar": torch.randn(1, 2, 32, 32), "height": torch.randn(1, 1, 24, 24)}, window_size=16)
    with pytest.raises(ValueError, match="`radar` needs 2 channels"):
        model.predict_map({"radar": torch.randn(1, 3, 32, 32)})
