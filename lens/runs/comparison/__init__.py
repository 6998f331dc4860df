"""Two runs side by side: what differs head by head, with intervals over the prompts that both have."""
