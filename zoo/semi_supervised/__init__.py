"""Semi-supervised learning: few labels, much unlabeled data."""
