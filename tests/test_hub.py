"""Pushing and pulling with the real client and a Hub on loopback, mostly in interpreters without the package."""

import json
import os
import re
import shutil

import pytest
from hub_server import HubServer
from interpreters import finish, run_python, start_python
from safetensors.torch import load_file


# A model of four registered sensors with statistics, calibrated so that each uses experts of its own, and an input.
MODEL = """
import torch
from modeling_mapex import *

torch.manual_seed(0)
SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
config = MapexConfig.from_preset("nano", ["s1", "s2", "rgb", "dem"], initializer_range=0.5, **SIZE)
config.card_data = {"license": "cc-by-4.0", "datasets": ["me/chips"]}
model = MapexForPreTraining(config).eval()
pixels = {name: torch.randn(2, len(spec["bands"]), 32, 32) for name, spec in config.modalities.items()}
model.calibrate_experts([{"pixel_values": {name: value}} for name, value in pixels.items()])
"""
PUBLISH = (
    MODEL
    + """
import os
from safetensors.torch import save_file
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments
from modeling_mapex import MapexTrainer

def features(model):
    with torch.no_grad():
        return getattr(model, "mapex", model).eval()({"s1": pixels["s1"]}).last_hidden_state

expected = {"pixels": pixels["s1"], "full": features(model), "grouped": features(model)}
print(model.push_to_hub("me/full").oid)
model.push_to_hub("me/grouped", shard_by_modality=True, coverage=0.6, tags=["pretrained"])
model.push_to_hub("me/secret", private=True)
full = MapexForPreTraining.from_pretrained("me/full")
pruned = full.prune_for_modalities(["s1"])
pruned.push_to_hub("pruned")  # a name alone is in the user's own account
expected["pruned"] = features(pruned.build())
pruned.build().save_pretrained("pruned")

chips = [{"pixel_values": {"s1": torch.randn(2, 32, 32)}, "labels": index % 3} for index in range(6)]

def fine_tune(trainer_class, repo_id, **options):
    torch.manual_seed(0)
    tuned = MapexForImageClassification.from_pretrained("me/grouped", modalities=["s1"], num_labels=3)
    args = TrainingArguments(
        repo_id.replace("/", "-"), max_steps=2, remove_unused_columns=False, report_to=[], use_cpu=True,
        push_to_hub=True, hub_model_id=repo_id, eval_strategy="steps", eval_steps=2, save_strategy="no",
    )
    trainer = trainer_class(
        tuned, args, train_dataset=chips, eval_dataset=chips, data_collator=default_collate,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    trainer.push_to_hub(**options)
    return trainer, tuned

trainer, tuned = fine_tune(Trainer, "me/tuned-plain")
expected["tuned-plain"] = features(tuned)
trainer, tuned = fine_tune(MapexTrainer, "me/tuned", tags="floods", dataset_tags="me/floods")
expected["tuned"] = features(tuned)
assert tuned.training_record["metrics"]["accuracy"] >= 0
tuned.push_to_hub("me/tuned-again")
save_file(expected, "expected.safetensors")
"""
)
CHECK = """
import os, sys, torch
from safetensors.torch import load_file
from transformers import (AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          AutoModelForPreTraining, AutoModelForSemanticSegmentation)

expected = load_file(os.environ.get("EXPECTED", "expected.safetensors"))
CODE = {"trust_remote_code": True}

def features(model):
    with torch.no_grad():
        return getattr(model, "mapex", model).eval()({"s1": expected["pixels"]}).last_hidden_state

def same(model, name):
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    assert (features(model) - expected[name]).abs().max() < 1e-5, name
"""


def failing(code: str) -> str:
    """Code that prints the error with which `code` ends, and nothing else."""
    return f"try:\n    {code}\nexcept Exception as error:\n    print(type(error).__name__, error)\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub to which everything has been pushed, and the folder from which it was."""
    root = tmp_path_factory.mktemp("hub")
    with HubServer(root / "server") as hub:
        (root / "work").mkdir()
        hub.first_commit = run_python(PUBLISH, root / "work", hub.environment(root / "publisher")).split()[0]
        yield hub, root / "work"


@pytest.fixture
def hub(world, monkeypatch):
    hub, folder = world
    monkeypatch.setenv("EXPECTED", str(folder / "expected.safetensors"))
    hub.reset_counters()
    hub.faults.clear()
    return hub


