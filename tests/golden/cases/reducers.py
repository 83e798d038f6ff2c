"""Reducers inside the vision encoder, in encoder layers that are written out here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cases.case import Case, Outputs, load
from laco.methods.evit import EViT, keep_rate
from laco.methods.folder import Folder
from laco.methods.ipcv import IPCV, Memory
from laco.methods.reducer import LayerSignals, Merge, Reducer, State, indices
from laco.methods.spvit import MultiheadSelector, SPViT, policy_softmax
from laco.methods.tome import ToMe, match

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu erf": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class Layer:
    """A layer of a vision encoder. Optionally with rotary angles (N, d / 2) and with segments that see only
    themselves."""

    weights: dict[str, Tensor]
    heads: int
    eps: float = 1e-6
    act: Callable[[Tensor], Tensor] = F.gelu
    angles: Tensor | None = field(default=None)
    lengths: Tensor | None = field(default=None)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}_weight"], self.weights[f"{name}_bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}_weight"], self.weights[f"{name}_bias"], self.eps)

    def rotate(self, x: Tensor) -> Tensor:
        if self.angles is None:
            return x
        angles = torch.cat([self.angles, self.angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def qkv(self, x: Tensor) -> list[Tensor]:
        """(B, N, C) -> three (B, H, N, d)."""
        return [self.linear(f"attn_{part}", x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in "qkv"]

    def attention(self, x: Tensor, softmax: Callable[[Tensor], Tensor]) -> tuple[Tensor, LayerSignals]:
        query, keys, value = self.qkv(x)
        logits = self.rotate(query) @ self.rotate(keys).mT * query.shape[-1] ** -0.5
        if self.lengths is not None:
            segment = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
            logits = logits.masked_fill(segment[:, None] != segment, -torch.inf)
        weights = softmax(logits)
        y = self.linear("attn_out", (weights @ value).transpose(1, 2).flatten(2))
        return y, LayerSignals(keys=keys, cls_attention=weights[:, :, 0])

    def __call__(self, x: Tensor, reducer: Reducer, state: State, index: int) -> tuple[Tensor, State]:
        y, signals = self.attention(self.norm("norm1", x), lambda logits: reducer.attention_weights(logits, state))
        x, state = reducer.before_mlp(x + y * self.weights.get("ls1", 1), state, index, signals)
        y = self.linear("mlp_fc2", self.act(self.linear("mlp_fc1", self.norm("norm2", x))))
        return x + y * self.weights.get("ls2", 1), state


def layers(case: Case, **geometry: Tensor) -> Iterator[Layer]:
    """Every layer of a case: one whose weights have no prefix, or block0, block1, ..."""
    prefixes = [""] if "norm1_weight" in case.arrays else [f"block{index}_" for index in range(len(case.arrays))]
    act = next(function for name, function in ACTIVATIONS.items() if case.hyper["act"].startswith(name))
    for prefix in prefixes:
        weights = {name.removeprefix(prefix): array for name, array in case.arrays.items() if name.startswith(prefix)}
        if weights:
            yield Layer(weights, case.hyper["heads"], case.hyper["ln_eps"], act, **geometry)


def groups(slot_BS: Tensor) -> Tensor:
    """(B, S) the smallest original token of the group of each."""
    place_BS = indices(slot_BS)
    first = torch.full_like(slot_BS, slot_BS.shape[1]).scatter_reduce(1, slot_BS, place_BS, "amin")
    return first.gather(1, slot_BS)


def sizes(state: State) -> Tensor:
    return state.size_BN[..., None]


def misread(merge: Merge, y_BKC: Tensor) -> Tensor:
    """ToMe's way back: it takes rows for [even, odd] tokens, also where a distillation token has moved to the front."""
    if merge.joining_BR is None:
        return y_BKC
    return merge.ordered((merge.kept_BK % 2).argsort(dim=1, stable=True)).unmerge(y_BKC)


