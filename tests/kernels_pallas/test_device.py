"""What a program is traced for."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import device


def test_without_a_mesh_it_is_the_default_device():
    assert device.platform() == jax.default_backend()
    assert device.kind() == jax.devices()[0].device_kind


@pytest.mark.parametrize("name, platform", [("tpu", "tpu"), ("cuda", "gpu"), ("cpu", "cpu")])
def test_a_mesh_may_be_of_devices_that_are_not_here(name, platform):
    mesh = AbstractMesh((2,), ("x",), abstract_device=AbstractDevice("TPU v5", 2, name))
    with jax.sharding.use_abstract_mesh(mesh):
        assert device.platform() == platform
        assert device.kind() == "TPU v5"
