"""Numbers from predictions: AUC, sensitivity, calibration, IoU, with 95 % intervals by group that are true at the edge.

Tensors, numpy arrays and lists are taken. No network, no file. 34 of 34 found is 1.000 [0.897, 1.000]:

    import metrics
    labels, patients = [0, 0, 0, 0, 1, 1, 1, 1], ["a", "a", "b", "c", "d", "e", "e", "f"]
    scores = [0.1, 0.2, 0.4, 0.3, 0.6, 0.8, 0.9, 0.7]
    report = metrics.with_intervals([[1 - p, p] for p in scores], labels, patients, threshold=0.5)
    print(metrics.interval_text(report["sensitivity"]))  # 1.000 [0.251, 1.000]

Every metric takes weights (B, N), one row a replicate, and returns (B,): the bootstrap is a few matrix operations. Or
weights (B, G) of groups with `index` (N,), the group of each image: then what can be summed within a group is."""

import math

import torch
from torch.nn.functional import one_hot, pad

BINS = 10  # of the calibration error and its plot
REPLICATES = 2000  # of the bootstrap
WEIGHTS_AT_ONCE = 10_000_000  # of replicates x images: what bounds the memory on large test splits
FEWEST, ENOUGH = 3, 10  # groups: with fewer nothing is said (2 of 2 is [0.16, 1]); with enough percentiles are sound


def numbers(values, shape, name, nan=False):
    """As a tensor on the CPU, lists as float64. ValueError unless it has that shape (None: any size) and no NaN."""
    kind = torch.double if isinstance(values, (list, tuple, float)) else None
    values = values.copy() if hasattr(values, "__array_interface__") else values  # torch takes no p[::-1] of numpy
    values = torch.as_tensor(values, dtype=kind).detach().cpu()
    if values.ndim != len(shape) or any(n not in (None, size) for n, size in zip(shape, values.shape, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} of shape {tuple(values.shape)}: must be of shape ({wanted})")
    if not nan and values.isnan().any():
        raise ValueError(f"{name}: NaN among them; leave these images out")
    return values


def class_numbers(labels, classes, count=None, name="labels"):
    labels = numbers(labels, (count,), name)
    if ((labels < 0) | (labels >= classes) | (labels != labels.long())).any():
        raise ValueError(f"{name}: must be whole numbers from 0 to {classes - 1}; leave out images without a label")
    return labels.long()


def answers(probabilities, labels):
    probabilities = numbers(probabilities, (None, None), "probabilities")
    if probabilities.shape[1] < 2 or ((probabilities < -1e-3) | (probabilities > 1.001)).any():
        raise ValueError("probabilities: must be (N, K) in [0, 1], a column a class; of one column p make [1 - p, p]")
    return probabilities, class_numbers(labels, probabilities.shape[1], len(probabilities))


def group_index(groups, count):
    """(N,) from 0 on. groups: N numbers or names, or None: each image its own."""
    groups = range(count) if groups is None else groups.tolist() if hasattr(groups, "tolist") else list(groups)
    if len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} images: must be as many")
    place = {group: i for i, group in enumerate(sorted(set(groups)))}
    return torch.tensor([place[group] for group in groups], dtype=torch.long)


def weighting(weights, index, count):
    """Weights (B, G) and the column (N,) of each image in them. None: all one. No index: a column an image."""
    if index is not None and len(index) != count:
        raise ValueError(f"{count} images, {len(index)} in the index or in the rest: must be as many")
    if weights is not None and index is not None:
        return weights, index
    weights = torch.ones(1, count) if weights is None else torch.as_tensor(weights)
    if weights.ndim != 2 or weights.shape[1] != count:
        raise ValueError(f"weights of shape {tuple(weights.shape)}: must be (B, {count}), a row a replicate")
    return weights.double(), torch.arange(count)


def totals(weights, index, columns):
    """(B, C) weighted sums of columns (N, C), summed within the groups first."""
    table = torch.zeros(weights.shape[1], columns.shape[1], dtype=torch.double).index_add_(0, index, columns)
    return weights @ table.to(weights.dtype)


