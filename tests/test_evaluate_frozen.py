"""examples/evaluate_frozen.py: embeddings are those of the model, and the numbers those of scikit-learn."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from hub_server import HubServer


pytest.importorskip("sklearn", reason="the probes need the extra `evaluate`")
pytest.importorskip("datasets", reason="shards need the extra `data`")

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import HfArgumentParser

from modeling_mapex import MapexConfig, MapexForPreTraining, MapexImageProcessor, MapexModel, writing_mapex
from modeling_mapex.data_mapex import split_of_place, stream_shards
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item, write_shards


SCRIPT = Path(__file__).parent.parent / "examples" / "evaluate_frozen.py"

import evaluate_frozen  # noqa: E402
import finetuning_data  # noqa: E402
import finetuning_options  # noqa: E402
import frozen_features  # noqa: E402
import probes  # noqa: E402
from command_line import Stop  # noqa: E402
from frozen_features import Features  # noqa: E402


SCHEMA = ShardSchema(
    {
        "s1": {"bands": ["VV", "VH"], "unit": "db", "gsd": 10.0, "dtype": "float32"},
        "s2": {"bands": ["B02", "B03", "B04", "B08"], "unit": "dn", "gsd": 10.0, "dtype": "uint16", "nodata": 0},
        "hls": {"bands": ["red"], "unit": "dn", "gsd": 30.0, "dtype": "int16"},
        "mine": {"bands": ["x"], "unit": "db", "gsd": 10.0, "dtype": "float32"},
    },
    {
        "crop": {"kind": "class", "names": ["wheat", "maize", "rye", "hops"]},
        "noise": {"kind": "class", "names": ["a", "b", "c"]},
        "only": {"kind": "class", "names": ["one", "other"]},
        "cover": {"kind": "multi_label", "names": ["bright", "odd", "land", "snow", "rare"]},
        "flood": {"kind": "mask", "dtype": "int8"},
    },
    title="made up",
)
COUNT, SIZE = 160, 16


def make_sample(index: int) -> Sample:
    """The crop shows in the brightness of s2, of which some pixels are missing; `noise` in nothing. Two samples of each
    place; s1 is missing in some, and one has nothing but it; one has no label of `crop`.
    """
    generator = np.random.default_rng(index)
    crop = index % 3
    s2 = generator.normal(600 + 900 * crop, 60, (4, SIZE, SIZE)).clip(1)
    if index % 5 == 0:
        s2[:, :5, :3] = 0
    images = {
        "s1": None if index % 7 == 3 else Layer(generator.normal(-12, 3, (2, SIZE, SIZE)).astype(np.float32)),
        "s2": Layer(s2.astype(np.uint16)),
        "mine": Layer(np.zeros((1, SIZE, SIZE), np.float32)),
    }
    if index == 20:
        images["s2"] = None
    labels = {
        "crop": crop,
        "noise": int(np.random.default_rng(1000 + index).integers(3)),
        "only": 0,
        "cover": [int(crop > 0), index % 2, 1, 0, int(index == 40)],
        "flood": np.zeros((SIZE, SIZE), np.int8),
    }
    if index == 30:
        del labels["crop"]
    return Sample(f"chip-{index:03d}", f"place-{index // 2}", images, labels)


def read(item: Item) -> Sample:
    return make_sample(item.payload)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """One data set with a single split, and its samples again in three that overlap."""
    folder = tmp_path_factory.mktemp("frozen") / "shards"
    parts = {"train": range(COUNT), "first": range(100), "second": range(96, 130), "third": range(130, 160)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing_mapex, "_ROW_GROUP_BYTES", 20_000)
        for split, indices in parts.items():
            items = [Item(f"chip-{index:03d}", "made up", index) for index in indices]
            write_shards(items, read, SCHEMA, folder, split, shard_bytes=100_000, progress=False)
    assert len(list(folder.glob("train-*"))) > 1
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Calibrated, so that it can be pruned while loading."""
    torch.manual_seed(0)
    config = MapexConfig.from_preset(
        "nano",
        modalities={"s1": None, "s2": ["B04", "B03", "B02", "B08"], "dem": None},
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=4,
    )
    model = randomize(MapexForPreTraining(config))
    inputs = {name: torch.randn(8, len(spec["bands"]), 16, 16) for name, spec in config.modalities.items()}
    model.calibrate_experts([{"pixel_values": inputs}])
    folder = tmp_path_factory.mktemp("frozen") / "model"
    model.save_pretrained(folder, shard_by_modality=True)
    return str(folder)


