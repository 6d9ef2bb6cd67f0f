"""What a piece of work costs."""

from pathlib import Path

import numpy as np

from hyperlora.evaluation import meter


def test_memory_is_measured_anew_each_time(monkeypatch):
    measured = meter.Meter()
    with measured:
        held = np.ones(400_000_000, np.uint8)
    assert held.nbytes // 2 < measured.bytes and measured.seconds > 0
    with measured:
        pass
    assert measured.bytes < held.nbytes // 2
    monkeypatch.setattr(meter, '_STATUS', Path('/nowhere'))  # as on macOS
    assert meter._held() > 0
