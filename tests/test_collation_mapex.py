"""The collator: what samples become in a batch depends on nothing but themselves, the seed and the epoch."""

from itertools import chain

import numpy as np
import pytest
import torch
from shard_samples import SCHEMA, items, make_sample, read

from modeling_mapex import MapexConfig, MapexForImageClassification, MapexForPreTraining, MapexImageProcessor
from modeling_mapex.augmentation_mapex import random_crop
from modeling_mapex.collation_mapex import MapexCollator


CONFIG = {
    "modalities": {
        "s1": {
            "bands": ["VV", "VH"],
            "gsd": 10.0,
            "patch_size": 4,
            "unit": "db",
            "mean": [-12.0, -19.0],
            "std": [5.0] * 2,
        },
        "s2": {
            "bands": ["B04", "B02"],
            "gsd": 10.0,
            "patch_size": 4,
            "unit": "reflectance",
            "nodata": [0.0],
            "mean": [0.2, 0.1],
            "std": [0.1, 0.2],
            "dn_scale": 1e-4,
            "dn_offset": 0.0,
        },
        "dem": {
            "bands": ["elevation"],
            "gsd": 30.0,
            "patch_size": 4,
            "unit": "metres",
            "mean": [400.0],
            "std": [300.0],
        },
    },
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 2,
}


@pytest.fixture(scope="module")
def processor():
    return MapexImageProcessor.from_config(MapexConfig(**CONFIG))


@pytest.fixture(scope="module")
def samples():
    return [SCHEMA.decode(SCHEMA.encode(make_sample(index))) for index in range(6)]


def test_batch_equals_its_samples(processor, samples):
    """Among samples that lack a modality, each is what it would be alone."""
    batch = MapexCollator(processor, label="crop")(samples)
    assert batch["modality_mask"]["s1"].tolist() == [True, True, False] * 2
    assert batch["labels"].tolist() == [0, 1, 2] * 2
    for index, sample in enumerate(samples):
        images = {name: pixels for name, pixels in sample["images"].items() if pixels is not None}
        alone = processor(images, bands={"s2": ["B02", "B03", "B04"]}, units={"s2": "dn"})
        for name, pixels in alone["pixel_values"].items():
            assert torch.equal(batch["pixel_values"][name][index], pixels[0])
        expected = (sample["images"]["s2"][[2, 0]] * 1e-4 - np.array([0.2, 0.1])[:, None, None]) / [[[0.1]], [[0.2]]]
        np.testing.assert_allclose(batch["pixel_values"]["s2"][index], expected, rtol=1e-4, atol=1e-5)
    assert batch["gsd"] == {"s1": 10.0, "s2": 10.0, "dem": 30.0}


@pytest.mark.parametrize(
    ("label", "dtype", "shape"),
    [
        ("crop", torch.int64, (3,)),
        ("cover", torch.float32, (3, 2)),
        ("flood", torch.int64, (3, 24, 24)),
        ("biomass", torch.float32, (3, 24, 24)),
    ],
)
def test_labels(processor, samples, label, dtype, shape):
    labels = MapexCollator(processor, label=label)(samples[:3])["labels"]
    assert labels.dtype == dtype and labels.shape == shape
    assert torch.equal(labels, torch.as_tensor(np.array([sample["labels"][label] for sample in samples[:3]])).to(dtype))


def test_missing_label(processor, samples):
    with pytest.raises(ValueError, match=r"`chip-3` has no label `flood`, only \['crop', 'cover', 'biomass'\]"):
        MapexCollator(processor, label="flood")(samples)


def test_random_part_depends_on_the_sample_only(processor, samples):
    options = {"crop_size": 12, "flip": True, "modality_dropout": 0.3, "label": "biomass"}
    collate = MapexCollator(processor, seed=1, **options)
    batch, backwards = collate(samples), collate(samples[::-1])
    for name, pixels in batch["pixel_values"].items():
        assert torch.equal(pixels, backwards["pixel_values"][name].flip(0))
    assert torch.equal(batch["labels"], backwards["labels"].flip(0)) and batch["labels"].shape == (6, 12, 12)
    assert batch["pixel_values"]["dem"].shape[2:] == (4, 4)
    same = collate(samples)
    collate.set_epoch(1)
    other = collate(samples)
    assert torch.equal(batch["labels"], same["labels"]) and not torch.equal(batch["labels"], other["labels"])
    assert not torch.equal(batch["labels"], MapexCollator(processor, seed=2, **options)(samples)["labels"])


