"""Pools that are made as they are needed, and prompts that are answered side by side."""

from vlmem_jax.generate import Generator, Pool, Request, SamplingConfig, answers

GREEDY = SamplingConfig(max_new_tokens=6)


def test_answers_come_in_the_order_of_the_prompts(vlm, params, make_prompt):
    """More of them than rows; a pool that held a smaller one before is made anew, and its answers are not lost."""
    generator = Generator(vlm, params, stop_ids=[])
    prompts = [make_prompt(9 + 7 * n, n % 3, seed=n) for n in range(5)]
    found = answers(generator, prompts, GREEDY, rows=2)
    assert len({tuple(answer) for answer in found}) == len(prompts)
    pool = Pool(generator, 2)
    [before] = pool.submit([Request(prompts[0], GREEDY)])
    small = pool.engine
    each = pool.submit([Request(prompt, GREEDY) for prompt in prompts])
    assert pool.engine is not small and before.result() == found[0]
    assert [handle.result() for handle in each] == found
    [again] = pool.submit([Request(prompts[0], GREEDY)], spare=1)
    assert again.result() == found[0]
