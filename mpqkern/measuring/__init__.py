"""What all that looks at a running model shares: the task, a bank for what was measured, a meter for how far it is."""
