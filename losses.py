"""What is minimised: classification, self-distillation, evidence beside the point, and a detector of outlines and boxes.

    import torch
    from losses import classification_loss, distillation_loss
    logits, labels = torch.randn(8, 3), torch.randint(3, (8,))  # (N, K); one logit (N, 1) for two classes will do
    loss = classification_loss(logits, labels, smoothing=0.1)
    teacher = torch.randn(8, 3).softmax(1)  # probabilities, not logits
    loss = distillation_loss(logits, labels, teacher, alpha=0.5, temperature=3.0)

Logits in half precision are taken as float32. All boxes are x_min, y_min, x_max, y_max in [0, 1]."""

import torch
import torch.nn.functional as F


def two_logits(logits):
    """The logit (N, 1) of the positive class as two, (0, z), whose softmax is its sigmoid; (N, K) pass."""
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def cell_centres(h, w, device=None):
    """x (1, w) and y (h, 1) of a map's cell centres, in [0, 1]."""
    return (torch.arange(w, device=device)[None] + 0.5) / w, (torch.arange(h, device=device)[:, None] + 0.5) / h


def pooled(count, least):
    """What a sum is divided by to be a mean: the count (a tensor), `least` at least. Where torch.distributed trains in
    several processes, whose losses and gradients are averaged: the mean count, so that it is one over all their rows."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return count.clamp(min=least)
    torch.distributed.all_reduce(total := count.detach().clone())
    return total.clamp(min=least) / torch.distributed.get_world_size()


def classification_loss(logits, labels, weights=None, smoothing=0.0):
    """Mean cross-entropy: binary for one logit (N, 1), over classes for (N, K). labels (N,), -1 = not known: such a row
    has no part in the mean, and without any other it is 0.

    weights (K,): of each class. smoothing: share of the label spread over the classes (Szegedy et al. 2016)."""
    logits, known = logits.float(), labels >= 0
    share = known.float() if weights is None else weights[labels] * known
    if logits.shape[1] > 1:  # the sum: of a weighted and smoothed mean torch would pick rows, and a GPU be waited for
        loss = F.cross_entropy(logits, labels, weights, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
    else:
        target = labels.float() * (1 - smoothing) + smoothing / 2
        loss = (F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none") * share).sum()
    return loss / pooled(share.sum(), 1e-12)


def class_weights(labels, classes, pos_weight):
    """(K,) weights of the loss, or None for "none". "auto": inverse frequency; a number: that of the last (positive)
    class against the others."""
    if pos_weight == "none":
        return None
    if pos_weight == "auto":
        counts = torch.bincount(labels, minlength=classes).float().clamp(min=1)  # a class not there weighs no more
        return counts.sum() / (classes * counts)
    return torch.cat([torch.ones(classes - 1), torch.tensor([float(pos_weight)])])


def distillation_loss(logits, labels, teacher, alpha, temperature, weights=None, smoothing=0.0):
    """alpha * cross-entropy + (1 - alpha) * T^2 * KL(teacher || student), both softened by T (Hinton et al. 2015).

    logits (N, 1) or (N, K) of the student; labels (N,), -1 where only the teacher knows; teacher (N, K) its
    PROBABILITIES (2 columns beside one logit), softened here to p^(1/T). T^2 keeps the gradient's size whatever T is.
    weights and smoothing: of the labels' part alone. Raises ValueError where the teacher has another shape, and, on the
    CPU (a GPU would have to be waited for), where its rows are not probabilities."""
    check_teacher(teacher, (len(logits), max(2, logits.shape[1])))
    teacher = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    soft = ((teacher + 1e-12).log() / temperature).softmax(1)
    student = (two_logits(logits.float()) / temperature).log_softmax(1)
    apart = F.kl_div(student, soft, reduction="sum") / pooled(torch.full((), len(logits), device=logits.device), 1)
    loss = (1 - alpha) * temperature**2 * apart
    return loss + alpha * classification_loss(logits, labels, weights, smoothing) if alpha > 0 else loss


def check_teacher(teacher, shape):
    """ValueError unless the teacher's answers are probabilities of this shape (N, K)."""
    if tuple(teacher.shape) != shape:
        raise ValueError(f"teacher of shape {tuple(teacher.shape)}: give its probabilities {shape}, one column a class")
    if teacher.device.type == "cpu":
        good = (teacher >= 0).all(1) & ((teacher.sum(1) - 1).abs() < 0.01)  # so written, NaN is refused too
        if not good.all():
            i = int((~good).nonzero()[0])
            values = ", ".join(f"{v:g}" for v in teacher[i].tolist()[:8])
            raise ValueError(f"teacher's row {i} is ({values}): give probabilities that sum to 1; logits: .softmax(1)")


