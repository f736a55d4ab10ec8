"""AUGMENT"""

import math

import torch
import torch.nn.functional as F


def to_float(images):
    """uint8 pixels as float32 in [0, 1]; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def crop_regions(boxes, margin=0.25):
    """Square regions around boxes: (N, 4) in [0, 1], the box's longer side plus `margin` of it on each side.

    Where no box is known (NaN) the region is the whole image. A region may reach over the edge."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=0.05) * (0.5 + margin)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=boxes.device)
    return torch.where(boxes[:, :1].isfinite(), torch.cat([centre - half, centre + half], 1), whole)


def region_matrices(regions):
    """Affine matrices (N, 2, 3) that map the output square [-1, 1]^2 onto regions (N, 4) given in [0, 1]."""
    centre = regions[:, :2] + regions[:, 2:] - 1
    half = regions[:, 2:] - regions[:, :2]
    return torch.cat([torch.diag_embed(half), centre[:, :, None]], 2)


def whole_regions(images):
    """The region (N, 4) of each image that is all of it."""
    return torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=images.device).expand(len(images), 4)


def warp(images, matrices, size, displacement=None):
    """Resample a batch once: (N, C, S, S) -> float32 (N, C, size, size); outside the image is the image's own mean.

    matrices: (N, 2, 3), output to input coordinates in [-1, 1]; displacement: (N, size, size, 2) added to the grid."""
    images = to_float(images)
    mean = images.mean((2, 3), keepdim=True)
    grid = F.affine_grid(matrices, (len(images), 1, size, size), align_corners=False)
    if displacement is not None:
        grid = grid + displacement
    return F.grid_sample(images - mean, grid, mode="bilinear", padding_mode="zeros", align_corners=False).add_(mean)


def crop(images, regions, size):
    """Cut square regions (N, 4), or the whole (None), out of a batch: float32 (N, C, size, size) in [0, 1]."""
    if regions is None and images.shape[-1] == size:
        return to_float(images)
    return warp(images, region_matrices(whole_regions(images) if regions is None else regions), size)


def spline_basis(size, knots, device):
    """(size, knots) cubic B-spline weights: a smooth curve through few random numbers is one small product."""
    t = torch.linspace(0, knots - 1, size, device=device)[:, None] - torch.arange(knots, device=device)
    a = t.abs()
    weights = torch.where(a < 1, 2 / 3 - a**2 + a**3 / 2, (2 - a).clamp(min=0) ** 3 / 6)
    return weights / weights.sum(1, keepdim=True)


# What strength 1 means. Each image draws its own value, uniformly up to these; `strength` scales them all.
ROTATE = 12.0  # degrees
SCALE = 0.25  # log of the zoom
SHIFT = 0.10  # of the side
ELASTIC = 0.04  # of the half side, on a 5 x 5 lattice of cubic B-splines (Rueckert et al. 1999)
GAMMA = 0.5  # log of the exponent
GAIN = 0.25  # log
DEPTH_GAIN = 0.35  # log, a smooth curve over depth: the scanner's time-gain compensation
SPECKLE = 0.20  # standard deviation, multiplicative
BLUR = 1.5  # sigma in pixels at 128 px, on a third of the images
CUTOUT = 0.3  # side, on a third of the images
STAIN = 0.2  # log of each stain's strength
STAIN_SHIFT = 0.05  # of each stain's optical density
# Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok & Johnston 2001)
STAINS = F.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1)


