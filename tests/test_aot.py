"""GPU kernels ahead of time: all compile, spill nothing, keep wide accesses; the rules find faults.

Compilers run in processes of their own, since one under Triton's interpreter cannot compile.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import aot  # noqa: E402
import aot_cuda  # noqa: E402
import sass  # noqa: E402
from aot_rules import faults  # noqa: E402

TRITON_CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
needs_nvcc = pytest.mark.skipif(not aot_cuda.has_nvcc(), reason="needs nvcc on the PATH")

LIST_BUILDS = """
import json, aot_triton as aot
listed = {op: aot.builds(op) for op in aot.ops()}
print(json.dumps([[op, build.kernel.__name__, name]
                  for op, builds in listed.items()
                  for build, name in zip(builds, aot.names(builds))]))
"""
COMPILE_FAULTY = """
import json, aot_triton as aot
from faulty_kernels import CENTRE, EVERY_SECOND
partials = EVERY_SECOND._replace(streams=False)
print(json.dumps([
    aot.row("good", CENTRE, "", "sm_90"), aot.row("good", CENTRE, "", "gfx942"),
    aot.row("spilling", CENTRE, "", "sm_90", maxnreg=24),
    aot.row("narrow", EVERY_SECOND, "", "sm_90"), aot.row("narrow", EVERY_SECOND, "", "gfx942"),
    aot.row("partials", partials, "", "sm_90")]))
"""
GOOD_ROW = {
    "op": "branch_step",
    "kernel": "branch_step_kernel",
    "build": "",
    "language": "cuda",
    "chip": "sm_90",
    "streams": True,
    "registers": 64,
    "stack": 0,
    "spills": 0,
    "wide_loads": 2,
    "wide_stores": 2,
    "instructions_per_normal": 30.0,
    "shared_bytes": 0,
}


def run(*arguments, cache):
    """Runs Python without the interpreter's variable and with an empty Triton cache."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(BENCH), str(ROOT / "tests")])
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=env, capture_output=True, text=True
    )


def printed(code, cache):
    done = run("-c", code, cache=cache)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def table():
    path = BENCH / "results" / "aot.json"
    assert path.is_file(), f"{path} must exist; try {aot.RENEW}"
    return json.loads(path.read_text())


def named(rows):
    return sorted([row["op"], row["kernel"], row["build"], row["chip"]] for row in rows)


def in_language(table, language):
    return [row for row in table["kernels"] if row["language"] == language]


def test_committed_table_is_of_these_sources(table):
    same = table["meta"]["sources"] == aot.digest()
    assert same, f"bench/results/aot.json must be of the kernels as they are; try {aot.RENEW}"


def test_committed_table_has_no_faults(table):
    assert faults(table["kernels"]) == []


@needs_triton
def test_committed_table_has_every_triton_build(table, tmp_path):
    builds = printed(LIST_BUILDS, tmp_path)
    expected = sorted([*build, chip] for build in builds for chip in TRITON_CHIPS)
    assert named(in_language(table, "triton")) == expected
    written = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert written == {kernel for _, kernel, _ in builds}, "every kernel needs a Build"


def test_committed_table_has_every_cuda_kernel(table):
    rows = in_language(table, "cuda")
    for op in aot_cuda.names():
        source = (aot_cuda.SOURCES / f"{op}.cu").read_text()
        written = re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", source)
        found = [row for row in rows if row["op"] == op]
        assert {row["kernel"] for row in found} == set(written) != set(), op
        builds = sorted({(row["op"], row["kernel"], row["build"]) for row in found})
        expected = sorted([*build, chip] for build in builds for chip in aot_cuda.CHIPS)
        assert named(found) == expected
        ptx = [tuple(kernel) for kernel in table["meta"]["ptx"][op]]
        assert ptx == [(kernel, build) for _, kernel, build in builds], f"{op}: PTX lacks a kernel"
    assert {row["op"] for row in rows} == set(aot_cuda.names())


