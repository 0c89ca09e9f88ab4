"""The sequence of tokens: where each comes from, and where it lies on the ground."""

import pytest
import torch
from conftest import randomize, tiny_config, tiny_inputs

from modeling_mapex import MapexForPreTraining
from modeling_mapex.tokens_mapex import sincos_embedding, token_layout, token_positions


def test_layout_by_hand():
    layout = token_layout(tiny_config().modalities, tiny_inputs())
    assert layout.grids == {"height": (4, 4), "optical": (4, 6), "radar": (4, 4)}
    assert layout.slices() == {"height": slice(0, 16), "optical": slice(16, 40), "radar": slice(40, 56)}
    assert layout.modality_ids.tolist() == [0] * 16 + [1] * 24 + [2] * 16
    assert layout.token_mask is None


class TestPositions:
    def test_sensors_over_the_same_ground_agree(self):
        config = tiny_config()
        layout = token_layout(config.modalities, tiny_inputs())
        positions, slices = token_positions(layout, config.modalities), layout.slices()
        # radar: patches of 4 x 10 m; height: of 2 x 20 m; both on a 4 x 4 grid
        assert torch.equal(positions[slices["radar"]], positions[slices["height"]])
        assert torch.equal(positions[slices["radar"]][5], torch.tensor([60.0, 60.0]))
        # optical is wider: its first four columns stand where radar's do
        assert torch.equal(positions[slices["optical"]].view(4, 6, 2)[:, :4].flatten(0, 1), positions[slices["radar"]])

    def test_gsd_override(self):
        config = tiny_config()
        layout = token_layout(config.modalities, tiny_inputs(["radar"]))
        positions = token_positions(layout, config.modalities)
        assert torch.equal(token_positions(layout, config.modalities, {"radar": 30.0}), 3 * positions)

    def test_gsd_of_each_sample(self):
        """A batch of two resolutions gives each sample what it would have alone, in the encoder and in pretraining."""
        config = tiny_config()
        pixel_values = tiny_inputs(["radar", "height"], batch_size=2)
        gsd = {"radar": torch.tensor([10.0, 30.0])}
        model = randomize(MapexForPreTraining(config))
        noise = model.draw_noise(pixel_values, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            together = model.mapex(pixel_values, gsd=gsd).last_hidden_state
            predicted = model(pixel_values, gsd=gsd, noise=noise).predictions
            for sample, metres in enumerate((10.0, 30.0)):
                one = {name: pixels[sample : sample + 1] for name, pixels in pixel_values.items()}
                alone = model.mapex(one, gsd={"radar": metres}).last_hidden_state[0]
                torch.testing.assert_close(together[sample], alone, rtol=1e-5, atol=1e-5)
                both = model(pixel_values, gsd={"radar": metres}, noise=noise).predictions
                torch.testing.assert_close(predicted["radar"][sample], both["radar"][sample], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(together[1], model.mapex(pixel_values).last_hidden_state[1])

    @pytest.mark.parametrize("gsd", [torch.tensor([10.0]), torch.tensor([10, 30]), -1.0, "10m"])
    def test_gsd_is_refused(self, gsd):
        with pytest.raises(ValueError, match="`gsd` of `radar` must be"):
            randomize(MapexForPreTraining(tiny_config())).mapex(tiny_inputs(["radar"], 2), gsd={"radar": gsd})

    def test_embedding_by_value(self):
        """At 15 m down and 40 m right, unit 10 m, wavelengths of 1, 10 and 100 units over 2 pi."""
        embedding = sincos_embedding(torch.tensor([[15.0, 40.0]]), 12, 10.0, 100.0)[0]
        angles = torch.tensor([1.5, 0.15, 0.015, 4.0, 0.4, 0.04])
        down = torch.cat([angles[:3].sin(), angles[:3].cos()])
        right = torch.cat([angles[3:].sin(), angles[3:].cos()])
        torch.testing.assert_close(embedding, torch.cat([down, right]))
