"""Is this loss right? A loss of one's own against the properties of a good one.

    report = tether.testing.check_loss(my_loss, objective="ppo")
    report.assert_ok()

The counterpart of `tether::testing`. `ragged_batches` is a strategy of hypothesis with the same
kinds of batches.
"""

from tether.testing.check import check_loss
from tether.testing.report import PropertyReport, Report
from tether.testing.strategies import ragged_batches
from tether.testing.traits import ClipRange, Traits

__all__ = ["ClipRange", "PropertyReport", "Report", "Traits", "check_loss", "ragged_batches"]
