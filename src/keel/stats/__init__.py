"""Statistics, each defined once: intervals, bootstrap, calibration, agreement, two-sample tests."""
