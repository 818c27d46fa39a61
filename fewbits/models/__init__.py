"""What fewbits knows about models: one table per family, a walk for the families it does not know."""
