"""A sensor that is added begins as the one it is like: it gives the same tokens of the same pixels."""

import pytest
import torch
from conftest import MODALITIES, randomize, subsets, tiny_config, tiny_inputs
from huggingface_hub.errors import StrictDataclassError
from test_pruning_mapex import calibrated

from modeling_mapex import (
    MapexForImageClassification,
    MapexForPreTraining,
    MapexForSemanticSegmentation,
    MapexModel,
    add_modality,
)


CLASSES = [MapexModel, MapexForPreTraining, MapexForImageClassification, MapexForSemanticSegmentation]


def tokens(model, pixel_values):
    with torch.no_grad():
        return model.base_model(pixel_values).last_hidden_state


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("conditioned", [True, False])
def test_same_pixels_same_tokens(model_class, conditioned):
    model = randomize(model_class(tiny_config(num_labels=5, conditioned_router=conditioned))).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    extended = add_modality(model, "asar", like="radar")
    assert list(extended.config.modalities) == ["asar", *sorted(MODALITIES)]  # first of all: every row moves
    assert type(extended) is model_class and not extended.training

    pixels = tiny_inputs()
    assert torch.equal(tokens(extended, pixels), tokens(model, pixels))
    assert torch.equal(tokens(extended, {"asar": pixels["radar"]}), tokens(model, {"radar": pixels["radar"]}))
    if model_class is MapexForSemanticSegmentation:
        with torch.no_grad():
            maps = [one({name: pixels["radar"]}).logits for one, name in ((extended, "asar"), (model, "radar"))]
        assert torch.equal(*maps)
    assert extended.num_parameters() == model_class(extended.config).num_parameters()
    storages = {tensor.untyped_storage().data_ptr() for tensor in extended.state_dict().values()}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) and tensor.untyped_storage().data_ptr() not in storages, key


def test_it_is_pruned_and_saved_like_any_other(tmp_path):
    model = calibrated()
    extended = add_modality(model, "asar", like="radar")
    pixels = tiny_inputs()["radar"]
    alone = extended.prune_for_modalities(["asar"], coverage=0.5).build()
    expected = model.prune_for_modalities(["radar"], coverage=0.5).build()
    assert alone.config.expert_ids == expected.config.expert_ids
    torch.testing.assert_close(tokens(alone, {"asar": pixels}), tokens(expected, {"radar": pixels}))
    for sharded in (False, True):
        extended.save_pretrained(tmp_path / f"{sharded}", shard_by_modality=sharded)
        again = MapexModel.from_pretrained(tmp_path / f"{sharded}", modalities=["asar"], coverage=0.5)
        assert torch.equal(tokens(again, {"asar": pixels}), tokens(alone, {"asar": pixels}))
    # Pruned first, added after.
    late = add_modality(expected, "asar", like="radar")
    torch.testing.assert_close(tokens(late, {"asar": pixels}), tokens(expected, {"radar": pixels}))


def test_it_may_have_some_bands_in_another_order():
    model = calibrated(MapexForPreTraining).eval()
    spec = model.config.modalities["optical"]
    first, last = spec["bands"][0], spec["bands"][-1]
    extended = add_modality(model, "drone", like="optical", bands={"b": last, "a": first}, gsd=2.5)
    added = extended.config.modalities["drone"]
    assert added["bands"] == ["b", "a"] and added["gsd"] == 2.5 and added["patch_size"] == spec["patch_size"]
    pixels = tiny_inputs()["optical"]
    cut = model.prune_for_modalities({"optical": [last, first]}, experts_per_layer=4).build()
    chosen = pixels[:, [len(spec["bands"]) - 1, 0]]
    same_scale = tokens(extended, {"drone": chosen}), tokens(cut, {"optical": chosen})
    assert not torch.allclose(*same_scale)  # its pixels lie closer together
    with torch.no_grad():
        features = extended.base_model({"drone": chosen}, gsd={"drone": spec["gsd"]}).last_hidden_state
    torch.testing.assert_close(features, same_scale[1])
    generator = torch.Generator().manual_seed(0)
    assert extended({"drone": chosen}, generator=generator).loss.isfinite()


def test_training_tells_them_apart():
    model = add_modality(randomize(MapexModel(tiny_config())).eval(), "asar", like="radar")
    pixels = tiny_inputs()["radar"]
    (model({"asar": pixels}).last_hidden_state ** 2).mean().backward()
    embeddings = model.embeddings.patch_embeddings
    assert embeddings["asar"].projection.weight.grad.abs().max() > 0
    assert embeddings["radar"].projection.weight.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "radar", "like": "radar"}, "There is a modality `radar` already: choose a name beside"),
        ({"name": "asar", "like": "sonar"}, r"`like` must be one of \['height', 'optical', 'radar'\], got `sonar`"),
        ({"name": "asar", "like": "radar", "bands": {"HH": "XX"}}, r"begin as bands of `radar`, which has .* not"),
        ({"name": "asar", "like": "radar", "bands": {}}, "No bands asked for"),
        ({"name": "asar", "like": "radar", "bands": {"HH": "VV", "HV": "VV"}}, r"\['VV'\] are of several"),
        ({"name": "asar", "like": "radar", "bands": ["VV", "VH"]}, "must say which band of `radar` each of yours"),
        ({"name": "asar", "like": "radar", "patch_size": 2}, "has the `patch_size` of the one it is like"),
        ({"name": "asar", "like": "radar", "metres": 10}, "metres"),
        ({"name": "a.b", "like": "radar"}, "a.b"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises((TypeError, ValueError, StrictDataclassError), match=message):
        add_modality(MapexModel(tiny_config()), **arguments)


def test_statistics_come_with_it():
    model = calibrated()
    extended = add_modality(model, "asar", like="radar")
    statistics = extended.config.expert_statistics
    assert statistics["asar"] == statistics["radar"] and "asar" not in model.config.expert_statistics
    extended.calibrate_experts(
        [{"pixel_values": {**tiny_inputs(names), "asar": tiny_inputs()["radar"]}} for names in subsets(MODALITIES)]
    )
    assert statistics.keys() == extended.config.expert_statistics.keys()
