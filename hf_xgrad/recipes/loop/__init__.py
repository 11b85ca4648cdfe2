"""The same without the Trainer, under Accelerate."""
