"""The messages between doors, gateway and engine. One step is one message of columns, whatever the batch.

Columns are the bytes of little-endian numpy arrays: encoding a step of 256 requests costs a microsecond where 256
objects cost tens. `column` and `array` convert.

Doors talk to the gateway through one ZeroMQ DEALER each (`ClientMessage` → `GatewayMessage`), the gateway to the
engine through a PAIR (`EngineCommand` → `EngineMessage`), all on unix sockets inside the sidecar's runtime directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from radix_backend.sampling_params import SamplingParams
from radix_backend.version import __version__

PROTOCOL_VERSION = f"{__version__}/1"

# The values of a `finish` column. A request whose row is 0 goes on.
RUNNING, STOP, LENGTH, ABORT = 0, 1, 2, 3
FINISH_REASONS = ("", "stop", "length", "abort")


def column(values: Sequence[int] | npt.NDArray[Any], dtype: str) -> bytes:
    """The bytes of a 1-d array of ``dtype`` ("<i4", "<i8", "u1")."""
    return np.asarray(values, dtype=dtype).tobytes()


def array(data: bytes, dtype: str) -> npt.NDArray[Any]:
    """The read-only 1-d array whose bytes `column` made."""
    return np.frombuffer(data, dtype=dtype)


class Message(msgspec.Struct, array_like=True, tag=True):
    """Base of everything that travels."""


# ── door → gateway ──────────────────────────────────────────────────────────────────────


class Hello(Message):
    """First message of a client. The answer is `Welcome` or `Refused`."""

    version: str
    identity: str  # EngineConfig.identity() of the engine the client wants; "" accepts any


class Submit(Message):
    """Start a request, or go on with one: ``output_ids`` were generated and ``emitted_chars`` delivered before."""

    id: int  # chosen by the client, unique among its own running requests
    params: SamplingParams  # with a seed, of one completion (`SamplingParams.choice`)
    text: str | None = None  # the prompt: text,
    input_ids: bytes = b""  # or token ids, "<i4"
    priority: int = 0  # lower is served earlier; one step is worth `scheduler.AGING_SECONDS` of waiting
    output_ids: bytes = b""  # "<i4"
    emitted_chars: int = 0
    add_special_tokens: bool = True  # to `text`, as the tokenizer would (a BOS); False for what `RenderChat` gave
    messages: list[dict[str, Any]] = []  # or the prompt: a conversation, for the model's chat template
    chat_template_kwargs: dict[str, Any] = {}  # further variables of the template
    wants_input_ids: bool = False  # of `Admitted`


class Abort(Message):
    """End requests now. Unknown ids are ignored: they may have just finished. Nothing more is sent for them."""

    ids: list[int]


class RenderChat(Message):
    """Ask for the prompt text of a conversation: `Reply.value` is a str."""

    call: int
    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    variables: dict[str, Any] = {}


class Tokenize(Message):
    """Ask for token ids: `Reply.value` is a list of int."""

    call: int
    text: str
    add_special_tokens: bool = True


class Detokenize(Message):
    """Ask for the text of token ids: `Reply.value` is a str; of ``pieces``, a list of what each token adds to it."""

    call: int
    ids: list[int]
    pieces: bool = False


class Stats(Message):
    """Ask for the engine's figures: `Reply.value` is a mapping of name to number (see engine/stats.py)."""

    call: int
    audit: bool = False  # check the page invariant first (milliseconds): adds "audit_findings"


class Profile(Message):
    """Start or stop recording a profile of the engine: `Reply.value` is the file that a stop wrote, "" for a start."""

    call: int
    start: bool


ClientMessage = Hello | Submit | Abort | RenderChat | Tokenize | Detokenize | Stats | Profile

# ── gateway → door ──────────────────────────────────────────────────────────────────────


class ModelInfo(msgspec.Struct, frozen=True):
    """What a door may want to know about the served model."""

    name: str
    context_len: int
    vocab_size: int
    eos_token_ids: list[int]


class Welcome(Message):
    model: ModelInfo


class Refused(Message):
    """The sidecar is another version or serves another model; nothing else will be answered."""

    reason: str


class Logprob(msgspec.Struct, array_like=True, frozen=True):
    """How likely a token was, by the model's own distribution (before penalties, temperature and filters)."""

    token_id: int
    logprob: float  # natural logarithm
    rank: int  # 1 + how many tokens were more likely
    decoded_token: str  # of a generated token: the text that it released; of any other: its own text
    raw: bytes | None = None  # what it is of the text's UTF-8, if not `decoded_token`: a character may take several


class Receipt(msgspec.Struct, array_like=True, frozen=True):
    """What a finished request cost."""

    num_input_tokens: int
    num_output_tokens: int
    cached_tokens: int  # prompt tokens found in the radix cache when the request was first admitted
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    retractions: int
    resumed: bool


