"""Many settings tried side by side, and ranked without labels."""
