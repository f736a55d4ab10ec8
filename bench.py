"""Speed against its floors: what is done, the least it could cost, and the ratio. Median of 5, in turn, in one run.

    python bench.py                       epochs, Grad-CAM, k-center and the start of infer.py: minutes on two cores
    python bench.py --data BUSI           also the first and the second start on real files
    python bench.py --models A.pt B.pt    model files alone: what they weigh, what an answer costs
    python bench.py --service A.pt        the service of app.py (needs gradio) under 50 clients, and under hostile ones

The floor of an epoch is the bare forward, backward and AdamW step on one fixed batch, as often as the epoch has steps:
no shuffling, no augmentation, no logging. The floor of Grad-CAM is one forward pass and a backward pass that stops at
the last layer; that of the k-center greedy selection of k points is k products of the embedding matrix with a vector;
that of `infer.py image.png` is `import torchvision`; that of an answer is the networks' bare forward passes."""

import argparse
import functools
import http.client
import io
import multiprocessing
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

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import augment
import backbones
import data
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
    """Time two functions in turn and print their medians (seconds) and the median of the paired ratios."""
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


def bench_epoch(size, batch, images, runs, amp, device):
    """One epoch of C-Net (resnet18) on phantoms, augmentation at full strength, against the bare steps."""
    argv = ["--model", "resnet18", "--weights", "none", "--size", str(size), "--batch", str(batch)]
    args = options.parse([*argv, "--augment", "1", "--amp", amp, "--device", str(device)])
    phantoms = data.phantom_set(images, size)
    inputs, labels = (phantoms.pixels.to(device), None, phantoms.boxes.to(device), None), phantoms.labels.to(device)
    rows = torch.arange(images, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def network():
        net = models.CNet("resnet18", 2, 1).to(device, memory_format=torch.channels_last)
        return net, *train.build_optimizer(net, args, 10_000)

    net, optimizer, scheduler = network()

    def loss_of(net, x, boxes, masks, index):
        return losses.classification_loss(net(x), labels[index])

    def ours():
        train.train_epoch(net, optimizer, scheduler, loss_of, inputs, rows, args, generator)

    bare, bare_optimizer, _ = network()
    bare.train()
    x = (inputs[0][:batch].float() / 255).contiguous(memory_format=torch.channels_last)
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


def bench_k_center(images, weights, runs, device, quick):
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
    for n, k in hard:
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
    if quick:
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


def bench_start(runs):
    """`python infer.py image.png` as a whole process, with a fresh small_cnn model and with mobilenet_v2."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.png"
        data.Image.fromarray(data.phantom_set(1, 128).pixels[0, 0].numpy()).save(image)
        for name, size in (("small_cnn", 64), ("mobilenet_v2", 160)):
            model = models.Ensemble(
                [models.CNet(name, trunk="shared")],
                classes=["benign", "malignant"],
                size=size,
                load_size=size,
                channels=1,
            )
            path = Path(folder) / f"{name}.pt"
            models.save(path, model)

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
    p.add_argument("--models", nargs="+", default=[], metavar="FILE", help="time these model files, and nothing else")
    p.add_argument("--service", metavar="FILE", help="ask the service for answers of this model file, and nothing else")
    args = p.parse_args(argv)
    device = models.choose_device(args.device)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, median of {args.runs} [least, most]"
    )
    if args.models:
        return bench_models(args.models, args.runs, device)
    if args.service:
        return bench_service(args.service, device, 2 if args.quick else 60)
    if args.data:
        bench_data(args.data)
    for amp in ("off", "on"):
        for size, batch, images in ((32, 8, 16),) if args.quick else ((128, 32, 128), (28, 128, 1024)):
            bench_epoch(size, batch, images, args.runs, amp, device)
    bench_grad_cam(args.runs, device, args.quick)
    images = data.load(args.data, 64, cache=None, log=lambda _: None)
    bench_k_center(images, args.weights, args.runs, device, args.quick)
    if not args.quick:
        bench_start(args.runs)


if __name__ == "__main__":
    options.run_main(main)
