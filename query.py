"""QUERY"""

import dataclasses
import math

import torch
import torch.nn.functional as F

DIRECT = "donot_use_mm_for_euclid_dist"


def nearest_distance(points, centers):
    """Euclidean distance (N,) of each of `points` (N, D) to the nearest of `centers` (M, D), in blocks.

    By direct differences, not by |x|^2 - 2 x.c + |c|^2: that one rounds to negative squares, and gives two copies of a
    point a distance. Here it is exactly 0, and a pair's distance does not depend on who else is in the call."""
    block = max(1, 2**20 // max(len(centers), 1))
    return torch.cat([torch.cdist(p, centers, compute_mode=DIRECT).amin(1) for p in points.split(block)])


def k_center_greedy(embeddings, k, centers=None):
    """Greedy k-center (Gonzalez 1985), the selection of CoreSet (Sener & Savarese, ICLR 2018): exact, and below its
    floor of k passes over the matrix.

    embeddings: (N, D) float32 or float64; centers: (M, D), what is labelled already, or None: then the point nearest
    to the mean comes first. Returns the k distinct indices (int64, on the device of `embeddings`) in the order picked,
    ties to the lowest index, and the covering radius: the largest distance of a point to its nearest center or pick.
    Extra memory O(N). ValueError if k > N or a value is not finite.

    The distance to the nearest center only shrinks as picks are added, so an old distance is an upper bound. We keep
    the few farthest points up to date and pick among them as long as the best of them is above every bound outside;
    only then the next few are brought up to date, with all picks that they missed at once (lazy greedy, Minoux 1978).
    One matrix product, a hundredth taken off for its rounding, tells which of those picks can be nearer than the bound
    at all; only these few are measured."""
    n, device = len(embeddings), embeddings.device
    if not 0 <= k <= n:
        raise ValueError(f"k = {k} of {n} points")
    if n == 0:
        return torch.empty(0, dtype=torch.long, device=device), 0.0
    picks, mean = [], embeddings.mean(0)
    off_centre = nearest_distance(embeddings, mean[None])
    started = centers is not None and len(centers) > 0
    bound = nearest_distance(embeddings, centers.to(embeddings)) if started else off_centre
    if not (bound.isfinite() & off_centre.isfinite()).all():
        raise ValueError("embeddings or centers hold NaN or infinity")
    if not started and k:
        picks.append(int(off_centre.argmin()))
        bound = nearest_distance(embeddings, embeddings[picks])
        bound[picks] = -1.0  # a point that is taken is never the farthest
    square = off_centre.square()
    seen = torch.full((n,), len(picks), device=device)  # how many picks each bound has heard of

    def refresh(index, rows):
        """Bring the bounds of these points up to date."""
        stale = seen[index] < len(picks)
        if stale.any():
            index, rows = index[stale], rows[stale]
            missed = torch.tensor(picks[int(seen[index].min()) :], device=device)
            centers = embeddings[missed]
            product = (rows - mean) @ (centers - mean).T  # about the mean, where it rounds least
            at_least = 0.99 * (square[index][:, None] + square[missed]) - 2 * product
            pairs = torch.nonzero(at_least < bound[index].square()[:, None])
            for i, j in (block.T for block in pairs.split(4096)):
                measured = torch.cdist(rows[i, None], centers[j, None], compute_mode=DIRECT)[:, 0, 0]
                bound.scatter_reduce_(0, index[i], measured, "amin")
        seen[index] = len(picks)

    size = min(n, 128 + n // 64)
    while True:
        work = bound.topk(size).indices.sort().values  # sorted, so that the first maximum has the lowest index
        rows = embeddings[work]
        refresh(work, rows)
        distance = bound[work]
        outside = float(bound.index_fill(0, work, -1.0).amax())
        before = len(picks)
        while (farthest := float(distance[best := int(distance.argmax())])) > outside:
            if len(picks) == k:  # the one that would come next is a covering radius away
                return torch.tensor(picks, dtype=torch.long, device=device), farthest
            picks.append(int(work[best]))
            distance = torch.minimum(distance, nearest_distance(rows, rows[best : best + 1]))
            distance[best] = -1.0
        bound[work], seen[work] = distance, len(picks)
        if len(picks) == before and farthest == outside:  # a tie over the edge of the work set: settle all who share it
            for index in torch.nonzero(bound == farthest)[:, 0].split(4096):
                refresh(index, embeddings[index])
            if len(picks) == k:
                return torch.tensor(picks, dtype=torch.long, device=device), max(farthest, 0.0)
            picks.append(int(bound.argmax()))
            bound[picks[-1]] = -1.0


@dataclasses.dataclass
class Context:
    """What a strategy may know of a pool of P images: no label among it."""

    embeddings: torch.Tensor  # (P, D), of C-Net, without augmentation
    probabilities: torch.Tensor  # (P, K)
    labelled: torch.Tensor  # (L,) int64, indices into the pool
    unlabelled: torch.Tensor  # (U,) int64, those that may be asked for
    generator: torch.Generator
    members: torch.Tensor | None = None  # (M, P, K), the ensemble's members each by itself
    sampled: torch.Tensor | None = None  # (V, P, K), Monte-Carlo dropout


def highest(scores, context, k):
    """The k unlabelled images of the highest scores (P,), ties to the lowest index."""
    order = scores[context.unlabelled].argsort(descending=True, stable=True)
    return context.unlabelled[order[:k]]


def entropy(probabilities):
    """Shannon entropy of the last dimension. For two classes its order is that of the least confident answer."""
    return -(probabilities * (probabilities + 1e-12).log()).sum(-1)


def mutual_information(opinions):
    """How much several opinions (V, N, K) disagree, (N,): entropy of their mean minus their mean entropy."""
    return entropy(opinions.mean(0)) - entropy(opinions).mean(0)


def query_random(context, k):
    order = torch.randperm(len(context.unlabelled), generator=context.generator)
    return context.unlabelled[order[:k]]


def query_entropy(context, k):
    """Where the prediction is least sure (Lewis & Gale 1994)."""
    return highest(entropy(context.probabilities), context, k)


def query_committee(context, k):
    """Query by committee (Seung et al. 1992): where the members differ, as the mean divergence from their consensus."""
    return highest(mutual_information(context.members), context, k)


def query_bald(context, k):
    """BALD (Houlsby et al. 2011; Gal et al. 2017): a committee drawn by dropout at prediction time."""
    return highest(mutual_information(context.sampled), context, k)


def query_coreset(context, k):
    """CoreSet (Sener & Savarese 2018): the images that leave no other far from a labelled one."""
    known = context.embeddings[context.labelled]
    return context.unlabelled[k_center_greedy(context.embeddings[context.unlabelled], k, known)[0]]


def query_badge(context, k):
    """BADGE (Ash et al. 2020): spread out in the space of the gradients that the predicted labels would cause, where
    what is uncertain is long. The gradient of the last layer is (p - one-hot) x embedding; that product is never
    built, its inner products are products of inner products."""
    x, p = context.embeddings[context.unlabelled], context.probabilities[context.unlabelled]
    a = p - F.one_hot(p.argmax(1), p.shape[1])
    square = a.square().sum(1) * x.square().sum(1)

    def distance_to(i):
        return (square + square[i] - 2 * (a @ a[i]) * (x @ x[i])).clamp(min=0)

    return context.unlabelled[spread(distance_to, int(square.argmax()), k, context.generator)]


def query_typiclust(context, k):
    """TypiClust (Hacohen et al. 2022), made for few labels: as many clusters as there will be labels; from the largest
    clusters without a label the most typical image, whose 20 nearest neighbours in the cluster are nearest."""
    rows = torch.cat([context.labelled, context.unlabelled])
    x = F.normalize(context.embeddings[rows], dim=1)
    free = torch.arange(len(rows)) >= len(context.labelled)
    cluster = k_means(x, min(len(context.labelled) + k, len(rows)), context.generator)
    sizes = torch.bincount(cluster)
    labels = torch.bincount(cluster[~free], minlength=len(sizes))
    picks = []
    while len(picks) < k:
        open_clusters = torch.bincount(cluster[free], minlength=len(sizes)) > 0
        rank = torch.where(
            open_clusters, labels.double() - sizes / (len(rows) + 1), math.inf
        )  # fewest labels, then largest
        chosen = int(rank.argmin())
        members = torch.nonzero(cluster == chosen)[:, 0]
        near = min(21, len(members))  # a point is its own nearest
        away = torch.cat([torch.cdist(b, x[members]).topk(near, largest=False).values for b in x[members].split(1024)])
        best = members[torch.where(free[members], away.mean(1), math.inf).argmin()]
        picks.append(int(best))
        free[best] = False
        labels[chosen] += 1
    return rows[picks]


STRATEGIES = {
    "random": query_random,
    "entropy": query_entropy,
    "committee": query_committee,
    "bald": query_bald,
    "coreset": query_coreset,
    "badge": query_badge,
    "typiclust": query_typiclust,
}
COLD = ("random", "coreset", "typiclust")  # those that need no prediction, so they can choose the first labels


def spread(distance_to, first, k, generator):
    """k distinct indices, each drawn in proportion to its squared distance to those before it: the seeding of
    k-means++ (Arthur & Vassilvitskii 2007). distance_to(i): squared distances (N,) to point i."""
    picks, nearest = [first], distance_to(first).double()
    while len(picks) < k:
        nearest[picks] = 0
        weights = nearest
        if not weights.sum() > 0:  # only copies are left
            weights = torch.ones_like(nearest)
            weights[picks] = 0
        picks.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, distance_to(picks[-1]).double())
    return torch.tensor(picks[:k])


def k_means(x, k, generator, rounds=20):
    """Cluster (N,) of each point of x (N, D): Lloyd's algorithm from the seeding of k-means++."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    centers = x[spread(lambda i: (x - x[i]).square().sum(1), first, k, generator)]
    for _ in range(rounds):
        cluster = torch.cat([torch.cdist(block, centers).argmin(1) for block in x.split(4096)])
        count = torch.bincount(cluster, minlength=k)[:, None]
        total = torch.zeros_like(centers).index_add_(0, cluster, x)
        centers = torch.where(count > 0, total / count.clamp(min=1), centers)
    return cluster


def candidates(groups, labelled, k):
    """The pool's images (int64) that are worth asking for: one of each group that has no label yet, as the others show
    the same; all unlabelled ones when that leaves fewer than k. groups (P,), labelled (L,)."""
    fresh = ~torch.isin(groups, groups[labelled])
    _, member = torch.unique(groups, return_inverse=True)
    first = torch.full((int(member.max()) + 1,), len(groups)).scatter_reduce(
        0, member, torch.arange(len(groups)), "amin"
    )
    fresh &= first[member] == torch.arange(len(groups))
    if fresh.sum() < k:
        fresh = torch.ones(len(groups), dtype=torch.bool)
        fresh[labelled] = False
    return torch.nonzero(fresh)[:, 0]