@needs_triton
@pytest.mark.slow
def test_triton_kernels_compile_without_faults(tmp_path):
    # Triton 3.6 gives AMD's chips narrow accesses where alignment is a hint, as in the core ops
    old = version("triton").startswith("3.6.")
    out, chips = tmp_path / "aot.json", ("sm_90",) if old else ("sm_90", "gfx942")
    options = [word for chip in chips for word in ("--chip", chip)]
    options = ("--language", "triton", *options, "--json", out)
    done = run(BENCH / "aot.py", *options, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["kernels"]
    builds = printed(LIST_BUILDS, tmp_path / "cache")
    assert named(rows) == sorted([*build, chip] for build in builds for chip in chips)
    assert faults(rows) == []


@needs_triton
@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_compile_without_faults(tmp_path):
    out = tmp_path / "aot.json"
    options = ("--language", "cuda", "--chip", "sm_90", "--json", out)
    done = run(BENCH / "aot.py", *options, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["kernels"]
    assert {row["op"] for row in rows} == set(aot_cuda.names())
    assert faults(rows) == []


@needs_triton
def test_spilling_and_narrow_kernels_are_named(tmp_path):
    rows = printed(COMPILE_FAULTY, tmp_path)
    spilling = next(row for row in rows if row["op"] == "spilling")
    # 8,192 fp32 over 128 threads are 64 a thread, which 24 registers cannot hold: at least 40 go
    # out and come in again
    assert spilling["registers"] == 24
    assert spilling["spills"] >= 2 * 4 * 40
    assert faults(rows) == [
        f"spilling: centre_kernel in triton for sm_90 must spill nothing, got {spilling['spills']}",
        "spilling: centre_kernel in triton for sm_90 must use no stack, "
        f"got {spilling['stack']} bytes",
        *(
            f"narrow: every_second_kernel in triton for {chip} must {move} 16 bytes at a time, "
            "got no such access"
            for chip in ("sm_90", "gfx942")
            for move in ("load", "store")
        ),
    ]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"instructions_per_normal": 31.0}, "take at most 30 instructions per normal, got 31.0"),
        ({"spills": 4}, "spill nothing, got 4"),
        ({"stack": 32}, "use no stack, got 32 bytes"),
        ({"wide_loads": 0}, "load 16 bytes at a time, got no such access"),
        ({"wide_stores": 0}, "store 16 bytes at a time, got no such access"),
    ],
)
def test_a_row_that_breaks_a_rule_is_named(change, rule):
    assert faults([GOOD_ROW]) == []
    broken = "branch_step: branch_step_kernel in cuda for sm_90 must " + rule
    assert faults([GOOD_ROW, {**GOOD_ROW, **change}]) == [broken]


def test_the_limit_is_for_some_ops_on_one_chip():
    slow = {**GOOD_ROW, "instructions_per_normal": 31.0}
    assert faults([{**slow, "chip": "sm_80"}, {**slow, "op": "philox_normal"}]) == []


def test_noise_that_is_not_found_is_a_fault():
    silent = {**GOOD_ROW, "instructions_per_normal": None}
    assert faults([GOOD_ROW, silent]) == []
    rule = "must draw noise with MUFU.COS in one of its kernels, got none"
    assert faults([silent]) == [f"branch_step in cuda for sm_90 {rule}"]


def test_rules_know_what_does_not_stream():
    sums = {**GOOD_ROW, "op": "edge_dots", "kernel": "edge_dots_kernel", "wide_stores": 0}
    noise = {**GOOD_ROW, "op": "philox_normal", "kernel": "philox_words_kernel", "wide_loads": 0}
    assert faults([sums, noise]) == []
    assert len(faults([{**sums, "wide_loads": 0}, {**noise, "wide_stores": 0}])) == 2
    partials = {**sums, "wide_loads": 0, "streams": False}
    assert faults([partials]) == []
    assert aot_cuda.CUDA_NOT_STREAMING.search("edge_dots_finish_kernel")
    assert not aot_cuda.CUDA_NOT_STREAMING.search("branch_step_backward_kernel")


def listing(*lines):
    """Spells lines of SASS as nvdisasm prints them; a label ends with a colon."""
    code = (line if line.endswith(":") else f"        /*0000*/    {line} ;" for line in lines)
    return "\n".join(["\t.section\t.text.toy", ".text.toy:", "toy:", *code, "\t.section\t.rest"])


