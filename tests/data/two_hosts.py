"""One of two hosts, as test_hosts.py starts them: host number, coordinator, JSONL file of each host, tokenizer."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax  # noqa: E402 - the environment comes first
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from vlmem_jax.data import DataConfig, Plan, SourceConfig, TrainData, local_rows, store  # noqa: E402
from vlmem_jax.data.samples import Samples  # noqa: E402
from vlmem_jax.processing import ImageConfig, TileProcessor, Tokenizer  # noqa: E402
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh  # noqa: E402
from vlmem_jax.types import TileGeometry  # noqa: E402


def main(host: int, coordinator: str, path: str, tokenizer: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=host)
    jax.config.update("jax_transfer_guard", "disallow")
    processor = TileProcessor(Tokenizer.load(tokenizer), ImageConfig(max_tiles=4), TileGeometry(8, 2), system="s")
    os.chdir(os.path.dirname(path))
    config = DataConfig(
        train=(SourceConfig(os.path.basename(path)),),
        pack_tokens=300,
        pack_tiles=8,
        rows=16,
        threads=2,
        on_bad_sample="skip",
    )
    measured, measure = [], Samples._measure
    Samples._measure = lambda self, key: measured.append(key) or measure(self, key)
    kept, again = Plan.train(config, processor, 0), Plan.train(config, processor, 0)
    print(store(kept, f"plans{host}", 32), flush=True)
    assert len(measured) == 6  # half of the samples
    assert "is that of" in store(again, f"plans{host}", 32) and len(measured) == 6
    assert [kept.row(i) for i in range(32)] == [again.row(i) for i in range(32)]
    assert os.path.exists(f"plans{host}") == (host == 0)
    everything = TrainData(Plan.train(config, processor, 0), 2, accumulation=2)
    odd_order = [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    layouts = [
        (MeshConfig(data=2, fsdp=4), None, [host * 4 + i for i in range(4)]),
        (MeshConfig(data=8, fsdp=1), odd_order, [2 * i + host for i in range(4)]),
        (MeshConfig(data=2, fsdp=1, tensor=4), odd_order, list(range(8))),  # both hosts hold every row
    ]
    for mesh_config, devices, rows in layouts:
        mesh = make_mesh(mesh_config, devices)
        assert local_rows(mesh, 8).tolist() == rows, local_rows(mesh, 8)
        if len(rows) < 8:
            with pytest.raises(ValueError, match="data must be made for the mesh they go to"):
                everything.on_devices(mesh)
        data = TrainData(Plan.train(config, processor, 0), 2, accumulation=2, mesh=mesh)
        assert kept.fingerprint(32) == data.plan.fingerprint(32)
        for sent in data.on_devices(mesh):
            whole, part = everything[sent.step], data[sent.step]
            assert (sent.denominator, sent.tokens, sent.tiles) == (whole.denominator, whole.tokens, whole.tiles)
            np.testing.assert_array_equal(part.batch.text.tokens_BT, whole.batch.text.tokens_BT[:, rows])
            jax.tree.map(check_shards, sent.batch, whole.batch)
    print("rows agree", flush=True)


def check_shards(sent: jax.Array, whole: np.ndarray) -> None:
    assert sent.shape == whole.shape
    for shard in sent.addressable_shards:
        np.testing.assert_array_equal(jax.device_get(shard.data), whole[shard.index])


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
