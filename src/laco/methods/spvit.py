"""SPViT (arXiv 2112.13890): a small network decides which tokens go on; those that do not are packed into one.

    package = sum p_i x_i / sum p_i    over the tokens dropped here, p = probability that the network gave to keeping

In training tokens are not taken out but masked, so that the decision has a gradient (straight-through Gumbel
softmax); after it they are gathered. There decisions are drawn; here as many tokens stay as drawing would keep on
average (the sum of their probabilities), the likeliest first: those with more than an even chance would be all or none
where the network is unsure.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laco.errors import LacoError
from laco.methods.base import MergerModule
from laco.methods.reducer import LayerTokens, Merge, Reducer, State, at_least_float32, indices, take
from laco.methods.window_attention import heads_for
from laco.precision import without_autocast


@dataclass(frozen=True, kw_only=True)
class SPViT(Reducer):
    """Soft token pruning, by default before the layers at 1/4, 1/2 and 3/4 of the depth; one package token for each.

    A token once dropped stays dropped; package tokens are at the end and always stay. How many tokens stay depends
    on the picture; the loss draws it to `targets`.

    Args:
        heads: of the selector; None = heads of 64 channels, as in the paper's DeiT. Their width is even, 4 or more.
        targets: fraction of the visual tokens that is to be left after each of the layers.

    `strict_reference`: package tokens are sums, not means; decisions are drawn at random outside of training too;
    masked attention takes the row maximum over masked keys too.
    """

    name: ClassVar[str] = "spvit"
    title: ClassVar[str] = "SPViT soft token pruning"
    paper: ClassVar[str] = (
        "SPViT: Enabling Faster Vision Transformers via Soft Token Pruning, ECCV 2022, arXiv 2112.13890"
    )
    confirmed: ClassVar[str] = (
        "selector, decision, package token, masked attention, layers 3, 6, 9 of 12, targets, loss"
    )
    assumed: ClassVar[str] = (
        "decisions outside of training (the authors draw there, too); batches padded; divergence from the teacher's"
        " side"
    )
    trained: ClassVar[bool] = True
    static_count: ClassVar[bool] = False
    learns_from: ClassVar[str] = "targets"
    moment: ClassVar[Literal["layer", "mlp"]] = "layer"

    heads: int | None = None
    targets: tuple[float, ...] = (0.7, 0.49, 0.343)

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):  # from JSON and YAML
            object.__setattr__(self, "targets", tuple(self.targets))
        super().__post_init__()
        if not self.targets or not all(0 < target <= 1 for target in self.targets):
            raise LacoError(f"spvit: targets are fractions of the visual tokens in (0, 1]; got {self.targets}")

    def layers(self, num_layers: int, last: int | None = None) -> tuple[int, ...]:
        points = len(self.targets) + 1
        return self.points(num_layers, last, tuple(point / points for point in range(1, points)))

    def layer_tokens(self, tokens: int, num_layers: int, last: int | None = None) -> list[LayerTokens]:
        """As the base class, with the numbers that training aims at."""
        last = num_layers if last is None else last
        points = zip(self.layers(num_layers, last), self.targets, strict=False)
        goals = {layer: round(target * tokens) + count for count, (layer, target) in enumerate(points, start=1)}
        counts, now = [], tokens
        for index in range(last):
            now = goals.get(index, now)
            counts.append(LayerTokens(now, now))
        return counts

    def build(self, width: int) -> "MultiheadSelector":
        return MultiheadSelector(width, self.heads)

    def loss(self, signals: list[Tensor], module: MergerModule | None, target: None) -> Tensor:
        """2 `ratio_loss` of the decisions (B, M) at each of the layers: of `training_loss` what needs no teacher."""
        return 2 * ratio_loss(signals, self.targets[: len(signals)])  # with `layer`, or in short encoders, fewer points

    def before_layer(
        self, x_BNC: Tensor, state: State, index: int, module: MergerModule | None = None
    ) -> tuple[Tensor, State]:
        if not self.reduces(state, index):
            return x_BNC, state
        if not isinstance(module, MultiheadSelector):
            raise LacoError(f"spvit needs the selector that build() gives for layer {index}")
        noise = module.training or self.strict_reference
        drawn = gumbel(x_BNC[:, state.prefix :, :2]) if noise else None
        x_BNC, state = self.mask(x_BNC, state, module, drawn)
        return (x_BNC, replace(state, memory="training")) if module.training else self.gather(x_BNC, state)

    def mask(
        self, x_BNC: Tensor, state: State, selector: "MultiheadSelector", noise_BN2: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Decides, and adds the package token; all tokens remain, the policy says which are alive."""
        prefix, packages, tokens = state.prefix, state.packages, x_BNC.shape[1]
        policy_BN = torch.ones_like(state.size_BN) if state.policy_BN is None else state.policy_BN
        log_BN2, soft_BN2 = selector(x_BNC[:, prefix:], policy_BN[:, prefix:])
        odds_BN = log_BN2[..., 0] - log_BN2[..., 1]
        fixed_N = torch.ones(tokens, dtype=torch.bool, device=x_BNC.device)
        fixed_N[prefix : tokens - packages] = False
        if noise_BN2 is None:
            decided_BN = likeliest(odds_BN, (policy_BN[:, prefix:] > 0.5) & ~fixed_N[prefix:])
        else:
            decided_BN = straight_through(odds_BN + noise_BN2[..., 0] - noise_BN2[..., 1])
        keep_BN = policy_BN * torch.where(fixed_N, 1, F.pad(decided_BN, (prefix, 0)))
        dropped_BN = policy_BN - keep_BN

        weight_BN = dropped_BN * F.pad(soft_BN2[..., 0], (prefix, 0))
        with without_autocast(x_BNC.device):
            package_BC = torch.einsum("bn,bnc->bc", weight_BN, at_least_float32(x_BNC).to(weight_BN.dtype))
        if not self.strict_reference:
            weight_B1 = weight_BN.sum(dim=1, keepdim=True)
            package_BC = package_BC / weight_B1.where(weight_B1 > 0, 1)  # of an empty one the gradient stays small, too
        place_BN = indices(x_BNC)
        heaviest_B1 = weight_BN.argmax(dim=1, keepdim=True)  # an empty package has the place of the first token
        # All rows remain, those of tokens that go to the package empty: `Merge.sum` would count these tokens twice.
        row_BN = place_BN.where(dropped_BN < 0.5, tokens)
        state = replace(
            state,
            size_BN=F.pad(torch.zeros_like(state.size_BN), (0, 1)).scatter_add(1, row_BN, state.size_BN),
            merges=(*state.merges, Merge(tokens, torch.cat([place_BN, heaviest_B1], dim=1), place_BN, row_BN)),
            policy_BN=F.pad(keep_BN, (0, 1), value=1),
            packages=packages + 1,
        )
        return torch.cat([x_BNC, package_BC[:, None].to(x_BNC.dtype)], dim=1), state

    def gather(self, x_BNC: Tensor, state: State) -> tuple[Tensor, State]:
        """Takes the masked tokens out; pictures that keep fewer than the others are padded with masked ones."""
        assert state.policy_BN is not None
        prefix, end = state.prefix, x_BNC.shape[1] - state.packages
        alive_BM = state.policy_BN[:, prefix:end] > 0.5
        most = int(alive_BM.sum(dim=1).amax())
        first_BK = prefix + alive_BM.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        place_BN = indices(x_BNC)
        kept_BK = torch.cat([place_BN[:, :prefix], first_BK, place_BN[:, end:]], dim=1)
        state = state.after(Merge(x_BNC.shape[1], kept_BK))
        assert state.policy_BN is not None
        return take(x_BNC, kept_BK), replace(state, policy_BN=None) if state.policy_BN.all() else state

    def after_layers(self, x_BNC: Tensor, state: State) -> tuple[Tensor, State]:
        """Patches are in raster order anyway, package tokens stay behind them; the policy says what is padding."""
        return x_BNC, state

    def attention_bias(self, state: State) -> Tensor | None:
        """Shuts off what is padding; in training `attention_weights` alone is right, which has a gradient."""
        return None if state.policy_BN is None else state.policy_BN.log()[:, None, None]

    def attention_weights(self, logits_BHNN: Tensor, state: State) -> Tensor:
        if state.policy_BN is None:
            return logits_BHNN.softmax(dim=-1)
        eps = 1e-6 if state.memory == "training" else 0
        return policy_softmax(logits_BHNN, state.policy_BN, eps, self.strict_reference)