@pytest.fixture
def run(shards, checkpoint, tmp_path):
    """The script with a fresh cache, by its command line: `run(label="noise", ...)`; `None` leaves an option out."""

    def run(*flags: str, **options):
        defaults = {"model": checkpoint, "shards": shards, "label": "crop", "modalities": "s2", "num_workers": 0}
        sides = {side: 0.2 for side in ("validation", "test") if f"{side}_split" not in options}
        defaults |= {"cache_dir": tmp_path / "cache", "output": tmp_path / "out" / "results.json", "bootstrap": 200}
        arguments = list(flags)
        for name, value in {**defaults, **sides, **options}.items():
            if value is not None:
                arguments += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        kinds = (evaluate_frozen.ModelArguments, evaluate_frozen.DataArguments, evaluate_frozen.ProbeArguments)
        evaluate_frozen.main(*HfArgumentParser(kinds).parse_args_into_dataclasses(args=arguments))
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def stored(tmp_path) -> dict[str, Features]:
    return {file.name: frozen_features.read_features(file) for file in (tmp_path / "cache").iterdir()}


@torch.no_grad()
def direct(model: MapexModel, shards: str, modalities: list[str]) -> dict[str, np.ndarray]:
    """Embeddings of the samples one by one, without loader and collator."""
    processor = MapexImageProcessor.from_config(model.config)
    result = {}
    for sample in stream_shards(shards, modalities=modalities, labels=[]):
        images = {name: pixels for name, pixels in sample["images"].items() if pixels is not None}
        if images:
            options = {
                "bands": {name: SCHEMA.modalities[name]["bands"] for name in images},
                "units": {name: SCHEMA.modalities[name]["unit"] for name in images},
            }
            batch = processor(images, **options)
            result[sample["id"]] = model(**batch).pooler_output[0].numpy()
    return result


def assert_equals(features: Features, expected: dict[str, np.ndarray]) -> None:
    assert features.ids.tolist() == sorted(expected)
    np.testing.assert_allclose(features.values, [expected[name] for name in features.ids], atol=2e-5)


def test_embeddings_are_those_of_a_forward_pass(run, shards, checkpoint, tmp_path, capsys):
    """Of the whole model, on all that the shards have of it, in any number of processes."""
    results = run("--pooling", "modality_mean", modalities=None, num_workers=2, batch_size=32)
    (features,) = stored(tmp_path).values()
    model = MapexModel.from_pretrained(checkpoint, pooling_type="modality_mean")
    assert_equals(features, direct(model, shards, ["s1", "s2"]))
    assert features.places.tolist() == [make_sample(index).place for index in range(COUNT)]
    assert features.labels["crop"].tolist() == [-1 if index == 30 else index % 3 for index in range(COUNT)]
    assert features.labels["cover"].tolist() == [make_sample(index).labels["cover"] for index in range(COUNT)]
    printed = capsys.readouterr().out
    (row,) = results["rows"]
    assert row["pooling"] == "modality_mean" and row["parameters"] == model.num_parameters()
    assert row["modalities"] == {"s1": ["VV", "VH"], "s2": ["B04", "B03", "B02", "B08"]}
    for note in (
        "Left out of the shards: hls (unknown to the model), mine (unknown to the model).",
        "Of 160 samples of `train`, 1 have no label `crop` and are left out.",
        "Of 160 samples of `train`, 23 lack s1.",
        "Not evaluated, since in no sample: `hops`.",
    ):
        assert note in results["notes"] and note in printed