class TestPulling:
    def test_everything_without_the_package(self, hub, tmp_path):
        """Every pushed model by every Auto class that fits it, its processor, and further pushes from there."""
        script = (
            CHECK
            + """
for name in ("full", "grouped", "pruned", "tuned", "tuned-plain", "tuned-again"):
    key = "tuned" if name == "tuned-again" else name
    for auto in (AutoModel, AutoModelForPreTraining, AutoModelForImageClassification):
        if auto is AutoModelForImageClassification or not name.startswith("tuned"):
            same(auto.from_pretrained(f"me/{name}", **CODE), key)
    same(AutoModel.from_pretrained(f"me/{name}", **CODE), key)
    processor = AutoImageProcessor.from_pretrained(f"me/{name}", **CODE)
    assert "s1" in processor.modalities and ("s2" in processor.modalities) == (name in ("full", "grouped"))
    assert processor({"s1": torch.full((2, 32, 32), -12.0)})["pixel_values"]["s1"].shape == (1, 2, 32, 32)
same(AutoModel.from_pretrained("me/grouped", modalities=["s1"], **CODE), "pruned")
backbone = AutoBackbone.from_pretrained("me/grouped", modalities=["s1"], out_features=["stage1", "stage4"], **CODE)
same(backbone, "pruned")
with torch.no_grad():
    maps = backbone({"s1": expected["pixels"]}).feature_maps
assert len(maps) == 2 and (maps[1].flatten(2).transpose(1, 2) - expected["pruned"]).abs().max() < 1e-5
same(AutoModelForSemanticSegmentation.from_pretrained("me/grouped", modalities=["s1"], **CODE), "pruned")
tuned = AutoModelForImageClassification.from_pretrained("me/tuned", **CODE)
assert tuned.config.num_labels == 3 and not tuned.training

model = AutoModelForPreTraining.from_pretrained("me/full", **CODE)
model.prune_for_modalities(["s1"]).push_to_hub("me/pruned-remotely")
model.push_to_hub("me/grouped-remotely", shard_by_modality=True)
while_loading = AutoModelForPreTraining.from_pretrained("me/grouped", modalities=["s1"], **CODE)
while_loading.push_to_hub("me/pruned-while-loading")
"""
        )
        run_python(script, tmp_path, hub.environment(tmp_path / "home"), package=False)
        again = (
            CHECK
            + """
for name in ("pruned-remotely", "pruned-while-loading"):
    same(AutoModelForPreTraining.from_pretrained(f"me/{name}", **CODE), "pruned")
    AutoImageProcessor.from_pretrained(f"me/{name}", **CODE)
same(AutoModel.from_pretrained("me/grouped-remotely", modalities=["s1"], **CODE), "pruned")
"""
        )
        run_python(again, tmp_path, hub.environment(tmp_path / "home-2", token=None), package=False)
        for name in ("pruned-remotely", "pruned-while-loading"):
            assert hub.read(f"me/{name}", "model.safetensors") == hub.read("me/pruned", "model.safetensors")
            assert set(hub.files(f"me/{name}")) == set(hub.files("me/pruned"))
        config = json.loads(hub.read("me/pruned-remotely", "config.json"))
        assert (config["pruning"]["source"], config["pruning"]["revision"]) == ("me/full", hub.first_commit)
        assert all("--" not in name for name in config["auto_map"].values())

    def test_second_load_asks_nothing_twice(self, hub, tmp_path):
        script = CHECK + 'same(AutoModel.from_pretrained("me/grouped", modalities=["s1"], **CODE), "pruned")\n'
        environment = hub.environment(tmp_path / "home")
        run_python(script, tmp_path, environment, package=False)
        files = [path for method, path, status in hub.requests if method == "GET" and status in (200, 206)]
        assert len(files) == len(set(files)), "no file twice, even the first time"
        hub.reset_counters()
        run_python(script, tmp_path, environment, package=False)
        assert hub.bytes_served == 0
        assert all("/resolve/" not in path for _, path, _ in hub.requests), hub.requests
        assert len(hub.requests) <= 2, "the commit of the branch, for the configuration and for the model"
        hub.reset_counters()
        run_python(script, tmp_path, {**environment, "HF_HUB_OFFLINE": "1"}, package=False)
        assert hub.requests == []

    def test_offline(self, hub, tmp_path):
        """With the files of s1 in the cache, s1 loads offline and s2 does not, and the error says why."""
        environment = hub.environment(tmp_path / "home")
        load = 'model = AutoModel.from_pretrained("{}", modalities=["{}"], coverage=0.6, **CODE)\n'
        script = CHECK + load.format("me/grouped", "s1") + "print(float(features(model).sum()))"
        online = run_python(script, tmp_path, environment, package=False)
        assert [path for _, path, _ in hub.requests if "experts-s2" in path] == []
        offline = {**environment, "HF_HUB_OFFLINE": "1"}
        assert run_python(script, tmp_path, offline, package=False) == online
        for name, modality in (("me/grouped", "s2"), ("me/full", "s1")):
            script = CHECK + failing(load.format(name, modality).strip())
            output = run_python(script, tmp_path, offline, package=False)
            assert output.startswith("OSError") and "offline" in output, output

    def test_branch_tag_commit_and_subfolder(self, hub, tmp_path):
        script = (
            MODEL
            + """
first = MapexForPreTraining.from_pretrained("me/full", revision="main")
second = MapexForPreTraining.from_pretrained("me/full")
second.mapex.layernorm.bias.data.fill_(3.0)
commit = second.push_to_hub("me/full", revision="shifted", commit_message="Shift").oid
from huggingface_hub import HfApi
HfApi().create_tag("me/full", tag="v2", revision="shifted")
for revision in ("shifted", "v2", commit):
    got = MapexForPreTraining.from_pretrained("me/full", revision=revision)
    assert float(got.mapex.layernorm.bias.mean()) == 3.0
    got = MapexForPreTraining.from_pretrained("me/full", revision=revision, modalities=["s1"])
    assert float(got.mapex.layernorm.bias.mean()) == 3.0
    assert got.config.pruning["revision"] == commit, got.config.pruning
assert float(MapexForPreTraining.from_pretrained("me/full").mapex.layernorm.bias.abs().max()) == 0.0
request = second.push_to_hub("me/full", create_pr=True)
got = MapexModel.from_pretrained("me/full", revision="refs/pr/1", modalities=["s1"])
assert float(got.layernorm.bias.mean()) == 3.0

second.save_pretrained("folder/inner", shard_by_modality=True)
HfApi().create_repo("me/inner")
HfApi().upload_folder(repo_id="me/inner", folder_path="folder")
got = MapexModel.from_pretrained("me/inner", subfolder="inner", modalities=["s1"])
assert float(got.layernorm.bias.mean()) == 3.0
"""
        )
        run_python(script, tmp_path, hub.environment(tmp_path / "home"))
        assert hub.repository("me/full").commits[hub.repository("me/full").refs["shifted"]].title == "Shift"

    def test_hf_upload_of_a_saved_folder(self, hub, world, tmp_path):
        script = """
import os, subprocess, sys
hf = os.path.join(os.path.dirname(sys.executable), "hf")
subprocess.run([hf, "upload", "me/by-hand", sys.argv[1] if len(sys.argv) > 1 else "pruned", "."], check=True)
"""
        run_python(script, world[1], hub.environment(tmp_path / "home"))
        script = CHECK + 'same(AutoModelForPreTraining.from_pretrained("me/by-hand", **CODE), "pruned")\n'
        run_python(script, tmp_path, hub.environment(tmp_path / "home-2"), package=False)
        assert hub.read("me/by-hand", "model.safetensors") == hub.read("me/pruned", "model.safetensors")

    def test_private(self, hub, tmp_path):
        load = 'AutoModel.from_pretrained("me/secret", modalities=["s1"], **CODE)'
        output = run_python(CHECK + failing(load), tmp_path, hub.environment(tmp_path / "1", token=None), package=False)
        assert "not a valid model identifier" in output and "token" in output
        given = load.replace("**CODE", '**CODE, token="hf_test"')
        script = CHECK + f'same({given}, "pruned")\n'
        run_python(script, tmp_path, hub.environment(tmp_path / "2", token=None), package=False)

    @pytest.mark.parametrize("what", ["", 'modalities=["s1"], '], ids=["whole", "pruned"])
    def test_what_is_not_there(self, hub, tmp_path, what):
        full = {path: hub.blob(entry.sha256).read_bytes() for path, entry in hub.files("me/grouped").items()}
        hub.put("me/incomplete", {path: content for path, content in full.items() if "trunk" not in path})
        hub.put(
            "me/pickled",
            {
                **{path: content for path, content in full.items() if ".safetensors" not in path},
                "pytorch_model.bin": b"cos\nsystem\n(S'touch opened'\ntR.",
            },
        )
        index = json.loads(full["model.safetensors.index.json"])
        index["weight_map"] = {key: f"../{file}" for key, file in index["weight_map"].items()}
        hub.put("me/outside", {**full, "model.safetensors.index.json": json.dumps(index).encode()})
        truncated = full["model-trunk.safetensors"][:-100]
        hub.put("me/truncated", {**full, "model-trunk.safetensors": truncated})
        load = "MapexModel.from_pretrained"
        cases = {
            "nothing": f'{load}("me/nothing", {what})',
            "revision": f'{load}("me/full", {what}revision="nowhere")',
            "incomplete": f'{load}("me/incomplete", {what})',
            "pickled": f'{load}("me/pickled", {what})',
            "outside": f'{load}("me/outside", {what})',
            "truncated": f'{load}("me/truncated", {what})',
        }
        script = "from modeling_mapex import MapexModel\n"
        for name, code in cases.items():
            script += f'print("CASE {name}")\n' + failing(code)
        output = run_python(script, tmp_path, hub.environment(tmp_path / "home"))
        said = dict(part.split("\n", 1) for part in output.split("CASE ")[1:])
        assert "me/nothing is not a local folder and is not a valid model identifier" in said["nothing"]
        assert "nowhere is not a valid git identifier" in said["revision"]
        assert said["incomplete"].startswith("OSError") and "model-trunk.safetensors" in said["incomplete"]
        assert re.search(r"OSError.*offers its weights as `pytorch_model.bin`.*weights_only=True", said["pickled"])
        assert said["outside"].startswith(("ValueError", "OSError"))
        assert re.search(r"Only safetensors files beside the index|Invalid", said["outside"]), said["outside"]
        assert re.search(r"OSError.*model-trunk.safetensors is truncated or damaged", said["truncated"])
        assert not [path for _, path, _ in hub.requests if path.endswith("pytorch_model.bin") and _ == "GET"]
        assert "pytorch_model.bin" not in hub.served and not (tmp_path / "opened").exists()

    def test_mended_on_the_hub(self, hub, tmp_path):
        """A damaged file does not stick in the cache: the next commit is another file."""
        good = hub.read("me/pruned", "model.safetensors")
        files = {path: hub.blob(entry.sha256).read_bytes() for path, entry in hub.files("me/pruned").items()}
        hub.put("me/mended", {**files, "model.safetensors": good[:1000]})
        environment = hub.environment(tmp_path / "home")
        load = 'AutoModel.from_pretrained("me/mended", **CODE)'
        assert "truncated or damaged" in run_python(CHECK + failing(load), tmp_path, environment, package=False)
        hub.put("me/mended", {"model.safetensors": good})
        run_python(CHECK + f'same({load}, "pruned")\n', tmp_path, environment, package=False)

    def test_cut_connection(self, hub, tmp_path):
        load = 'AutoModel.from_pretrained("me/grouped", modalities=["s1"], **CODE)'
        environment = hub.environment(tmp_path / "home")
        hub.fail("/storage/", cut_after=2_000, times=1000)
        output = run_python(CHECK + failing(load), tmp_path, environment, package=False)
        assert re.match(r"\w+Error ", output), "it fails, and says so"
        assert len(hub.faults) > 900
        hub.faults.clear()
        hub.fail("/storage/", cut_after=2_000, times=2)
        run_python(CHECK + f'same({load}, "pruned")\n', tmp_path, environment, package=False)
        assert not hub.faults, "both cuts have happened, and the client went on"

    def test_slow_and_failing_server(self, hub, tmp_path):
        hub.fail("/resolve/", method="HEAD", status=503, times=2)
        hub.fail("/storage/", delay=0.5, times=2)
        script = CHECK + 'same(AutoModel.from_pretrained("me/grouped", modalities=["s1"], **CODE), "pruned")\n'
        run_python(script, tmp_path, hub.environment(tmp_path / "home"), package=False)
        assert not hub.faults

    def test_full_disk(self, hub, tmp_path):
        """A limit on file size stands for a full disk. The cache works once there is room."""
        load = 'AutoModel.from_pretrained("me/full", modalities=["s1"], **CODE)'
        limit = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
