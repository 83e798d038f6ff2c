"""LLaVA-Scissor (arXiv 2506.21862): tokens that are alike, through others, become one; first per frame, then over
frames.

A graph joins tokens with a cosine above a threshold; its connected components are averaged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from laco.errors import LacoError
from laco.methods.base import Method
from laco.methods.selector import Plan, Selector, Signals, cosines


@dataclass(frozen=True, kw_only=True)
class Scissor(Selector):
    """Semantic connected components of a video; every original token is then averaged into the component most like it.

    The number of tokens depends on the video.

    Args:
        threshold: cosine above which tokens are joined: the knob for how many remain.
        error: of the approximate components: ln(n) / error^2 nodes are looked at. At 0.05 up to 3232 nodes are exact.
        seed: of that sample.
    """

    name: ClassVar[str] = "scissor"
    title: ClassVar[str] = "LLaVA-Scissor"
    paper: ClassVar[str] = "LLaVA-Scissor: Semantic Connected Components for Video LLMs, arXiv 2506.21862"
    confirmed: ClassVar[str] = "graph, sampling, order of components, both stages, final assignment, threshold 0.9"
    assumed: ClassVar[str] = "every member counts in a component's mean (the reference loses a few where it samples)"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    static_count: ClassVar[bool] = False

    keep: None = None  # type: ignore[assignment]
    threshold: float = 0.9
    error: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        if not -1 <= self.threshold <= 1 or self.error <= 0:
            raise LacoError("scissor: threshold is a cosine in -1 .. 1 and error is above 0")

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        x_FnD = signals.tokens.float().view(signals.grid.frames, -1, signals.tokens.shape[-1])
        rng = np.random.RandomState(self.seed)  # the reference's generator

        def sample(nodes: int) -> Tensor:
            looked_at = min(nodes, math.ceil(math.log(nodes) / self.error**2)) if nodes > 1 else nodes
            return torch.from_numpy(rng.choice(nodes, looked_at, replace=False)).to(x_FnD.device)

        return merge(x_FnD, self.threshold, sample)[0]


def components(x_ND: Tensor, threshold: float, sampled: Tensor) -> Tensor:
    """(N,) number of every token's connected component, in the order of the components' keys.

    Only edges of `sampled` nodes are used; what they do not reach stays alone. A component's key is its member with the
    most neighbours, of equal ones the first.
    """
    linked_NN = cosines(x_ND).clamp_(max=1) > threshold  # rounding makes that of equal tokens a little more than 1
    linked_NN.fill_diagonal_(True)
    used_NN = torch.zeros_like(linked_NN)
    used_NN[sampled] = linked_NN[sampled]
    used_NN |= used_NN.T.clone()
    used_NN.fill_diagonal_(True)
    nodes = torch.arange(len(x_ND), device=x_ND.device)
    label_N = nodes
    while True:  # every node takes the smallest label around it, then the label of that label
        around_N = torch.where(used_NN, label_N, len(nodes)).amin(dim=1)
        around_N = around_N[around_N]
        if torch.equal(around_N, label_N):
            break
        label_N = around_N
    degree_N = linked_NN.sum(dim=1)
    best = torch.zeros_like(degree_N).scatter_reduce(0, label_N, degree_N, "amax")
    is_key_N = degree_N == best[label_N]
    key_N = torch.full_like(label_N, len(nodes)).scatter_reduce(
        0, label_N, torch.where(is_key_N, nodes, len(nodes)), "amin"
    )[label_N]
    return torch.unique(key_N, return_inverse=True)[1]


def averaging(group_N: Tensor) -> Tensor:
    """(K, N) matrix that averages the groups."""
    matrix_NK = torch.nn.functional.one_hot(group_N).float()
    return (matrix_NK / matrix_NK.sum(dim=0)).T


def merge(x_FnD: Tensor, threshold: float, sample: Callable[[int], Tensor]) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """Both stages and the final assignment.

    Returns:
        The plan; (F, n) components within each frame; (M,) components over frames of those; (N,) the component in which
        every token ends. `sample` gives, for a number of nodes, those that the graph looks at.
    """
    spatial = [components(frame, threshold, sample(len(frame))) for frame in x_FnD]
    x_ND, in_frames_MN = x_FnD.flatten(0, 1), torch.block_diag(*(averaging(groups) for groups in spatial))
    frames_MD = in_frames_MN @ x_ND
    temporal_M = components(frames_MD, threshold, sample(len(frames_MD)))
    centres_KN = averaging(temporal_M) @ in_frames_MN

    # A component's mean counts as one more member beside the tokens that are most like it.
    similarity_NK = cosines(x_ND, centres_KN @ x_ND)
    assigned_N = similarity_NK.argmax(dim=1)
    members_KN = torch.nn.functional.one_hot(assigned_N, len(centres_KN)).float().T
    weights_KN = (centres_KN + members_KN) / (1 + members_KN.sum(dim=1, keepdim=True))
    # The member most like a component gives it its position; one without members, the token that weighs most in it.
    own_KN = torch.where(members_KN.bool(), similarity_NK.T, centres_KN - 2)
    return Plan(own_KN.argmax(dim=1), weights_KN), torch.stack(spatial), temporal_M, assigned_N
