"""Train a tiny transformer on handwritten digits with the Trainer of transformers, and see how many weights move.

python examples/trainer_digits.py
"""

from __future__ import annotations

import argparse

import torch
from _report import print_report
from sklearn.datasets import load_digits
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

from weightflip import FlipTrackingOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", default="runs/trainer_digits", help="where the event files go")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3, help="the highest learning rate; a cosine takes it to 0")
    args = parser.parse_args()

    # A digit is a sentence of 64 words, its pixels, in a language of 17 words; one more is for padding.
    pixels, labels = load_digits(return_X_y=True)
    data = [
        {"input_ids": torch.tensor(words, dtype=torch.long), "labels": int(label)}
        for words, label in zip(pixels, labels, strict=True)
    ]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=18,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=10,
        pad_token_id=17,
    )
    model = LlamaForSequenceClassification(config)

    # The one line that changes. Before, it was
    #     optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        model,
        quantizer="e4m3:row",
        include="model.layers.*_proj.weight",
        log_dir=args.log_dir,
    )

    settings = TrainingArguments(
        output_dir=f"{args.log_dir}/trainer",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    optimizer.close()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"Training loss: {losses[0]:.4f} over the first steps, {losses[-1]:.4f} over the last")
    print()
    print_report(optimizer, args.log_dir)


if __name__ == "__main__":
    main()
