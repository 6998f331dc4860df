"""What each head is worth to a task, by every measure, and how far the measures agree."""
