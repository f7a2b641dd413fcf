"""Bytes as torch's own allocator reports them, for the planner's estimates to be held against."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that the CPU allocator had handed out at a time during `work`, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def weight_bytes(model: nn.Module) -> int:
    """Of all storages that parameters, buffers and bitsandbytes' statistics live in, each once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code]
        if (statistics := getattr(parameter, "SCB", None)) is not None:
            tensors.append(statistics)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
