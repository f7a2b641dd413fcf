"""A recipe as `accelerate launch` runs it, on a CPU: `launched_recipe.py KIND_FILE RECIPE FLAGS...`.

Without DeepSpeed's minute of compiling a kernel for CPU communication, which nothing here uses. KIND_FILE gets the
kind of parallelism that Accelerate has really set up: where it cannot, it takes another one and says nothing.
"""

import os
import runpy
import sys
from pathlib import Path

import deepspeed
from accelerate.state import AcceleratorState

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    kind_file, recipe = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_path(recipe, run_name="__main__")
    state = AcceleratorState()
    stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin else "none"
    if state.is_main_process:
        kind_file.write_text(f"{state.distributed_type.value} {stage} {state.num_processes}")
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed with gloo may abort in its teardown
