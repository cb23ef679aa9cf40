"""``roundhouse chat``: a conversation in the terminal, streamed over HTTP as any client's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster import console
from cluster.errors import ClusterError, ConfigError, RequestError

if TYPE_CHECKING:
    import requests

CONNECT_S = 10.0
READ_S = 300.0


@dataclass(slots=True)
class Endpoint:
    """Where to ask, and with which key."""

    base_url: str
    key: str
    session: requests.Session = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import requests

        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"Bearer {self.key}"

    def models(self) -> list[str]:
        """Return the models that answer."""
        return [model["id"] for model in self._ask("GET", "/models").json()["data"]]

    def stream(
        self, model: str, messages: Sequence[dict[str, str]], **options: Any
    ) -> Iterator[tuple[str, str]]:
        """Yield (text, version) as they come. Raises RequestError when the stream fails."""
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        answer = self._ask("POST", "/chat/completions", json=body, stream=True)
        with answer:
            for event in events(answer.iter_lines()):
                if "error" in event:
                    raise RequestError(str(event["error"].get("message")), 502)
                for choice in event["choices"]:
                    text = choice["delta"].get("content") or ""
                    yield text, event.get("system_fingerprint") or ""

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        import requests

        try:
            answer = self.session.request(
                method, f"{self.base_url}{path}", timeout=(CONNECT_S, READ_S), **options
            )
        except requests.RequestException as error:
            raise ClusterError(
                f"no answer from {self.base_url} ({type(error).__name__}); `roundhouse status` "
                "shows what runs"
            ) from None
        if answer.ok:
            return answer
        try:
            told = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            told = f"{self.base_url} answered {answer.status_code}; is a model deployed?"
        raise RequestError(told, answer.status_code)


def events(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON of server-sent events; RequestError when they stop before ``[DONE]``."""
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            return
        event: dict[str, Any] = json.loads(line[6:])
        yield event
        if "error" in event:
            return
    raise RequestError("the stream broke off before its end", 502)


def find_endpoint(base_url: str | None, key: str | None) -> Endpoint:
    """Return the endpoint that was named, that of OPENAI_BASE_URL, or this home's."""
    from cluster.home import keys_dir
    from cluster.session import current

    url = base_url or os.environ.get("OPENAI_BASE_URL") or f"{current().serve_url}/v1"
    if not key and not (key := os.environ.get("OPENAI_API_KEY")):
        path = keys_dir() / "demo.key"
        if not path.is_file():
            raise ConfigError(f"no API key: give --key, or run `roundhouse up`, which makes {path}")
        key = path.read_text().strip()
    return Endpoint(url.rstrip("/"), key)


def pick_model(endpoint: Endpoint, model: str | None) -> str:
    """Return the model to talk to: the named one, or the only one there is."""
    if model:
        return model
    there = endpoint.models()
    if len(there) != 1:
        raise ConfigError(
            f"which model? there are: {', '.join(there)}"
            if there
            else "no model answers; `roundhouse deploy CONFIG` serves one"
        )
    return there[0]


def answer_all(endpoint: Endpoint, model: str, options: dict[str, Any]) -> list[dict[str, str]]:
    """Answer each line of standard input as a question of its own: ``question answer version``."""
    if sys.stdin.isatty():
        raise ConfigError("chat --json reads its questions from a pipe or a file, one per line")
    answers = []
    for question in (line.strip() for line in sys.stdin):
        if question:
            asked = [{"role": "user", "content": question}]
            said = list(endpoint.stream(model, asked, **options))
            text, version = "".join(text for text, _ in said), said[-1][1] if said else ""
            answers.append({"question": question, "answer": text, "version": version})
    return answers


def talk(endpoint: Endpoint, model: str, options: dict[str, Any]) -> None:
    """Read questions and print answers: a conversation, or, piped, one question per line."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if line.strip():
                _answer(endpoint, model, [{"role": "user", "content": line.strip()}], options)
        return
    import readline  # noqa: F401  line editing and history for input()

    console.out(f"{model}: ask away; /new starts over, Ctrl-D ends")
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            console.out()
            return
        if question == "/new":
            messages = []
        elif question:
            asked = [*messages, {"role": "user", "content": question}]
            try:
                said = _answer(endpoint, model, asked, options)
            except RequestError as error:
                console.error(error.message)
            except KeyboardInterrupt:
                console.out(" (stopped)")
            else:
                messages = [*asked, {"role": "assistant", "content": said}]


def _answer(
    endpoint: Endpoint, model: str, messages: Sequence[dict[str, str]], options: dict[str, Any]
) -> str:
    said, version = "", ""
    for text, fingerprint in endpoint.stream(model, messages, **options):
        said, version = said + text, fingerprint
        sys.stdout.write(text)
        sys.stdout.flush()
    console.out()
    if sys.stdout.isatty():
        console.note(f"({version})")
    return said
