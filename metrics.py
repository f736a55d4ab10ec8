"""Numbers from predictions: AUC, sensitivity, calibration error, IoU, with 95 % intervals that are true at the edge.

Tensors, numpy arrays and lists are taken; no network, no file. Images of one patient can share a group.

    import metrics
    labels, groups = [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 2, 3, 4, 5, 5, 6]
    scores = [0.1, 0.2, 0.4, 0.3, 0.6, 0.8, 0.9, 0.7]
    report = metrics.with_intervals([[1 - p, p] for p in scores], labels, groups, threshold=0.5)
    print(metrics.interval_text(report["sensitivity"]))  # 1.000 [0.255, 1.000]

Every metric takes optional weights (B, N), one row a replicate, and returns (B,). The bootstrap is then no loop: a
resample of the groups is a row of counts, and 2,000 replicates are a few matrix operations."""

import math

import torch
from torch.nn.functional import one_hot, pad

BINS = 10  # of the calibration error and its plot
REPLICATES = 2000  # of the bootstrap
WEIGHTS_AT_ONCE = 10_000_000  # of replicates x images: what bounds the memory on large test splits
FEWEST, ENOUGH = 3, 10  # groups that an interval needs; and, effectively, on each side of a value for its percentiles


def numbers(values, shape, name):
    """As a tensor on the CPU. ValueError unless its shape is `shape`, where None is any size. Lists become float64."""
    kind = torch.double if isinstance(values, (list, tuple)) else None
    values = torch.as_tensor(values, dtype=kind).detach().cpu()
    if values.ndim != len(shape) or any(
        want not in (None, size) for want, size in zip(shape, values.shape, strict=True)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} of shape {tuple(values.shape)}: must be ({wanted})")
    if values.isnan().any() and name != "iou":
        raise ValueError(f"{name}: holds NaN")
    return values


def class_numbers(labels, classes, count=None, name="labels"):
    """As an int64 tensor (N,). ValueError for numbers outside 0 ... classes - 1."""
    labels = numbers(labels, (count,), name)
    if ((labels < 0) | (labels >= classes) | (labels != labels.long())).any():
        raise ValueError(f"{name}: must be whole numbers from 0 to {classes - 1}; leave out what has no label")
    return labels.long()


def answers(probabilities, labels):
    """Both as tensors, (N, K) and (N,), checked."""
    probabilities = numbers(probabilities, (None, None), "probabilities")
    if probabilities.shape[1] < 2:
        raise ValueError("probabilities: must be (N, K), a column a class; of one column p make [1 - p, p]")
    return probabilities, class_numbers(labels, probabilities.shape[1], len(probabilities))


def group_index(groups, count):
    """(N,) from 0 on. groups: N numbers or names, or None: each image its own."""
    if groups is None:
        return torch.arange(count)
    groups = groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} images: must be as many")
    place = {group: i for i, group in enumerate(sorted(set(groups)))}
    return torch.tensor([place[group] for group in groups], dtype=torch.long)


def ones_or(weights, count):
    """Weights (B, N) in float64; None: of one replicate in which every image counts once."""
    weights = torch.ones(1, count) if weights is None else torch.as_tensor(weights)
    if weights.ndim != 2 or weights.shape[1] != count:
        raise ValueError(f"weights of shape {tuple(weights.shape)}: must be (B, {count}), a row a replicate")
    return weights.double()