@pytest.mark.parametrize(
    ("modalities", "bands", "plan"),
    [
        (["s2"], ["s2=B04,B08"], {"experts_per_layer": 1}),
        (["s1"], [], {"coverage": 0.4, "criterion": "usage"}),
        (["s1", "s2"], ["s2=B03"], {"experts_per_layer": [1, 2], "criterion": "random"}),
    ],
)
def test_pruned_while_loading(run, shards, checkpoint, tmp_path, modalities, bands, plan):
    results = run(modalities=modalities, bands=bands or None, label="noise", seed=3, **plan)
    chosen = dict.fromkeys(modalities)
    chosen |= {name: kept.split(",") for name, kept in (entry.split("=") for entry in bands)}
    seed = {"seed": 3} if plan.get("criterion") == "random" else {}
    whole = MapexForPreTraining.from_pretrained(checkpoint)
    pruned = whole.prune_for_modalities(chosen, **plan, **seed).build(MapexModel)
    (features,) = stored(tmp_path).values()
    assert_equals(features, direct(pruned, shards, modalities))
    (row,) = results["rows"]
    assert row["parameters"] == pruned.num_parameters() < MapexModel(whole.config).num_parameters()
    assert row["pruning"]["coverage_reached"] == pruned.config.pruning["coverage_reached"]
    if modalities != ["s1", "s2"]:
        count = {"s1": 23, "s2": 1}[modalities[0]]
        assert f"Of 160 samples of `train`, {count} have none of {modalities} and are left out." in results["notes"]


def test_what_can_be_told_and_what_cannot(run):
    """Classes that show are found; labels drawn at random are found by chance, embeddings or not."""
    (row,) = run()["rows"]
    (result,) = row["results"]
    assert result["shots"] == "all" and result["training_samples"] == [row["samples"]["train"]]
    for probe in ("knn", "logistic"):
        assert result[probe]["accuracy"]["mean"] > 0.97 and result[probe]["macro F1"]["mean"] > 0.97
    rows = run("--band_statistics", label="noise", test=0.4, seed=1)["rows"]
    for row in rows:
        for probe in ("knn", "logistic"):
            low, high = row["results"][0][probe]["accuracy"]["interval"]
            assert low < 1 / 3 < high and high < 0.6


def test_several_labels(run, capsys):
    results = run(label="cover")
    (result,) = results["rows"][0]["results"]
    assert results["kind"] == "multi_label"
    for note, name in {"every training sample": "land", "no training sample": "snow"}.items():
        assert any(line.startswith(f"Not evaluated, since in {note}: `{name}`") for line in results["notes"])
    chance = np.mean([2 / 3, 1 / 2])  # `bright` is found, `odd` shows in nothing
    for probe in ("knn", "logistic"):
        assert chance + 0.08 < result[probe]["mean average precision"]["mean"] < 0.95
        low, high = result[probe]["mean average precision"]["interval"]
        assert low < result[probe]["mean average precision"]["mean"] < high
    assert "| kNN, mean average precision | logistic, mean average precision |" in capsys.readouterr().out


def test_few_shots_of_several_labels():
    targets = np.random.default_rng(0).integers(2, size=(50, 3))
    chosen = evaluate_frozen.draw_samples(targets, 6, [0, 6, 0])
    assert (targets[chosen].sum(axis=0) >= 6).all() and 6 <= len(chosen) <= 18
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.tolist() != evaluate_frozen.draw_samples(targets, 6, [0, 6, 1]).tolist()
    assert evaluate_frozen.draw_samples(targets, 0, [0, 0, 0]).tolist() == list(range(50))


def split_shares(places, test=0.2, seed=0):
    return np.array(
        [split_of_place(place, {"train": 0.8 - test, "validation": 0.2, "test": test}, seed) for place in places]
    )


def test_probes_are_those_of_scikit_learn(run, tmp_path):
    """The whole script, split and choice of C included, against the library by hand."""
    (row,) = run(label="noise", test=0.3)["rows"]
    (features,) = stored(tmp_path).values()
    side = split_shares(features.places.tolist(), test=0.3)
    values, labels = features.values.astype(np.float64), features.labels["noise"]
    x, y, held_out, held_out_labels = (
        *(values[side == "train"], labels[side == "train"]),
        *(values[side == "validation"], labels[side == "validation"]),
    )
    test, truth = values[side == "test"], labels[side == "test"]
    assert row["samples"] == {name: int((side == name).sum()) for name in ("train", "validation", "test")}

    (result,) = row["results"]
    neighbours = KNeighborsClassifier(5, metric="cosine").fit(x, y)
    assert result["knn"]["accuracy"]["mean"] == pytest.approx(neighbours.score(test, truth))
    models = {}
    for strength in probes.STRENGTHS:
        models[strength] = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            models[strength].fit(x, y)
    best = max(models, key=lambda strength: (models[strength].score(held_out, held_out_labels), -strength))
    predicted = models[best].predict(test)
    assert result["C"] == [best]
    assert result["logistic"]["accuracy"]["mean"] == pytest.approx(accuracy_score(truth, predicted))
    assert result["logistic"]["macro F1"]["mean"] == pytest.approx(f1_score(truth, predicted, average="macro"))


