"""What a launcher says: several processes that cannot find each other, or of which there is one, are found at once."""

import pytest

from rlkd_trl.commands.launched import check_launch
from rlkd_trl.errors import InputError

FOUND = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ONE_OF_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2", **FOUND},
        {"WORLD_SIZE": "2", **FOUND, **ONE_OF_ACCELERATE},
        ONE_OF_ACCELERATE,
        {"MASTER_ADDR": "10.0.0.1"},
        {**ONE_OF_ACCELERATE, "MASTER_ADDR": "10.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_sound_ones(environment):
    check_launch(environment)


@pytest.mark.parametrize("name", FOUND)
def test_processes_that_cannot_find_each_other(name):
    found = {key: value for key, value in FOUND.items() if key != name}
    with pytest.raises(InputError, match=f"WORLD_SIZE=2 is in the environment, but not {name}: unset it"):
        check_launch({"WORLD_SIZE": "2", **found})


@pytest.mark.parametrize("size", ["0", "-1", "two", ""])
def test_no_number_of_processes(size):
    with pytest.raises(InputError, match=f"WORLD_SIZE={size} in the environment is no number"):
        check_launch({"WORLD_SIZE": size, **FOUND})


def test_one_process_of_several():
    """What `accelerate launch --cpu --num_processes 2` sets."""
    with pytest.raises(InputError, match="was asked for several processes and has started one"):
        check_launch({**ONE_OF_ACCELERATE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
