"""Which part of a model each rank has. No torch here.

Ranks are numbered stage by stage: rank = stage * tp_size + tp_rank. A stage has consecutive layers; its ranks share
each of them: heads, the inner dimension of the MLP and the vocabulary are cut into ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from radix_backend.config import EngineConfig
from radix_backend.errors import InvalidArgument
from radix_backend.loading.model_config import ModelConfig


@dataclass(frozen=True)
class Shard:
    """What one rank has of ``model``."""

    model: ModelConfig
    tp_rank: int = 0
    tp_size: int = 1
    stage: int = 0
    pp_size: int = 1

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, rank: int) -> Shard:
        """Raises InvalidArgument for a layout that this model cannot have."""
        check_layout(config, model)
        stage, tp_rank = divmod(rank, config.tp_size)
        return cls(model, tp_rank, config.tp_size, stage, config.pp_size)

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it samples them."""
        return self.stage == self.pp_size - 1

    @property
    def part(self) -> ModelConfig:
        """The model as if this were all of it: with the sizes of the part."""
        model, size = self.model, self.tp_size
        return replace(
            model,
            num_layers=len(self.layers),
            num_heads=model.num_heads // size,
            num_kv_heads=len(self.kv_heads),
            intermediate_size=model.intermediate_size // size,
            vocab_size=len(self.vocabulary),
        )

    @property
    def layers(self) -> range:
        counts = split_layers(self.model, self.pp_size)
        first = sum(counts[: self.stage])
        return range(first, first + counts[self.stage])

    @property
    def heads(self) -> range:
        return self._share(self.model.num_heads)

    @property
    def kv_heads(self) -> range:
        """With more ranks than KV heads several ranks have the same one."""
        kv = self.model.num_kv_heads
        if kv >= self.tp_size:
            return self._share(kv)
        head = self.tp_rank * kv // self.tp_size
        return range(head, head + 1)

    @property
    def inner(self) -> range:
        return self._share(self.model.intermediate_size)

    @property
    def vocabulary(self) -> range:
        """Tokens; where they cannot be divided, the first ranks have one more."""
        each, more = divmod(self.model.vocab_size, self.tp_size)
        first = self.tp_rank * each + min(self.tp_rank, more)
        return range(first, first + each + (self.tp_rank < more))

    def _share(self, whole: int) -> range:
        each = whole // self.tp_size
        return range(self.tp_rank * each, (self.tp_rank + 1) * each)


def check_layout(config: EngineConfig, model: ModelConfig) -> None:
    """Raises InvalidArgument naming what would work."""
    if not _divides(config.tp_size, model):
        accepted = ", ".join(str(size) for size in range(1, model.num_heads + 1) if _divides(size, model))
        raise InvalidArgument(
            f"setting 'tp_size' is {config.tp_size}; accepted: {accepted}, by which the model's {model.num_heads} "
            f"heads, {model.num_kv_heads} KV heads and intermediate size of {model.intermediate_size} can be divided"
        )
    if config.pp_size > model.num_layers:
        raise InvalidArgument(
            f"setting 'pp_size' is {config.pp_size}; accepted: 1 to {model.num_layers} (the model's layers)"
        )


def _divides(size: int, model: ModelConfig) -> bool:
    kv = model.num_kv_heads
    return not (model.num_heads % size or model.intermediate_size % size or (kv % size and size % kv))


def split_layers(model: ModelConfig, stages: int) -> list[int]:
    """How many layers each stage gets, so that the slowest stage is as fast as can be.

    A decode step costs what it reads: a layer's weights and, under load, about as much KV again; the last stage reads
    the LM head beside its layers.
    """
    if stages == 1:
        return [model.num_layers]
    layer = 2 * model.num_layer_parameters
    head = model.vocab_size * model.hidden_size

    def slowest(last: int) -> int:
        return max(-(-(model.num_layers - last) // (stages - 1)) * layer, last * layer + head)

    last = min(range(model.num_layers - stages + 1, 0, -1), key=slowest)
    each, more = divmod(model.num_layers - last, stages - 1)
    return [each + (stage < more) for stage in range(stages - 1)] + [last]
