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
import torch.distributed as dist
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


def blocks(x, scale=1.0):
    """The points x (N, D) as floats, times `scale`, in blocks that stay in the cache: x may lie in a file."""
    for block in map(as_floats, x.split(max(64, 2**19 // max(x.shape[1], 1)))):
        yield block if scale == 1 else block * scale


def largest(x):
    """The largest absolute value of x (N, D), 0 where there is none; NaN where one is."""
    most = x.new_zeros((), dtype=torch.double if x.dtype == torch.double else torch.float)
    for low, high in (block.aminmax() for block in blocks(x) if block.numel()):
        most = torch.maximum(most, torch.maximum(-low, high))
    return float(most)


def safe_scale(most, kind, dimensions):
    """The power of two by which to multiply so that no square overflows or vanishes: 1, except for extreme values."""
    limits = torch.finfo(kind)
    if not most or limits.tiny**0.5 / limits.eps < most < (limits.max / dimensions) ** 0.5 / 8:
        return 1.0
    end = round(-math.log2(limits.tiny))  # a larger power would be infinite itself
    return 2.0 ** max(-end, min(end, -math.floor(math.log2(most))))


def share(values, sharded, device="cpu"):
    """These numbers of every rank (R, n) float64, in the order of the ranks; without ranks one row."""
    values = torch.as_tensor(values, dtype=torch.double)
    if not sharded:
        return values[None]
    values = values.to(device if dist.get_backend() == "nccl" else "cpu")
    table = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(table, values)
    return torch.stack(table)


class Bounds:
    """Of each of N points an upper bound on its distance to the nearest center, made exact where it is asked for. The
    points may lie in a file: they are read once, by blocks, and then the few that are asked for."""

    def __init__(self, points, centers, mean, scale):
        n, d = points.shape
        self.points, self.centers, self.mean, self.scale = points, centers, mean, scale
        self.square, self.bound = mean.new_empty(n), mean.new_empty(n)
        self.seen = torch.zeros(n, dtype=torch.int32, device=mean.device)  # how many centers each bound has heard of
        about = centers - mean  # about the mean, where a product rounds least
        step = max(64, 2**17 // max(d, len(centers)))  # a block stays in the cache
        for part in (slice(start, start + step) for start in range(0, n, step)):
            found = self.rows(part)
            rows = found - mean
            self.square[part] = rows.square().sum(1)
            nearest = torch.addmm(about.square().sum(1), rows, about.T, alpha=-2).argmin(1)  # as the product sees it
            self.bound[part] = direct(found[:, None], centers[nearest, None])[:, 0, 0]

    def rows(self, index):
        rows = as_floats(self.points[index])
        return rows if self.scale == 1 else rows * self.scale

    def refresh(self, index, rows):
        """Make the bounds of these points exact. One matrix product, a hundredth taken off for its rounding, tells which
        of the centers that they missed can be nearer than the bound at all; only these few are measured."""
        stale = self.seen[index] < len(self.centers)
        if not stale.any():
            return
        if not stale.all():
            index, rows = index[stale], rows[stale]
        missed = self.centers[int(self.seen[index].min()) :]
        step = max(64, 2**22 // min(len(missed), 1024))
        for index, rows in zip(index.split(step), rows.split(step), strict=True):  # noqa: B020
            for centers in missed.split(1024):
                self.compare(index, rows, centers)
            self.seen[index] = len(self.centers)

    def compare(self, index, rows, centers):
        about = centers - self.mean
        product = (rows - self.mean) @ about.T
        at_least = 0.99 * (self.square[index][:, None] + about.square().sum(1)) - 2 * product
        pairs = torch.nonzero(at_least < self.bound[index].square()[:, None])
        if len(pairs) > at_least.numel() / 4:  # many copies, say: cheaper all at once
            self.bound[index] = torch.minimum(self.bound[index], nearest_distance(rows, centers))
            return
        for i, j in (block.T for block in pairs.split(4096)):
            self.bound.scatter_reduce_(0, index[i], direct(rows[i, None], centers[j, None])[:, 0, 0], "amin")


def k_center_greedy(embeddings, k, centers=None, sharded=False):
    """Greedy k-center (Gonzalez 1985), the selection of CoreSet (Sener & Savarese, ICLR 2018): exact, and on a CPU below
    its floor of k passes over the matrix.

    embeddings: (N, D), also memory-mapped from a file larger than memory; centers: (M, D), what is labelled already, or
    None: then the point nearest to the mean comes first. Returns the k distinct indices (int64, on the device of
    `embeddings`) in the order picked, ties to the lowest index, and the covering radius: the largest distance of a point
    to its nearest center or pick. Extra memory O(N + (M + k) D), and no more than 128 MB of rows. ValueError if k > N,
    a value is not finite or the shapes do not fit.

    sharded: `embeddings` are this rank's rows of a torch.distributed group, which may be none; k and centers are the
    same on every rank. Every rank gets the same picks, those of all rows in the order of the ranks in one matrix; its
    indices count through them. Per pick each rank sends its farthest point, D + 2 numbers, and nothing else.

    The distance to the nearest center only shrinks as picks are added, so an old distance is an upper bound. We keep
    the few farthest points up to date and pick among them as long as the best of them is above every bound outside;
    only then the next few are brought up to date, with all picks that they missed at once (lazy greedy, Minoux 1978).
    On a GPU, where a pass costs less than to choose among the points, a pass a pick, and nothing waits for the device."""
    x = torch.as_tensor(embeddings).detach()
    kind = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    centers = x[:0] if centers is None or not len(centers) else as_floats(centers)
    if x.dim() != 2 or centers.dim() != 2 or centers.shape[1] != x.shape[1]:
        raise ValueError(f"embeddings {tuple(x.shape)}, centers {tuple(centers.shape)}: must be (N, D) and (M, D)")
    centers, (n, d) = centers.to(x.device, kind), x.shape
    same = [k, d, torch.finfo(kind).bits, len(centers), float(centers.cpu().double().mul(2.0**-60).sum())]
    told = share([n, largest(x), largest(centers), *same], sharded, x.device)
    if not told.isfinite().all():
        raise ValueError("embeddings or centers hold NaN or infinity: leave those rows out")
    if (told[:, 3:] != told[0, 3:]).any():
        raise ValueError("k, D, the type and the centers: must be the same on every rank")
    counts, rank = told[:, 0].long(), dist.get_rank() if sharded else 0
    if not 0 <= k <= counts.sum():
        raise ValueError(f"k = {k} of {counts.sum()} points")
    if not counts.sum():
        return torch.empty(0, dtype=torch.long, device=x.device), 0.0
    scale = safe_scale(float(told[:, 1:3].max()), kind, d)
    wide = torch.float if x.device.type == "mps" else torch.double  # so that shards sum to the bits of the whole
    sums = sum((block.sum(0, dtype=wide) for block in blocks(x, scale)), x.new_zeros(d, dtype=wide))
    mean = (share(sums.cpu(), sharded, x.device).sum(0) / counts.sum()).to(x.device, kind)
    if sharded or (x.device.type == "cpu" and n * d >= 2**17):  # of fewer, a pass costs less than choosing among them
        first = int(counts[:rank].sum())
        picks, radius = pick_lazily(x, k, centers * scale, mean, scale, first, sharded)
    else:
        picks, radius = pick_plainly(as_floats(x) * scale if scale != 1 else as_floats(x), k, centers * scale, mean)
    return picks, max(radius, 0.0) / scale


def pick_plainly(x, k, centers, mean):
    """A pass over all points a pick. Returns the picks (k,) and the covering radius; no pick is read from the device."""
    picks, distance = [], nearest_distance(x, centers if len(centers) else mean[None])
    for _ in range(k):
        if picks or len(centers):
            pick = distance.argmax(keepdim=True)
        else:
            pick, distance = distance.argmin(keepdim=True), torch.full_like(distance, math.inf)
        distance = torch.minimum(distance, direct(x, x[pick])[:, 0]).index_fill_(0, pick, -1.0)
        picks.append(pick)
    return torch.cat([torch.empty(0, dtype=torch.long, device=x.device), *picks]), float(distance.amax())


def farthest_of_all(distance, index, row, sharded):
    """Of every rank's farthest point, its distance, index and row (1, D), the farthest; the lowest rank's of equal ones."""
    if not sharded:
        return distance, index, row
    table = share([distance, index, *row[0].tolist()], True, row.device)
    best = table[int(table[:, 0].argmax())]
    return float(best[0]), int(best[1]), best[None, 2:].to(row)


def pick_lazily(x, k, centers, mean, scale, offset, sharded):
    """As pick_plainly, of points x whose first has the index `offset` among those of all ranks, see k_center_greedy."""
    picks, taken = [], [] if len(x) else [0]
    x = x if len(x) else x.new_zeros(1, x.shape[1])  # a rank without rows takes part with a point that is taken
    n, most, tie = len(x), max(1024, 2**25 // x.shape[1]), None
    if not len(centers):
        centers = mean[None]
        if k:
            away = torch.cat([nearest_distance(block, centers) for block in blocks(x, scale)])
            away[taken] = math.inf
            best = int(away.argmin())
            row = as_floats(x[best : best + 1]) * scale
            _, pick, centers = farthest_of_all(-float(away[best]), offset + best, row, sharded)
            picks.append(pick)
            taken += [pick - offset] if offset <= pick < offset + n else []
    state = Bounds(x, centers, mean, scale)
    bound = state.bound
    bound[taken] = -1.0  # a point that is taken is never the farthest
    size = min(n, 32 + n // 512, most)
    while True:  # the work set is sorted, so that the first maximum has the lowest index
        work = bound.topk(size).indices.sort().values if tie is None else torch.nonzero(bound == tie)[:size, 0]
        rows = state.rows(work)
        state.refresh(work, rows)
        distance, before, new = bound[work], len(picks), []
        bound[work] = -2.0
        outside = float(bound.amax())
        while True:
            farthest, best = (v.item() for v in distance.max(0))
            index = int(work[best])
            if farthest < outside or (farthest == outside and index > int(bound.argmax())):
                break  # it may be one of those outside
            value, pick, row = farthest_of_all(farthest, offset + index, rows[best : best + 1], sharded)
            if len(picks) == k:  # the one that would come next is a covering radius away
                return torch.tensor(picks, dtype=torch.long, device=x.device), value
            picks.append(pick)
            new.append(row)
            distance = torch.minimum(distance, direct(rows, row)[:, 0])
            if pick == offset + index:
                distance[best] = -1.0
        bound[work] = distance
        if new:
            state.centers = torch.cat([state.centers, *new])
            state.seen[work] = len(state.centers)
        if len(picks) - before < 4:
            size = min(n, most, max(size, min(n // 16, 2 * size)))  # a round costs too much for so few
        tie = farthest if len(picks) == before and farthest == outside else None  # then those who share it come in next


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
    return context.unlabelled[order[:k].cpu()]


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
    )  # of its cluster the first, second ...
    size = torch.bincount(cluster)[cluster]
    order = (turn * (len(least) + 1) + size).argsort(stable=True)
    return least[order[:k].to(least.device)]


def query_committee(context, k):
    """Query by committee (Seung et al. 1992): where the members differ, as the mean divergence from their consensus."""
    return highest(mutual_information(context.members), context, k)


def query_bald(context, k):
    """BALD (Houlsby et al. 2011; Gal et al. 2017): a committee drawn by dropout at prediction time."""
    return highest(mutual_information(context.sampled), context, k)


def query_laplace(context, k, most=1000):
    """The labels that are expected to settle the pool's answers most: the largest drop of their summed variance (Cohn et
    al. 1996) under the Laplace approximation of the last layer's posterior (MacKay 1992; Daxberger et al. 2021). Greedy:
    how much a label narrows the posterior does not depend on what it says, so that each pick is counted before the next.
    Of a larger pool `most` images are drawn, to be chosen from and to be settled."""
    drawn = torch.randperm(len(context.unlabelled), generator=context.generator)[:most].sort().values
    free, x, p = context.unlabelled[drawn], context.embeddings, context.probabilities
    known = x[context.labelled] if len(context.labelled) > 1 else x[free]
    mean, spread = known.mean(0), (known - known.mean(0)).square().sum(1).mean().sqrt()
    x = (x - mean) / torch.maximum(spread, 0.01 * mean.norm()).clamp(min=1e-12)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1).double() / context.pull**0.5  # as heads.fit sees it, its prior 1
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
    x, p = context.embeddings[context.unlabelled], context.probabilities[context.unlabelled]
    p = p.to(x.device)
    a = p - F.one_hot(p.argmax(1), p.shape[1])
    square = a.square().sum(1) * x.square().sum(1)

    def distance_to(i):
        return (square + square[i] - 2 * (a @ a[i]) * (x @ x[i])).clamp(min=0)

    return context.unlabelled[spread(distance_to, int(square.argmax()), k, context.generator)]


MOST_CLUSTERS = 500  # of TypiClust, as in its authors' own program: what k-means costs grows with them
MOST_MEMBERS = 10_000  # of a cluster among which neighbours are looked for: that cost grows with the square


def query_typiclust(context, k):
    """TypiClust (Hacohen et al. 2022), made for few labels: as many clusters as there will be labels (500 at most); from
    the largest clusters without a label the most typical image, whose 20 nearest neighbours in the cluster are nearest.
    Of a cluster of more than 10,000 images so many are drawn, and stand for it."""
    rows = torch.cat([context.labelled, context.unlabelled])
    x = F.normalize(context.embeddings[rows], dim=1)
    free = torch.arange(len(rows), device=rows.device) >= len(context.labelled)
    cluster = k_means(x, min(len(context.labelled) + k, len(rows), MOST_CLUSTERS), context.generator).cpu()
    sizes = torch.bincount(cluster)
    labels = torch.bincount(cluster[~free], minlength=len(sizes))
    picks, known = [], {}  # known: a cluster's members, and each one's mean distance to its neighbours
    for _ in range(min(k, len(context.unlabelled))):
        empty = torch.bincount(cluster[free], minlength=len(sizes)) == 0
        rank = labels.double() - sizes / (len(rows) + 1)  # fewest labels, then largest
        chosen = int(rank.masked_fill(empty, math.inf).argmin())
        if chosen not in known or not free[known[chosen][0]].any():
            members = torch.nonzero(cluster == chosen)[:, 0]
            if len(members) > MOST_MEMBERS:
                members = members[free[members]]
                members = members[torch.randperm(len(members), generator=context.generator)[:MOST_MEMBERS]]
            own, near = x[members], min(21, len(members))  # 21: a point is its own nearest
            away = torch.cat([torch.cdist(b, own).topk(near, largest=False).values for b in own.split(1024)])
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

    def away(i):
        found = distance_to(i)
        return (found if found.is_cuda else found.cpu()).double()

    picks, nearest = [first], away(first)
    while len(picks) < k:
        nearest[picks] = 0
        weights = nearest
        if not weights.sum() > 0:  # only copies are left
            weights = torch.ones_like(nearest)
            weights[picks] = 0
        picks.append(draw(weights, generator))
        nearest = torch.minimum(nearest, away(picks[-1]))
    return torch.tensor(picks[:k])


def draw(weights, generator):
    """An index in proportion to the weights (N,) float64 on any device; the generator is one of the CPU."""
    if weights.device.type == "cpu" and len(weights) <= 2**24:  # multinomial takes no more
        return int(torch.multinomial(weights, 1, generator=generator))
    below = weights.cumsum(0)
    goal = torch.rand(1, dtype=torch.double, generator=generator).to(below.device) * below[-1]
    return min(int(torch.searchsorted(below, goal, right=True)), len(weights) - 1)


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
