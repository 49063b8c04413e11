"""Filters that whiten the patches of images, for the first layer of a network."""

import torch
from torch import Tensor

PATCH = 2  # height and width of the filters in pixels
WHITENING_EPS = 5e-4


def whitening_filters(images: Tensor, patch: int = PATCH, eps: float = WHITENING_EPS) -> Tensor:
    """Return filters whose responses to patches of the images are uncorrelated, of unit variance.

    They are the eigenvectors of the patches' second moments (not centred), each divided by
    sqrt(eigenvalue + eps), and their negatives, so that a rectifier loses neither half: float32
    (2 * channels * patch**2, channels, patch, patch), for normalised images.
    """
    channels = images.shape[1]
    patches = images.float().unfold(2, patch, 1).unfold(3, patch, 1)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * patch**2)
    moments = (patches.mT @ patches).cpu().double() / len(patches)
    values, vectors = torch.linalg.eigh(moments)
    filters = (vectors / (values + eps).sqrt()).mT.flip(0)  # largest eigenvalue first
    return torch.cat([filters, -filters]).float().view(-1, channels, patch, patch)
