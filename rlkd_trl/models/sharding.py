"""Models whose weights DeepSpeed's ZeRO-3 has cut into one shard per process (Rajbhandari et al. 2020).

A weight is gathered from all processes when the module that owns it is called, and dropped after the call. Every
process must therefore make the same calls in the same order. Where the amount of work differs, the processes agree on
the largest number of calls, and those with less work fill up with calls whose results nobody uses.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from rlkd_trl.models.private_apis import is_zero3_parameter, tying_weights_by, without_deepspeed_settings

# The attribute that marks parameters inside `gathered`.
_HELD = "is_held_whole"


def is_sharded(model: nn.Module) -> bool:
    """Whether calls of this model gather weights: ZeRO-3 has sharded some that are not inside `gathered` now."""
    return any(is_zero3_parameter(p) and not getattr(p, _HELD, False) for p in model.parameters())


def largest_of_all(count: int, device: torch.device) -> int:
    """The largest `count` of all processes; each must call this."""
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


@contextmanager
def gathered(parameters: Iterable[Parameter]) -> Iterator[None]:
    """Within it every process holds these parameters whole, for reading only; all processes enter and leave together.

    ZeRO-3's hooks still drop a weight after a call of its module; see `whole`.
    """
    shards = list(dict.fromkeys(parameter for parameter in parameters if is_zero3_parameter(parameter)))
    if not shards:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shards):
        for parameter in shards:
            setattr(parameter, _HELD, True)
        try:
            yield
        finally:
            for parameter in shards:
                delattr(parameter, _HELD)


@contextmanager
def whole(engine: nn.Module) -> Iterator[None]:
    """Within it every process holds a ZeRO-3 engine's whole model, for work without gradients: no call gathers."""
    from trl.models.utils import add_hooks, remove_hooks

    with gathered(engine.parameters()):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


@contextmanager
def loading_shards(config: dict | None) -> Iterator[None]:
    """Within it `from_pretrained` gives each process its shard of every weight, as the DeepSpeed `config` says.

    With None it loads whole models, also in a run whose own settings name ZeRO-3: the trainer then shards the student,
    and nobody the other models.
    """
    with without_deepspeed_settings():
        if config is None:
            yield
            return
        alive = HfDeepSpeedConfig(config)  # transformers finds it for as long as somebody holds it
        with tying_weights_by(_tie_gathered_weights):
            yield
        del alive


def _tie_gathered_weights(tie_weights: Callable) -> Callable:
    """`PreTrainedModel.tie_weights`, called while the weights that it compares are gathered.

    transformers 5 ties every T5's head to its embeddings unless the checkpoint has different values for them (as T0's
    and Flan-T5's have). ZeRO-3's empty placeholders would compare as equal.
    """

    def tie(model: PreTrainedModel, *args, **kwargs) -> None:
        names = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
        with gathered([model.get_parameter(name) for name in names]):
            tie_weights(model, *args, **kwargs)

    return tie