class TestPixelsWithoutData:
    def sample(self, bare: int) -> dict:
        """Radar has nothing in the left `bare` columns, optical neither there nor in the upper rows; no elevation."""
        sample = SCHEMA.decode(SCHEMA.encode(make_sample(0)))
        radar, optical = (sample["images"][name].copy() for name in ("s1", "s2"))
        radar[:, :, :bare] = np.nan
        optical[:, :, :bare] = optical[:, :bare] = 0
        return {**sample, "images": {"s1": radar, "s2": optical, "dem": None}}

    @pytest.mark.parametrize("group", [False, True])
    def test_modality_is_absent_and_empty_crops_are_drawn_again(self, processor, group):
        collate = MapexCollator(processor, crop_size=12, group=group)
        sample, seen = self.sample(bare=13), set()
        whole = processor({"s2": sample["images"]["s2"]}, bands={"s2": ["B02", "B03", "B04"]}, units={"s2": "dn"})
        for epoch in range(60):
            collate.set_epoch(epoch)
            batch = collate([sample])
            (batch,) = batch["groups"] if group else [batch]
            seen.add(tuple(batch["pixel_values"]))
            for name, pixels in batch["pixel_values"].items():
                mask = batch.get("valid_mask", {}).get(name, torch.ones_like(pixels[:, 0], dtype=torch.bool))
                assert mask.any() and batch.get("modality_mask", {}).get(name, torch.ones(1)).all()
            if "s2" in batch["pixel_values"]:  # it is a part of the sample, with its gap
                windows = whole["pixel_values"]["s2"].unfold(2, 12, 1).unfold(3, 12, 1)  # (1, C, 13, 13, 12, 12)
                difference = windows - batch["pixel_values"]["s2"][:, :, None, None]
                assert difference.abs().amax(dim=(0, 1, 4, 5)).min() == 0
        assert seen == {("s1", "s2"), ("s1",)}

    def test_sample_without_data_is_named(self, processor):
        sample = self.sample(bare=24)
        collate = MapexCollator(processor, crop_size=12)
        with pytest.raises(ValueError, match=r"None of 20 crops of 12 pixels out of sample `chip-0` has one valid"):
            collate([sample])
        with pytest.raises(ValueError, match=r"Sample `chip-0` has not one valid pixel of any sensor. Leave it out"):
            MapexCollator(processor)([sample])

    def test_modality_without_data_is_absent_from_whole_samples(self, processor, samples):
        empty = {**samples[0], "images": {**samples[0]["images"], "s1": np.full((2, 24, 24), np.nan, dtype=np.float32)}}
        missing = {**samples[0], "images": {**samples[0]["images"], "s1": None}}
        collate = MapexCollator(processor)
        batch, expected = collate([empty, samples[1]]), collate([missing, samples[1]])
        assert batch["modality_mask"]["s1"].tolist() == [False, True]
        for name, pixels in batch["pixel_values"].items():
            assert torch.equal(pixels, expected["pixel_values"][name])

    @pytest.mark.parametrize("value", [-9999.0, -999.9, 1e20, float(np.finfo(np.float32).min)])
    def test_nodata_in_the_precision_of_the_pixels(self, processor, samples, value):
        radar = np.full((2, 24, 24), value, dtype=np.float32)
        sensors = {**samples[0]["sensors"], "s1": {**samples[0]["sensors"]["s1"], "nodata": value}}
        empty = {**samples[0], "sensors": sensors, "images": {**samples[0]["images"], "s1": radar}}
        assert "s1" not in MapexCollator(processor)([empty])["pixel_values"]

    def test_crops_of_whole_samples_are_as_ever(self, processor, samples):
        """The look for data draws nothing: a crop is that of `random_crop` by the same seed."""
        collate = MapexCollator(processor, crop_size=12, label="biomass", seed=3)
        for sample in samples:
            crop = random_crop(sample, 12, collate._generator(sample["id"]))
            assert np.array_equal(collate([sample])["labels"][0].numpy(), crop["labels"]["biomass"])


