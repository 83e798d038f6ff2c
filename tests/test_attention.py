"""Statistics of attention against the whole softmax, and how much memory they need."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laco.attention import cls_rows, received, rows

B, H, N, D = 2, 4, 37, 8


def queries_keys(tokens: int = N, heads: int = H) -> tuple[Tensor, Tensor]:
    return torch.randn(B, H, tokens, D, dtype=torch.float64), torch.randn(B, heads, tokens, D, dtype=torch.float64)


def whole(q: Tensor, k: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    logits = torch.einsum("bhmd,bhnd->bhmn", q, k) * scaling
    exponentials = (logits if bias is None else logits + bias).exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def masks() -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Each as it is given and as what is added to the logits."""
    sizes = torch.randint(1, 5, (B, 1, 1, N)).double().log()
    hidden = torch.rand(B, 1, 1, N) < 0.3
    pairs = torch.rand(B, 1, N, N) < 0.3
    minus = torch.tensor(-torch.inf, dtype=torch.float64)
    return {
        "none": (None, None),
        "sizes": (sizes, sizes),
        "hidden keys": (~hidden, torch.where(hidden, minus, 0.0)),
        "hidden pairs": (~pairs, torch.where(pairs, minus, 0.0)),
    }


def test_autocast_changes_nothing():
    q, k = (x.float() for x in queries_keys())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen, got = rows(q, k), received(q, k)
    assert torch.equal(seen, rows(q, k))
    assert torch.equal(got, received(q, k))


@pytest.mark.parametrize("mask", ["none", "sizes", "hidden keys", "hidden pairs"])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_they_equal_the_whole_softmax(mask, scaling):
    (q, k), (given, bias) = queries_keys(), masks()[mask]
    weights = whole(q, k, D**-0.5 if scaling is None else scaling, bias)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(rows(q, k, scaling, given), weights, **exact)
    torch.testing.assert_close(cls_rows(q, k, scaling, given), weights[:, :, 0], **exact)
    mean = weights.mean(dim=(1, 2))
    torch.testing.assert_close(received(q, k, scaling, given), mean, **exact)
    single = received(q.float(), k.float(), scaling, given if mask != "sizes" else given.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, N, 1000])
@pytest.mark.parametrize("mask", ["sizes", "hidden pairs"])
def test_the_size_of_chunks_changes_nothing(chunk, mask):
    (q, k), (given, _) = queries_keys(), masks()[mask]
    torch.testing.assert_close(received(q, k, mask=given, chunk=chunk), received(q, k, mask=given, chunk=N + 1))


def test_neighbouring_heads_of_queries_share_keys():
    q, k = queries_keys(heads=2)
    torch.testing.assert_close(rows(q, k), whole(q, k.repeat_interleave(2, dim=1), D**-0.5))


def test_half_precision_is_added_up_in_single():
    q, k = (x.bfloat16() for x in queries_keys())
    weights = whole(q.double(), k.double(), D**-0.5)
    torch.testing.assert_close(received(q, k).double(), weights.mean(dim=(1, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(cls_rows(q, k).double(), weights[:, :, 0], rtol=0, atol=1e-6)


def test_the_row_of_cls_has_a_gradient_and_the_mean_of_all_rows_has_none():
    q, k = queries_keys()
    q.requires_grad_()
    cls_rows(q, k).square().sum().backward()
    assert q.grad[:, :, 0].any()
    assert not q.grad[:, :, 1:].any()
    assert not received(q, k).requires_grad


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that is made while this lasts."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


@pytest.mark.parametrize("statistic", [received, cls_rows])
def test_memory_grows_linearly(statistic):
    largest = []
    for tokens in (512, 1024, 2048):
        with Largest() as mode:
            statistic(*queries_keys(tokens), mask=torch.zeros(B, 1, 1, tokens))
        largest.append(mode.numbers)
    assert largest[2] == 2 * largest[1] == 4 * largest[0]
    assert largest[2] < B * H * 2048 * 2048
