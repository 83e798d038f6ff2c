"""Statistics of softmax attention, beside whatever kernel computes the attention itself.

Only the rows that are needed ever exist, a chunk of them at a time, so memory grows linearly with the number of tokens.

Shape letters: B sequences, M queries of H heads and N keys of G heads, G dividing H and neighbouring heads of queries
sharing one of keys; d channels of a head.
"""

import torch
from torch import Tensor

from laco.precision import without_autocast


def rows(q_BHMd: Tensor, k_BGNd: Tensor, scaling: float | None = None, mask: Tensor | None = None) -> Tensor:
    """(B, H, M, N) softmax attention of some queries, in float32 at least. It has a gradient.

    Args:
        q_BHMd, k_BGNd: normed and rotated as the layer does it.
        scaling: 1 / sqrt(d) if left out.
        mask: (B, 1, 1 or M, N), or anything that broadcasts to (B, H, M, N): true where a key is seen, or what is added
            to the logits. A query that sees nothing gets NaN.
    """
    wide = torch.promote_types(q_BHMd.dtype, torch.float32)
    scaling = q_BHMd.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = q_BHMd.to(wide).reshape(len(q_BHMd), k_BGNd.shape[1], -1, q_BHMd.shape[-1]) * scaling
    with without_autocast(grouped.device):
        logits_BHMN = (grouped @ k_BGNd.to(wide).mT).view(*q_BHMd.shape[:3], -1)
    if mask is not None and mask.dtype == torch.bool:
        logits_BHMN = logits_BHMN.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits_BHMN = logits_BHMN + mask
    return logits_BHMN.softmax(dim=-1)


def cls_rows(q_BHMd: Tensor, k_BGNd: Tensor, scaling: float | None = None, mask: Tensor | None = None) -> Tensor:
    """(B, H, N) softmax attention of the first token, which is CLS where there is one. Arguments as of `rows`."""
    mask = None if mask is None else mask[..., :1, :]
    return rows(q_BHMd[:, :, :1], k_BGNd, scaling, mask)[:, :, 0]


@torch.no_grad()
def received(
    q_BHMd: Tensor, k_BGNd: Tensor, scaling: float | None = None, mask: Tensor | None = None, chunk: int = 128
) -> Tensor:
    """(B, N) attention that each token receives, mean over heads and queries. Arguments as of `rows`.

    It has no gradient, for which all rows would have to be kept.

    Args:
        chunk: queries at a time.
    """
    k_BGNd = k_BGNd.to(torch.promote_types(k_BGNd.dtype, torch.float32))
    total_BN = k_BGNd.new_zeros(len(k_BGNd), k_BGNd.shape[2])
    for start in range(0, q_BHMd.shape[2], chunk):
        part = slice(start, start + chunk)
        seen = mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]
        total_BN += rows(q_BHMd[:, :, part], k_BGNd, scaling, seen).sum(dim=(1, 2))
    return total_BN / (q_BHMd.shape[1] * q_BHMd.shape[2])
