"""Speed against its floors: what is done, the least it could cost, and the ratio. Median of 5, in turn, in one run.

    python bench.py                       epochs, Grad-CAM, k-center and the start of infer.py: minutes on two cores
    python bench.py --device cuda         a GPU's size of epochs, Grad-CAM and k-center: under a minute
    python bench.py --processes 2         an epoch that processes of one thread share, and nothing else
    python bench.py --data BUSI           also the first and the second start on real files
    python bench.py --models A.pt B.pt    model files alone: what they weigh, what an answer costs
    python bench.py --rows 10000000       k-center alone, on a file of so many embeddings (5 GB)
    python bench.py --pictures 1000000    loading, splitting, an epoch and an answer alone, of so many pictures of 32 px
    python bench.py --clip clip.dcm       frames a second, with fresh networks or with those of --models
    python bench.py --service A.pt        the service of app.py (needs gradio) under 50 clients, and under hostile ones

The floor of an epoch is the bare forward, backward and AdamW step on one fixed batch, as often as the epoch has steps:
no shuffling, no augmentation, no logging. The floor of Grad-CAM is one forward pass and a backward pass that stops at
the last layer; that of the k-center greedy selection of k points is k products of the embedding matrix with a vector;
that of `infer.py image.png` is `import torchvision`; that of an answer is the networks' bare forward passes, and so is
that of a clip: as many, in batches of 32 frames; nothing is read, nothing letterboxed."""

import argparse
import functools
import http.client
import io
import multiprocessing
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import al_loop
import augment
import backbones
import data
import devices
import infer
import losses
import models
import options
import phantoms
import query
import saliency
import service
import train


def compare(name, ours, floor, runs):
    """Time two functions in turn and print their medians (seconds) and the median of the paired ratios. Returns the first
    median."""
    pairs = []
    for i in range(runs + 1):  # the first pair warms up
        times = []
        for function in (ours, floor):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        if i:
            pairs.append(times)
    ratios = sorted(a / b for a, b in pairs)
    a, b = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    print(
        f"{name:52s} ours {a:7.3f} s   floor {b:7.3f} s   ratio {statistics.median(ratios):.3f}"
        f"   [{ratios[0]:.3f}, {ratios[-1]:.3f}]",
        flush=True,
    )
    return a


def one_epoch(size, batch, images, amp, device):
    """(a function that trains C-Net, resnet18, for one epoch on phantoms, augmentation at full strength; a function that
    makes such a network and its optimizer; pixels and labels)."""
    argv = ["--model", "resnet18", "--weights", "none", "--size", str(size), "--batch", str(batch)]
    args = options.parse([*argv, "--augment", "1", "--amp", amp, "--device", str(device)])
    phantoms = data.phantom_set(min(images, 512), size)
    inputs, labels = (phantoms.pixels.to(device), None, None, None), phantoms.labels.to(device)
    rows = torch.arange(images, device=device) % len(phantoms)
    generator = torch.Generator(device).manual_seed(0)

    def network():
        net = models.CNet("resnet18", 2, 1).to(device, memory_format=torch.channels_last)
        return net, *train.build_optimizer(net, args, 10_000)

    net, optimizer, scheduler = network()

    def loss_of(net, x, boxes, masks, index):
        return losses.classification_loss(net(x), labels[index])

    net, loss_of = devices.together(net, loss_of)

    def ours():
        train.train_epoch(net, optimizer, scheduler, loss_of, inputs, rows, args, generator)

    return ours, network, inputs[0], labels


