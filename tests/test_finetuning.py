"""The three fine-tuning scripts and what they share, on tasks that can be learnt in seconds."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize, tiny_config, tiny_inputs
from huggingface_hub import ModelCard
from safetensors.torch import load_file


pytest.importorskip("accelerate", reason="fine-tuning needs the extras `data` and `train`")
pytest.importorskip("datasets", reason="fine-tuning needs the extras `data` and `train`")

from hub_server import HubServer
from interpreters import run_python

from modeling_mapex import (
    MapexConfig,
    MapexForImageClassification,
    MapexForPixelRegression,
    MapexForPreTraining,
    MapexForSemanticSegmentation,
)
from modeling_mapex.collation_mapex import MapexCollator
from modeling_mapex.image_processing_mapex import MapexImageProcessor
from modeling_mapex.shards_mapex import Layer, Sample, ShardSchema
from modeling_mapex.writing_mapex import Item, write_shards


EXAMPLES = Path(__file__).parent.parent / "examples"

import command_line  # noqa: E402
import finetuning  # noqa: E402
import finetuning_data  # noqa: E402
import finetuning_head  # noqa: E402
import finetuning_model  # noqa: E402
import finetuning_options  # noqa: E402
import finetuning_results  # noqa: E402
import finetuning_tasks  # noqa: E402
import run_image_classification  # noqa: E402
import run_pixel_regression  # noqa: E402
import run_semantic_segmentation  # noqa: E402


SCRIPTS = {
    "crop": run_image_classification,
    "cover": run_image_classification,
    "flood": run_semantic_segmentation,
    "codes": run_semantic_segmentation,
    "biomass": run_pixel_regression,
    "height": run_pixel_regression,
}
KINDS = {
    run_image_classification: (run_image_classification.ClassificationArguments,),
    run_semantic_segmentation: (run_semantic_segmentation.SegmentationArguments,),
    run_pixel_regression: (),
}
SIZE = 16  # pixels of 10 m; 8 of 20 m
SCHEMA = ShardSchema(
    {
        "s1": {"bands": ["VV", "VH"], "unit": "db", "gsd": 10.0, "dtype": "float32"},
        "optical": {"bands": ["B02", "B03", "B04"], "unit": "dn", "sensor": "s2", "gsd": 10.0, "dtype": "uint16"},
        "dem": {"bands": ["elevation"], "unit": "metres", "gsd": 20.0, "dtype": "int16"},
    },
    {
        "crop": {"kind": "class", "names": ["wheat", "maize", "rye", "none of them"]},
        "cover": {"kind": "multi_label", "names": ["water", "forest"]},
        "flood": {"kind": "mask", "dtype": "int8", "names": [[3, "dry"], [7, "wet"]], "ignore_index": -1},
        "codes": {"kind": "mask", "dtype": "int8"},
        "biomass": {"kind": "map", "dtype": "float32", "unit": "t/ha", "nodata": -1.0},
    },
)


def read(item: Item, size: int = SIZE) -> Sample:
    """Radar tells everything: the crop by its level, water by a dark half, biomass by its value; the rest is noise.
    Every fourth sample lacks the optical image, two in three of the first ten lack crop and mask, and the mask of
    sample 20 is ignored throughout.
    """
    index = item.payload
    generator = np.random.default_rng(index)
    crop, wet_rows = index % 3, int(generator.integers(4, size - 4))
    wet = np.zeros((size, size), dtype=bool)
    wet[:wet_rows] = True
    radar = generator.normal(-14 + 4 * crop, 0.3, (2, size, size)).astype(np.float32)
    radar[0, wet] -= 8
    flood = np.where(wet, 7, 3).astype(np.int8)
    flood[:, 0] = -1
    biomass = (5 * radar[0] + 200).astype(np.float32)
    biomass[-1] = -1.0
    images = {
        "s1": Layer(radar),
        "optical": Layer(generator.integers(100, 4000, (3, size, size), dtype=np.uint16)),
        "dem": Layer(generator.integers(0, 900, (1, size // 2, size // 2), dtype=np.int16)),
    }
    if index % 4 == 3:
        images["optical"] = None
    labels = {
        "crop": crop,
        "cover": [int(crop == 0), int(crop != 1)],
        "flood": np.full_like(flood, -1) if index == 20 else flood,
        "codes": flood,
        "biomass": biomass,
    }
    if index < 10 and index % 3 != 0:
        labels["crop"] = labels["flood"] = None
    return Sample(f"chip-{index}", f"place-{index // 2}", images, labels)


def read_larger(item: Item) -> Sample:
    return read(item, SIZE if item.payload % 2 else 2 * SIZE)


def items(count: int, start: int = 0) -> list[Item]:
    return [Item(f"chip-{index}", f"chip-{index}.tif", index) for index in range(start, start + count)]


def write(folder: Path, count: int, reader=read, **options) -> str:
    write_shards(items(count), reader, SCHEMA, folder, progress=False, **options)
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shards"), 72)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny pretrained model of three sensors, each of which has an expert of its own."""
    torch.manual_seed(0)
    config = MapexConfig.from_preset(
        "nano",
        modalities={"s1": None, "s2": ["B04", "B03", "B02"], "dem": None},
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=4,
        decoder_num_hidden_layers=1,
        initializer_range=0.1,
    )
    model = MapexForPreTraining(config)
    with torch.no_grad():
        for layer in (1, 3):
            model.mapex.layers[layer].mlp.gate.modality_bias.copy_(torch.eye(3, 4) * 5)
    pixels = {name: torch.randn(4, len(spec["bands"]), 16, 16) for name, spec in config.modalities.items()}
    model.calibrate_experts([{"pixel_values": {name: value}} for name, value in pixels.items()])
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, shard_by_modality=True)
    return str(folder)


@pytest.fixture(scope="module")
def options(shards, checkpoint, tmp_path_factory):
    """For all runs here."""
    return {
        "model": checkpoint,
        "shards": shards,
        "modalities": ["s1"],
        "cache_dir": str(tmp_path_factory.mktemp("cache")),
        "split_seed": 3,
        "validation": 0.2,
        "test": 0.25,
        "batch_size": 8,
        "max_steps": 60,
        "eval_steps": 20,
        "learning_rate": 3e-3,
        "layer_decay": 1.0,
        "bootstrap": 50,
    }


def run(options: dict, folder: Path, task: str, **changes) -> dict[str, float]:
    """The script for a label in this process, with options as from a file."""
    script = SCRIPTS[task]
    kinds = (
        finetuning_options.ModelArguments,
        finetuning_options.DataArguments,
        *KINDS[script],
        finetuning_options.FinetuningArguments,
    )
    file = folder.parent / f"{folder.name}.json"
    file.write_text(json.dumps({**options, "label": task, "output_dir": str(folder), **changes}))
    return script.main(*command_line.parse_arguments(kinds, script.__doc__, [str(file)]))


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def weights_of(folder: Path, model_class=MapexForImageClassification) -> dict[str, torch.Tensor]:
    return model_class.from_pretrained(folder / "model").state_dict()


