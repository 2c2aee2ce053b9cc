"""k_lambda of log-ratios without a spread takes lambda 1, not what rounding leaves of 0 / 0."""

import math

import pytest
import tether
import tether._ops
import torch


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("count", [3, 7, 10, 23])
def test_equal_log_ratios_fit_lambda_1(elsewhere, count, monkeypatch):
    if elsewhere:
        monkeypatch.setattr(tether._ops, "KERNELS", frozenset())
    log_ratios = torch.full((1, count), 0.1, dtype=torch.float64)
    report = tether.kl_report(log_ratios, torch.ones(1, count), estimator="k_lambda")
    assert report.lambda_ == 1
    assert float(report.mean) == pytest.approx(math.expm1(0.1) - 0.1, rel=1e-12)
