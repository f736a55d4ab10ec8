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
FEWEST, ENOUGH = 3, 10  # groups: with fewer nothing is said; on each side of the value for the percentiles, see bounds


def numbers(values, shape, name):
    """As a tensor on the CPU. ValueError unless its shape is `shape`, where None is any size. Lists become float64."""
    kind = torch.double if isinstance(values, (list, tuple)) else None
    values = torch.as_tensor(values, dtype=kind).detach().cpu()
    if values.ndim != len(shape) or any(want not in (None, size) for want, size in zip(shape, values.shape, strict=True)):
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


def weighting(weights, index, count):
    """Weights (B, G) and the column (N,) of each of `count` images in them. None: of one; no index: a column an image."""
    if weights is None:
        weights, index = torch.ones(1, count, dtype=torch.double), None
    if index is not None:
        return weights, index
    weights = torch.as_tensor(weights).double()
    if weights.ndim != 2 or weights.shape[1] != count:
        raise ValueError(f"weights of shape {tuple(weights.shape)}: must be (B, {count}), a row a replicate")
    return weights, torch.arange(count)


def totals(weights, index, columns):
    """(B, C) weighted sums of columns (N, C), which are summed within the groups first: with few of them less work."""
    table = torch.zeros(weights.shape[1], columns.shape[1], dtype=torch.double).index_add_(0, index, columns)
    return weights @ table.to(weights.dtype)