def test_logistic_regression_of_several_labels():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(60, 4))
    targets = (values[:, :3] + generator.normal(size=(60, 3)) > 0).astype(float)
    targets[:, 2] = 1  # as may happen with few samples
    parts = [(values[start : start + 20], targets[start : start + 20]) for start in (0, 20, 40)]
    probe = probes.fit_logistic("multi_label", *parts[:2])
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=probe.strength, max_iter=1000)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Label 2 is present in all")
        model.fit(*parts[0])
    np.testing.assert_allclose(probe.scores("multi_label", parts[2][0]), model.predict_proba(parts[2][0]), atol=1e-6)
    assert probe.arrived


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_of_one_label(classes):
    """Also of two classes, of which scikit-learn gives one set of coefficients, and beside one that never occurs."""
    generator = np.random.default_rng(0)
    values = generator.normal(2, 3, size=(60, 4))
    labels = np.digitize(values[:, 0] + generator.normal(size=60), [2, 4][: classes - 1])
    targets = np.eye(classes + 1)[labels]
    parts = [(values[start : start + 20], targets[start : start + 20]) for start in (0, 20, 40)]
    probe = probes.fit_logistic("class", *parts[:2])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=probe.strength, max_iter=1000))
    model.fit(values[:20], labels[:20])
    scores = probe.scores("class", values[40:])
    np.testing.assert_allclose(scores[:, :classes], model.predict_proba(values[40:]), atol=1e-5)
    assert scores[:, classes].max() < 1e-5

    weighted = probes.fit_logistic("class", *parts[:2], [1.0], [5.0] + [1.0] * classes)
    plain = probes.fit_logistic("class", *parts[:2], [1.0])
    assert weighted.scores("class", values)[:, 0].mean() > plain.scores("class", values)[:, 0].mean() + 0.02


@pytest.mark.parametrize("kind", probes.LABEL_KINDS)
def test_metrics_are_those_of_scikit_learn(kind):
    """For many weightings at once, with ties, and with classes that some weightings leave without a sample."""
    generator = np.random.default_rng(0)
    targets = np.eye(4)[generator.integers(4, size=30)] if kind == "class" else generator.integers(2, size=(30, 4))
    targets[:, 3] = 0 if kind == "multi_label" else targets[:, 3]
    targets[:2, 3] = targets[:2, 3] + (kind == "multi_label")
    scores = generator.integers(6, size=(30, 4)) / 5 + targets * 0.2
    weights = generator.poisson(0.7, size=(20, 30)).astype(float)
    weights[0, targets[:, 3] > 0] = 0
    found = probes.metrics(kind, targets, scores, weights)
    for index, weight in enumerate(weights):
        some = weight > 0
        if kind == "class":
            truth, predicted = targets.argmax(1)[some], scores.argmax(1)[some]
            expected = [
                accuracy_score(truth, predicted, sample_weight=weight[some]),
                f1_score(truth, predicted, average="macro", sample_weight=weight[some]),
            ]
        else:
            occurs = (targets[some] > 0).any(axis=0)
            truth, predicted = targets[some], (scores[some] > 0.5).astype(int)
            expected = [
                np.mean(
                    [
                        average_precision_score(truth[:, column], scores[some][:, column], sample_weight=weight[some])
                        for column in np.flatnonzero(occurs)
                    ]
                ),
                f1_score(truth, predicted, average="micro", sample_weight=weight[some]),
            ]
        assert [values[index] for values in found.values()] == pytest.approx(expected)


