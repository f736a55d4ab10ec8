"""Augmentation of whole batches where they lie, on CPU or GPU: the boxes follow, and each image is resampled ONCE.

    import torch
    from augment import augment, clahe, tta_views
    images = torch.randint(0, 256, (8, 1, 96, 128), dtype=torch.uint8)  # (N, C, H, W), 1 or 3 channels
    boxes = torch.tensor([[0.2, 0.3, 0.5, 0.7]] * 8)  # x_min, y_min, x_max, y_max in [0, 1]; four NaN = no box known
    masks = torch.rand(8, 96, 128) > 0.9  # lesions' pixels
    x, moved, outlines = augment(images, strength=1.0, boxes=boxes, masks=masks)  # float32 in [0, 1], (8, 4), (8, 96, 128)
    views = tta_views(clahe(images), views=5)  # even contrast, then float32 (40, 1, 96, 128) for test-time augmentation

Images are uint8, or floats in [0, 1]: floats come back in their own precision, uint8 as float32. A size is an int (a
square), a pair (h, w), or None: the input's own. What does not fit is a ValueError. Shapes and dtypes are checked
always, values only on the CPU: to read one from a GPU would mean to wait for it."""

import functools
import math

import torch
import torch.nn.functional as F

# What strength 1 means. Each image draws its own value, uniformly up to these; `strength` scales them all.
ROTATE = 12.0  # degrees
SCALE = 0.25  # log of the zoom
SHIFT = 0.10  # of the side
ELASTIC = 0.04  # of the side, a bound (rms 0.012): a 5 x 5 lattice of cubic B-splines (Rueckert et al. 1999)
GAMMA = 0.5  # log of the exponent
GAIN = 0.25  # log
DEPTH_GAIN = 0.35  # log, a smooth curve over depth: the scanner's time-gain compensation
SPECKLE = 0.20  # standard deviation, multiplicative
BLUR = 1.5  # sigma in pixels where the longer side is 128, on a third of the images
CUTOUT = 0.3  # of the side, on a third of the images (DeVries & Taylor 2017)
STAIN = 0.2  # log of each stain's strength
STAIN_SHIFT = 0.05  # of each stain's optical density
# Optical density of haematoxylin, eosin and DAB in red, green and blue (Ruifrok & Johnston 2001)
STAINS = F.normalize(torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]), dim=1)
UNMIX = torch.linalg.inv(STAINS)


def augment(images, strength=1.0, boxes=None, regions=None, size=None, generator=None, masks=None):
    """Augment a whole batch: images (N, C, h, w), boxes (N, 4) or None, masks (N, h, w), (N, M, h, w) or None; in [0, 1].

    images (N, C, H, W), C = 1 or 3; boxes (N, 4) in [0, 1]; masks (N, H, W), or several an image (N, M, H, W), bool or in
    [0, 1]; regions (N, 4): cropped first (see crop_regions); size: (h, w); generator: of the images' device, or see draw.
    strength 0 only crops and resizes. ValueError where something doesn't fit.

    Flip, rotation (of pixels, whatever the aspect ratio), zoom, shift, elastic deformation and the crop are ONE
    resampling; then come intensity, blur and cutout. Grey is ultrasound, where depth has a meaning: flips are left-
    right only, and gain, gamma, depth gain and speckle vary. Colour is a tissue slide or skin, with no up: all flips,
    and quarter turns (half turns where it is not square), and the stains vary (Tellez et al. 2018), which never makes a
    colour that the stains can't mix. A mask follows by the same resampling. A box follows as the ellipse inscribed in
    it, which is what a lesion is, so that rotations don't inflate it; one that leaves the picture becomes NaN."""
    check_images(images, channels=(1, 3), values=True)
    if not strength >= 0:
        raise ValueError(f"strength {strength}: give 0 (none) or more, 1 is the usual")
    size, (height, width) = output_size(images, size), images.shape[-2:]
    base, colour = base_matrices(images, regions).float(), images.shape[1] == 3
    if strength == 0:
        return follow(images, boxes, masks, base, size)
    u = draw(torch.rand, (len(images), 20), generator, images.device)  # one for all parts: a column a parameter
    tall = base[:, 1, 1] / base[:, 0, 0] * (height / width)  # height over width of the regions, in pixels
    tall = torch.where((tall - 1).abs() < 1e-3, 1.0, tall)  # a square whose corners were rounded is a square
    matrices = random_matrices(base, tall, u, strength, colour)
    displacement = random_displacement(base, tall * (width / height), size, strength, generator)
    x, boxes, masks = follow(to_float(images).float(), boxes, masks, matrices, size, displacement)
    if colour:
        signed = (2 * u - 1) * strength
        x = change_stains(x, torch.exp(signed[:, 5:8] * STAIN), signed[:, 8:11] * STAIN_SHIFT).clamp_(0, 1)
    else:
        x = random_echo(x, u, strength, generator)
    x = random_cutout(random_blur(x, u, strength), u, strength)
    return x.to(images.dtype) if images.is_floating_point() else x, boxes, masks


