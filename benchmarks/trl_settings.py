"""Settings of TRL's PPO in every comparison: one process, no evaluation, no saving or reporting during the run."""

COMMON = {
    "gradient_accumulation_steps": 1,
    "stop_token": "eos",
    "temperature": 1.0,
    "num_sample_generations": 0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": [],
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
