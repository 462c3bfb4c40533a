"""``llmkit serve``: a checkpoint behind an HTTP interface that clients of OpenAI's know."""

from __future__ import annotations

import ipaddress
import os
import socket
from importlib.util import find_spec
from pathlib import Path

from llmkit.commands import Parser, at_least, imported
from llmkit.errors import UserError

TOKEN = "LLMKIT_TOKEN"
"""The environment variable with what clients must send. An option would show it to everybody who lists processes."""


def run(command: str, argv: list[str]) -> int:
    """Serve until it is stopped; returns the exit code."""
    parser = Parser(command, "Serve a checkpoint over HTTP, in the shape of OpenAI's API: completions, chats, labels.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .ckpt file, a run folder: its best one, or hf:NAME_OR_FOLDER")
    add("--host", default="127.0.0.1", help=f"address to listen on; any but this machine's own needs {TOKEN}")
    add("--port", type=at_least(0), default=8000, metavar="N", help="default: 8000; 0: any free one")
    add("--name", metavar="NAME", help="what clients call the model; default: the run's or file's name")
    add("--device", default="cpu", help="cpu, cuda, mps, ...; default: cpu")
    add("--max_batch", type=at_least(1), default=32, metavar="N", help="texts that are worked on together; default: 32")
    add("--max_waiting", type=at_least(1), default=256, metavar="N", help="texts that may wait; default: 256")
    add("--max_tokens", type=at_least(1), default=1024, metavar="N", help="most tokens a text; default: 1024")
    parser.add_imports()
    args = parser.parse(argv)
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"serve needs {package}: pip install 'llmkit[serve]'")
    token = os.environ.get(TOKEN) or None
    local = _loopback(args.host)
    if not local and token is None:
        raise UserError(
            f"serve: --host {args.host} can be reached from other machines: set the environment variable {TOKEN} to "
            "a secret that clients send as 'Authorization: Bearer SECRET'"
        )
    if args.port > 65535:
        raise UserError(f"serve: --port must be at most 65535, got {args.port}")
    listening = _bound(args.host, args.port)  # before the checkpoint is loaded, which takes longer
    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{listening.getsockname()[1]}"
    import uvicorn

    from llmkit.model.language_model import load
    from llmkit.serving.app import create_app
    from llmkit.serving.protocol import Limits

    print(f"llmkit: loading {args.checkpoint} ...", flush=True)
    with imported(args.imports):
        model = load(args.checkpoint, args.device)
    limits = Limits(args.max_batch, args.max_waiting, args.max_tokens)
    name = args.name or _name(args.checkpoint)
    hosts = ["localhost", "127.0.0.1", "[::1]", args.host] if local else None
    app = create_app(model, name, limits, token, hosts)
    # Its own logging would close the handlers of all other packages, and with them streams that are not its own.
    config = uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    paths = ", ".join(sorted(str(path) for path in app.openapi()["paths"] if str(path).startswith("/v1/")))
    print(f"llmkit: '{name}' is served at {address}: {paths}. Ctrl-C stops it.", flush=True)
    server.run(sockets=[listening])
    return 0


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(checkpoint: str) -> str:
    """Return the name of a run for its folder or one of its checkpoints, else that of the file or folder."""
    path = Path(checkpoint.removeprefix("hf:"))
    if path.suffix == ".ckpt" and path.parent.name == "checkpoints" and len(path.parts) > 3:
        return path.parents[2].name
    return path.stem if path.suffix == ".ckpt" else path.parent.name if path.name.startswith("version_") else path.name


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raises UserError when it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"serve: {host}:{port}: {error.strerror or error}") from error