"""
        environment = hub.environment(tmp_path / "home")
        output = run_python(CHECK + limit + failing(load), tmp_path, environment, package=False)
        assert "File too large" in output, output
        run_python(CHECK + f'same({load}, "pruned")\n', tmp_path, environment, package=False)

    def test_read_only_cache(self, hub, tmp_path):
        """What is in it is used; what is not cannot be fetched, and the error names permissions."""
        environment = hub.environment(tmp_path / "home")
        run_python(CHECK + 'AutoModel.from_pretrained("me/pruned", **CODE)', tmp_path, environment, package=False)
        folders = [path for path in (tmp_path / "home").rglob("*") if path.is_dir()] + [tmp_path / "home"]
        for folder in folders:
            folder.chmod(0o500)
        options = {"package": False, "drop_privileges": True}
        try:
            script = CHECK + 'same(AutoModel.from_pretrained("me/pruned", **CODE), "pruned")\n'
            run_python(script, tmp_path, environment, **options)
            script = "from modeling_mapex import MapexModel\n" + failing('MapexModel.from_pretrained("me/grouped")')
            output = run_python(script, tmp_path, environment, drop_privileges=True)
            assert re.search(r"[Pp]ermission", output), output
        finally:
            for folder in folders:
                folder.chmod(0o700)

    def test_two_processes_at_once(self, hub, tmp_path):
        script = CHECK + 'same(AutoModel.from_pretrained("me/grouped", modalities=["s1"], **CODE), "pruned")\n'
        environment = hub.environment(tmp_path / "home")
        # The cache of files is shared. That of code modules is not: transformers copies into it file by file, and a
        # second process that comes in between finds half of them.
        modules = [{"HF_MODULES_CACHE": str(tmp_path / f"modules-{index}")} for index in range(2)]
        processes = [start_python(script, tmp_path, {**environment, **own}, package=False) for own in modules]
        for process in processes:
            finish(process)
        weights = {name: size for name, size in hub.served.items() if name.endswith(".safetensors")}
        assert weights == {name: hub.files("me/grouped")[name].size for name in weights}, "each once, for both"


class TestPushing:
    def test_cards(self, hub):
        from huggingface_hub import ModelCard

        cards = {
            name: ModelCard(hub.read(f"me/{name}", "README.md").decode())
            for name in ("full", "grouped", "pruned", "tuned", "tuned-plain", "tuned-again")
        }
        for name, card in cards.items():
            assert card.data.library_name == "transformers"
            if name != "tuned-plain":  # stock Trainer writes its own
                assert card.data.license == "cc-by-4.0" and f'from_pretrained("me/{name}"' in card.text
        assert "pretrained" in cards["grouped"].data.tags
        assert (cards["pruned"].data.base_model, cards["pruned"].data.base_model_relation) == ("me/full", "finetune")
        assert hub.first_commit in cards["pruned"].text
        for name in ("tuned", "tuned-again"):
            card = cards[name]
            assert card.data.base_model == "me/grouped" and card.data.pipeline_tag == "image-classification"
            assert card.data.datasets == ["me/floods"]
            metrics = {result.metric_type: result.metric_value for result in card.data.eval_results}
            assert set(metrics) == {"loss", "accuracy"} and f"| accuracy | {metrics['accuracy']:.4g} |" in card.text
        assert {"floods", "generated_from_trainer"} <= set(cards["tuned"].data.tags)

    def test_files(self, hub):
        code = {path for path in hub.files("me/full") if path.endswith(".py")}
        assert {"modeling_mapex.py", "checkpoint_mapex.py", "modelcard_mapex.py"} <= code
        beside = {"README.md", "config.json", "preprocessor_config.json"}
        assert set(hub.files("me/full")) == code | beside | {"model.safetensors"}
        grouped = {path for path in hub.files("me/grouped") if ".safetensors" in path}
        assert set(hub.files("me/grouped")) == code | beside | grouped and "model.safetensors" not in grouped
        assert len(hub.repository("me/grouped").commits) == 2, "one commit beside that of the creation"

    def test_pushing_again(self, hub, tmp_path):
        """Another layout replaces the first, and an edited card stays, here and there."""
        script = (
            MODEL
            + """
