"""Methods inside the language model or scored by it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cases.case import Case, Outputs
from laco.grid import Grid
from laco.methods.dart import DART
from laco.methods.decoder import DecoderMethod, DecoderSignals, Step, attention_rows
from laco.methods.dpc_knn import averaging, density_peaks
from laco.methods.fastv import FastV
from laco.methods.flashvid import FlashVID, FlashVIDLate, merge_over_time, segments, select
from laco.methods.flexselect import FlexSelect
from laco.methods.glimpse_prune import GlimpsePrune, ImportanceHead
from laco.methods.pyramid_drop import PyramidDrop
from laco.methods.selector import Signals
from laco.methods.sparsevlm import SparseVLM, recycling
from laco.methods.transprune import TransPrune, transition


def rotary(length: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, d) of the positions 0 .. L - 1."""
    turns = base ** -(torch.arange(0, width, 2) / width)
    angles = (torch.arange(length)[:, None] * turns).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotated(x_HLd: Tensor, base: float) -> Tensor:
    cos, sin = rotary(x_HLd.shape[1], x_HLd.shape[2], base)
    first, second = x_HLd.chunk(2, dim=-1)
    return x_HLd * cos + torch.cat([-second, first], dim=-1) * sin


def rows_of_layer(x_LD: Tensor, case: Case, rows: Tensor, stem: str = "") -> Tensor:
    """(H, M, L) attention that a layer would compute for these rows."""
    normed = F.rms_norm(x_LD, x_LD.shape[-1:], case[f"{stem}norm_weight"], case.hyper.get("rms_eps", 1e-6))
    q, k = (
        F.linear(normed, case[f"{stem}{x}_weight"], case.arrays.get(f"{stem}{x}_bias"))
        .unflatten(-1, (-1, case.hyper["head_dim"]))
        .transpose(0, 1)
        for x in "qk"
    )
    base = case.hyper["rope_base"]
    return attention_rows(rotated(q, base)[:, rows], rotated(k, base), rows)


def visual_at(start: int, count: int) -> Tensor:
    return torch.arange(start, start + count)


def stages(ratios: list[float]) -> dict[str, tuple[float, ...]]:
    """Settings of a method with so many points, wherever they are."""
    return {
        "keep": tuple(float(ratio) for ratio in ratios),
        "depths": tuple((index + 1) / (len(ratios) + 1) for index in range(len(ratios))),
    }


def by_last_row(method: DecoderMethod, case: Case) -> Outputs:
    row = case["last_row"]
    signals = DecoderSignals(
        visual=visual_at(case.hyper["image_start"], case.hyper["N"]), length=row.shape[1], attention=row[:, None]
    )
    plan = method(signals)
    return {"keep_indexs": signals.rows(plan), "kept_visual": plan.kept}


def fastv(case: Case) -> Outputs:
    rule = "floor" if "int(" in case.variant or "lmms" in case.variant else "round"
    return by_last_row(FastV(keep=float(case.hyper["keep_ratio"]), count_by=rule), case)


def flashvid_llm_prune(case: Case) -> Outputs:
    return by_last_row(FlashVIDLate(keep=float(case.hyper["ratio"]), strict_reference=True), case)


def pyramiddrop(case: Case) -> Outputs:
    hyper, outputs = case.hyper, {}
    method = PyramidDrop(**stages(hyper["ratio_list"][1:]))
    for b, length in enumerate(case["lengths"].tolist()):
        signals = DecoderSignals(
            visual=visual_at(hyper["image_start"][b], hyper["image_tokens_now"][b]),
            length=length,
            original=hyper["image_tokens_original"][b],
        )
        attention = rows_of_layer(case["hidden"][b, :length], case, method.queries(signals))
        signals = DecoderSignals(**vars(signals) | {"attention": attention})
        outputs[f"score{b}"] = method.score(signals)
        outputs[f"kept{b}"] = method(signals, hyper["stage"]).kept
    return outputs


