"""Numbers from predictions. Pure tensors: no network, no file.

Every metric takes optional weights (B, N), one row a replicate, and returns (B,). The bootstrap is then no loop: a
resample of the groups is a row of counts, and 2,000 replicates are a few matrix operations.

    report = with_intervals(probabilities, labels, groups, threshold=0.3)
    report["auc"]  ->  {"value": 0.961, "low": 0.941, "high": 0.978}
"""

import math

import torch

BINS = 10  # of the calibration error and its plot
REPLICATES = 2000  # of the bootstrap
WEIGHTS_AT_ONCE = 10_000_000  # of replicates x images: what bounds the memory on large test splits


def auc(scores, labels, weights=None):
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting one half.

    scores (N,), labels (N,) 0 or 1, weights (B, N) or None. Returns (B,), NaN where a class is missing.
    (Hanley & McNeil 1982.) Costs one sort, not a pass over the pairs."""
    labels = labels.double()
    weights = torch.ones(1, len(labels), dtype=torch.double) if weights is None else weights.double()
    values, rank = torch.unique(scores, return_inverse=True)  # sorted; tied scores share a rank
    positive = torch.zeros(len(weights), len(values), dtype=torch.double).index_add_(1, rank, weights * labels)
    negative = torch.zeros(len(weights), len(values), dtype=torch.double).index_add_(1, rank, weights * (1 - labels))
    below = negative.cumsum(1) - negative / 2
    return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def roc_curve(scores, labels):
    """(false positive rate, sensitivity), each (M,), from (0, 0) to (1, 1), one point a distinct score."""
    order = scores.argsort(descending=True)
    scores, labels = scores[order], labels[order].double()
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])  # of equal scores only the last is a point
    zero = torch.zeros(1, dtype=torch.double)
    tpr, fpr = labels.cumsum(0)[last], (1 - labels).cumsum(0)[last]
    return torch.cat([zero, fpr / fpr[-1]]), torch.cat([zero, tpr / tpr[-1]])


def threshold_for_sensitivity(scores, labels, target):
    """The largest threshold t at which `score >= t` finds at least `target` of the positives."""
    positive = scores[labels == 1].sort(descending=True).values
    return float(positive[max(0, math.ceil(target * len(positive) - 1e-9) - 1)])


def threshold_for_balance(scores, labels):
    """The threshold t at which `score >= t` has the best mean of sensitivity and specificity (Youden 1950), half way to
    the next lower score, so that it is not one image's own."""
    values = torch.unique(scores)
    fpr, tpr = roc_curve(scores, labels)
    best = int((tpr - fpr)[1:].argmax()) + 1  # as many scores lie at or above the threshold
    values = values.flip(0)
    return float(values[best - 1] + values[min(best, len(values) - 1)]) / 2


def confusion(predicted, labels, classes):
    """(K, K) counts: row = truth, column = prediction."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def decide(probabilities, threshold):
    """Predicted class (N,). Two: p(positive) >= threshold (a number, or one an image); K: the likeliest."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).long()
    return probabilities.argmax(1)


def calibration_bins(probabilities, labels):
    """What was predicted, what came true, and the bin of each image: (N,) each. Two classes: of the positive class;
    K classes: of the likeliest."""
    if probabilities.shape[1] == 2:
        predicted, true = probabilities[:, 1], labels == 1
    else:
        predicted, winner = probabilities.max(1)
        true = winner == labels
    return predicted.double(), true.double(), (predicted * BINS).long().clamp(max=BINS - 1)


def evaluate(probabilities, labels, threshold=0.5, weights=None):
    """All metrics of a classification: {name: (B,)}. probabilities (N, K), labels (N,), weights (B, N) or None.

    With two classes sensitivity and specificity are those of the positive class; with K they, F1 and the AUC are
    macro averages of each class against the rest. ECE is the expected calibration error (Naeini et al. 2015)."""
    k = probabilities.shape[1]
    weights = torch.ones(1, len(labels), dtype=torch.double) if weights is None else weights.double()
    predicted = decide(probabilities, threshold)
    one_hot = torch.nn.functional.one_hot
    cells = (weights @ one_hot(labels * k + predicted, k * k).double()).reshape(-1, k, k)  # weighted confusion matrices
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
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return inter / (area - inter).clamp(min=1e-12)


