"""What runs leave behind: checkpoints, logs, cards, pictures; and pushing them to the Hub."""
