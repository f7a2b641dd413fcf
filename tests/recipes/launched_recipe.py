"""A recipe in a launched process, on a CPU, with what DeepSpeed would compile for minutes replaced.

The kernel for CPU communication is left out: nothing here uses it. Adam's for offloaded optimizers is one of torch's.
The file KIND gets the kind of parallelism that Accelerate has really set up: where it cannot, it takes another one and
says nothing. FEW_DEMO_STEPS in the environment: so many steps for each of the demo's models, which take minutes
otherwise, and a tenth of its held-out rows.

    launched_recipe.py KIND RECIPE FLAGS...
"""

import os
import runpy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cpuinfo
import datasets
import deepspeed
from accelerate.state import AcceleratorState
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor

from rlkd_trl.commands import demo


def adam_update(
    optimizer: int, step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    bias_correction: bool, weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor,
) -> None:  # fmt: skip
    """AdamW, in place, with the parameters of DeepSpeed's kernel."""
    weight.mul_(1 - lr * weight_decay)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = (square / (1 - beta2**step)).sqrt().add_(eps)
    weight.addcdiv_(mean, scale, value=-lr / (1 - beta1**step))


def nothing(*args) -> None:
    pass


def main(kind_file: Path, *words: str) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    adam = SimpleNamespace(create_adam=nothing, destroy_adam=nothing, adam_update=adam_update)
    CPUAdamBuilder.load = lambda builder: adam
    cpuinfo.get_cpu_info = dict  # for Adam's kernel, by processes of its own
    sys.argv = list(words)
    if "HF_DATASETS_CACHE" in os.environ:  # in a forked process it is imported already
        datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    if "FEW_DEMO_STEPS" in os.environ:
        steps = int(os.environ["FEW_DEMO_STEPS"])
        few = {"teacher_steps": steps, "student_steps": steps, "pseudo_labelled_inputs": 16}
        demo.DemoRequest = partial(demo.DemoRequest, **few)
        demo.SPLIT_SIZES.update(validation=6, test=10)
    runpy.run_path(words[0], run_name="__main__")
    state = AcceleratorState()
    stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin else "none"
    if state.is_main_process:
        kind_file.write_text(f"{state.distributed_type.value} {stage} {state.num_processes}")
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed with gloo may abort in its teardown


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
