"""Selectors behind the vision encoder."""

import itertools
import re
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn.functional import normalize

from cases.case import Case, Outputs
from laco.grid import Grid
from laco.methods.cdpruner import conditional_kernel, scaled
from laco.methods.div_prune import DivPrune
from laco.methods.evs import EVS, media_positions
from laco.methods.greedy import determinantal, farthest_points
from laco.methods.greedy_prune import independent_set
from laco.methods.holov import HoloV, crop_score, quotas
from laco.methods.mmtok import MMTok
from laco.methods.otprune import OTPrune
from laco.methods.prumerge import PruMerge, outlier_ratio
from laco.methods.prunesid import PruneSID, group_quotas, off_diagonal_mean, principal_groups, suppressed
from laco.methods.scissor import merge
from laco.methods.scope import Scope
from laco.methods.selector import Selector, Signals, cosines
from laco.methods.v_cast import VCast, curvature
from laco.methods.vidcom2 import VidCom2, centrality, with_newlines
from laco.methods.visionzip import VisionZip, contextual_groups
from laco.methods.vispruner import VisPruner


def line(count: int) -> Grid:
    """The grid of methods that ask for none."""
    return Grid(1, 1, count)


def divprune(case: Case) -> Outputs:
    x = case["x"]
    method, signals = DivPrune(keep=float(case.hyper["ratio"])), Signals(grid=line(len(x)), tokens=x)
    return {"picks": farthest_points(1 - cosines(x), method.budget(len(x))), "kept": method(signals).kept}


def cdpruner(case: Case) -> Outputs:
    relevance = scaled(
        torch.stack([-cosines(patches, case["text_embed"]).mean(dim=1) for patches in case["patch_embed"]])
    )
    kernels = [conditional_kernel(tokens, r) for tokens, r in zip(case["proj"], relevance, strict=True)]
    kept = [determinantal(kernel, case.hyper["K"]).sort().values for kernel in kernels]
    return {"kept": torch.stack(kept), "relevance": relevance}


def otprune(case: Case) -> Outputs:
    return {"kept": OTPrune(keep=case.hyper["K"], gamma=case.hyper["gamma"])(of_tokens(case["x"])).kept}


def of_tokens(x: torch.Tensor) -> Signals:
    return Signals(grid=line(len(x)), tokens=x)


def scope(case: Case) -> Outputs:
    combine: Literal["multiply", "add"] = "add" if case.hyper.get("combined") == "add" else "multiply"
    method, picks, kept = Scope(keep=case.hyper["K"], alpha=case.hyper["alpha"], combine=combine), [], []
    for x, saliency in zip(case["x"], case["saliency"], strict=True):
        kept.append(method(Signals(grid=line(len(x)), features=x, cls_attention=saliency[None])).kept)
        picks.append(method.picks(cosines(x), saliency))
    return {"picks": torch.stack(picks), "kept": torch.stack(kept)}


def mmtok(case: Case) -> Outputs:
    method = MMTok(
        keep=case.hyper["K"],
        alpha=case.hyper["alpha"],
        text_temperature=case.hyper["tau_t"],
        vision_temperature=case.hyper["tau_v"],
    )
    x = case["vis_post"]
    return {"kept": method(Signals(grid=line(len(x)), tokens=x, features=case["vis_pre"], text=case["text"])).kept}