def follow(images, boxes, masks, matrices, size, displacement=None):
    """(images, boxes, masks) after one resampling of all, see warp."""
    boxes = None if boxes is None else move_boxes(boxes, matrices, displacement)
    if masks is None:
        return warp(images, matrices, size, displacement), boxes, None
    layers = masks[:, None] if masks.dim() == 3 else masks
    fits = (len(layers), *layers.shape[2:]) == (len(images), *images.shape[-2:])
    if masks.dim() not in (3, 4) or not fits or not layers.shape[1]:
        shapes = f"masks of shape {tuple(masks.shape)} for images {tuple(images.shape)}"
        raise ValueError(f"{shapes}: give (N, H, W), or (N, M, H, W)")
    kind, count = images.dtype if images.is_floating_point() else torch.float32, layers.shape[1]
    x = warp(torch.cat([to_float(images), layers.to(kind)], 1), matrices, size, displacement, empty=count)
    return x[:, :-count], boxes, x[:, -count:].reshape(*masks.shape[:-2], *x.shape[-2:])


def random_matrices(base, tall, u, strength, colour):
    """Matrices (N, 2, 3), output to input, that flip, rotate, zoom and shift, on top of `base`."""
    signed = (2 * u - 1) * strength
    angle, zoom = signed[:, 0] * math.radians(ROTATE), torch.exp(signed[:, 1] * SCALE)
    if colour:
        turns = torch.where(tall == 1, (u[:, 19] * 4).floor(), (u[:, 19] * 2).floor() * 2)
        angle = angle + turns * (math.pi / 2)
    flip = torch.where(u[:, 2] < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    turn = torch.stack([torch.stack([cos * flip, -sin * tall], 1), torch.stack([sin * flip / tall, cos], 1)], 1)
    half = base[:, :, :2]
    return torch.cat([half @ turn, base[:, :, 2:] + half @ (2 * SHIFT * signed[:, 3:5, None])], 2)


def random_displacement(base, ratio, size, strength, generator):
    """A smooth random displacement (N, h, w, 2) of the grid. ratio (N,): height over width of the region in [0, 1]."""
    down, across = (spline_basis(side, 5, base.device) for side in size)
    lattice = draw(torch.rand, (len(base), 2, 5, 5), generator, base.device)
    lattice = (2 * lattice - 1) * (2 * ELASTIC * strength)  # times 2: the grid's side is 2
    half = base[:, 0, 0, None] * torch.stack([torch.ones_like(ratio), ratio], 1)
    return (down @ lattice @ across.T).permute(0, 2, 3, 1) * half[:, None, None]


def random_echo(x, u, strength, generator):
    """Gain, gain over depth, gamma and speckle of grey images, in place."""
    signed, (n, _, h, w) = (2 * u - 1) * strength, x.shape
    depth = spline_basis(h, 4, x.device) @ signed[:, 8:12, None] * DEPTH_GAIN + signed[:, None, 5:6] * GAIN
    x = x.clamp_(min=1e-4).pow_(torch.exp(signed[:, 6] * GAMMA)[:, None, None, None]).mul_(depth.exp()[:, None])
    sigma = u[:, 7, None, None, None] * (SPECKLE * strength)
    return x.addcmul_(x * draw(torch.randn, (n, 1, h, w), generator, x.device), sigma).clamp_(0, 1)


def random_blur(x, u, strength):
    """A third of the images blurred, in place on the CPU."""
    chosen, sigma = u[:, 12] < strength / 3, u[:, 13] * BLUR * strength * max(x.shape[-2:]) / 128
    if x.device.type != "cpu":  # to pick the images would mean to wait for the device: cheaper to blur them all
        return torch.where(chosen[:, None, None, None], blur(x, sigma), x)
    if chosen.any():
        x[chosen] = blur(x[chosen], sigma[chosen])
    return x


def random_cutout(x, u, strength):
    """A rectangle of a third of the images filled with their mean."""
    centre, extent = u[:, 14:16, None], u[:, 16:18, None] * (CUTOUT * min(strength, 2) / 2)
    extent = extent * (u[:, 18, None, None] < 1 / 3)
    rows, columns = ((torch.arange(side, device=x.device) + 0.5) / side for side in x.shape[2:])
    across, down = (columns - centre[:, 0]).abs() < extent[:, 0], (rows - centre[:, 1]).abs() < extent[:, 1]
    return torch.where(down[:, None, :, None] & across[:, None, None], x.mean((2, 3), keepdim=True), x)


def change_stains(images, scale, shift):
    """Colours (N, 3, H, W) in [0, 1] whose stains, unmixed in optical density, are scaled and shifted, each (N, 3)."""
    check_images(images, channels=(3,))
    x = precise(images := to_float(images))
    stains, unmix = (constant(m, x.device, x.dtype) for m in (STAINS, UNMIX))
    mix = unmix @ (scale.to(x.dtype)[:, :, None] * stains)  # unmix, scale and mix again is one 3 x 3 product
    density = -x.clamp(min=1 / 255).log().flatten(2)
    changed = mix.mT @ density + (shift.to(x.dtype) @ stains)[:, :, None]
    return torch.exp(-changed).view_as(x).to(images.dtype)


def blur(images, sigma):
    """Gaussian blur of (N, C, H, W) with each image's own sigma (N,) in pixels, cut off 4 pixels from the centre."""
    check_images(images)
    images, (n, c, h, w) = to_float(images), images.shape
    radius = min(4, max(h, w) - 1)
    t = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.softmax(-(t**2) / (2 * sigma[:, None].clamp(min=0.05) ** 2), 1).repeat_interleave(c, 0)
    x = F.pad(precise(images).reshape(1, n * c, h, w), (radius,) * 4, mode="replicate")
    kernel = kernel[:, None, :, None].to(x.dtype)
    x = F.conv2d(F.conv2d(x, kernel.mT, groups=n * c), kernel, groups=n * c)
    return x.reshape(n, c, h, w).to(images.dtype)


def move_boxes(boxes, matrices, displacement=None):
    """Where boxes (N, 4) in [0, 1] lie after `warp` by these matrices and this displacement: the bounds of the moved
    inscribed ellipse, cut at the picture's edges; NaN where less than a quarter of it is left inside.

    The grid says for each pixel where it comes FROM; where a point of the ellipse goes TO is found by a few steps of
    fixed-point iteration, as the displacement is small and smooth."""
    check_corners("box", boxes, len(matrices))
    b = precise(boxes)
    linear = inverse(matrices[:, :, :2].to(b.dtype))
    middle, sides = b[:, :2] + b[:, 2:] - 1, b[:, 2:] - b[:, :2]
    centre = (linear @ (middle[:, :, None] - matrices[:, :, 2:].to(b.dtype)))[:, :, 0]
    extent = (linear * sides[:, None]).norm(dim=2)
    low, high = centre - extent, centre + extent
    if displacement is not None:
        angle = torch.arange(32, device=b.device) * (2 * math.pi / 32)
        rim = torch.stack([angle.cos(), angle.sin()], 1) * sides[:, None]
        start = points = centre[:, None] + rim @ linear.mT
        field = displacement.to(b.dtype).permute(0, 3, 1, 2)
        for _ in range(3):
            shift = F.grid_sample(field, points[:, None], padding_mode="border", align_corners=False)[:, :, 0].mT
            points = start - shift @ linear.mT
        low, high = low + points.amin(1) - start.amin(1), high + points.amax(1) - start.amax(1)
    moved = torch.cat([low, high], 1) / 2 + 0.5
    inside = moved.clamp(0, 1)
    share = (inside[:, 2:] - inside[:, :2]).prod(1) / (moved[:, 2:] - moved[:, :2]).prod(1).clamp(min=1e-12)
    gone = (share < 0.25) & (sides.amin(1) > 0)  # a box of no area is kept for what it is
    return torch.where(gone[:, None], math.nan, inside).to(boxes.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Resampling, of any floats, normalised ones too. Coordinates are those of grid_sample: [-1, 1], x before y.


def crop_regions(boxes, margin=0.25):
    """Square regions around boxes: (N, 4) in [0, 1], the box's longer side plus `margin` of it on each side.

    Where no box is known (NaN) the region is the whole image. A region may reach over the edge. Square means equal
    shares of both sides: a region has the image's own aspect ratio."""
    check_corners("box", boxes, len(boxes))
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=0.05) * (0.5 + margin)
    whole = (torch.arange(4, device=boxes.device) >= 2).to(boxes.dtype)  # 0, 0, 1, 1
    return torch.where(boxes[:, :1].isfinite(), torch.cat([centre - half, centre + half], 1), whole)


def region_matrices(regions):
    """Affine matrices (N, 2, 3) that map the output square [-1, 1]^2 onto regions (N, 4) given in [0, 1]."""
    centre, half = regions[:, :2] + regions[:, 2:] - 1, regions[:, 2:] - regions[:, :2]
    return torch.cat([torch.diag_embed(half), centre[:, :, None]], 2)


def base_matrices(images, regions):
    """The matrices (N, 2, 3) of the images' regions (N, 4), checked; None = the whole images."""
    if regions is None:
        return torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    check_corners("region", regions, len(images))
    return region_matrices(precise(regions))


def inverse(matrices):
    """Of matrices (N, 2, 2). For LAPACK's, whose last bits published results hang on, a GPU would be waited for."""
    if matrices.device.type == "cpu":
        return torch.linalg.inv_ex(matrices).inverse
    (a, b), (c, d) = (row.unbind(1) for row in matrices.unbind(1))
    return torch.stack([d, -b, -c, a], 1).view_as(matrices) / (a * d - b * c)[:, None, None]


def warp(images, matrices, size, displacement=None, empty=0):
    """Resample a batch once: (N, C, H, W) -> (N, C, h, w); outside the image is the image's own mean.

    matrices: (N, 2, 3), output to input coordinates in [-1, 1]; displacement: (N, h, w, 2) added to the grid; empty: so
    many of the last channels, masks, are 0 outside. Half precision is resampled in float32, where its grid would be too
    coarse."""
    check_images(images)
    x = precise(images := to_float(images))
    mean = x.mean((2, 3), keepdim=True)
    if empty:
        mean[:, -empty:] = 0
    grid = F.affine_grid(matrices.to(x.dtype), (len(x), 1, *output_size(images, size)), align_corners=False)
    if displacement is not None:
        grid = grid + displacement
    x = F.grid_sample(x - mean, grid, mode="bilinear", padding_mode="zeros", align_corners=False).add_(mean)
    return x.to(images.dtype)


def crop(images, regions, size):
    """Cut regions (N, 4), or the whole (None), out of a batch: floats (N, C, h, w)."""
    if regions is None and output_size(images, size) == tuple(images.shape[-2:]):
        return to_float(images)
    return warp(images, base_matrices(images, regions), size)


def cut(maps, regions, size, back=False):
    """The crops (N, h, w) of maps (N, H, W), floats, bilinear, zero outside the map; regions None = the whole."""
    if maps.dim() != 3 or not maps.is_floating_point():
        raise ValueError(f"maps of shape {tuple(maps.shape)} and {maps.dtype}: give floats (N, H, W)")
    x, size = precise(maps)[:, None], output_size(maps, size)
    if regions is None:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)[:, 0].to(maps.dtype)
    matrices = region_matrices(precise(regions)).to(x.dtype)  # unchecked: a box of no width is one value, stretched
    if back:
        check_corners("region", regions, len(maps))
        linear = inverse(matrices[:, :, :2])
        matrices = torch.cat([linear, -linear @ matrices[:, :, 2:]], 2)
    grid = F.affine_grid(matrices, (len(x), 1, *size), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0].to(maps.dtype)


