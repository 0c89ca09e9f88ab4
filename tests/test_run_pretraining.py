"""examples/run_pretraining.py from shards to a model: what it writes, that it goes on exactly, and how it stops."""

import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import HubServer
from shard_samples import SCHEMA, items, read


pytest.importorskip("accelerate", reason="pretraining needs the extras `data` and `train`")
pytest.importorskip("torchdata", reason="pretraining needs the extras `data` and `train`")

from modeling_mapex import MapexConfig, MapexForPreTraining, MapexImageProcessor, writing_mapex
from modeling_mapex.data_mapex import split_of_place
from modeling_mapex.writing_mapex import write_shards


EXAMPLES = Path(__file__).parent.parent / "examples"

import run_pretraining  # noqa: E402


OVERRIDES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "num_experts": 4,
}
SETTINGS = {
    "preset": "nano",
    "modalities": {"s1": None, "s2": ["B04", "B03", "B02"], "dem": None},
    "config_overrides": OVERRIDES,
    "held_out": 0.3,
    "split_seed": 1,
    "crop_size": 24,
    "per_device_batch_size": 8,
    "max_steps": 6,
    "warmup_steps": 2,
    "base_learning_rate": 0.03,
    "logging_steps": 1,
    "evaluation_steps": 3,
    "checkpoint_steps": 2,
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("shards") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing_mapex, "_ROW_GROUP_BYTES", 20_000)
        for folder, count, size in zip(folders, (40, 15), (100_000, 1 << 30)):
            write_shards(items(count), read, SCHEMA, folder, shard_bytes=size, overwrite=True, progress=False)
    assert len(list(folders[0].glob("*.parquet"))) > 2
    return [str(folder) for folder in folders]


def parse_arguments(argv: list[str]) -> tuple:
    kinds = (run_pretraining.ModelArguments, run_pretraining.DataArguments, run_pretraining.PretrainingArguments)
    return run_pretraining.parse_arguments(kinds, run_pretraining.__doc__, argv)


def settings_file(folder: Path, shards, **changes) -> str:
    file = folder / "settings.json"
    file.write_text(json.dumps({**SETTINGS, "sources": shards, "weights": [2.0, 1.0], **changes}))
    return str(file)


def start(
    settings: str, output_dir: Path, *arguments: str, processes: int = 1, environment=os.environ
) -> subprocess.Popen:
    script = [str(EXAMPLES / "run_pretraining.py"), settings, "--output_dir", str(output_dir), *arguments]
    command = [sys.executable, *script]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, *script]
    environment = {**environment, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(*args, code: int = 0, **options) -> str:
    process = start(*args, **options)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output[-4000:]
    return output


def log_of(output_dir: Path) -> list[dict]:
    """All that was logged but for times."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "throughput" not in name} for line in lines]


def weights_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return MapexForPreTraining.from_pretrained(output_dir / "model").state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    assert log_of(one) == log_of(other)
    expected, weights = weights_of(one), weights_of(other)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    """A run that nothing interrupts, and what it printed."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(settings_file(folder, shards), folder)


class TestWhatIsWritten:
    def test_model(self, straight):
        folder, output = straight
        model = MapexForPreTraining.from_pretrained(folder / "model")
        assert set(model.config.expert_statistics) == {"s1", "s2", "dem"}
        pruned = MapexForPreTraining.from_pretrained(folder / "model", modalities=["s1"], experts_per_layer=1)
        assert pruned.num_parameters() < model.num_parameters()
        assert MapexImageProcessor.from_pretrained(folder / "model").modalities.keys() == model.config.modalities.keys()
        names = {path.name for path in (folder / "model").glob("*.safetensors")}
        assert "model-trunk.safetensors" in names and any("experts" in name for name in names)
        card = (folder / "model" / "README.md").read_text()
        assert "reconstruction/s2" in card and "base_learning_rate" in card
        assert "s1, s2, dem" in output and "The model is in" in output

    def test_log(self, straight):
        lines = log_of(straight[0])
        assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
        training, evaluation = lines[2], lines[3]
        losses = ("loss", "reconstruction_loss", "load_balancing_loss", "router_z_loss", "mutual_information")
        for prefix, line in (("training", training), ("evaluation", evaluation)):
            for name in (*losses, "reconstruction/s1", "router_entropy", "dead_experts/layer_1"):
                assert f"{prefix}/{name}" in line
        assert lines[-1]["evaluation/reconstruction_loss"] < evaluation["evaluation/reconstruction_loss"]
        assert 0 < lines[-2]["training/learning_rate"] < training["training/learning_rate"]
        raw = json.loads((straight[0] / "log.jsonl").read_text().splitlines()[2])
        assert raw["throughput/samples_per_second"] > 0 and 0 <= raw["throughput/waiting_for_data"] <= 1
        assert (straight[0] / "routing" / "step-0000006.png").stat().st_size > 1000

    def test_held_out_places(self, straight, shards):
        """The listed ones are those of the split, and none of the others."""
        listed = json.loads((straight[0] / "held_out.json").read_text())
        for source, count in zip(shards, (40, 15)):
            places = {f"place-{index // 5}" for index in range(count)}
            expected = {p for p in places if split_of_place(p, {"train": 0.7, "held_out": 0.3}, 1) == "held_out"}
            assert set(listed[source]) == expected and expected != places

    def test_tracker(self, straight):
        pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(straight[0] / "logs"))
        events.Reload()
        scalars = events.Scalars("evaluation/reconstruction/s2")
        expected = [line["evaluation/reconstruction/s2"] for line in log_of(straight[0]) if "evaluation/loss" in line]
        assert [entry.value for entry in scalars] == pytest.approx(expected)
        assert events.Images("routing")

    def test_last_checkpoints_are_kept(self, straight):
        assert {path.name for path in (straight[0] / "checkpoints").iterdir()} == {"step-4", "step-6"}