def intervals_of(hits: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
    targets = np.eye(2)[np.zeros(len(hits), int)]
    scores = np.eye(2)[1 - hits.astype(int)]
    resampled = probes.bootstrap_metrics("class", targets, scores, places, 400, seed)
    return np.quantile(resampled["accuracy"], (0.025, 0.975))


def test_bootstrap_intervals_cover():
    """The probability behind hits and misses lies inside of about 95 %; also where samples of a place are alike."""
    generator = np.random.default_rng(0)
    for copies in (1, 5):
        covered, widths = 0, []
        for seed in range(120):
            hits = generator.random(100) < 0.7
            low, high = intervals_of(np.repeat(hits, copies), np.repeat(np.arange(100), copies), seed)
            covered += low <= 0.7 <= high
            widths.append(high - low)
        assert 0.89 <= covered / 120 <= 0.99
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 100), rel=0.06)
    hits = generator.random(100) < 0.7
    assert (intervals_of(hits, np.arange(100), 1) == intervals_of(hits, np.arange(100), 1)).all()


def test_few_shots(run, monkeypatch):
    """Exactly so many samples of each class, the same for every model; spread over draws and interval over tests."""
    seen = []
    original = evaluate_frozen.fit_logistic

    def spy(kind, train, validation):
        seen.append(train[1])
        return original(kind, train, validation)

    monkeypatch.setattr(evaluate_frozen, "fit_logistic", spy)
    results = run("--random_weights", label="noise", shots=[4, "all"], seeds=3)
    assert len(seen) == 8 and [targets.sum(axis=0).tolist() for targets in seen[:3]] == [[4.0, 4.0, 4.0]] * 3
    assert all((one == other).all() for one, other in zip(seen[:4], seen[4:]))
    few, whole = results["rows"][0]["results"]
    draws = few["logistic"]["accuracy"]["draws"]
    assert few["shots"] == 4 and few["training_samples"] == [12] * 3 and len(draws) == len(few["C"]) == 3
    assert few["logistic"]["accuracy"]["mean"] == pytest.approx(np.mean(draws))
    assert few["logistic"]["accuracy"]["std"] == pytest.approx(np.std(draws, ddof=1))
    assert "std" not in whole["logistic"]["accuracy"]
    table = evaluate_frozen.table("class", results["rows"]).splitlines()
    assert len(table) == 6 and re.search(r"\| 4 \| 0\.\d{3} ± 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\] \|", table[2])