def auc(scores, labels, weights=None, index=None):
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting one half.

    scores (N,), labels (N,) 0 or 1, weights (B, N) or None. Returns (B,), NaN where a class is missing.
    (Hanley & McNeil 1982.) Costs one sort, not a pass over the pairs. ValueError where shapes or labels do not fit."""
    scores = numbers(scores, (None,), "scores")
    labels = class_numbers(labels, 2, len(scores))
    weights, index = weighting(weights, index, len(scores))
    order = scores.argsort()
    negative, positive = (order[labels[order] == c] for c in (0, 1))
    first, last = (torch.searchsorted(scores[negative], scores[positive], right=right) for right in (False, True))
    below = pad(weights.index_select(1, index[negative]).cumsum(1), (1, 0))
    positive = weights.index_select(1, index[positive])
    pairs = (positive * (below.index_select(1, first) + below.index_select(1, last))).sum(1) / 2
    return pairs / (positive.sum(1) * below[:, -1])


def roc_curve(scores, labels):
    """(false positive rate, sensitivity), each (M,), from (0, 0) to (1, 1), one point a distinct score. scores (N,),
    labels (N,) 0 or 1. The rate of a missing class is NaN."""
    scores = numbers(scores, (None,), "scores")
    labels = class_numbers(labels, 2, len(scores))
    order = scores.argsort(descending=True)
    scores, labels = scores[order].double(), labels[order].double()
    after = pad(scores[1:], (0, min(1, len(scores))), value=math.nan)
    last = scores != after  # of equal scores only the last is a point
    return tuple(pad(rate.cumsum(0)[last] / rate.sum(), (1, 0)) for rate in (1 - labels, labels))


def threshold_for_sensitivity(scores, labels, target):
    """The largest threshold t at which `score >= t` finds at least `target` of the positives; NaN without any."""
    if not 0 <= target <= 1:
        raise ValueError(f"target {target}: must lie in [0, 1]")
    scores = numbers(scores, (None,), "scores")
    positive = scores[class_numbers(labels, 2, len(scores)) == 1].sort(descending=True).values
    return float(positive[max(0, math.ceil(target * len(positive) - 1e-9) - 1)]) if len(positive) else math.nan


def threshold_for_balance(scores, labels):
    """The threshold t at which `score >= t` has the best mean of sensitivity and specificity (Youden 1950), half way to
    the next lower score, so that it is not one image's own. NaN where a class is missing."""
    fpr, tpr = roc_curve(scores, labels)
    if len(fpr) == 1 or (fpr + tpr).isnan().any():
        return math.nan
    best = int((tpr - fpr)[1:].argmax()) + 1  # as many scores lie at or above the threshold
    values = torch.unique(numbers(scores, (None,), "scores")).flip(0)
    return float(values[best - 1] + values[min(best, len(values) - 1)]) / 2


def confusion(predicted, labels, classes):
    """(K, K) counts: row = truth, column = prediction. predicted, labels: (N,) class numbers."""
    labels = class_numbers(labels, classes)
    cells = labels * classes + class_numbers(predicted, classes, len(labels), "predicted")
    return torch.bincount(cells, minlength=classes**2).reshape(classes, classes)


def decide(probabilities, threshold):
    """Predicted class (N,) of (N, K). Two: p(positive) >= threshold (a number, or one an image); K: the likeliest."""
    probabilities = numbers(probabilities, (None, None), "probabilities")
    if probabilities.shape[1] != 2:
        return probabilities.argmax(1)
    each = torch.as_tensor(threshold).ndim > 0
    return (probabilities[:, 1] >= numbers(threshold, probabilities.shape[:1] if each else (), "threshold")).long()


def calibration_bins(probabilities, labels):
    """What was predicted, what came true, and the bin of each image: (N,) each. Two classes: of the positive class;
    K classes: of the likeliest."""
    probabilities, labels = answers(probabilities, labels)
    predicted, winner = (probabilities[:, 1], 1) if probabilities.shape[1] == 2 else probabilities.max(1)
    return predicted.double(), (labels == winner).double(), (predicted * BINS).long().clamp(0, BINS - 1)


