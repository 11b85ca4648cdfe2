"""What the command `hf-xgrad` runs: fine-tuning, pretraining, sweeps, the demonstration."""

# By their commands: the module, which has its own flags and its own --help, and what it does.
RECIPES = {
    "glue": ("classification.glue", "Fine-tune on a GLUE task, or on other texts with labels."),
    "clm": ("language.clm", "Fine-tune a causal language model, or pretrain a new one."),
    "mlm": ("language.mlm", "Fine-tune a masked language model, or pretrain a new one."),
    "glue-loop": ("loop.glue", "As glue, in a loop without the Trainer."),
    "clm-loop": ("loop.clm", "As clm, in a loop without the Trainer."),
    "sweep": ("sweep", "Run one of them for several s, learning rates and seeds, and compare."),
    "demo": ("demo", "Train a small model with XGrad and without, and show both side by side."),
}
