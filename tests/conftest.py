"""How the suite runs: its environment, its processes, and what no test waits for.

Nothing here imports torch: pytest reads it before it starts the processes that run the tests.
"""

import gc
import os
import signal
from collections import Counter
from collections.abc import Generator

# The Hugging Face libraries read it when they are imported: no test asks the real Hub, whatever the machine's network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are so small that threads only wait for each other; and a sum split over them rounds in another order.
# The programs that tests start read it too: with two threads beside another test some take four times the CPU time.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest

# What is written outlives a killed process without it, and no test cuts the power: each checkpoint of a few bytes
# would wait for the disk twenty times. Called with what is no open file, it fails as the real one does. That it is
# called is for `tests/resuming/test_checkpoint_files.py`.
os.fsync = lambda descriptor: os.fstat(descriptor) and None
# The same examples in every run, however long one takes on a busy machine.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")
# A shell has the jobs that it starts in the background ignore Ctrl-C; the tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MOST_WORKERS = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` alone, which is all tests, takes a process for each core where pytest-xdist is installed; as with -n.

    Tests of one file stay in one process: they share models, runs and launches. `pytest -n 0` is one process again,
    and so is a command that names files or directories.
    """
    is_whole_suite = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    is_asked = getattr(config.option, "numprocesses", 0) is not None  # 0: not installed
    if is_asked or not is_whole_suite or hasattr(config, "workerinput") or config.option.usepdb:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores > 1:
        config.option.numprocesses, config.option.dist = min(cores, MOST_WORKERS), "loadfile"
        config.option.loadscopereorder = False  # by number of tests; here files go as below


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: to look for garbage in it, again and again, takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes each takes the longest files first, so that none ends long after another."""
    if hasattr(config, "workerinput"):
        of_file = Counter()
        for item in items:
            of_file[item.path] += cpu_seconds(item)
        items.sort(key=lambda item: -of_file[item.path])


def cpu_seconds(item: pytest.Item) -> float:
    """About how long a test takes: what its mark says, `slow(60)`, or what most do."""
    mark = item.get_closest_marker("slow")
    return 0.05 if mark is None else mark.args[0] if mark.args else 3.0


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """`Trainer.train` collects garbage, which takes longer over the imported libraries than the few steps do."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tokenizer():
    """`tests.tiny_models.word_tokenizer()`."""
    from tests.tiny_models import word_tokenizer

    return word_tokenizer()