def transprune(case: Case) -> Outputs:
    hyper, outputs, memory = case.hyper, {}, None
    ratios = hyper["ratios"]
    method = TransPrune(**stages(ratios))
    alive = hyper["N"]
    for stage in range(len(ratios)):
        for index in range(hyper["accumulated_layers_per_stage"]):
            name = f"s{stage}_l{index}"
            steps = [Step(case[f"{name}_u_{part}"], case[f"{name}_v_{part}"]) for part in ("attn", "mlp")]
            outputs[f"{name}_ttv"] = transition(steps[0]) + transition(steps[1])
            memory = method.observe(memory, *steps)
        hidden = case[f"s{stage}_hidden"]
        known = {"visual": visual_at(hyper["prefix"], alive), "length": len(hidden), "original": hyper["N"]}
        rows = method.queries(DecoderSignals(**known))
        attention = rows_of_layer(hidden, case, rows, f"s{stage}_")
        signals = DecoderSignals(**known, attention=attention, memory=memory)
        plan = method(signals, stage)
        outputs[f"s{stage}_score"], outputs[f"s{stage}_kept"] = method.score(signals), plan.kept
        memory, alive = method.after(memory, signals.rows(plan)), len(plan.kept)
    return outputs


def sparsevlm_cluster_merge(case: Case) -> Outputs:
    clusters = case.hyper["clusters"]
    centres, joined = density_peaks(case["x"], clusters, clusters, strict_reference=True)
    return {"y": averaging(joined, clusters) @ case["x"], "centres": centres, "assign": joined}


def sparsevlm_stage(case: Case) -> Outputs:
    hyper, x = case.hyper, case["layer_out"]
    plus = hyper["heads_kept"] is not None
    method = SparseVLM(
        keep=min(hyper["keep"], hyper["N"]),
        depths=(0.5,),
        version="plus" if plus else "1",
        positions="keep" if plus else "renumber",
        strict_reference=True,
        **({"heads": hyper["heads_kept"]} if plus else {}),
    )
    known = {"visual": visual_at(hyper["prefix"], hyper["N"]), "length": len(x), "hidden": x}
    known["memory"] = method.start(DecoderSignals(**known, embeddings=case["input_embeds"]))
    rows = method.queries(DecoderSignals(**known)) - (len(x) - hyper["M"])
    signals = DecoderSignals(
        **known,
        attention=case["attn_text"][:, rows],
        rotary=rotary(len(x), hyper["head_dim"], hyper["rope_base"]),
    )
    plan, score = method(signals), method.score(signals)
    ids = torch.arange(len(x))
    after = signals.rows(plan)
    kept = method.kept(hyper["N"], hyper["N"])
    taken, clusters = recycling(hyper["N"] - kept)
    return {
        "raters": known["memory"],
        "score": score,
        "kept": plan.kept[:kept],
        "y": signals.apply(plan, x),
        "position_ids": ids[after] if method.positions == "keep" else ids[: len(after)],
        "recycled": score.argsort(descending=True)[kept : kept + taken],
        "n_clusters": torch.tensor([clusters]),
    }


def dart(case: Case) -> Outputs:
    hyper, exact = case.hyper, "AngelSlim" in case.variant
    most = hyper.get("max_num") if "LLaVA" in case.variant else None  # the authors' other code knows no such number
    keep = hyper["K"] if exact else most or float(1 - hyper["reduction_ratio"])
    method = DART(
        keep=keep,
        visual_pivots=hyper["pivot_image"],
        text_pivots=hyper["pivot_text"],
        rule="exact" if exact else "authors",
        strict_reference=True,
    )
    signals = DecoderSignals(
        visual=visual_at(hyper["prefix"], hyper["N"]), length=len(case["x"]), hidden=case["x"], keys=case["keys"]
    )
    visual, text = method.pivots(signals)
    both = torch.cat([visual, text])
    return {
        "kept": method(signals).kept,
        "image_pivots": visual - hyper["prefix"],
        "text_pivots": text - (hyper["prefix"] + hyper["N"]),
        "pivot_order": method.turns(both),
        "pivots": both,
    }


