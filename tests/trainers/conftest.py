import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_no_garbage():
    """`Trainer.train` collects garbage, which takes longer over the imported libraries than the few steps do."""
    gc.freeze()
    yield
    gc.unfreeze()
