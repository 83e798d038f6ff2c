"""A device that is written in Python, so that mixing devices is refused on a machine without an accelerator, too.

Its tensors hold one on the CPU that computes for them. It changes the process (torch has one such device at most), so
this is a program of its own, which `test_far.py` starts:

    python tests/far.py methods            every selector and method inside the language model, on tensors
    python tests/far.py llava-siglip       in a model of this family: what is dropped or merged, and generation

It prints what went wrong, and ends with 1 if anything did.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path[:0] = [str(Path(__file__).parent)]

# These take tensors of two devices on every accelerator, as does indexing by a tensor of the CPU.
MIX = {"aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}

LIBRARY = torch.library.Library("aten", "IMPL")  # what is registered in it stays as long as it lives


class FarTensor(Tensor):
    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        geometry = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        return Tensor._make_wrapper_subclass(cls, near.size(), device="far:0", **geometry)

    def __init__(self, near: Tensor):
        self.near = near

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"far {self.near}"

    def tolist(self) -> Any:  # torch refuses it for subclasses
        return self.near.tolist()


class Far(TorchDispatchMode):
    """While this lasts, `device=x.device` makes new tensors on the device."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})


def near(x: Any) -> Any:
    return x.near if isinstance(x, FarTensor) else x


def far(x: Any) -> Any:
    return FarTensor(x.detach().clone()) if isinstance(x, Tensor) and not isinstance(x, FarTensor) else x


def computed(operation: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An operation's results, on the device if an argument is there; RuntimeError if another is not."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, FarTensor)]
    name, result_is_far = operation._schema.name, bool(there)
    if there and name not in MIX and any(x.ndim and not isinstance(x, FarTensor) for x in tensors):
        raise RuntimeError(f"{operation} has tensors of two devices")
    settings = {key: near(value) for key, value in kwargs.items()}
    if settings.get("device") is not None:
        result_is_far = torch.device(settings["device"]).type == "far"
        settings["device"] = "cpu" if result_is_far else settings["device"]
    if operation._schema.is_mutable:
        result_is_far = isinstance(args[0], FarTensor)
    out = operation(*tree_map(near, args), **tree_map(near, settings))
    if not result_is_far or name == "aten::_local_scalar_dense":
        return out
    same = {id(x.near): x for x in there}  # what is changed in place
    return tree_map(lambda x: same[id(x)] if id(x) in same else FarTensor(x) if type(x) is Tensor else x, out)


def copy(x: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    near(to).copy_(near(x))
    return to


def start() -> None:
    """Makes the device known. What torch itself asks of it, outside of every dispatch mode, is registered."""
    _setup_privateuseone_for_python_backend("far")

    def empty(size: Any, *stride: Any, dtype: Any = None, **_: Any) -> Tensor:
        return FarTensor((torch.empty_strided if stride else torch.empty)(size, *stride, dtype=dtype))

    for name, kernel in {
        "empty.memory_format": empty,
        "empty_strided": empty,
        "_copy_from": copy,
        "_local_scalar_dense": lambda x: x.near.item(),
    }.items():
        LIBRARY.impl(name, kernel, "PrivateUse1")


def far_module(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(far(parameter), requires_grad=parameter.requires_grad)
        part._buffers.update({name: far(buffer) for name, buffer in part._buffers.items()})


def moved(signals: Any) -> Any:
    return replace(signals, **{field.name: tree_map(far, getattr(signals, field.name)) for field in fields(signals)})


Check = Callable[[], bool]  # whether the results are right


def of_methods() -> Iterator[tuple[str, Check]]:
    from laco.grid import Grid
    from methods import test_decoder_methods, test_selectors

    def same_choice(call: Callable[..., Any], given: Any, module: nn.Module | None = None) -> bool:
        wanted = call(given, module=module) if module else call(given)
        if module:
            far_module(module)
        with Far(), torch.no_grad():
            found = call(moved(given), module=module) if module else call(moved(given))
        return isinstance(found.kept, FarTensor) and torch.equal(found.kept.near, wanted.kept)

    for name, cls in test_selectors.SELECTORS.items():
        settings: list[dict[str, Any]] = [{}]
        if "strict_reference" in {field.name for field in fields(cls)}:
            settings.append({"strict_reference": True})
        for given in settings:
            for grid in (Grid(1, 6, 8), Grid(4, 5, 6)):
                signals = test_selectors.signals(grid)
                yield f"{name} {given} {grid}", partial(same_choice, cls(**given), signals)
    for name, method in test_decoder_methods.METHODS.items():
        signals = test_decoder_methods.ready(method, test_decoder_methods.sample())
        yield name, partial(same_choice, method, signals, test_decoder_methods.module(method))


def of_models(case: str) -> Iterator[tuple[str, Check]]:
    import laco
    import tiny
    from families import test_reductions

    def answers(method: Any) -> bool:
        """Not the CPU's to the last bit: among equal tokens, rounding chooses."""
        model, processor = test_reductions.reduced(case, method)
        batch = tiny.CASES[case].inputs(processor, *test_reductions.prompts(case))
        far_module(model)
        with Far(), torch.no_grad():
            batch = {name: far(value) for name, value in batch.items()}
            test_reductions.generated(model, batch, 2)
            return bool(near(test_reductions.last_logits(model, batch)).isfinite().all())

    methods = dict(test_reductions.methods(case)) | {"laco": laco.LaCo(depth=0.5, **tiny.CASES[case].method)}
    if not case.startswith("qwen"):
        methods |= {"tome": laco.ToMe(r=3), "folder": laco.Folder(keep=0.6, minimum=1)}
    if case.startswith("llava"):
        methods["spvit"] = laco.SPViT()
    for name, method in methods.items():
        yield name, partial(answers, method)


def main(what: str) -> int:
    start()
    wrong = 0
    for name, check in of_methods() if what == "methods" else of_models(what):
        try:
            reason = "" if check() else "wrong results"
        except RuntimeError as error:
            reason = str(error)
        if reason:
            wrong += 1
            print(f"{what} {name}: {reason}")
    return min(wrong, 1)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # torch waits in vain for threads of such a device