def test_dropped_bands_depend_on_sample_and_epoch_only(processor, samples):
    """Whatever else is in the batch; and by the epoch of its own stream, which a mixture gives it."""

    def dropped(batch: list, epoch: int) -> list[tuple]:
        collate = MapexCollator(processor, band_dropout=0.5)
        pixels = collate([{**sample, "epoch": epoch} for sample in batch])["pixel_values"]["s2"]
        return [tuple(bands) for bands in pixels.flatten(2).any(dim=2).tolist()]

    seen = set()
    for epoch in range(8):
        together, backwards = dropped(samples, epoch), dropped(samples[::-1], epoch)
        assert together == backwards[::-1]
        assert together[0] == dropped(samples[:1], epoch)[0]
        seen.add(together[0])
    assert len(seen) > 1


def test_epoch_reaches_running_workers(processor):
    pytest.importorskip("datasets", reason="the extra `data`")
    collate = MapexCollator(processor, crop_size=12, label="biomass")
    rows = [SCHEMA.decode(SCHEMA.encode(make_sample(index))) for index in range(8)]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=4, collate_fn=collate, num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    first = torch.cat([batch["labels"] for batch in loader])
    again = torch.cat([batch["labels"] for batch in loader])
    collate.set_epoch(1)
    second = torch.cat([batch["labels"] for batch in loader])
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_data_sets_with_other_bands_and_units_in_one_batch(processor, samples):
    reflectance = {
        "bands": ["B04", "B02"],
        "unit": "reflectance",
        "gsd": 10.0,
        "dtype": "float32",
    }
    other = {
        "id": "other",
        "images": {"s2": samples[0]["images"]["s2"][[2, 0]].astype(np.float32) * np.float32(1e-4)},
        "sensors": {"s2": reflectance},
        "gsd": {"s2": 10.0},
        "labels": {},
    }
    batch = MapexCollator(processor)([samples[2], other, samples[0]])
    assert batch["modality_mask"]["dem"].tolist() == [True, False, True]
    assert batch["modality_mask"]["s1"].tolist() == [False, False, True]
    torch.testing.assert_close(batch["pixel_values"]["s2"][1], batch["pixel_values"]["s2"][2])
    other["gsd"] = {"s2": 20.0}
    assert MapexCollator(processor)([samples[2], other])["gsd"]["s2"].tolist() == [10.0, 20.0]
    other["images"]["s2"] = other["images"]["s2"][:, :12]
    with pytest.raises(ValueError, match=r"`s2` comes with \(24, 24\) and with \(12, 24\) pixels.*set `crop_size`"):
        MapexCollator(processor)([samples[2], other])


def test_unknown_modality(samples):
    config = MapexConfig(**{**CONFIG, "modalities": {"s1": CONFIG["modalities"]["s1"]}})
    with pytest.raises(ValueError, match="Unknown modality `s2`"):
        MapexCollator(MapexImageProcessor.from_config(config))(samples)


def test_a_model_trains_on_shards(processor, tmp_path):
    """From shards to a step of pretraining and of `Trainer`, with missing modalities and every kind of dropout."""
    pytest.importorskip("datasets", reason="shards need the extra `data`")
    pytest.importorskip("accelerate", reason="Trainer needs the extra `train`")
    from transformers import Trainer, TrainingArguments

    from modeling_mapex.data_mapex import load_shards, stream_shards
    from modeling_mapex.writing_mapex import write_shards

    write_shards(items(10), read, SCHEMA, tmp_path / "shards", progress=False)
    stream = stream_shards(tmp_path / "shards", seed=0)
    options = {"crop_size": 12, "flip": True, "modality_dropout": 0.2, "band_dropout": 0.2}
    loader = torch.utils.data.DataLoader(stream, batch_size=4, collate_fn=MapexCollator(processor, **options))
    model = MapexForPreTraining(MapexConfig(**CONFIG))
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite()

    classifier = MapexForImageClassification(MapexConfig(**CONFIG, num_labels=3))
    args = TrainingArguments(tmp_path / "out", max_steps=3, remove_unused_columns=False, report_to=[], use_cpu=True)
    dataset = load_shards(tmp_path / "shards", labels=["crop"], cache_dir=tmp_path / "cache")
    collate = MapexCollator(processor, label="crop", **options)
    trainer = Trainer(classifier, args, train_dataset=dataset, eval_dataset=dataset, data_collator=collate)
    before = classifier.classifier.weight.clone()
    trainer.train()
    assert not torch.equal(before, classifier.classifier.weight)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_every_sample_once_through_a_loader(processor, tmp_path):
    pytest.importorskip("datasets", reason="shards need the extra `data`")
    from modeling_mapex.data_mapex import stream_shards
    from modeling_mapex.writing_mapex import write_shards

    write_shards(items(10), read, SCHEMA, tmp_path, progress=False)
    collate = MapexCollator(processor, label="crop")
    loader = torch.utils.data.DataLoader(stream_shards(tmp_path), batch_size=3, collate_fn=collate)
    assert list(chain.from_iterable(batch["labels"].tolist() for batch in loader)) == [i % 3 for i in range(10)]


