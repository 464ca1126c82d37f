"""What TRL's PPO is told in every comparison: one process, no evaluation, nothing saved or reported on the way."""

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