def cost(*lines, lane_normals=None):
    (code,) = sass.functions(listing(*lines)).values()
    return sass.instructions_per_normal(sass.blocks(code), lane_normals)


PAIR = ("MUFU.LG2 R1, R1", "MUFU.SQRT R1, R1", "MUFU.COS R2, R2", "MUFU.SIN R3, R2")
END = ("EXIT", ".L_end:", "BRA `(.L_end)", "NOP")


def test_instructions_per_normal_of_a_loop_over_children():
    found = cost(
        "S2R R0, SR_TID.X",
        "@P0 EXIT",
        ".L_x_0:",
        "LDG.E.64 R4, desc[UR4][R4.64]",
        "@!P1 BRA P4, `(.L_x_1)",  # a child without noise
        *PAIR,
        "NOP",
        ".L_x_1:",
        "BSSY B0, `(.L_x_3)",
        "@P2 BRA `(.L_x_2)",  # a ragged tile
        "STG.E.128 desc[UR4][R6.64], R8",
        "@P3 STG.E.128 desc[UR4][R6.64+0x10], R8",
        "BRA `(.L_x_3)",
        ".L_x_2:",
        "STG.E desc[UR4][R6.64], R8",
        ".L_x_3:",
        "BSYNC B0",
        ".L_x_4:",
        "SHFL.BFLY PT, R9, R9, R10, 0x1f",
        "@P5 BRA `(.L_x_4)",
        "BRA.DIV UR4, `(.L_x_5)",
        ".L_x_6:",
        "@P6 BRA `(.L_x_0)",
        *END[:1],
        ".L_x_5:",
        *["WARPSYNC R1"] * 9,
        "BRA `(.L_x_6)",
    )
    # load, branch; the pair; BSSY, branch, two stores, branch; BSYNC; shuffle, branch, once;
    # branch on divergence, branch back: not the way of the ragged tile, which is shorter by 2
    assert found == (2 + 4 + 5 + 1 + 2 + 1 + 1) / 2


def test_instructions_per_normal_without_a_loop():
    found = cost("S2R R0, SR_TID.X", "@P0 EXIT", *PAIR, "STG.E.128 desc[UR4][R6.64], R8", *END)
    assert found == (2 + 4 + 1 + 1) / 2
    assert cost("S2R R0, SR_TID.X", *END) is None


def test_a_stream_is_as_many_normals_as_a_thread_owns():
    own = ("@P0 BRA `(.L_x_1)", *PAIR, ".L_x_1:", "IADD3 R1, R1, R2, RZ")
    other = ("@P0 BRA `(.L_x_2)", *PAIR, ".L_x_2:", "IADD3 R1, R1, R2, RZ")
    lines = (".L_x_0:", *own, *other, "@P1 BRA `(.L_x_0)", *END)
    # two branches, two additions and the branch back come with one pair or with both
    assert cost(*lines) == (5 + 4) / 2
    assert cost(*lines, lane_normals=4) == (5 + 8) / 4
    assert cost(*lines, lane_normals=8) == (5 + 4) / 2


def test_noise_in_an_inner_loop_is_counted_there():
    inner = (".L_x_1:", *PAIR, "@P1 BRA `(.L_x_1)")
    around = (".L_x_0:", "LDG.E R1, desc[UR4][R2.64]", *inner, "STG.E.128 desc[UR4][R6.64], R8")
    assert cost(*around, "@P0 BRA `(.L_x_0)", *END) == (4 + 1) / 2


def test_code_that_cannot_be_followed_raises():
    no_way = "must draw noise and store 16 bytes if any does, got none"
    with pytest.raises(ValueError, match=no_way):
        cost("CALL.REL.NOINC `(noise)", "EXIT", "noise:", *PAIR, "RET.REL.NODEC R2 `(toy)")
    either = ("@P0 BRA `(.L_x_1)", *PAIR, "BRA `(.L_x_2)", ".L_x_1:", "STG.E.128 [R6.64], R8")
    with pytest.raises(ValueError, match=no_way):  # twice around would do both
        cost(".L_x_0:", *either, ".L_x_2:", "@P1 BRA `(.L_x_0)", *END)
    with pytest.raises(ValueError, match=r"must name its target, got .*BRX R2"):
        cost("BRX R2 -0x10", "EXIT")
