"""Statistics of events in time, and of what a run learned from what it has just seen.

The events are memorized rows. They are counted in slices of consecutive rows: counts [slices]. Were every row as likely
to be memorized, whatever its place in training, the counts would be Poisson distributed, and alike from first to last.

    dispersion   the variance of the counts is their mean?            no: events come in clusters, or the rate varies
    trend        the rate grows or falls?                             Poisson regression on the position in training
    uniform      the events lie evenly in time?                       Kolmogorov and Smirnov's distance from it
    halves       the first half of training has as many as the second?
    qq_r2        the picture of the paper (arXiv:2304.01373, figure 3) as a number

The Q-Q picture sorts the slices, so it cannot see any change over time. Clusters make every count vary more. So trend,
uniform and halves are scaled by the dispersion, where it is above 1: none of them takes a cluster for a change.
"""

import numpy as np
from scipy import stats

FEWEST = 8  # slices, and events, below which a test says nothing


def count_events(events: np.ndarray, width: int) -> np.ndarray:
    """The number of events in every slice of `width` rows, of events [rows], bool; a last slice that is not whole is
    left out."""
    whole = len(events) // width * width
    return events[:whole].reshape(-1, width).sum(1)


def poisson_tests(counts: np.ndarray) -> dict[str, float]:
    """All tests of counts [slices]. *_z are standard normal for a constant rate, *_p are p-values. NaN for too few."""
    slices, events = len(counts), int(counts.sum())
    names = (
        "dispersion",
        "dispersion_z",
        "trend",
        "trend_low",
        "trend_high",
        "trend_z",
        "uniform_p",
        "halves_z",
        "qq_r2",
    )
    if slices < FEWEST or events < FEWEST:
        return dict.fromkeys(names, float("nan"))
    dispersion = float(counts.var(ddof=1) / counts.mean())
    scale = np.sqrt(max(dispersion, 1.0))
    slope, error = poisson_trend(counts)
    cumulated = np.concatenate([[0], np.cumsum(counts)]) / events
    distance = abs(cumulated - np.linspace(0, 1, slices + 1)).max()
    half = slices // 2
    first, second = counts[:half].sum(), counts[slices - half :].sum()
    values = (
        dispersion,
        (dispersion - 1) / np.sqrt(2 / (slices - 1)),
        slope,
        slope - 1.96 * error * scale,
        slope + 1.96 * error * scale,
        slope / (error * scale),
        stats.kstwobign.sf(distance * np.sqrt(events) / scale),
        (second - first) / (np.sqrt(first + second) * scale),
        correlation(np.sort(counts), poisson_quantiles(counts.mean(), slices)) ** 2,
    )
    return dict(zip(names, map(float, values), strict=True))


def poisson_trend(counts: np.ndarray) -> tuple[float, float]:
    """Poisson regression: log rate = a + b x, where x goes from -1/2 to 1/2 over training. Returns b, its error.

    exp(b) is the rate at the end of training over that at its beginning.
    """
    x = (np.arange(len(counts)) + 0.5) / len(counts) - 0.5
    design = np.stack([np.ones_like(x), x])  # [2, slices]
    weights = np.array([np.log(counts.mean()), 0.0])
    for _ in range(25):  # Newton; it converges in a few steps
        rate = np.exp(weights @ design)
        information = (design * rate) @ design.T
        step = np.linalg.solve(information, design @ (counts - rate))
        weights += step
        if abs(step).max() < 1e-10:
            break
    return float(weights[1]), float(np.sqrt(np.linalg.inv(information)[1, 1]))


def poisson_quantiles(mean: float, count: int) -> np.ndarray:
    """The quantiles (i + 1/2) / count of the Poisson distribution: int64 [count]."""
    most = int(stats.poisson.isf(1e-12, mean)) + 1
    return np.searchsorted(stats.poisson.cdf(np.arange(most), mean), (np.arange(count) + 0.5) / count)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return np.corrcoef(x, y)[0, 1] if np.ptp(x) and np.ptp(y) else float("nan")


def wilson(events: float, count: float) -> tuple[float, float]:
    """The 95% interval of a rate, after Wilson (1927)."""
    if not count:
        return float("nan"), float("nan")
    z2, rate = 1.96**2, events / count
    middle, width = rate + z2 / (2 * count), 1.96 * np.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    return float(max(middle - width, 0) / (1 + z2 / count)), float(
        min(middle + width, 1 + z2 / count) / (1 + z2 / count)
    )


def difference_in_differences(treated: np.ndarray, controls: np.ndarray) -> tuple[float, float]:
    """The mean change of the treated minus that of the controls, and its error.

    If both would have changed alike without the treatment, this is its effect on the treated. Lesci et al. 2024
    (arXiv:2406.04327) measure memorization so: the treated have just been trained on, the controls not yet.
    """
    variance = sum(x.var(ddof=1) / len(x) for x in (treated, controls))
    return float(treated.mean() - controls.mean()), float(np.sqrt(variance))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation and its p-value; NaN for less than FEWEST pairs, or if one of them is constant."""
    if len(x) < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan"), float("nan")
    found = stats.spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def prediction(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How well one set of memorized rows [rows] predicts another. NaN where a ratio has no denominator."""
    both, named, there = int((predicted & true).sum()), int(predicted.sum()), int(true.sum())

    def ratio(a: int, b: int) -> float:
        return a / b if b else float("nan")

    return {"precision": ratio(both, named), "recall": ratio(both, there), "f1": ratio(2 * both, named + there)}


def bootstrap(values: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float]:
    """The 95% interval of the mean of values [items], by drawing items with replacement (percentiles)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """The exact p-value of McNemar's test: are as many answers [items], bool, gained as lost?"""
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
