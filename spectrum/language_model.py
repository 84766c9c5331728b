"""Sampled answers of a causal language model, with or without a chat template."""

from __future__ import annotations


def ask(model, tokenizer, questions: list[str], seed: int, max_new_tokens: int) -> list[str]:
    """A sampled answer to each question, through the model's chat template if it has one."""
    return answer(model, tokenizer, [[{"role": "user", "content": text}] for text in questions], seed, max_new_tokens)


def answer(
    model,
    tokenizer,
    conversations: list[list[dict[str, str]]],
    seed: int,
    max_new_tokens: int,
    temperature: float = 0.9,
) -> list[str]:
    """The sampled next turn of each conversation, a list of messages with a role and a content.

    A model without a chat template is given the contents one below another.
    """
    import torch

    if tokenizer.chat_template:
        texts = [
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
    else:
        texts = ["\n\n".join(message["content"] for message in messages) for messages in conversations]
    # A chat template has put its own special tokens in.
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not tokenizer.chat_template).to(
        model.device
    )
    torch.manual_seed(seed)
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=temperature,
            top_p=0.95,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
