"""Looking at ids that are on a device."""

from __future__ import annotations

from tether._checks import check_flags, look_at_ids


class check_ids:
    """Whether ids on a device are looked at: one out of range is an IndexError with its place, as
    on the CPU, in place of NaN for its token.

        with tether.check_ids():  # or tether.check_ids(True), until tether.check_ids(False)
            trainer.train()

    For finding a fault: every call waits for its device. It holds for all threads, for the targets
    of token_logps and linear_*, kept ids, and the ids of top_k_kl and head_logps; a compiled graph
    looks at nothing.
    """

    def __init__(self, enabled: bool = True):
        check_flags("check_ids", enabled=enabled)
        self._before = look_at_ids(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        look_at_ids(self._before)
