"""A server of the completions API over a tiny model, on the loopback device, for tests alone; and what goes wrong."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import PreTrainedModel


@dataclass
class Loopback:
    """What the server has been asked, and how it behaves.

    dialect: "prompt_logprobs" or "echo". key: the only one that is let in. fails: called with a request's body and its
    number, 1 for the first; a status code in place of an answer, with headers that repeat the request's, in the form
    that `escape` gives them. change: of an answer before it is sent. gathers: requests wait until so many are there.
    trickle: seconds between the bytes of an answer. max_model_len: what it says of itself, in tokens.
    """

    model: PreTrainedModel
    tokenizer: object
    dialect: str = "prompt_logprobs"
    key: str | None = None
    names: tuple[str, ...] = ("tiny",)
    fails: Callable[[dict, int], int | None] = lambda body, number: None
    escape: Callable[[str], str] = lambda text: text
    change: Callable[[dict], dict] = lambda answer: answer
    gathers: int = 1
    trickle: float = 0.0
    max_model_len: int = 64
    bodies: list[dict] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    def answer(self, body: dict) -> dict:
        return {"choices": [self._choice(index, ids, body) for index, ids in enumerate(body["prompt"])][::-1]}

    @torch.no_grad()
    def _choice(self, index: int, ids: list[int], body: dict) -> dict:
        logps = self.model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        best = [(int(row.argmax()), float(row.max())) for row in logps]
        after = {self.tokenizer.convert_ids_to_tokens(best[-1][0]): best[-1][1]}
        if body.get("echo"):
            tokens = [self.tokenizer.decode([token]) for token in ids]
            tops = [{str(self.tokenizer.decode([token])): logp} for token, logp in best[:-1]]
            logprobs = {
                "tokens": [*tokens, next(iter(after))],
                "token_logprobs": [None, *(float(logps[t, token]) for t, token in enumerate(ids[1:])), best[-1][1]],
                "top_logprobs": [None, *tops, after],
            }
            return {"index": index, "text": "", "logprobs": logprobs}
        states = [None]
        for t, token in enumerate(ids[1:]):
            entries = {best[t][0]: best[t][1], token: float(logps[t, token])}
            states.append({str(i): self._entry(i, logp) for i, logp in entries.items()})
        return {"index": index, "text": "", "prompt_logprobs": states, "logprobs": {"top_logprobs": [after]}}

    def _entry(self, index: int, logp: float) -> dict:
        return {"logprob": logp, "rank": 1, "decoded_token": self.tokenizer.decode([index])}

    @property
    def requests(self) -> list[dict]:
        return [body for body in self.bodies if body]


@contextmanager
def served(model, tokenizer, **behaviour) -> Iterator[Loopback]:
    """Runs the server in a thread."""
    loopback, lock, gathered = Loopback(model, tokenizer, **behaviour), threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            models = [{"id": name, "max_model_len": loopback.max_model_len} for name in loopback.names]
            self._respond({}, {"data": models} if self.path == "/v1/models" else None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                loopback.at_once += 1
                loopback.most_at_once = max(loopback.most_at_once, loopback.at_once)
                if 1 < loopback.gathers <= loopback.at_once:
                    gathered.set()
            gathered.wait(timeout=20 if loopback.gathers > 1 else 0)
            understood = ("echo" in body) == (loopback.dialect == "echo") and self.path == "/v1/completions"
            answer = loopback.change(loopback.answer(body)) if understood else None
            with lock:  # before the client can send the next one
                loopback.at_once -= 1
            self._respond(body, answer)

        def _respond(self, body: dict, answer: dict | None):
            with lock:
                loopback.bodies.append(body)
                number = len(loopback.requests)
            code = loopback.fails(body, number) or (200 if answer is not None else 400)
            if loopback.key is not None and self.headers.get("Authorization") != f"Bearer {loopback.key}":
                code = 401
            said = answer if code == 200 else {"error": f"no: {dict(self.headers)} {code}"}
            content = (said if isinstance(said, str) else json.dumps(said)).encode()
            if code != 200:
                content = loopback.escape(content.decode()).encode()
            self.send_response(code)
            if code == 302:
                self.send_header("Location", f"{loopback.url}/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if not loopback.trickle:
                self.wfile.write(content)
                return
            with suppress(OSError):  # the client has gone
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    time.sleep(loopback.trickle)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    loopback.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield loopback
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