def auc(scores, labels, weights=None):
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting one half.

    scores (N,), labels (N,) 0 or 1, weights (B, N) or None. Returns (B,), NaN where a class is missing.
    (Hanley & McNeil 1982.) Costs one sort, not a pass over the pairs."""
    scores = numbers(scores, (None,), "scores")
    labels, weights = class_numbers(labels, 2, len(scores)).double(), ones_or(weights, len(scores))
    values, rank = torch.unique(scores, return_inverse=True)  # sorted; tied scores share a rank
    positive = torch.zeros(len(weights), len(values), dtype=torch.double).index_add_(1, rank, weights * labels)
    negative = torch.zeros(len(weights), len(values), dtype=torch.double).index_add_(1, rank, weights * (1 - labels))
    below = negative.cumsum(1) - negative / 2
    return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def roc_curve(scores, labels):
    """(false positive rate, sensitivity), each (M,), from (0, 0) to (1, 1), one point a distinct score. NaN for the
    rate of a missing class. scores (N,), labels (N,) 0 or 1."""
    scores = numbers(scores, (None,), "scores")
    labels = class_numbers(labels, 2, len(scores))
    order = scores.argsort(descending=True)
    scores, labels = scores[order], labels[order].double()
    last = pad(
        scores[1:] != scores[:-1], (0, min(1, len(scores))), value=True
    )  # of equal scores only the last is a point
    rates = (side.cumsum(0)[last] / side.sum() for side in (1 - labels, labels))
    return tuple(pad(rate, (1, 0)) for rate in rates)


def threshold_for_sensitivity(scores, labels, target):
    """The largest threshold t at which `score >= t` finds at least `target` (in [0, 1]) of the positives. NaN without any.

    scores (N,), labels (N,) 0 or 1."""
    scores = numbers(scores, (None,), "scores")
    positive = scores[class_numbers(labels, 2, len(scores)) == 1].sort(descending=True).values
    if not 0 <= target <= 1:
        raise ValueError(f"target {target}: must lie in [0, 1]")
    return float(positive[max(0, math.ceil(target * len(positive) - 1e-9) - 1)]) if len(positive) else math.nan


def threshold_for_balance(scores, labels):
    """The threshold t at which `score >= t` has the best mean of sensitivity and specificity (Youden 1950), half way to
    the next lower score, so that it is not one image's own. NaN where a class is missing. scores (N,), labels (N,)."""
    fpr, tpr = roc_curve(scores, labels)
    if len(fpr) < 2 or (tpr - fpr).isnan().any():
        return math.nan
    values = torch.unique(numbers(scores, (None,), "scores")).flip(0)
    best = int((tpr - fpr)[1:].argmax()) + 1  # as many scores lie at or above the threshold
    return float(values[best - 1] + values[min(best, len(values) - 1)]) / 2


def confusion(predicted, labels, classes):
    """(K, K) counts: row = truth, column = prediction. predicted, labels: (N,) in 0 ... K - 1."""
    labels = class_numbers(labels, classes)
    predicted = class_numbers(predicted, classes, len(labels), "predicted")
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def decide(probabilities, threshold):
    """Predicted class (N,) of probabilities (N, K). Two: p(positive) >= threshold (a number, or one an image); K: the
    likeliest."""
    probabilities = numbers(probabilities, (None, None), "probabilities")
    if probabilities.shape[1] != 2:
        return probabilities.argmax(1)
    if not isinstance(threshold, (int, float)):
        threshold = numbers(threshold, (len(probabilities),) * min(1, getattr(threshold, "ndim", 1)), "threshold")
    return (probabilities[:, 1] >= threshold).long()


def calibration_bins(probabilities, labels):
    """What was predicted, what came true, and the bin of each image: (N,) each. Two classes: of the positive class;
    K classes: of the likeliest."""
    probabilities, labels = answers(probabilities, labels)
    if probabilities.shape[1] == 2:
        predicted, true = probabilities[:, 1], labels == 1
    else:
        predicted, winner = probabilities.max(1)
        true = winner == labels
    return predicted.double(), true.double(), (predicted * BINS).long().clamp(0, BINS - 1)


