"""The sequence of tokens: where each comes from, and where it lies on the ground."""

import torch
from conftest import tiny_config, tiny_inputs

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

    def test_embedding_by_value(self):
        """At 15 m down and 40 m right, unit 10 m, wavelengths of 1, 10 and 100 units over 2 pi."""
        embedding = sincos_embedding(torch.tensor([[15.0, 40.0]]), 12, 10.0, 100.0)[0]
        angles = torch.tensor([1.5, 0.15, 0.015, 4.0, 0.4, 0.04])
        down = torch.cat([angles[:3].sin(), angles[:3].cos()])
        right = torch.cat([angles[3:].sin(), angles[3:].cos()])
        torch.testing.assert_close(embedding, torch.cat([down, right]))
