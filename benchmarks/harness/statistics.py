"""Intervals: of medians, of means (Student), of shares (Fieller).

scipy has the first two; all are of 95 %. It is imported where it is used: the
contenders' environments need not have it.
"""

import numpy as np

LEVEL = 0.95


def ratio(seconds, name, base):
    """How many times as long as `base` it takes: the median of paired ratios.

    Steps of one round stand beside each other in time, so a machine that slows
    down slows both. The interval is that of the median by order statistics; it
    assumes nothing of how the ratios are distributed.

    Args:
        seconds: `{name: array of length rounds}`, from `contest.measure`.
        name: The contender.
        base: The one it is compared with.

    Returns:
        `(median, low, high)`.
    """
    from scipy import stats

    ratios = np.asarray(seconds[name]) / np.asarray(seconds[base])
    middle = float(np.median(ratios))
    test = stats.quantile_test(ratios, q=middle, p=0.5)
    low, high = test.confidence_interval(LEVEL)
    return middle, float(low), float(high)


def mean_interval(values):
    """Student's interval of a mean: `(mean, low, high)`.

    One value has no interval: low and high are NaN.
    """
    from scipy import stats

    values = np.asarray(values, "float64")
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    if np.ptp(values) == 0:
        return mean, mean, mean
    low, high = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return mean, float(low), float(high)


def share_interval(x, y):
    """Fieller's interval of mean(x) / mean(y) of pairs.

    All r for which mean(x - r y) cannot be told from zero: with c = t²/n,

        (x̄ - r ȳ)² ≤ c (s_xx - 2 r s_xy + r² s_yy)

    Returns:
        `(share, low, high)`; the bounds are infinite where y's mean cannot be
        told from zero.
    """
    from scipy import stats

    (s_xx, s_xy), (_, s_yy) = np.cov(x, y)
    c = stats.t.ppf((1 + LEVEL) / 2, len(x) - 1) ** 2 / len(x)
    x, y = np.mean(x), np.mean(y)
    a, b = y**2 - c * s_yy, x * y - c * s_xy
    root = b**2 - a * (x**2 - c * s_xx)
    if a <= 0 or root < 0:
        return float(x / y), -np.inf, np.inf
    return float(x / y), (b - root**0.5) / a, (b + root**0.5) / a
