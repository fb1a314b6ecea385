"""``pgl compare``: does pretraining help? Every initialisation, label fraction and seed, from one command."""
