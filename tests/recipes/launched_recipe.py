"""A recipe as `accelerate launch` runs it, on a CPU: `launched_recipe.py KIND_FILE RECIPE FLAGS...`.

Without DeepSpeed's minute of compiling a kernel for CPU communication, which nothing here uses. KIND_FILE gets the
kind of parallelism that Accelerate has really set up: where it cannot, it takes another one and says nothing.
FEW_DEMO_STEPS in the environment: so many steps for each of the demo's models, which take minutes otherwise.
"""

import os
import runpy
import sys
from functools import partial
from pathlib import Path

import deepspeed
from accelerate.state import AcceleratorState

from rlkd_trl.commands import demo

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

if __name__ == "__main__":
    kind_file, recipe = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    if "FEW_DEMO_STEPS" in os.environ:
        steps = int(os.environ["FEW_DEMO_STEPS"])
        few = {"teacher_steps": steps, "student_steps": steps, "pseudo_labelled_inputs": 16}
        demo.DemoRequest = partial(demo.DemoRequest, **few)
    runpy.run_path(recipe, run_name="__main__")
    state = AcceleratorState()
    stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin else "none"
    if state.is_main_process:
        kind_file.write_text(f"{state.distributed_type.value} {stage} {state.num_processes}")
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed with gloo may abort in its teardown
