"""A last layer learnt on frozen embeddings, pulled towards an old one: what 60 labels of a new hospital can teach. Needs
only torch.

    import torch, heads
    x, labels = torch.randn(60, 1280), torch.arange(60) % 2
    head = heads.fit(x, labels)                      # (weight (1, 1280), bias (1,)), from nothing
    head = heads.fit(x, labels, start=head)          # from a layer that others taught
    p = heads.probabilities(x, head)                 # (60, 2)

One logit for two classes, as C-Net has it, else one a class. The fit is convex: it takes no seed, no learning rate, no
epochs, and milliseconds."""

import torch
import torch.nn.functional as F

STRENGTH = 0.1  # of the pull, see fit


def fit(embeddings, targets, start=None, classes=2, strength=STRENGTH, weights=None):
    """Logistic regression with a Gaussian prior around an old layer (Chelba & Acero 2004; Li et al., L2-SP, 2018):
    minimises sum_i weights_i CE(logits_i, target_i) + strength / 2 |change|^2, in embeddings about their mean that have
    a mean square of 1 (less where all but agree), so that a strength means the same whatever the network. As it is fixed
    in total, few labels change little, and many as much as they want to.

    embeddings: (..., N, D) float, of one network or of several, each with a fit of its own; targets: (N,) labels, or
    (N, K) soft ones; start: (weight (..., K', D), bias (..., K')), None = zeros; K' = 1 for two classes, else K.
    weights (N,): of the rows, 1 if None. Returns (weight, bias), float64. ValueError where something does not fit.

    The change lies in the span of the N embeddings: where they are fewer than D it is sought there."""
    x = torch.as_tensor(embeddings).detach().double()
    t, (n, d), outputs = torch.as_tensor(targets, device=x.device), x.shape[-2:], 1 if classes == 2 else classes
    if len(t) != n or not n or (t.dim() == 2 and t.shape[1] != classes):
        wanted = f"must be (N, D) and (N,) or (N, {classes})"
        raise ValueError(f"embeddings {tuple(x.shape)}, targets {tuple(t.shape)}: {wanted}")
    if not strength > 0 or not x.isfinite().all():
        raise ValueError("strength must be above 0, and embeddings finite")
    t = (F.one_hot(t.long(), classes) if t.dim() == 1 else t).double()
    t = t if weights is None else t * torch.as_tensor(weights).to(x)[:, None]
    old, old_bias = start or (x.new_zeros(*x.shape[:-2], outputs, d), x.new_zeros(*x.shape[:-2], outputs))
    old, old_bias = old.detach().to(x), old_bias.detach().to(x)

    mean = x.mean(-2, keepdim=True)
    scale = (x - mean).square().sum(-1).mean(-1).sqrt()
    # copies of one picture differ by rounding alone, which is nothing to learn from
    scale = torch.maximum(scale, 0.01 * mean.norm(dim=-1)[..., 0]).clamp(min=1e-12)[..., None, None]
    features = torch.cat([(x - mean) / scale, torch.ones_like(x[..., :1])], -1)  # the last: the bias, pulled alike
    root = features
    if few := n <= d:  # R R' = F F' turns |F' a|^2 into |R' a|^2: the same problem in N coordinates
        root = torch.linalg.cholesky(features @ features.mT + 1e-6 * torch.eye(n, dtype=x.dtype, device=x.device))
    # of a logit's curvature only a bound is known, 1/4 (1/2 of several): in coordinates where it is 1 all bends alike
    # (Böhning 1992), and a few steps suffice
    bound = root.mT @ (root * t.sum(1, keepdim=True)) * (0.25 if classes == 2 else 0.5)
    bound.diagonal(dim1=-2, dim2=-1).add_(strength)
    back = torch.linalg.inv(torch.linalg.cholesky(bound)).mT
    base, design = x @ old.mT + old_bias[..., None, :], root @ back
    z = x.new_zeros(*x.shape[:-2], root.shape[-1], outputs).requires_grad_()

    def loss():
        cross_entropy = -(t * two_columns(base + design @ z).log_softmax(-1)).sum()
        return cross_entropy + strength / 2 * (back @ z).square().sum()

    minimise(loss, z)
    moved = back @ z.detach()
    moved = features.mT @ torch.linalg.solve_triangular(root.mT, moved, upper=True) if few else moved
    weight = moved[..., :-1, :].mT / scale
    return old + weight, old_bias + moved[..., -1, :] - (weight @ mean.mT)[..., 0]


def minimise(loss, variable, steps=200):
    """L-BFGS (Liu & Nocedal 1989) on one tensor, to the minimum of a smooth convex loss."""
    optimizer = torch.optim.LBFGS([variable], max_iter=steps, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)


def two_columns(logits):
    """(..., 1) logits of the positive class as two columns; (..., K) as they are."""
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits


def probabilities(embeddings, head):
    """(..., K) float64 of a head (weight, bias) on embeddings (..., D)."""
    weight, bias = head
    return two_columns(embeddings.to(weight) @ weight.T + bias).softmax(-1)
