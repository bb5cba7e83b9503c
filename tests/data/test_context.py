"""Packed rows under each context budget of each family: what stands where, blank and unreadable samples, resume."""

import jax
import numpy as np
import pytest

from tests.data.test_pipeline import assert_equal, train
from tests.patches_world import save_tokenizer
from vlmem_jax.processing import ImageConfig, PatchConfig, TileProcessor, Tokenizer, make_processor
from vlmem_jax.types import PatchGeometry, TileGeometry

TILE_CONTEXTS = "all", "thumbnail", "pooled:2", "stride:2"
PATCH_CONTEXTS = "all", "pooled:2", "stride:2"


@pytest.fixture(scope="module")
def make(processor, tmp_path_factory):
    def make(family, context):
        if family == "tiles":
            image = ImageConfig(max_tiles=4, context=context, dhr_map="fine")
            return TileProcessor(processor.tokenizer, image, TileGeometry(9, 3), system="s")
        image = PatchConfig(64, 512, min_frame_pixels=64, max_frame_pixels=512, context=context)
        tokenizer = Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
        return make_processor(tokenizer, image, PatchGeometry(4, 2, 2, 2, 2.0), "s", "qwen2-vl")

    return make


CASES = [("tiles", one) for one in TILE_CONTEXTS] + [("patches", one) for one in PATCH_CONTEXTS]


@pytest.mark.parametrize(("family", "context"), CASES)
def test_rows_hold_what_the_plan_says_and_resume_where_they_were(folder, make, family, context):
    lines = [folder.talk(f"{n}?", image=folder.image(f"{n}.png", 18 + 9 * (n % 2), 18, seed=n)) for n in range(6)]
    lines += [folder.talk("only text"), folder.talk("broken", image=folder.image("broken.png", 18, 18))]
    config = folder.config(*lines, pack_tiles=48, on_bad_sample="skip")
    data = train(config, make(family, context), steps=4)
    folder.truncate("broken.png")
    hosts = [data[n] for n in range(4)]
    assert data.unreadable and sum(host.tiles for host in hosts)
    for host in hosts:
        text, views = host.batch.text, host.batch.views
        assert host.tokens == (text.segments_BT > 0).sum()
        P = views.segments_BM.shape[-1] // views.pixels_BISSc.shape[2]
        assert host.tiles * P == (views.segments_BM > 0).sum()
        for tokens_T, index_T, seen_M, *pool_M in zip(
            *(x.reshape(-1, x.shape[-1]) for x in (text.segments_BT, text.visual_index_BT, views.segments_BM)),
            *([] if views.pool_BM is None else [views.pool_BM.reshape(-1, views.pool_BM.shape[-1])]),
            strict=True,
        ):
            stands = index_T >= 0
            if context.startswith("pooled"):
                [pool_M] = pool_M
                assert (pool_M[seen_M == 0] == -1).all() and (pool_M[seen_M > 0] >= 0).all()
                of_mean_C = np.array([set(seen_M[pool_M == mean]) for mean in index_T[stands]])
                assert [{segment} for segment in tokens_T[stands]] == of_mean_C.tolist()
            else:
                assert not pool_M
                np.testing.assert_array_equal(tokens_T[stands], seen_M[index_T[stands]])
    again = train(config, make(family, context), steps=4)
    for step, host in zip((2, 3), again.iterate(start=2), strict=True):
        assert_equal(host, hosts[step])
    assert len({jax.tree.structure(host.batch) for host in hosts}) == 1
