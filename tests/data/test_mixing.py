import numpy as np
import pytest
import scipy.stats

from bigjax.data.mixing import Mix

RNG = np.random.default_rng(0)
IMAGES = {'image': np.zeros((4000, 20, 30, 1), np.uint8), 'label': np.arange(4000)}


def draw(mixup, cutmix):
    out = Mix(mixup, cutmix)(IMAGES, lambda k: RNG.random((4000, k)))
    assert out['image'] is IMAGES['image']
    assert out['label'] is IMAGES['label']
    share_B, box_B4 = out['mix_share'], out['mix_box']
    assert (share_B.dtype, box_B4.dtype) == (np.float32, np.int32)
    assert ((share_B >= 0) & (share_B <= 1)).all()
    assert (box_B4 >= 0).all()
    assert (box_B4[:, :2] <= box_B4[:, 2:]).all()
    assert (box_B4[:, 2:] <= (20, 30)).all()
    return share_B, box_B4, (box_B4[:, 2:] - box_B4[:, :2]).prod(1)


@pytest.mark.parametrize('alpha', [0.2, 1.0, 3.0])
def test_mixup_shares_follow_beta(alpha):
    share_B, _, area_B = draw(alpha, 0)
    assert not area_B.any()
    assert scipy.stats.kstest(share_B, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_cuts_a_rectangle_around_any_point():
    share_B, box_B4, area_B = draw(0, 1.0)
    assert (share_B == 1).all()
    sides_B2 = box_B4[:, 2:] - box_B4[:, :2]
    inside_B = (box_B4[:, :2] > 0).all(1) & (box_B4[:, 2:] < (20, 30)).all(1)
    # Not cut at an edge, the rectangle has the image's aspect (sides are even numbers of pixels).
    np.testing.assert_array_less(abs(sides_B2[inside_B, 0] * 1.5 - sides_B2[inside_B, 1]), 3.01)
    centre_2B = (box_B4[inside_B, :2] + box_B4[inside_B, 2:]).T
    assert abs(np.corrcoef(centre_2B)[0, 1]) < 0.1
    # E[area] by the authors' formula, over the same draws made independently.
    lam, y, x = RNG.random((3, 200_000))
    half = np.sqrt(1 - lam)
    expected = 1.0
    for side, centre in ((20, y), (30, x)):
        low = np.maximum(np.floor(centre * side) - (half * side).astype(int) // 2, 0)
        high = np.minimum(np.floor(centre * side) + (half * side).astype(int) // 2, side)
        expected = expected * (high - low) / side
    np.testing.assert_allclose(area_B.mean() / 600, expected.mean(), atol=0.012)


def test_both_by_a_fair_coin():
    share_B, _, area_B = draw(0.4, 1.0)
    cut_B = share_B == 1
    assert 0.44 < cut_B.mean() < 0.56
    assert not area_B[~cut_B].any()
    assert (area_B[cut_B] > 0).mean() > 0.9
