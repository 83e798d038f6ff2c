"""OTPrune (arXiv 2602.20205): tokens whose distribution stays near that of all, by greedy log-determinants.

G = V V^T,    L = 1 + gamma G G^T,    V = tokens normalised per channel over tokens
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from laco.errors import LacoError
from laco.methods.greedy import Product, determinantal
from laco.methods.selector import Plan, Selector, Signals


@dataclass(frozen=True, kw_only=True)
class OTPrune(Selector):
    """Greedy maximisation of log det(1 + gamma G G^T); the question is not used.

    Args:
        gamma: weight of the tokens against the identity.
    """

    name: ClassVar[str] = "otprune"
    title: ClassVar[str] = "OTPrune"
    paper: ClassVar[str] = "OTPrune, CVPR 2026, arXiv 2602.20205"
    confirmed: ClassVar[str] = "normalisation per channel, kernel, gamma = 0.01, greedy rule, keep = 9.8 %"
    assumed: ClassVar[str] = "spatial order (the reference's is that of a Python set)"
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})

    keep: int | float = 0.098
    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma <= 0:
            raise LacoError(f"otprune: gamma must be above 0; got {self.gamma}")

    def plan(self, signals: Signals) -> Plan:
        assert signals.tokens is not None
        v_ND = normalize(signals.tokens.float(), dim=0)
        # V V^T V in the cheaper order; G G^T itself is never written out.
        spread_ND = torch.linalg.multi_dot([v_ND, v_ND.T, v_ND])
        kernel = Product(self.gamma * spread_ND, v_ND, identity=1.0)
        return Plan(determinantal(kernel, self.budget(signals.grid.tokens)).sort().values)
