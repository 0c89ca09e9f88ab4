"""Maps: sensors of any resolution meet on one ground, what is absent does not count, and all prune."""

import copy

import pytest
import torch
from conftest import MODALITIES, randomize, subsets, tiny_config, tiny_inputs
from transformers import (
    AutoBackbone,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_mapex import (
    MapexBackbone,
    MapexForPixelRegression,
    MapexForPreTraining,
    MapexForSemanticSegmentation,
    unprune,
)
from modeling_mapex.dense_mapex import fourier_features, fuse_maps, ground_extent, reference_modality
from modeling_mapex.tokens_mapex import token_layout


HEADS = [MapexForSemanticSegmentation, MapexForPixelRegression]
SAME_GROUND = {"radar": (16, 16), "optical": (16, 16), "height": (8, 8)}  # pixels of 10, 10 and 20 m


def tiny_model(model_class=MapexForSemanticSegmentation, **overrides):
    return randomize(model_class(tiny_config(num_labels=3, **overrides)))


def inputs(names=("radar", "optical", "height"), batch_size=3):
    return {name: torch.randn(batch_size, len(MODALITIES[name]["bands"]), *SAME_GROUND[name]) for name in names}


@torch.no_grad()
def predict(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def coordinates(rows: int, columns: int, metres: float) -> torch.Tensor:
    """A map `(1, 2, rows, columns)` of where the centres of its cells lie, in metres."""
    down = (torch.arange(rows) + 0.5) * metres
    right = (torch.arange(columns) + 0.5) * metres
    return torch.stack(torch.meshgrid(down, right, indexing="ij"))[None]


class TestFusion:
    @pytest.mark.parametrize("metres, cells", [(20.0, 8), (7.5, 40), (50.0, 6)])
    def test_places_agree_in_metres(self, metres, cells):
        """A map of coordinates, resampled onto another grid, holds the coordinates of that grid."""
        maps = {"fine": torch.zeros(1, 2, 12, 12), "other": coordinates(cells, cells, metres)}
        present = {"fine": torch.zeros(1, 1, 12, 12), "other": torch.ones(1, 1, cells, cells)}
        extents = {"fine": torch.tensor([[120.0, 120.0]]), "other": torch.tensor([[cells * metres] * 2])}
        fused = fuse_maps(maps, present, extents, "fine", (12, 12))
        expected = coordinates(12, 12, 10.0)
        inside = (expected > metres / 2).all(1) & (expected < cells * metres - metres / 2).all(1)
        assert inside.sum() > 40
        torch.testing.assert_close(fused[0][:, inside[0]], expected[0][:, inside[0]], rtol=1e-4, atol=1e-2)

    def test_beyond_a_smaller_image_only_the_others_count(self):
        maps = {"fine": torch.full((1, 1, 8, 8), 1.0), "small": torch.full((1, 1, 2, 2), 3.0)}
        present = {name: torch.ones_like(values) for name, values in maps.items()}
        extents = {"fine": torch.tensor([[80.0, 80.0]]), "small": torch.tensor([[40.0, 40.0]])}
        fused = fuse_maps(maps, present, extents, "fine", (8, 8))[0, 0]
        expected = torch.ones(8, 8)
        expected[:4, :4] = 2.0
        torch.testing.assert_close(fused, expected)

    def test_resolution_of_each_sample(self):
        """Sample by sample what the batch gives together."""
        config = tiny_config()
        pixels = {"radar": torch.randn(2, 2, 16, 16), "height": torch.randn(2, 1, 8, 8)}
        gsd = {"height": torch.tensor([20.0, 26.0])}
        model = tiny_model()
        together = predict(model, pixels, gsd=gsd)
        for sample in range(2):
            single = {name: values[sample : sample + 1] for name, values in pixels.items()}
            alone = predict(model, single, gsd={"height": gsd["height"][sample : sample + 1]})
            torch.testing.assert_close(together[sample : sample + 1], alone, rtol=1e-4, atol=1e-4)
        layout = token_layout(config.modalities, pixels)
        assert ground_extent(layout.grids, config.modalities, gsd)["height"].tolist() == [
            [160.0, 160.0],
            [208.0, 208.0],
        ]
        assert reference_modality(layout.grids, config.modalities) == "radar"  # of equals the first

    def test_sample_without_the_reference_does_not_depend_on_its_batch(self):
        """The third sample has no radar, whose place the batch fills with any resolution."""
        names = ("radar", "optical", "height")
        pixels = inputs(names)
        mask = {"radar": torch.tensor([True, True, False])}
        optical = torch.tensor([10.0, 20.0, 12.0])
        alone = {name: values[2:] for name, values in pixels.items() if name != "radar"}
        for model in (tiny_model(), MapexBackbone(tiny_config(out_indices=[2]))):
            randomize(model)

            def run(*args, model=model, **kwargs):
                with torch.no_grad():
                    outputs = model(*args, **kwargs)
                return outputs.feature_maps[0] if isinstance(model, MapexBackbone) else outputs.logits

            expected = run(alone, gsd={"optical": optical[2:]})
            for filled in (10.0, 40.0):
                gsd = {"radar": torch.tensor([10.0, 20.0, filled]), "optical": optical}
                together = run(pixels, modality_mask=mask, gsd=gsd)
                torch.testing.assert_close(together[2:], expected, rtol=1e-4, atol=1e-4)
        extents = ground_extent(dict.fromkeys(names[:2], (4, 4)), tiny_config().modalities, gsd, mask)
        assert torch.equal(extents["radar"][2], extents["optical"][2])

    @pytest.mark.parametrize("side", [16, 120, 256])
    def test_half_precision_finds_the_same_places(self, side):
        """A map of coordinates over 256 pixels is told to half a pixel by bf16 itself; its places must not be worse."""
        values = torch.rand(1, 1, side, side).bfloat16().expand(2, -1, -1, -1)
        present = {name: torch.ones(2, 1, side, side) for name in ("fine", "other")}
        extents = {"fine": torch.tensor([[side * 10.0] * 2]), "other": torch.tensor([[side * 10.5] * 2])}
        alone = {"fine": present["fine"] * 0, "other": present["other"]}
        maps = {"fine": torch.zeros(2, 1, side, side), "other": values.float()}
        expected = fuse_maps(maps, alone, extents, "fine", (side, side))
        half = {name: features.bfloat16() for name, features in maps.items()}
        close = {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(fuse_maps(half, alone, extents, "fine", (side, side)).float(), expected, **close)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(fuse_maps(maps, alone, extents, "fine", (side, side)).float(), expected, **close)


class TestElevations:
    def test_features(self):
        pixels = torch.tensor([0.0, 1.0, 1 / 128]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
        features = fourier_features(pixels, 8)
        assert features.shape == (1, 34, 1, 3) and torch.equal(features[:, :2], pixels)
        assert not features[..., 0].any()  # zero stays zero
        longest, shortest = features[0, [2, 4], 0, 1], features[0, [-4, -2], 0, 2]
        torch.testing.assert_close(longest, torch.tensor([1.0, 1.0]))  # a quarter of a wave
        torch.testing.assert_close(shortest, torch.tensor([1.0, 1.0]))
        assert torch.equal(fourier_features(pixels, 0), pixels)

    def test_single_metres_are_learnt(self):
        """Water lies below 3 m, where elevations vary by hundreds; without the features it is not found."""
        modalities = {"dem": {"bands": ["elevation"], "gsd": 30.0, "patch_size": 4, "unit": "metres"}}
        torch.manual_seed(0)
        metres = torch.randint(0, 6, (8, 1, 16, 16)).float()
        labels = (metres[:, 0] < 3).long()
        right = {}
        for count in (8, 0):
            torch.manual_seed(0)
            config = tiny_config(
                modalities=modalities, num_labels=2, dense_num_frequencies=count, initializer_range=0.02
            )
            model = MapexForSemanticSegmentation(config).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            for _ in range(60):
                model({"dem": (metres - 275.0) / 400.0}, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            logits = predict(model.eval(), {"dem": (metres - 275.0) / 400.0})
            right[count] = (logits.argmax(dim=1) == labels).float().mean().item()
        assert right[8] > 0.95 and right[0] < 0.8

    def test_prunes_with_its_bands(self):
        modalities = copy.deepcopy(MODALITIES)
        modalities["optical"]["unit"] = "metres"
        model = tiny_model(modalities=modalities)
        assert model.dense_decoder.pixel_embeddings["optical"].weight.shape[1] == 4 * 17
        assert model.dense_decoder.pixel_embeddings["radar"].weight.shape[1] == 2
        model.calibrate_experts([{"pixel_values": inputs()}])
        small = model.prune_for_modalities({"optical": ["nir", "red"]}, coverage=1.0).build()
        pixels, whole = torch.randn(2, 2, 16, 16), torch.zeros(2, 4, 16, 16)
        whole[:, 3], whole[:, 2] = pixels[:, 0], pixels[:, 1]
        torch.testing.assert_close(
            predict(small, {"optical": pixels}), predict(model, {"optical": whole}), rtol=1e-4, atol=1e-4
        )


class TestMaps:
    @pytest.mark.parametrize("model_class", HEADS)
    @pytest.mark.parametrize("names", subsets(MODALITIES), ids="+".join)
    def test_any_subset_at_the_size_of_the_labels(self, model_class, names):
        model = tiny_model(model_class)
        for size in ((16, 16), (30, 22)):
            labels = torch.randint(0, 3, (3, *size)) if model_class is HEADS[0] else torch.randn(3, *size)
            outputs = model(inputs(names), labels=labels)
            outputs.loss.backward()
            assert outputs.logits.shape[0] == 3 and outputs.logits.shape[-2:] == size
            assert torch.isfinite(outputs.loss)

    @pytest.mark.parametrize("model_class", HEADS)
    def test_absent_equals_left_out(self, model_class):
        model, pixels = tiny_model(model_class), inputs()
        pixels["optical"][1] = torch.nan
        masked = predict(model, pixels, modality_mask={"optical": torch.tensor([True, False, True])})
        without = {name: values[1:2] for name, values in pixels.items() if name != "optical"}
        left_out = predict(model, without, output_size=(16, 16))
        torch.testing.assert_close(masked[1:2], left_out, rtol=1e-4, atol=1e-4)

    def test_invalid_pixels_are_not_read(self):
        model, pixels = tiny_model(), inputs(["radar", "optical"])
        valid = torch.ones(3, 16, 16, dtype=torch.bool)
        valid[:, 3:7, 2:9] = False
        one = predict(model, pixels, valid_mask={"radar": valid})
        pixels["radar"] = torch.where(valid[:, None], pixels["radar"], torch.nan)
        torch.testing.assert_close(predict(model, pixels, valid_mask={"radar": valid}), one)

    @pytest.mark.parametrize("model_class", HEADS)
    def test_labels_where_no_sensor_has_data(self, model_class):
        """Half of the image: gradients are those of an image, not larger by orders of magnitude."""
        model = model_class(tiny_config(num_labels=3)).train()  # as it begins, without biases
        pixels = {"radar": torch.randn(2, 2, 64, 64)}
        labels = torch.randint(0, 3, (2, 64, 64)).to(torch.int64 if model_class is HEADS[0] else torch.float32)
        norms = []
        for columns in (0, 32):
            valid = torch.ones(2, 64, 64, dtype=torch.bool)
            valid[:, :, 64 - columns :] = False
            model.zero_grad()
            model(pixels, valid_mask={"radar": valid}, labels=labels).loss.backward()
            norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())
        assert norms[1] < 3 * norms[0]

    def test_what_else_is_in_the_batch_does_not_matter(self):
        model, pixels = tiny_model(), inputs(batch_size=4)
        together = predict(model, pixels)
        alone = predict(model, {name: values[2:3] for name, values in pixels.items()})
        torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("model_class", HEADS)
    def test_learns_what_pixels_show(self, model_class):
        """A map that only single pixels can tell: patches of 4 x 4 alone could not draw it."""
        model = tiny_model(model_class, initializer_range=0.02).train()
        pixels = inputs(["radar"])
        labels = (pixels["radar"][:, 0] > 0).long() if model_class is HEADS[0] else pixels["radar"][:, 0].clone()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(60):
            loss = model(pixels, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.35 * losses[0]

    def test_compiled_and_half_precision(self):
        model, pixels = tiny_model(initializer_range=0.02), inputs()
        expected = predict(model, pixels)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(predict(compiled, pixels), expected, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(pixels, labels=torch.randint(0, 3, (3, 16, 16)))
            outputs.loss.backward()
        assert (outputs.logits.float() - expected).norm() < 0.1 * (expected - expected.mean()).norm()
        larger = {
            name: torch.randn(1, values.shape[1], *(16 * side for side in SAME_GROUND[name]))
            for name, values in pixels.items()
        }
        expected = predict(model, larger)
        half = predict(model.to(torch.bfloat16), larger).float()
        assert (half - expected).norm() < 0.1 * (expected - expected.mean()).norm()


class TestPruning:
    @pytest.mark.parametrize("model_class", HEADS)
    def test_equals_the_full_model_with_experts_masked(self, model_class):
        model = tiny_model(model_class)
        model.calibrate_experts([{"pixel_values": inputs()}])
        pruned = model.prune_for_modalities(["radar", "height"], experts_per_layer=2)
        pixels = inputs(["radar", "height"])
        mask = [torch.tensor([expert in kept for expert in range(4)]) for kept in pruned.config.expert_ids]
        small = pruned.build()
        torch.testing.assert_close(
            predict(small, pixels), predict(model, pixels, expert_mask=mask), rtol=1e-4, atol=1e-4
        )
        assert not [name for name in pruned.state_dict if "optical" in name]

    def test_bands(self):
        """With the other bands at zero, which the processor makes of their mean, nothing changes."""
        model = tiny_model()
        model.calibrate_experts([{"pixel_values": inputs()}])
        small = model.prune_for_modalities({"optical": ["nir", "red"]}, coverage=1.0).build()
        pixels = torch.randn(2, 2, 16, 16)
        whole = torch.zeros(2, 4, 16, 16)
        whole[:, 3], whole[:, 2] = pixels[:, 0], pixels[:, 1]
        torch.testing.assert_close(
            predict(small, {"optical": pixels}), predict(model, {"optical": whole}), rtol=1e-4, atol=1e-4
        )

    @pytest.mark.parametrize(
        "model_class, auto",
        [(HEADS[0], AutoModelForSemanticSegmentation), (HEADS[1], AutoModelForDepthEstimation)],
    )
    def test_saved_whole_and_loaded_in_part(self, model_class, auto, tmp_path):
        model = tiny_model(model_class)
        model.calibrate_experts([{"pixel_values": inputs()}])
        model.save_pretrained(tmp_path, shard_by_modality=True)
        pixels = inputs(["radar"])
        expected = model.prune_for_modalities(["radar"]).build()
        loaded = auto.from_pretrained(tmp_path, modalities=["radar"])
        assert type(loaded) is model_class
        for name, tensor in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        torch.testing.assert_close(predict(loaded, pixels), predict(expected, pixels))

    def test_statistics_of_the_batch_travel_along(self, tmp_path):
        """Normalised over the batch, the decoder has buffers: learnt in training, used afterwards, kept by all."""
        model = tiny_model(dense_normalization="batch").train()
        for _ in range(3):
            model(inputs(), labels=torch.randint(0, 3, (3, 16, 16))).loss.backward()
        statistics = {name: tensor for name, tensor in model.named_buffers() if "running" in name}
        assert statistics and not any(tensor.eq(0).all() or tensor.eq(1).all() for tensor in statistics.values())
        model.eval().calibrate_experts([{"pixel_values": inputs()}])
        pixels = inputs(["radar"])
        alone = predict(model, {"radar": pixels["radar"][:1]})
        torch.testing.assert_close(predict(model, pixels)[:1], alone, rtol=1e-4, atol=1e-4)
        small = model.prune_for_modalities(["radar"], experts_per_layer=4).build()
        torch.testing.assert_close(predict(small, pixels), predict(model, pixels), rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path, shard_by_modality=True)
        loaded = MapexForSemanticSegmentation.from_pretrained(tmp_path, modalities=["radar"], experts_per_layer=4)
        for name, tensor in small.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        whole = unprune(model, small)
        for name, tensor in model.state_dict().items():
            assert torch.equal(whole.state_dict()[name], tensor), name

    def test_head_on_a_pretrained_encoder(self, tmp_path):
        source = randomize(MapexForPreTraining(tiny_config()))
        source.save_pretrained(tmp_path)
        model = MapexForSemanticSegmentation.from_pretrained(tmp_path, num_labels=5)
        for name, tensor in source.mapex.state_dict().items():
            assert torch.equal(model.mapex.state_dict()[name], tensor)
        assert predict(model, inputs(["radar"])).shape == (3, 5, 16, 16)


class TestBackbone:
    def test_one_modality_is_its_grid_of_tokens(self):
        model = randomize(MapexBackbone(tiny_config(out_features=["stem", "stage2", "stage4"])))
        pixels = tiny_inputs(["optical"])
        with torch.no_grad():
            outputs = model(pixels)
            tokens = model.mapex(pixels).last_hidden_state
        assert [features.shape for features in outputs.feature_maps] == [(3, 32, 4, 6)] * 3
        torch.testing.assert_close(outputs.feature_maps[-1].flatten(2).transpose(1, 2), tokens)
        assert model.channels == [32, 32, 32] and outputs.hidden_states is None

    def test_the_same_stage_by_index_and_from_a_pruned_checkpoint(self, tmp_path):
        source = randomize(MapexForPreTraining(tiny_config()))
        source.calibrate_experts([{"pixel_values": inputs()}])
        source.save_pretrained(tmp_path)
        model = MapexBackbone.from_pretrained(tmp_path, modalities=["radar"], out_indices=[2, 4])
        assert model.out_features == ["stage2", "stage4"]
        with torch.no_grad():
            feature_maps = model(inputs(["radar"])).feature_maps
        assert [features.shape for features in feature_maps] == [(3, 32, 4, 4)] * 2
        config = copy.deepcopy(model.config)
        assert type(AutoBackbone.from_config(config)) is MapexBackbone

    def test_in_a_decoder_of_transformers(self):
        """UperNet passes on the one tensor that it is given."""
        config = tiny_config(out_features=["stage2", "stage4"], modalities={"optical": MODALITIES["optical"]})
        upernet = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=config, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=3
            )
        ).eval()
        assert type(upernet.backbone) is MapexBackbone
        pixels = tiny_inputs(["optical"])["optical"]
        with torch.no_grad():
            logits = upernet(pixels).logits
            maps = upernet.backbone({"optical": pixels}).feature_maps
            expected = upernet.decode_head(maps)
        assert logits.shape == (3, 3, *pixels.shape[2:])
        torch.testing.assert_close(
            logits, torch.nn.functional.interpolate(expected, size=pixels.shape[2:], mode="bilinear")
        )

    def test_a_tensor_for_several_sensors(self):
        with pytest.raises(TypeError, match="`pixel_values` must be a dictionary"):
            MapexBackbone(tiny_config())(tiny_inputs(["optical"])["optical"])

    def test_unknown_stage(self):
        with pytest.raises(ValueError, match="stage_names"):
            tiny_config(out_features=["stage9"])
