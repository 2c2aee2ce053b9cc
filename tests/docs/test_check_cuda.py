"""tools/check_cuda.py reads what ptxas says of a kernel: spills, registers."""

import importlib.util
import pathlib

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools/check_cuda.py"
SPEC = importlib.util.spec_from_file_location("check_cuda", TOOL)
check_cuda = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_cuda)

NOTES = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z11rows_kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z11rows_kernelPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 192 bytes smem
"""


def errors(kernel, registers, memory=0, limited=True):
    return list(check_cuda.errors_of(kernel, registers, memory, limited))


def test_a_kernel_is_read_with_its_registers_and_memory():
    notes = NOTES.format(stack=8, stores=4, loads=2, registers=79)
    assert check_cuda.kernels_of(notes) == [("rows_kernel(float*)", 79, 14)]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("add_counts_kernel(double*)", "add_counts_kernel"),
        (
            "void tether::cuda::(anonymous namespace)::statistics_kernel<tether::Float16, false, "
            "true>(tether::cuda::RowParameters<false>, long)",
            "statistics_kernel<Float16, false, true>",
        ),
    ],
)
def test_a_kernel_has_a_short_name(name, kernel):
    assert check_cuda.short(name) == kernel


def test_spills_and_registers_beyond_the_limit_are_errors():
    assert errors("rows_kernel<PpoClip>", 80) == []
    assert errors("rows_kernel<PpoClip>", 81) == ["rows_kernel<PpoClip>: 81 registers, at most 80"]
    assert errors("rows_kernel<PpoClip>", 40, 8) == [
        "rows_kernel<PpoClip>: 8 bytes of stack and spills"
    ]
    assert errors("surrogate<PpoClip>", 99, 8, limited=False) == [
        "surrogate<PpoClip>: 8 bytes of stack and spills"
    ]


def test_limits_are_by_softcap_and_a_kernel_without_one_is_an_error():
    assert errors("statistics_kernel<float, false, true>", 33) != []
    assert errors("statistics_kernel<float, true, true>", 33) == []
    assert errors("gradient_kernel<float, false>", 41) != []
    assert errors("gradient_kernel<float, true>", 41) == []
    assert errors("other_kernel", 1) == ["other_kernel: has no line in REGISTERS of check_cuda.py"]
