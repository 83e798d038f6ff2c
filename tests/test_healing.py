"""The healing study: its rows, recipes, statistics; the processes themselves run in test_demo.py."""

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from PIL import Image

import laco
from laco.data import Sample, load_samples
from laco.errors import LacoError
from laco.evaluate import FamilyScore
from laco.evaluate.scores import wilson
from laco.files import alone_in
from laco.healing import HALVED_HEALED, NONE, Job, Protocol, Variant, average_interval, comparison, run_study, variant
from laco.healing.job import recipe_of, with_less_detail
from laco.healing.run import jobs_of
from laco.healing.summary import STUDENT_T, pooled, seed_interval, student_t


def score(hits: int, n: int) -> FamilyScore:
    low, high = wilson(hits, n)
    return FamilyScore(accuracy=100 * hits / n, low=low, high=high, n=n)


def test_two_studies_do_not_write_to_one_place(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(LacoError, match="another process is at work"):
        run_study([NONE], Protocol(model="nowhere"), tmp_path, progress=False)


def test_names_of_variants() -> None:
    assert variant(laco.LaCo()).name == "LaCo@1/4"
    assert variant(laco.PixelShuffle()).name == "PixelShuffle@external"
    assert variant(laco.LaCo(depth=1 / 12)).name == "LaCo@0.0833"
    names = [row.name for row in comparison()]
    assert len(set(names)) == len(names)
    assert {"none", "down-sampled input", "AveragePool@1/4", "RandomKeep@1/4"} <= set(names)


def test_two_variants_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = [variant(laco.LaCo()), variant(laco.LaCo(shortcut="saliency"))]
    with pytest.raises(LacoError, match="two variants are called 'LaCo@1/4'"):
        run_study(twice, Protocol(model="nowhere"), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (laco.LaCo(), {"compressor", "projector"}),
        (laco.LaCo(depth=1.0), {"compressor", "projector"}),
        (laco.AveragePool(depth=1 / 4), {"projector"}),
        (laco.PixelShuffle(depth=1.0), {"compressor"}),
        (None, {"projector"}),
    ],
)
def test_the_first_stage_trains_what_there_is(
    talker_directory: Path, tmp_path: Path, method: laco.Method | None, first: set[str]
) -> None:
    protocol = Protocol(model=str(talker_directory), adapt_lr=0.1, heal_lr=0.2, distill=0.5)
    row = variant(method) if method else Variant(name="none, healed")
    recipe = recipe_of(Job(variant=row, seed=3, protocol=protocol), tmp_path / "model")
    adapt, heal = recipe.stages
    assert adapt.lr == dict.fromkeys(first, 0.1)
    assert heal.lr == 0.2
    assert recipe.distill is not None
    assert recipe.distill.weight == 0.5
    assert recipe.data.seed != recipe_of(Job(variant=row, seed=4, protocol=protocol), tmp_path / "model").data.seed


@pytest.mark.parametrize(
    ("method", "weight", "questions"),
    [(laco.LaCo(), 0, 8), (laco.methods.FlexSelect(), 0, 8), (laco.methods.GlimpsePrune(depth=0.5), 1, 1)],
    ids=lambda value: getattr(value, "name", None),
)
def test_methods_with_a_loss_of_their_own_are_taught_by_it(
    talker_directory: Path, tmp_path: Path, method: laco.Method, weight: float, questions: int
) -> None:
    job = Job(variant=variant(method), seed=0, protocol=Protocol(model=str(talker_directory)))
    first, second = recipe_of(job, tmp_path / "model").stages
    assert {first.method_loss, second.method_loss} == {weight}
    assert {first.questions, second.questions} == {questions}


def test_halved_pictures_lose_detail_and_stay_shared() -> None:
    samples = load_samples("world", limit=14, seed=0)
    found = with_less_detail(samples, 2)
    for one, other in zip(samples, found, strict=True):
        before, after = (np.asarray(s.pictures()[0], dtype=float) for s in (one, other))
        assert before.shape == after.shape
        assert 0 < np.abs(before - after).mean() < 20
    keys = [sample.picture_key for sample in samples]
    assert [keys.index(key) for key in keys] == [
        [s.picture_key for s in found].index(sample.picture_key) for sample in found
    ]
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], dtype=np.uint8), (8, 4)))
    assert np.ptp(np.asarray(with_less_detail([Sample("", (stripes,), "", "", "")], 2)[0].pictures()[0])) == 0


def test_the_healed_baseline_learns_from_what_it_is_judged_on(talker_directory: Path, tmp_path: Path) -> None:
    protocol = Protocol(model=str(talker_directory))
    for row, factor in ((HALVED_HEALED, 2), (variant(laco.LaCo()), 1)):
        recipe = recipe_of(Job(variant=row, seed=0, protocol=protocol), tmp_path / "model")
        assert recipe.data.down_sample == factor


def test_pooling_counts_all_questions() -> None:
    assert pooled([score(30, 100), score(50, 100)]) == score(80, 200)


def test_the_interval_over_seeds_is_students() -> None:
    low, high = seed_interval([40, 50, 60])
    assert (low, high) == pytest.approx((50 - 4.303 * 10 / 3**0.5, 50 + 4.303 * 10 / 3**0.5))
    assert seed_interval([0.0, 1.0])[0] == 0
    values = [student_t(freedom) for freedom in range(1, 200)]
    assert values == sorted(values, reverse=True)
    assert values[-1] > NormalDist().inv_cdf(0.975)
    known = {10: 2.228, 11: 2.201, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}  # of printed tables
    assert {freedom: round(student_t(freedom), 3) for freedom in known} == known
    assert [student_t(freedom) for freedom in STUDENT_T] == list(STUDENT_T.values())


def test_the_interval_of_a_mean_covers_it() -> None:
    rng, truth, n, covered = np.random.default_rng(0), [0.9, 0.5, 0.05, 0.0], 100, 0
    for _ in range(400):
        low, high = average_interval([score(int(rng.binomial(n, p)), n) for p in truth])
        covered += low <= 100 * np.mean(truth) <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_a_method_that_is_random_has_another_seed_in_every_job() -> None:
    protocol, row = Protocol(model="m"), variant(laco.RandomKeep(seed=5))
    assert row.random
    assert [Job(variant=row, seed=seed, protocol=protocol).method["seed"] for seed in (0, 2)] == [5, 7]
    still = Variant(name="mean", method=laco.AveragePool().to_dict(), heal=False)
    assert not still.random
    assert Job(variant=still, seed=2, protocol=protocol).method == still.method


def test_a_job_read_back_is_equal() -> None:
    row = Variant(name="tome", method=laco.ToMe(r=(1, 2)).to_dict())
    job = Job(variant=row, seed=0, protocol=Protocol(model="m"))
    assert Job.model_validate_json(job.model_dump_json()) == job


def test_none_is_not_healed() -> None:
    assert not NONE.heal
    assert NONE.method is None


def test_what_is_judged_as_it_is_stays_when_others_are_healed_otherwise() -> None:
    short, long = (Protocol(model="m", samples=7, heal_steps=steps, batch_size=steps) for steps in (1, 2))
    rows = [variant(laco.LaCo()), Variant(name="mean", method=laco.AveragePool().to_dict(), heal=False)]
    one, other = (jobs_of(rows, protocol, (0,)) for protocol in (short, long))
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, True]  # none, LaCo, mean
    assert one != jobs_of(rows, short.model_copy(update={"samples": 8}), (0,))
    assert [job.protocol.samples for job in one] == [7, 7, 7]