def evaluate(probabilities, labels, threshold=0.5, weights=None, index=None):
    """All metrics of a classification: {name: (B,)}. probabilities (N, K), labels (N,), weights (B, N) or None.

    With two classes sensitivity and specificity are those of the positive class; with K they, F1 and the AUC are
    macro averages of each class against the rest, NaN where a class has no image. ECE is the expected calibration error
    (Naeini et al. 2015). ValueError where shapes or labels do not fit."""
    probabilities, labels = answers(probabilities, labels)
    k, (weights, index) = probabilities.shape[1], weighting(weights, index, len(labels))
    cells = totals(weights, index, one_hot(labels * k + decide(probabilities, threshold), k * k).double())
    cells = cells.reshape(-1, k, k)  # weighted confusion matrices
    hit, truth, said, total = cells.diagonal(dim1=1, dim2=2), cells.sum(2), cells.sum(1), cells.sum((1, 2))[:, None]
    recall, specificity = hit / truth, (total - truth - said + hit) / (total - truth)
    f1 = 2 * hit / (truth + said)
    kept = slice(1, 2) if k == 2 else slice(None)
    ranks = probabilities.double()
    if k == 2:  # by odds: a logit of 40 is 1.0 in float64, but the other class's 4e-18 still tells it from one of 50
        ranks = (ranks / ranks.flip(1)).nan_to_num()
    areas = torch.stack([auc(ranks[:, c], labels == c, weights, index) for c in range(k)[kept]], 1)
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
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] != 4:
        raise ValueError(f"boxes of shapes {tuple(a.shape)} and {tuple(b.shape)}: must both be (N, 4)")
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    area = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1)
    return inter / (area - inter).clamp(min=1e-12)


def localisation(iou):
    """{metric: (N,)} whose means tell how well lesions are found: the IoU (N,), NaN where no box is known, and whether it
    reaches 0.5. A dict of such values passes."""
    if isinstance(iou, dict):
        return {name: numbers(values, (None,), name, nan=True).double() for name, values in iou.items()}
    iou = numbers(iou, (None,), "iou", nan=True).double()
    return {"iou": iou, "iou_at_50": torch.where(iou.isfinite(), (iou >= 0.5).double(), iou)}


def means(columns, weights=None, index=None):
    """{name: (B,)} weighted means of {name: (N,)}, of what is not NaN."""
    found = {}
    for name, values in columns.items():
        w, i = weighting(weights, index, len(values))
        sums = totals(w, i, torch.stack([values.isfinite().double(), values.nan_to_num()], 1))
        found[name] = sums[:, 1] / sums[:, 0]
    return found


def measure(probabilities, labels, threshold=0.5, iou=None, weights=None, index=None):
    """All metrics of a classification, a localisation, or both: {name: (B,)}. probabilities or iou (see localisation) may
    be None."""
    values = {} if probabilities is None else evaluate(probabilities, labels, threshold, weights, index)
    return values if iou is None else values | means(localisation(iou), weights, index)


def drawn_groups(count, replicates, generator):
    drawn = torch.randint(count, (replicates, count), generator=generator)
    return torch.zeros(replicates, count).scatter_add_(1, drawn, torch.ones(1, 1).expand(replicates, count))


def evidence(labels, classes, iou=None):
    """{metric: (w, [(N,) bool, ...])} for resample: which images tell about it, in parts, and how far it can fall if
    all of a part are wrong: 1 for a share, 1 / K for each class of a macro mean. AUC of two classes: 1 / 2, as a missed
    positive that scores like the negatives loses half its pairs (34 and 34 at 1.0: from 0.949; Newcombe 2006: 0.945).

    labels (N,) or None, iou (see localisation) or None."""
    parts = {}
    if labels is not None:
        labels = class_numbers(labels, classes)
        of, rest = ([(labels == c) == side for c in range(classes)] for side in (True, False))
        parts = dict.fromkeys(("accuracy", "ece"), (1, [labels >= 0]))
        parts |= dict.fromkeys(("auc", "balanced_accuracy"), (1 / classes, of))
        parts |= dict.fromkeys(("sensitivity", "f1"), (1, of[1:]) if classes == 2 else (1 / classes, of))
        parts["specificity"] = (1, of[:1]) if classes == 2 else (1 / classes, rest)
    told = {} if iou is None else localisation(iou)
    return parts | {name: (1, [values.isfinite()]) for name, values in told.items()}


