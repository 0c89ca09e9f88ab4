"""The model card says what the configuration says, and an edited one is left alone."""

import re

import pytest
import torch
from conftest import MODALITIES, randomize, tiny_config, tiny_inputs
from huggingface_hub import ModelCard

from modeling_mapex import (
    MapexConfig,
    MapexForImageClassification,
    MapexForPreTraining,
    MapexForSemanticSegmentation,
    MapexModel,
)
from modeling_mapex.modelcard_mapex import is_edited, write_model_card


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = randomize(MapexForPreTraining(tiny_config(card_data={"license": "mit", "datasets": ["me/chips"]})))
    model.calibrate_experts([{"pixel_values": tiny_inputs([name])} for name in MODALITIES])
    return model


def card_of(model, folder, **options):
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def tables(text):
    """Rows of all tables, by their heading."""
    found = {}
    for block in re.findall(r"((?:^\|.*\|\n)+)", text + "\n", flags=re.M):
        rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in block.strip().splitlines()]
        found[rows[0][0]] = [rows[0]] + rows[2:]
    return found


class TestContent:
    def test_head(self, model, tmp_path):
        data = card_of(model, tmp_path).data
        assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
        assert (data.license, data.datasets, data.base_model) == ("mit", ["me/chips"], None)
        assert {"mapex", "remote-sensing", "radar", "optical", "height"} <= set(data.tags)
        classifier = MapexForImageClassification(tiny_config())
        data = card_of(classifier, tmp_path / "classifier").data
        assert (data.pipeline_tag, data.license, data.eval_results) == ("image-classification", None, None)

    def test_names_alone_are_lists_of_one(self, tmp_path):
        config = tiny_config()
        config.card_data = {"datasets": "me/flood", "tags": "flood"}
        model = MapexForImageClassification(config)
        model.training_record = {"metrics": {"accuracy": 0.5}, "hyperparameters": {}}
        data = card_of(model, tmp_path).data
        assert data.datasets == ["me/flood"] and data.eval_results[0].dataset_name == "me/flood"
        assert "flood" in data.tags and "f" not in data.tags

    def test_inputs(self, tmp_path):
        config = MapexConfig.from_preset("nano", ["s1", "dem"], num_hidden_layers=2, hidden_size=32)
        rows = tables(card_of(MapexModel(config), tmp_path).text)["modality"]
        assert rows[1] == ["`dem`", "elevation", "metres", "30 m", "8 x 8 pixels, 240 m", "yes"]
        assert rows[2][:4] == ["`s1`", "VV, VH", config.modalities["s1"]["unit"], "10 m"]

    def test_experts_and_size(self, model, tmp_path):
        pruned = model.prune_for_modalities(["radar", "height"], coverage=0.8)
        pruned.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        found = tables(card.text)
        config = pruned.config
        for row, block, kept in zip(found["block"][1:], config.moe_layers, config.expert_ids):
            assert row[:3] == [str(block), ", ".join(map(str, kept)), f"{len(kept)} of 4"]
        reached = config.pruning["coverage_reached"]
        assert found["block"][0][3:] == ["coverage, height", "coverage, radar"]
        assert found["block"][1][3:] == [f"{reached[name][0]:.3f}" for name in ("height", "radar")]
        assert "asked for: 0.8" in card.text
        before, after = model.num_parameters(), sum(tensor.numel() for tensor in pruned.state_dict.values())
        sizes = found["size"]
        assert sizes[1] == ["parameters", f"{before:,}", f"{after:,}", f"{1 - after / before:.0%}"]
        megabytes = (tmp_path / "model.safetensors").stat().st_size / 1e6
        assert sizes[2][2] == f"{megabytes:.1f} MB"
        assert "from a model in memory" in card.text

    def test_source(self, model, tmp_path):
        model.save_pretrained(tmp_path / "whole-model")
        local = MapexForPreTraining.from_pretrained(tmp_path / "whole-model", modalities=["radar"])
        card = card_of(local, tmp_path / "pruned")
        assert "`whole-model`, a local checkpoint" in card.text and card.data.base_model is None
        assert str(tmp_path) not in card.content and str(tmp_path) not in (tmp_path / "pruned/config.json").read_text()
        assert card.data.license == "mit", "it outlives pruning"
        local.config.pruning = {**local.config.pruning, "source": "org/mapex", "revision": "0123abc"}
        card = card_of(local, tmp_path / "pruned")
        assert (card.data.base_model, card.data.base_model_relation) == ("org/mapex", "finetune")
        assert "https://huggingface.co/org/mapex/tree/0123abc" in card.text

    def test_results(self, model, tmp_path):
        tuned = model.prune_for_modalities(["radar"]).build(MapexForImageClassification, id2label={0: "wet", 1: "dry"})
        tuned.training_record = {
            "metrics": {"accuracy": 0.8125, "loss": 0.5},
            "hyperparameters": {"learning_rate": 1e-4},
        }
        card = card_of(tuned, tmp_path)
        results = {result.metric_type: result for result in card.data.eval_results}
        assert results["accuracy"].metric_value == 0.8125 and results["accuracy"].dataset_name == "me/chips"
        found = tables(card.text)
        assert found["metric"][1:] == [["accuracy", "0.8125"], ["loss", "0.5"]]
        assert found["setting"][1:] == [["learning_rate", "`0.0001`"]]
        assert "Its 2 labels: `wet`, `dry`" in card.text

    def test_snippets_run(self, model, tmp_path, monkeypatch):
        """Those of the card, with the repository replaced by the folder."""
        pruned = model.prune_for_modalities(["radar"]).build()
        for saved, folder in ((pruned, "pruned"), (pruned.mapex, "encoder")):
            saved.config.pruning = pruned.config.pruning
            saved.save_pretrained(tmp_path / folder)
            text = (tmp_path / folder / "README.md").read_text()
            monkeypatch.chdir(tmp_path)
            snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
            assert len(snippets) == 2
            for snippet in snippets:
                code = snippet.replace(', revision="..."', "")
                code = re.sub(r"processor = .*", "", code)  # these modalities have no statistics
                exec(code, {})

    def test_names_all_code_and_how_to_read_scenes(self, tmp_path):
        text = card_of(MapexForSemanticSegmentation(tiny_config(dense_window_metres=160)), tmp_path).text
        code = {file.name.removesuffix("mapex.py") for file in tmp_path.glob("*_mapex.py")}
        assert code == set(re.findall(r"`(\w+_)`", text[text.index("## The code") : text.index("## Limits")]))
        assert "crops of 160 m: read larger images by `model.predict_map(...)`" in text

    def test_tensors_are_not_needed(self, tmp_path):
        """Without mixtures, statistics or pruning the card has nothing to say of them, and says so."""
        model = MapexModel(tiny_config(moe_layers=[]))
        assert "## Experts" not in card_of(model, tmp_path / "dense").text
        text = card_of(MapexModel(tiny_config()), tmp_path / "fresh").text
        assert "has not been calibrated" in text and "pruned from" not in text