def test_cache(run, tmp_path, capsys):
    """The second run reads; what is damaged is computed again; other options are other files."""
    first = run()
    (file,) = (tmp_path / "cache").iterdir()
    written, content = file.stat().st_mtime_ns, file.read_bytes()
    assert run(batch_size=7, label="noise")["rows"] != first["rows"] and file.stat().st_mtime_ns == written
    assert run()["rows"] == first["rows"] and file.stat().st_mtime_ns == written
    capsys.readouterr()
    for damaged in (content[: len(content) // 2], content[:200] + bytes(2000) + content[2200:], b""):
        file.write_bytes(damaged)
        assert run()["rows"] == first["rows"]
        assert f"{file} is damaged" in capsys.readouterr().out
        assert file.stat().st_size == len(content) and [*file.parent.iterdir()] == [file]
    for changed in ({"crop_size": 8}, {"modalities": ["s1", "s2"]}, {"bands": "s2=B04"}, {"pooling": "modality_mean"}):
        run(**changed)
    assert len(stored(tmp_path)) == 5


def test_cache_knows_weights_by_value(run, checkpoint, tmp_path):
    """A copy of a model is the same model, in whichever files; one that was trained on is not."""
    first = run()
    shutil.copytree(checkpoint, tmp_path / "copy")
    copy = run(model=tmp_path / "copy")
    assert copy["rows"][0]["results"] == first["rows"][0]["results"] and len(stored(tmp_path)) == 1
    model = MapexForPreTraining.from_pretrained(tmp_path / "copy")
    with torch.no_grad():
        model.mapex.layernorm.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "copy")
    run(model=tmp_path / "copy")
    one, other = stored(tmp_path).values()
    assert np.abs(one.values - other.values).max() == pytest.approx(1e-3, rel=1e-2)


def test_random_weights(run, tmp_path):
    """Never trained, of the same configuration, and the same again by the same seed."""
    rows = run("--random_weights")["rows"]
    assert rows[1]["model"] == rows[0]["model"] + ", random weights"
    assert rows[1]["parameters"] == rows[0]["parameters"]
    one, other = stored(tmp_path).values()
    assert np.abs(one.values - other.values).max() > 0.1
    assert run("--random_weights")["rows"] == rows and len(stored(tmp_path)) == 2
    run("--random_weights", seed=1)
    assert len(stored(tmp_path)) == 3


@pytest.mark.parametrize("with_model", [True, False])
def test_band_statistics(run, checkpoint, tmp_path, with_model):
    """Of valid pixels only, normalised; zeros where a modality is missing."""
    bands = {"s1": ["VV", "VH"], "s2": ["B08", "B03"]}
    options = {"modalities": ["s1", "s2"], "bands": "s2=B08,B03"}
    row = run("--band_statistics", model=checkpoint if with_model else None, **options)["rows"][-1]
    assert row["model"] == "band statistics" and row["parameters"] == 0 and row["modalities"] == bands
    assert row["results"][0]["logistic"]["accuracy"]["mean"] > 0.95
    features = next(entry for entry in stored(tmp_path).values() if entry.values.shape[1] == 4 * 9)
    config = MapexConfig.from_preset("nano", modalities=bands)
    for index in (0, 3, 20):
        sample, expected = make_sample(index), []
        for name, kept in bands.items():
            if sample.images[name] is None:
                expected += [0.0] * 9 * len(kept)
                continue
            pixels, spec = sample.images[name].pixels.astype(np.float64), config.modalities[name]
            pixels = pixels[[SCHEMA.modalities[name]["bands"].index(band) for band in kept]]
            valid = (pixels > 0).all(axis=0) if name == "s2" else np.ones(pixels.shape[1:], bool)
            for band, mean, std, clip in zip(pixels, spec["mean"], spec["std"], spec["clip"]):
                values = band[valid] * (1e-4 if name == "s2" else 1)
                values = (np.clip(values, *clip) - mean) / std
                expected += [values.mean(), values.std(), values.min(), values.max()]
                expected += np.percentile(values, (5, 25, 50, 75, 95)).tolist()
        np.testing.assert_allclose(features.values[index], expected, atol=1e-4)


def test_band_statistics_of_a_crop_without_data(checkpoint):
    """Zeros, as of a sample that lacks the modality, whatever else is in the batch."""
    config = MapexConfig.from_pretrained(checkpoint)
    statistics = frozen_features.BandStatistics(MapexImageProcessor.from_config(config), ["s1", "dem"])
    pixels = {"s1": torch.randn(2, 2, 8, 8), "dem": torch.randn(2, 1, 8, 8)}
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1] = False
    together = statistics({"pixel_values": pixels, "valid_mask": {"s1": valid}})
    alone = statistics({"pixel_values": {"dem": pixels["dem"][1:]}})
    assert torch.equal(together[1:], alone) and together[0].abs().min() > 0


def test_splits_of_the_shards(run, tmp_path):
    results = run(train_split="first", validation_split="second", test_split="third")
    (row,) = results["rows"]
    assert row["samples"] == {"train": 98, "validation": 34, "test": 30}  # of two there is no label or no s2
    assert "2 places are in training and in validation." in results["notes"]
    assert sorted(len(features.ids) for features in stored(tmp_path).values()) == [30, 34, 99]
    (row,) = run(train_split="first", test_split="third")["rows"]
    assert row["samples"]["test"] == 30 and row["samples"]["train"] + row["samples"]["validation"] == 98
    assert len(stored(tmp_path)) == 3


def test_a_sensor_under_another_name(run, shards, tmp_path):
    """What shards call optical the model reads as s2: the same features as of shards that call it s2."""

    def read_optical(item: Item) -> Sample:
        sample = make_sample(item.payload)
        images = {"optical" if name == "s2" else name: layer for name, layer in sample.images.items()}
        return Sample(sample.id, sample.place, images, sample.labels)

    modalities = {"optical" if name == "s2" else name: spec for name, spec in SCHEMA.modalities.items()}
    items = [Item(f"chip-{index:03d}", "made up", index) for index in range(COUNT)]
    write_shards(items, read_optical, ShardSchema(modalities, SCHEMA.labels), tmp_path / "renamed", progress=False)
    (expected,) = run(modalities=None)["rows"]
    (row,) = run("--rename", "optical=s2", shards=tmp_path / "renamed", modalities=None)["rows"]
    assert row == expected
    with pytest.raises(Stop, match=r"--rename names \['radar'\]"):
        run("--rename", "radar=s2")


