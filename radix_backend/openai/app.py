"""The routes: from an HTTP request to the engine and back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from radix_backend.client import EngineClient
from radix_backend.errors import InvalidArgument, NotFound, RadixError, Unavailable
from radix_backend.openai.answers import Answers, ChatAnswers, CompletionAnswers, Echo, Heading
from radix_backend.openai.exchange import Exchanges, Question
from radix_backend.openai.gate import TooLarge
from radix_backend.openai.metrics import CONTENT_TYPE, Registry
from radix_backend.openai.openapi import DOCUMENT
from radix_backend.openai.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    Prompt,
    TokenizeRequest,
    parse_body,
    parse_generation,
)
from radix_backend.openai.responses import Error, Health, Model, Models, Text, Tokens, json_response, refusal
from radix_backend.openai.stream import EngineResponse
from radix_backend.openai.uploads import Uploads
from radix_backend.sampling_params import SamplingParams
from radix_backend.validation import show
from radix_backend.version import __version__


def make_app(routes: Routes) -> FastAPI:
    """The application, but for what `Gate` does before it."""
    app = FastAPI(title="Radix Backend", version=__version__, openapi_url=None)
    app.post("/v1/chat/completions")(routes.chat)
    app.post("/v1/completions")(routes.completions)
    app.post("/tokenize")(routes.tokenize)
    app.post("/detokenize")(routes.detokenize)
    for path, handler in (
        ("/v1/models", routes.models),
        ("/v1/models/{name:path}", routes.model),
        ("/health", routes.health),
        ("/metrics", routes.metrics),
        ("/openapi.json", routes.document),
    ):
        app.api_route(path, methods=["GET", "HEAD"])(handler)  # uvicorn leaves out the body of an answer to HEAD
    app.exception_handler(RadixError)(routes.on_error)
    app.exception_handler(TooLarge)(_on_too_large)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(Exception)(_on_failure)
    return app


async def _on_too_large(request: Request, error: TooLarge) -> Response:
    return error.answer()


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}"
    return refusal(error.status_code, f"{what}: {error.detail}; see /openapi.json", None, error.headers)


async def _on_failure(request: Request, error: Exception) -> Response:
    """A defect of ours; its traceback is in the log."""
    return json_response(Error.of(RadixError(f"the request failed: {type(error).__name__}")), 500)


class Routes:
    """The handlers. All waiting is asyncio's: calls that block the client are made on threads."""

    def __init__(
        self,
        exchanges: Exchanges,
        uploads: Uploads,
        names: Sequence[str],
        fingerprint: str,
        max_completions: int,
        registry: Registry,
    ) -> None:
        """``names`` are the served model's; the first is the one that answers tell. ``max_completions`` are accepted
        of one request."""
        self._exchanges = exchanges
        self._uploads = uploads
        self._client: EngineClient = exchanges.client
        self._names = names
        self._fingerprint = fingerprint
        self._max_completions = max_completions
        self._registry = registry
        self._created = int(time.time())

    async def chat(self, request: Request) -> Response:
        asked, params = parse_generation(ChatRequest, await self._uploads.read(request))
        self._check_model(asked.model)
        self._check_completions(1, params.n)
        messages = [message.for_template() for message in asked.messages]
        question = Question({"messages": messages, "chat_template_kwargs": asked.chat_template_kwargs})
        answers = ChatAnswers(asked, params, self._heading(request))
        return self._ask(request, asked, [question], params, answers)

    async def completions(self, request: Request) -> Response:
        asked, params = parse_generation(CompletionRequest, await self._uploads.read(request))
        self._check_model(asked.model)
        prompts = asked.prompts
        self._check_completions(len(prompts), params.n)
        if asked.echo:
            echo = partial(self._echo, asked.add_special_tokens, params.logprobs is not None)
            echoed = await asyncio.gather(*(asyncio.to_thread(echo, prompt) for prompt in prompts))
            questions, echoes = [question for question, _ in echoed], [echo for _, echo in echoed]
        else:
            questions, echoes = [Question.of(prompt, asked.add_special_tokens) for prompt in prompts], []
        answers = CompletionAnswers(asked, params, self._heading(request), echoes)
        return self._ask(request, asked, questions, params, answers)

    def _ask(
        self,
        request: Request,
        asked: Generation,
        questions: Sequence[Question],
        params: SamplingParams,
        answers: Answers,
    ) -> Response:
        request.scope["asked_by"] = asked.user
        exchange = self._exchanges.open(questions, params, asked.priority, asked.stream)
        return EngineResponse(exchange, answers, asked, self._exchanges.recorder)

    def _echo(self, add_special_tokens: bool, with_logprobs: bool, prompt: Prompt) -> tuple[Question, Echo]:
        """On a thread."""
        if isinstance(prompt, str):
            if not with_logprobs:
                return Question.of(prompt, add_special_tokens), Echo(prompt)
            ids = self._client.tokenize(prompt, add_special_tokens=add_special_tokens)
        else:
            ids = prompt
        pieces = self._client.token_pieces(ids)
        text = prompt if isinstance(prompt, str) else "".join(pieces)
        if not with_logprobs:
            return Question({"input_ids": ids}), Echo(text)
        return Question({"input_ids": ids}, num_scored=len(ids) - 1), Echo(text, pieces)

    async def tokenize(self, request: Request) -> Response:
        asked = parse_body(TokenizeRequest, await self._uploads.read(request))
        self._check_model(asked.model)
        tokens = await asyncio.to_thread(self._tokenize, asked)
        return json_response(Tokens(len(tokens), self._client.model.context_len, tokens))

    def _tokenize(self, asked: TokenizeRequest) -> list[int]:
        """On a thread."""
        prompt, add_special_tokens = asked.prompt or "", asked.add_special_tokens
        if asked.messages is not None:
            messages = [message.for_template() for message in asked.messages]
            variables, generation = asked.chat_template_kwargs, asked.add_generation_prompt
            prompt = self._client.render_chat(messages, add_generation_prompt=generation, variables=variables)
            add_special_tokens = False  # the template has written them
        return self._client.tokenize(prompt, add_special_tokens=add_special_tokens)

    async def detokenize(self, request: Request) -> Response:
        asked = parse_body(DetokenizeRequest, await self._uploads.read(request))
        self._check_model(asked.model)
        try:
            return json_response(Text(await asyncio.to_thread(self._client.detokenize, asked.tokens)))
        except InvalidArgument as error:
            raise InvalidArgument(str(error).replace("'ids'", "'tokens'", 1)) from None

    async def models(self) -> Response:
        return json_response(Models(data=[self._model(name) for name in self._names]))

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return json_response(self._model(name))

    async def health(self) -> Response:
        ailment = self._client.ailment
        return json_response(Health("unavailable", ailment) if ailment else Health("ok"), 503 if ailment else 200)

    async def metrics(self) -> Response:
        return Response(self._registry.page(), media_type=CONTENT_TYPE)

    async def document(self) -> JSONResponse:
        return JSONResponse(DOCUMENT)

    async def on_error(self, request: Request, error: RadixError) -> Response:
        self._exchanges.recorder.failed(error)
        headers = {"retry-after": "1"} if isinstance(error, Unavailable) else None
        return json_response(Error.of(error), error.http_status, headers)

    def _model(self, name: str) -> Model:
        ready = self._client.status.state == "ready"
        return Model(id=name, created=self._created, max_model_len=self._client.model.context_len if ready else None)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise NotFound(f"'model' is {show(name)}, which is not served here; accepted: {', '.join(self._names)}")

    def _check_completions(self, num_prompts: int, n: int) -> None:
        if num_prompts * n <= self._max_completions:
            return
        given = f"field 'n' is {n}"
        if num_prompts > 1:
            given = f"field 'prompt' holds {num_prompts} prompts and 'n' is {n}, which is {num_prompts * n} completions"
        raise InvalidArgument(f"{given}; accepted: at most {self._max_completions} completions in a request")

    def _heading(self, request: Request) -> Heading:
        return Heading(request.scope["request_id"], self._names[0], self._fingerprint)