class TestGoingOn:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_after_a_stop(self, shards, straight, tmp_path, workers):
        settings = settings_file(tmp_path, shards, num_workers=workers)
        assert "Stopped at step 3" in run(settings, tmp_path, "--stop_after", "3")
        assert "Going on from step 3" in run(settings, tmp_path)
        assert_same_run(straight[0], tmp_path)

    def test_after_a_kill(self, shards, straight, tmp_path):
        """At whatever moment: here while it writes, the third time that it does."""
        settings = settings_file(tmp_path, shards, checkpoint_steps=1)
        process = start(settings, tmp_path)
        deadline = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "step-3").is_dir() and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert "Going on from step" in run(settings, tmp_path)
        assert_same_run(straight[0], tmp_path)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("workers", [0, 1])
    def test_after_a_signal(self, shards, straight, tmp_path, workers, number):
        """Which a terminal, or a scheduler, sends to the processes that read as well."""
        settings = settings_file(tmp_path, shards, checkpoint_steps=100, num_workers=workers)
        process = start(settings, tmp_path)
        deadline = time.monotonic() + 120
        log = tmp_path / "log.jsonl"
        while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "Run the same command again" in output, output[-3000:]
        assert "Going on from step" in run(settings, tmp_path)
        assert_same_run(straight[0], tmp_path)

    def test_with_other_settings_is_refused(self, shards, straight, tmp_path):
        settings = settings_file(tmp_path, shards)
        output = run(settings, straight[0], "--max_steps", "9", code=1)
        assert "max_steps: 6 -> 9" in output and "--from_scratch" in output
        # Other places held out: what was trained on would be evaluated on.
        output = run(settings, straight[0], "--split_seed", "7", "--weight_decay", "0.5", code=1)
        assert "split_seed: " in output and "weight_decay: 0.05 -> 0.5" in output

    def test_with_other_workers_each_source_begins_anew(self, shards, tmp_path):
        settings = settings_file(tmp_path, shards, num_workers=0)
        output = run(settings, tmp_path, "--stop_after", "2", "--from_scratch")
        assert "Run the same command again, without --from_scratch, to go on" in output
        output = run(settings, tmp_path, "--num_workers", "1")
        assert "The run had 0 workers, now 1: weights" in output and "Going on from step 2" in output

    def test_numbers_that_cannot_be(self, shards, tmp_path):
        settings = settings_file(tmp_path, shards)
        assert "--keep_checkpoints must be at least 1" in run(settings, tmp_path, "--keep_checkpoints", "0", code=1)
        output = run(settings, tmp_path, "--validation_split", "val", code=1)
        assert "Nothing to evaluate on: No shards of the split `val`" in output and "Traceback" not in output


def test_activation_checkpointing_changes_nothing(shards, straight, tmp_path):
    run(settings_file(tmp_path, shards), tmp_path, "--gradient_checkpointing")
    for line, expected in zip(log_of(tmp_path), log_of(straight[0])):
        assert line == pytest.approx(expected, rel=1e-4)


