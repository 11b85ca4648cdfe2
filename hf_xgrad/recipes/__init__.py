"""What the command `hf-xgrad` runs: fine-tuning, pretraining, sweeps, the demonstration."""