def flexselect(case: Case) -> Outputs:
    hyper, x, frames, size = case.hyper, case["x"], case.hyper["F"], case.hyper["n"]
    prefix, video, suffix = x.split([hyper["prefix"], frames * size, hyper["M"]])
    video = video.unflatten(0, (frames, size))

    def attention(group: range) -> Tensor:
        """(H, M, group, n)"""
        part = torch.cat([prefix, video[group].flatten(0, 1), suffix])
        rows = torch.arange(len(part) - len(suffix), len(part))
        return rows_of_layer(part, case, rows)[..., len(prefix) : -len(suffix)].unflatten(-1, (len(group), size))

    def signals(groups: list[range]) -> Signals:
        parts = [attention(group) for group in groups]
        together = parts[0].new_zeros(*parts[0].shape[:2], frames, size)
        for group, part in zip(groups, parts, strict=True):
            together[:, :, group] = part
        return Signals(grid=Grid(frames, 1, size), text_attention=together.flatten(2))

    method = FlexSelect(
        keep=min(hyper["budget"], frames * size), max_frames=hyper["max_frames_per_group"], strict_reference=True
    )
    whole = signals([range(frames)])
    return {
        "score_max": method.scores(whole),
        "score_mean": FlexSelect(score="mean").scores(whole),
        "selected": method(signals(method.groups(frames))).kept,
    }


def flashvid_adts(case: Case) -> Outputs:
    return {"kept": select(case["x"], case["attn"], case.hyper["k"], "v2" in case.variant)}


def flashvid_tstm(case: Case) -> Outputs:
    hyper = case.hyper
    per_frame = hyper["n_a"] + hyper["n_s"]
    plan = merge_over_time(case["x"], case["free"].bool(), hyper["temporal_threshold"], per_frame, direct=True)
    return {"y": plan(case["x"].flatten(0, 1)), "index": plan.kept}


def flashvid(case: Case) -> Outputs:
    hyper, x = case.hyper, case["x"]
    method = FlashVID(
        keep=float(hyper["retention"]),
        expansion=hyper["expansion"],
        attended=hyper["alpha"],
        relevance="v2" in hyper["method"],
        merge_above=hyper["temporal_threshold"],
        cut_below=hyper["segment_threshold"],
        min_segments=hyper["min_segments"],
        strict_reference=True,
    )
    tokens = x.flatten(0, 1)
    plan = method(Signals(grid=Grid(len(x), 1, x.shape[1]), tokens=tokens, received=case["attn"].flatten()))
    lengths = segments(x, method.cut_below, method.min_segments, strict_reference=True)
    return {"y": plan(tokens), "index": plan.kept, "segments": torch.tensor(lengths)}


def glimpseprune_vip(case: Case) -> Outputs:
    hyper = case.hyper
    grids = [Grid(1, height, width) for height, width in case["grids"].tolist()]
    maps = [case[f"cond{index}"] for index in range(hyper["layers"])]
    head = ImportanceHead(
        case["attn"].shape[1],
        maps[0].shape[1],
        hyper["layers"],
        hyper["fuse"],
        hyper["cond"],
        hyper["heads"],
        hidden=hyper["mlp_hidden"],
        eps=hyper["rms_eps"],
    )
    names = {"condition": "cond", "out": "o", "gate": "mlp_gate", "up": "mlp_up", "down": "mlp_down"}
    state = {}
    for key in head.state_dict():
        *path, part, kind = key.split(".")
        stem = f"l{path[1]}_{names.get(part, part)}" if path else {"inward": "in", "outward": "out"}[part]
        state[key] = case[f"{stem}_{kind}"]
    head.load_state_dict(state)
    ratio = hyper["max_remain_ratio"]
    method = GlimpsePrune(
        keep=1.0 if ratio is None else float(ratio), threshold=hyper["threshold"], at_least=hyper["min_remain"] or 0
    )
    logits = head(case["attn"], maps, grids)
    return {"logits": logits, "keep": method.stays(logits)}


CASES: dict[str, Callable[[Case], Outputs]] = {
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm_cluster_merge": sparsevlm_cluster_merge,
    "sparsevlm_stage": sparsevlm_stage,
    "transprune": transprune,
    "dart": dart,
    "flexselect": flexselect,
    "flashvid_adts": flashvid_adts,
    "flashvid_tstm": flashvid_tstm,
    "flashvid": flashvid,
    "flashvid_llm_prune": flashvid_llm_prune,
    "glimpseprune_vip": glimpseprune_vip,
}