def augment(images, strength=1.0, boxes=None, regions=None, size=None, generator=None):
    """Augment a whole batch where it lies: (images float32 (N, C, size, size) in [0, 1], boxes (N, 4) or None).

    images: uint8 or float (N, C, S, S). regions: crop these squares first (see crop_regions). Flip, rotation, scale,
    shift, elastic deformation and the crop are folded into ONE resampling; then come intensity, blur and cutout. Grey is
    ultrasound, where depth has a meaning: flips are left-right only, and gain, gamma, depth gain and speckle vary.
    Colour is a tissue slide or skin, which have no up: all eight flips and quarter turns, and the stains vary (Tellez
    et al. 2018), which never turns a colour into one that the stains can't mix. strength 0 only crops and resizes.
    A box follows as the ellipse inscribed in it, which is what a lesion is, so that rotations don't inflate it."""
    n, c, _, side = images.shape
    size = size or side
    device = images.device
    base = region_matrices(whole_regions(images) if regions is None else regions)
    if strength == 0:
        return warp(images, base, size), None if boxes is None else move_boxes(boxes, base)
    u = torch.rand(n, 20, generator=generator, device=device)  # one draw; a column a parameter
    signed = (2 * u - 1) * strength

    angle, zoom = signed[:, 0] * math.radians(ROTATE), torch.exp(signed[:, 1] * SCALE)
    if c == 3:
        angle = angle + (u[:, 19] * 4).floor() * (math.pi / 2)
    flip = torch.where(u[:, 2] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    turn = torch.stack([torch.stack([cos * flip, -sin], 1), torch.stack([sin * flip, cos], 1)], 1)
    half = base[:, :, :2]
    matrices = torch.cat([half @ turn, base[:, :, 2:] + half @ (2 * SHIFT * signed[:, 3:5, None])], 2)
    basis = spline_basis(size, 5, device)
    lattice = (2 * torch.rand(n, 2, 5, 5, generator=generator, device=device) - 1) * (2 * ELASTIC * strength)
    displacement = (basis @ lattice @ basis.T).permute(0, 2, 3, 1) * half[:, None, None, 0, 0, None]
    x = warp(images, matrices, size, displacement)

    if c == 3:
        x = change_stains(x, torch.exp(signed[:, 5:8] * STAIN), signed[:, 8:11] * STAIN_SHIFT).clamp_(0, 1)
    else:
        depth = spline_basis(size, 4, device) @ signed[:, 8:12, None] * DEPTH_GAIN + signed[:, None, 5:6] * GAIN
        x = x.clamp_(min=1e-4).pow_(torch.exp(signed[:, 6] * GAMMA)[:, None, None, None]).mul_(depth.exp()[:, None])
        sigma = u[:, 7, None, None, None] * (SPECKLE * strength)
        x = x.addcmul_(x * torch.randn(n, 1, size, size, generator=generator, device=device), sigma).clamp_(0, 1)
    chosen = torch.nonzero(u[:, 12] < strength / 3)[:, 0]
    if len(chosen):
        x[chosen] = blur(x[chosen], u[chosen, 13] * BLUR * strength * size / 128)
    centre, extent = u[:, 14:16], u[:, 16:18] * (CUTOUT * min(strength, 2) / 2) * (u[:, 18:19] < 1 / 3)
    axis = (torch.arange(size, device=device) + 0.5) / size
    inside = (axis - centre[:, :, None]).abs() < extent[:, :, None]  # (N, 2, size): x, y
    hole = inside[:, 1, :, None] & inside[:, 0, None, :]
    x = torch.where(hole[:, None], x.mean((2, 3), keepdim=True), x)
    return x, None if boxes is None else move_boxes(boxes, matrices)


def change_stains(images, scale, shift):
    """Colours (N, 3, H, W) in [0, 1] whose stains, unmixed in optical density, are scaled and shifted, each (N, 3)."""
    stains = STAINS.to(images.device)
    mix = torch.linalg.inv(stains) @ (scale[:, :, None] * stains)  # unmix, scale and mix again is one 3 x 3 product
    density = -images.clamp(min=1 / 255).log().flatten(2)
    changed = mix.mT @ density + (shift @ stains)[:, :, None]
    return torch.exp(-changed).view_as(images)


def move_boxes(boxes, matrices):
    """Where boxes (N, 4) in [0, 1] lie after `warp` by these matrices: the bounds of the moved inscribed ellipse."""
    linear = torch.linalg.inv(matrices[:, :, :2])
    centre = (linear @ ((boxes[:, :2] + boxes[:, 2:] - 1)[:, :, None] - matrices[:, :, 2:]))[:, :, 0]
    extent = (linear * (boxes[:, None, 2:] - boxes[:, None, :2])).norm(dim=2)
    return (torch.cat([centre - extent, centre + extent], 1) / 2 + 0.5).clamp(0, 1)


def blur(images, sigma):
    """Gaussian blur of (N, C, H, W) with each image's own sigma (N,) in pixels: a grouped convolution a side."""
    n, c, h, w = images.shape
    radius = min(4, max(h, w) - 1)
    t = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-(t**2) / (2 * sigma[:, None].clamp(min=0.05) ** 2), 1).repeat_interleave(c, 0)
    x = F.pad(images.reshape(1, n * c, h, w), (radius,) * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, None, None, :], groups=n * c)
    return F.conv2d(x, kernel[:, None, :, None], groups=n * c).reshape(n, c, h, w)