def bench_epoch(size, batch, images, runs, amp, device):
    """One epoch, see one_epoch, against the bare steps."""
    ours, network, pixels, labels = one_epoch(size, batch, images, amp, device)
    bare, bare_optimizer, _ = network()
    bare.train()
    x = (pixels[:batch].float() / 255).contiguous(memory_format=torch.channels_last)
    y = labels[:batch].float()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=models.choose_amp(amp, device))

    def floor():
        for _ in range(images // batch):
            with autocast:
                loss = F.binary_cross_entropy_with_logits(bare(x)[:, 0].float(), y)
            bare_optimizer.zero_grad()
            loss.backward()
            bare_optimizer.step()
        loss.item()

    kind = "bfloat16" if models.choose_amp(amp, device) else "float32"
    compare(f"epoch, resnet18, {size} px, batch {batch}, {kind}", ours, floor, runs)


def bench_processes(processes, runs, quick):
    """An epoch shared by processes of one thread each, against one process of as many threads, and against the ideal: the
    time of one thread, divided. Each in processes of its own, in turn; the least of two epochs counts."""
    kinds, seconds = {"shared": (processes, 1), "threads": (1, processes), "one thread": (1, 1)}, {}
    for _ in range(runs):
        for kind, (count, threads) in kinds.items():
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            command += [__file__, "--sharing", *(["--quick"] if quick else [])]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            seconds.setdefault(kind, []).append(float(done.stdout.split()[-1]))
    shared, threads, one = (statistics.median(seconds[kind]) for kind in kinds)
    ideal = one / processes
    print(
        f"epoch, resnet18, {processes} processes of one thread {shared:.3f} s   one of {processes} threads {threads:.3f} s"
        f"   ideal {ideal:.3f} s   efficiency {ideal / shared:.2f}, of threads {ideal / threads:.2f}"
    )


def time_epoch(quick):
    """The seconds of an epoch in the processes that torchrun started, printed by the first."""
    device, seconds = torch.device("cpu"), []
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        devices.start(device, 600)
    ours, *_ = one_epoch(*((32, 8, 16) if quick else (128, 32, 128)), "off", device)
    for _ in range(3):  # the first warms up
        start = time.perf_counter()
        ours()
        seconds.append(time.perf_counter() - start)
    print(min(seconds[1:]))


def bench_grad_cam(runs, device, quick):
    """Grad-CAM against its floor: one forward pass, and a backward pass that stops at the last layer's activations. On
    C-Nets, which are told their layer, and on torchvision's networks, where it is looked for in the warm-up."""
    side, cases = 32 if quick else 224, []
    for name in ("resnet18", "mobilenet_v2"):
        net = models.CNet(name, 2, 1, normalise="fixed").to(device).eval()
        cases.append((f"C-Net {name}", net, net.features, lambda x: backbones.standardise(x, "fixed"), net.head, 1))
        net = torchvision.models.get_model(name, weights=None).to(device).eval()
        features = nn.Sequential(*list(net.children())[:-2]) if name == "resnet18" else net.features
        cases.append((name, net, features, lambda x: x, net.fc if name == "resnet18" else net.classifier, 3))
    for name, net, features, first, head, channels in cases:
        for batch in (1, 16):
            x = torch.rand(batch, channels, side, side, device=device)
            layer = features if channels == 1 else None

            def ours(net=net, x=x, layer=layer):
                saliency.grad_cam(net, x, 1, layer).sum().item()

            def floor(x=x, features=features, first=first, head=head):
                with torch.no_grad():
                    maps = features(first(x))
                maps.requires_grad_()
                torch.autograd.grad(head(maps.mean((2, 3)))[:, -1].sum(), maps)[0].sum().item()

            def several(function, times=1 if quick else (20 if batch == 1 else 2)):
                return lambda: [function() for _ in range(times)]

            compare(f"Grad-CAM, {name}, {side} px, batch {batch}", several(ours), several(floor), runs)


def plain_k_center(points, k, centers):
    """What everybody writes: direct differences of all points to each new pick, minimum, argmax."""
    distance = query.nearest_distance(points, centers)
    for _ in range(k):
        pick = distance.argmax()
        distance = torch.minimum(distance, query.nearest_distance(points, points[pick, None]))
        distance[pick] = -1.0


def bench_k_center(images, weights, runs, device, quick, most=300_000):
    """k-center greedy on embeddings of mobilenet_v2 (pretrained, if --weights says so) and of an untrained resnet18, and
    on its hardest case, isotropic Gaussians with 100 labelled centers, against k products of the matrix with a vector
    (the Gaussians against a plain loop too); and its memory beside the matrix at the size of the IDC set."""
    k, sizes = (5, (100,)) if quick else (200, (2_000, 10_000))

    def against_floor(name, points, k, centers, runs):
        def ours():
            query.k_center_greedy(points, k, centers)

        def floor():
            for _ in range(k):
                product = torch.mv(points, points[0])
            product.sum().item()

        compare(f"k-center, {name}, {len(points)} x {points.shape[1]}, k = {k}", ours, floor, runs)
        return ours

    for name in ("mobilenet_v2", "resnet18"):
        torch.manual_seed(0)
        channels = images.pixels.shape[1]
        net = models.CNet(name, 2, channels, weights=weights if name == "mobilenet_v2" else "none").to(device).eval()
        views, generator = [], torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            while sum(map(len, views)) < max(sizes):  # a set that is too small is seen again, augmented
                strength = 1.0 if len(views) * 64 >= len(images) else 0.0
                start = len(views) * 64 % len(images)
                x = images.pixels[start : start + 64].to(device)
                views.append(net.embed(augment.augment(x, strength, generator=generator)[0]))
        embeddings = torch.cat(views)
        order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(0)).to(device)
        for n in sizes:
            against_floor(name, embeddings[order[:n]].contiguous(), k, None, runs)
    hard = ((100, 5),) if quick else ((2_000, 100), (10_000, 200), (50_000, 500), (277_524, 200))
    for n, k in (case for case in hard if case[0] <= most):
        x = torch.randn(n + 100, 512, generator=torch.Generator().manual_seed(0)).to(device)
        points, centers, few = x[100:], x[:100], runs if n <= 10_000 else min(runs, 2)
        ours = against_floor("Gaussians, 100 labelled", points, k, centers, few)
        if n <= 10_000:  # "floor" in this line: the plain loop
            compare(
                f"  the same, against a plain loop, {n}",
                ours,
                functools.partial(plain_k_center, points, k, centers),
                few,
            )
    if quick or device.type != "cpu":
        return
    code = (
        "import re, torch, query;"  # not ru_maxrss, which a process inherits from the one that starts it
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024;"
        "x = torch.randn(277_524, 512, generator=torch.Generator().manual_seed(0)); before = peak();"
        "query.k_center_greedy(x, 200, x[:100]);"
        "print(f'{peak() - before:.0f} MB beside the matrix of {x.nbytes / 2**20:.0f} MB')"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    print(f"k-center, 277524 x 512, 100 labelled, k = 200: {said}")


class Memory(threading.Thread):
    """The most memory of its own, in MB, that the process has while this runs: pages of mapped files are not counted."""

    def __enter__(self):
        self.most, self.over, self.before = 0.0, threading.Event(), self.now()
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def run(self):
        while not self.over.wait(0.02):
            self.most = max(self.most, self.now() - self.before)

    def now(self):
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def bench_rows(n, k=200):
    """k-center on n x 128 Gaussians in a file, 100 labelled, against k passes over the file: products with a vector."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, generator = Path(folder) / "rows.f32", torch.Generator().manual_seed(0)
        with open(path, "wb") as file:
            for start in range(0, n, 2**17):
                file.write(torch.randn(min(2**17, n - start), 128, generator=generator).numpy())
        x, centers = torch.from_file(str(path), True, n * 128).view(n, 128), torch.randn(100, 128, generator=generator)
        query.k_center_greedy(x[:2000], 5)  # warms up
        times = []
        for turn in ("pass", "ours", "pass"):
            with Memory() as memory:
                wall, cpu = time.perf_counter(), time.process_time()
                if turn == "ours":
                    query.k_center_greedy(x, k, centers)
                else:
                    sum(float(torch.mv(part, centers[0]).amax()) for part in x.split(2**15))
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
            if turn == "ours":
                most = memory.most
    for what, (a, b, c) in zip(("wall clock", "of a core"), zip(*times, strict=True), strict=True):
        floor = k * (a + c) / 2
        print(
            f"k-center on a file, {n} x 128, k = {k}: ours {b:.1f} s   floor {floor:.0f} s   ratio {b / floor:.3f}   ({what})"
        )
    print(f"  {most:.0f} MB beside the file of {n * 512 / 2**20:.0f} MB")


def bench_pictures(n, device):
    """What n pictures of 32 px cost, step by step, in seconds of a core: phantoms that are darker, brighter and blotched."""
    few, generator = data.phantom_set(min(n, 20_000), 32).pixels.int(), torch.Generator().manual_seed(0)
    pictures = np.empty((n, 32, 32), np.uint8)
    for start in range(0, n, len(few)):
        blotches = torch.randint(-90, 90, (len(few), 1, 8, 8), generator=generator).repeat_interleave(4, 2)
        made = (few + blotches.repeat_interleave(4, 3)).clamp(0, 255).byte()
        pictures[start : start + len(few)] = made[: n - start, 0].numpy()
    argv = ["--model", "small_cnn", "--weights", "none", "--size", "32", "--batch", "256", "--device", str(device)]
    args, kept = options.parse(argv), {}

    def load():
        return data.load(Path(folder) / "pictures.npz", 32, cache=Path(folder) / "cache", log=lambda _: None)

    def epoch():
        images, net = kept["first load"], models.CNet("small_cnn", 2, 1).to(device)
        inputs, labels = (images.pixels, None, images.boxes.to(device), None), images.labels.to(device)
        optimizer, scheduler = train.build_optimizer(net, args, 10_000)

        def loss_of(net, x, boxes, masks, index):
            return losses.classification_loss(net(x), labels[index])

        rows, generator = images.rows("train").to(device), torch.Generator(device).manual_seed(0)
        train.train_epoch(net, optimizer, scheduler, loss_of, inputs, rows, args, generator)
        return models.Ensemble([net.eval()], **train.model_info(images, args, 0))

    def choose(strategy):
        free = torch.arange(100, n)
        return al_loop.ask(
            strategy, kept["an epoch"], kept["first load"], torch.arange(n), torch.arange(100), free, 20, generator
        )

    with tempfile.TemporaryDirectory(dir=".") as folder:
        np.savez(Path(folder) / "pictures.npz", train_images=pictures, train_labels=np.arange(n) % 2)
        del pictures, few, made
        steps = {"first load": load, "second load": load, "an epoch": epoch}
        steps |= {f"20 to label, {name}": functools.partial(choose, name) for name in ("coreset", "badge", "typiclust")}
        for name, step in steps.items():
            with Memory() as memory:
                wall, cpu = time.perf_counter(), time.process_time()
                kept[name] = step()
            times = f"{time.process_time() - cpu:8.1f} s of a core, {time.perf_counter() - wall:8.1f} s"
            print(f"{n} pictures, {name:22s} {times}, {memory.most:6.0f} MB more", flush=True)
        kept.clear()


def fresh_models(folder):
    """(name, file) of a small_cnn and a mobilenet_v2 that find and name, untrained."""
    for name, size in (("small_cnn", 64), ("mobilenet_v2", 160)):
        about = {"classes": ["benign", "malignant"], "size": size, "load_size": size, "channels": 1}
        path = Path(folder) / f"{name}.pt"
        models.save(path, models.Ensemble([models.CNet(name, trunk="shared")], **about))
        yield name, path


def bench_start(runs):
    """`python infer.py image.png` as a whole process, with a fresh small_cnn model and with mobilenet_v2."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        data.Image.fromarray(data.phantom_set(1, 128).pixels[0, 0].numpy()).save(image)
        for name, path in fresh_models(folder):

            def process(*command):
                return lambda: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)

            script = str(Path(__file__).with_name("infer.py"))
            ours = process(script, str(image), "--model", str(path), "--device", "cpu")
            compare(f"infer.py image.png, {name}, 5 views", ours, process("-c", "import torchvision"), runs)


