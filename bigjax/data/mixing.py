"""Mixup and cutmix: which share of each image is another's; the mixing itself is the device's."""

import numpy as np
import scipy.special

from bigjax.data.pipeline import Examples, Uniform


class Mix:
    """Draws how each row is mixed with another row of the same global batch.

    Mixup (Zhang et al. 2017): a share of beta(mixup, mixup) is the row's own, in every pixel and in
    the label. Cutmix (Yun et al. 2019): a rectangle comes from the other image, of an area of one
    minus a share of beta(cutmix, cutmix), centred anywhere and cut at the edges; the label's shares
    are those of the pixels. Where both are on, each row has one of them, by a fair coin.

    Only the shares are drawn here. The other image may lie on another host, so the images meet
    where the whole batch is one array: on the devices, in the classification task, which takes the
    row before. Hence the same global batch on any number of hosts, and no time of the host.
    """

    def __init__(self, mixup: float, cutmix: float):
        """Takes the parameters of the two beta distributions; 0 is off, and one must be on."""
        self.mixup, self.cutmix = mixup, cutmix

    def __call__(self, examples: Examples, uniform: Uniform) -> Examples:
        """Returns the examples with shares and rectangles.

        Args:
            examples: 'image' [B, H, W, C], and what else there is.
            uniform: draws four numbers a row.

        Returns:
            Also 'mix_share' float32 [B], the share of the row's own image outside the rectangle,
            and 'mix_box' int32 [B, 4]: top, left, bottom, right of what is the other image's, in
            pixels; nothing in mixup.
        """
        _, height, width, _ = examples['image'].shape
        coin_B, draw_B, *centre_2B = uniform(4).T
        probability = 0.5 if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut_B = coin_B < probability
        alpha_B = np.where(cut_B, self.cutmix, self.mixup)
        own_B = scipy.special.betaincinv(alpha_B, alpha_B, draw_B)
        # The authors' rectangle: sides rounded down, halves rounded down.
        box_B4 = np.zeros((len(cut_B), 4), np.int32)
        for axis, side in enumerate((height, width)):
            half_B = (side * np.sqrt(1 - own_B)).astype(np.int64) // 2
            centre_B = (centre_2B[axis] * side).astype(np.int64)
            box_B4[:, axis] = np.maximum(centre_B - half_B, 0)
            box_B4[:, axis + 2] = np.minimum(centre_B + half_B, side)
        box_B4[~cut_B] = 0
        share_B = np.where(cut_B, 1, own_B).astype(np.float32)
        return {**examples, 'mix_share': share_B, 'mix_box': box_B4}