def auc(scores, labels, weights=None, index=None):
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting one half.

    scores (N,), labels (N,) 0 or 1, weights (B, N) or None; or weights (B, G) of groups, and the group (N,) of each
    image in `index`. Returns (B,), NaN where a class is missing. (Hanley & McNeil 1982.) One sort, no pass over pairs."""
    scores = numbers(scores, (None,), "scores")
    labels = class_numbers(labels, 2, len(scores))
    order = scores.argsort()
    negative, positive = (order[labels[order] == c] for c in (0, 1))
    under = [torch.searchsorted(scores[negative], scores[positive], right=right) for right in (False, True)]
    weights, index = weighting(weights, index, len(scores))
    positive, below = weights[:, index[positive]], pad(weights[:, index[negative]].cumsum(1), (1, 0))
    pairs = (positive * (below[:, under[0]] + below[:, under[1]])).sum(1) / 2
    return pairs / (positive.sum(1) * below[:, -1])


def roc_curve(scores, labels):
    """(false positive rate, sensitivity), each (M,), from (0, 0) to (1, 1), one point a distinct score. NaN for the
    rate of a missing class. scores (N,), labels (N,) 0 or 1."""
    scores = numbers(scores, (None,), "scores")
    labels = class_numbers(labels, 2, len(scores))
    order = scores.argsort(descending=True)
    scores, labels = scores[order], labels[order].double()
    last = pad(scores[1:] != scores[:-1], (0, min(1, len(scores))), value=True)  # of equal scores only the last is a point
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


def evaluate(probabilities, labels, threshold=0.5, weights=None, index=None):
    """All metrics of a classification: {name: (B,)}. probabilities (N, K), labels (N,), weights and index as for auc.

    With two classes sensitivity and specificity are those of the positive class; with K they, F1 and the AUC are
    macro averages of each class against the rest. ECE is the expected calibration error (Naeini et al. 2015)."""
    probabilities, labels = answers(probabilities, labels)
    k, (weights, index) = probabilities.shape[1], weighting(weights, index, len(labels))
    columns = one_hot(labels * k + decide(probabilities, threshold), k * k).double()
    cells = totals(weights, index, columns).reshape(-1, k, k)  # weighted confusion matrices
    hit = cells.diagonal(dim1=1, dim2=2)
    truth, said, total = cells.sum(2), cells.sum(1), cells.sum((1, 2))[:, None]
    recall = hit / truth
    specificity = (total - truth - said + hit) / (total - truth)
    f1 = 2 * hit / (truth + said)
    kept = slice(1, 2) if k == 2 else slice(None)
    areas = torch.stack([auc(probabilities[:, c], labels == c, weights, index) for c in range(k)[kept]], 1)
    p, y, bins = calibration_bins(probabilities, labels)
    gap = totals(weights, index, (y - p)[:, None] * one_hot(bins, BINS))
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


def localisation(iou, weights=None, index=None):
    """Mean IoU, and the share of lesions found with IoU >= 0.5: {name: (B,)}. iou (N,), NaN where no box is known;
    weights and index as for auc. NaN where no box is known at all."""
    iou = numbers(iou, (None,), "iou")
    weights, index = weighting(weights, index, len(iou))
    known = iou.isfinite()
    iou = iou[known].double()
    sums = totals(weights, index[known], torch.stack([torch.ones_like(iou), iou, (iou >= 0.5).double()], 1))
    return {"iou": sums[:, 1] / sums[:, 0], "iou_at_50": sums[:, 2] / sums[:, 0]}


def measure(probabilities, labels, threshold=0.5, iou=None, weights=None, index=None):
    """All metrics of a classification, a localisation, or both: {name: (B,)}. probabilities or iou may be None."""
    values = {} if probabilities is None else evaluate(probabilities, labels, threshold, weights, index)
    return values if iou is None else values | localisation(iou, weights, index)


def draw(count, replicates, generator):
    """(B, G) how often each of `count` groups is drawn with replacement."""
    drawn = torch.randint(count, (replicates, count), generator=generator)
    return torch.zeros(replicates, count).scatter_add_(1, drawn, torch.ones(replicates, count))


def bootstrap_weights(groups, replicates=REPLICATES, generator=None):
    """(B, N) how often each image is drawn when whole groups (N,) are drawn with replacement (Efron & Tibshirani 1993)."""
    index = group_index(groups, len(groups))
    return draw(int(index.max()) + 1, replicates, generator or torch.Generator().manual_seed(0))[:, index]


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
    """(low, high) of a share `value` of n (Clopper & Pearson 1934). n need not be whole: the effective sample size of
    grouped images (Korn & Graubard 1998). At the edge, 34 of 34: [0.897, 1]."""

    def quantile(p, a, b):
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if beta_cdf(middle, a, b) < p else (low, middle)
        return (low + high) / 2

    hits, misses, tail = value * n, (1 - value) * n, (1 - level) / 2
    low = quantile(tail, hits, misses + 1) if hits > 1e-9 else 0.0
    return low, quantile(1 - tail, hits + 1, misses) if misses > 1e-9 else 1.0


def evidence(labels, classes, groups=None, iou=None):
    """{metric: the number of groups that tell about it}: for sensitivity those with positives, for the AUC those with
    positives or those without, the fewer (its variance is at most A (1 - A) / min(m, n): Birnbaum & Klose 1957). Of a
    macro mean K times those of the rarest class. Unequal groups count as (sum n)^2 / sum n^2 equal ones (Kish 1965)."""
    index = group_index(groups, len(iou if labels is None else labels))

    def count(rows):
        sizes = torch.bincount(index, rows.double())
        return float(sizes.sum() ** 2 / (sizes**2).sum()) if rows.any() else 0.0

    found = {}
    if labels is not None:
        labels, kept = class_numbers(labels, classes), range(classes)[classes == 2 :]
        of, rest = ([count((labels == c) == side) for c in range(classes)] for side in (True, False))
        found["auc"] = min(min(of[c], rest[c]) for c in kept)
        found["accuracy"] = found["ece"] = count(labels >= 0)
        found["sensitivity"] = found["f1"] = len(kept) * min(of[c] for c in kept)
        found["specificity"] = len(kept) * min(rest[c] for c in kept)
        found["balanced_accuracy"] = classes * min(of)
    return found if iou is None else found | dict.fromkeys(("iou", "iou_at_50"), count(torch.as_tensor(iou).isfinite()))


@torch.inference_mode(False)
def with_intervals(probabilities, labels, groups=None, threshold=0.5, iou=None):
    """{metric: {"value", "low", "high"}} with 95 % intervals by group, see bounds.

    probabilities (N, K) and labels (N,), or None, None for a detector alone; groups N numbers or names, or None: each
    image its own; iou (N,) or None. ValueError where lengths or labels do not fit."""
    known = evidence(labels, 0 if labels is None else answers(probabilities, labels)[0].shape[1], groups, iou)
    index = group_index(groups, len(labels if iou is None else iou))
    return intervals(lambda weights: measure(probabilities, labels, threshold, iou, weights, index), index, known)


@torch.inference_mode(False)
def change_with_intervals(before, after, labels, groups=None):
    """{metric: {"before", "after", "value", "low", "high"}} of two models on the same images. value: after minus before,
    and its interval is that of the pairs, which is narrower than the two intervals let expect: both models meet the
    same easy and hard images in a resample.

    before, after: (probabilities (N, K) or None, threshold, iou (N,) or None) each."""
    old, new = ({"probabilities": p, "labels": labels, "threshold": t, "iou": iou} for p, t, iou in (before, after))
    count = len(after[2] if labels is None else labels)
    index = group_index(groups, count)

    def change(weights):
        was, now = measure(**old, weights=weights, index=index), measure(**new, weights=weights, index=index)
        return {name: now[name] - was[name] for name in was if name in now}

    classes = 0 if after[0] is None else answers(after[0], labels)[0].shape[1]
    known = evidence(None if after[0] is None else labels, classes, groups, after[2])
    report, was, now = intervals(change, index, known, change=True), measure(**old), measure(**new)
    return {name: {"before": float(was[name]), "after": float(now[name]), **m} for name, m in report.items()}


def intervals(measure, index, evidence, change=False):
    """{metric: {"value", "low", "high"}} of measure(weights), weights (B, G) of the groups in `index` (N,) or None."""
    count, generator = int(index.max()) + 1 if len(index) else 0, torch.Generator().manual_seed(0)
    most, point = max(1, WEIGHTS_AT_ONCE // max(1, len(index))), measure(None)
    parts, pulls = [], {}
    if count >= FEWEST:
        for done in range(0, REPLICATES, most):
            parts.append(measure(draw(count, min(most, REPLICATES - done), generator)))
        pulls = pulls_of(measure, count) if evidence else {}
    report = {}
    for name, value in point.items():
        draws = torch.cat([part[name] for part in parts]).double() if parts else torch.zeros(0)
        low, high = bounds(float(value), draws, pulls.get(name), (evidence or {}).get(name, count), name == "ece", change)
        report[name] = {"value": float(value), "low": low, "high": high}
    return report


def pulls_of(measure, count):
    """{metric: (G,)} how much each group pulls the value: its derivative by the group's weight (Jaeckel 1972)."""
    with torch.enable_grad():
        weights = torch.ones(1, count, dtype=torch.double, requires_grad=True)
        values = measure(weights)
        return {k: torch.autograd.grad(v.sum(), weights, retain_graph=True)[0][0] for k, v in values.items()}


