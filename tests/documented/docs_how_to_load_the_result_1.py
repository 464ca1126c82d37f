from transformers import pipeline

generate = pipeline("text-generation", model="runs/quickstart/ppo/policy")
print(generate("customer: hello. my radio is broken. agent:", max_new_tokens=40, do_sample=True)[0]["generated_text"])
