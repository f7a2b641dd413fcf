"""Without the optional dependencies everything works but what needs them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# As if they were not installed: neither found nor imported.
WITHOUT_EXTRAS = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "bitsandbytes"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: (
    None if name.split(".")[0] in ("deepspeed", "bitsandbytes") else found(name, *args)
)
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.slow
def test_training_needs_neither_deepspeed_nor_bitsandbytes_and_what_needs_them_says_so(tmp_path):
    code = f"""
from rlkd_trl.errors import InputError
from rlkd_trl.teachers import Teacher
from tests.trainers.tiny_runs import run

recorder = run("ppo", {str(tmp_path)!r}, use_cpu=True)
print(len(recorder.logs), sorted({{"deepspeed", "bitsandbytes"}} & set(sys.modules)))
for settings in ({{"placement": "zero3"}}, {{"quantization": "int8"}}):
    try:
        Teacher.from_pretrained("nowhere", **settings)
    except InputError as error:
        print(error)
"""
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS + code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    trained, sharded, quantised = finished.stdout.splitlines()[-3:]
    assert trained == "2 []"
    assert "needs DeepSpeed: pip install 'rlkd_trl[deepspeed]'" in sharded
    assert "needs bitsandbytes: pip install 'rlkd_trl[quantization]'" in quantised
