"""Processes that a launcher has started: what it tells them in the environment is checked, and one of them prints."""

from collections.abc import Mapping

from rlkd_trl.errors import InputError, is_first_process

# Without these variables, processes wait for each other in vain, or each takes itself for the first.
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def say(line: str) -> None:
    """Prints a line, in the first process only."""
    if is_first_process():
        print(line, flush=True)


def check_launch(environment: Mapping[str, str]) -> None:
    """Raises `InputError` if several processes were meant, and they cannot find each other or there is only one."""
    size = environment.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise InputError(f"WORLD_SIZE={size} in the environment is no number of processes: unset it.")
    missing = [name for name in _RENDEZVOUS if name not in environment]
    if int(size) > 1 and missing:
        raise InputError(
            f"WORLD_SIZE={size} is in the environment, but not {', '.join(missing)}: unset it if it is left over from "
            "elsewhere, or start the processes with accelerate launch, rlkd-trl or torchrun."
        )
    # Accelerate's launcher of single processes sets an address if more were asked for, and starts one.
    is_of_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    is_addressed = "MASTER_ADDR" in environment and "MASTER_PORT" in environment
    if is_of_accelerate and is_addressed and not any(name in environment for name in _SIZES):
        raise InputError(
            "accelerate launch was asked for several processes and has started one (with --cpu, or without GPUs, "
            "it does so): give it --config_file accelerate_configs/cpu_2_processes.yaml, or start with rlkd-trl "
            "--num_processes N, without --cpu. If one is meant, unset MASTER_ADDR."
        )