@torch.inference_mode(False)
def with_intervals(probabilities, labels, groups=None, threshold=0.5, iou=None):
    """{metric: {"value", "low", "high"}} with 95 % intervals by group, see resample. NaN where groups are too few.

    probabilities (N, K) and labels (N,), or None, None for a detector alone; groups: N numbers or names, or None; iou:
    see localisation, or None. ValueError where shapes, lengths or labels do not fit."""
    if probabilities is not None:
        probabilities, labels = answers(probabilities, labels)
    known = evidence(None, 0, iou) if probabilities is None else evidence(labels, probabilities.shape[1], iou)
    index = group_index(groups, len(next(iter(localisation(iou).values())) if probabilities is None else labels))
    return intervals(lambda w: measure(probabilities, labels, threshold, iou, w, index), index, known)


@torch.inference_mode(False)
def change_with_intervals(before, after, labels, groups=None):
    """{metric: {"before", "after", "value", "low", "high"}} of two models on the same images. value: after - before;
    its interval is that of the pairs, which is narrower than the two intervals let expect: both models meet the same easy
    and hard images in a resample. No change among 34 images is +0.000 [-0.103, +0.103].

    before, after: (probabilities (N, K) or None, threshold, iou, see localisation, or None) each."""
    (p, _, iou), none = after, after[0] is None
    known = evidence(None, 0, iou) if none else evidence(labels, answers(p, labels)[0].shape[1], iou)
    index = group_index(groups, len(next(iter(localisation(iou).values())) if none else p))

    def both(w):
        return (measure(p, labels, threshold, iou, w, index) for p, threshold, iou in (before, after))

    def change(w):
        old, new = both(w)
        return {name: new[name] - old[name] for name in old if name in new}

    report, (old, new) = intervals(change, index, known, True), both(None)
    return {name: {"before": float(old[name]), "after": float(new[name]), **m} for name, m in report.items()}


@torch.inference_mode(False)
def resample(measure, groups, parts=None):
    """{metric: {"value", "low", "high"}} of measure(weights) -> {metric: (B,)}, weights (B, N) or None for the point.

    Percentile bootstrap over the groups (N,). It cannot draw what was not seen: of 34 hits in 34 it says [1, 1]. So for
    metrics in `parts`, see evidence, where fewer than ENOUGH groups pull to either side, each end moves by the share of
    groups that may be wrong (right) though none of n is, 1 - 0.025^(1/n) (Clopper & Pearson 1934): squared and added to
    the percentile's distance (Newcombe 1998). At 34 of 34 that is Clopper-Pearson, between it is close, and unlike that
    it keeps the bootstrap's design effect and, far from the edge, its figures. n is the effective number of groups,
    (sum m)^2 / sum m^2 of their sizes m (Kish 1965). Parts need a measure in [0, 1] of torch operations; a number in
    place of the tuple stands for a share of all images. NaN with fewer than FEWEST groups in a part (ECE: than BINS).
    A metric without parts has its plain percentiles."""
    index = group_index(groups, len(groups))
    return intervals(lambda w: measure(None if w is None else w[:, index]), index, parts or {})


