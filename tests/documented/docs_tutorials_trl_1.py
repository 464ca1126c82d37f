from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

start, reward = "runs/quickstart/sft/model", "runs/quickstart/reward/model"
tokenizer = AutoTokenizer.from_pretrained(start, padding_side="left")
rows = load_dataset("json", data_files="runs/quickstart/data/rl.jsonl", split="train")
prompts = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=rows.column_names)
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir="runs/trl",
        total_episodes=512,
        per_device_train_batch_size=64,
        num_mini_batches=4,
        num_ppo_epochs=4,
        response_length=40,
        stop_token="eos",
        temperature=1.0,
        learning_rate=3e-4,
        kl_coef=0.03,
        num_sample_generations=0,
        save_strategy="no",
        bf16=False,
        report_to=[],
        logging_steps=1,
    ),
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(start),
    ref_model=AutoModelForCausalLM.from_pretrained(start),
    reward_model=AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1),
    value_model=AutoModelForSequenceClassification.from_pretrained(start, num_labels=1),
    train_dataset=prompts,
    eval_dataset=prompts.select(range(8)),
)
trainer.train()
trainer.save_model("runs/trl/policy")
