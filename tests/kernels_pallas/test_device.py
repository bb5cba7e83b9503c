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


@pytest.mark.parametrize(
    "kind, tera", [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v6 lite", 918), ("NVIDIA H100 80GB HBM3", 989)]
)
def test_a_device_is_known_by_the_name_that_jax_gives_it(kind, tera):
    assert device.peak(kind).flops == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "NVIDIA A100-SXM4-80GB"])
def test_of_other_devices_no_peak_is_known(kind):
    assert device.peak(kind) is None
