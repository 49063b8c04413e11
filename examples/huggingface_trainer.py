"""transformers' Trainer: a small random GPT-2 learns a sequence, stops, and resumes.

python examples/huggingface_trainer.py
"""

import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lit_fanions.integrations.huggingface import optimizer_factory


def main(folder: str, steps: int = 20) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Train, train again from the checkpoint in the middle, and return both models."""
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    tokens = torch.arange(32).remainder(8)
    data = [{"input_ids": tokens, "labels": tokens}] * 64
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "save_steps": steps // 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    optimizer = (optimizer_factory, {"algorithm": "muon", "lr": 0.02, "other": {"lr": 3e-3}})

    def train(checkpoint: str | None) -> GPT2LMHeadModel:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        arguments = TrainingArguments(**settings)
        trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return model

    return train(None), train(f"{folder}/checkpoint-{steps // 2}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        trained, resumed = main(*sys.argv[1:2] or [scratch])
    same = all(map(torch.equal, trained.parameters(), resumed.parameters()))
    print(f"the resumed training ends with the same weights: {same}")
