import keel

sampled = keel.sample(
    {"model": "runs/quickstart/sft/model", "output": "runs/python/responses.jsonl", "sampling": {"num_responses": 2}},
    prompts=["customer: hello. my radio is broken. agent:"],
)
print(sampled.rows[0]["responses"], sampled.truncated)

for finding in keel.doctor("runs/quickstart/ppo").findings:
    print(finding.severity, finding.name, finding.first_step)