class Update(Message):
    """What one step did for this client's requests; the columns have one entry a request."""

    ids: bytes  # "<i8"
    counts: bytes  # "<i4" tokens of this request in `tokens` (0 is possible)
    finish: bytes  # "u1"
    tokens: bytes  # "<i4", all requests' tokens one after the other
    texts: list[str]  # what these tokens released; "" while a character or a stop string is open
    receipts: list[Receipt]  # of the requests that finish here, in order
    # One entry a request, or empty where none wants any: for each of its tokens the token itself, then the likeliest.
    logprobs: list[list[list[Logprob]]] = []


class Admitted(Message):
    """The request's prompt was tokenized. Comes before everything else but a `Rejected`."""

    id: int
    num_input_tokens: int
    input_ids: bytes = b""  # "<i4", if asked for


class PromptLogprobs(Message):
    """Of the next tokens of a request's prompt, from the second on; all come before its first generated token."""

    id: int
    tokens: list[list[Logprob]]  # as in `Update`


class Rejected(Message):
    """A request ends with an error; nothing more is sent for it."""

    id: int
    code: str  # see errors.from_code
    message: str


class Reply(Message):
    """The answer to a call, or its error."""

    call: int
    value: Any = None
    code: str = ""
    message: str = ""


GatewayMessage = Welcome | Refused | Admitted | Update | PromptLogprobs | Rejected | Reply

# ── gateway → engine ──────────────────────────────────────────────────────────────────────


class Admit(Message):
    """A request in the engine's terms: tokens only. ``stop_token_ids`` already holds the EOS ids where they count."""

    id: int  # unique in the life of the gateway
    input_ids: bytes  # "<i4"
    params: SamplingParams
    stop_token_ids: list[int]
    priority: int = 0
    output_ids: bytes = b""  # "<i4"
    bad_words: list[list[int]] = []  # `params.bad_words` as tokens: every way to write each


class Finish(Message):
    """End requests. ``STOP``: the gateway saw a stop string, a receipt is wanted. ``ABORT``: nothing is answered."""

    ids: list[int]
    reason: int


class EngineStats(Message):
    call: int
    audit: bool = False


class EngineProfile(Message):
    call: int
    start: bool


EngineCommand = Admit | Finish | EngineStats | EngineProfile

# ── engine → gateway ──────────────────────────────────────────────────────────────────────


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Of one token: its own log probability first, then those of the likeliest, in order."""

    rank: int  # of the token itself
    token_ids: bytes  # "<i4"
    logprobs: bytes  # "<f4"


class Step(Message):
    """What one step did: one entry a request that got tokens or ended."""

    ids: bytes  # "<i8"
    counts: bytes  # "<i4"
    # "u1"; STOP is a stop token (the last of this request's tokens), or the answer to Finish(STOP)
    finish: bytes
    tokens: bytes  # "<i4"
    receipts: list[Receipt]  # of the requests that finish here, in order
    logprobs: list[TokenLogprobs | None] = []  # one entry a token, or empty where nobody wants any


class PromptScores(Message):
    """Of the next tokens of a request's prompt, see `PromptLogprobs`."""

    id: int
    tokens: list[TokenLogprobs]


class EngineRejected(Message):
    id: int
    code: str
    message: str


class EngineReply(Message):
    call: int
    value: dict[str, float] | str
    code: str = ""  # of an error, see errors.from_code
    message: str = ""


EngineMessage = Step | PromptScores | EngineRejected | EngineReply

# ── sidecar processes → supervisor → leases ──────────────────────────────────────────────────────────────────────


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a sidecar process about itself, as JSON on the pipe ``RADIX_REPORT_FD``.

    ``phase`` "ready" means that the process serves; "failed" that starting again cannot help (``message`` says why);
    any other phase is work on the way ("converting", "loading weights"), ``fraction`` of it done.
    """

    phase: str
    fraction: float | None = None
    message: str = ""
    progress: int = 0  # grows whenever the process gets something done: the heartbeat


class Status(msgspec.Struct, frozen=True, tag=True):
    """What the supervisor tells every lease, as one JSON datagram: state of the sidecar's current generation."""

    state: str  # "starting", "ready", "restarting", "failed", "stopping"
    generation: int
    detail: str = ""  # "loading weights 40 %", or why it restarts or failed
    model_dir: str = ""


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """What the supervisor tells every lease once a second while the sidecar is ready."""

    silence: float  # seconds since the process that made progress longest ago did so


class Log(msgspec.Struct, frozen=True, tag=True):
    """A line of a sidecar process for whoever shows logs."""

    level: str  # "debug", "info", "warning", "error"
    source: str  # "gateway", "engine", "supervisor", "loading"
    line: str


class Lease(msgspec.Struct, frozen=True, tag=True):
    """What a client says on its lease socket when it connects."""

    version: str
    identity: str
    wants_logs: bool = False
    parent: int = 0  # if this process dies, so must the client: the supervisor kills an orphan
    linger: float = 0.0  # seconds that the sidecar outlives this client, if it was the last one


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The client leaves on purpose. ``linger`` False: if it was the last one, the sidecar need not wait."""

    linger: bool = True
