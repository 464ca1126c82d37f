"""Statistics, each defined once: intervals, bootstrap, ranks, calibration, agreement, two-sample tests."""
