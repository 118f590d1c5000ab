"""A server of the OpenAI protocol in a thread of this process, which fails as it is told."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DROP, HANG = "drop", "hang"  # replies: close the connection, or say nothing for HANG_S, then 400
HANG_S = 30


def answer(ids=(), text="", finish="stop", read=None):
    """The body of an answer. ids: None for a server that returns none. read: tokens of the prompt, if it says so."""
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    if ids is not None:
        choice["token_ids"] = list(ids)
    said = {"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
    if read is not None:
        said["usage"] = {"prompt_tokens": read, "completion_tokens": 1, "total_tokens": read + 1}
    return said


class Fake:
    """What the server is told, and what it saw.

    reply(body, nth): to the nth try (from 0) of a request with this body; a body to answer with, a status, text, DROP
    or HANG. models: the names that it serves. listing: (what /v1/models says instead, its status). said: the message of
    an error. pause: seconds that each answer takes.
    asked: the bodies in the order of their arrival. most: the largest number of requests at a time. keys: the
    Authorization headers.
    """

    def __init__(self, reply, models, listing, pause):
        self.reply, self.models, self.listing, self.pause = reply, models, listing, pause
        self.asked, self.keys, self.most, self._now, self._tries = [], set(), 0, 0, {}
        self._lock, self.stopped, self.port, self.said = threading.Lock(), threading.Event(), 0, "no"

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def tries(self, prompt):
        return sum(body["prompt"] == prompt for body in self.asked)

    @contextlib.contextmanager
    def taken(self, body):
        """Count a request while it is answered. Yields how often it was tried before."""
        key = json.dumps(body, sort_keys=True)
        with self._lock:
            self.asked.append(body)
            nth = self._tries.get(key, 0)
            self._tries[key] = nth + 1
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            yield nth
        finally:
            with self._lock:
                self._now -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_GET(self):
        fake = self.server.fake
        fake.keys.add(self.headers["Authorization"])
        if self.path != "/v1/models":
            return self.send("Not Found", 404)
        listing = {"object": "list", "data": [{"id": m, "object": "model"} for m in fake.models]}
        return self.send(*(fake.listing or (listing, 200)))

    def do_POST(self):
        fake, body = self.server.fake, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.keys.add(self.headers["Authorization"])
        if self.path != "/v1/completions":
            return self.send("Not Found", 404)
        with fake.taken(body) as nth:
            time.sleep(fake.pause)
            reply = fake.reply(body, nth)
            if reply == HANG:
                fake.stopped.wait(HANG_S)
        if reply == DROP:
            self.close_connection = True
        elif reply == HANG:
            self.send("hung", 400)
        elif isinstance(reply, int):
            self.send({"error": {"message": fake.said, "code": reply}}, reply)
        else:
            self.send(reply)

    def send(self, what, status=200):
        data = (what if isinstance(what, str) else json.dumps(what)).encode()
        with contextlib.suppress(ConnectionError):  # the client may be gone
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(what, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Retry-After-Ms", "1")  # the client waits so long before it tries again
            self.end_headers()
            self.wfile.write(data)


class _Threads(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128


@contextlib.contextmanager
def serving(reply, models=("base",), *, listing=None, pause=0.0):
    """A running `Fake`."""
    fake = Fake(reply, models, listing, pause)
    with _Threads(("127.0.0.1", 0), _Handler) as server:
        server.fake, fake.port = fake, server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield fake
        finally:
            fake.stopped.set()
            server.shutdown()
            thread.join()
