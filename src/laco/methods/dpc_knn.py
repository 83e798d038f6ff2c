"""Density peaks with k nearest neighbours (DPC-kNN, Du et al. 2016), as SparseVLM and FlashVID cluster tokens.

density_i = exp(-mean of squared distances to the k nearest, itself included)
delta_i = distance to the nearest denser token; of the densest, the largest distance of all

Centres have the largest density * delta; every other token joins the nearest centre.
"""

import torch
from torch import Tensor

from laco.methods.decoder import highest


def density_peaks(
    x_ND: Tensor, clusters: int, neighbours: int, strict_reference: bool = False, by_products: bool = False
) -> tuple[Tensor, Tensor]:
    """Clusters tokens by euclidean distance / sqrt(D).

    The authors add noise of 1e-6 to densities, so that of equally good centres any may come first; here it is the first
    (with `strict_reference`, which `torch.topk` gives: their code without the noise). With a single neighbour, itself,
    all are equally good, unless distances come `by_products`, as FlashVID's do: of more than 25 tokens rounding then
    decides.

    Returns:
        (clusters,) centres, the best first, and (N,) the number of the centre that each token joins.
    """
    x_ND = x_ND.float()
    mode = "use_mm_for_euclid_dist_if_necessary" if by_products else "donot_use_mm_for_euclid_dist"
    distance_NN = torch.cdist(x_ND, x_ND, compute_mode=mode) / x_ND.shape[1] ** 0.5
    nearest_Nk = distance_NN.topk(min(neighbours, len(x_ND)), dim=1, largest=False).values
    density_N = (-nearest_Nk.square().mean(dim=1)).exp()
    denser_NN = density_N > density_N[:, None]
    delta_N = torch.where(denser_NN, distance_NN, distance_NN.max()).amin(dim=1)
    score_N = delta_N * density_N
    centres = score_N.topk(clusters).indices if strict_reference else highest(score_N, clusters)
    joined_N = distance_NN[:, centres].argmin(dim=1)
    joined_N[centres] = torch.arange(len(centres), device=centres.device)
    return centres, joined_N


def averaging(joined_N: Tensor, clusters: int) -> Tensor:
    """(clusters, N) weights that average what joins each centre."""
    weights_NK = torch.nn.functional.one_hot(joined_N, clusters).float()
    return (weights_NK / weights_NK.sum(dim=0)).T
