"""Compression methods: what there is, by name, and from saved settings.

A package outside this tree adds its own through the entry point group `laco.methods`, name = the method's
class.
"""

import re
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from laco.errors import LacoError
from laco.methods.average_pool import AveragePool
from laco.methods.base import Merger, MergerModule, Method, Place
from laco.methods.cdpruner import CDPruner
from laco.methods.conv_compressor import ConvCompressor
from laco.methods.dart import DART
from laco.methods.decoder import DecoderMethod, DecoderSignals
from laco.methods.div_prune import DivPrune
from laco.methods.dyntok import DynTok
from laco.methods.evit import EViT
from laco.methods.evs import EVS
from laco.methods.explainability import Explainability
from laco.methods.fastv import FastV
from laco.methods.flashvid import FlashVID, FlashVIDLate
from laco.methods.flexselect import FlexSelect
from laco.methods.folder import Folder
from laco.methods.glimpse_prune import GlimpsePrune
from laco.methods.greedy_prune import GreedyPrune
from laco.methods.grid_pool import GridPool
from laco.methods.holov import HoloV
from laco.methods.ipcv import IPCV
from laco.methods.laco import LaCo
from laco.methods.ldpv2 import LDPv2
from laco.methods.mmtok import MMTok
from laco.methods.otprune import OTPrune
from laco.methods.pixel_shuffle import PixelShuffle
from laco.methods.prumerge import PruMerge
from laco.methods.prunesid import PruneSID
from laco.methods.pyramid_drop import PyramidDrop
from laco.methods.random_keep import RandomKeep
from laco.methods.random_tokens import RandomTokens
from laco.methods.reducer import Reducer
from laco.methods.scissor import Scissor
from laco.methods.scope import Scope
from laco.methods.selector import Plan, Selector, Signals
from laco.methods.sparsevlm import SparseVLM
from laco.methods.spvit import SPViT
from laco.methods.token_packer import TokenPacker
from laco.methods.tome import ToMe
from laco.methods.transprune import TransPrune
from laco.methods.uniform_stride import UniformStride
from laco.methods.v_cast import VCast
from laco.methods.vidcom2 import VidCom2
from laco.methods.visionzip import VisionZip
from laco.methods.vispruner import VisPruner
from laco.methods.window_merger import WindowMerger
from laco.methods.wtc import WTC

__all__ = [
    "DART",
    "EVS",
    "IPCV",
    "WTC",
    "AveragePool",
    "CDPruner",
    "ConvCompressor",
    "DecoderMethod",
    "DecoderSignals",
    "DivPrune",
    "DynTok",
    "EViT",
    "Explainability",
    "FastV",
    "FlashVID",
    "FlashVIDLate",
    "FlexSelect",
    "Folder",
    "GlimpsePrune",
    "GreedyPrune",
    "GridPool",
    "HoloV",
    "LDPv2",
    "LaCo",
    "MMTok",
    "Merger",
    "MergerModule",
    "Method",
    "OTPrune",
    "PixelShuffle",
    "Place",
    "Plan",
    "PruMerge",
    "PruneSID",
    "PyramidDrop",
    "RandomKeep",
    "RandomTokens",
    "Reducer",
    "SPViT",
    "Scissor",
    "Scope",
    "Selector",
    "Signals",
    "SparseVLM",
    "ToMe",
    "TokenPacker",
    "TransPrune",
    "UniformStride",
    "VCast",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "WindowMerger",
    "catalogue",
    "from_dict",
    "get",
    "registry",
]

BUILT_IN: tuple[type[Method], ...] = (
    LaCo,
    AveragePool,
    RandomKeep,
    PixelShuffle,
    LDPv2,
    TokenPacker,
    WindowMerger,
    WTC,
    ConvCompressor,
    ToMe,
    EViT,
    Folder,
    SPViT,
    IPCV,
    RandomTokens,
    UniformStride,
    GridPool,
    VisionZip,
    PruMerge,
    VisPruner,
    DivPrune,
    CDPruner,
    Scope,
    MMTok,
    OTPrune,
    HoloV,
    PruneSID,
    GreedyPrune,
    DynTok,
    Scissor,
    VidCom2,
    VCast,
    EVS,
    FlexSelect,
    Explainability,
    FlashVID,
    FlashVIDLate,
    DART,
    FastV,
    PyramidDrop,
    SparseVLM,
    TransPrune,
    GlimpsePrune,
)


@cache
def registry() -> dict[str, type[Method]]:
    """Every method by its name: the built-in ones, then those of installed packages.

    Raises:
        LacoError: an entry point is no method, or takes a name that is in use.
    """
    methods = {method.name: method for method in BUILT_IN}
    for entry in entry_points(group="laco.methods"):
        method = entry.load()
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise LacoError(f"the entry point {entry.value!r} of group laco.methods is no laco.methods.Method")
        if method.name in methods:
            raise LacoError(f"the entry point {entry.value!r} of group laco.methods reuses the name {method.name!r}")
        methods[method.name] = method
    return methods


def get(name: str) -> type[Method]:
    """The class of the method called `name`; an unknown name raises `LacoError` and says which is nearest."""
    methods = registry()
    if name in methods:
        return methods[name]
    near = get_close_matches(str(name), methods, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(methods)}"
    raise LacoError(f"there is no method {name!r}; {hint}")


def from_dict(data: dict[str, Any]) -> Method:
    """The inverse of `Method.to_dict`: the name under "method" and every other setting of that method."""
    if "method" not in data:
        raise LacoError('the settings of a method need its name under "method"')
    return get(data["method"]).from_fields({key: value for key, value in data.items() if key != "method"})


def catalogue() -> list[dict[str, Any]]:
    """One row a method for `laco methods`: name, title, places, needs, trained, static_count, sources."""
    return [
        {
            "name": method.name,
            "title": method.title,
            "places": sorted(method.places),
            "needs": sorted(method.needs),
            "trained": method.trained,
            "static_count": method.static_count,
            "paper": method.paper,
            "arxiv": re.findall(r"\d{4}\.\d{5}", method.paper),
            "confirmed": method.confirmed,
            "assumed": method.assumed,
        }
        for method in registry().values()
    ]
