"""Losses, log-probs and metrics of KTO as functions of tensors and process groups; needs torch only."""
