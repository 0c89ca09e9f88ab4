"""Weights on disk: grouped by modality, read only as far as a pruned model needs them, replaced all or not at all."""

import json
import os
import shutil
import textwrap

import pytest
import torch
from conftest import MODALITIES, randomize, tiny_config, tiny_inputs
from interpreters import run_python
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_mapex import MapexConfig, MapexForImageClassification, MapexForPreTraining, MapexModel
from modeling_mapex.checkpoint_mapex import find_weights, group_by_modality


CHOICES = [
    ["radar"],
    ["radar", "height"],
    {"optical": ["red", "blue"]},
    {"optical": None, "radar": ["VH"]},
    list(MODALITIES),
]
PLANS = [{}, {"coverage": 0.5}, {"experts_per_layer": 1}, {"experts_per_layer": [3, 2], "criterion": "usage"}]


def calibrated(model_class=MapexForPreTraining, **overrides):
    torch.manual_seed(0)
    model = randomize(model_class(tiny_config(**overrides)))
    model.calibrate_experts([{"pixel_values": tiny_inputs([name])} for name in MODALITIES])
    return model


def assert_same(one, other):
    """Weights are equal bit for bit, and configurations but for where they were loaded from."""
    weights, expected = one.state_dict(), other.state_dict()
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        assert weights[key].dtype == tensor.dtype, key
        assert torch.equal(weights[key], tensor), key
    fields, expected = one.config.to_dict(), other.config.to_dict()
    for values in (fields, expected):
        values["_name_or_path"] = None
        values["pruning"] = {**(values["pruning"] or {}), "source": None}
    assert fields == expected


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model in one file, grouped, grouped and split, and with experts stacked as others may store them."""
    root = tmp_path_factory.mktemp("checkpoints")
    model = calibrated()
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "grouped", shard_by_modality=True, coverage=0.6)
    model.save_pretrained(root / "split", shard_by_modality=True, max_shard_size="20KB")
    shutil.copytree(root / "single", root / "stacked")
    save_file(model.state_dict(), root / "stacked" / "model.safetensors", metadata={"format": "pt"})
    return root


LAYOUTS = ["single", "grouped", "split", "stacked"]


class TestReadingWhatIsKept:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("choice", CHOICES, ids=str)
    def test_equals_load_then_prune(self, folders, layout, choice):
        for model_class in (MapexModel, MapexForPreTraining):
            whole = model_class.from_pretrained(folders / layout)
            for plan in PLANS:
                expected = whole.prune_for_modalities(choice, **plan).build()
                got = model_class.from_pretrained(folders / layout, modalities=choice, **plan)
                assert_same(got, expected)
                assert not got.training

    def test_a_new_head_and_overrides(self, folders):
        torch.manual_seed(1)
        got = MapexForImageClassification.from_pretrained(
            folders / "grouped", modalities=["radar"], num_labels=7, problem_type="multi_label_classification"
        )
        expected = MapexForImageClassification.from_pretrained(
            folders / "grouped", num_labels=7, problem_type="multi_label_classification"
        )
        expected = expected.prune_for_modalities(["radar"])
        assert got.classifier.weight.shape == (7, 32)
        assert got.config.to_dict() == expected.config.to_dict(), "the source too"
        for key, tensor in got.mapex.state_dict().items():
            assert torch.equal(tensor, expected.state_dict[f"mapex.{key}"]), key

    def test_auto_class_and_given_configuration(self, folders):
        expected = MapexModel.from_pretrained(folders / "grouped", modalities=["height"], coverage=0.5)
        assert_same(AutoModel.from_pretrained(folders / "grouped", modalities=["height"], coverage=0.5), expected)
        config = MapexConfig.from_pretrained(folders / "grouped", pooling_type="modality_mean")
        got = MapexModel.from_pretrained(folders / "grouped", config=config, modalities=["height"], coverage=0.5)
        assert got.config.pooling_type == "modality_mean"
        assert list(config.modalities) == sorted(MODALITIES), "the given one is not changed"
        assert torch.equal(got.layers[3].layernorm_after.weight, expected.layers[3].layernorm_after.weight)

    def test_of_a_pruned_checkpoint(self, folders, tmp_path):
        model = MapexForPreTraining.from_pretrained(folders / "single")
        model.prune_for_modalities(["radar", "height"]).build().save_pretrained(tmp_path, shard_by_modality=True)
        got = MapexForPreTraining.from_pretrained(tmp_path, modalities=["radar"])
        expected = MapexForPreTraining.from_pretrained(tmp_path).prune_for_modalities(["radar"]).build()
        assert_same(got, expected)
        assert got.config.pruning["parameters_before"] == model.num_parameters()

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "float16"])
    def test_dtype(self, folders, layout, dtype):
        got = MapexModel.from_pretrained(folders / layout, modalities=["radar"], dtype=dtype)
        expected = MapexModel.from_pretrained(folders / layout, dtype=dtype).prune_for_modalities(["radar"]).build()
        assert_same(got, expected)

    def test_stored_dtype_without_one_in_the_configuration(self, folders, tmp_path):
        MapexModel.from_pretrained(folders / "single", dtype=torch.bfloat16).save_pretrained(tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text())
        del fields["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert MapexModel.from_pretrained(tmp_path, modalities=["radar"]).dtype == torch.bfloat16

    @pytest.mark.parametrize("where", [{"": "cpu"}, "auto", "cpu"])
    def test_device_map(self, folders, where):
        expected = MapexModel.from_pretrained(folders / "grouped", modalities=["radar"])
        assert_same(MapexModel.from_pretrained(folders / "grouped", modalities=["radar"], device_map=where), expected)

    def test_offload_to_disk(self, folders, tmp_path):
        where = {"embeddings": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "cpu", "layers.3": "disk"}
        where["layernorm"] = "cpu"
        got = MapexModel.from_pretrained(
            folders / "grouped", modalities=["radar"], device_map=where, offload_folder=tmp_path
        )
        expected = MapexModel.from_pretrained(folders / "grouped", modalities=["radar"])
        pixel_values = tiny_inputs(["radar"])
        with torch.no_grad():
            assert torch.allclose(
                got(pixel_values).last_hidden_state, expected(pixel_values).last_hidden_state, atol=1e-6
            )
        assert got.layers[1].mlp.experts.up_proj.device.type == "meta", "it is on disk"

    def test_loading_info_and_disable_mmap(self, folders):
        got, info = MapexForImageClassification.from_pretrained(
            folders / "grouped", modalities=["radar"], output_loading_info=True, disable_mmap=True
        )
        assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        expected = MapexModel.from_pretrained(folders / "grouped", modalities=["radar"])
        assert all(torch.equal(got.mapex.state_dict()[key], value) for key, value in expected.state_dict().items())

    def test_source_file_may_be_replaced(self, folders, tmp_path):
        """Weights are views of the mapped file; saving to where they come from must not change them."""
        shutil.copytree(folders / "single", tmp_path / "model")
        model = MapexForPreTraining.from_pretrained(tmp_path / "model")
        expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path / "model", shard_by_modality=True)
        model.save_pretrained(tmp_path / "model")
        again = MapexForPreTraining.from_pretrained(tmp_path / "model")
        for key, tensor in expected.items():
            assert torch.equal(model.state_dict()[key], tensor) and torch.equal(again.state_dict()[key], tensor), key

    def test_peak_memory(self, tmp_path):
        """Base width at reduced depth: the peak of a process is near what is kept, not what is stored."""
        script = """
            import torch
            from peak_memory import peak_megabytes, reset_peak
            from modeling_mapex import MapexConfig, MapexModel
            from transformers.utils import logging

            logging.disable_progress_bar()
            if WHAT == "save":
                config = MapexConfig.from_preset("base", ["s1", "s2", "rgb", "dem"], num_hidden_layers=2,
                                                 moe_layers=[0, 1])
                shares = [[[1.0 if (expert + layer) % 6 == index else 0.0 for expert in range(6)] for layer in range(2)]
                          for index in range(4)]
                config.expert_statistics = {
                    name: {"tokens": 1, "usage": rows, "gate": rows, "saliency": rows}
                    for name, rows in zip(config.modalities, shares)
                }
                MapexModel(config).save_pretrained("whole", shard_by_modality=True)
            reset_peak()
            before = peak_megabytes()
            if WHAT == "pruned":
                model = MapexModel.from_pretrained("whole", modalities=["s1"])
            if WHAT == "whole":
                model = MapexModel.from_pretrained("whole")
            if WHAT != "save":
                total = sum(parameter.sum() for parameter in model.parameters())  # touch all of it
                size = sum(parameter.numel() * 4 for parameter in model.parameters())
                print(size / 1e6, peak_megabytes() - before)
        """

        def run(what):
            output = run_python(f"WHAT = {what!r}\n{textwrap.dedent(script)}", tmp_path)
            return [float(number) for number in output.split()]

        run("save")
        (whole_size, whole_peak), (size, peak) = run("whole"), run("pruned")
        assert size < 0.35 * whole_size
        assert peak < 1.3 * size + 30, (size, peak)  # beside the weights: modules, and code that is loaded late
        assert peak < 0.6 * whole_peak


class TestGrouping:
    def test_stock_transformers_opens_it(self, folders):
        expected = MapexForPreTraining.from_pretrained(folders / "single")
        for layout in ("grouped", "split"):
            assert_same(MapexForPreTraining.from_pretrained(folders / layout), expected)

    def test_every_tensor_is_stored_once(self, folders):
        stored = load_file(folders / "single" / "model.safetensors")
        for layout in ("grouped", "split"):
            found = {}
            for file in (folders / layout).glob("*.safetensors"):
                tensors = load_file(file)
                assert tensors and not found.keys() & tensors.keys()
                found.update(tensors)
            assert found.keys() == stored.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in stored.items())
            index = json.loads((folders / layout / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())

    @pytest.mark.parametrize("modality", MODALITIES)
    @pytest.mark.parametrize("model_class", [MapexModel, MapexForPreTraining])
    def test_other_files_are_not_needed(self, folders, tmp_path, modality, model_class):
        """With the files of other modalities deleted, the pruned model still loads, and has what it needs exactly."""
        expected = model_class.from_pretrained(folders / "single", modalities=[modality], coverage=0.6)
        shutil.copytree(folders / "grouped", tmp_path / "few")
        needed = 0
        for file in (tmp_path / "few").glob("*.safetensors"):
            words = file.stem.split("-")[1:]
            of_others = words[0] in ("experts", "decoder") and len(words) > 1 and modality not in words
            if of_others or words[0] == "unused" or (words[0] == "decoder" and model_class is MapexModel):
                file.unlink()
            else:
                with safe_open(file, "pt") as opened:
                    needed += sum(opened.get_tensor(key).numel() for key in opened.keys())  # noqa: SIM118
        got = model_class.from_pretrained(tmp_path / "few", modalities=[modality], coverage=0.6)
        assert_same(got, expected)
        # Beside what is kept, files hold router rows and embeddings of other modalities: little even here.
        kept = sum(tensor.numel() for tensor in got.state_dict().values())
        assert kept <= needed < 1.05 * kept

    def test_max_shard_size(self, folders):
        sizes = {file.name: file.stat().st_size for file in (folders / "split").glob("*.safetensors")}
        assert sum("-of-" in name for name in sizes) > 4
        assert any(name.startswith("model-trunk-00001-of-") for name in sizes)
        assert max(sizes.values()) < 20_000 + 8_000  # the header comes on top

    def test_model_without_mixtures_left(self, tmp_path):
        model = calibrated().prune_for_modalities(["radar", "optical"], experts_per_layer=1).build()
        model.save_pretrained(tmp_path, shard_by_modality=True)
        assert {file.stem for file in tmp_path.glob("*.safetensors")} == {
            *("model-trunk", "model-experts-radar", "model-experts-optical"),
            *("model-decoder", "model-decoder-radar", "model-decoder-optical"),
        }
        assert_same(MapexForPreTraining.from_pretrained(tmp_path), model)
        got = MapexForPreTraining.from_pretrained(tmp_path, modalities=["radar"])
        assert_same(got, model.prune_for_modalities(["radar"]).build())

    def test_many_modalities_make_no_endless_name(self, tmp_path):
        names = [f"a_sensor_with_a_long_name_{index:02}" for index in range(12)]
        sensor = {"bands": ["one"], "gsd": 10.0, "patch_size": 4}
        model = randomize(MapexModel(tiny_config(modalities=dict.fromkeys(names, sensor))))
        model.calibrate_experts([{"pixel_values": {name: torch.randn(1, 1, 8, 8)}} for name in names])
        model.save_pretrained(tmp_path, shard_by_modality=True, coverage=1.0)
        assert max(len(file.name) for file in tmp_path.iterdir()) < 160
        assert_same(MapexModel.from_pretrained(tmp_path), model)

    def test_variants_live_side_by_side(self, folders, tmp_path):
        model = MapexForPreTraining.from_pretrained(folders / "single")
        model.save_pretrained(tmp_path)
        model.to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16", shard_by_modality=True)
        assert (tmp_path / "model.bf16-trunk.safetensors").is_file()
        assert (tmp_path / "model.safetensors.index.bf16.json").is_file()
        single = MapexForPreTraining.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(
            single.mapex.layernorm.weight, load_file(tmp_path / "model.safetensors")["mapex.layernorm.weight"]
        )
        got = MapexForPreTraining.from_pretrained(tmp_path, variant="bf16", modalities=["radar"])
        assert_same(
            got, MapexForPreTraining.from_pretrained(tmp_path, variant="bf16").prune_for_modalities(["radar"]).build()
        )

    def test_needs_statistics_and_weights(self, tmp_path):
        model = MapexModel(tiny_config())
        with pytest.raises(ValueError, match="calibrate_experts"):
            model.save_pretrained(tmp_path / "model", shard_by_modality=True)
        assert not any((tmp_path / "model").iterdir()), "nothing is left of an attempt"
        with pytest.raises(FileNotFoundError, match="save the model there first"):
            group_by_modality(tmp_path, calibrated().config)

    def test_options_that_do_not_go_together(self, tmp_path):
        model = calibrated(MapexModel)
        with pytest.raises(ValueError, match="shard_by_modality=True"):
            model.save_pretrained(tmp_path, coverage=0.9)
        with pytest.raises(ValueError, match="distributed_checkpoint"):
            model.save_pretrained(tmp_path, shard_by_modality=True, distributed_checkpoint=True)
        with pytest.raises(ValueError, match="push_to_hub=True"):
            model.save_pretrained(tmp_path, private=True)


class TestSavingOverAnEarlierCheckpoint:
    def weights(self, folder):
        return {file.name for file in folder.iterdir() if ".safetensors" in file.name}

    @pytest.mark.parametrize(
        "order", [("single", "grouped"), ("grouped", "single"), ("sharded", "single")], ids="-".join
    )
    def test_nothing_stale_is_left(self, tmp_path, order):
        options = {"single": {}, "grouped": {"shard_by_modality": True}, "sharded": {"max_shard_size": "40KB"}}
        first, second = calibrated(), calibrated(initializer_range=0.1)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "model-of-the-harbour.safetensors").write_bytes(b"somebody's own file")
        first.save_pretrained(tmp_path / "model", **options[order[0]])
        second.save_pretrained(tmp_path / "model", **options[order[1]])
        second.save_pretrained(tmp_path / "fresh", **options[order[1]])
        own = {"model-of-the-harbour.safetensors"}
        assert self.weights(tmp_path / "model") == self.weights(tmp_path / "fresh") | own
        assert_same(MapexForPreTraining.from_pretrained(tmp_path / "model"), second)

    def test_a_full_disk_leaves_the_earlier_one(self, tmp_path):
        """A limit on file size stands for a full disk: writing fails in the middle."""
        model = calibrated()
        model.save_pretrained(tmp_path / "model")
        before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
        script = """
            import resource, signal
            from modeling_mapex import MapexForPreTraining

            model = MapexForPreTraining.from_pretrained("model")
            model.mapex.layernorm.weight.data.fill_(7.0)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            try:
                model.save_pretrained("model", shard_by_modality=True)
            except Exception as error:
                print(type(error).__name__, error)
        """
        assert "File too large" in run_python(script, tmp_path)
        assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before

    def test_remains_of_a_killed_process_are_removed(self, tmp_path):
        (tmp_path / "_saving").mkdir()
        (tmp_path / "_saving" / "model.safetensors").write_bytes(b"half")
        calibrated(MapexModel).save_pretrained(tmp_path)
        assert not (tmp_path / "_saving").exists()
        MapexModel.from_pretrained(tmp_path)

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / "model").write_text("")
        with pytest.raises(NotADirectoryError, match="name of a folder"):
            MapexModel(tiny_config()).save_pretrained(tmp_path / "model")

    def test_no_permission(self, folders, tmp_path):
        (tmp_path / "closed").mkdir(mode=0o500)
        script = f"""
            from modeling_mapex import MapexModel

            model = MapexModel.from_pretrained("{folders / "single"}")
            try:
                model.save_pretrained("closed/model")
            except PermissionError as error:
                print(error)
        """
        assert "closed/model" in run_python(script, tmp_path, drop_privileges=True)


class TestWhatIsRefused:
    @pytest.fixture
    def folder(self, folders, tmp_path):
        shutil.copytree(folders / "grouped", tmp_path / "model")
        return tmp_path / "model"

    @pytest.fixture(params=[None, ["radar"]], ids=["whole", "pruned"])
    def load(self, request):
        return lambda folder: MapexModel.from_pretrained(folder, modalities=request.param)

    def test_index_that_names_a_file_elsewhere(self, folder, load):
        shutil.copy(folder / "model-trunk.safetensors", folder.parent / "elsewhere.safetensors")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for name in ("../elsewhere.safetensors", str(folder.parent / "elsewhere.safetensors"), "a\\b.safetensors", 3):
            names = {"model-trunk.safetensors": name}
            changed = {key: names.get(file, file) for key, file in index["weight_map"].items()}
            (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": changed}))
            with pytest.raises(ValueError, match="Only safetensors files beside the index"):
                load(folder)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', "{}"])
    def test_index_that_is_none(self, folder, load, content):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(OSError, match="not an index of weights"):
            load(folder)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_truncated(self, folder, load, share):
        file = folder / "model-experts-radar.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(OSError, match=r"model-experts-radar\.safetensors is truncated or damaged .*force_download"):
            load(folder)

    def test_damaged_header(self, folders, tmp_path, load):
        for layout in ("grouped", "single"):
            shutil.copytree(folders / layout, tmp_path / layout)
            for file in (tmp_path / layout).glob("*.safetensors"):
                content = bytearray(file.read_bytes())
                content[8:40] = bytes(32)
                file.write_bytes(content)
            with pytest.raises(OSError, match="truncated or damaged"):
                load(tmp_path / layout)

    def test_missing_file(self, folder):
        (folder / "model-trunk.safetensors").unlink()
        with pytest.raises(OSError, match=r"lacks \['model-trunk.safetensors'\]"):
            MapexModel.from_pretrained(folder, modalities=["radar"])
        with pytest.raises(OSError, match=r"model-trunk\.safetensors"):
            MapexModel.from_pretrained(folder)

    def test_file_without_a_tensor_of_the_index(self, folder):
        tensors = load_file(folder / "model-trunk.safetensors")
        del tensors["mapex.layernorm.weight"]
        save_file(tensors, folder / "model-trunk.safetensors", metadata={"format": "pt"})
        with pytest.raises(OSError, match=r"lacks `mapex\.layernorm\.weight`"):
            MapexModel.from_pretrained(folder, modalities=["radar"])

    def test_checkpoint_without_an_expert(self, folders, tmp_path):
        shutil.copytree(folders / "single", tmp_path / "model")
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        del tensors["mapex.layers.1.mlp.experts.0.up_proj.weight"]
        save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"lacks experts \[0\]"):
            MapexModel.from_pretrained(tmp_path / "model", modalities=list(MODALITIES), coverage=1.0)

    def test_tensor_of_another_shape(self, folder):
        tensors = load_file(folder / "model-trunk.safetensors")
        tensors["mapex.layernorm.weight"] = torch.zeros(5)
        save_file(tensors, folder / "model-trunk.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="mismatch"):
            MapexModel.from_pretrained(folder, modalities=["radar"])

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
    def test_pickle(self, folders, tmp_path, load, name):
        """A pickle that would run code is not opened, and the way out is told."""
        shutil.copytree(folders / "single", tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        (tmp_path / "model" / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
        with pytest.raises(OSError, match=rf"offers its weights as `{name}`.*weights_only=True"):
            load(tmp_path / "model")
        assert not os.path.exists("opened")

    def test_pickle_on_request(self, folders):
        with pytest.raises(OSError, match="safetensors"):
            MapexModel.from_pretrained(folders / "single", use_safetensors=False)

    def test_empty_folder(self, folders, tmp_path, load):
        shutil.copy(folders / "single" / "config.json", tmp_path)
        with pytest.raises(OSError, match=r"neither `model\.safetensors` nor its index"):
            load(tmp_path)

    def test_modalities_bands_and_options(self, folders):
        load = MapexModel.from_pretrained
        with pytest.raises(ValueError, match=r"Unknown modalities \['lidar'\]. This checkpoint has"):
            load(folders / "grouped", modalities=["lidar"])
        with pytest.raises(ValueError, match="red"):
            load(folders / "grouped", modalities={"optical": ["redd"]})
        with pytest.raises(TypeError, match=r'\["radar"\]|\[\'radar\'\]'):
            load(folders / "grouped", modalities="radar")
        with pytest.raises(ValueError, match="`modalities` does not say for what"):
            load(folders / "grouped", coverage=0.5)
        with pytest.raises(ValueError, match="not both"):
            load(folders / "grouped", modalities=["radar"], coverage=0.5, experts_per_layer=1)
        with pytest.raises(ValueError, match="key_mapping"):
            load(folders / "grouped", modalities=["radar"], key_mapping={"a": "b"})
        with pytest.raises(ValueError, match="a folder or a repository"):
            load(None, config=tiny_config(), state_dict={}, modalities=["radar"])
        with pytest.raises(ValueError, match="takes weights"):
            MapexConfig.from_pretrained(folders / "grouped", modalities=["radar"])

    def test_without_statistics(self, tmp_path):
        MapexModel(tiny_config()).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="calibrate_experts"):
            MapexModel.from_pretrained(tmp_path, modalities=["radar"])

    def test_another_kind_of_model(self, folders, tmp_path):
        shutil.copytree(folders / "single", tmp_path / "model")
        fields = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**fields, "model_type": "vit"}))
        for modalities in (None, ["radar"]):
            with pytest.raises(ValueError, match="`vit` model, not of a `mapex` one"):
                MapexModel.from_pretrained(tmp_path / "model", modalities=modalities)


def test_find_weights_of_nothing(tmp_path):
    assert find_weights(tmp_path) is None