def test_groups(processor, samples):
    """Samples of the same modalities and sizes together, each as it is alone; small ones stay whole."""
    small = {"s1": None, "s2": samples[0]["images"]["s2"][:, :16, :16], "dem": None}
    samples = [*samples, {**samples[0], "images": small, "labels": {}}]
    collator = MapexCollator(processor, crop_size=24, flip=True, group=True)
    groups = collator(samples)["groups"]
    shapes = [{name: tuple(pixels.shape[2:]) for name, pixels in group["pixel_values"].items()} for group in groups]
    assert {"s2": (16, 16)} in shapes and all("modality_mask" not in group for group in groups)
    count = 0
    for group in groups:
        pixels = group["pixel_values"]
        rows = len(next(iter(pixels.values())))
        members = [s for s in samples if {n for n, image in s["images"].items() if image is not None} == set(pixels)]
        members = [
            s for s in members if len(s["images"]["s2"][0]) == {(16, 16): 16}.get(tuple(pixels["s2"].shape[2:]), 24)
        ]
        assert len(members) == rows
        for row, sample in enumerate(members):
            single = collator([sample])["groups"][0]
            assert all(torch.equal(single["pixel_values"][name][0], pixels[name][row]) for name in pixels)
        count += rows
    assert count == len(samples)
    with pytest.raises(ValueError, match="leave out `label`"):
        MapexCollator(processor, group=True, label="crop")


def test_the_epoch_of_a_sample_counts(processor, samples):
    collator = MapexCollator(processor, crop_size=12, flip=True)
    first, again, later = (collator([{**samples[0], "epoch": epoch}])["pixel_values"]["s2"] for epoch in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)


class TestLabelValues:
    def test_codes_become_classes(self, processor, samples):
        """-1 does not count, dry and wet change places."""
        collate = MapexCollator(processor, label="flood", label_codes={-1: None, 0: 1, 1: 0}, ignore_index=9)
        labels = collate(samples[:3])["labels"]
        stored = torch.as_tensor(np.stack([sample["labels"]["flood"] for sample in samples[:3]])).long()
        assert torch.equal(labels, torch.where(stored == -1, 9, 1 - stored))

    def test_unknown_code(self, processor, samples):
        collate = MapexCollator(processor, label="flood", label_codes={0: 0, 1: 1})
        with pytest.raises(ValueError, match=r"chip-0. holds \[-1\]"):
            collate(samples[:3])

    def test_nodata_becomes_nan(self, processor, samples):
        stored = np.stack([sample["labels"]["biomass"] for sample in samples[:2]])
        labels = MapexCollator(processor, label="biomass", label_nodata=float(stored[1, 3, 4]))(samples[:2])["labels"]
        assert labels.dtype == torch.float32
        assert torch.isnan(labels).nonzero().tolist() == [[1, 3, 4]]
        assert np.array_equal(np.delete(labels.numpy(), 24 * 24 + 3 * 24 + 4), np.delete(stored, 24 * 24 + 3 * 24 + 4))
        whole = {**samples[0], "labels": {"biomass": np.array([[-1, 7]], dtype=np.int16)}}
        labels = MapexCollator(processor, label="biomass", label_nodata=-1)([whole])["labels"]
        assert labels.dtype == torch.float32 and labels.isnan().tolist() == [[[True, False]]] and labels[0, 0, 1] == 7