def place(maps, regions, size):
    """The reverse of `cut`: maps (N, h, w) of crops, back in the whole image (N, H, W), zero outside the crop."""
    return cut(maps, regions, size, back=True)


# ---------------------------------------------------------------------------------------------------------------------
# Test-time augmentation, and contrast

# Flip and zoom of each view. The first is the picture as it is; no vertical flips, depth has a meaning.
VIEWS = [(1, 1.0), (-1, 1.0), (1, 0.9), (-1, 0.9), (1, 1.1), (-1, 1.1), (1, 0.8), (-1, 0.8)]
COLUMNS = torch.tensor([[flip * zoom, zoom, 1.0] for flip, zoom in VIEWS])  # what they do to a matrix's x, y, centre


def tta_views(images, regions=None, size=None, views=5):
    """Test-time augmentation: `views` (1 to 8) looks at each image, in ONE batch (views * N, C, h, w), view by view.

    images (N, C, H, W); regions (N, 4): the crops to look at, None = the whole. A zoom of 0.9 shows nine tenths of the
    side. The answer is the mean over the views:

        probabilities = net(tta_views(images, views=5)).softmax(1).unflatten(0, (5, len(images))).mean(0)"""
    check_images(images, values=True)
    if views not in range(1, len(VIEWS) + 1):
        raise ValueError(f"{views} views: give 1 to {len(VIEWS)}")
    matrices = base_matrices(images, regions) * constant(COLUMNS, images.device)[:views, None, None]
    return warp(images.repeat(views, 1, 1, 1), matrices.flatten(0, 1), output_size(images, size))