def evaluate(probabilities, labels, threshold=0.5, weights=None):
    """All metrics of a classification: {name: (B,)}. probabilities (N, K), labels (N,), weights (B, N) or None.

    With two classes sensitivity and specificity are those of the positive class; with K they, F1 and the AUC are
    macro averages of each class against the rest. ECE is the expected calibration error (Naeini et al. 2015)."""
    probabilities, labels = answers(probabilities, labels)
    k, weights = probabilities.shape[1], ones_or(weights, len(labels))
    columns = one_hot(labels * k + decide(probabilities, threshold), k * k).double()
    cells = (weights @ columns).reshape(-1, k, k)  # weighted confusion matrices
    hit = cells.diagonal(dim1=1, dim2=2)
    truth, said, total = cells.sum(2), cells.sum(1), cells.sum((1, 2))[:, None]
    recall = hit / truth
    specificity = (total - truth - said + hit) / (total - truth)
    f1 = 2 * hit / (truth + said)
    kept = slice(1, 2) if k == 2 else slice(None)
    areas = torch.stack([auc(probabilities[:, c], labels == c, weights) for c in range(k)[kept]], 1)
    p, y, bins = calibration_bins(probabilities, labels)
    gap = (weights * (y - p)) @ one_hot(bins, BINS).double()
    return {
        "auc": areas.mean(1),
        "accuracy": hit.sum(1) / total[:, 0],
        "sensitivity": recall[:, kept].mean(1),
        "specificity": specificity[:, kept].mean(1),
        "balanced_accuracy": recall.mean(1),
        "f1": f1[:, kept].mean(1),
        "ece": gap.abs().sum(1) / total[:, 0],
    }


