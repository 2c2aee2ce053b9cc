"""tools/check_includes.py sees through paths that go up and down again."""

import importlib.util
import pathlib

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools/check_includes.py"
SPEC = importlib.util.spec_from_file_location("check_includes", TOOL)
check_includes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_includes)


@pytest.mark.parametrize(
    "path, header, error",
    [
        ("rl/kernels/x.cc", "../../libtorch/arrays.h", "it sees only core, estimators, logits, rl"),
        ("rl/kernels/x.cc", "libtorch/arrays.h", "it sees only core, estimators, logits, rl"),
        ("core/x.h", "../rl/token.h", "it sees only core"),
        ("rl/policy/x.h", "../kernels/arrays.h", "it sees only core, estimators, rl"),
        ("estimators/kl/x.h", "../../logits/rows.h", "it sees only core, estimators"),
        ("rl/policy/x.h", "Eigen/Core", "Eigen is for face"),
        ("face/x.h", "ATen/ATen.h", "no torch here"),
        ("rl/policy/x.h", "../../core/../core/check.h", None),
        ("rl/policy/x.h", "../surrogate.h", None),
        ("rl/kernels/x.h", "../policy/ppo.h", None),
        ("face/x.h", "Eigen/Core", None),
    ],
)
def test_arrows(path, header, error):
    found = list(check_includes.errors_of(path, f'#include "{header}"\n'))
    assert (error is None) == (found == [])
    assert error is None or error in found[0]