def clahe(images, tiles=8, clip=2.0):
    """Contrast-limited adaptive histogram equalisation of a batch (Zuiderveld, Graphics Gems IV, 1994).

    images (N, C, H, W), each channel by itself, floats in steps of 1/255; returns their dtype. tiles x tiles histograms
    are clipped at `clip` times the mean bin, what was cut off is spread over all bins, and each pixel interpolates the
    four nearest tiles' mappings."""
    check_images(images, values=True)
    n, c, h, w = images.shape
    pixels = images if images.dtype == torch.uint8 else (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
    th, tw = math.ceil(h / tiles), math.ceil(w / tiles)
    x, count = F.pad(pixels.float(), (0, tw * tiles - w, 0, th * tiles - h), mode="replicate"), n * c * tiles * tiles
    x = x.long().reshape(n * c, tiles, th, tiles, tw)
    tile = torch.arange(count, device=x.device).reshape(n * c, tiles, 1, tiles, 1)
    index = (tile * 256 + x).flatten()  # a sum of ones: how long a bincount gets is not known where a graph is traced
    histogram = torch.zeros(count * 256, device=x.device).scatter_add_(
        0, index, torch.ones_like(index, dtype=torch.float)
    )
    histogram = histogram.reshape(-1, 256)
    clipped = histogram.clamp(max=max(1.0, clip * th * tw / 256))
    clipped += (histogram - clipped).sum(1, keepdim=True) / 256
    mapping = (clipped.cumsum(1) * (255 / (th * tw))).clamp(max=255).flatten()

    def neighbours(length, step):  # the two tile centres around each pixel, and the weight of the second
        position = ((torch.arange(length, device=x.device) + 0.5) / step - 0.5).clamp(0, tiles - 1)
        first = position.floor().long()
        return first, (first + 1).clamp(max=tiles - 1), position - first

    (y0, y1, fy), (x0, x1, fx) = neighbours(h, th), neighbours(w, tw)
    bins = torch.arange(n * c, device=x.device)[:, None, None] * tiles**2 * 256 + pixels.reshape(n * c, h, w)
    p, q, r, s = (mapping[bins + (ty[:, None] * tiles + tx) * 256] for ty in (y0, y1) for tx in (x0, x1))
    even = torch.lerp(torch.lerp(p, q, fx), torch.lerp(r, s, fx), fy[:, None]).round().view(images.shape)
    return even.to(torch.uint8) if images.dtype == torch.uint8 else (even / 255).to(images.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Small things, and what is refused


def to_float(images):
    """uint8 pixels as float32 in [0, 1]; floats pass."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def precise(x):
    """Floats in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draw(function, shape, generator, device):
    """Random numbers, the first dimension the images. generator: one, or None, or (one, total, rows (N,)) where the
    images are these rows of a batch of `total`, and get what they would get in there."""
    if not isinstance(generator, tuple):
        return function(shape, generator=generator, device=device)
    generator, total, rows = generator
    return function((total, *shape[1:]), generator=generator, device=device)[rows]


@functools.lru_cache(64)
def constant(table, device, dtype=torch.float32):
    """A table of numbers on a device, copied there once: for every copy a GPU would be waited for."""
    with torch.inference_mode(False):  # whoever comes next may want gradients
        return table.to(device, dtype)


@functools.lru_cache(64)
def spline_basis(size, knots, device):
    """(size, knots) cubic B-spline weights: a smooth curve through few random numbers is one small product."""
    with torch.inference_mode(False):
        a = (torch.linspace(0, knots - 1, size, device=device)[:, None] - torch.arange(knots, device=device)).abs()
        weights = torch.where(a < 1, 2 / 3 - a**2 + a**3 / 2, (2 - a).clamp(min=0) ** 3 / 6)
        return weights / weights.sum(1, keepdim=True)


def output_size(images, size):
    """(h, w) of what comes out: an int is a square, None the input's own."""
    h, w = images.shape[-2:] if size is None else size if isinstance(size, (tuple, list)) else (size, size)
    if h < 1 or w < 1:
        raise ValueError(f"size {size}: give pixels, an int or (h, w)")
    return int(h), int(w)


def readable(x):
    """Whether values can be looked at without waiting for a device; where a graph is traced there are none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_images(images, channels=(), values=False):
    """ValueError unless (N, C, H, W) of uint8 or floats, with that many channels, and, if asked for, in [0, 1]."""
    if images.dim() != 4 or 0 in images.shape or (channels and images.shape[1] not in channels):
        wanted = " or ".join(map(str, channels)) or "C"
        raise ValueError(f"images of shape {tuple(images.shape)}: give a batch (N, {wanted}, H, W), none of them 0")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}: give uint8, or floats in [0, 1]")
    if values and images.is_floating_point() and readable(images):
        low, high = (float(v) for v in images.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # so written, NaN is refused too; half precision may round
            raise ValueError(f"images from {low:g} to {high:g}: give uint8, or floats in [0, 1]")


def check_corners(kind, corners, n):
    """ValueError unless corners are (n, 4): of boxes in [0, 1], or four NaN; of regions finite and not empty."""
    if tuple(corners.shape) != (n, 4) or not corners.is_floating_point():
        raise ValueError(f"{corners.dtype} {tuple(corners.shape)}: give floats ({n}, 4), one {kind} an image")
    if not readable(corners):
        return
    low, high, slack = corners[:, :2], corners[:, 2:], 1e-3  # what rounding may do
    good = ((low > -slack) & (high < 1 + slack) & (low < high + slack)).all(1) | corners.isnan().all(1)
    if kind == "region":
        good = (low < high).all(1) & corners.isfinite().all(1)
    if not good.all():
        i = int((~good).nonzero()[0])
        wanted = "in [0, 1], or four NaN if not known" if kind == "box" else "with x_min < x_max and y_min < y_max"
        values = ", ".join(f"{v:g}" for v in corners[i].tolist())
        raise ValueError(f"{kind} {i} is ({values}): give x_min, y_min, x_max, y_max {wanted}")