def paired_iou(a, b):
    """Intersection over union (N,) of box i of a with box i of b, both (N, 4) as x_min, y_min, x_max, y_max."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.ndim != 2 or a.shape[1] != 4 or a.shape != b.shape:
        raise ValueError(f"boxes of shapes {tuple(a.shape)} and {tuple(b.shape)}: must both be (N, 4)")
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return inter / (area - inter).clamp(min=1e-12)


def localisation(iou, weights=None):
    """Mean IoU, and the share of lesions found with IoU >= 0.5: {name: (B,)}. iou (N,), NaN where no box is known."""
    iou = numbers(iou, (None,), "iou")
    known, weights = iou.isfinite(), ones_or(weights, len(iou))
    weights, iou = weights[:, known], iou[known].double()
    total = weights.sum(1)
    return {"iou": (weights @ iou) / total, "iou_at_50": (weights @ (iou >= 0.5).double()) / total}


def bootstrap_weights(groups, replicates=REPLICATES, generator=None):
    """(B, N) how often each image is drawn when whole groups (N,) are drawn with replacement (Efron & Tibshirani 1993)."""
    groups = group_index(groups, len(groups))
    count = int(groups.max()) + 1
    drawn = torch.randint(count, (replicates, count), generator=generator or torch.Generator().manual_seed(0))
    return torch.zeros(replicates, count).scatter_add_(1, drawn, torch.ones(replicates, count))[:, groups]


def measure(probabilities, labels, threshold=0.5, iou=None, weights=None):
    """All metrics of a classification, a localisation, or both: {name: (B,)}. probabilities or iou may be None."""
    values = {} if probabilities is None else evaluate(probabilities, labels, threshold, weights)
    return values if iou is None else values | localisation(iou, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def beta_cdf(x, a, b):
    """P(X <= x) of a Beta(a, b): the continued fraction DLMF 8.17.22, from its far end."""
    if x > (a + 1) / (a + b + 2):  # converges fast on the near side only
        return 1 - beta_cdf(1 - x, b, a)
    fraction = 1.0
    for m in range(20 + 4 * int(math.sqrt(a + b)), 0, -1):
        fraction = 1 + m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) / fraction
        fraction = 1 - (a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1)) / fraction
    logs = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(logs) / a / fraction


def share_interval(value, n, level=0.95):
    """(low, high) of a share `value` of n (Clopper & Pearson 1934). n need not be whole: the effective number of
    grouped images (Korn & Graubard 1998). 34 of 34: [0.897, 1]."""

    def quantile(p, a, b):
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)
        return (low + high) / 2

    hits, misses, tail = value * n, (1 - value) * n, (1 - level) / 2
    low = quantile(tail, hits, misses + 1) if hits > 1e-9 else 0.0
    return low, quantile(1 - tail, hits + 1, misses) if misses > 1e-9 else 1.0


def evidence(labels, classes, groups, iou=None):
    """{metric: the number of groups that tell about it}: for sensitivity those with positives; for the AUC those with
    positives or those without, the fewer (Birnbaum & Klose 1957); for a macro mean those of the rarest class."""

    def count(rows):
        return len(groups[rows].unique())

    found = {}
    if labels is not None:
        kept = range(classes)[classes == 2 :]
        of, rest = ([count((labels == c) == side) for c in range(classes)] for side in (True, False))
        found = {"accuracy": count(labels >= 0), "balanced_accuracy": min(of)}
        found |= {"auc": min(min(of[c], rest[c]) for c in kept), "specificity": min(rest[c] for c in kept)}
        found |= dict.fromkeys(("sensitivity", "f1"), min(of[c] for c in kept))
    return found if iou is None else found | dict.fromkeys(("iou", "iou_at_50"), count(iou.isfinite()))


def with_intervals(probabilities, labels, groups=None, threshold=0.5, iou=None):
    """{metric: {"value", "low", "high"}} with 95 % intervals by group; NaN where fewer than 3 groups tell about it.

    probabilities (N, K) and labels (N,), or None, None for a detector alone; groups N numbers or names, or None: each
    image its own; iou (N,) or None. The percentiles of 2,000 resamples, except near the edge, where resamples of what
    was seen can't know what was not: 34 of 34 would have [1, 1]. A value v with the variance s of its resamples is as
    sure as a share of n = v (1 - v) / s images; where it has fewer than 10 of them on one side, it gets the interval of
    that share, which holds its level at any v. At the edge itself n is the number of groups that tell about it."""
    if labels is not None:
        probabilities, labels = answers(probabilities, labels)
    iou = None if iou is None else numbers(iou, (None,), "iou")
    groups = group_index(groups, len(labels if iou is None else iou))
    known = evidence(labels, 0 if labels is None else probabilities.shape[1], groups, iou)
    return resample(lambda weights: measure(probabilities, labels, threshold, iou, weights), groups, known)


def change_with_intervals(before, after, labels, groups=None):
    """{metric: {"before", "after", "value", "low", "high"}} of two models on the same images. value: after minus before,
    and its interval is that of the pairs, which is narrower than the two intervals let expect: both models meet the
    same easy and hard images in a resample. Where so few groups differ that a resample can miss them all, it is wider by
    what n groups without a difference leave open, 1 - 0.025^(1/n).

    before, after: (probabilities (N, K) or None, threshold, iou (N,) or None) each."""

    def both(weights):
        return (measure(p, labels, threshold, iou, weights) for p, threshold, iou in (before, after))

    def change(weights):
        old, new = both(weights)
        return {name: new[name] - old[name] for name in old if name in new}

    p, _, iou = after
    iou = None if iou is None else numbers(iou, (None,), "iou")
    groups = group_index(groups, len(labels if iou is None else iou))
    known = (None, 0) if p is None else (class_numbers(labels, len(p[0])), len(p[0]))
    report, (old, new) = resample(change, groups, evidence(*known, groups, iou), change=True), both(None)
    return {name: {"before": float(old[name]), "after": float(new[name]), **m} for name, m in report.items()}


def resample(measure, groups, evidence=None, change=False):
    """{metric: {"value", "low", "high"}} of measure(weights) -> {metric: (B,)}, weights (B, N) or None for the point.

    evidence: {metric: number of groups}, of metrics in [0, 1], see with_intervals. change: of differences of such."""
    generator, most = torch.Generator().manual_seed(0), max(1, WEIGHTS_AT_ONCE // max(1, len(groups)))
    counts = [min(most, REPLICATES - done) for done in range(0, REPLICATES, most)]
    point, few = measure(None), len(set(group_index(groups, len(groups)).tolist())) < FEWEST
    parts = [] if few else [measure(bootstrap_weights(groups, n, generator)) for n in counts]
    report = {}
    for name, value in point.items():
        draws = torch.cat([part[name] for part in parts]).double() if parts else torch.zeros(0)
        n = (evidence or {}).get(name)  # None: no share, or none known: plain percentiles, as for the ECE
        report[name] = dict(
            zip(("value", "low", "high"), (float(value), *bounds(float(value), draws, n, change)), strict=True)
        )
    return report


def bounds(value, draws, n, change):
    """(low, high) of a value with its resamples (B,), see with_intervals."""
    draws = draws[draws.isfinite()]  # a resample without positives has no AUC
    if math.isnan(value) or not len(draws) or (n is not None and n < FEWEST):
        return math.nan, math.nan
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    if n is not None and change and (draws == 0).any():
        open_ = 1 - 0.025 ** (1 / n)
        low, high = max(-1.0, value - math.hypot(value - low, open_)), min(1.0, value + math.hypot(high - value, open_))
    elif n is not None and not change:
        spread = float(draws.var(correction=0))
        n = value * (1 - value) / spread if spread > 1e-12 else n
        if min(value, 1 - value) * n < ENOUGH:
            low, high = share_interval(value, n)
    return min(low, value), max(high, value)


def interval_text(m, form=".3f"):
    """As in "0.941 [0.893, 0.971]", or "0.941 (too few)" where an end is NaN or None."""
    value, low, high = (math.nan if m[k] is None else m[k] for k in ("value", "low", "high"))
    known = math.isfinite(low) and math.isfinite(high)
    return f"{value:{form}} " + (f"[{low:{form}}, {high:{form}}]" if known else "(too few)")


def fit_temperature(probabilities, labels):
    """The temperature T in [0.25, 8] at which p^(1/T) has the least negative log-likelihood (Guo et al. 2017).

    probabilities (N, K), labels (N,). A grid, then finer ones around its best: nothing that could diverge."""
    probabilities, labels = answers(probabilities, labels)
    if not len(labels):
        return math.nan
    logs = (probabilities.double() + 1e-12).log()
    low, high = math.log(0.25), math.log(8)
    for _ in range(3):
        grid = torch.linspace(low, high, 41, dtype=torch.double)
        scaled = (logs[None] / grid.exp()[:, None, None]).log_softmax(2)
        nll = -scaled[:, torch.arange(len(labels)), labels].mean(1)
        best, step = float(grid[nll.argmin()]), (high - low) / 40
        low, high = max(low, best - step), min(high, best + step)
    return math.exp(best)


def mean_interval(values, level=0.95):
    """Mean of R repeats, its Student t interval, and the two-sided p of "the mean is 0": four numbers.

    values (R,). For paired differences this is the paired t test (Student 1908). NaN for the rest when R is 1.
    With t = sqrt(R - 1) tan(a) the density is cos(a)^(R - 2), which a sum over a fine grid integrates."""
    values = torch.as_tensor(values, dtype=torch.double)
    mean, free = float(values.mean()), len(values) - 1
    if free < 1:
        return mean, math.nan, math.nan, math.nan
    error = float(values.std()) / math.sqrt(len(values))
    step = math.pi / 2 / 200_000
    angle = (torch.arange(200_000, dtype=torch.double) + 0.5) * step
    below = torch.cos(angle).pow(free - 1).cumsum(0)
    below = below / below[-1]  # share of |t| below each angle's
    half = math.sqrt(free) * math.tan(float(angle[torch.searchsorted(below, level)])) * error
    if error == 0:
        return mean, mean, mean, float(mean == 0)
    reached = math.atan(abs(mean) / error / math.sqrt(free))
    p = 1 - float(below[min(int(reached / step), len(below) - 1)])
    return mean, mean - half, mean + half, p
