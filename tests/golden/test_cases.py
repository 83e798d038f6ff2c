"""Cases of the index's form that the shared ones do not have: other settings of the same functions."""

import pytest
import torch
from cases import CASES, Case


@pytest.mark.parametrize("amount", [0, 3, 5])
def test_tome_reads_rows_as_even_and_odd_also_with_a_distillation_token(amount: int) -> None:
    torch.manual_seed(amount)
    x, metric = torch.randn(2, 14, 3), torch.randn(2, 14, 4)
    found = CASES["tome_merge"](
        Case({"x": x, "metric": metric}, {"r": amount, "class_token": True, "distill_token": True}, "")
    )
    for b in range(2):
        y, sources = found["y"][b], found["source_map"][b].bool()
        row = sources.int().argmax(dim=0).tolist()  # of each token
        groups = [sources[row[token]].nonzero().flatten().tolist() for token in range(14)]
        even = [token for token in range(0, 14, 2) if groups[token] == [token]]
        for token, group in enumerate(groups):
            odd = [other for other in group if other % 2]
            place = len(even) + odd[0] // 2 if odd else even.index(token)
            wanted = y[place] if amount else x[b, token]  # without merging it is left alone
            torch.testing.assert_close(found["unmerged"][b, token], wanted)


def test_evit_goes_by_the_epoch_outside_of_its_schedule() -> None:
    arguments = [[2000, 5, 10, 110, 100, 0.7], [5000, 120, 10, 110, 100, 0.7], [6000, 60, 10, 110, 100, 0.7]]
    found = CASES["evit_schedule"](Case({"akr_args": torch.tensor(arguments)}, {"counts": []}, ""))
    torch.testing.assert_close(found["keep_rate_schedule"], torch.tensor([1.0, 0.7, 0.85]))


def test_sparsevlm_always_drops_a_token() -> None:
    torch.manual_seed(0)
    arrays = {"input_embeds": torch.randn(30, 8), "layer_out": torch.randn(30, 8)}
    arrays["attn_text"] = torch.rand(2, 6, 30).softmax(dim=-1)
    hyper = {"prefix": 4, "N": 20, "M": 6, "keep": 25, "head_dim": 8, "heads_kept": None, "rope_base": 1e4}
    found = CASES["sparsevlm_stage"](Case(arrays, hyper, ""))
    assert len(found["kept"]) == 19
    assert torch.equal(found["y"][23], arrays["layer_out"][4 + found["recycled"][0]])


def test_internvl_in_its_first_version_is_transposed() -> None:
    torch.manual_seed(0)
    arrays = {"x": torch.randn(1, 24, 4), "norm_weight": torch.ones(16), "norm_bias": torch.zeros(16)}
    for name, shape in {"fc1": (5, 16), "fc2": (5, 5)}.items():
        arrays |= {f"{name}_weight": torch.randn(shape), f"{name}_bias": torch.randn(shape[0])}
    hyper = {"grid": [4, 6], "r": 2, "ln_eps": 1e-5}
    first, second = (CASES["internvl_mlp1"](Case(arrays, hyper, f"pixel shuffle v{n}, mlp1"))["y"] for n in (1, 2))
    assert torch.equal(first.view(3, 2, 5), second.view(2, 3, 5).transpose(0, 1))


def test_the_fixed_ratio_of_prumerge_takes_no_outliers() -> None:
    torch.manual_seed(0)
    arrays = {name: torch.randn(2, 65, 6) for name in ("hidden", "q", "k")}
    for method, kept in (("prumerge", 8), ("prumerge_plus", 16)):
        found = CASES[method](Case(arrays, {"M": 8}, "fixed ratio 1/8, N=64"))
        assert found["kept"].shape == (2, kept)
        assert found["y"].shape == (2, kept + 1, 6)
        assert found["ratio"] == 1 / 8


def test_scope_adds_where_the_case_says_so() -> None:
    torch.manual_seed(0)
    arrays = {"x": torch.randn(1, 40, 6), "saliency": 30 * torch.rand(1, 40)}
    unit = torch.nn.functional.normalize(arrays["x"][0], dim=-1)
    gain = (unit @ unit.T).clamp(min=0).sum(dim=0)
    for combined, wanted in (("multi", gain * arrays["saliency"][0]), ("add", gain + arrays["saliency"][0])):
        found = CASES["scope"](Case(arrays, {"K": 12, "alpha": 1.0, "combined": combined}, ""))
        assert found["picks"][0, 0] == wanted.argmax()
