"""One training, on one device and on several: the same losses and weights."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.on_devices import RANK
from tests.on_devices import VOCABULARY
from tests.on_devices import WIDTH

WAYS = {
    "tensorflow": ["mirrored", "one_device"],
    "jax": ["one_device", "data_parallel", "model_parallel"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `tests.on_devices` finds, by backend and name.

    A process for each backend, since to start one takes the most time.
    """
    folder, found = tmp_path_factory.mktemp("devices"), {}

    def run(backend, name):
        if (backend, name) not in found:
            environment = {
                "KERAS_BACKEND": backend,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they take a while
            }
            names = WAYS[backend]
            arguments = ["-m", "tests.on_devices", str(folder), *names]
            subprocess.run(
                [sys.executable, *arguments],
                env=os.environ | environment,
                check=True,
            )
            for each in names:
                found[backend, each] = dict(np.load(folder / f"{each}.npz"))
        return found[backend, name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, name",
    [
        ("tensorflow", "mirrored"),
        ("jax", "data_parallel"),
        ("jax", "model_parallel"),
    ],
)
def test_several_devices_train_as_one_does(trained, backend, name):
    expected = trained(backend, "one_device")
    found = trained(backend, name)
    assert len(expected["losses"]) == 3
    assert {"tokens/codes", "tokens/basis", "losses"} < expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(
            found[key], values, rtol=1e-5, atol=1e-6, err_msg=key
        )


@pytest.mark.slow
def test_factors_are_split_and_never_gathered(trained):
    found = trained("jax", "model_parallel")
    assert tuple(found["codes_part"]) == (VOCABULARY // 2, RANK)
    assert tuple(found["basis_part"]) == (RANK, WIDTH)
    assert tuple(found["teacher_part"]) == (VOCABULARY // 2, WIDTH)
    assert max(found["gathered"]) < VOCABULARY // 2