def bench_models(paths, runs, device):
    """The detector on 32 pictures in memory, one view each, in one batch."""
    for path in paths:
        detector = infer.BreastCancerDetector(path, device, tta=1)
        nets = [*detector.model.members, *detector.model.dnets]
        weights = sum(p.numel() for net in nets for p in net.parameters())
        info = detector.info
        x = torch.rand(32, info["channels"], info["size"], info["size"], device=device)
        spec = info["meta_spec"]
        meta = data.encode_meta([{}], None, spec)[0].to(device).expand(32, -1) if spec else None
        pictures = [p.movedim(0, 2).squeeze(2).mul(255).byte().cpu().numpy() for p in x]

        def forward(nets=nets, x=x, meta=meta):
            with torch.inference_mode():
                return [net(x, meta) if isinstance(net, models.CNet) else net(x) for net in nets]

        size = Path(detector.path).stat().st_size / 1e6
        print(f"{path}: {len(nets)} networks, {weights / 1e6:.1f} M weights, {size:.1f} MB")
        compare("  32 answers", functools.partial(detector.predict, pictures), forward, runs)


def bench_clip(file, paths, runs, device):
    """A clip from the file to its answer, with one view of a frame and with five; 25 frames a second are as they are shown."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [(path, path) for path in paths] or list(fresh_models(folder))
        for name, path in paths:
            for views in (1, 5):
                detector = infer.BreastCancerDetector(path, device, tta=views)
                frames, info = len(detector.predict_clip(file)[0]), detector.info
                nets = [*detector.model.members, *detector.model.dnets]
                x = torch.rand(32 * views, info["channels"], info["size"], info["size"], device=device)

                def forward(nets=nets, x=x, views=views, frames=frames):
                    with torch.inference_mode():
                        for start in range(0, frames, 32):
                            for net in nets:
                                net(x[: min(32, frames - start) * views])
                        x[0].mean().item()  # wait for the device

                what = f"{frames} frames, {name}, {info['size']} px, views: {views}"
                ours = functools.partial(detector.predict_clip, file)
                print(f"  {frames / compare(what, ours, forward, runs):.1f} frames a second")


def bench_data(source):
    """The first and the second start on real files, and the memory that it takes."""
    with tempfile.TemporaryDirectory() as cache:
        for what in ("first", "second"):
            start = time.perf_counter()
            images = data.load(source, 128, cache=cache, log=lambda _: None)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{what} start: {len(images)} images, {seconds:.2f} s, peak memory of the process {peak:.0f} MB")


HEAD = b'--line\r\nContent-Disposition: form-data; name="files"; filename="../../a.png"\r\n\r\n'


def as_body(content):
    return HEAD + content + b"\r\n--line--\r\n"


def hostile_bodies():
    """What else is sent: no picture, of nearly and of more than 20 MB; half a picture; 100 million pixels; nothing."""
    png = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(png, "PNG")
    return [as_body(c) for c in (bytes(19_900_000), bytes(21_000_000), png.getvalue()[:500], png.getvalue(), b"")]


def one_client(address, bodies, until, told):
    """Ask without a pause; notes (status, seconds), a connection that is cut as status 0."""
    connection, number = http.client.HTTPConnection(*address, timeout=120), 0
    while time.time() < until:
        start, number = time.perf_counter(), number + 1
        try:
            try:
                body = bodies[number % len(bodies)]
                connection.request("POST", "/v1/predict", body, {"Content-Type": "multipart/form-data; boundary=line"})
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all was sent: the answer may be there
            with connection.getresponse() as response:
                response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            status = 0
        told.append((status, time.perf_counter() - start))
        if status in (0, 413, 503):
            connection.close()
            time.sleep(0.1 * (status == 503))


def clients(address, good, count, seconds, hostile):
    """[[(status, seconds)] of the good clients, the same of the hostile]: a process of its own asks."""
    told, bad = [[], []], hostile_bodies() if hostile else []
    hanging = [socket.create_connection(address) for _ in range(50 * hostile)]
    for connection in hanging:
        connection.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\nhalf")
    until = time.time() + seconds
    asking = [
        threading.Thread(target=one_client, args=(address, [as_body(good)], until, told[0])) for _ in range(count)
    ]
    asking += [threading.Thread(target=one_client, args=(address, bad, until, told[1])) for _ in range(10 * hostile)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return told


def bench_service(path, device, seconds):
    """Pictures a second, and how long an answer takes: one client, 50 one by one, 50 in batches, and with hostile ones."""
    detector, picture = infer.BreastCancerDetector(path, device), io.BytesIO()
    Image.fromarray(phantoms.phantoms(1, 256)[0][0, 0].numpy()).save(picture, "PNG")
    print(f"{path}: a picture of 256 x 256 pixels, {detector.tta} views, {seconds:.0f} s each")
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        worker, listener = service.Worker(detector, 64), socket.create_server(("127.0.0.1", 0), backlog=256)
        guard = service.Guard(service.build_service(worker, folder), service.LOCAL, None, 20e6, 640e6, 20, Path(folder))
        threading.Thread(target=service.serve, args=(guard, listener, 20), daemon=True).start()
        address = listener.getsockname()
        for batch, count, hostile in ((1, 1, False), (1, 50, False), (32, 50, False), (32, 50, True)):
            service.BATCH, before = batch, time.process_time()
            good, bad = pool.apply(clients, (address, picture.getvalue(), count, seconds, hostile))
            took = sorted(t for status, t in good if status == 200)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{count:3d} clients, batches of {batch:2d}{', and hostile ones' if hostile else ''}: {len(took) / seconds:.1f} pictures/s,"
                f" median {took[len(took) // 2]:.3f} s, 99 % {took[int(len(took) * 0.99)]:.3f} s,"
                f" {(time.process_time() - before) / len(took) * 1000:.1f} ms of CPU each, peak memory {peak:.0f} MB,"
                f" codes {dict(Counter(status for status, _ in good))}{f' and {dict(Counter(s for s, _ in bad))}' if bad else ''}",
                flush=True,
            )


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="also time the loading of this data set")
    p.add_argument("--weights", default="none", help="mobilenet_v2's for the k-center: imagenet, none, or a file")
    p.add_argument("--runs", type=int, default=5, help="counted runs of each (default: 5)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    p.add_argument("--quick", action="store_true", help="small sizes: only to see that it works")
    p.add_argument("--processes", type=int, default=0, help="time an epoch shared by so many, and nothing else")
    p.add_argument("--sharing", action="store_true", help=argparse.SUPPRESS)  # one of them
    p.add_argument("--rows", type=int, default=0, help="time k-center on a file of so many rows, and nothing else")
    p.add_argument("--pictures", type=int, default=0, help="time the steps on so many pictures, and nothing else")
    p.add_argument("--models", nargs="+", default=[], metavar="FILE", help="time these model files, and nothing else")
    p.add_argument("--clip", metavar="FILE", help="time this clip, and nothing else")
    p.add_argument("--service", metavar="FILE", help="ask the service for answers of this model file, and nothing else")
    args = p.parse_args(argv)
    if args.sharing:
        return time_epoch(args.quick)
    if args.processes:
        return bench_processes(args.processes, args.runs, args.quick)
    device = models.choose_device(args.device)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, median of {args.runs} [least, most]"
    )
    if args.clip:
        return bench_clip(args.clip, args.models, args.runs, device)
    if args.models:
        return bench_models(args.models, args.runs, device)
    if args.rows:
        bench_rows(args.rows)
    if args.pictures:
        bench_pictures(args.pictures, device)
    if args.rows or args.pictures:
        return None
    if args.service:
        return bench_service(args.service, device, 2 if args.quick else 60)
    if args.data:
        bench_data(args.data)
    on_gpu = device.type != "cpu"
    epochs = ((128, 256, 12800), (28, 1024, 51200)) if on_gpu else ((128, 32, 128), (28, 128, 1024))
    for amp in ("on", "off"):
        for size, batch, images in ((32, 8, 16),) if args.quick else epochs:
            bench_epoch(size, batch, images, args.runs, amp, device)
    bench_grad_cam(args.runs, device, args.quick)
    images = data.load(args.data, 64, cache=None, log=lambda _: None)
    bench_k_center(images, args.weights, args.runs, device, args.quick, 50_000 if on_gpu else 300_000)
    if not args.quick and not on_gpu:
        bench_start(args.runs)


if __name__ == "__main__":
    options.run_main(main)
