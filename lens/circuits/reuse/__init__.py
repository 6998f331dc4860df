"""What circuits of different tasks share."""
