"""From memory to the device so that no step waits, and over several processes that learn as one.

    pixels = near(images.pixels, device)            # there, if it fits
    for x, index in ahead(make, batches, device):   # make(batch) -> tensors; on a GPU beside the step before
        learn(x, index)                             # without .item(), and without a comparison in Python

A GPU works through a queue. Who asks for a value, or copies from memory that is not pinned, waits until the queue is
empty, and the GPU then waits for whoever fills it again.

Processes that torchrun started all run the same program: each loads all images, has its `part` of every batch and of
the rows that are predicted, and gets the answers of all. Only the first writes and prints."""

import contextlib
import datetime
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Batches


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


def smallest(count, batch, steps=0):
    """Of how many images the smallest part is that a process gets of a batch, see draw_batches."""
    return (batch if steps else count // max(1, min(math.ceil(count / batch), count // 2))) // world()


def share(batch, views=1):
    """Of a batch (N,) that holds each row `views` times, one after another: its length, which of it are this process's,
    and their rows."""
    if views > 1:  # equal parts: see everyone
        batch = batch[: len(batch) // world() * world()]
    n, where = len(batch), part(torch.arange(len(batch), device=batch.device))
    where = torch.cat([where + n * i for i in range(views)])
    return n * views, where, batch.repeat(views)[where]


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


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

PATIENCE = datetime.timedelta(days=7)  # with one that loads images for the others


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def start(device, seconds):
    """Join the processes that torchrun started: gloo on CPUs, nccl on GPUs, one each. Whoever does not answer for so many
    seconds is given up, see lost."""
    if world() > 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    wait = datetime.timedelta(seconds=seconds)
    start.store, own, count = next(dist.rendezvous("env://", timeout=wait))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=start.store, rank=own, world_size=count, timeout=wait)
    start.host = dist.new_group(backend="gloo", timeout=wait)
    if rank():
        sys.stdout = open(os.devnull, "w")


def lost(error):
    """What to say of an error if it came from a process that has died or hangs; None if it did not."""
    if world() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
        return None
    own, others = rank(), [f"lost{i}" for i in range(world())]
    dist.destroy_process_group()  # so that nobody goes on waiting for this one
    try:
        start.store.set(others[own], "")
        time.sleep(5)
        silent = [i for i, name in enumerate(others) if not start.store.check([name])]
    except RuntimeError:
        silent = [0]  # which keeps the store
    return f"process {', '.join(map(str, silent)) or '?'} of {len(others)} has died or hangs"


def gather(thing):
    """[thing] of all processes, by their rank. Anything that pickle takes, in the CPU's memory."""
    if world() == 1:
        return [thing]
    things = [None] * world()
    dist.all_gather_object(things, thing, start.host)
    return things


def part(rows):
    """What this process has of them, of all alike."""
    return rows.tensor_split(world())[rank()]


def shared(function, rows):
    """[function(rows)]: of several processes each answers for a part of the rows, and all get all answers in order."""
    return gather(function(part(rows))) if len(rows) >= world() > 1 else [function(rows)]


def everyone(x):
    """The rows x (N, ...) of all processes, equally many, one process after another; gradients go to one's own."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank()] = x
    return torch.cat(parts)


def mean(values):
    """The mean of a tensor over all processes."""
    if world() > 1:
        dist.all_reduce(values)
    return values / world()


def merge(net):
    """BatchNorm's running statistics become the mean over all processes; weights are alike anyway."""
    for buffer in net.buffers() if net is not None and world() > 1 else ():
        if buffer.is_floating_point():
            buffer.copy_(mean(buffer.clone()))


class Step(nn.Module):
    """A loss of a network as a network, for DistributedDataParallel."""

    def __init__(self, net, loss_of):
        super().__init__()
        self.net, self.loss_of = net, loss_of

    def forward(self, *batch):
        return self.loss_of(self.net, *batch)


def together(net, loss_of, twice=False):
    """(net, loss_of), of several processes so that a backward pass averages the gradients over them all. On GPUs
    BatchNorm takes its statistics from the whole batch; on CPUs, and for a loss that is made of gradients (`twice`: torch's
    SyncBatchNorm has no second derivative), from each process's part."""
    if world() == 1:
        return net, loss_of
    whole = next(net.parameters()).is_cuda and not twice
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if whole else net
    # static: weights that no loss asks for stay
    step = nn.parallel.DistributedDataParallel(Step(net, loss_of), static_graph=True)
    step.broadcast_buffers = False  # at every step the first one's: see merge
    return net, lambda net, *batch: step(*batch)


@contextlib.contextmanager
def first_of_machine():
    """In here the first process of a machine goes first, and leaves the others its work: a decoded data set, say."""
    later = world() > 1 and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if later:
        dist.monitored_barrier(start.host, PATIENCE)
    yield
    if world() > 1 and not later:
        dist.monitored_barrier(start.host, PATIENCE)
