"""Which images belong together, and splits that divide no group: near-duplicates, merged groups, a stratified partition.

Needs only torch. Of any number of images; what is called linear takes minutes for a million.

    import torch, grouping
    thumbs = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8)  # of the whole pictures, squashed
    thumbs[7] = thumbs[3].flip(2)  # mirrored
    pairs = grouping.near_duplicates(thumbs)  # [[3, 7]]
    group = grouping.merge_groups(torch.arange(50), pairs)
    part = grouping.partition(torch.arange(50) % 2, group, [0.7, 0.1, 0.2], seed=0)  # 0, 1 or 2 of each image"""

import torch
import torch.nn.functional as F

MOST_COMPARED = 20_000  # images of which each is compared with each: that cost grows with the square


def near_duplicates(thumbnails, progress=lambda items, what, total: items):
    """Pairs (P, 2) of images that show the same picture, indices i < j. thumbnails: uint8 (N, 1, T, T), see thumbnail.

    Two look alike if their thumbnails, one of them perhaps mirrored, correlate by 0.95, and are the same if their fine
    features, laid upon each other, do so by 0.8. Measured on HAM10000, where most pictures are a dark spot on skin: of
    2,737 pairs that look alike 124 are of one lesion; 278 have the same fine features, 113 of them of one lesion; the
    largest group falls from 675 images to 60. On BUSI 4 of 166 pairs go: one of two patients, three of one lesion in
    another moment. Features of larger thumbnails (32 and 48 px) did not tell the pairs apart any better. Of more than
    20,000 images only those are compared whose hashes are near, see hashed_look_alikes. progress: passes its items on, and
    may tell how far they are. ValueError if the thumbnails are of another shape."""
    if thumbnails.ndim != 4 or thumbnails.shape[1] != 1 or thumbnails.shape[2] != thumbnails.shape[3]:
        raise ValueError(
            f"thumbnails {tuple(thumbnails.shape)}: must be (N, 1, T, T), each picture squashed into a square"
        )
    pairs, mirrored = (look_alikes if len(thumbnails) <= MOST_COMPARED else hashed_look_alikes)(thumbnails)
    same = [torch.zeros(0, dtype=torch.bool)]
    parts = list(zip(pairs.split(64), mirrored.split(64), strict=True))
    for part, turned in progress(parts, "comparing, 64 pairs each", len(parts)):
        a, b = (fine_features(thumbnails[rows]) for rows in part.T)
        b = torch.where(turned[:, None, None], b.flip(2), b)
        same.append(torch.maximum(aligned_similarity(a, b), aligned_similarity(b, a)) >= 0.8)
    return pairs[torch.cat(same)]


def look_alikes(thumbnails, threshold=0.95):
    """Pairs (P, 2), i < j, whose thumbnails, one of them perhaps mirrored, correlate by `threshold`, and whether they do
    so better mirrored (P,). Costs N^2 / 2 correlations, in blocks."""
    thumbs = thumbnails.float() - thumbnails.float().mean((2, 3), keepdim=True)
    flipped = F.normalize(thumbs.flip(3).flatten(1), dim=1)
    thumbs = F.normalize(thumbs.flatten(1), dim=1)
    pairs, mirrored = [], []
    for start in range(0, len(thumbs), 2048):
        block = thumbs[start : start + 2048]
        straight, turned = block @ thumbs[start:].T, block @ flipped[start:].T
        i, j = torch.nonzero(torch.maximum(straight, turned).triu(1) >= threshold, as_tuple=True)
        pairs.append(torch.stack([i + start, j + start], 1))
        mirrored.append((turned > straight)[i, j])
    return torch.cat(pairs), torch.cat(mirrored)