class MultiheadSelector(MergerModule):
    """(B, N, C) tokens and (B, N) policy -> two (B, N, 2): log scores and probabilities of keeping and of dropping.

    All heads share one network. It sees a token's own features and the mean over the tokens that are alive; the heads'
    results are averaged with weights that depend on the token. The log scores are means of logarithms, so not
    normalised.
    """

    def __init__(self, width: int, heads: int | None = None):
        super().__init__()
        self.heads = heads_for(width, heads, usual=max(width // 64, 1))
        size = width // self.heads
        if size % 2 or size < 4:
            raise LacoError(
                f"spvit: {self.heads} heads of the selector have {size} channels each; give an even number, 4 or more"
            )
        hidden = max(self.heads // 2, 1)
        self.head_weight = nn.Sequential(
            nn.Linear(self.heads, hidden), nn.GELU(), nn.Linear(hidden, self.heads), nn.Sigmoid()
        )
        self.embed = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(size, size // 2), nn.GELU(), nn.Linear(size // 2, size // 4), nn.GELU(), nn.Linear(size // 4, 2)
        )

    def forward(self, x_BNC: Tensor, policy_BN: Tensor) -> tuple[Tensor, Tensor]:
        x_BNHd = x_BNC.unflatten(-1, (self.heads, -1))
        weight_BNH = self.head_weight(x_BNHd.mean(dim=-1))
        weight_BNH1 = (weight_BNH / weight_BNH.sum(dim=-1, keepdim=True))[..., None]
        local_BNHd, other_BNHd = self.embed(x_BNHd).chunk(2, dim=-1)
        alive_BN11 = policy_BN[..., None, None].to(x_BNC.dtype)
        mean_B1Hd = (other_BNHd * alive_BN11).sum(dim=1, keepdim=True) / alive_BN11.sum(dim=1, keepdim=True)
        logits_BNH2 = at_least_float32(self.score(torch.cat([local_BNHd, mean_B1Hd.expand_as(local_BNHd)], dim=-1)))
        log_BN2 = (weight_BNH1 * logits_BNH2.log_softmax(dim=-1)).sum(dim=2)
        return log_BN2, (weight_BNH1 * logits_BNH2.softmax(dim=-1)).sum(dim=2)


def gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like, dtype=torch.float32).exponential_().log()


def straight_through(odds_BN: Tensor) -> Tensor:
    """(B, N), exactly 1 where log odds are not negative, else 0; with the gradient of their probability."""
    soft_BN = odds_BN.sigmoid()
    return (odds_BN >= 0).to(soft_BN.dtype) + (soft_BN - soft_BN.detach())


def likeliest(odds_BN: Tensor, open_BN: Tensor) -> Tensor:
    """(B, N), 1 for the tokens of highest log odds: of those that are open, as many as drawing keeps on average."""
    number_B1 = odds_BN.sigmoid().masked_fill(~open_BN, 0).sum(dim=1, keepdim=True).round()
    order_BN = odds_BN.masked_fill(~open_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order_BN.argsort(dim=1) < number_B1).to(odds_BN.dtype)


def policy_softmax(logits_BHNN: Tensor, policy_BN: Tensor, eps: float = 0, strict_reference: bool = False) -> Tensor:
    """Softmax over the keys that are alive; every token also attends to itself.

        (p_j exp(a_ij - max_j a_ij) + eps / N) / (sum_j p_j exp(a_ij - max_j a_ij) + eps),    p_i = 1 for query i

    The maximum is that of the keys alive; the reference takes it over all, and loses a row that a masked key
    outweighs by far.
    """
    tokens = logits_BHNN.shape[-1]
    itself_NN = torch.eye(tokens, dtype=torch.bool, device=logits_BHNN.device)
    policy_B1NN = torch.where(itself_NN, 1, policy_BN[:, None, None])
    logits = at_least_float32(logits_BHNN)
    shown = logits if strict_reference else logits.masked_fill(policy_B1NN == 0, -torch.inf)
    # The clamp is for masked keys alone: their exponential must stay finite before it is multiplied by zero.
    weights = (logits - shown.amax(dim=-1, keepdim=True)).clamp(max=0).exp() * policy_B1NN
    return ((weights + eps / tokens) / (weights.sum(dim=-1, keepdim=True) + eps)).to(logits_BHNN.dtype)


def ratio_loss(keeps_BM: list[Tensor], targets: tuple[float, ...]) -> Tensor:
    """How far the fraction of tokens kept, over the whole batch, is from its target: squares, mean over the layers."""
    return torch.stack([(keep.mean() - target) ** 2 for keep, target in zip(keeps_BM, targets, strict=True)]).mean()


def distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """(M, classes or channels): Kullback-Leibler divergence from the teacher's distribution, mean over M."""
    return F.kl_div(logits.log_softmax(dim=-1), teacher.log_softmax(dim=-1), reduction="batchmean", log_target=True)


def training_loss(
    task: Tensor,
    keeps_BM: list[Tensor],
    targets: tuple[float, ...],
    *,
    logits: tuple[Tensor, Tensor],
    features_BMC: tuple[Tensor, Tensor],
    features_by: Literal["divergence", "square"] = "divergence",
) -> Tensor:
    """The paper's loss: task + 2 ratio + 0.5 (logits) + 0.5 (features of surviving tokens), both against the teacher's.

    Args:
        task: cross entropy.
        keeps_BM: decisions at each of the layers, without prefix and package tokens.
        targets: as in `SPViT`.
        logits, features_BMC: (student's, teacher's).
        features_by: `square` is the mean square, as for LV-ViT.
    """
    alive_BM = keeps_BM[-1].detach() > 0.5
    mine, teachers = (features[alive_BM] for features in features_BMC)
    compare = distillation if features_by == "divergence" else F.mse_loss
    near = compare(mine, teachers) if len(mine) else task.new_zeros(())
    return task + 2 * ratio_loss(keeps_BM, targets) + 0.5 * distillation(*logits) + 0.5 * near
