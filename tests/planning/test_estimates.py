"""The student's estimates for one sharding against another's."""

import pytest

from rlkd_trl.planning.activations import Workload
from rlkd_trl.planning.estimates import Cluster, TeacherBytes, Training, peak_bytes, student_estimates
from rlkd_trl.planning.skeletons import Checkpoint
from tests.planning.models import T5_BASE, write_config

# Few and very wide layers, which are quick to build: t5-base's fields, D = 16384, F = 32768, A = 64, V = 100, tied.
# Embeddings VD, an encoder layer 4DA + 2DF + 2D, a decoder layer 8DA + 2DF + 3D, relative positions 2 · 32, norms 2D:
# 1,638,400 + (4,194,304 + 1,073,741,824 + 32,768) + (8,388,608 + 1,073,741,824 + 49,152) + 64 + 32,768
WIDE = {**T5_BASE, "d_model": 16384, "d_ff": 32768, "num_layers": 1, "num_heads": 1, "vocab_size": 100}
PARAMETERS = 1_638_400 + 1_077_968_896 + 1_082_179_584 + 64 + 32_768
NO_TEACHER = TeacherBytes("replicated", "float32", "none", weights=0, gathered=0, scoring=0, host=0)


@pytest.mark.parametrize(("critic", "copies", "bf16", "itemsize"), [("shared", 1, False, 4), ("separate", 2, True, 2)])
@pytest.mark.slow
def test_a_student_in_shards_is_whole_while_it_samples(critic, copies, bf16, itemsize, tmp_path):
    """Of more parameters than may be live in an update; a separate critic is in the same engine, and gathered too."""
    assert PARAMETERS > 2 * 10**9
    checkpoint = Checkpoint.of("--student", str(write_config(tmp_path, WIDE)))
    assert checkpoint.num_parameters == PARAMETERS
    workload, cluster = Workload(8, 4, 2, 4, 1, 64), Cluster(gpus=4, nodes=1, gpu_memory=80 * 2**30, reserve=0.0)
    ddp, zero1, zero2, zero3 = student_estimates(checkpoint, workload, cluster, Training(bf16=bf16, critic=critic))
    assert ddp.sampling == zero1.sampling == zero2.sampling
    elsewhere = copies * PARAMETERS * itemsize * 3 // 4
    assert zero3.sampling == ddp.sampling + elsewhere
    assert zero3.gathered == 10**9 * itemsize * 3 // 4, "in an update"
    assert peak_bytes(NO_TEACHER, zero3) >= zero3.always_held + elsewhere
