"""From memory to the device so that no step waits: what fits lies there, what does not comes one batch ahead.

    pixels = near(images.pixels, device)            # there, if it fits
    for x, index in ahead(make, batches, device):   # make(batch) -> tensors; on a GPU beside the step before
        learn(x, index)                             # without .item(), and without a comparison in Python

A GPU works through a queue. Who asks for a value, or copies from memory that is not pinned, waits until the queue is
empty, and the GPU then waits for whoever fills it again."""

import math

import torch


def draw_batches(rows, batch, generator, weights=None, steps=0):
    """Split the rows, shuffled (or drawn by `weights`, with replacement), into batches of nearly equal size: no last
    batch of one image, which BatchNorm could not take (of an odd count in twos one is a batch of three). steps: so many
    batches, from as many shuffles as that takes; 0 = one shuffle."""
    count = steps * batch or len(rows)
    if weights is None:
        shuffles = range(math.ceil(count / len(rows)))
        order = [torch.randperm(len(rows), generator=generator, device=rows.device) for _ in shuffles]
        order = torch.cat(order)[:count]
    else:
        order = torch.multinomial(weights, count, replacement=True, generator=generator)
    return rows[order].tensor_split(steps or max(1, min(math.ceil(count / batch), count // 2)))


def near(table, device):
    """A table (N, ...) on a GPU if it takes less than half of the memory that is free there, else where it was. None
    passes."""
    if table is None or device.type != "cuda" or 2 * table.nbytes > torch.cuda.mem_get_info(device)[0]:
        return table
    return table.to(device)


def fetch(table, index, here, device):
    """The rows `index` of a table, on the device; `here`: the same index on the CPU, for a table that lies there. None
    passes."""
    if table is None or table.device == device:
        return None if table is None else table[index]
    if device.type != "cuda":
        return table[here].to(device)
    rows = torch.empty(len(here), *table.shape[1:], dtype=table.dtype, pin_memory=True)
    return torch.index_select(table, 0, here, out=rows).to(device, non_blocking=True)


def ahead(make, batches, device):
    """Yield make(*batch), a tuple of tensors (or None) on the device, of every batch in the list. On a GPU each is made
    on a second stream, while the step that learns from the one before is still running."""
    if device.type != "cuda":
        yield from (make(*batch) for batch in batches)
        return
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)

    def prepare(batch):
        with torch.cuda.stream(side):
            return make(*batch)

    following = prepare(batches[0])
    for batch in (*batches[1:], None):
        main.wait_stream(side)  # for the batch that comes now, not for the one after it
        now = following
        for tensor in now:
            if tensor is not None:
                tensor.record_stream(main)  # its memory is not taken for another one before main has done with it
        following = batch and prepare(batch)
        yield now
