"""The choice of visible tokens and of the experts of a pool."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_mapex.losses_mapex import modality_membership
from modeling_mapex.masking_mapex import (
    draw_pretraining_noise,
    modality_pools,
    num_visible_tokens,
    sample_visible_tokens,
)
from modeling_mapex.tokens_mapex import TokenLayout


def layout_of(counts, token_mask=None):
    grids = {f"m{index}": (1, count) for index, count in enumerate(counts)}
    ids = torch.cat([torch.full((count,), index) for index, count in enumerate(counts)])
    return TokenLayout(grids, ids, token_mask)


def draw(counts, batch_size, mask_ratio, seed=0):
    total = sum(counts)
    generator = torch.Generator().manual_seed(seed)
    visible = num_visible_tokens(total, mask_ratio)
    return draw_pretraining_noise(batch_size, total, visible, len(counts), 2, 4, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    mask_ratio=st.floats(0.05, 0.95),
    dropout=st.sampled_from([0.0, 0.5, 0.9]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_layout(counts, mask_ratio, dropout, seed, data):
    """Visible tokens exist, are distinct, and use the budget exactly unless modalities drop; hidden are the rest."""
    batch_size, total = 4, sum(counts)
    present = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=total, max_size=total), min_size=4, max_size=4))
    )
    present[:, 0] = True
    layout = layout_of(counts, present)
    noise = draw(counts, batch_size, mask_ratio, seed)
    ids, mask, hidden = sample_visible_tokens(layout, noise, mask_ratio=mask_ratio, modality_dropout_prob=dropout)
    for sample in range(batch_size):
        visible = ids[sample][mask[sample]].tolist()
        assert visible == sorted(set(visible)) and visible
        assert present[sample, visible].all()
        there = int(present[sample].sum())
        budget = max(1, int(torch.tensor(there * (1.0 - mask_ratio)).round()))
        assert len(visible) == budget or (dropout > 0 and len(visible) < budget)
        expected = present[sample].clone()
        expected[visible] = False
        assert torch.equal(hidden[sample], expected)


def test_shares_follow_the_dirichlet_draw():
    layout, noise = layout_of([40, 40]), draw([40, 40], 1, 0.5)
    for share, expected in ((0.5, 20), (0.25, 10), (0.9, 36), (1.0, 40)):
        given = noise._replace(shares=torch.tensor([[share, 1.0 - share]]))
        ids, _, _ = sample_visible_tokens(layout, given, mask_ratio=0.5)
        assert (ids < 40).sum() == expected


def test_uniform_over_the_simplex():
    """With two modalities Dirichlet(1) makes the first one's share uniform."""
    layout, noise = layout_of([100, 100]), draw([100, 100], 4000, 0.5)
    ids, _, _ = sample_visible_tokens(layout, noise, mask_ratio=0.5)
    share = (ids < 100).float().mean(dim=1)
    deciles = torch.histc(share, bins=10, min=0, max=1) / 4000
    assert (deciles - 0.1).abs().max() < 0.02


def test_dropped_modality_shows_nothing_and_one_always_stays():
    counts = [10, 10, 10]
    layout, noise = layout_of(counts), draw(counts, 500, 0.5)
    ids, mask, _ = sample_visible_tokens(layout, noise, mask_ratio=0.5, modality_dropout_prob=0.8)
    shown = torch.stack([((ids // 10 == modality) & mask).any(dim=1) for modality in range(3)], dim=1)
    assert shown.any(dim=1).all()
    assert not (shown & (noise.dropout < 0.8) & ~(noise.dropout < 0.8).all(dim=1, keepdim=True)).any()


def test_each_token_equally_often():
    layout, noise = layout_of([16]), draw([16], 4000, 0.75)
    ids, _, _ = sample_visible_tokens(layout, noise, mask_ratio=0.75)
    assert (torch.bincount(ids.flatten(), minlength=16) / 4000 - 0.25).abs().max() < 0.03


def test_same_generator_same_draw():
    one, other, third = draw([5, 6], 3, 0.5), draw([5, 6], 3, 0.5), draw([5, 6], 3, 0.5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    assert not any(torch.equal(a, b) for a, b in zip(one, third))


def test_pools_keep_the_most_probable():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()
    membership = modality_membership(torch.tensor([0, 1]), 2)
    pools = modality_pools(logits, membership, torch.tensor([0.3, 0.99]))
    assert pools.tolist() == [[True, True, False, False], [True, True, True, True]]
    sizes = [
        modality_pools(logits, membership, torch.full((2,), draw)).sum(dim=1).tolist() for draw in (0.0, 0.25, 0.5)
    ]
    assert sizes == [[1, 1], [2, 2], [3, 3]]