def test_sides_are_those_of_the_fine_tuning_scripts(run, shards, tmp_path):
    (row,) = run("--split_seed", "4", validation=None, test=None)["rows"]
    args = finetuning_options.DataArguments(shards=shards, split_seed=4, cache_dir=str(tmp_path / "datasets"))
    sides = finetuning_data.read_sides(args, {"s2": "s2"}, "crop")
    assert {side: len(chips) for side, chips in sides.items()} == row["samples"]


def test_test_places_are_unseen_in_pretraining():
    """As the docstring says, of run_pretraining.py with a `--held_out` that is as large."""
    for place in map(str, range(500)):
        held_out = split_of_place(place, {"train": 0.8, "held_out": 0.2}, 3) == "held_out"
        assert held_out or split_shares([place], seed=3)[0] != "test"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": None}, "Give --shards"),
        ({"shards": "no/such/folder"}, "neither a folder nor the id"),
        ({"shards": "me/chips"}, "me/chips is no folder, and not to be had from the Hub"),
        ({"train_split": "nothing"}, "No shards of the split `nothing`"),
        ({"test_split": "nothing"}, "No shards of the split `nothing`"),
        (
            {"test_split": "train"},
            "A split cannot serve twice: to train, validate and test there are ['train', 'train']",
        ),
        ({"test_split": "train", "test": 0.2}, "--test is a share of --train_split, and --test_split another split"),
        ({"test": 0.5, "validation": 0.5}, "leave something to train on"),
        ({"validation": 0}, "shares above 0, got"),
        ({"test": 0.001}, "No labelled sample is left for test: there are 80 places"),
        ({"label": "wine"}, "no label `wine`. Its labels: {'crop': 'class'"),
        (
            {"label": "flood"},
            "`flood` is of kind mask, but this script takes a label of kind class or multi_label: use run_sem",
        ),
        ({"label": None}, "does not have one label of the kind class or multi_label: name it by --label"),
        ({"label": "only"}, "nothing to tell apart: of 2 classes, 1"),
        ({"modalities": "slope"}, "The shards have no modalities ['slope'], only ['s1', 's2', 'hls', 'mine']"),
        ({"modalities": "mine"}, "Unknown modalities ['mine']. This checkpoint has ['dem', 's1', 's2']"),
        ({"modalities": "mine", "model": None, "band_statistics": ""}, "`mine`"),
        ({"modalities": "hls", "model": None, "band_statistics": ""}, "hls (lacks the bands coastal blue green nir"),
        ({"modalities": None, "bands": "s2=B04"}, "--bands says how to prune, but --modalities does not"),
        ({"bands": "s1=VV"}, "--bands names ['s1'], but --modalities are ['s2']"),
        ({"bands": "s2=B99"}, "B99"),
        ({"coverage": 0.5, "experts_per_layer": 1}, "Give either `coverage` or `experts_per_layer`"),
        ({"criterion": "beauty"}, "Unknown criterion `beauty`"),
        ({"shots": 1000}, "--shots 1000 is more than the training samples of `wheat` ("),
        ({"shots": "few"}, "--shots takes numbers of samples, or all, got `few`"),
        ({"shots": [5, 5]}, "--shots takes different numbers"),
        ({"shots": 1}, "5 neighbours cannot vote among 3 training samples"),
        ({"seeds": 0}, "--seeds must be 1 or more"),
        ({"batch_size": 0}, "--batch_size must be 1 or more"),
        ({"model": None}, "give --model, or --band_statistics"),
        ({"model": "no/such/folder"}, "Cannot load no/such/folder"),
        ({"crop_size": 99, "num_workers": 1}, "Cannot cut 99 pixels"),
    ],
)
def test_stops(run, options, message):
    flags = ["--band_statistics"] if options.pop("band_statistics", None) is not None else []
    with pytest.raises(Stop, match=re.escape(message)) as stopped:
        run(*flags, **options)
    assert "Traceback" not in str(stopped.value)