def hashed_look_alikes(thumbnails, threshold=0.95, rounds=32, width=128, most=32):
    """As look_alikes, of any number of images in linear time, but a pair may be missed, and of a picture that hundreds look
    like only the `most` best pairs are kept. RESULTS.md tells what is missed.

    The hash of an image tells which of its 7 x 7 blocks are brighter than in half of the images: signs of projections
    (Charikar 2002). Images are sorted by their hashes, and each is compared with the `width` at least that come next. A
    pair may differ in the first bits, so each round takes them in another order; and each turns all images to the side
    that another random pattern says, so that the mirrored come to lie beside the straight ones."""
    n, generator, found = len(thumbnails), torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.long)
    blocks = torch.cat([F.adaptive_avg_pool2d(part.float(), 7).flatten(1) for part in thumbnails.split(4096)])
    blocks = F.normalize(blocks - blocks.mean(1, keepdim=True), dim=1)
    columns, mirror = blocks.T.contiguous(), torch.arange(49).view(7, 7).flip(1).flatten()
    for _ in range(rounds):
        pattern = torch.randn(49, generator=generator)
        turned, key, parts = blocks @ (pattern - pattern[mirror]) < 0, torch.zeros(n, dtype=torch.long), [found]
        for bit in torch.randperm(49, generator=generator)[:32].tolist():
            value = torch.where(turned, columns[mirror[bit]], columns[bit])
            key = 2 * key + (value > value.median())
        order = key.argsort()
        for start in range(0, n, 64 * width):  # so many at once: an operation has its price
            rows = order[start : start + 65 * width]
            x = torch.where(turned[rows, None], blocks[rows][:, mirror], blocks[rows])
            x = F.pad(x, (0, 0, 0, 65 * width - len(rows)))
            near = (x[:-width].view(64, width, 49) @ x.unfold(0, 2 * width, width)).triu(1).flatten(0, 1)
            i, j = torch.nonzero(near >= threshold - 0.02, as_tuple=True)  # coarse is more alike than fine
            if len(i) > most * len(rows):  # thousands alike
                best = near.topk(most)
                i, place = torch.nonzero(best.values >= threshold - 0.02, as_tuple=True)
                j = best.indices[i, place]
            i, j = torch.stack([rows[i], rows[i // width * width + j]]).sort(0).values
            parts.append(i * n + j)
        found = torch.cat(parts).unique()
    pairs, scores = torch.stack([found // n, found % n], 1), [torch.zeros(2, 0)]
    for part in pairs.split(4096):
        a, b = (F.normalize(t - t.mean((1, 2), keepdim=True), dim=(1, 2)) for t in thumbnails[part.T, 0].float())
        scores.append(torch.stack([(a * b).sum((1, 2)), (a * b.flip(2)).sum((1, 2))]))
    straight, turned = torch.cat(scores, 1)
    score = torch.maximum(straight, turned)
    kept = among_best(pairs, score, most) & (score >= threshold)
    return pairs[kept], (turned > straight)[kept]


def among_best(pairs, score, most):
    """Whether each of the pairs (P, 2) is one of the `most` of the best score (P,) of either of its images: (P,) bool."""
    order = score.argsort(descending=True)
    ends = pairs[order].flatten()
    by_image = ends.argsort(stable=True)  # and of each image the best first
    first = torch.searchsorted(ends[by_image].contiguous(), ends[by_image].contiguous())
    few = torch.zeros(len(ends), dtype=torch.bool)
    few[by_image] = torch.arange(len(ends)) - first < most
    return torch.zeros(len(pairs), dtype=torch.bool).index_copy(0, order, few.view(-1, 2).any(1))


def fine_features(thumbnails):
    """(N, T, T): each pixel less the mean of the 5 x 5 around it, over the spread there, so that what thousands of
    pictures share (the rim of a lens, skin that darkens to the edge) counts no more than any other place."""

    def around(x):
        return F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)

    fine = thumbnails.float() - around(thumbnails.float())
    return (fine / (around(fine.square()).sqrt() + 3))[:, 0]  # 3 grey levels: where nothing is, no noise is enlarged


def aligned_similarity(a, b):
    """Cosine (P,) of the images a (P, T, T) and of b, stretched and moved so that it fits best: of one picture that was
    cut in two ways, a tenth at each side, all features lie elsewhere. Rows and columns are fitted in turns, twice."""
    size, ends = a.shape[-1], torch.arange(-3, 4)
    place, (low, high) = torch.arange(size), torch.cartesian_prod(ends, ends).T[:, :, None]
    source = (low + place * (1 + (high - low) / (size - 1))).clamp(0, size - 1)  # low, high: what either end moves by
    stretches = (1 - (source[..., None] - place).abs()).clamp(min=0)  # (49, T, T), of linear interpolation
    for _ in range(4):
        stretched = stretches @ b[:, None]
        similarity, best = F.cosine_similarity(a[:, None].flatten(2), stretched.flatten(2), dim=2).max(1)
        b = torch.gather(stretched, 1, best[:, None, None, None].expand(-1, 1, size, size))[:, 0]
        a, b = a.transpose(1, 2), b.transpose(1, 2)
    return similarity


def merge_groups(groups, pairs):
    """Give both images of every pair one group (union-find). groups: int64 (N,); returns the same, numbered from 0."""
    parent = list(range(int(groups.max()) + 1)) if len(groups) else []

    def root(g):
        while parent[g] != g:
            parent[g] = g = parent[parent[g]]
        return g

    groups = groups.tolist()
    for i, j in pairs.tolist():
        a, b = root(groups[i]), root(groups[j])
        parent[max(a, b)] = min(a, b)
    return torch.unique(torch.tensor([root(g) for g in groups], dtype=torch.long), return_inverse=True)[1]


def partition(labels, groups, shares, seed):
    """Divide images into parts of the given shares: int64 (N,), the part of each. Stratified, and no group is split.

    Groups are dealt the largest first, each to the part that then lacks most of its classes; those whose sizes are alike
    (to a factor of 2) in random order. By the very size, the seed would move hardly a group: the parts of two seeds
    shared 41 % of the IDC images where chance gives 20 %."""
    shares = torch.tensor(shares, dtype=torch.double) / sum(shares)
    kinds, labels = torch.unique(labels, return_inverse=True)
    names, groups = torch.unique(groups, return_inverse=True)
    target = shares[:, None] * torch.bincount(labels, minlength=len(kinds))
    generator, sizes = torch.Generator().manual_seed(seed), torch.bincount(groups)
    order, ties = torch.randperm(len(names), generator=generator), 1e-6 * torch.rand(target.shape, generator=generator)
    order = order[torch.argsort(sizes[order].double().log2().floor(), descending=True, stable=True)]
    cells, held = torch.unique(
        groups * len(kinds) + labels, return_counts=True
    )  # sorted: a group's classes side by side
    ends = torch.searchsorted(cells, len(kinds) * torch.arange(len(names) + 1)).tolist()
    kind, held, part = (cells % max(len(kinds), 1)).tolist(), held.tolist(), [0] * len(names)
    lack = (target / target.clamp(min=1e-9) + ties).tolist()  # relative, so that small parts get theirs
    target, ties, filled = target.tolist(), ties.tolist(), torch.zeros_like(target).tolist()
    for g in order.tolist():  # numbers of Python: of a million groups each would cost three operations of torch
        own = range(ends[g], ends[g + 1])
        wanted = [sum([row[kind[c]] for c in own]) for row in lack]
        part[g] = p = wanted.index(max(wanted))
        for c in own:
            k = kind[c]
            filled[p][k] += held[c]
            lack[p][k] = (target[p][k] - filled[p][k]) / max(target[p][k], 1e-9) + ties[p][k]
    return torch.tensor(part, dtype=torch.long)[groups]
