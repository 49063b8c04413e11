"""LoRA by peft: which of the adapters' parameters are matrices, and a few steps.

python examples/lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lit_fanions import configure_optimizers, split_parameters


def main(steps: int = 3) -> float:
    """Fine-tune a small random Llama and return the last loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    print(split_parameters(model))
    optimizer = configure_optimizers(model, lr=0.02, other={"lr": 1e-3})["optimizer"]
    tokens = torch.arange(32).remainder(8).expand(4, -1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(f"training loss: {main():.3f}")