class TestEditing:
    def test_own_text_is_renewed(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        first = (tmp_path / "README.md").read_text()
        assert not is_edited(first) and not is_edited(first.replace("\n", "\r\n"))
        model.prune_for_modalities(["radar"]).save_pretrained(tmp_path)
        assert "It was pruned" in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize(
        "edit",
        [
            lambda text: text + "more\n",
            lambda text: text.replace("## Limits", "## Limits and Jane's advice"),
            lambda text: text.replace("license: mit", "license: cc0-1.0"),
            lambda text: text.rsplit("\n<!--", 1)[0],
            lambda text: "# Mine\n",
            lambda text: "",
        ],
    )
    def test_edited_text_stays(self, model, tmp_path, edit):
        model.save_pretrained(tmp_path)
        text = edit((tmp_path / "README.md").read_text())
        (tmp_path / "README.md").write_text(text)
        model.prune_for_modalities(["radar"]).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == text

    def test_tags_are_added_to_an_edited_card(self, model, tmp_path):
        (tmp_path / "README.md").write_text("---\ntags:\n- own\nlicense: mit\n---\n\n# Mine\n")
        write_model_card(model, tmp_path, tags=["floods", "own"])
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.tags == ["own", "floods"] and card.data.license == "mit" and card.text.strip() == "# Mine"
        assert "floods" in card_of(model, tmp_path).data.tags
        model.save_pretrained(tmp_path / "fresh")
        write_model_card(model, tmp_path / "fresh", tags=["floods"], repo_id="me/model")
        text = (tmp_path / "fresh" / "README.md").read_text()
        assert 'from_pretrained("me/model"' in text and "- floods" in text and not is_edited(text)