def clahe(images, tiles=8, clip=2.0):
    """Contrast-limited adaptive histogram equalisation of a batch (Zuiderveld, Graphics Gems IV, 1994).

    images: uint8 (N, C, H, W); each channel by itself. tiles x tiles histograms are clipped at `clip` times the mean
    bin, what was cut off is spread over all bins, and each pixel interpolates the four nearest tiles' mappings."""
    n, c, h, w = images.shape
    th, tw = math.ceil(h / tiles), math.ceil(w / tiles)
    x = F.pad(images.float(), (0, tw * tiles - w, 0, th * tiles - h), mode="replicate").long()
    x = x.reshape(n * c, tiles, th, tiles, tw)
    tile = torch.arange(n * c * tiles * tiles, device=x.device).reshape(n * c, tiles, 1, tiles, 1)
    histogram = (
        torch.bincount((tile * 256 + x).flatten(), minlength=n * c * tiles * tiles * 256).float().reshape(-1, 256)
    )
    limit = max(1.0, clip * th * tw / 256)
    clipped = histogram.clamp(max=limit)
    clipped += (histogram - clipped).sum(1, keepdim=True) / 256
    mapping = (clipped.cumsum(1) * (255 / (th * tw))).clamp(max=255).flatten()

    def neighbours(length, step):  # the two tile centres around each pixel, and the weight of the second
        position = ((torch.arange(length, device=x.device) + 0.5) / step - 0.5).clamp(0, tiles - 1)
        first = position.floor().long()
        return first, (first + 1).clamp(max=tiles - 1), position - first

    (y0, y1, fy), (x0, x1, fx) = neighbours(h, th), neighbours(w, tw)
    value = images.reshape(n * c, h, w).long()
    image = torch.arange(n * c, device=x.device)[:, None, None]

    def mapped(ty, tx):
        return mapping[((image * tiles + ty[:, None]) * tiles + tx) * 256 + value]

    upper = torch.lerp(mapped(y0, x0), mapped(y0, x1), fx)
    lower = torch.lerp(mapped(y1, x0), mapped(y1, x1), fx)
    return torch.lerp(upper, lower, fy[:, None]).round().to(torch.uint8).reshape(n, c, h, w)

# Flip and zoom of each view. The first is the picture as it is; no vertical flips, depth has a meaning.
VIEWS = [(1, 1.0), (-1, 1.0), (1, 0.9), (-1, 0.9), (1, 1.1), (-1, 1.1), (1, 0.8), (-1, 0.8)]


def tta_views(images, regions=None, size=None, views=5):
    """Test-time augmentation: `views` looks at each image, each resampled once, in ONE batch of views * N.

    images (N, C, S, S); regions (N, 4): the crops that C-Net looks at, None = the whole. Returns float32
    (views * N, C, size, size), view by view; a zoom of 0.9 shows nine tenths of the side."""
    base = region_matrices(whole_regions(images) if regions is None else regions)
    scale = torch.tensor(
        [[flip * zoom, zoom, 1.0] for flip, zoom in VIEWS[:views]], device=images.device
    )  # of the columns x, y, centre
    matrices = (base * scale[:, None, None]).flatten(0, 1)
    return warp(images.repeat(len(scale), 1, 1, 1), matrices, size or images.shape[-1])
