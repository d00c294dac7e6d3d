"The toy of the chapter flow/path: an exact velocity between two mixtures of Gaussians."
import torch

CAPTION_CENTRES = torch.tensor([[-2., .7], [-2.5, 0.], [-2., -.7]])                     # a_i
IMAGE_CENTRES = torch.tensor([[2., 2.], [3., 0.], [2., -2.]])                           # m_j


class ThreeCaptions:
    "Exact velocity between two mixtures of three Gaussians in the plane, as in the chapter flow/path."
    def __init__(self, a, m, s0, s1):
        self.a, self.m, self.s0, self.s1 = a.repeat_interleave(3, 0), m.repeat(3, 1), s0, s1
        self.log_prior = torch.stack([torch.eye(3).flatten().log(), torch.zeros(9)])

    def __call__(self, x, t, indicator):
        t = t[:, None, None]
        delta = x[:, None] - (1 - t) * self.a - t * self.m
        var = (1 - t)**2 * self.s0**2 + t**2 * self.s1**2
        likely = (self.log_prior[indicator] - (delta**2 / (2 * var)).sum(-1)).softmax(1)
        return (likely[..., None] * (self.m - self.a + (t * self.s1**2 - (1 - t) * self.s0**2) / var * delta)).sum(1)
