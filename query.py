"""Which images to label next: greedy k-center (CoreSet), BADGE, TypiClust, entropy, BALD, committee. Needs only torch.

    import torch, query
    x, p = torch.randn(500, 64), torch.rand(500, 3).softmax(1)  # embeddings and predicted probabilities of a pool
    picks, radius = query.k_center_greedy(x[10:], 20, centers=x[:10])  # 20 rows of x[10:], far from the first ten
    context = query.Context(x, p, torch.arange(10), torch.arange(10, 500), torch.Generator().manual_seed(0))
    picks = query.query_badge(context, 20)  # or query.STRATEGIES["badge"](context, 20); indices into the pool

Tensors, numpy arrays and lists of any number type are taken. They are converted once: half precision and integers to
float32, float32 and float64 stay as they are; gradients are not followed."""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F

direct = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")


def as_floats(values):
    """A tensor of float32 or float64 without a graph. It shares the memory of `values` if nothing is converted."""
    values = torch.as_tensor(values).detach()
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def nearest_distance(points, centers):
    """Euclidean distance (N,) of each of `points` (N, D) to the nearest of `centers` (M, D), in blocks.

    By direct differences, not by |x|^2 - 2 x.c + |c|^2: that one rounds to negative squares, and gives two copies of a
    point a distance. Here it is exactly 0, and a pair's distance does not depend on who else is in the call."""
    block = max(1, 2**20 // max(len(centers), 1))
    return torch.cat([direct(p, centers).amin(1) for p in points.split(block)])


def safe_scale(x, centers):
    """The power of two by which to multiply so that no square overflows or vanishes: 1, except for extreme values."""
    ends = [float(end) for t in (x, centers) if t.numel() for end in t.aminmax()]
    if not all(map(math.isfinite, ends)):
        raise ValueError("embeddings or centers hold NaN or infinity: leave those rows out")
    largest, limits = max(map(abs, ends), default=0.0), torch.finfo(x.dtype)
    if not largest or limits.tiny**0.5 / limits.eps < largest < (limits.max / x.shape[1]) ** 0.5 / 8:
        return 1.0
    most = round(-math.log2(limits.tiny))  # a larger power would be infinite itself
    return 2.0 ** max(-most, min(most, -math.floor(math.log2(largest))))


class Bounds:
    """Of each of N points an upper bound on its distance to the nearest center, made exact where it is asked for."""

    def __init__(self, points, centers):
        n, d = points.shape
        self.points, self.centers, self.mean = points, centers, points.mean(0)
        self.square, self.bound = points.new_empty(n), points.new_empty(n)
        self.seen = torch.zeros(n, dtype=torch.long, device=points.device)  # how many centers each bound has heard of
        self.small = d < 64 or n * d < 2**17  # a pass over all points costs less than choosing among them
        if self.small:
            self.bound, self.seen = nearest_distance(points, centers), self.seen + len(centers)
            return
        about = centers - self.mean  # about the mean, where a product rounds least
        step = max(64, 2**17 // max(d, len(centers)))  # a block stays in the cache
        for part in (slice(start, start + step) for start in range(0, n, step)):
            rows = points[part] - self.mean
            self.square[part] = rows.square().sum(1)
            nearest = torch.addmm(about.square().sum(1), rows, about.T, alpha=-2).argmin(1)  # as the product sees it
            self.bound[part] = direct(points[part, None], centers[nearest, None])[:, 0, 0]

    def refresh(self, index, rows):
        """Make the bounds of these points exact. One matrix product, a hundredth taken off for its rounding, tells which
        of the centers that they missed can be nearer than the bound at all; only these few are measured."""
        stale = self.seen[index] < len(self.centers)
        if not stale.any():
            return
        index, rows = index[stale], rows[stale]
        for centers in self.centers[int(self.seen[index].min()) :].split(1024):
            about = centers - self.mean
            product = (rows - self.mean) @ about.T
            at_least = 0.99 * (self.square[index][:, None] + about.square().sum(1)) - 2 * product
            pairs = torch.nonzero(at_least < self.bound[index].square()[:, None])
            if len(pairs) > at_least.numel() / 4:  # many copies, say: cheaper all at once
                self.bound[index] = torch.minimum(self.bound[index], nearest_distance(rows, centers))
                continue
            for i, j in (block.T for block in pairs.split(4096)):
                self.bound.scatter_reduce_(0, index[i], direct(rows[i, None], centers[j, None])[:, 0, 0], "amin")
        self.seen[index] = len(self.centers)


def k_center_greedy(embeddings, k, centers=None):
    """Greedy k-center (Gonzalez 1985), the selection of CoreSet (Sener & Savarese, ICLR 2018): exact, and below its
    floor of k passes over the matrix.

    embeddings: (N, D); centers: (M, D), what is labelled already, or None: then the point nearest to the mean comes
    first. Returns the k distinct indices (int64, on the device of `embeddings`) in the order picked, ties to the lowest
    index, and the covering radius: the largest distance of a point to its nearest center or pick. Extra memory
    O(N + (M + k) D), ties aside. ValueError if k > N, a value is not finite or the shapes do not fit.

    The distance to the nearest center only shrinks as picks are added, so an old distance is an upper bound. We keep
    the few farthest points up to date and pick among them as long as the best of them is above every bound outside;
    only then the next few are brought up to date, with all picks that they missed at once (lazy greedy, Minoux 1978)."""
    x = as_floats(embeddings)
    centers = x[:0] if centers is None or not len(centers) else as_floats(centers).to(x)
    if x.dim() != 2 or centers.dim() != 2 or centers.shape[1] != x.shape[1]:
        raise ValueError(f"embeddings {tuple(x.shape)}, centers {tuple(centers.shape)}: must be (N, D) and (M, D)")
    if not 0 <= k <= len(x):
        raise ValueError(f"k = {k} of {len(x)} points")
    if not len(x):
        return torch.empty(0, dtype=torch.long, device=x.device), 0.0
    scale, picks = safe_scale(x, centers), []
    if scale != 1:
        x, centers = x * scale, centers * scale
    if not len(centers):
        centers = x.mean(0, keepdim=True)
        if k:
            picks = [int(nearest_distance(x, centers).argmin())]
            centers = x[picks]
    radius = pick_farthest(Bounds(x, centers), picks, k)
    return torch.tensor(picks, dtype=torch.long, device=x.device), max(radius, 0.0) / scale


def pick_farthest(state, picks, k):
    """Append to `picks` (which are among the centers already) until there are k. Returns the covering radius."""
    x, bound, n = state.points, state.bound, len(state.points)
    bound[picks] = -1.0  # a point that is taken is never the farthest
    size, tie = n if state.small else min(n, 32 + n // 512), None
    while True:  # the work set is sorted, so that the first maximum has the lowest index
        work = bound.topk(size).indices.sort().values if tie is None else torch.nonzero(bound == tie)[:, 0]
        rows, names, before = x if len(work) == n else x[work], work.tolist(), len(picks)
        state.refresh(work, rows)
        distance = bound[work]
        outside = float(bound.index_fill(0, work, -2.0).amax())
        if x.device.type != "cpu":  # which would be waited for at every pick
            distance = pick_unseen(distance, rows, outside, names, picks, k)
        while (farthest := float((found := distance.max(0)).values)) > outside:
            if len(picks) == k:  # the one that would come next is a covering radius away
                return farthest
            best = int(found.indices)
            picks.append(names[best])
            distance = torch.minimum(distance, direct(rows, rows[best : best + 1])[:, 0])
            distance[best] = -1.0
        bound[work] = distance
        state.centers = torch.cat([state.centers, x[picks[before:]]])
        state.seen[work] = len(state.centers)
        if len(picks) - before < 4:
            size = min(max(size, n // 16), 2 * size)  # a round costs too much for so few
        tie = farthest if len(picks) == before and farthest == outside else None  # then all who share it come in next


def pick_unseen(distance, rows, outside, names, picks, k, steps=64):
    """Append to `picks` the names of the farthest rows, as pick_farthest does, with one look at the device for `steps` of
    them; return the distances (W,) after them. A pick that is not farther than `outside` is none, and changes nothing."""
    while len(picks) < k:
        found = []
        for _ in range(min(steps, k - len(picks))):
            farthest, best = distance.max(0)
            after = torch.minimum(distance, direct(rows, rows[best[None]])[:, 0]).index_fill_(0, best, -1.0)
            distance = torch.where(farthest > outside, after, distance)
            found.append(torch.where(farthest > outside, best, -1))
        best = [i for i in torch.stack(found).tolist() if i >= 0]
        picks += [names[i] for i in best]
        if len(best) < len(found):
            break
    return distance


@dataclasses.dataclass
class Context:
    """What a strategy may know of a pool of P images, no label among it. A strategy needs only the fields that it
    speaks of; the others may be None. Only the embeddings may lie on a GPU. The generator is one of the CPU."""

    embeddings: torch.Tensor  # (P, D), the network's features, without augmentation
    probabilities: torch.Tensor  # (P, K)
    labelled: torch.Tensor  # (L,) int64, indices into the pool
    unlabelled: torch.Tensor  # (U,) int64, those that may be asked for
    generator: torch.Generator
    members: torch.Tensor | None = None  # (M, P, K), the ensemble's members each by itself
    sampled: torch.Tensor | None = None  # (V, P, K), Monte-Carlo dropout
    pull: float = 1.0  # precision of the last layer's Gaussian prior, see heads.fit

    def __post_init__(self):
        self.labelled = torch.as_tensor(self.labelled, dtype=torch.long)
        self.unlabelled = torch.as_tensor(self.unlabelled, dtype=torch.long)
        for name in ("embeddings", "probabilities", "members", "sampled"):
            if getattr(self, name) is not None:
                setattr(self, name, as_floats(getattr(self, name)))


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
    """Chance: what every other strategy has to beat."""
    return context.unlabelled[torch.randperm(len(context.unlabelled), generator=context.generator)[:k]]


def query_entropy(context, k):
    """Where the prediction is least sure (Lewis & Gale 1994)."""
    return highest(entropy(context.probabilities), context, k)


def margins(probabilities):
    """The lead (N,) of the likeliest class over the next."""
    return -probabilities.topk(2, 1).values.diff(dim=1)[:, 0]


def query_margin(context, k):
    """Where the likeliest class leads least (Scheffer et al. 2001). For two classes the order is that of the entropy."""
    return highest(-margins(context.probabilities), context, k)


def query_cluster_margin(context, k):
    """Cluster-Margin (Citovsky et al. 2021): of the ten times k smallest margins those that differ. In turn, one from
    each cluster, the smallest clusters first, of each the smallest margin. k-means of these stands for the original's
    hierarchical clustering of the whole pool."""
    least = highest(-margins(context.probabilities), context, 10 * k)
    cluster = k_means(F.normalize(context.embeddings[least], dim=1), min(k, len(least)), context.generator).cpu()
    turn = torch.stack(
        [(cluster[: i + 1] == c).sum() for i, c in enumerate(cluster)]
    )  # the first of its own, the second
    size = torch.bincount(cluster)[cluster]
    order = (turn * (len(least) + 1) + size).argsort(stable=True)
    return least[order[:k].to(least.device)]


def query_committee(context, k):
    """Query by committee (Seung et al. 1992): where the members differ, as the mean divergence from their consensus."""
    return highest(mutual_information(context.members), context, k)


def query_bald(context, k):
    """BALD (Houlsby et al. 2011; Gal et al. 2017): a committee drawn by dropout at prediction time."""
    return highest(mutual_information(context.sampled), context, k)


def query_laplace(context, k, most=2000):
    """The labels that are expected to settle the pool's answers most: the largest drop of their summed variance (Cohn et
    al. 1996) under the Laplace approximation of the last layer's posterior (MacKay 1992; Daxberger et al. 2021). Greedy:
    how much a label narrows the posterior does not depend on what it says, so that each pick is counted before the next.
    Of a larger pool `most` images are drawn, to be chosen from and to be settled."""
    drawn = torch.randperm(len(context.unlabelled), generator=context.generator)[:most].sort().values
    free, x, p = context.unlabelled[drawn], context.embeddings, context.probabilities
    known = x[context.labelled] if len(context.labelled) > 1 else x[free]
    x = (x - known.mean(0)) / (known - known.mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-12)
    x = (
        torch.cat([x, x.new_ones(len(x), 1)], 1).double() / context.pull**0.5
    )  # as heads.fit sees it, the prior's variance 1
    slope = (p * (1 - p)).sum(1).to(x).clamp(min=1e-4) / 2  # of a probability by its logit; of two classes p (1 - p)
    told, asked, noise = x[context.labelled], x[free], 1 / slope[context.labelled]
    covariance = asked @ asked.T
    if len(told):
        root = torch.linalg.cholesky(told @ told.T + noise.diag())
        half = torch.linalg.solve_triangular(root, told @ asked.T, upper=False)
        covariance -= half.T @ half
    weight, noise, picks = slope[free].square(), 1 / slope[free], []
    for _ in range(min(k, len(free))):
        gain = (weight @ covariance.square()) / (covariance.diagonal() + noise)
        gain[picks] = -1.0
        picks.append(int(gain.argmax()))
        own = covariance[picks[-1]]
        covariance = covariance - torch.outer(own, own) / (own[picks[-1]] + noise[picks[-1]])
    return free[picks]


def query_coreset(context, k):
    """CoreSet (Sener & Savarese 2018): the images that leave no other far from a labelled one."""
    x, free = context.embeddings, context.unlabelled
    return free[k_center_greedy(x[free], k, x[context.labelled])[0].cpu()]


def query_badge(context, k):
    """BADGE (Ash et al. 2020): spread out in the space of the gradients that the predicted labels would cause, where
    what is uncertain is long. The gradient of the last layer is (p - one-hot) x embedding; that product is never
    built, its inner products are products of inner products."""
    x = context.embeddings[context.unlabelled]
    p = context.probabilities[context.unlabelled].to(x.device)
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
    free = torch.arange(len(rows), device=rows.device) >= len(context.labelled)
    cluster = k_means(x, min(len(context.labelled) + k, len(rows)), context.generator).cpu()
    sizes = torch.bincount(cluster)
    labels = torch.bincount(cluster[~free], minlength=len(sizes))
    picks, known = [], {}  # known: a cluster's members, and each one's mean distance to its neighbours
    for _ in range(min(k, len(context.unlabelled))):
        empty = torch.bincount(cluster[free], minlength=len(sizes)) == 0
        rank = labels.double() - sizes / (len(rows) + 1)  # fewest labels, then largest
        chosen = int(rank.masked_fill(empty, math.inf).argmin())
        if chosen not in known:
            members = torch.nonzero(cluster == chosen)[:, 0]
            near, blocks = min(21, len(members)), x[members].split(1024)  # 21: a point is its own nearest
            away = torch.cat([torch.cdist(b, x[members]).topk(near, largest=False).values for b in blocks])
            known[chosen] = members, away.mean(1).cpu()
        members, away = known[chosen]
        best = members[away.masked_fill(~free[members], math.inf).argmin()]
        picks.append(int(best))
        free[best] = False
        labels[chosen] += 1
    return rows[picks]


QUERIES = (
    query_random, query_entropy, query_margin, query_cluster_margin, query_committee, query_bald, query_laplace,
    query_coreset, query_badge, query_typiclust,
)  # fmt: skip
STRATEGIES = {query.__name__.removeprefix("query_"): query for query in QUERIES}
COLD = ("random", "coreset", "typiclust")  # those that need no prediction, so they can choose the first labels


def spread(distance_to, first, k, generator):
    """k distinct indices, each drawn in proportion to its squared distance to those before it: the seeding of
    k-means++ (Arthur & Vassilvitskii 2007). distance_to(i): squared distances (N,) to point i."""
    picks, nearest = [first], distance_to(first).double().cpu()
    while len(picks) < k:
        nearest[picks] = 0
        weights = nearest
        if not weights.sum() > 0:  # only copies are left
            weights = torch.ones_like(nearest)
            weights[picks] = 0
        picks.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, distance_to(picks[-1]).double().cpu())
    return torch.tensor(picks[:k])


def k_means(x, k, generator, rounds=20):
    """Cluster (N,) of each point of x (N, D): Lloyd's algorithm from the seeding of k-means++."""
    square, nearest = x.square().sum(1), x.new_full((len(x),), math.inf)

    def distance_to(i):
        """Squared distances to point i; infinite where a product tells that one before it is nearer."""
        found = torch.full_like(nearest, math.inf)
        for rows in torch.nonzero(0.99 * (square + square[i]) - 2 * (x @ x[i]) < nearest)[:, 0].split(1024):
            found[rows] = (x[rows] - x[i]).square().sum(1)
        torch.minimum(nearest, found, out=nearest)
        return found

    centers, cluster = x[spread(distance_to, int(torch.randint(len(x), (1,), generator=generator)), k, generator)], None
    for _ in range(rounds):
        before, cluster = cluster, torch.cat([torch.cdist(block, centers).argmin(1) for block in x.split(4096)])
        if before is not None and torch.equal(before, cluster):  # nothing moves any more
            break
        count = torch.bincount(cluster, minlength=k)[:, None]
        total = torch.zeros_like(centers).index_add_(0, cluster, x)
        centers = torch.where(count > 0, total / count.clamp(min=1), centers)
    return cluster


def candidates(groups, labelled, k):
    """The pool's images (int64) that are worth asking for: one of each group that has no label yet, as the others show
    the same; all unlabelled ones when that leaves fewer than k. groups (P,), labelled (L,)."""
    fresh = ~torch.isin(groups, groups[labelled])
    _, member = torch.unique(groups, return_inverse=True)
    everyone = torch.arange(len(groups))
    first = torch.full((int(member.max()) + 1,), len(groups)).scatter_reduce(0, member, everyone, "amin")
    fresh &= first[member] == everyone
    if fresh.sum() < k:
        fresh = torch.ones(len(groups), dtype=torch.bool)
        fresh[labelled] = False
    return torch.nonzero(fresh)[:, 0]