def evs(case: Case) -> Outputs:
    frames, height, width = case.hyper["grid"]
    grid = Grid(frames, height // case.hyper["merge"], width // case.hyper["merge"])
    method = EVS(keep=float(1 - case.hyper["q"]))
    speed = case.hyper.get("tokens_per_second", 2), case.hyper.get("second_per_grid", 1)
    return {"kept": method(Signals(grid=grid, tokens=case["x"])).kept, "mrope": media_positions(grid, *speed)}


def vispruner(case: Case) -> Outputs:
    method = VisPruner(keep=case.hyper["T"], important=case.hyper["important_ratio"])
    return by_cls_attention(method, case)


def vidcom2(case: Case) -> Outputs:
    size = case.hyper["n"]
    grid = Grid(len(case["x"]) // size, 1, size)
    method = VidCom2(keep=float(case.hyper["R"]), temperature=case.hyper["temperature"], strict_reference=True)
    kept = method(Signals(grid=grid, tokens=case["x"])).kept
    in_video, _ = centrality(case["x"].view(grid.frames, size, -1))
    return {
        "kept": kept,
        "per_frame": (kept // size).bincount(minlength=grid.frames),
        "frame_rate": method.frame_rates(in_video),
    }


def vidcom2_newline_map(case: Case) -> Outputs:
    return {"grid_index": with_newlines(case["kept"].long(), case.hyper["F"], case.hyper["side"])}


def vcast(case: Case) -> Outputs:
    x = case["x"]
    frames, size = x.shape[:2]
    method = VCast(
        keep=float(case.hyper["ratio"]),
        temperature=case.hyper["tau"],
        at_least=case.hyper["min_k"],
        strict_reference=True,
    )
    kept = method(Signals(grid=Grid(frames, 1, size), tokens=x.flatten(0, 1))).kept
    bend = curvature(normalize(x.mean(dim=1), dim=-1))
    return {"kept": kept, "per_frame": (kept // size).bincount(minlength=frames), "curvature": bend}


def greedyprune(case: Case) -> Outputs:
    saliency = cosines(case["x"], case["text"].mean(dim=0, keepdim=True))[:, 0]
    picks, greedy = independent_set(saliency, cosines(case["x"]), case.hyper["tau"], case.hyper["K"])
    return {"picks": picks, "n_greedy": torch.tensor([greedy])}


def holov(case: Case) -> Outputs:
    method, kept, quota = HoloV(keep=case.hyper["K"], crops=case.hyper["P"], strict_reference=True), [], []
    for x, attention in zip(case["x"], case["attn"], strict=True):
        kept.append(method(Signals(grid=line(len(x)), tokens=x, cls_attention=attention[None])).kept)
        parts = zip(x.tensor_split(method.crops), attention.tensor_split(method.crops), strict=True)
        scores = torch.stack([crop_score(*part) for part in parts if len(part[0])])
        quota.append(torch.tensor(quotas(scores, case.hyper["K"])))
    return {"kept": torch.stack(kept), "quota": torch.stack(quota)}


def visionzip(case: Case) -> Outputs:
    outputs: dict[str, list[torch.Tensor]] = {"y": [], "dominant": [], "assign": []}
    dominant, contextual = case.hyper["dominant_internal"], case.hyper["contextual"]
    for x, rows, metric in zip(case["hidden"], case["cls_attn"], case["metric"], strict=True):
        signals = Signals(grid=line(len(x) - 1), features=x, keys=metric[:, None], cls_attention=rows)
        plan = VisionZip().zip(signals, dominant, contextual)
        rest = torch.tensor([index for index in range(len(x)) if index not in plan.kept[: dominant + 1]])
        assign = torch.full((len(x),), -1)
        assign[rest] = contextual_groups(cosines(metric), rest, contextual)[1]
        for name, value in (("y", plan(x)), ("dominant", plan.kept[: dominant + 1]), ("assign", assign)):
            outputs[name].append(value)
    return {name: torch.stack(values) for name, values in outputs.items()}


def prumerge_plus(case: Case) -> Outputs:
    return prumerge(case, grid=True)


def prumerge(case: Case, grid: bool = False) -> Outputs:
    hyper, rows = case.hyper, zip(case["hidden"], case["q"], case["k"], strict=True)
    fixed = re.search(r"(non-?|not |no )adaptive|adaptive\W*(false|off|no)\b", case.variant, re.IGNORECASE)
    adaptive = "adaptive" in case.variant and not fixed
    method = PruMerge(keep=None if adaptive else hyper["M"], grid=grid, strict_reference=True)
    pictures = [Signals(grid=line(len(x) - 1), features=x, queries=q[:, None], keys=k[:, None]) for x, q, k in rows]
    tokens = case["hidden"].shape[1] - 1
    if adaptive:  # the reference takes the quartiles over the whole batch
        ratio = outlier_ratio(torch.cat([method.attention(signals) for signals in pictures]))
    else:
        ratio = hyper.get("ratio", hyper.get("reduction_ratio", hyper["M"] / tokens))
    count = int(ratio * tokens) if adaptive else hyper["M"]
    plans = [method.at_ratio(signals, ratio, count) for signals in pictures]
    return {
        "y": torch.stack([plan(x) for plan, x in zip(plans, case["hidden"], strict=True)]),
        "kept": torch.stack([plan.kept[:-1] - 1 for plan in plans]),
        "ratio": torch.tensor([ratio]),
    }


def prunesid(case: Case) -> Outputs:
    patches, saliency, total = case["hidden"][1:], case["cls_attn"].sum(dim=0), case.hyper["T"]
    given = case.arrays.get("groups")
    groups = principal_groups(patches, case.hyper["q"]) if given is None else given.long()
    similarity = cosines(patches)
    threshold = total / 32 * off_diagonal_mean(similarity)
    ordered, survivors = suppressed(similarity, saliency, groups, case.hyper["q"], float(threshold))
    return {
        "kept": PruneSID(keep=total).choose(similarity, saliency, groups, total, 1).kept,
        "nms_counts": torch.tensor(survivors),
        "quota": torch.tensor(group_quotas([len(members) for members in ordered], survivors, total)),
        "nms_threshold": threshold[None],
        "groups": groups,
    }


def llava_scissor(case: Case) -> Outputs:
    graphs = itertools.count()

    def sample(nodes: int) -> torch.Tensor:
        return case.arrays.get(f"sampled{next(graphs)}", torch.arange(nodes)).long()

    plan, spatial, temporal, assigned = merge(case["x"], case.hyper["tau"], sample)
    y = plan(case["x"].flatten(0, 1))
    return {"y": y, "temporal_components": temporal, "assign": assigned, "spatial_components": spatial}


def by_cls_attention(method: Selector, case: Case) -> Outputs:
    pairs = zip(case["x"], case["cls_attn"], strict=True)
    kept = [method(Signals(grid=line(len(x)), features=x, cls_attention=rows)).kept for x, rows in pairs]
    return {"kept": torch.stack(kept)}


CASES: dict[str, Callable[[Case], Outputs]] = {
    "divprune": divprune,
    "cdpruner": cdpruner,
    "otprune": otprune,
    "scope": scope,
    "mmtok": mmtok,
    "evs": evs,
    "vispruner": vispruner,
    "vidcom2": vidcom2,
    "vidcom2_newline_map": vidcom2_newline_map,
    "vcast": vcast,
    "greedyprune": greedyprune,
    "holov": holov,
    "llava_scissor": llava_scissor,
    "visionzip": visionzip,
    "prumerge": prumerge,
    "prumerge_plus": prumerge_plus,
    "prunesid": prunesid,
}