def bounds(value, draws, pulls, n, error, change):
    """(low, high) with 95 % coverage."""
    draws = draws[draws.isfinite()]  # a resample without positives has no AUC
    if math.isnan(value) or n < FEWEST or not len(draws):
        return math.nan, math.nan
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    if pulls is None:
        return (min(low, value), max(high, value)) if low < high else (math.nan, math.nan)
    if error:
        low, high = max(0, 2 * value - high), 2 * value - low
    seen = min(int((pulls > 1e-12).sum()), int((pulls < -1e-12).sum()))
    if seen < ENOUGH and change:
        unseen = 1 - 0.025 ** (1 / n)
        low, high = max(-1, value - math.hypot(value - low, unseen)), min(1, value + math.hypot(high - value, unseen))
    elif seen < ENOUGH:
        most = value * (1 - value)
        size = (seen + 1) / (seen * float((pulls**2).sum()) / most + 1 / n) if seen else n
        reflected = low
        low, high = share_interval(value, size)
        low = min(low, reflected) if error else low
    return min(low, value), max(high, value)


@torch.inference_mode(False)
def resample(measure, groups, evidence=None):
    """{metric: {"value", "low", "high"}} of measure(weights) -> {metric: (B,)}, weights (B, N) or None for the point."""
    index = group_index(groups, len(groups))
    return intervals(lambda weights: measure(None if weights is None else weights[:, index]), index, evidence)


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