import os
model.push_to_hub("me/again")
model.push_to_hub("me/again", shard_by_modality=True)
"""
        )
        environment = hub.environment(tmp_path / "home")
        run_python(script, tmp_path, environment)
        weights = {path for path in hub.files("me/again") if ".safetensors" in path}
        assert "model-trunk.safetensors" in weights and "model.safetensors" not in weights
        edited = hub.read("me/again", "README.md") + b"\nAsk Jane before you use it on snow.\n"
        hub.put("me/again", {"README.md": edited, "notes.txt": b"mine", "model-of-the-harbour.safetensors": b"x"})
        script = (
            MODEL
            + """
model.push_to_hub("me/again")
model.save_pretrained("local", push_to_hub=True, repo_id="me/again", commit_message="From the folder")
open("local/optimizer.pt", "w").write("x")
os.makedirs("local/checkpoint-3")
open("local/checkpoint-3/config.json", "w").write("{}")
model.save_pretrained("local", push_to_hub=True, repo_id="me/again", shard_by_modality=True)
"""
        ).replace("import torch", "import os, torch")
        run_python(script, tmp_path, environment)
        assert hub.read("me/again", "README.md") == edited
        assert (tmp_path / "local" / "README.md").read_bytes() == edited
        files = set(hub.files("me/again"))
        assert "notes.txt" in files and "optimizer.pt" not in files and "checkpoint-3/config.json" not in files
        assert "model.safetensors" not in files and "model-trunk.safetensors" in files
        titles = [commit.title for commit in hub.repository("me/again").commits.values()]
        assert "From the folder" in titles

    def test_without_permission(self, hub, tmp_path):
        script = MODEL + failing('model.push_to_hub("other/model")') + failing('model.push_to_hub("me/full")')
        output = run_python(script, tmp_path, hub.environment(tmp_path / "1", token=None))
        assert output.count("401 Unauthorized") == 2, output
        output = run_python(script, tmp_path, hub.environment(tmp_path / "2"))
        assert "403" in output.splitlines()[0]

    def test_nothing_is_made_on_the_hub_if_saving_fails(self, hub, tmp_path):
        script = MODEL + "config.expert_statistics = model.config.expert_statistics = None\n"
        script += failing('model.push_to_hub("me/never", shard_by_modality=True)')
        assert "calibrate_experts" in run_python(script, tmp_path, hub.environment(tmp_path / "home"))
        assert ("model", "me/never") not in hub.repositories

    def test_a_push_that_is_cut(self, hub, tmp_path):
        """No commit is made of half a push, and pushing again sends only what has not arrived."""
        hub.fail("/api/models/me/cut/commit/main", method="POST", status=500, times=1)
        script = MODEL + failing('model.push_to_hub("me/cut", shard_by_modality=True)')
        environment = hub.environment(tmp_path / "home")
        assert "500" in run_python(script, tmp_path, environment)
        assert hub.files("me/cut") == {}
        hub.reset_counters()
        run_python(MODEL + 'model.push_to_hub("me/cut", shard_by_modality=True)\n', tmp_path, environment)
        assert not [path for method, path, _ in hub.requests if method == "PUT"]
        assert "model-trunk.safetensors" in hub.files("me/cut")


class TestBytes:
    """At base width, so that weights and not headers are what is counted."""

    @pytest.fixture(scope="class")
    @classmethod
    def base(cls, tmp_path_factory):
        root = tmp_path_factory.mktemp("base")
        script = """
