"""Augmentation: layers of different resolution stay on the same ground, and the generator decides everything."""

import numpy as np
import pytest
import torch

from modeling_mapex.augmentation_mapex import drop_bands, drop_modalities, random_crop, random_flip


def ground(size: int, metres: int) -> np.ndarray:
    """Pixels that say where their upper left corner lies, in metres down and right."""
    positions = np.arange(size) * metres
    return np.stack(np.meshgrid(positions, positions, indexing="ij")).astype(np.int32)


def sample() -> dict:
    fine = ground(24, 10)
    return {
        "id": "a",
        "images": {"s2": fine, "dem": ground(8, 30), "s1": None},
        "labels": {"mask": fine[0] * 1000 + fine[1], "crop": 1, "cover": [0, 1]},
        "gsd": {"s2": 10.0, "dem": 30.0, "s1": None},
        "crs": {},
        "transform": {},
    }


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_crop_cuts_the_same_ground(seed):
    whole = sample()
    cut = random_crop(whole, 12, generator(seed))
    fine, coarse = cut["images"]["s2"], cut["images"]["dem"]
    assert fine.shape == (2, 12, 12) and coarse.shape == (2, 4, 4) and cut["images"]["s1"] is None
    assert np.array_equal(fine[:, ::3, ::3], coarse), "corners of the coarse pixels lie at every third fine one"
    assert np.array_equal(cut["labels"]["mask"], fine[0] * 1000 + fine[1])
    assert (cut["labels"]["crop"], cut["labels"]["cover"]) == (1, [0, 1])
    assert whole["images"]["s2"].shape == (2, 24, 24) and "crs" not in cut
    again = random_crop(whole, 12, generator(seed))
    assert np.array_equal(again["images"]["s2"], fine)


def test_crops_reach_everywhere():
    corners = {tuple(random_crop(sample(), 18, generator(seed))["images"]["dem"][:, 0, 0]) for seed in range(200)}
    assert corners == {(30 * row, 30 * column) for row in range(3) for column in range(3)}


@pytest.mark.parametrize("size", [0, 13, 27])
def test_crop_refuses(size):
    with pytest.raises(ValueError, match=rf"Cannot cut {size} pixels .* Choose a multiple of 3 up to 24"):
        random_crop(sample(), size, generator(0))


def test_flips_turn_all_layers_alike():
    seen = set()
    for seed in range(60):
        turned = random_flip(sample(), generator(seed))
        fine, coarse = turned["images"]["s2"], turned["images"]["dem"]
        # Mean position of the fine pixels in a coarse one, against that of the coarse one's centre.
        means = fine.reshape(2, 8, 3, 8, 3).mean(axis=(2, 4))
        assert np.array_equal(means, coarse + 10)
        assert np.array_equal(turned["labels"]["mask"], fine[0] * 1000 + fine[1])
        seen.add(tuple(coarse[:, 0, 0]) + tuple(coarse[:, 0, -1]))
    assert len(seen) == 8


def test_flips_keep_the_shape_of_oblong_layers():
    oblong = {"id": "a", "images": {"s2": np.arange(24).reshape(1, 4, 6)}, "labels": {}}
    for seed in range(20):
        assert random_flip(oblong, generator(seed))["images"]["s2"].shape == (1, 4, 6)


def test_modality_dropout():
    kept = [
        tuple(
            name
            for name, pixels in drop_modalities(sample(), 0.5, generator(seed))["images"].items()
            if pixels is not None
        )
        for seed in range(400)
    ]
    share = {names: kept.count(names) / 400 for names in set(kept)}
    # Each goes with probability 1/2; of the quarter in which both would, half keeps each.
    assert set(share) == {("s2", "dem"), ("s2",), ("dem",)}
    assert abs(share["s2", "dem"] - 0.25) < 0.08 and abs(share["s2",] - 0.375) < 0.08
    assert drop_modalities(sample(), 0.0, generator(0))["images"].keys() == sample()["images"].keys()
    with pytest.raises(ValueError, match="between 0 and 1"):
        drop_modalities(sample(), 1.5, generator(0))


def test_band_dropout():
    pixels = torch.rand(200, 4, 3, 3) + 1
    draws = {"s2": torch.rand(200, 4, generator=generator(0))}
    dropped = drop_bands({"s2": pixels}, 0.25, draws)["s2"]
    kept = dropped.flatten(2).ne(0)
    assert (kept.all(dim=2) == kept.any(dim=2)).all(), "a band goes as a whole"
    kept = kept.any(dim=2)
    assert torch.equal(dropped[kept], pixels[kept]) and kept.any(dim=1).all()
    assert abs(kept.float().mean() - 0.75) < 0.06
    assert drop_bands({"s2": pixels}, 1.0, draws)["s2"].flatten(2).any(dim=2).sum(dim=1).tolist() == [1] * 200
