"""What is learnt: one plug-in per task, each with a frozen `Task` that renders, tokenises and checks its own data."""
