"""An OpenAI-compatible server with a scripted behaviour, and a remote engine connected to it."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cogumi.engine.remote import RemoteEngine
from support.waiting import PATIENCE


@contextlib.contextmanager
def scripted(behave):
    """A server that calls `behave` for every POST; yields its address and the request bodies."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            bodies.append(self.body | {"path": self.path, "key": self.headers["authorization"]})
            behave(self)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", bodies
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()


@contextlib.contextmanager
def engine_at(url, **options):
    with contextlib.closing(RemoteEngine(url, "m", **{"timeout": PATIENCE} | options)) as engine:
        yield engine


def begin(handler, kind="text/event-stream"):
    handler.send_response(200)
    handler.send_header("content-type", kind)
    handler.end_headers()


def send(handler, value):
    handler.wfile.write(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())
    handler.wfile.flush()


def chunk(text, finish=None, logprobs=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": finish}]}
