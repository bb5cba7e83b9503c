"""Counting cycles in a small dump written by hand, in the compiler's format."""

import dataclasses
import importlib.util
import json

import pytest

from benchmarks.tpu_dump import Span, read
from benchmarks.tpu_kernels import Case
from benchmarks.tpu_static import Row, as_json, main, table

CODE = """
     0   :  { %s0 = sld [smem:[#allocation0]] } /* Start region 0 */
   0x1 LB: > { %5 = vmatmul.mubr.bf16.gmra.mxu0 %v1 /* Start region 1 */ }
   0x2   : > { %6 = vmatmul.mubr.bf16.gmra.mxu0 %v2  ;;  %7 = vmatmul.mubr.bf16.gmra.mxu1 %v3 }
   0x3   : > { %8 = sbr.rel (%p1) target = $region3  ;;  %9 = vst [vmem:[#spill]] %v4 }
   0x4   : > {}
   0x5   : > {}
   0x6   : > {}
   0x7   : > {}
   0x8   : > { %10 = vadd.f32 %v5, %v6 }
   0x9   : > { %11 = sbr.rel (!%p2) target = $region1 /* Start region 3 */ }
   0xa   : > {}
   0xb   : > {}
   0xc   : > {}
   0xd   : > {}
   0xe   :  {} /* End region 0 */
"""
LOADS = {1: (1, 0, 0, 0, 0, 0, 0, 0, 0, 0), 2: (2, 0, 0, 0, 0, 0, 0, 0, 0, 0), 3: (0, 0, 0, 0, 0, 0, 0, 1, 1, 0)}
CAPACITY = "4 3 4 2 1 3 3 1 1 2"


@pytest.fixture
def program(tmp_path):
    (tmp_path / "17-kernel.1-71-final_bundles.txt").write_text(CODE)
    loads = "\n".join(" ".join(map(str, LOADS.get(i, (0,) * 10))) for i in range(15))
    path = tmp_path / "17-kernel.1-69-final_hlo-static-per-bundle-utilization.txt"
    path.write_text(f"== CAPACITY:\nMXU, XLU\n{CAPACITY}\n== UTILIZATION:\n{loads}\n")
    return read(tmp_path, "kernel")


def test_loops_and_what_branches_jump_over_are_found(program):
    assert len(program.bundles) == 15
    assert program.spans == [Span("loop", 1, 14), Span("branch", 8, 9)]


def test_bundles_count_as_often_as_they_run(program):
    loop, branch = program.spans
    raw, _ = program.cycles(program.weights({loop: 10.0, branch: 0.5}))
    assert raw == 2 + 10 * (12 + 0.5)


def test_a_matmul_holds_its_unit(program):
    raw, corrected = program.cycles([1.0] * 15)
    assert (raw, corrected) == (15, 15 + 15)  # the second on unit 0 waits for 15 more cycles


def test_load_and_spills(program):
    weights = program.weights({program.spans[0]: 10.0})
    load = program.load(weights)
    assert load["MXU"] == pytest.approx(10 * 3 / (4 * (2 + 10 * 13)))
    assert load["VSTORE:SPILL"] == pytest.approx(10 / (2 + 10 * 13))
    assert program.spills(weights) == 1


def test_a_kernel_that_was_not_compiled_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no final_bundles of a kernel named other"):
        read(tmp_path, "other")


def test_rows_state_utilisation_beside_splash():
    case = Case(chip="v5p", queries=1024, slots=1024, blocks=(512, 512, 512))
    load = dict.fromkeys(("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL"), 0.5)
    row = Row(case, 1000, 1250.0, 1000.0, 7, load | {"SALU": 0.1}, 2**21, None)
    splash = dataclasses.replace(row, case=dataclasses.replace(case, kernel="splash"), cycles=2000.0)
    said = as_json(row, splash)
    assert (said["mxu_utilisation"], said["splash_mxu_utilisation"]) == (0.8, 0.5)
    assert (said["chip"], said["direction"], said["bundles"], said["spills"]) == ("v5p", "forward", 1000, 7)
    assert said["shape"] == {"batch": 1, "queries": 1024, "slots": 1024, "heads": 16, "kv_heads": 16, "head_dim": 128}
    head, _, *lines = table([row, splash]).splitlines()
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert "| 100.0 | 80.0 | 7 |" in lines[0]


def test_useful_work_and_least_traffic():
    case = Case(queries=16, slots=32, heads=4, kv_heads=2, head_dim=64)
    assert case.flops == 2 * 2 * 4 * 16 * 32 * 64
    assert case.minimum_bytes == 2 * 64 * (2 * 16 * 4 + 2 * 32 * 2)
    backward = dataclasses.replace(case, direction="backward")
    assert backward.flops == 5 * case.flops / 2


@pytest.mark.tpu_aot
@pytest.mark.xdist_group("libtpu")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_no_size_reports_more_than_the_unit_can_do(tmp_path):
    """Slots that are no multiple of the block are filled up, and what is filled up is not useful."""
    toy = ["--chips", "v5e", "--queries", "256", "--slots", "200", "--heads", "2", "--directions", "backward"]
    main([*toy, "--alone", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["blocks"] == [256, 256, 256] and 0.05 < row["mxu_utilisation"] < 1
