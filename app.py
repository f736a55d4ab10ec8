"""The page and the service: a picture dropped in a browser, or sent by a program, and an answer that can be looked into.

    pip install gradio                                  once; it brings FastAPI and uvicorn
    python app.py                                       the newest model under runs/; if there is none, it is trained first
    python app.py --model runs/busi --port 8000
    python app.py --host 0.0.0.0 --auth radiologist:password.txt

The page is at http://127.0.0.1:7860, the service (see service.py) at /v1/predict and /docs of the same. Nothing leaves this
machine: no statistics, no share link, no font or script from elsewhere. What a person marks and corrects is kept in a
folder that `python train.py --data feedback` and `al_loop.py learn --labels feedback` read."""

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from infer import BreastCancerDetector
from models import DISCLAIMER
from options import build_parser, run_main
from readers import InputError
from service import LOCAL, Guard, Worker, build_service, keep_sweeping, private_folder, serve

# fmt: off
APP = [
    ("model", None, "MODEL", "model file or run folder; default: the newest under runs/, else that of the phantoms is trained"),
    ("device", "auto", "DEVICE", "auto, cpu, cuda"),
    ("host", "127.0.0.1", "HOST", "address to listen on; other than this machine's own only with --auth or --open"),
    ("port", 7860, (0, 65535), "0 = any that is free"),
    ("auth", None, "USER:FILE", "ask for this user and the password that the file holds"),
    ("open", False, None, "let anyone who reaches --host in, without a password"),
    ("max-mb", 20.0, (0.001, 1e5), "largest request of the service, and picture of the page"),
    ("queue", 32, (1, 1e6), "requests that may wait; more are told to come back"),
    ("keep-minutes", 10.0, (0.01, 1e5), "how long a picture of the page lies in the temporary folder"),
    ("read-seconds", 60.0, (0.1, 1e5), "how long a request may take to arrive"),
    ("feedback", "feedback", "DIR", "folder of what people mark and correct"),
]
# fmt: on


def read_login(text):
    """ "user:password" of a USER:FILE, or None of None."""
    if text is None:
        return None
    user, _, file = text.partition(":")
    if not user or not Path(file).is_file():
        raise InputError(f"--auth {text}: give USER:FILE, a name and a file that holds the password")
    password = Path(file).read_text().strip()
    if not password:
        raise InputError(f"--auth {text}: the file is empty; write the password into it")
    return f"{user}:{password}"


def listen(host, port):
    """A listening socket. InputError where the address is not to be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as e:
        raise InputError(
            f"--host {host} --port {port}: {e.strerror}; give another --port, or 0 for a free one"
        ) from None


def ready_detector(model, device):
    """The detector of --model; where none is named and there is none, that of the phantoms is trained."""
    try:
        return BreastCancerDetector(model, device)
    except InputError:
        if model or list(Path("runs").glob("**/model.pt")):
            raise
    import train

    print("no model under runs/: training one on phantoms, which takes about a minute or two")
    return BreastCancerDetector(train.main(["--device", device])[1], device)


def main(argv=None):
    """Serve until Ctrl-C or SIGTERM."""
    args = build_parser({"options of app.py": APP}, __doc__.split("\n\n")[0]).parse_args(argv)
    login = read_login(args.auth)
    if args.host not in LOCAL and not (login or args.open):
        raise InputError(f"--host {args.host}: anyone there could ask; give --auth USER:FILE, or say --open")
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError("the package gradio is not installed: pip install 'gradio>=6'") from None
    detector = ready_detector(args.model, args.device)
    listener, (folder, lock) = listen(args.host, args.port), private_folder()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder goes
    try:
        app = build_app(detector, args, folder, login)
        threading.Thread(target=keep_sweeping, args=(folder, args.keep_minutes * 60), daemon=True).start()
        name = f"[{args.host}]" if ":" in args.host else args.host
        print(f"{detector.describe()}\nhttp://{name}:{listener.getsockname()[1]}   (the service: /docs; Ctrl-C stops)")
        print(DISCLAIMER, flush=True)
        serve(app, listener, args.read_seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return lock


def build_app(detector, args, folder, login):
    """The ASGI application: page and service behind the guard. Temporary files of all parts lie in `folder`."""
    os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = str(folder)
    worker, most = Worker(detector, args.queue), round(args.max_mb * 1e6)
    hosts = None if args.host not in LOCAL or login else LOCAL
    app = build_service(worker, folder)
    return Guard(app, hosts, login, most, most * args.queue, args.read_seconds, folder)


if __name__ == "__main__":
    run_main(main)