def localisation(iou, weights=None):
    """Mean IoU, and the share of lesions found with IoU >= 0.5: {name: (B,)}. iou (N,), NaN where no box is known."""
    known = iou.isfinite()
    weights = torch.ones(1, len(iou), dtype=torch.double) if weights is None else weights.double()
    weights, iou = weights[:, known], iou[known].double()
    total = weights.sum(1)
    return {"iou": (weights @ iou) / total, "iou_at_50": (weights @ (iou >= 0.5).double()) / total}


def bootstrap_weights(groups, replicates=REPLICATES, generator=None):
    """(B, N) how often each image is drawn when whole groups are drawn with replacement (Efron & Tibshirani 1993)."""
    _, groups = torch.unique(groups, return_inverse=True)
    count = int(groups.max()) + 1
    drawn = torch.randint(count, (replicates, count), generator=generator or torch.Generator().manual_seed(0))
    return torch.zeros(replicates, count).scatter_add_(1, drawn, torch.ones(replicates, count))[:, groups]


def measure(probabilities, labels, threshold=0.5, iou=None, weights=None):
    """All metrics of a classification, a localisation, or both: {name: (B,)}. probabilities or iou may be None."""
    values = {} if probabilities is None else evaluate(probabilities, labels, threshold, weights)
    return values if iou is None else values | localisation(iou, weights)


def with_intervals(probabilities, labels, groups, threshold=0.5, iou=None):
    """{metric: {"value", "low", "high"}} with 95 % percentile intervals, resampled by group.

    probabilities (N, K) and labels (N,), or None, None for a detector alone; iou (N,) or None."""
    return resample(lambda weights: measure(probabilities, labels, threshold, iou, weights), groups)


def change_with_intervals(before, after, labels, groups):
    """{metric: {"before", "after", "value", "low", "high"}} of two models on the same images. value: after minus before,
    and its interval is that of the pairs, which is narrower than the two intervals let expect: both models meet the
    same easy and hard images in a resample.

    before, after: (probabilities (N, K) or None, threshold, iou (N,) or None) each."""

    def both(weights):
        return (measure(p, labels, threshold, iou, weights) for p, threshold, iou in (before, after))

    def change(weights):
        old, new = both(weights)
        return {name: new[name] - old[name] for name in old if name in new}

    report, (old, new) = resample(change, groups), both(None)
    return {name: {"before": float(old[name]), "after": float(new[name]), **m} for name, m in report.items()}


def resample(measure, groups):
    """{metric: {"value", "low", "high"}} of measure(weights) -> {metric: (B,)}, weights (B, N) or None for the point."""
    generator, most = torch.Generator().manual_seed(0), max(1, WEIGHTS_AT_ONCE // len(groups))
    counts = [min(most, REPLICATES - done) for done in range(0, REPLICATES, most)]
    point, parts = measure(None), [measure(bootstrap_weights(groups, n, generator)) for n in counts]
    report = {}
    for name, value in point.items():
        draws = torch.cat([part[name] for part in parts])
        draws = draws[draws.isfinite()]  # a resample without positives has no AUC
        low, high = (
            torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
            if len(draws)
            else (math.nan, math.nan)
        )
        report[name] = {"value": float(value), "low": low, "high": high}
    return report


def fit_temperature(probabilities, labels):
    """The temperature T in [0.25, 8] at which p^(1/T) has the least negative log-likelihood (Guo et al. 2017).

    probabilities (N, K), labels (N,). A grid, then finer ones around its best: nothing that could diverge."""
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