def assert_same_run(one: Path, other: Path, model_class=MapexForImageClassification) -> None:
    """Bit for bit, but for what depends on the clock and the machine."""
    timed = ("seconds", "peak_memory_mb", "ms_per_chip")
    expected, results = ({k: v for k, v in results_of(folder).items() if k not in timed} for folder in (one, other))
    assert results == expected
    expected, weights = weights_of(one, model_class), weights_of(other, model_class)
    assert expected.keys() == weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """A classification run that nothing interrupts, with all that is random, and its metrics."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run(options, folder, "crop", **AUGMENTED)


AUGMENTED = {
    "modalities": ["s1", "s2"],
    "rename": ["optical=s2"],
    "crop_size": 12,
    "modality_dropout": 0.2,
    "max_steps": 24,
    "eval_steps": 8,
    "layer_decay": 0.8,
}


class TestLearning:
    def test_one_label(self, options, tmp_path, capsys):
        metrics = run(options, tmp_path / "run", "crop", class_weights="balanced")
        output = capsys.readouterr().out
        assert metrics["accuracy"] == 1.0 and metrics["macro_f1"] == 1.0
        assert "Left out 6 of 72 samples of `train` without `crop`." in output
        assert "cannot be learnt: no training sample has them: none of them" in output
        assert "| accuracy | 1 | 1 .. 1 |" in output and "| wheat | 1 |" in output
        results = results_of(tmp_path / "run")
        assert results["metrics"] == metrics and set(results["samples"]) == {"train", "validation", "test"}
        assert sum(results["samples"].values()) == 66 and results["per_class"]["none of them"]["f1"] is None
        assert np.trace(results["confusion"]) == results["samples"]["test"]
        assert results["seconds"] > 0 and results["ms_per_chip"] > 0 and results["peak_memory_mb"] > 0
        model = MapexForImageClassification.from_pretrained(tmp_path / "run" / "model")
        assert list(model.config.modalities) == ["s1"]
        assert model.config.class_weights[3] == 0 and min(model.config.class_weights[:3]) > 0
        assert {path.name for path in (tmp_path / "run").iterdir()} >= {"results.json", "confusion.png", "model"}
        assert not (tmp_path / "run" / "checkpoints").exists()

    def test_several_labels(self, options, tmp_path):
        metrics = run(options, tmp_path / "run", "cover")
        assert metrics["mean_average_precision"] > 0.95 and metrics["micro_f1"] > 0.9
        described = results_of(tmp_path / "run")["per_class"]
        assert described["water"]["average_precision"] > 0.9 and described["forest"]["samples"] > 0

    def test_masks(self, options, tmp_path):
        metrics = run(options, tmp_path / "run", "flood", class_weights=["1", "2"])
        assert metrics["mean_iou"] > 0.9 and metrics["pixel_accuracy"] > 0.95
        results = results_of(tmp_path / "run")
        assert results["per_class"]["wet"]["iou"] > 0.9 and set(results["intervals"]) == set(metrics)
        model = MapexForSemanticSegmentation.from_pretrained(tmp_path / "run" / "model")
        assert model.config.id2label == {0: "dry", 1: "wet"} and model.config.class_weights == [1.0, 2.0]
        assert (tmp_path / "run" / "predictions.png").stat().st_size > 1000

    def test_maps(self, options, tmp_path, capsys):
        metrics = run(options, tmp_path / "run", "biomass")
        results, output = results_of(tmp_path / "run"), capsys.readouterr().out
        assert metrics["r2"] > 0.9 and metrics["rmse"] < 0.4 * results["labels"]["test"]["std"]
        assert results["unit"] == "t/ha" and "standard deviation" in output
        model = MapexForPixelRegression.from_pretrained(tmp_path / "run" / "model")
        assert model.config.label_mean == results["labels"]["train"]["mean"] > 0  # without nodata, which is -1
        assert (tmp_path / "run" / "predictions.png").stat().st_size > 1000

    def test_card_and_predictions_of_what_is_saved(self, options, straight):
        """The model in the folder scores what the results say, and so does its card."""
        folder, metrics = straight
        card = ModelCard.load(folder / "model" / "README.md")
        assert {result.metric_type: result.metric_value for result in card.data.eval_results} == metrics
        assert "| layer_decay | `0.8` |" in card.text and "| method | `full` |" in card.text
        model = MapexForImageClassification.from_pretrained(folder / "model")
        data_args = finetuning_options.DataArguments(
            label="crop",
            rename=["optical=s2"],
            **{key: options[key] for key in ("shards", "cache_dir", "split_seed", "validation", "test")},
        )
        model_args = finetuning_options.ModelArguments(model=options["model"], modalities=["s1", "s2"])
        chips = finetuning_data.read_data(model_args, data_args, ("class",), 0).sides["test"]
        collator = MapexCollator(MapexImageProcessor.from_pretrained(folder / "model"), label="crop")
        batches = [collator([chip]) for chip in chips]
        right = [int(model.eval()(**batch).logits.argmax()) == int(batch["labels"]) for batch in batches]
        assert np.mean(right) == pytest.approx(metrics["accuracy"])

    @pytest.mark.parametrize("label", ["flood", "biomass"])
    def test_trained_on_crops_and_measured_in_windows_of_their_size(self, options, tmp_path, label):
        metrics = run(options, tmp_path / "run", label, crop_size=8, max_steps=8, eval_steps=4)
        script = SCRIPTS[label]
        model_class = finetuning_tasks.MODEL_CLASSES[f"{script.__name__}.py"]
        model = model_class.from_pretrained(tmp_path / "run" / "model").eval()
        assert model.config.dense_window_metres == 80
        task = finetuning_tasks.open_task(f"{script.__name__}.py", json.loads((tmp_path / "run/run.json").read_text()))
        collator = MapexCollator(MapexImageProcessor.from_config(model.config), **task.collator_options)
        rows, farthest = [], 0.0
        for chip in task.data.sides["test"]:
            batch = collator([chip])
            labels = batch.pop("labels")
            logits = model.predict_map(**batch, output_size=labels.shape[-2:])
            at_once = model.predict_map(**batch, window_size=SIZE, output_size=labels.shape[-2:])
            farthest = max(farthest, (logits - at_once).abs().max().item())
            rows.append(task.rows(logits, labels))
        assert metrics == pytest.approx(task.scores.metrics(np.concatenate(rows), np.ones(len(rows))), rel=1e-4)
        assert farthest > 1e-3

    def test_windows_where_labels_are_the_finest(self, options, tmp_path):
        """A crop of 16 pixels of labels is one of 8 of the sensor."""

        def read_finer(item):
            sample = read(item)
            mask = sample.labels["flood"]
            sample.labels["flood"] = None if mask is None else mask.repeat(2, axis=0).repeat(2, axis=1)
            return sample

        shards = write(tmp_path / "shards", 48, read_finer)
        run(options, tmp_path / "run", "flood", shards=shards, crop_size=16, max_steps=2)
        config = MapexConfig.from_pretrained(tmp_path / "run" / "model")
        assert config.dense_window_metres == 80
        assert results_of(tmp_path / "run")["per_class"]["wet"]["pixels"] % 4 == 0

    def test_sensors_of_other_ground_are_found_before_training(self, options, tmp_path):
        """Crops take the same share of each; windows go by metres, and elevations of 30 m end elsewhere."""

        def read_wider(item):
            sample = read(item)
            sample.images["dem"] = Layer(sample.images["dem"].pixels, gsd=30.0)
            return sample

        shards = write(tmp_path / "shards", 48, read_wider)
        with pytest.raises(command_line.Stop, match=r"`s1` and `dem` cover .*160.0.* and .*240.0.* the same ground"):
            run(options, tmp_path / "run", "biomass", shards=shards, modalities=["s1", "dem"], crop_size=8)
        assert not (tmp_path / "run" / "checkpoints").exists()

    def test_trained_on_whole_samples_the_window_is_their_side(self, options, tmp_path):
        run(options, tmp_path / "run", "flood", max_steps=2, eval_steps=2)
        assert MapexConfig.from_pretrained(tmp_path / "run" / "model").dense_window_metres == 10 * SIZE

    @pytest.mark.parametrize("crop_size", [None, 8])
    def test_whole_numbers_and_samples_without_data(self, options, tmp_path, crop_size):
        """Heights in whole metres; radar that covers half of each sample, and nothing of some."""

        def read_half(item):
            sample = read(item)
            radar = sample.images["s1"].pixels.copy()
            radar[..., SIZE // 2 :] = np.nan
            if item.payload % 5 == 0:
                radar[:] = np.nan
            sample.images["s1"] = Layer(radar)
            sample.labels["height"] = sample.labels["biomass"].round().astype(np.int16)
            return sample

        labels = {**SCHEMA.labels, "height": {"kind": "map", "dtype": "int16", "unit": "m"}}
        folder = tmp_path / "shards"
        schema = ShardSchema(SCHEMA.modalities, labels)
        write_shards(items(60), read_half, schema, folder, progress=False)
        changes = {"shards": str(folder), "crop_size": crop_size, "max_steps": 4, "eval_steps": 4}
        metrics = run({**options, **changes, "modalities": ["s1", "dem"]}, tmp_path / "run", "height")
        assert all(np.isfinite(value) for value in metrics.values())
        with pytest.raises(command_line.Stop, match=r"^Sample `chip-\d+` has not one valid pixel of any sensor. Leave"):
            alone = {**options, **changes, "modalities": ["s1"], "crop_size": None, "num_workers": 1}
            run(alone, tmp_path / "alone", "height")
        with pytest.raises(command_line.Stop, match=r"None of 20 crops of 8 pixels out of sample|has not one valid"):
            run({**options, **changes, "modalities": ["s1"], "crop_size": 8}, tmp_path / "cropped", "height")

    @pytest.mark.parametrize("model_class", [MapexForSemanticSegmentation, MapexForPixelRegression])
    def test_labels_where_there_is_no_data(self, model_class):
        """Radar ends where the labels go on: those far from it are not predicted and do not count."""
        model = randomize(model_class(tiny_config(num_labels=3, dense_window_metres=160)))
        valid = torch.zeros(2, 16, 48, dtype=torch.bool)
        valid[..., :16] = True
        labels = torch.ones(2, 16, 48, dtype=torch.long if model_class is MapexForSemanticSegmentation else torch.float)
        batch = {"pixel_values": {"radar": torch.randn(2, 2, 16, 48)}, "valid_mask": {"radar": valid}, "labels": labels}
        logits, counted = finetuning_results.predict(model, batch)
        assert torch.equal(counted[..., :24], labels[..., :24])  # of windows that begin at 0 and 8
        ignored = counted[..., 24:] == 255 if labels.dtype == torch.long else torch.isnan(counted[..., 24:])
        assert ignored.all() and torch.isfinite(model.map_loss(logits, counted))

    def test_without_validation(self, options, tmp_path, capsys):
        metrics = run(options, tmp_path / "run", "crop", validation=0.0, max_steps=40)
        assert metrics["accuracy"] > 0.9 and "the last model is kept" in capsys.readouterr().out
        assert results_of(tmp_path / "run")["best_step"] == 40

    def test_named_splits(self, options, tmp_path, capsys):
        folder = tmp_path / "shards"
        write_shards(items(24), read, SCHEMA, folder, progress=False)
        write_shards(items(12, 60), read, SCHEMA, folder, split="test", progress=False)
        run(options, tmp_path / "run", "flood", shards=str(folder), test_split="test", test=None, max_steps=2)
        assert results_of(tmp_path / "run")["samples"]["test"] == 12
        assert "trained on as well" not in capsys.readouterr().out
        changes = {"validation_split": "train", "test_split": "test", "validation": None, "test": None, "max_steps": 2}
        run(options, tmp_path / "leaking", "biomass", shards=str(folder), **changes)
        assert "12 places of the split `train` are trained on as well" in capsys.readouterr().out

    def test_samples_of_several_sizes(self, options, tmp_path, capsys):
        shards = write(tmp_path / "shards", 48, read_larger)
        changes = {"shards": shards, "max_steps": 2}
        with pytest.raises(command_line.Stop, match=r"differ in size.*--crop_size"):
            run(options, tmp_path / "run", "flood", **changes)
        run(options, tmp_path / "run", "flood", **changes, crop_size=16)
        assert "they are evaluated one at a time" in capsys.readouterr().out


class TestFewSamples:
    def test_shots(self, options, tmp_path):
        run(options, tmp_path / "run", "crop", shots=2, max_steps=2)
        assert results_of(tmp_path / "run")["samples"]["train"] == 6

    def test_larger_draws_hold_smaller_ones(self, options):
        data_args = finetuning_options.DataArguments(
            **{key: options[key] for key in ("shards", "cache_dir", "split_seed", "validation", "test")}, label="crop"
        )
        model_args = finetuning_options.ModelArguments(model=options["model"], modalities=["s1"])
        chips = finetuning_data.read_data(model_args, data_args, ("class",), 0).sides["train"]
        small, large = (set(finetuning_data.draw_samples(chips, count, 1).column("id")) for count in (5, 20))
        other = set(finetuning_data.draw_samples(chips, 5, 2).column("id"))
        assert small < large and len(small) == 5 and other != small


class TestGoingOn:
    @pytest.mark.parametrize("label", ["crop", "biomass"])
    def test_after_a_stop(self, options, straight, tmp_path, capsys, label):
        """Between evaluations, and in the middle of an epoch."""
        changes, expected = AUGMENTED, straight[0]
        if label == "biomass":
            changes = {"method": "lora", "max_steps": 8, "eval_steps": 4}
            expected = tmp_path / "straight"
            run(options, expected, label, **changes)
        with pytest.raises(command_line.Stop, match=r"Stopped at step 6\. Run the same command again"):
            run(options, tmp_path / "run", label, **changes, stop_after=6)
        run(options, tmp_path / "run", label, **changes)
        assert "Going on from step 6." in capsys.readouterr().out
        model_class = MapexForImageClassification if label == "crop" else MapexForPixelRegression
        assert_same_run(expected, tmp_path / "run", model_class)

    def test_after_ctrl_c(self, options, straight, tmp_path, monkeypatch):
        step, handler = finetuning.Session.on_step_end, signal.getsignal(signal.SIGINT)

        def interrupt(self, args, state, control, **kwargs):
            if state.global_step == 11:
                signal.raise_signal(signal.SIGINT)
            step(self, args, state, control, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(finetuning.Session, "on_step_end", interrupt)
            with pytest.raises(command_line.Stop, match="Stopped at step 11"):
                run(options, tmp_path / "run", "crop", **AUGMENTED)
        assert signal.getsignal(signal.SIGINT) is handler
        run(options, tmp_path / "run", "crop", **AUGMENTED)
        assert_same_run(straight[0], tmp_path / "run")

    @pytest.mark.parametrize("method", ["full", "lora"])
    def test_after_a_kill_at_the_end(self, options, tmp_path, monkeypatch, method):
        """Of a run that had stopped early: training is over, and the best model is still the best."""
        changes = {"method": method, "patience": 1, "learning_rate": 0.0, "max_steps": 24, "eval_steps": 3}
        run(options, tmp_path / "straight", "crop", **changes)
        assert results_of(tmp_path / "straight")["steps"] == 6
        with monkeypatch.context() as patch:
            patch.setattr(finetuning.Finetuning, "finish", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(options, tmp_path / "run", "crop", **changes)
        run(options, tmp_path / "run", "crop", **changes)
        assert_same_run(tmp_path / "straight", tmp_path / "run")

    def test_after_a_kill_while_a_checkpoint_was_written(self, options, straight, tmp_path, capsys):
        """The one before is whole. Trainer writes its state last: a folder without it is no checkpoint."""
        with pytest.raises(command_line.Stop, match="Stopped at step 6"):
            run(options, tmp_path / "run", "crop", **AUGMENTED, stop_after=6)
        whole, half = (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (6, 7))
        shutil.copytree(whole, half)
        (half / "complete").unlink()
        (half / "trainer_state.json").unlink()
        run(options, tmp_path / "run", "crop", **AUGMENTED)
        printed = capsys.readouterr().out
        assert "checkpoint-7 is incomplete" in printed and "Going on from step 6." in printed
        assert_same_run(straight[0], tmp_path / "run")

    def test_other_classes_or_data_are_another_run(self, options, tmp_path):
        classes = tmp_path / "classes.yaml"
        classes.write_text("wet: [7]\ndry: [3]\n")
        changes = {"classes": str(classes), "max_steps": 4, "shards": write(tmp_path / "shards", 48)}
        with pytest.raises(command_line.Stop, match="Stopped at step 2"):
            run(options, tmp_path / "run", "flood", **changes, stop_after=2)
        classes.write_text("dry: [3]\nwet: [7]\n")
        with pytest.raises(command_line.Stop, match=r"other settings \(classes: \{'wet': \[7\], 'dry': \[3\]\} -> "):
            run(options, tmp_path / "run", "flood", **changes)
        classes.write_text("wet: [7]\ndry: [3]\n")
        (tmp_path / "moved").symlink_to(classes)
        run(options, tmp_path / "run", "flood", **{**changes, "classes": str(tmp_path / "moved")})
        write_shards(items(50), read, SCHEMA, tmp_path / "shards", overwrite=True, progress=False)
        with pytest.raises(command_line.Stop, match=r"other settings .shards_contents: "):
            run(options, tmp_path / "run", "flood", **changes)

    def test_patience_outlives_a_stop(self, options, tmp_path):
        """Evaluations without progress before the stop count."""
        changes = {"patience": 3, "learning_rate": 0.0, "max_steps": 60, "eval_steps": 2}
        with pytest.raises(command_line.Stop):
            run(options, tmp_path / "run", "crop", **changes, stop_after=6)
        run(options, tmp_path / "run", "crop", **changes)
        assert results_of(tmp_path / "run")["steps"] == 8  # best at 2, no better at 4, 6 and 8

    def test_best_model_is_kept(self, options, tmp_path):
        """With rates that rise until the model is spoilt."""
        changes = {"learning_rate": 2.4, "warmup": 0.99, "max_steps": 24, "eval_steps": 4, "max_grad_norm": 0.0}
        run(options, tmp_path / "run", "crop", **changes, best_metric="loss", head="random")
        results = results_of(tmp_path / "run")
        assert results["best_step"] < results["steps"] == 24
        assert results["validation"]["loss"] < 2

    def test_finished(self, options, straight, capsys):
        """Nothing is run again, and the metrics are given."""
        assert run(options, straight[0], "crop", **AUGMENTED) == straight[1]
        assert "is finished" in capsys.readouterr().out
        with pytest.raises(command_line.Stop, match="hf upload me/model"):
            run(options, straight[0], "crop", **AUGMENTED, push_to_hub="me/model")

    def test_other_settings_and_overwrite(self, options, tmp_path):
        changes = {"max_steps": 2, "eval_steps": 2}
        run(options, tmp_path / "run", "crop", **changes)
        with pytest.raises(command_line.Stop, match=r"other settings \(learning_rate: 0.003 -> 0.1\)"):
            run(options, tmp_path / "run", "crop", **changes, learning_rate=0.1)
        own = [tmp_path / "run" / name for name in ("notes.json", "map.png")]
        for file in own:
            file.write_text("mine")
        run(options, tmp_path / "run", "crop", **changes, learning_rate=0.1, overwrite=True)
        assert all(file.read_text() == "mine" for file in own)
        assert results_of(tmp_path / "run")["settings"]["learning_rate"] == 0.1


SHORT = {"max_steps": 3, "eval_steps": 3}


class TestWhatIsTrained:
    def pruned(self, options, **plan) -> MapexForImageClassification:
        return MapexForImageClassification.from_pretrained(options["model"], modalities=["s1"], num_labels=4, **plan)

    def test_pruned_while_loading_is_pruned_before(self, options, tmp_path):
        whole = MapexForPreTraining.from_pretrained(options["model"])
        whole.prune_for_modalities(["s1"], experts_per_layer=2).save_pretrained(tmp_path / "pruned")
        run(options, tmp_path / "one", "crop", **SHORT, head="random", experts_per_layer=[2])
        pruned = {"model": str(tmp_path / "pruned"), "keep_all": True}
        run(options, tmp_path / "other", "crop", **SHORT, head="random", **pruned)
        expected, weights = weights_of(tmp_path / "one"), weights_of(tmp_path / "other")
        assert expected.keys() == weights.keys()
        for name, tensor in expected.items():
            # They begin equal, but lie at other addresses, and products of unaligned matrices round differently; Adam
            # makes steps of that where a gradient is zero, as of biases of keys. Training changes weights by 1e-2.
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
        assert results_of(tmp_path / "one")["metrics"] == results_of(tmp_path / "other")["metrics"]

    def test_whole_model_on_some_of_its_sensors(self, options, tmp_path):
        run(options, tmp_path / "run", "crop", **SHORT, keep_all=True)
        config = MapexConfig.from_pretrained(tmp_path / "run" / "model")
        assert list(config.modalities) == ["dem", "s1", "s2"] and results_of(tmp_path / "run")["experts"] == [4, 4]

    def test_bands(self, options, tmp_path):
        changes = {"modalities": ["s2"], "rename": ["optical=s2"], "bands": ["s2=B04,B02"], **SHORT}
        run(options, tmp_path / "run", "crop", **changes)
        config = MapexConfig.from_pretrained(tmp_path / "run" / "model")
        assert config.modalities["s2"]["bands"] == ["B04", "B02"]

    @pytest.mark.parametrize("label", ["crop", "cover"])
    def test_head_begins_as_a_regression(self, options, tmp_path, label):
        """Of scikit-learn, on the features of the pretrained encoder; at once as good as training makes it."""
        linear = pytest.importorskip("sklearn.linear_model", reason="the reference is scikit-learn")
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        still = {"method": "frozen", "learning_rate": 1e-12, "weight_decay": 0.0, "max_steps": 1, "eval_steps": 1}
        metrics = run(options, tmp_path / "run", label, **still)
        assert metrics["accuracy" if label == "crop" else "mean_average_precision"] == 1.0
        model = MapexForImageClassification.from_pretrained(tmp_path / "run" / "model")
        settings = {**options, "label": label}
        sides = finetuning_tasks.open_task("run_image_classification.py", settings).data.sides
        collator = MapexCollator(MapexImageProcessor.from_config(model.config), label=label)
        parts = {}
        for side in ("train", "validation"):
            batch = collator(sides[side].__getitems__(list(range(len(sides[side])))))
            labels = batch.pop("labels").numpy()
            with torch.no_grad():
                parts[side] = (
                    model.mapex(**batch).pooler_output.double().numpy(),
                    labels,
                    model(**batch).logits.double(),
                )
        values, targets, logits = parts["train"]
        probabilities = (logits.softmax(dim=1) if label == "crop" else logits.sigmoid()).numpy()
        best = []
        for column in range(1 if label == "crop" else 2):
            of = slice(None) if label == "crop" else (slice(None), column)
            fitted = {}
            for strength in finetuning_head.STRENGTHS:
                regression = make_pipeline(StandardScaler(), linear.LogisticRegression(C=strength, max_iter=1000))
                expected = regression.fit(values, targets[of]).predict_proba(values)
                shown = (
                    probabilities[:, :3]
                    if label == "crop"
                    else np.stack([1 - probabilities, probabilities])[..., column].T
                )
                fitted[strength] = np.abs(shown - expected).max()
            best.append(min(fitted, key=fitted.get))
            assert fitted[best[-1]] < 1e-3
        assert len(set(best)) == 1

    def test_head_of_a_run_that_begins_anew(self, options, tmp_path, capsys):
        run(options, tmp_path / "run", "crop", **SHORT)
        run(options, tmp_path / "run", "crop", **SHORT, head="random", overwrite=True)
        assert capsys.readouterr().out.count("The head begins as a logistic regression on") == 1
        with pytest.raises(command_line.Stop, match="Stopped at step 2"):
            run(options, tmp_path / "run", "crop", **SHORT, overwrite=True, stop_after=2)
        capsys.readouterr()
        run(options, tmp_path / "run", "crop", **SHORT)
        assert "The head begins" not in capsys.readouterr().out  # the one of the checkpoint goes on
        run(options, tmp_path / "run", "crop", **SHORT, overwrite=True)
        assert "The head begins" in capsys.readouterr().out

    def test_going_on_with_a_fine_tuned_model(self, options, tmp_path, capsys):
        """Its head, where the labels are as many; never the class weights of the task before."""
        first = tmp_path / "first"
        run(options, first, "crop", **SHORT, class_weights=["balanced"])
        assert MapexConfig.from_pretrained(first / "model").class_weights is not None
        capsys.readouterr()
        changes = {**SHORT, "model": str(first / "model"), "learning_rate": 0.0, "head": "random"}
        run(options, tmp_path / "second", "crop", **changes)
        assert "Going on with the head of" in capsys.readouterr().out
        assert MapexConfig.from_pretrained(tmp_path / "second" / "model").class_weights is None
        weights = [weights_of(folder)["classifier.weight"] for folder in (first, tmp_path / "second")]
        assert torch.equal(*weights)
        run(options, tmp_path / "third", "cover", **changes)
        assert "is for another number of labels: a new one is trained" in capsys.readouterr().out
        third = weights_of(tmp_path / "third")
        assert third["classifier.weight"].shape[0] == 2
        assert all(torch.equal(third[name], value) for name, value in weights_of(first).items() if "mapex." in name)
        with pytest.raises(command_line.Stop, match=r"do not fit the configuration: \['mapex\..*--config_overrides"):
            run(options, tmp_path / "fourth", "crop", **changes, config_overrides={"intermediate_size": 48})
        capsys.readouterr()
        run(options, tmp_path / "fifth", "crop", **changes, from_scratch=True)
        assert "Going on" not in capsys.readouterr().out
        assert not torch.equal(weights[0], weights_of(tmp_path / "fifth")["classifier.weight"])

    @pytest.mark.parametrize("method", ["frozen", "lora"])
    def test_a_sensor_that_the_model_lacks(self, options, tmp_path, method):
        """A second pass of radar, which half of the samples have: it begins as the first one, and with its own patch
        embedding learns to differ, whatever else is trained.
        """
        passes = ShardSchema({**SCHEMA.modalities, "s1_descending": SCHEMA.modalities["s1"]}, SCHEMA.labels)

        def read_passes(item: Item) -> Sample:
            sample = read(item)
            image = sample.images["s1"] if item.payload % 2 else None
            return Sample(sample.id, sample.place, {**sample.images, "s1_descending": image}, sample.labels)

        write_shards(items(40), read_passes, passes, tmp_path / "shards", progress=False)
        changes = {"shards": str(tmp_path / "shards"), "modalities": ["s1", "s1_descending"], **SHORT}
        changes["add"] = ["s1_descending=s1"]
        run(options, tmp_path / "run", "crop", **changes, method=method, bands=["s1=VH"])
        model = MapexForImageClassification.from_pretrained(tmp_path / "run" / "model").eval()
        assert {name: spec["bands"] for name, spec in model.config.modalities.items()} == {
            "s1": ["VH"],
            "s1_descending": ["VH"],
        }
        source = MapexForImageClassification.from_pretrained(options["model"], modalities={"s1": ["VH"]}, num_labels=4)
        pixels = torch.randn(2, 1, 16, 16)
        with torch.no_grad():
            tokens = [source.mapex({"s1": pixels}), model.mapex({"s1_descending": pixels})]
            one, other = (
                model({"s1": first, "s1_descending": second}).logits
                for first, second in ((pixels, -pixels), (-pixels, pixels))
            )
        assert (tokens[1].last_hidden_state - tokens[0].last_hidden_state).abs().max() > 1e-3
        assert (one - other).abs().max() > 1e-4  # the passes are no longer interchangeable
        changed = {
            name
            for name, value in model.mapex.state_dict().items()
            if name in source.mapex.state_dict()
            and not torch.equal(value, source.mapex.state_dict()[name])
            and "embeddings.modality" not in name
            and "modality_" not in name
        }
        assert not changed if method == "frozen" else changed  # but for rows by sensor, which are more
        copy = model.mapex.state_dict()["embeddings.patch_embeddings.s1_descending.projection.weight"]
        first = source.mapex.state_dict()["embeddings.patch_embeddings.s1.projection.weight"]
        assert copy.shape == first.shape and not torch.equal(copy, first)

    def test_frozen_encoder_stays(self, options, tmp_path):
        run(options, tmp_path / "run", "flood", **SHORT, method="frozen")
        weights, source = weights_of(tmp_path / "run", MapexForSemanticSegmentation), self.pruned(options).state_dict()
        encoder = [name for name in source if name.startswith("mapex.")]
        assert encoder and all(torch.equal(weights[name], source[name]) for name in encoder)
        parameters = results_of(tmp_path / "run")["parameters"]
        assert 0 < parameters["trained"] < parameters["all"]

    def test_from_scratch(self, options, tmp_path):
        run(options, tmp_path / "run", "crop", **SHORT, from_scratch=True)
        loaded = MapexForImageClassification.from_pretrained(tmp_path / "run" / "model")
        source = self.pruned(options)
        assert loaded.config.expert_ids == source.config.expert_ids and loaded.config.pruning is None
        assert "pruned from" not in (tmp_path / "run" / "model" / "README.md").read_text()
        name = "mapex.layers.0.attention.q_proj.weight"
        assert (loaded.state_dict()[name] - source.state_dict()[name]).abs().mean() > 0.05

    def test_layer_decay(self):
        model = MapexForImageClassification(tiny_config(num_labels=3))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = finetuning_model.parameter_groups(model, 4, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
        found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
        assert found.keys() == set(names.values())
        for name, rate in {
            "mapex.embeddings.patch_embeddings.radar.projection.weight": 0.5**5,
            "mapex.layers.0.attention.q_proj.weight": 0.5**4,
            "mapex.layers.1.mlp.experts.up_proj": 0.5**3,
            "mapex.layers.3.mlp.gate.weight": 0.5,
            "mapex.layernorm.weight": 1.0,
            "classifier.weight": 1.0,
        }.items():
            assert found[name]["lr"] == rate, name
        undecayed = {name for name, group in found.items() if group["weight_decay"] == 0}
        assert {"classifier.bias", "mapex.layernorm.weight", "mapex.layers.1.mlp.experts.up_proj_bias"} <= undecayed
        assert {"classifier.weight", "mapex.layers.1.mlp.experts.down_proj"}.isdisjoint(undecayed)

    def test_adapters_change_experts_and_merge(self):
        """One mixture of two experts, and one that was pruned to a plain MLP."""
        pytest.importorskip("peft", reason="adapters need the extra `lora`")
        model = MapexForImageClassification(tiny_config(num_labels=3, expert_ids=[[0, 1], [2]], initializer_range=0.1))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapted = finetuning_model.choose_trained(model, finetuning_options.ModelArguments(method="lora", lora_rank=4))
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        groups = finetuning_model.parameter_groups(adapted, 4, learning_rate=0.01, layer_decay=0.5, weight_decay=0.0)
        assert sum(len(group["params"]) for group in groups) == len(trained)
        assert {group["lr"] for group in groups} == {0.01}  # neither adapters nor the head are slowed down
        optimizer, inputs = torch.optim.AdamW(groups), tiny_inputs(batch_size=6)
        for _ in range(2):
            adapted(inputs, labels=torch.tensor([0, 1, 2] * 2)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = adapted.eval()(inputs).logits
        merged = adapted.merge_and_unload()
        assert type(merged) is MapexForImageClassification
        torch.testing.assert_close(merged(inputs).logits, expected, rtol=1e-4, atol=1e-5)
        after = merged.state_dict()
        assert after.keys() == before.keys()
        changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        for name in ("up_proj", "down_proj"):
            assert f"mapex.layers.3.mlp.{name}.weight" in changed
            difference = after[f"mapex.layers.1.mlp.experts.{name}"] - before[f"mapex.layers.1.mlp.experts.{name}"]
            assert (difference.abs().amax(dim=(1, 2)) > 0).all()  # of each of the two experts
            for expert in difference:
                assert torch.linalg.matrix_rank(expert, atol=1e-5) <= 4
        assert {"mapex.layers.0.attention.q_proj.weight", "classifier.weight"} <= changed
        assert not any("gate" in name or "embeddings" in name or "layernorm" in name for name in changed)

    @pytest.mark.parametrize("experts, bf16", [([2, 1], False), ([2, 1], True), ([1], True)])
    def test_adapters_with_checkpointing_and_workers(self, options, tmp_path, experts, bf16):
        pytest.importorskip("peft", reason="adapters need the extra `lora`")
        changes = {"method": "lora", "gradient_checkpointing": True, "num_workers": 1, "bf16": bf16}
        run(options, tmp_path / "run", "crop", **SHORT, **changes, experts_per_layer=experts)
        weights, source = weights_of(tmp_path / "run"), self.pruned(options, experts_per_layer=experts[-1]).state_dict()
        name = "mapex.layers.3.mlp.up_proj.weight"
        assert not torch.equal(weights[name], source[name])
        name = "mapex.layers.0.layernorm_before.weight"
        assert torch.equal(weights[name], source[name])
        assert results_of(tmp_path / "run")["parameters"]["all"] == sum(weight.numel() for weight in weights.values())


class TestScores:
    """Against scikit-learn, on random data with weights."""

    generator = np.random.default_rng(0)
    weights = np.random.default_rng(1).integers(0, 4, 60).astype(float)

    def test_one_label(self):
        metrics = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")
        labels, logits = self.generator.integers(0, 4, 60), torch.from_numpy(self.generator.normal(size=(60, 5)))
        scores = run_image_classification.SingleLabelScores(5)
        found = scores.metrics(scores.rows(logits, torch.from_numpy(labels)).numpy(), self.weights)
        options = {"y_true": labels, "y_pred": logits.argmax(dim=1).numpy(), "sample_weight": self.weights}
        assert found["accuracy"] == pytest.approx(metrics.accuracy_score(**options))
        f1 = metrics.f1_score(**options, labels=range(4), average="macro")  # the classes that occur
        assert found["macro_f1"] == pytest.approx(f1)

    def test_several_labels(self):
        metrics = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")
        targets = self.generator.integers(0, 2, (60, 3)).astype(float)
        logits = self.generator.normal(size=(60, 3)).round(1)  # with ties
        scores = run_image_classification.MultiLabelScores(3)
        table = scores.rows(torch.from_numpy(logits), torch.from_numpy(targets)).numpy()
        found = scores.metrics(table, self.weights)
        expected = metrics.average_precision_score(targets, logits, sample_weight=self.weights)
        assert found["mean_average_precision"] == pytest.approx(expected)
        for kind in ("macro", "micro"):
            expected = metrics.f1_score(targets, logits > 0, average=kind, sample_weight=self.weights)
            assert found[f"{kind}_f1"] == pytest.approx(expected)

    def test_masks(self):
        """The whole of an ignored mask changes nothing; a class that does not occur is not averaged."""
        metrics = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")
        labels = self.generator.integers(0, 3, (6, 5, 5))
        predictions = self.generator.integers(0, 4, (6, 5, 5))
        labels[2], labels[:, 0] = 255, 255
        counted = labels != 255
        scores = run_semantic_segmentation.SegmentationScores(4)
        table = scores.rows(torch.from_numpy(predictions), torch.from_numpy(labels)).numpy()
        found = scores.metrics(table, np.ones(6))
        options = {"y_true": labels[counted], "y_pred": predictions[counted]}
        expected = metrics.jaccard_score(**options, labels=range(3), average="macro")
        assert found["mean_iou"] == pytest.approx(expected)
        assert found["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(**options))
        with_nothing = scores.metrics(table[2:3], np.ones(1))
        assert with_nothing == {}

    def test_maps(self):
        metrics = pytest.importorskip("sklearn.metrics", reason="the reference is scikit-learn")
        labels = self.generator.normal(3000, 10, (6, 4, 4)).astype(np.float32)
        predictions = (labels + self.generator.normal(1, 3, labels.shape)).astype(np.float32)
        labels[1], labels[:, 0, 0] = np.nan, np.nan
        known = ~np.isnan(labels)
        scores = run_pixel_regression.RegressionScores()
        table = scores.rows(torch.from_numpy(predictions), torch.from_numpy(labels)).numpy()
        found = scores.metrics(table, np.ones(6))
        truth, predicted = labels[known].astype(float), predictions[known].astype(float)
        assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(truth, predicted))
        assert found["mae"] == pytest.approx(metrics.mean_absolute_error(truth, predicted))
        assert found["r2"] == pytest.approx(metrics.r2_score(truth, predicted), rel=1e-4)
        assert found["bias"] == pytest.approx((predicted - truth).mean())

    def test_intervals_resample_places(self):
        """Samples of a place come and go together: with two in each, the interval is that of half as many."""
        scores = run_image_classification.SingleLabelScores(2)
        right = np.random.default_rng(2).random(400) < 0.8
        table = np.stack([np.ones(400), right], axis=1).astype(float)
        (low, high), (wide_low, wide_high) = (
            finetuning_results.intervals(scores, np.repeat(table, 2, axis=0), places, 2000)["accuracy"]
            for places in (np.arange(800), np.repeat(np.arange(400), 2))
        )
        assert low < right.mean() < high
        spread = 2 * 1.96 * (right.mean() * (1 - right.mean()) / 400) ** 0.5
        assert wide_high - wide_low == pytest.approx(spread, rel=0.15)
        assert (wide_high - wide_low) / (high - low) == pytest.approx(2**0.5, rel=0.15)
        assert finetuning_results.intervals(scores, table, np.zeros(400), 100) == {}

    def test_balanced_weights(self):
        weights = np.array(finetuning_results.balanced_weights(np.array([10, 30, 0])))
        assert weights.tolist() == pytest.approx([2.0, 2 / 3, 0.0])


class TestClasses:
    """Of masks."""

    def choose(self, given, found, **spec):
        data = finetuning_data.Data("clc", {"kind": "mask", "dtype": "uint8", **spec}, {}, {}, MapexConfig())
        return run_semantic_segmentation.choose_classes(given, data, found)

    def test_of_the_shards(self):
        names, codes = self.choose(None, {3, 7, 0}, names=[[3, "dry"], [7, "wet"], [0, "cloud"]], ignore_index=0)
        assert names == ["dry", "wet"] and codes == {3: 0, 7: 1, 0: None}

    def test_of_a_file(self, tmp_path):
        file = tmp_path / "classes.yaml"
        file.write_text("water: [5, 6]\nother: rest\nignore: 0\n")
        names, codes = self.choose(str(file), {0, 1, 2, 5, 255}, ignore_index=255)
        assert names == ["water", "other"] and codes == {5: 0, 6: 0, 0: None, 1: 1, 2: 1, 255: None}

    @pytest.mark.parametrize(
        "given, message",
        [
            ({"a": [1], "b": [2]}, r"holds the codes \[3\], which have no class"),
            ({"a": [1, 2], "b": [2, 3]}, "`b` holds 2; codes are whole numbers, each in one class"),
            ({"a": "rest", "b": "rest"}, "Only one"),
            ({"a": [1, 2, 3]}, "two classes or more"),
            (None, "do not name the classes"),
        ],
    )
    def test_that_cannot_be(self, given, message):
        with pytest.raises(command_line.Stop, match=message):
            self.choose(given, {1, 2, 3})

    def test_of_options(self, options, tmp_path):
        run(options, tmp_path / "run", "codes", classes={"wet": [7], "dry": 3, "ignore": "rest"}, max_steps=2)
        described = results_of(tmp_path / "run")["per_class"]
        samples = results_of(tmp_path / "run")["samples"]["test"]
        assert sum(row["pixels"] for row in described.values()) == samples * SIZE * (SIZE - 1)


class TestStops:
    """Each before any training, with a message that says what to do."""

    @pytest.mark.parametrize(
        "label, changes, message",
        [
            ("crop", {"shards": None}, "give --shards"),
            ("crop", {"shards": "nowhere"}, "neither a folder nor the id of a data set"),
            ("crop", {"train_split": "training"}, "No shards of the split `training`.*'train'"),
            ("crop", {"label": "height"}, "has no label `height`.*'crop': 'class'"),
            ("crop", {"label": "flood"}, "is of kind mask.*use run_semantic_segmentation.py"),
            ("crop", {"label": None}, "does not have one label of the kind class or multi_label"),
            ("crop", {"model": "nowhere/at/all"}, "nowhere"),
            ("crop", {"modalities": ["s1", "landsat"]}, r"has no \['landsat'\]. It has \['dem', 's1', 's2'\]"),
            ("crop", {"modalities": ["s2"]}, r"has no \['s2'\]. It has \['s1', 'optical', 'dem'\].*--rename"),
            ("crop", {"rename": ["s3=s2"]}, r"--rename names \['s3'\]"),
            ("crop", {"rename": ["optical=s5"]}, r"--rename makes \['s5'\]"),
            ("crop", {"rename": ["optical"]}, "--rename takes name=value"),
            ("crop", {"add": ["s9=s8"]}, r"`like` must be one of \['dem', 's1', 's2'\], got `s8`"),
            ("crop", {"add": ["dem=s1"]}, "There is a modality `dem` already"),
            ("crop", {"add": ["s1_b=s2"]}, r"--add makes \['s1_b'\] of \['s2'\], and both must be among"),
            ("crop", {"bands": ["dem=elevation"]}, r"--bands names \['dem'\]"),
            ("crop", {"bands": ["s1=VV,HH"]}, r"--bands names \['HH'\] of `s1`"),
            ("crop", {"keep_all": True, "bands": ["s1=VV"]}, "leave out --bands"),
            ("crop", {"keep_all": True, "coverage": 0.9}, r"--keep_all does not prune, but \['coverage'\]"),
            ("crop", {"experts_per_layer": [9]}, "holds 4 experts; cannot keep 9"),
            ("crop", {"criterion": "best"}, "Unknown criterion `best`"),
            ("crop", {"validation": 0.5, "test": 0.5}, "leave something to train on"),
            ("crop", {"test": 0.0}, "Nothing is left to test on.*35 places.*--test_split"),
            ("crop", {"keep_all": True, "convnet": True}, "--convnet is trained whole"),
            ("crop", {"coverage": 0.9, "convnet": True}, "and what says how to prune"),
            ("crop", {"lora_rank": 4}, "--lora_rank and --lora_alpha are for --method lora, not full"),
            ("crop", {"batch_size": 0}, "--batch_size must be at least 1, got 0"),
            ("crop", {"eval_steps": 0}, "--eval_steps must be at least 1, got 0"),
            ("crop", {"warmup": 30.0}, "--warmup is a share of the steps"),
            (
                "crop",
                {"test_split": "test", "test": 0.2},
                "--test is a share of --train_split, and --test_split another",
            ),
            ("crop", {"train_samples": 1000}, "--train_samples 1000, but there are"),
            ("crop", {"shots": 0}, "--shots must be at least 1"),
            ("cover", {"shots": 5}, "use --train_samples"),
            ("cover", {"class_weights": "balanced"}, "--class_weights are for one label"),
            ("crop", {"class_weights": ["1", "2"]}, "a number for each of"),
            ("crop", {"crop_size": 50}, "Sample `chip-.*Cannot cut 50 pixels"),
            ("crop", {"config_overrides": "{dropout: 1}"}, "--config_overrides is no JSON"),
            ("crop", {"config_overrides": "[]"}, "--config_overrides must be a mapping"),
            ("crop", {"config_overrides": {"modalities": {}}}, r"--config_overrides cannot change \['modalities'\]"),
            ("crop", {"config_overrides": {"hidden_dropout_prob": "much"}}, "hidden_dropout_prob"),
            ("flood", {"config_overrides": {"semantic_loss_ignore_index": 0}}, "semantic_loss_ignore_index"),
            ("crop", {"config_overrides": {"dropout": 1}}, r"--config_overrides names \['dropout'\]"),
            ("crop", {"convnet": True, "head": "probe"}, "--head probe is for the features of MAPEX"),
            ("crop", {"best_metric": "mean_iou"}, "no metric `mean_iou`.*accuracy"),
            ("flood", {"classes": {"dry": [3], "snow": [4]}}, r"holds the codes \[7\]"),
            ("flood", {"classes": {"a": [1], "b": [2], "ignore": "rest"}}, "all are ignored"),
            ("flood", {"classes": "nowhere.yaml"}, "Cannot read nowhere.yaml"),
            ("codes", {}, r"do not name the classes of `codes`, which holds the codes \[-1, 3, 7\]"),
            ("crop", {"lerning_rate": 1.0}, "lerning_rate"),
            ("crop", {"report_to": ["trackio_2"]}, "--report_to trackio_2: not known or not installed"),
        ],
    )
    def test_options(self, options, tmp_path, label, changes, message):
        with pytest.raises(command_line.Stop, match=message):
            run(options, tmp_path / "run", label, **changes)
        assert not (tmp_path / "run" / "run.json").exists()  # the mended command is not taken for another run

    def test_unknown_option(self, capsys):
        with pytest.raises(SystemExit):
            command_line.parse_arguments((finetuning_options.ModelArguments,), "", ["--modell", "a"])
        assert "unknown options: --modell a" in capsys.readouterr().err

    def test_file_of_options(self, tmp_path):
        with pytest.raises(command_line.Stop, match=r"Cannot read nowhere\.yaml"):
            command_line.parse_arguments((finetuning_options.ModelArguments,), "", ["nowhere.yaml"])
        (tmp_path / "list.yaml").write_text("- 1")
        with pytest.raises(command_line.Stop, match="must hold a mapping"):
            command_line.parse_arguments((finetuning_options.ModelArguments,), "", [str(tmp_path / "list.yaml")])

    def test_folder_with_something_else(self, options, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.tex").touch()
        with pytest.raises(command_line.Stop, match=r"holds something else than a run \(\['thesis.tex'\]\)"):
            run(options, tmp_path / "run", "crop", overwrite=True)

    def test_folder_that_cannot_be_written(self, options, tmp_path):
        (tmp_path / "run").touch()
        with pytest.raises(command_line.Stop, match="Cannot write to --output_dir"):
            run(options, tmp_path / "run", "crop")

    def test_single_sample(self, options, tmp_path):
        with pytest.raises(command_line.Stop, match="1 usable samples of 1 places"):
            run(options, tmp_path / "run", "crop", shards=write(tmp_path / "shards", 1))

    def test_no_sample_with_the_label(self, options, tmp_path):
        def unlabelled(item):
            sample = read(item)
            sample.labels["crop"] = None
            return sample

        shards = write(tmp_path / "shards", 4, unlabelled)
        with pytest.raises(command_line.Stop, match=r"No sample of the split `train`.* has `crop`"):
            run(options, tmp_path / "run", "crop", shards=shards)

    def test_labels_out_of_range(self, options, tmp_path, monkeypatch):
        """Of shards that another program has written."""
        monkeypatch.setattr(finetuning_data.Chips, "labels", lambda self: iter([0, 7] * (len(self) // 2)))
        with pytest.raises(command_line.Stop, match=r"`crop` holds \[7\], but the shards name 4 classes"):
            run(options, tmp_path / "run", "crop")

    @pytest.mark.parametrize(
        "value, message", [(np.inf, "holds infinite values"), (5.0, "is 5 in all training"), (-1.0, "No pixel of the")]
    )
    def test_maps_that_cannot_be_learnt(self, options, tmp_path, value, message):
        def constant(item):
            sample = read(item)
            sample.labels["biomass"][:] = value
            return sample

        with pytest.raises(command_line.Stop, match=message):
            run(options, tmp_path / "run", "biomass", shards=write(tmp_path / "shards", 24, constant))

    def test_pruned_checkpoint(self, options, tmp_path):
        whole = MapexForPreTraining.from_pretrained(options["model"])
        whole.prune_for_modalities(["s1"]).save_pretrained(tmp_path / "pruned")
        with pytest.raises(command_line.Stop, match=r"has no \['dem'\]. It has \['s1'\]. It was pruned"):
            run(options, tmp_path / "run", "crop", model=str(tmp_path / "pruned"), modalities=["dem"])

    def test_uncalibrated_checkpoint(self, options, tmp_path):
        whole = MapexForPreTraining.from_pretrained(options["model"])
        whole.config.expert_statistics = None
        whole.save_pretrained(tmp_path / "uncalibrated")
        with pytest.raises(command_line.Stop, match="No expert statistics"):
            run(options, tmp_path / "run", "crop", model=str(tmp_path / "uncalibrated"))


def test_command_line_and_the_hub(options, tmp_path):
    """Shards from the Hub, by options of the command line, and a model to it, which predicts the same without the
    package.
    """
    with HubServer(tmp_path / "server") as hub:
        files = {file.name: file.read_bytes() for file in Path(options["shards"]).iterdir()}
        hub.put("me/chips", files, kind="dataset")
        environment = hub.environment(tmp_path / "home")
        given = {key: options[key] for key in ("model", "modalities", "split_seed", "batch_size")}
        given |= {"shards": "me/chips", "label": "crop", "max_steps": 2, "output_dir": "run", "push_to_hub": "me/crops"}
        argv = [str(word) for key, value in given.items() for word in (f"--{key}", *np.atleast_1d(value))]
        train = f"""
            import sys
            sys.path.insert(0, {str(EXAMPLES)!r})
            import run_image_classification as script
            from command_line import *
            from finetuning_options import *
            kinds = (ModelArguments, DataArguments, script.ClassificationArguments, FinetuningArguments)
            print(script.main(*parse_arguments(kinds, script.__doc__, {argv!r})))
        """
        assert "{'accuracy': " in run_python(train, tmp_path, environment)
        predict = """
            import torch
            from safetensors.torch import save_file
            from transformers import AutoModelForImageClassification
            model = AutoModelForImageClassification.from_pretrained("me/crops", trust_remote_code=True)
            pixels = torch.linspace(-2, 2, 512).view(1, 2, 16, 16)
            save_file({"logits": model({"s1": pixels}).logits}, "logits.safetensors")
        """
        run_python(predict, tmp_path, environment, package=False)
        card = ModelCard(hub.read("me/crops", "README.md").decode())
    model = MapexForImageClassification.from_pretrained(tmp_path / "run" / "model")
    pixels = torch.linspace(-2, 2, 512).view(1, 2, 16, 16)
    torch.testing.assert_close(model({"s1": pixels}).logits, load_file(tmp_path / "logits.safetensors")["logits"])
    metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert metrics == results_of(tmp_path / "run")["metrics"] and card.data.datasets == ["me/chips"]


class TestConvNet:
    """What the evaluation compares with goes through the same run."""

    @pytest.mark.parametrize(("task", "metric", "least"), [("crop", "accuracy", 0.9), ("flood", "mean_iou", 0.8)])
    def test_learns(self, options, tmp_path, task, metric, least):
        few = {"max_steps": 60, "eval_steps": 20, "train_samples": 32}  # batches of eight: it normalises over them
        metrics = run({**options, **few}, tmp_path / "run", task, convnet=True)
        assert metrics[metric] > least
        results = results_of(tmp_path / "run")
        assert results["parameters"]["all"] == results["parameters"]["trained"] > 1_000_000

    def test_is_not_pruned_or_frozen(self, options, tmp_path):
        with pytest.raises(command_line.Stop, match="--convnet is trained whole"):
            run(options, tmp_path / "run", "crop", convnet=True, method="frozen")
        with pytest.raises(command_line.Stop, match="no code to push"):
            run(options, tmp_path / "other", "crop", convnet=True, push_to_hub="me/convnet")
