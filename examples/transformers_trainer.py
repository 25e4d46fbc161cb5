"""Selective Spectral Decay in the Hugging Face Trainer: one callback.

    python examples/transformers_trainer.py
    python examples/transformers_trainer.py --resume      # continue from the last checkpoint in the output folder

A small language model with random weights on random tokens, so nothing is downloaded. Expect a log line every 10 steps
with S2D's metrics beside the loss (``s2d/sigma_1_max`` falls), checkpoints that hold an ``s2d.safetensors``, and a
closing summary; takes about 10 s on a CPU. A resumed run ends with the same summary, but for the seconds in it.
"""

import argparse

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments, set_seed

from s2d.integrations.transformers import S2DCallback


def small_language_model() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # one component far above the rest, a stand-in for what pretraining with AdamW leaves behind
        model.model.layers[0].mlp.up_proj.weight += 0.2 * torch.outer(torch.randn(64), torch.randn(32))
    return model


parser = argparse.ArgumentParser()
parser.add_argument("--output", default="build/examples/transformers", help="folder for checkpoints")
parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint there")
options = parser.parse_args()

set_seed(0)
dataset = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (256, 16))]
callback = S2DCallback(lam=1e-2, refresh_every=5)
trainer = Trainer(
    small_language_model(),
    TrainingArguments(
        output_dir=options.output,
        max_steps=30,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        learning_rate=3e-3,
        logging_steps=10,
        save_steps=12,
        report_to="none",
    ),
    train_dataset=dataset,
    callbacks=[callback],
)
trainer.train(resume_from_checkpoint=options.resume)
print(callback.decay.summary())
