import re

from vlmem_jax.evals.summary import summarise, table


def line(source, score, memories=None, tokens=10, seconds=1.0, compiled=False, **changes):
    spoken = {} if memories is None else {"memories": memories}
    cost = {"seconds": seconds, "compiled": compiled, "peak_memory_gb": 1.0}
    return (
        {"source": source, "output": "a", "score": score, "tokens": tokens, "stopped": True} | spoken | cost | changes
    )


def test_accuracy_is_a_mean_over_scored_prompts_and_of_sources():
    found = summarise([line("a", 1.0), line("a", 0.0), line("b", 1.0), line("b", None), {"name": "x", "error": "bad"}])
    assert (found["samples"], found["scored"], found["skipped"]) == (4, 3, 1)
    assert found["accuracy"] == 2 / 3 and found["mean_of_sources"] == 0.75
    assert [found["sources"][name]["accuracy"] for name in "ab"] == [0.5, 1.0]
    assert "invocation" not in found


def test_invocations_are_counted_by_kind_and_place():
    memories = [["short", 0], ["short", 9]], [["long", 5]], []
    found = summarise([line("a", 1.0, of) for of in memories], ("short", "long"))["invocation"]
    assert found["ratio"] == {"short": 1 / 3, "long": 1 / 3} and found["per_sample"] == 1.0
    assert found["positions"] == {"short": [1] + [0] * 8 + [1], "long": [0] * 5 + [1] + [0] * 4}


def test_seconds_leave_out_batches_that_compiled_as_long_as_there_are_others():
    mixed = summarise([line("a", 1.0, seconds=9.0, compiled=True), line("a", 1.0, seconds=2.0)])
    assert mixed["seconds"] == 2.0 and not mixed["seconds_with_compilation"]
    alone = summarise([line("a", 1.0, seconds=9.0, compiled=True)])
    assert alone["seconds"] == 9.0 and alone["seconds_with_compilation"]
    assert "9.000*" in table(alone) and "* with compiling" in table(alone) and "*" not in table(mixed)


def test_cut_off_answers_and_the_highest_memory():
    found = summarise([line("a", 1.0, stopped=False), line("a", 0.0, peak_memory_gb=3.0)])
    assert found["cut_off"] == 0.5 and found["peak_memory_gb"] == 3.0


def test_the_table_has_a_row_for_each_source_and_columns_for_what_there_is():
    plain = table(summarise([line("zoo", 1.0), line("art", None)])).splitlines()
    assert [row.split() for row in plain] == [
        ["source", "samples", "accuracy", "s/sample"],
        ["art", "1", "-", "1.000"],
        ["zoo", "1", "100.0", "%", "1.000"],
        ["all", "2", "100.0", "%", "1.000"],
    ]
    spoken = summarise([line("zoo", 1.0, [["long", 1]])], ("short", "long"))
    spoken["without_memory"] = summarise([line("zoo", 0.0, [], seconds=0.5)], ("short", "long"))
    header, zoo, _ = (re.split("  +", row) for row in table(spoken).splitlines())
    assert header[:5] == ["source", "samples", "accuracy", "short calls", "long calls"]
    assert header[5:] == ["s/sample", "without memory", "s/sample"]
    assert zoo == ["zoo", "1", "100.0 %", "0.0 %", "100.0 %", "1.000", "0.0 %", "0.500"]


def test_nothing_to_count():
    found = summarise([{"name": "x", "error": "bad"}])
    assert found["accuracy"] is None and found["skipped"] == 1
    assert table(found).splitlines()[-1].split() == ["all", "0", "-", "-"]
