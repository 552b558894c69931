"""Each departure from a constant rate is seen by the test that is named for it, and not by the picture of the paper."""

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy import stats

from studies.statistics import (
    bootstrap,
    count_events,
    difference_in_differences,
    mcnemar,
    poisson_quantiles,
    poisson_tests,
    poisson_trend,
    prediction,
    rank_correlation,
    wilson,
)

SLICES, RATE, SEEDS = 10_000, 6.5, 200  # the rate of 12b on the deduplicated Pile, in slices of 512 rows
X = (np.arange(SLICES) + 0.5) / SLICES


def constant(draw):
    return draw.poisson(RATE, SLICES)


def copies(draw):
    """Five of 100 events have a copy in the same slice."""
    counts = draw.poisson(RATE / 1.05, SLICES)
    return counts + draw.binomial(counts, 0.05)


# What happens, how to draw it, and the only tests that may see it.
ALTERNATIVES = {
    "the rate grows by 10%": (lambda draw: draw.poisson(RATE * (1 + 0.1 * (X - 0.5))), {"trend", "uniform", "halves"}),
    "the first 45% have 1.3 times the rate": (
        lambda draw: draw.poisson(RATE * np.where(X < 0.45, 1.3, 1.0)),
        {"dispersion", "trend", "uniform", "halves"},
    ),
    "copies": (copies, {"dispersion"}),
    "events come in threes": (lambda draw: 3 * draw.poisson(RATE / 3, SLICES), {"dispersion"}),
}


def rejected(counts: np.ndarray) -> dict[str, bool]:
    """Which tests reject a constant rate at a level of 5%; and whether the picture does, at a level of our eyes."""
    t = poisson_tests(counts)
    found = {name: abs(t[f"{name}_z"]) > 1.96 for name in ("dispersion", "trend", "halves")}
    return found | {"uniform": t["uniform_p"] < 0.05, "qq": t["qq_r2"] < 0.94}


def rates(draw_counts) -> dict[str, int]:
    """How many of 200 seeds every test rejects."""
    found = [rejected(draw_counts(np.random.default_rng(seed))) for seed in range(SEEDS)]
    return {name: sum(result[name] for result in found) for name in found[0]}


def test_a_constant_rate_is_rejected_as_often_as_the_level_says():
    """Of 200 seeds 10 are expected at 5%: 99.9% of all samples lie within 2 .. 21."""
    found = rates(constant)
    assert found.pop("qq") == 0
    assert all(2 <= count <= 21 for count in found.values()), found


@pytest.mark.parametrize("what", ALTERNATIVES)
def test_each_alternative_is_seen_by_its_tests_alone(what):
    draw_counts, named = ALTERNATIVES[what]
    found = rates(draw_counts)
    assert found.pop("qq") == 0
    for name, count in found.items():
        assert count == SEEDS if name in named else count <= 21, (name, count)


def test_the_trend_is_that_of_a_general_linear_model():
    """By maximizing the likelihood without derivatives."""
    from scipy.optimize import minimize

    counts = np.random.default_rng(0).poisson(3 * np.exp(0.7 * (X[::50] - 0.5)))
    x = (np.arange(len(counts)) + 0.5) / len(counts) - 0.5

    def minus_log_likelihood(w):
        return -stats.poisson.logpmf(counts, np.exp(w[0] + w[1] * x)).sum()

    best = minimize(minus_log_likelihood, [0, 0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10})
    slope, error = poisson_trend(counts)
    assert slope == pytest.approx(best.x[1], abs=1e-5)
    below, middle, above = (minus_log_likelihood([best.x[0], slope + d * error]) for d in (-1, 0, 1))
    assert (below - middle, above - middle) == pytest.approx((0.5, 0.5), rel=0.05)  # one error: half a nat


def test_quantiles_and_intervals_are_those_of_scipy():
    for mean in (0.3, 6.5, 400):
        assert (poisson_quantiles(mean, 999) == stats.poisson.ppf((np.arange(999) + 0.5) / 999, mean)).all()
    for events, count in ((0, 10), (3, 10), (10, 10), (1, 1000)):
        theirs = stats.binomtest(events, count).proportion_ci(method="wilson")
        assert wilson(events, count) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_too_few_events_say_nothing():
    assert all(np.isnan(value) for value in poisson_tests(np.array([1, 0, 2])).values())
    assert all(np.isnan(value) for value in poisson_tests(np.zeros(100, int)).values())
    assert np.isnan(wilson(0, 0)).all()
    assert np.isnan(rank_correlation(np.arange(9), np.ones(9))).all()


def test_counts_of_slices():
    events = np.arange(11) % 2 == 0
    assert count_events(events, 3).tolist() == [2, 1, 2]


def test_difference_in_differences_finds_a_planted_effect():
    """Both groups drift by 1; the treatment adds 0.3. The interval of two errors covers 0.3 in 95% of the seeds."""
    covered = 0
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        effect, error = difference_in_differences(draw.normal(1.3, 1, 300), draw.normal(1.0, 2, 500))
        covered += abs(effect - 0.3) < 1.96 * error
    assert 180 <= covered <= 199


def test_a_prediction():
    predicted, true = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    assert prediction(predicted, true) == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5})
    assert np.isnan(prediction(np.zeros(3, bool), np.zeros(3, bool))["f1"])


def test_intervals_and_changes():
    values = np.random.default_rng(0).normal(0.3, 2, 400)
    low, high = bootstrap(values, seed=0)
    error = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.03)
    before, after = np.array([1] * 10 + [0] * 12, bool), np.array([1] * 9 + [0] * 3 + [1] * 10, bool)
    assert mcnemar(before, after) == pytest.approx(2 * 12 / 2**11)  # 10 gained, 1 lost
    assert mcnemar(before, before) == 1
