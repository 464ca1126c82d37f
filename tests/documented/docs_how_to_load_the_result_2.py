from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "runs/quickstart/reward/model"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
text = "customer: hello. my radio is broken. agent: i will replace the broken radio.</s>"
print(model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item())