def tome_merge(case: Case) -> Outputs:
    x, metric = case["x"], case["metric"]
    prefix = int(case.hyper["class_token"]) + int(case.hyper["distill_token"])
    size = case["size_in"][..., 0] if "size_in" in case.arrays else torch.ones(x.shape[:2])
    merge = match(metric, case.hyper["r"], prefix, order="split" if prefix else "score")
    state = ToMe().start(x, 1, prefix=prefix).after(merge)
    y = merge.mean(x, size)
    return {
        "y": y,
        "size_out": merge.sum(size)[..., None],
        "source_map": state.sources_BNS.float(),
        "group_rep": groups(merge.slot_BN),
        "unmerged": misread(merge, y),
    }


def flag(case: Case, name: str, usual: bool) -> bool:
    """A setting that is a hyper-parameter in some cases and part of the variant in others."""
    named = next((value for value in (True, False) if f"{name}={value}" in case.variant), usual)
    return case.hyper.get(name, named)


def tome_block(case: Case) -> Outputs:
    x, blocks = case["x"], list(layers(case))
    r = case.hyper["r"]
    method = ToMe(r=r, proportional=case.hyper["prop_attn"], strict_reference=True)
    prefix = int(flag(case, "class_token", True)) + int(flag(case, "distill_token", False))
    state = method.start(x, len(blocks), prefix=prefix)
    counts = []
    for index, layer in enumerate(blocks):
        x, state = layer(x, method, state, index)
        counts.append(x.shape[1])
    return {
        "y": x,
        "size_out": sizes(state),
        "source_map": state.sources_BNS.float(),
        "group_rep": groups(state.slot_BS),
        "tokens_after_block": torch.tensor(counts),
    }


def tome_schedule(case: Case) -> Outputs:
    outputs = {}
    for index, (num_layers, r) in enumerate(case.hyper["items"]):
        if isinstance(r, list) and len(r) == 2:
            method = ToMe(r=r[0], inflection=r[1], strict_reference=True)
        else:
            method = ToMe(r=r, strict_reference=True)
        outputs[f"schedule{index}"] = torch.tensor(method.schedule(num_layers))
    return outputs


def evit_block(case: Case) -> Outputs:
    x, (layer,) = case["x"], layers(case)
    method = EViT(keep=case.hyper["keep_rate"], fuse=case.hyper["fuse_token"], layer=1, strict_reference=True)
    y, state = layer(x, method, method.start(x, 2, prefix=1), 1)
    kept = method.kept(x.shape[1] - 1)
    return {"y": y, "kept_idx": state.place_BN[:, 1 : 1 + kept] - 1, "n_tokens": torch.tensor([y.shape[1] - 1])}


def evit_schedule(case: Case) -> Outputs:
    outputs = {}
    for index, entry in enumerate(case.hyper["counts"]):
        tokens, counts = entry["N"], []
        for rate in entry["keep_rates"]:
            tokens = EViT(keep=rate, fuse=entry["fuse"], strict_reference=True).left(tokens)
            counts.append(tokens)
        outputs[f"counts{index}"] = torch.tensor(counts)
    rates = []
    for *counts, keep in case["akr_args"].tolist():
        step, epoch, first, last, steps = map(int, counts)
        if not first <= epoch < last:  # there the reference looks at the epoch alone
            step = epoch * steps
        rates.append(keep_rate(step, steps, keep, first, last))
    return outputs | {"keep_rate_schedule": torch.tensor(rates)}


def folder_merge_features(case: Case) -> Outputs:
    x, prefix = case["x"], int(case.hyper["class_token"])
    keep = x.shape[1] - prefix - case.hyper["r"]
    outputs = {}
    for name, log_size in (("y", True), ("metric_out", False)):
        method = Folder(keep=keep, form="features", log_size=log_size, strict_reference=True)
        outputs[name], state = method.after_layers(x, method.start(x, 1, prefix=prefix))
    return outputs | {"size_out": sizes(state), "group_rep": groups(state.slot_BS)}


def folder_block(case: Case) -> Outputs:
    x, (layer,) = case["x"], layers(case)
    prefix = int(case.hyper["class_token"])
    keep = x.shape[1] - prefix - case.hyper["remove"]
    method = Folder(keep=keep, alpha=float(case.hyper["alpha"]), minimum=0)
    y, state = layer(x, method, method.start(x, 1, prefix=prefix), 0)
    return {"y": y, "size_out": sizes(state), "group_rep": groups(state.slot_BS)}


