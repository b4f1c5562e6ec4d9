"""Streamed completions of any server with OpenAI's API. Prompts are sent as token ids.

``ignore_eos`` and ``return_token_ids`` (for conversations alone) are extensions that vLLM and SGLang share; usage,
which says how many tokens were generated and cached, is asked for in the stream's last chunk.
"""

from __future__ import annotations

import time
from typing import Any

import aiohttp
import msgspec

from radix_backend.load import Trace

_DATA = b"data: "
_DONE = b"[DONE]"


class OpenAIDoor:
    def __init__(self, url: str, model: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model

    async def __aenter__(self) -> OpenAIDoor:
        timeout = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def connect(self) -> _Connection:
        if not self._model:
            async with self._session.get(f"{self._url}/models") as answer:
                answer.raise_for_status()
                self._model = (await answer.json())["data"][0]["id"]
        return _Connection(self._session, f"{self._url}/completions", self._model)


class _Connection:
    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = url
        self._model = model

    async def ask(
        self, prompt: list[int], num_outputs: int, temperature: float, want_tokens: bool, trace: Trace
    ) -> list[int]:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": num_outputs,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if want_tokens:
            body["return_token_ids"] = True
        tokens: list[int] = []
        usage: dict[str, Any] | None = None
        async with self._session.post(self._url, json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"HTTP {answer.status}: {(await answer.text())[:500]}")
            async for line in answer.content:
                if not line.startswith(_DATA) or line[len(_DATA) :].strip() == _DONE:
                    continue
                now = time.monotonic()
                chunk = msgspec.json.decode(line[len(_DATA) :])
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"]))
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or []:
                    if choice.get("text") or choice.get("token_ids"):
                        trace.times.append(now)
                        tokens += choice.get("token_ids") or []
        if usage is None:
            raise RuntimeError("the server sent no usage: how many tokens it generated is not known")
        trace.num_tokens = int(usage["completion_tokens"])
        trace.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if want_tokens and not tokens:
            raise RuntimeError("the server returns no token_ids, without which a conversation cannot go on")
        return tokens

    async def close(self) -> None:
        pass
