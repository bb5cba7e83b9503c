import numpy as np
import pytest
import safetensors.numpy

from vlmem_jax.geometry.checkpoint import opened
from vlmem_jax.geometry.model import load_geometry
from vlmem_jax.hub.safetensors_io import Writer, digest


def changed(world, folder, rename=lambda name: name, drop=(), **more):
    """A folder of the checkpoint's tensors, some of which are called otherwise, missing or new."""
    tensors = {rename(name): x for name, x in world.tensors.items() if name not in drop} | more
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_folder_a_file_and_a_repository_hold_the_same(pi3_checkpoint, hub):
    hub.add("someone/Pi3", pi3_checkpoint.folder)
    found = [opened(where) for where in (
        pi3_checkpoint.folder, pi3_checkpoint.folder / "model.safetensors", "someone/Pi3", "someone/Pi3@main",
    )]  # fmt: skip
    assert {kind for kind, _ in found} == {"pi3"}
    assert len({digest(tensors) for _, tensors in found}) == 1


def test_a_digest_is_of_the_numbers_and_not_of_files(pi3_checkpoint, tmp_path):
    (tmp_path / "shards").mkdir()
    tensors = pi3_checkpoint.tensors
    writer = Writer(tmp_path / "shards", {name: (x.shape, x.dtype) for name, x in tensors.items()}, 10**6)
    for name, x in tensors.items():
        writer[name][...] = x
    writer.flush()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    whole = digest(opened(pi3_checkpoint.folder)[1])
    assert digest(opened(tmp_path / "shards")[1]) == whole
    tuned = {"conf_head.proj.bias": tensors["conf_head.proj.bias"] + 1}
    assert digest(opened(changed(pi3_checkpoint, tmp_path / "tuned", **tuned))[1]) != whole


@pytest.mark.parametrize(
    "name", ["mask_token", "encoder.mask_token", "metric_token", "ray_embed.proj.weight", "point_head.output.0.weight"]
)
def test_pi3x_is_refused_by_name(pi3_checkpoint, tmp_path, name):
    drop = ("point_head.proj.weight", "point_head.proj.bias") if name.startswith("point_head") else ()
    folder = changed(pi3_checkpoint, tmp_path / "x", drop=drop, **{name: np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=f"is Pi3X, .*it has {name}; take a checkpoint of pi3, such as yyfz233/Pi3"):
        load_geometry(folder)


def test_tensors_that_do_not_fit_are_named_all_at_once(pi3_checkpoint, tmp_path):
    folder = changed(
        pi3_checkpoint, tmp_path / "part", lambda name: name.replace("ls2.gamma", "ls2.scale"),
        drop=("encoder.norm.bias",), more_of_it=np.zeros(3, np.float32),
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_geometry(folder)
    lines = str(error.value).splitlines()[1:]
    layers = pi3_checkpoint.about["dec_depth"] - 1
    assert f"  missing: decoder.*.ls2.gamma (layers 0-{layers}); nearest: decoder.*.ls2.scale" in lines
    assert any(line.startswith("  missing: encoder.norm.bias") for line in lines)
    assert any(line.startswith("  unknown: more_of_it") for line in lines)


def test_a_tensor_from_which_sizes_are_read(pi3_checkpoint, tmp_path):
    folder = changed(pi3_checkpoint, tmp_path / "less", drop=("decoder.0.attn.q_norm.weight",))
    with pytest.raises(ValueError, match="lacks the tensor decoder.0.attn.q_norm.weight, from which sizes"):
        load_geometry(folder)


def test_numbers_that_are_not_finite(pi3_checkpoint, tmp_path):
    bad = {"camera_head.fc_t.bias": np.full(3, np.nan, np.float32)}
    with pytest.raises(ValueError, match="camera_head.fc_t.bias holds numbers that are not finite"):
        load_geometry(changed(pi3_checkpoint, tmp_path / "nan", **bad))


def test_what_holds_no_model_of_geometry(tmp_path):
    (tmp_path / "other").mkdir()
    safetensors.numpy.save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no model of geometry .*register_token \(pi3\), aggregator"):
        load_geometry(tmp_path / "other")
    with pytest.raises(ValueError, match="there is no .*nowhere"):
        load_geometry(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must lie on a disk; got gs://bucket/pi3"):
        load_geometry("gs://bucket/pi3")


def test_vggt_comes_with_tensors_that_nothing_reads(vggt_checkpoint, tmp_path):
    more = {"track_head.a": np.zeros(3, np.float32), "aggregator.patch_embed.mask_token": np.zeros((1, 4), np.float32)}
    assert load_geometry(changed(vggt_checkpoint, tmp_path / "whole", **more)).kind == "vggt"
    with pytest.raises(ValueError, match="missing: point_head.scratch.layer4_rn.weight"):
        load_geometry(changed(vggt_checkpoint, tmp_path / "part", drop=("point_head.scratch.layer4_rn.weight",)))