def test_stops_without_scikit_learn(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(Stop, match=re.escape('pip install -e ".[evaluate]"')):
        run()


def write_some(folder: Path, indices, split: str = "train", **changes) -> str:
    """Shards of some of the samples, with some of their labels replaced."""

    def changed(item: Item) -> Sample:
        sample = make_sample(item.payload)
        sample.labels |= {name: change(item.payload) for name, change in changes.items()}
        return sample

    items = [Item(f"chip-{index:03d}", "made up", index) for index in indices]
    write_shards(items, changed, SCHEMA, folder, split, progress=False)
    return str(folder)


def test_stops_where_the_samples_do_not_suffice(run, tmp_path):
    with pytest.raises(Stop, match="No labelled sample is left for validation: there are 1 places"):
        run(shards=write_some(tmp_path / "one", [0]), split_seed=2)
    places = [f"place-{index}" for index in range(30)]
    seed = next(seed for seed in range(100) if (split_shares(places, 0.05, seed) == "test").sum() == 1)
    with pytest.raises(Stop, match="The test samples are all of one place"):
        run(shards=write_some(tmp_path / "place", range(60)), test=0.05, split_seed=seed)
    with pytest.raises(Stop, match=r"has any of \['s2'\]"):
        run(shards=write_some(tmp_path / "none", [20]))
    held_out = {"validation_split": "val", "test_split": "test"}
    folder = tmp_path / "hops"
    write_some(folder, range(40))
    write_some(folder, range(40, 60), "val")
    write_some(folder, range(60, 90), "test", crop=lambda index: index % 4)
    with pytest.raises(Stop, match="No training sample is of `hops`, but others are"):
        run(shards=folder, **held_out)


def test_says_which_classes_are_not_tested(run, tmp_path):
    folder = tmp_path / "shards"
    write_some(folder, range(60))
    write_some(folder, range(60, 90), "test", crop=lambda index: index % 2)
    results = run(shards=folder, test_split="test")
    assert "No test sample is of `rye`." in results["notes"]
    assert results["rows"][0]["results"][0]["logistic"]["accuracy"]["mean"] < 0.9


def test_stops_at_embeddings_that_are_not_finite(run, checkpoint, tmp_path):
    model = MapexForPreTraining.from_pretrained(checkpoint)
    with torch.no_grad():
        model.mapex.layernorm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "diverged")
    with pytest.raises(Stop, match=r"of 159 samples are not finite, \['chip-0"):
        run(model=tmp_path / "diverged")
    assert not stored(tmp_path)


def test_stops_at_a_checkpoint_without_an_encoder(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    index = tmp_path / "model" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {key: file for key, file in content["weight_map"].items() if "layers.2." not in key}
    index.write_text(json.dumps(content))
    with pytest.raises(Stop, match=r"lacks weights of the encoder, such as layers\.2\."):
        run(model=tmp_path / "model")


@pytest.mark.slow
def test_from_the_hub(shards, checkpoint, tmp_path):
    """The documented command, in a process of its own, with model and shards from the Hub; another commit of the shards
    is another data set.
    """
    command = [sys.executable, str(SCRIPT), "--model", "me/nano", "--shards", "me/chips", "--label", "crop"]
    command += ["--modalities", "s2", "--bootstrap", "50"]
    with HubServer(tmp_path / "hub") as hub:
        hub.put_folder("me/nano", Path(checkpoint))
        hub.put_folder("me/chips", Path(shards), kind="dataset")
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(SCRIPT.parent.parent)
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 240}
        result = subprocess.run(command, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "made up: `crop`, 4 classes; samples:" in result.stdout and "| me/nano | s2 |" in result.stdout
    assert "sample/s" in result.stderr
    (file,) = (tmp_path / "outputs" / "frozen" / "embeddings").iterdir()
    whole = MapexForPreTraining.from_pretrained(checkpoint).prune_for_modalities(["s2"]).build(MapexModel)
    assert_equals(frozen_features.read_features(file), direct(whole, shards, ["s2"]))


def test_says_what_did_not_converge(run, checkpoint, monkeypatch):
    for module in (probes, evaluate_frozen):
        monkeypatch.setattr(module, "MOST_ITERATIONS", 2)
    note = rf"{re.escape(checkpoint)}, shots all: the regression chosen, with C = \S+, did not converge in 2"
    assert any(re.match(note, line) for line in run(label="noise")["notes"])
