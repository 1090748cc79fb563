"""One training, on one device and on several: the same losses and weights."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.on_devices import RANK
from tests.on_devices import VOCABULARY
from tests.on_devices import WIDTH


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `tests.on_devices` finds, by backend and name."""
    folder, found = tmp_path_factory.mktemp("devices"), {}

    def run(backend, name):
        if (backend, name) not in found:
            path = folder / f"{backend}_{name}.npz"
            environment = {
                "KERAS_BACKEND": backend,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            }
            subprocess.run(
                [sys.executable, "-m", "tests.on_devices", name, str(path)],
                env=os.environ | environment,
                check=True,
            )
            found[backend, name] = dict(np.load(path))
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
