"""A small OpenAI-compatible server in this process, which says what a test tells it to."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def server(answer):
    """Serve `answer(path, body, number of the request) -> (status, json, headers)`; yields its address and the log."""
    log = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            log.append((time.monotonic(), body, self.headers.get("Authorization")))
            status, found, headers = answer(self.path, body, len(log))
            data = json.dumps(found).encode()
            self.send_response(status)
            own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
            for name, value in (own | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", log
        httpd.shutdown()


def chat(*texts, **more):
    """A whole reply with a choice a text; `more` stands in each message."""
    messages = [{"role": "assistant", "content": text, **more} for text in texts]
    choices = [{"index": i, "finish_reason": "stop", "message": one} for i, one in enumerate(messages)]
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "any", "choices": choices}, {}


def question(body):
    """What the first message of a request asks."""
    return body["messages"][0]["content"]
