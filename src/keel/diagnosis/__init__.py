"""The doctor: rules that read a run's metrics and report what is wrong, the evidence, and what to change."""
