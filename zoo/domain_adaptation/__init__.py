"""Learning on labelled source domains for a target domain without labels."""