def test_gradient_accumulation(shards, tmp_path):
    """Twice the samples a step, the learning rate scaled with them, and resumed as exactly."""
    settings = settings_file(tmp_path, shards, gradient_accumulation_steps=2)
    (tmp_path / "one").mkdir()
    run(settings, tmp_path / "one")
    run(settings, tmp_path / "two", "--stop_after", "3")
    run(settings, tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert log_of(tmp_path / "one")[1]["training/learning_rate"] == pytest.approx(0.03 * 16 / 256)


def test_from_the_hub_and_to_it(shards, tmp_path):
    """The same run as from a folder, and its model in a repository, in files by modality."""
    run(settings_file(tmp_path, shards[:1], weights=None, max_steps=2), tmp_path / "folder")
    with HubServer(tmp_path / "hub") as hub:
        files = {file.name: file.read_bytes() for file in Path(shards[0]).iterdir()}
        hub.put("me/chips", files, kind="dataset")
        settings = settings_file(tmp_path, ["me/chips"], weights=None, max_steps=2, push_to_hub="me/mapex-small")
        run(settings, tmp_path / "hub-run", environment=hub.environment(tmp_path / "home"))
        pushed = set(hub.files("me/mapex-small"))
    assert_same_run(tmp_path / "folder", tmp_path / "hub-run")
    assert {"model-trunk.safetensors", "README.md", "modeling_mapex.py", "preprocessor_config.json"} <= pushed


@pytest.mark.slow
class TestTwoProcesses:
    def test_run_and_go_on_with_one(self, shards, tmp_path):
        """Weights, optimiser and schedule go on; the samples begin a new epoch, and that is said."""
        settings = settings_file(tmp_path, shards, max_steps=8)
        run(settings, tmp_path, "--stop_after", "4", processes=2)
        output = run(settings, tmp_path)
        assert "The run had 2 processes, now 1" in output
        lines = log_of(tmp_path)
        assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
        assert lines[-1]["evaluation/reconstruction_loss"] < lines[3]["evaluation/reconstruction_loss"]
        assert "expert_statistics" in json.loads((tmp_path / "model" / "config.json").read_text())

    def test_evaluation_does_not_depend_on_their_number(self, shards, tmp_path):
        """The same weights, held-out batches and masks."""
        settings = settings_file(tmp_path, shards, base_learning_rate=0.0, max_steps=1, evaluation_steps=1)
        logs = []
        for processes in (1, 2):
            folder = tmp_path / str(processes)
            run(settings, folder, processes=processes)
            description = json.loads((folder / "checkpoints" / "step-1" / "run.json").read_text())
            assert description["processes"] == processes
            logs.append({name: value for name, value in log_of(folder)[-1].items() if name.startswith("evaluation")})
        assert logs[0] == pytest.approx(logs[1], rel=1e-4)

    def test_a_process_dies(self, shards, tmp_path):
        """The others stop, with the last checkpoint good."""
        settings = settings_file(tmp_path, shards, max_steps=100_000, process_timeout=20)
        process = start(settings, tmp_path, processes=2)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        children = subprocess.run(["pgrep", "-f", f"run_pretraining.py.*{tmp_path}"], capture_output=True, text=True)
        workers = [int(pid) for pid in children.stdout.split() if int(pid) != process.pid]
        os.kill(max(workers), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
        assert (process.returncode != 0 and "SIGKILL" in output.upper()) or "exitcode: -9" in output, output[-3000:]
        last = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").glob("step-*"))
        assert f"Going on from step {last}" in run(settings, tmp_path, "--stop_after", str(last + 2))


class TestStops:
    """Each with a message that says what to do, before anything is written that would be in the way."""

    def stop(self, shards, tmp_path, *arguments, **changes) -> str:
        with pytest.raises(SystemExit) as stop:
            run_pretraining.main(
                *parse_arguments(
                    [settings_file(tmp_path, shards, **changes), "--output_dir", str(tmp_path / "out"), *arguments]
                )
            )
        return str(stop.value)

    def test_unknown_option_in_the_file(self, shards, tmp_path):
        assert "['lerning_rate']" in self.stop(shards, tmp_path, lerning_rate=1.0)

    def test_no_such_file(self):
        with pytest.raises(SystemExit, match=r"Cannot read nowhere\.yaml"):
            parse_arguments(["nowhere.yaml"])

    def test_unknown_sensor(self, shards, tmp_path):
        assert "Unknown" in self.stop(shards, tmp_path, modalities=["s3"])

    def test_other_sensors_than_the_checkpoint(self, shards, tmp_path):
        """And fields of the configuration are changed in a checkpoint, too."""
        config = MapexConfig.from_preset("nano", modalities=SETTINGS["modalities"], **OVERRIDES)
        model = MapexForPreTraining(config)
        model.save_pretrained(tmp_path / "model")
        given = {"model_name_or_path": str(tmp_path / "model")}
        for modalities in (["s1"], {**SETTINGS["modalities"], "s2": ["B02"]}):
            assert "has the sensors {'dem': ['elevation']" in self.stop(
                shards, tmp_path, modalities=modalities, **given
            )
        assert "no fields of MapexConfig" in self.stop(shards, tmp_path, config_overrides={"mask_share": 0.5}, **given)
        args = run_pretraining.ModelArguments(config_overrides='{"mask_ratio": 0.5}', **given)
        continued = run_pretraining.build_model(args)
        assert continued.config.mask_ratio == 0.5
        for name, tensor in model.state_dict().items():
            assert torch.equal(continued.state_dict()[name], tensor), name

    def test_no_sources(self, tmp_path):
        assert "Nothing to train on" in self.stop([], tmp_path)

    def test_weights_of_other_number(self, shards, tmp_path):
        assert "2 --sources but 1 --weights" in self.stop(shards, tmp_path, weights=[1.0])

    def test_empty_folder(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "empty" in self.stop([str(tmp_path / "empty")], tmp_path, weights=None)

    def test_modality_that_no_source_has(self, shards, tmp_path):
        assert "No source has ['rgb']" in self.stop(shards, tmp_path, modalities=["s1", "rgb"])

    def test_source_that_lacks_bands(self, shards, tmp_path, capsys):
        assert "hold nothing that the model has" in self.stop(shards, tmp_path, modalities=["s2"])
        assert "s2 (lacks B01" in capsys.readouterr().out

    def test_no_permission(self, shards, tmp_path):
        (tmp_path / "out").write_text("a file, where a folder should be")
        assert "exists" in self.stop(shards, tmp_path)

    def test_more_workers_than_shards(self, shards, tmp_path):
        assert "set --num_workers to" in self.stop(shards, tmp_path, num_workers=99)

    def test_damaged_shard(self, shards, tmp_path):
        """Found when it is read, after others were: the checkpoints made so far stay."""
        folder = shutil.copytree(shards[0], tmp_path / "shards")
        for file in sorted(folder.glob("*.parquet"))[1:]:
            raw = bytearray(file.read_bytes())
            raw[4 : len(raw) // 2] = bytes(len(raw) // 2 - 4)
            file.write_bytes(raw)
        message = self.stop([str(folder)], tmp_path, weights=None, held_out=0.0, max_steps=50, checkpoint_steps=1)
        assert "Cannot read the data" in message and "The last checkpoint is" in message

    def test_everything_held_out(self, shards, tmp_path):
        assert "has no samples for this process" in self.stop(shards, tmp_path, held_out=1.0)

    def test_weights_that_are_not_finite_are_not_saved(self, shards, tmp_path):
        """The loss of the step that spoils them is finite still."""
        changes = {"base_learning_rate": math.inf, "warmup_steps": 0, "checkpoint_steps": 1}
        message = self.stop(shards, tmp_path, **changes)
        assert "weights are no longer finite after step 1" in message and "checkpoint is none" in message

    def test_nan_loss(self, shards, tmp_path):
        message = self.stop(shards, tmp_path, base_learning_rate=1e30, max_grad_norm=1e30, max_steps=30)
        assert "The loss is" in message and "--base_learning_rate" in message


def test_help_has_the_commands():
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "run_pretraining.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "accelerate launch" in result.stdout and "--mutual_information_warmup_steps" in result.stdout


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp2", "multi_node"])
def test_accelerate_accepts_its_configurations(name):
    """As `accelerate launch` reads them; what is no option of Accelerate is an error there."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / "accelerate_configs" / f"{name}.yaml"))
    assert config.num_processes == {"cpu": 1, "ddp": 8, "fsdp2": 8, "multi_node": 16}[name]
    if name == "fsdp2":
        from accelerate import FullyShardedDataParallelPlugin

        keys = {key.removeprefix("fsdp_") for key in config.fsdp_config}
        known = set(inspect.signature(FullyShardedDataParallelPlugin).parameters)
        assert keys - {"transformer_layer_cls_to_wrap", "version"} <= known


class TestRecipes:
    def test_nano(self):
        """The recipe of the checkpoint in the repository is the one that the checkpoint has."""
        recipe = yaml.safe_load((EXAMPLES / "configs" / "nano.yaml").read_text())
        model_args, data_args, args = parse_arguments([str(EXAMPLES / "configs" / "nano.yaml")])
        assert args.max_steps == recipe["max_steps"] and len(data_args.weights) == len(data_args.sources)
        config = run_pretraining.build_model(model_args).config
        assert {name: spec["bands"] for name, spec in config.modalities.items()} == recipe["modalities"]