def intervals(measure, index, parts, change=False):
    """As resample, of measure(weights (B, G) or None). change: the metrics are differences, in [-1, 1]."""
    count, generator = len(index.unique()), torch.Generator().manual_seed(0)
    most, point = max(1, WEIGHTS_AT_ONCE // max(1, len(index))), measure(None)
    report = {name: {"value": float(value), "low": math.nan, "high": math.nan} for name, value in point.items()}
    if count < FEWEST:
        return report
    sizes = [min(most, REPLICATES - done) for done in range(0, REPLICATES, most)]
    draws = [measure(drawn_groups(count, n, generator)) for n in sizes]
    with torch.enable_grad():  # how much a group pulls: the derivative by its weight (Jaeckel 1972)
        ones = torch.ones(1, count, dtype=torch.double, requires_grad=True)
        values = measure(ones) if parts else {}
        pulls = {k: torch.autograd.grad(values[k].sum(), ones, retain_graph=True)[0][0] for k in values if k in parts}
    for name, m in report.items():
        v, drawn = m["value"], torch.cat([d[name] for d in draws]).double()
        drawn = drawn[drawn.isfinite()]  # a resample without positives has no AUC
        if math.isnan(v) or not len(drawn) or (name == "ece" and count < BINS):
            continue
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
        if name not in parts:
            m |= {"low": min(low, v), "high": max(high, v)}
            continue
        if name == "ece" and not change:  # noise adds to it, and in a resample once more: taken off, in squares
            low = math.sqrt(max(0.0, 2 * v * v - high * high))
        share, rows = parts[name] if isinstance(parts[name], tuple) else (1, [index >= 0])
        u = share * float(torch.stack([unseen(pulls[name], index, r) for r in rows]).max())  # NaN if one is
        down, up = (u, u) if change else (u * v, u * (1 - v))
        low, high = v - math.hypot(min(low - v, 0.0), down), v + math.hypot(max(high - v, 0.0), up)
        if not math.isnan(u):
            m |= {"low": max(low, -float(change)) + 0.0, "high": min(high, 1.0)}
    return report


def unseen(pulls, index, rows):
    """What share of the groups that hold `rows` (N,) may be wrong though none is, see resample. 0 where enough of them
    pull (G,) to either side, and evenly (one miss that outweighs all others is one); NaN where they are too few."""
    sizes = torch.bincount(index, rows.double(), len(pulls))
    if (sizes > 0).sum() < FEWEST:
        return sizes.sum() * math.nan
    pulls = pulls[(sizes > 0) & (pulls.abs() > 1e-12)]
    even = (pulls**2).sum() ** 2 / (pulls**4).sum()  # how many of equal size would weigh so
    enough = min((pulls > 0).sum(), (pulls < 0).sum(), even) >= ENOUGH
    return sizes.sum() * 0 if enough else 1 - 0.025 ** ((sizes**2).sum() / sizes.sum() ** 2)


def interval_text(m, form=".3f"):
    """As in "0.941 [0.893, 0.971]", or "0.941 (too few)" where an end is NaN or None. form "+.3f" for a change."""
    value, low, high = (math.nan if m[k] is None else m[k] for k in ("value", "low", "high"))
    known = math.isfinite(low) and math.isfinite(high)
    return f"{value:{form}} " + (f"[{low:{form}}, {high:{form}}]" if known else "(too few)")


def fit_temperature(probabilities, labels):
    """The temperature T in [0.25, 8] at which p^(1/T) has the least negative log-likelihood (Guo et al. 2017).

    probabilities (N, K), labels (N,); NaN without any. A grid, then finer ones around its best: nothing can diverge."""
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


def mean_interval(values, level=0.95, overlap=0.0):
    """Mean of R repeats, its Student t interval, and the two-sided p of "the mean is 0": four numbers.

    values (R,). For paired differences this is the paired t test (Student 1908). NaN for the rest when R is 1.
    overlap: of repeats that each draw test images anew from the same ones, how many are tested over how many are learnt
    from: such repeats are not independent, and the variance is corrected (Nadeau & Bengio 2003).
    With t = sqrt(R - 1) tan(a) the density is cos(a)^(R - 2), which a sum over a fine grid integrates."""
    values = torch.as_tensor(values, dtype=torch.double)
    mean, free = float(values.mean()), len(values) - 1
    if free < 1:
        return mean, math.nan, math.nan, math.nan
    error = float(values.std()) * math.sqrt(1 / len(values) + overlap)
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