from modeling_mapex import *

config = MapexConfig.from_preset("base", ["s1", "s2", "rgb", "dem"], num_hidden_layers=2, moe_layers=[0, 1],
                                 num_experts=4, decoder_num_hidden_layers=1)
for index, name in enumerate(config.modalities):
    rows = [[1.0 if expert == (index + layer) % 4 else 0.0 for expert in range(4)] for layer in range(2)]
    config.expert_statistics = {
        **(config.expert_statistics or {}),
        name: {"tokens": 1, "usage": rows, "gate": rows, "saliency": rows},
    }
model = MapexForPreTraining(config)
model.save_pretrained("grouped", shard_by_modality=True)
model.prune_for_modalities(["s1"]).save_pretrained("pruned")
"""
        run_python(script, root)
        with HubServer(root / "server") as hub:
            for name in ("grouped", "pruned"):
                hub.put(f"me/{name}", {file.name: file.read_bytes() for file in (root / name).iterdir()})
            yield hub

    def test_only_what_is_kept_is_served(self, base, tmp_path):
        script = """
import torch
from peak_memory import peak_megabytes, reset_peak
from transformers import AutoModelForPreTraining

reset_peak()
before = peak_megabytes()
options = {"modalities": ["s1"]} if "grouped" in NAME else {}
model = AutoModelForPreTraining.from_pretrained(NAME, trust_remote_code=True, **options)
total = sum(parameter.sum() for parameter in model.parameters())
size = sum(parameter.numel() * 4 for parameter in model.parameters())
print(size / 1e6, peak_megabytes() - before)
"""
        served, peaks = {}, {}
        for name in ("grouped", "pruned"):
            base.reset_counters()
            code, environment = f'NAME = "me/{name}"\n' + script, base.environment(tmp_path / name)
            run_python(code, tmp_path, environment, package=False)
            served[name] = dict(base.served)
            # Again from the cache: what downloading takes depends on how many files arrive at the same moment.
            base.reset_counters()
            output = run_python(code, tmp_path, environment, package=False)
            assert not [file for file in base.served if file.endswith(".safetensors")], "nothing a second time"
            peaks[name] = [float(number) for number in output.split()]
        files = base.files("me/grouped")
        needed = {"model-trunk", "model-decoder", "model-experts-s1", "model-decoder-s1"}
        weights = {name for name in served["grouped"] if name.endswith(".safetensors")}
        assert weights == {f"{name}.safetensors" for name in needed}
        assert all(size == files[name].size for name, size in served["grouped"].items()), "each file once"
        total, equivalent = sum(served["grouped"].values()), sum(served["pruned"].values())
        assert total <= 1.02 * sum(files[name].size for name in weights)
        assert total <= 1.02 * equivalent, (total, equivalent)
        assert total < 0.5 * sum(entry.size for entry in files.values())
        # Beside the weights there is the client, with code that is loaded late: the same for both.
        (size, peak), (_, usual_peak) = peaks["grouped"], peaks["pruned"]
        assert peak < usual_peak + 0.1 * size, peaks


class TestXet:
    """The client's default protocol for large files: chunks, deduplicated, in a store that stands for the Hub's."""

    def test_round_trip(self, world, tmp_path, monkeypatch):
        pytest.importorskip("hf_xet", reason="an optional part of huggingface_hub")
        monkeypatch.setenv("EXPECTED", str(world[1] / "expected.safetensors"))
        with HubServer(tmp_path / "server", xet=True) as hub:
            script = MODEL + 'model.push_to_hub("me/grouped", shard_by_modality=True)\n'
            script += 'model.save_pretrained("same", shard_by_modality=True)\n'
            run_python(script, tmp_path, hub.environment(tmp_path / "home"))
            assert not [path for method, path, _ in hub.requests if method == "PUT"], "not by LFS"
            assert any((tmp_path / "server" / "xet").rglob("*")), "there is something in the store"
            hub.learn_xet_hashes(tmp_path / "same")
            script = CHECK + 'same(AutoModel.from_pretrained("me/grouped", modalities=["s1"], **CODE), "pruned")\n'
            run_python(script, tmp_path, hub.environment(tmp_path / "home-2"), package=False)
            assert not [name for name in hub.served if name.endswith(".safetensors")], "not over HTTP"


def test_unprune_after_a_round_trip(world, tmp_path):
    """Full from the Hub, pruned while loading, trained, pushed, loaded and put back."""
    hub, _ = world
    script = """
import torch
from modeling_mapex import *

full = MapexForPreTraining.from_pretrained("me/grouped")
small = MapexForPreTraining.from_pretrained("me/grouped", modalities=["s1", "dem"])
assert all(torch.equal(value, full.state_dict()[key]) for key, value in unprune(full, small).state_dict().items())
for parameter in small.parameters():
    parameter.data.add_(0.1)
small.push_to_hub("me/trained")
small = MapexForPreTraining.from_pretrained("me/trained")
merged = unprune(full, small)
merged.save_pretrained("merged", shard_by_modality=True)
again = MapexForPreTraining.from_pretrained("merged", modalities=["s1", "dem"])
assert all(torch.equal(value, small.state_dict()[key]) for key, value in again.state_dict().items())
"""
    run_python(script, tmp_path, hub.environment(tmp_path / "home"))
    assert os.path.isdir(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model-trunk.safetensors")
    shutil.rmtree(tmp_path / "merged")
