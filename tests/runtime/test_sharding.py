import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from vlmem_jax.runtime import sharding
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh


def test_one_axis_takes_the_rest():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": len(jax.devices()) // 4, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_sizes_that_do_not_fit_name_the_keys():
    with pytest.raises(ValueError, match="all 8 devices, but mesh.data=3, mesh.fsdp=-1, .* mesh.tensor=1"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(ValueError, match="at most one of them -1"):
        MeshConfig(data=-1, fsdp=-1)


def test_stacked_parameters_keep_their_layer_axis_whole():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    stacked = sharding.param_sharding(mesh, ("embed", "heads", "head_dim"), ndim=4)
    assert stacked.spec == PartitionSpec(None, "fsdp", "tensor", None)


def test_what_cannot_be_split_evenly_stays_whole():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shapes = {"head": jax.ShapeDtypeStruct((8, 93), "float32"), "stacked": jax.ShapeDtypeStruct((3, 8, 4), "float32")}
    places = sharding.param_shardings(mesh, shapes, {"head": ("embed", "vocab"), "stacked": ("embed", "heads")})
    assert places["head"].spec == PartitionSpec("fsdp", None)
    assert places["stacked"].spec == PartitionSpec(None, "fsdp", "tensor")
    with jax.set_mesh(mesh):
        rows = jax.jit(lambda x: sharding.constrain(x, "batch", None))(jax.numpy.ones((3, 5)))
    assert rows.sharding.is_fully_replicated


def test_an_axis_is_split_over_as_many_mesh_axes_as_go():
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, context=2))):
        specs = [sharding.even_spec((tiles, 4), "parts", None)[0] for tiles in (8, 12, 6, 3)]
    assert specs == [("data", "fsdp", "context"), ("data", "fsdp"), "data", None]
