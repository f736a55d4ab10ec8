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
    a mean square of 1, so that a strength means the same whatever the network. As it is fixed in total, few labels
    change little, and many as much as they want to.

    embeddings: (N, D) float; targets: (N,) labels, or (N, K) soft ones; start: (weight (K', D), bias (K',)), None =
    zeros; K' = 1 for two classes, else K. weights (N,): of the rows, 1 if None. Returns (weight, bias), float64.
    ValueError where something does not fit.

    The change lies in the span of the N embeddings, so that it is sought there: N numbers a logit instead of D."""
    x = torch.as_tensor(embeddings).detach().double()
    t = torch.as_tensor(targets, device=x.device)
    outputs = 1 if classes == 2 else classes
    if x.dim() != 2 or len(t) != len(x) or not len(x) or (t.dim() == 2 and t.shape[1] != classes):
        raise ValueError(
            f"embeddings {tuple(x.shape)}, targets {tuple(t.shape)}: must be (N, D) and (N,) or (N, {classes})"
        )
    if not strength > 0 or not x.isfinite().all():
        raise ValueError("strength must be above 0, and embeddings finite")
    t = (F.one_hot(t.long(), classes) if t.dim() == 1 else t).double()
    w = x.new_ones(len(x)) if weights is None else torch.as_tensor(weights).to(x)
    old, old_bias = start if start is not None else (x.new_zeros(outputs, x.shape[1]), x.new_zeros(outputs))
    old, old_bias = old.detach().to(x), old_bias.detach().to(x)

    mean = x.mean(0)
    scale = (x - mean).square().sum(1).mean().sqrt().clamp(min=1e-12)
    features = torch.cat([(x - mean) / scale, x.new_ones(len(x), 1)], 1)  # the last: the bias, under the same prior
    # L L' = F F' turns |F' a|^2 into |L' a|^2: the same problem in N coordinates
    root = torch.linalg.cholesky(features @ features.T + 1e-6 * torch.eye(len(x), dtype=x.dtype, device=x.device))
    base, change = x @ old.T + old_bias, x.new_zeros(len(x), outputs).requires_grad_()

    def loss():
        log_p = two_columns(base + root @ change).log_softmax(-1)
        return -(w[:, None] * t * log_p).sum() + strength / 2 * change.square().sum()

    minimise(loss, change)
    moved = features.T @ torch.linalg.solve_triangular(root.T, change.detach(), upper=True)
    weight = moved[:-1].T / scale
    return old + weight, old_bias + moved[-1] - weight @ mean


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
