"""Training: model, collation, the loss over label tokens, history and checkpoints."""