def evidence_loss(logits, images, beside):
    """How much evidence lies where none should be, as a multiple of what as large a part of the picture would get by
    chance, 1 = as much as anywhere: a network is to be right for the right reasons.

    logits (N, 1) or (N, K), computed from images (N, C, H, W) that require a gradient; beside (N, H, W) in [0, 1], 1 =
    beside the point; an image without any such place has no part in the mean. The evidence is the squared gradient of
    the summed log-probabilities (of one logit: of itself) by the pixels, as in Ross et al., Right for the Right Reasons,
    2017. They penalise its sum, which shrinks wherever all gradients do, and is small for a small place; this asks only
    for another place, and weighs a letter like a margin (a place below a hundredth of the picture like a hundredth)."""
    score = logits.float().sum() if logits.shape[1] == 1 else logits.float().log_softmax(1).sum()
    with torch.autocast(images.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    evidence, area = gradient.float().square().sum(1), beside.float().mean((1, 2))
    share = (evidence * beside).sum((1, 2)) / evidence.sum((1, 2)).clamp(min=1e-12)
    return (share / area.clamp(min=0.01)).sum() / pooled((area > 0).float().sum(), 1)


def box_loss(predicted, true):
    """Loss (N,) of boxes (N, 4): smooth L1, a gentle pull near the right place, + GIoU (Rezatofighi et al. 2019),
    which knows the direction from afar. As torchvision's, which picks rows by a mask: a GPU would be waited for."""
    near = F.smooth_l1_loss(predicted, true, beta=0.05, reduction="none").mean(1)
    (x1, y1, x2, y2), (u1, v1, u2, v2) = predicted.unbind(1), true.unbind(1)
    width, height = torch.min(x2, u2) - torch.max(x1, u1), torch.min(y2, v2) - torch.max(y1, v1)
    both = torch.where((width > 0) & (height > 0), width * height, 0.0)
    either = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - both
    hull = (torch.max(x2, u2) - torch.min(x1, u1)) * (torch.max(y2, v2) - torch.min(y1, v1))
    return 4 * near + (1 - (both / (either + 1e-7) - (hull - either) / (hull + 1e-7)))


def detection_loss(logits, cells, outlines, boxes):
    """Loss of a detector whose every cell tells whether it is lesion, and where the lesion's sides are.

    logits (N, h, w) of the outline; cells (N, 4, h, w), a box from every cell; outlines (N, h, w), the share of each
    cell that is lesion, NaN where that is not known: such an image teaches nothing; boxes (N, 4), NaN where not known.
    The outline by cross-entropy and, where there is a lesion, Dice (Milletari et al. 2016); the boxes by the cells inside
    the lesion."""
    known = outlines.flatten(1).isfinite().all(1)
    target = torch.where(known[:, None, None], outlines, 0.0)
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
    p, area = logits.sigmoid(), target.sum((1, 2))
    dice = 1 - (2 * (p * target).sum((1, 2)) + 1) / (p.sum((1, 2)) + area + 1)
    outline = ((cross + dice * (area > 0)) * known).sum() / pooled(known.sum(), 1)

    n, _, h, w = cells.shape
    boxed = boxes[:, 0].isfinite() & known
    true = torch.where(boxed[:, None], boxes, 0.5)
    inside = target * boxed[:, None, None] / area[:, None, None].clamp(min=1e-6)
    each = box_loss(cells.flatten(2).mT.reshape(-1, 4), true.repeat_interleave(h * w, 0)).view(n, h, w)
    return outline + (each * inside).sum() / pooled(boxed.sum(), 1)


def ellipses(boxes, h, w, grown=1.0):
    """Outlines (N, h, w), 1 inside, of the ellipses inscribed in boxes (N, 4), `grown` times as long and wide: what stands
    for a mask where only a box is known. A box of NaN gives none."""
    x, y = cell_centres(h, w, boxes.device)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = ((boxes[:, 2:] - boxes[:, :2]) * (grown / 2)).clamp(min=0.5 / max(h, w))
    across = ((x - centre[:, 0, None, None]) / half[:, 0, None, None]) ** 2
    return (across + ((y - centre[:, 1, None, None]) / half[:, 1, None, None]) ** 2 <= 1).float()
