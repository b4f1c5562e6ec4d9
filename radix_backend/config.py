"""The one definition of every setting: a CLI flag, a Triton model parameter and a keyword are the same field."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from radix_backend.errors import InvalidArgument
from radix_backend.validation import Checked, convert, show

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


# What a step may hold where the settings do not say. A GPU needs large batches to be busy, a CPU small ones.
DEVICE_DEFAULTS = {
    "cuda": {"max_bs": 256, "max_batched_tokens": 16384},
    "cpu": {"max_bs": 64, "max_batched_tokens": 512},
}


def _by_device(name: str) -> str:
    return f"default: {DEVICE_DEFAULTS['cuda'][name]} on a GPU, {DEVICE_DEFAULTS['cpu'][name]} on a CPU"


# What the doors of one engine may have differently.
CLIENT_SIDE = ("engine_python", "engine_endpoint", "linger", "log_level")
_SWITCH_VALUES = ("true", "false", "1", "0")


# `omit_defaults`: the 0 that stands for "by device" is no value that `max_bs` accepts, so it must not travel.
class EngineConfig(
    msgspec.Struct, metaclass=Checked, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """Settings of one engine, checked when it is built: see `parse`."""

    model: Annotated[
        str,
        Meta(
            min_length=1,
            description="a directory (Hugging Face layout), a .gguf file, a hub id, or 'embedded' (SmolLM2-135M)",
        ),
    ] = "embedded"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(
            description="of weights and KV cache; auto: bfloat16, but float32 on a CPU without instructions for it; "
            "float16 needs a GPU"
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Meta(description="what computes the steps; auto: a GPU if there is one")
    ] = "auto"
    attention_backend: Annotated[
        Literal["auto", "triton", "flashinfer", "flashinfer-fa2", "flashinfer-fa3", "torch_native"],
        Meta(
            description="kernels of attention; auto: the fastest that are ready: triton (the language) on a GPU, on "
            "Hopper with flashinfer-fa3 for prefill once that is compiled; torch_native on a CPU, and on a GPU as a "
            "slow reference; flashinfer: with fa3 for prefill on Hopper, else fa2"
        ),
    ] = "auto"
    load_format: Annotated[
        Literal["auto", "dummy"], Meta(description="dummy: random weights from config.json alone, for measuring")
    ] = "auto"
    enforce_eager: Annotated[
        bool, Meta(description="launch every kernel from the CPU instead of capturing CUDA graphs")
    ] = False
    max_bs: Annotated[
        int, Meta(ge=1, le=4096, description=f"most requests in one step (batch size); {_by_device('max_bs')}")
    ] = 0
    max_batched_tokens: Annotated[
        int,
        Meta(
            ge=16,
            description="token budget of a step: decodes first, the rest goes to prefill chunks; "
            + _by_device("max_batched_tokens"),
        ),
    ] = 0
    context_len: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="most tokens of prompt plus output; default: the model's own limit"),
    ] = None
    page_size: Annotated[int, Meta(ge=1, le=256, description="tokens a KV cache page")] = 16
    gpu_memory_utilization: Annotated[
        float,
        Meta(gt=0, le=1, description="share of the device's free memory that weights and KV cache may fill"),
    ] = 0.9
    kv_cache_memory: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="bytes for the KV cache ('2GiB' is understood); default: sized from what is free"),
    ] = None
    max_queue_size: Annotated[
        int, Meta(ge=1, description="most requests waiting to run; one more is refused as UNAVAILABLE")
    ] = 4096
    tp_size: Annotated[int, Meta(ge=1, description="tensor parallel ranks: so many share the work on each layer")] = 1
    pp_size: Annotated[
        int, Meta(ge=1, description="pipeline parallel stages: each has a part of the layers, and tp_size ranks")
    ] = 1
    executor: Annotated[
        Literal["local", "ray"],
        Meta(description="what places several ranks: local: on this host; ray: a Ray cluster, on any of its hosts"),
    ] = "local"
    ray_address: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(description="HOST:PORT of the Ray cluster's head; default: RAY_ADDRESS, or the cluster of this host"),
    ] = None
    device_ids: Annotated[
        tuple[Annotated[int, Meta(ge=0)], ...] | None,
        Meta(description="GPUs of the ranks, stage by stage ('0,1' is understood); default: the first ones"),
    ] = None
    nccl_port: Annotated[
        Annotated[int, Meta(ge=1, le=65535)] | None,
        Meta(description="TCP port where the ranks find each other, on the engine's host; default: a free one"),
    ] = None
    all_reduce: Annotated[
        Literal["auto", "nccl", "one-shot"],
        Meta(
            description="how tensor parallel GPUs add up; one-shot: they write to each other's memory (one kernel for "
            "small sums; each its share of many rows, beside products); auto: one-shot where GPUs can"
        ),
    ] = "auto"
    profile: Annotated[
        bool, Meta(description="record a torch profile from the start on, as `radix-backend profile start` does later")
    ] = False
    profile_dir: Annotated[
        str | None, Meta(description="where profiles are written; default: profiles in RADIX_HOME")
    ] = None
    disable_async_scheduling: Annotated[
        bool, Meta(description="wait for each step's tokens before scheduling the next")
    ] = False
    namespace: Annotated[
        str, Meta(description="salt of the prefix cache: engines' entries with other salts never match")
    ] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="of the engine's log")] = "info"
    engine_python: Annotated[str | None, Meta(description="interpreter that runs the sidecar; default: this one")] = (
        None
    )
    engine_endpoint: Annotated[
        str | None,
        Meta(description="runtime directory of a sidecar that `radix-backend engine` started elsewhere; starts none"),
    ] = None
    linger: Annotated[
        float, Meta(ge=0, le=3600, description="seconds the sidecar outlives this client if it was the last")
    ] = 3.0

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> EngineConfig:
        """From JSON, Triton model parameters or flags. Raises InvalidArgument or Unsupported naming the setting."""
        values = dict(values)
        if isinstance(size := values.get("kv_cache_memory"), str):
            values["kv_cache_memory"] = parse_size(size, "setting 'kv_cache_memory'")
        if isinstance(ids := values.get("device_ids"), str):
            values["device_ids"] = [part.strip() for part in ids.split(",")]
        if isinstance(level := values.get("log_level"), str):
            values["log_level"] = level.lower()  # Python spells its own levels in capitals
        for name, default in zip(cls.__struct_fields__, cls.__struct_defaults__, strict=True):
            if isinstance(default, bool) and str(values.get(name, default)).lower() not in _SWITCH_VALUES:
                raise InvalidArgument(f"setting {name!r} is {show(values[name])}; accepted: true or false")
        config = convert(cls, values, "setting")
        return msgspec.structs.replace(config, model=_absolute_model(config.model))

    def on_device(self, device: Literal["cpu", "cuda"]) -> EngineConfig:
        """With the device settled, and with it how much a step may hold."""
        defaults = DEVICE_DEFAULTS[device]
        max_bs = self.max_bs or defaults["max_bs"]
        max_batched_tokens = self.max_batched_tokens or max(max_bs, defaults["max_batched_tokens"])
        return msgspec.structs.replace(self, device=device, max_bs=max_bs, max_batched_tokens=max_batched_tokens)

    @property
    def num_ranks(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def steps_in_flight(self) -> int:
        """Most steps that are launched and not settled: one a stage and, with async scheduling, one more."""
        return self.pp_size + (not self.disable_async_scheduling)

    def __post_init__(self) -> None:
        ids = self.device_ids
        if ids is not None and not len(set(ids)) == len(ids) == self.num_ranks:
            raise InvalidArgument(
                f"setting 'device_ids' is {show(','.join(map(str, ids)))}; accepted: {self.num_ranks} different ids "
                f"(tp_size {self.tp_size} x pp_size {self.pp_size})"
            )
        if self.executor == "local":
            if self.ray_address is not None:
                raise InvalidArgument(
                    f"setting 'ray_address' is {show(self.ray_address)}; accepted with executor 'ray'"
                )
            return
        if self.num_ranks == 1:
            raise InvalidArgument("setting 'executor' is 'ray'; accepted with one rank (tp_size x pp_size): 'local'")
        if ids is not None:
            raise InvalidArgument(
                f"setting 'device_ids' is {show(','.join(map(str, ids)))}; accepted with executor 'ray': nothing, for "
                "Ray gives each rank its GPU"
            )
        if (self.ray_address or "").startswith("ray://"):
            raise InvalidArgument(
                f"setting 'ray_address' is {show(self.ray_address)}; accepted: HOST:PORT of the cluster's head, for "
                "the engine runs on one of the cluster's hosts"
            )

    @property
    def is_settled(self) -> bool:
        """Whether nothing depends any more on the machine that it is used on."""
        return "auto" not in (self.device, self.dtype) and bool(self.max_bs and self.max_batched_tokens)

    def identity(self) -> str:
        """16 hex digits that two configurations share exactly when one sidecar can serve both."""
        engine_side = {name: getattr(self, name) for name in self.__struct_fields__ if name not in CLIENT_SIDE}
        return hashlib.blake2b(json.dumps(engine_side, sort_keys=True).encode(), digest_size=8).hexdigest()

    def engine_flags(self) -> str:
        """The flags, for a shell, that give a command this `identity`: all that are not the defaults."""
        fields = zip(self.__struct_fields__, self.__struct_defaults__, strict=True)
        given = [name for name, default in fields if name not in CLIENT_SIDE and getattr(self, name) != default]
        return shlex.join(flag for name in given for flag in (flag_of(name), spell(getattr(self, name))))


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def spell(value: object) -> str:
    """A setting's value as a flag has it, which `EngineConfig.parse` understands."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_size(text: str, what: str) -> int:
    """Bytes in '2GiB', '512M', '1073741824'. Raises InvalidArgument, which calls the text ``what``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"{what} is {show(text)}; accepted: bytes, or a size such as '2GiB'")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


def _absolute_model(model: str) -> str:
    """A path is made absolute, so that the sidecar (another working directory) and every client mean the same."""
    path = Path(model).expanduser()
    return os.path.realpath(path) if path.exists() and model != "embedded" else model


def radix_home() -> Path:
    """Where caches live: ``RADIX_HOME``, by default the user's cache directory."""
    home = os.environ.get("RADIX_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radix-backend"


def runtime_root() -> Path:
    """Where sockets and locks live: private to this user (0700), short enough for a unix socket path."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "radix-backend" if base else Path(f"/tmp/radix-backend-{os.getuid()}")