def selector(case: Case, width: int, stem: str = "") -> MultiheadSelector:
    module = MultiheadSelector(width, case.hyper["heads"])
    names = {"head_weight.0": "headw_fc1", "head_weight.2": "headw_fc2", "embed.0": "in_norm", "embed.1": "in_fc"}
    names |= {f"score.{index}": f"out_fc{count}" for index, count in ((0, 1), (2, 2), (4, 3))}
    load(module, case, {part: stem + name for part, name in names.items()}, eps="ln_eps")
    return module


def spvit_selector(case: Case) -> Outputs:
    log_score, soft_score = selector(case, case["x"].shape[-1])(case["x"], case["policy"][..., 0])
    return {"log_score": log_score, "soft_score": soft_score}


def spvit_package(case: Case) -> Outputs:
    method, tokens = SPViT(strict_reference=True), case["x"].shape[1]
    x = torch.cat([case["cls"].expand(len(case["x"]), -1, -1), case["x"]], dim=1)
    prefix = case["cls"].shape[1]
    state = method.start(x, 1, prefix=prefix)
    outputs: Outputs = {}
    for point in range(sum(name.startswith("gumbel") for name in case.arrays)):
        module = selector(case, x.shape[-1], f"sel{point}_")
        x, state = method.mask(x, state, module, case[f"gumbel{point}"])
        assert state.policy_BN is not None
        outputs[f"keep{point}"] = state.policy_BN[:, prefix : prefix + tokens]
        outputs[f"package{point}"], outputs[f"policy{point}"] = x[:, -1], state.policy_BN
    return outputs


def spvit_policy_attention(case: Case) -> Outputs:
    layer, policy = Layer(case.arrays, case.hyper["heads"]), case["policy"][..., 0]
    return {
        name: layer.attention(case["x"], lambda logits, eps=eps: policy_softmax(logits, policy, eps, True))[0]
        for name, eps in (("y_eval", 0), ("y_train", 1e-6))
    }


def ipcv_method(case: Case) -> IPCV:
    hyper = case.hyper
    return IPCV(
        layer=hyper["K"],
        keep=1 - hyper["ratio"],
        stabilise=hyper["AS"],
        neighbours=hyper["T"],
        strict_reference=True,
    )


def ipcv(case: Case) -> Outputs:
    """Packed frames: they attend to themselves, but tokens are chosen, and neighbours found, over all."""
    method, x = ipcv_method(case), case["x"][None]
    frames = [height * width for count, height, width in case["grid_thw"].tolist() for _ in range(count)]
    lengths, angles = torch.tensor(frames), case["rotary"]
    blocks = list(layers(case))
    state = method.start(x, len(blocks))
    for index, layer in enumerate(blocks):
        x, state = method.before_layer(x, state, index)
        kept = state.place_BN[0]
        left = method.lengths_left(kept, lengths) if state.merges else lengths
        packed = Layer(layer.weights, layer.heads, layer.eps, layer.act, angles[kept], left)
        x, state = packed(x, method, state, index)
    memory: Memory = state.memory
    y, _ = method.after_layers(x, state)
    return {
        "kept_idx": memory.kept_BK[0],
        "state_in_K": memory.x_BNC[0],
        "neighbours": memory.neighbours_BRT[0],
        "y": y[0],
    }


def ipcv_internvl(case: Case) -> Outputs:
    method, x = ipcv_method(case), case["x"]
    blocks = list(layers(case))
    state = method.start(x, len(blocks), prefix=1)
    for index, layer in enumerate(blocks):
        x, state = method.before_layer(x, state, index)
        x, state = layer(x, method, state, index)
    memory: Memory = state.memory
    y, _ = method.after_layers(x, state)
    return {"kept_idx": memory.kept_BK, "neighbours": memory.neighbours_BRT, "y": y}


CASES: dict[str, Callable[[Case], Outputs]] = {
    "tome_merge": tome_merge,
    "tome_block": tome_block,
    "tome_schedule": tome_schedule,
    "evit_block": evit_block,
    "evit_schedule": evit_schedule,
    "folder_merge_features": folder_merge_features,
    "folder_block": folder_block,
    "spvit_selector": spvit_selector,
    "spvit_package": spvit_package,
    "spvit_policy_attention": spvit_policy_attention,
    "ipcv": ipcv,
    "ipcv_internvl": ipcv_internvl,
}
