"""Stand-ins: models and weights small enough for tests, and a web server on this machine."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from torch import nn

from convmlp import ConvMLP

StateDict = dict[str, torch.Tensor]

TINY = dict(blocks=(1, 2, 1), dims=(8, 16, 24), mlp_ratios=(2, 3, 2), channels=4, n_conv_blocks=1, num_classes=5)
FIRST_CONV = "tokenizer.block.0.weight"


def tiny(**kwargs) -> ConvMLP:
    return ConvMLP(**{**TINY, **kwargs}).eval()


def random_weights(model: nn.Module, seed: int = 1) -> StateDict:
    """A state_dict without a value that an initialisation gives, counters of BatchNorm included."""
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return torch.full_like(value, 10 + seed)
        low = 0.5 if name.endswith("running_var") else -0.5
        return torch.empty_like(value).uniform_(low, low + 1, generator=generator)

    return {name: values(name, value) for name, value in model.state_dict().items()}


def saved(content, path: Path, **kwargs) -> Path:
    torch.save(content, path, **kwargs)
    return path


def assert_holds(model: nn.Module, weights: StateDict, but: tuple[str, ...] = ()):
    """Every entry of the model, except those whose names begin with `but`, is the file's."""
    own = model.state_dict()
    wrong = [name for name in own if not name.startswith(but or "\n") and not own[name].equal(weights[name])]
    assert wrong == []


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


class Server:
    """A web server on this machine: `pages` says what is answered under a path, anything else is a 404."""

    def __init__(self):
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.asked.append(self.path)
                self.close_connection = True
                server.pages.get(self.path, lambda handler: handler.send_error(404))(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.01))
        self.thread.start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def page(body: bytes, sent: int | None = None, chunked: bool = False) -> Callable[[BaseHTTPRequestHandler], None]:
    """Announce all of `body`, send its first `sent` bytes and hang up."""

    def answer(handler: BaseHTTPRequestHandler):
        handler.send_response(200)
        if chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write((b"%x\r\n" % len(body) if chunked else b"") + body[:sent])

    return answer
