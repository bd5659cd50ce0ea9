"""A running server, and how it is asked: with the standard library's HTTP client alone."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from inspect_lora.common import InspectError, one_line

GIVE_THE_ADDRESS = "Give the address of an OpenAI-compatible server, such as http://localhost:8000."


@dataclass
class Server:
    """A running server, and what it calls the adapter and its base model."""

    url: str  # without /v1
    adapter: str = ""
    base: str = ""
    folder: str = ""  # where it says that it has the adapter from
    window: float = math.inf  # tokens that a prompt and its reply may have together

    def ask(self, path: str, body: dict[str, Any] | None, advice: str) -> dict[str, Any]:
        """Return the server's answer to one request, or raise with what it says and the advice."""
        status, answer = self.send(path, body)
        if status == 200 and isinstance(answer, dict):
            return answer
        if status in (401, 403):
            advice = (
                "Set the environment variable VLLM_API_KEY or OPENAI_API_KEY to the key that the "
                "server was started with."
            )
        raise InspectError(f"{self.url}{path}: the server answers {status}: {answer}\n{advice}")

    def send(self, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any] | str]:
        """Return the status of a request, and the answer's object or its text in one line.

        The key of the environment is always sent, since a server may ask for it on some paths only.
        Each request has a connection of its own, so that a balancer may choose another replica.
        """
        if not re.match(r"https?://[^/\s]", self.url):
            raise InspectError(f"{self.url} is no address.\n{GIVE_THE_ADDRESS}")
        key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        seconds = 10 if body is None else 300
        try:
            request = urllib.request.Request(f"{self.url}{path}", data, headers)
            with answer_to(request, seconds) as response:
                status, text = response.status, response.read().decode(errors="replace")
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = one_line(error) or type(error).__name__
            raise InspectError(
                f"{self.url}{path} cannot be reached ({reason}).\nIs the server running, and has "
                f"it finished loading? {GIVE_THE_ADDRESS}"
            ) from error
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = text
        if status == 200:
            return 200, answer if isinstance(answer, dict) else one_line(answer, 100)
        for key in ("error", "message"):  # an error of vLLM is {"error": {"message": ...}}
            if isinstance(answer, dict):
                answer = answer.get(key, answer)
        return status, one_line(answer)


def answer_to(request: urllib.request.Request, seconds: float) -> Any:
    """Return a server's answer, also one that tells an error, which may end halfway as well."""
    try:
        return urllib.request.urlopen(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        return error
