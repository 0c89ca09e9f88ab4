"""Maps in windows: each place is what the windows over it say, whatever else there is."""

import pytest
import torch
from conftest import MODALITIES, randomize, tiny_config

from modeling_mapex import MapexForPixelRegression, MapexForSemanticSegmentation
from modeling_mapex.windows_mapex import predict_in_windows


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
    model.config.dense_window_size = 16  # what a model was trained on is what it predicts in
    torch.testing.assert_close(model.predict_map(pixels), model.predict_map(pixels, window_size=16))
    assert (model.predict_map(pixels) - expected).abs().max() > 1e-3


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
    fine = model.predict_map(pixels, window_size=16)
    odd = model.predict_map(pixels, window_size=16, output_size=(33, 41))
    expected = torch.nn.functional.interpolate(fine, size=(33, 41), mode="bilinear", align_corners=False)
    torch.testing.assert_close(odd, expected, rtol=1e-4, atol=1e-4)


def test_rounded_up_to_whole_patches():
    """Of 4 pixels of radar, and of 2 of height."""
    model, pixels = tiny_model(), scene()
    torch.testing.assert_close(
        model.predict_map(pixels, window_size=13, stride=8), model.predict_map(pixels, window_size=16, stride=8)
    )


def test_resolution_and_absence_follow_the_sample():
    model, pixels = tiny_model(), scene()
    gsd = {"radar": 10.0, "height": torch.tensor([20.0, 26.0])}
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
    with pytest.raises(ValueError, match="nothing to predict from"):
        model.predict_map(pixels, valid_mask={"radar": torch.zeros_like(valid)}, window_size=16)


def test_wrong_inputs():
    model, pixels = tiny_model(), scene()
    for name in ("window_size", "stride", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            predict_in_windows(model, pixels, **{"window_size": 16, name: 0})
    with pytest.raises(ValueError, match="`radar` needs 2 channels"):
        model.predict_map({"radar": torch.randn(1, 3, 32, 32)})
